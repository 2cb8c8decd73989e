package store

import (
	"errors"
	"fmt"
	"os"
	"path"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/sqlitefile"
)

// A database that is copied to the mount (cp, scp, rsync) is written without
// SQLite. When its last writer has closed it and it is a whole database, it
// becomes one, as one transaction with all its pages. That is looked at when
// somebody asks for the name, or after adoptAfter, so that a program that
// writes a temporary file and renames it costs one adoption.
const adoptAfter = time.Second

// adoptAgain is the pause after an adoption that the disk refused.
const adoptAgain = 30 * time.Second

// mayBeDatabase marks a file whose last writer has closed it.
func (st *Store) mayBeDatabase(f *file) {
	f.mu.Lock()
	f.copied = false
	already := f.candidate
	f.candidate = true
	f.mu.Unlock()
	if already {
		return
	}
	st.after(adoptAfter, func() { st.adoptIfCandidate(f) })
}

// adoptIfCandidate looks at a file that may hold a whole database, and makes it
// one if it does. What is none stays a file.
func (st *Store) adoptIfCandidate(f *file) {
	f.mu.Lock()
	look := f.candidate && !f.gone.Load()
	f.mu.Unlock()
	if !look {
		return
	}
	f.awaitRelease()
	f.adoptMu.Lock()
	defer f.adoptMu.Unlock()
	f.mu.Lock()
	look = f.candidate && f.writers == 0
	name := f.path
	f.candidate = false
	f.mu.Unlock()
	if !look || f.isDB.Load() || !st.opt.Writable(name) {
		return
	}
	err := st.adopt(f, name)
	if err == nil {
		if err := st.adoptSides(name); err != nil && !errors.Is(err, ErrBusy) { // who opens it tries again
			st.log.Warn("file beside a copied database stays an ordinary file for now", "db", name, "err", err)
		}
	}
	if err != nil && !errors.Is(err, errNoDatabase) {
		st.log.Error("copied database stays an ordinary file for now", "db", name, "err", err)
		st.after(adoptAgain, func() { st.mayBeDatabase(f) })
	}
}

// releaseWait bounds how long a look waits for the kernel to say that a file that
// was closed is released: it says so after close(2) has returned. Beyond that
// somebody else has a copy of the descriptor.
const releaseWait = 300 * time.Millisecond

func (f *file) awaitRelease() {
	pause := 50 * time.Microsecond
	for started := time.Now(); time.Since(started) < releaseWait; pause = min(2*pause, 5*time.Millisecond) {
		f.mu.Lock()
		open := f.candidate && f.writers > 0
		f.mu.Unlock()
		if !open {
			return
		}
		time.Sleep(pause)
	}
}

var errNoDatabase = errors.New("no whole SQLite database")

// adopt makes a copied database one of ours: its first transaction holds every
// page, durable before it returns.
func (st *Store) adopt(f *file, name string) error {
	b, err := st.fs.OpenFile(path.Join(filesDir, name), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() {
		if b != nil {
			_ = b.Close()
		}
	}()
	c, err := wholeDatabase(b)
	if err != nil {
		return err
	}
	db := st.databaseFor(f, name)
	// What a drop left in memory must not come over the copied file.
	db.flushMu.Lock()
	defer db.flushMu.Unlock()
	if err := db.flushLocked(); err != nil {
		return err
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.exists || db.dropped || db.journal != nil && db.journal.open {
		return nil
	}
	p, err := db.encode(c, 0, commitlog.Staged)
	if err != nil || p == nil {
		return err
	}
	if err := st.wlog.Wait(p.lsn); err != nil {
		db.fenceWith(err)
		return err
	}
	f.mu.Lock()
	if f.back == nil {
		f.back, b = b, nil // reads go through it until the file has moved
	}
	f.mu.Unlock()
	db.takeOver()
	f.isDB.Store(true)
	db.size.Store(p.after.size())
	db.confirm(p)
	st.flushSoon(db)
	st.later(func(peer Peer) { peer.InvalidateEntry(name + "-pos") })
	return nil
}

// wholeDatabase describes a file that holds a database from its first byte to
// its last, errNoDatabase if it does not.
func wholeDatabase(b interface {
	ReadAt(p []byte, off int64) (int, error)
	Size() (int64, error)
}) (c change, err error) {
	size, err := b.Size()
	if err != nil {
		return c, err
	}
	var head [sqlitefile.HeaderSize + 1]byte
	if size < int64(len(head)) {
		return c, errNoDatabase
	}
	if _, err := b.ReadAt(head[:], 0); err != nil {
		return c, err
	}
	h, ok := sqlitefile.ParseDatabaseHeader(head[:])
	switch kind := head[sqlitefile.HeaderSize]; {
	case !ok, size%int64(h.PageSize) != 0, kind != 2 && kind != 5 && kind != 10 && kind != 13:
		return c, errNoDatabase
	case h.Pages != 0 && int64(h.Pages)*int64(h.PageSize) != size:
		return c, errNoDatabase
	}
	c.pageSize, c.commit = h.PageSize, uint32(size/int64(h.PageSize))
	c.read = func(pgno uint32, p []byte) error {
		_, err := b.ReadAt(p, int64(pgno-1)*int64(len(p)))
		return err
	}
	for pgno := uint32(1); pgno <= c.commit; pgno++ {
		c.pages = append(c.pages, pgno)
	}
	return c, nil
}

// takeOver makes the content of the ordinary file that of the database: it lies
// under a new layer, and over what a drop left in memory. The caller sets isDB
// after it, so that a read sees either the ordinary file or the new layer. db.mu
// is held.
func (db *DB) takeOver() {
	l := newLayer(db.st.pool)
	l.takes, l.adopted = true, true
	s := *db.stack.Load()
	if top := s.committed[0]; top.empty() {
		s.committed = append([]*layer{l}, s.committed[1:]...)
	} else {
		top.pos, top.lsn = db.at, max(top.lsn, 1)
		s.committed = append([]*layer{l}, s.committed...)
	}
	db.stack.Store(&s)
}

// promote makes the node of a first transaction a database. The ordinary file
// goes when the log is durable past it. db.mu is held.
func (db *DB) promote() {
	if db.file.isDB.Load() {
		return
	}
	if top := db.stack.Load().committed[0]; db.file.backed() && !top.takes {
		top.takes = true
	}
	db.file.isDB.Store(true)
	db.file.gone.Store(false)
	name := db.name
	db.st.later(func(p Peer) {
		for _, suffix := range computedSuffixes {
			p.InvalidateEntry(name + suffix)
		}
	})
}

// absorb copies what shows through from an ordinary file that is not empty into
// the layer of the first transaction, since the file goes.
func (db *DB) absorb(txn *layer, size int64) error {
	if db.exists || !db.file.backed() || db.file.ordinarySize() == 0 {
		return nil
	}
	buf := make([]byte, 64<<10)
	end := min(size, db.file.ordinarySize())
	for off := int64(0); off < end; off += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), end-off)]
		if err := db.readAt(p, off); err != nil {
			return err
		}
		if err := txn.WriteAt(p, off, nil); err != nil {
			return err
		}
	}
	return nil
}

// replace makes the content that c describes that of the database, as one
// durable transaction. The database is not in use. db.mu is held.
func (db *DB) replace(c change) error {
	p, err := db.encode(c, 0, commitlog.Staged)
	if err != nil || p == nil {
		return err
	}
	l := newLayer(db.st.pool)
	buf := make([]byte, c.pageSize)
	for _, sum := range p.sums {
		err := c.read(sum.pgno, buf)
		if err == nil {
			err = l.WriteAt(buf, int64(sum.pgno-1)*int64(len(buf)), nil)
		}
		if err != nil {
			l.Reset()
			return errors.Join(db.st.noSpace(fmt.Errorf("%s: take over page %d: %w", db.name, sum.pgno, err)), db.abort(p, true))
		}
	}
	if err := db.st.wlog.Wait(p.lsn); err != nil {
		l.Reset()
		db.fenceWith(err)
		return err
	}
	s := *db.stack.Load()
	s.committed[0].pos = db.at
	l.cut(p.after.size())
	s.committed = append([]*layer{l}, s.committed...)
	db.stack.Store(&s)
	db.size.Store(p.after.size())
	db.promote()
	db.confirm(p)
	db.st.flushSoon(db)
	db.st.later(func(peer Peer) { peer.InvalidateData(db.file, 0, -1) })
	return nil
}

// drop removes a database: one transaction with commit 0. Its object goes on for
// open handles; another takes the name, the id and the history over.
func (st *Store) drop(db *DB) error {
	db.flushMu.Lock()
	defer db.flushMu.Unlock()
	db.lockSettled()
	defer db.mu.Unlock()
	if db.dropped {
		return fmt.Errorf("%s: %w", db.name, ErrNotExist)
	}
	if err := db.mayWrite(); err != nil {
		return err
	}
	if j := db.journal; j != nil && j.open {
		if err := db.rollBack(); err != nil {
			return err
		}
	}
	p, err := db.encodeDrop()
	if err != nil {
		return st.noSpace(err)
	}
	st.succeed(db, p)
	return nil
}

func (db *DB) encodeDrop() (*pending, error) {
	c := change{pageSize: db.at.PageSize}
	mode := commitlog.Lazy
	if db.st.opt.Durability.Commit {
		mode = commitlog.Staged
	}
	p, err := db.encode(c, 0, mode)
	if err == nil && mode == commitlog.Staged {
		err = db.st.wlog.Wait(p.lsn)
	}
	return p, err
}

// heir returns an object that continues the history of db with another file.
// db.mu is held.
func (st *Store) heir(db *DB, f *file) *DB {
	nd := st.newDB(f, db.name)
	nd.id, nd.history, nd.epoch = db.id, db.history, db.epoch
	nd.at, nd.last, nd.lastAny, nd.lastTime = db.at, db.last, db.lastAny, db.lastTime
	nd.base, nd.applied, nd.metaSeq, nd.dirty = db.base, db.applied, db.metaSeq, db.dirty
	nd.recs, nd.side, nd.metaSlot, nd.metaNamed = db.recs, db.side, db.metaSlot, db.metaNamed
	return nd
}

// rebind makes f, which took the name of a dropped database by a rename or lost
// it by one, the file of that history.
func (st *Store) rebind(db *DB, f *file) {
	db.flushMu.Lock()
	defer db.flushMu.Unlock()
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.dropped || db.exists {
		return
	}
	nd := st.heir(db, f)
	nd.stack.Store(db.stack.Load())
	db.stack.Store(&layers{committed: []*layer{newLayer(st.pool)}})
	db.dropped, db.side = true, nil
	st.nsMu.Lock()
	st.byName[db.name], st.byID[db.id] = nd, nd
	st.nsMu.Unlock()
	st.flushSoon(nd)
}

// succeed ends db with the drop p, and makes the object that continues its
// history. db.flushMu and db.mu are held.
func (st *Store) succeed(db *DB, p *pending) *DB {
	f := db.file
	db.exists = false
	nd := st.heir(db, st.newFile(db.name, f.mode.Load()))
	top := nd.stack.Load().committed[0]
	top.fresh = true
	top.cut(0)
	st.nsMu.Lock()
	st.byName[db.name], st.byID[db.id] = nd, nd
	delete(st.files, db.name)
	for _, suffix := range []string{"-journal", "-wal", "-shm"} {
		if s := st.sides[db.name+suffix]; s != nil && s.owner == f {
			delete(st.sides, db.name+suffix)
			s.gone.Store(true)
		}
	}
	st.nsMu.Unlock()
	if f.backed() { // not flushed since it was an ordinary file: the name must not find that again
		if err := st.fs.Remove(path.Join(filesDir, db.name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			st.log.Warn("dropped database is left as an ordinary file", "db", db.name, "err", err)
		}
	}
	nd.confirm(p)
	nd.exists = false
	db.dropped = true
	db.side = nil
	db.journal, db.wal = nil, nil
	f.gone.Store(true)
	name := db.name
	st.flushSoon(nd)
	st.later(func(peer Peer) {
		for _, suffix := range []string{"-journal", "-wal", "-shm", "-pos", "-acked", "-writer"} {
			peer.InvalidateEntry(name + suffix)
		}
	})
	return nd
}
