package store

import (
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/sabotage"
	"github.com/litefs-agent/litefs-agent/internal/sqlitefile"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// Errors of Apply, besides those of the disk.
var (
	// ErrPosition: the record does not begin where the database stands. It is
	// returned as a *PositionError.
	ErrPosition = errors.New("position mismatch")
	// ErrHistory: the database here has another history.
	ErrHistory = errors.New("another history")
	// ErrCorrupt: the bytes are no LTX file, or lie about their checksums.
	ErrCorrupt = errors.New("record is corrupt")
)

// PositionError is ErrPosition with both positions.
type PositionError struct {
	Name  string
	Have  ltx.Pos
	Start ltx.Pos // where the record begins: TXID before it, pre-apply checksum
}

func (e *PositionError) Error() string {
	return fmt.Sprintf("%s: is at %s, record starts at %s", e.Name, e.Have, e.Start)
}

// Is makes a PositionError an ErrPosition.
func (e *PositionError) Is(target error) bool { return target == ErrPosition }

// Incoming is a record of a database that somebody else writes.
type Incoming struct {
	Name    string
	History uint64
	Epoch   Epoch
	// Replace makes the record, which holds every page, the whole database,
	// wherever that stood.
	Replace bool
	// LTX is the record. Size is its length in bytes.
	LTX  io.ReaderAt
	Size int64
}

// Apply takes a record: it is checked whole, appended to the log, and becomes the
// position of the database. It is durable once Sync returned. A record that the
// database already holds changes nothing and is no error.
func (st *Store) Apply(in Incoming) (*DB, error) {
	if err := st.checkIncoming(in.Name); err != nil {
		return nil, err
	}
	db, err := st.incomingDB(in)
	if err != nil {
		return nil, err
	}
	unlock, err := db.lockReaders()
	if err != nil {
		return db, err
	}
	defer unlock()
	if in.Replace {
		// What the replaced line left in memory must not come after the new one.
		db.flushMu.Lock()
		defer db.flushMu.Unlock()
		if err := db.flushLocked(); err != nil {
			return db, err
		}
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	if err := db.fenced(); err != nil {
		return db, err
	}
	if err := db.quiet(); err != nil {
		return db, err
	}
	return db, db.applyIncoming(in)
}

func (st *Store) checkIncoming(name string) error {
	if !ValidName(name) {
		return fmt.Errorf("%q is no database name: %w", name, ErrCorrupt)
	}
	return nil
}

// ValidName reports whether name can be the path of a database below a mount.
func ValidName(name string) bool {
	return name != "" && path.Clean("/"+name) == "/"+name && len(name) <= 1024 && !strings.Contains(name, "\x00")
}

// incomingDB returns the database of a name, made if there is none.
func (st *Store) incomingDB(in Incoming) (*DB, error) {
	st.nsMu.Lock()
	defer st.nsMu.Unlock()
	db := st.byName[in.Name]
	if db == nil {
		db = st.newDB(st.newFile(in.Name, st.databaseMode(in.Name)), in.Name)
		db.history, db.epoch = in.History, in.Epoch
		st.byName[in.Name] = db
	}
	return db, nil
}

// checkPosition reads the header of a record and compares it with where the
// database stands. The decoder is nil for one that was seen before. db.mu is held.
func (db *DB) checkPosition(in Incoming) (*ltx.Decoder, ltx.Header, error) {
	if db.at.TXID == 0 {
		db.history, db.epoch = in.History, in.Epoch // also after a record of another line was refused
	}
	if db.history != in.History && !in.Replace {
		return nil, ltx.Header{}, fmt.Errorf("%s: has %016x, record is of %016x: %w", db.name, db.history, in.History, ErrHistory)
	}
	dec := ltx.NewDecoder(io.NewSectionReader(in.LTX, 0, in.Size))
	h, err := dec.DecodeHeader()
	if err != nil {
		return nil, h, fmt.Errorf("%s: %w: %w", db.name, ErrCorrupt, err)
	}
	if db.history == in.History && h.MaxTXID <= db.at.TXID {
		return nil, h, nil
	}
	start := ltx.Pos{TXID: h.MinTXID - 1, PostApplyChecksum: h.PreApplyChecksum}
	if h.MinTXID != 1 && !in.Replace && start != db.at.Pos {
		return nil, h, &PositionError{db.name, db.at.Pos, start}
	}
	return dec, h, nil
}

func (db *DB) applyIncoming(in Incoming) error {
	dec, h, err := db.checkPosition(in)
	if dec == nil || err != nil {
		return err
	}
	full := h.MinTXID == 1
	if in.Replace {
		if !full {
			return fmt.Errorf("%s: replacement does not start at 1: %w", db.name, ErrCorrupt)
		}
		if err := db.keepBranch(in.History); err != nil {
			return err
		}
	}
	undo := db.beginLine(in)
	in.Replace = in.Replace || full
	p, l, err := db.decodeIncoming(in, dec, h)
	if err != nil {
		undo()
		return err
	}
	if err := db.appendIncoming(in, p, h); err != nil {
		l.Reset()
		undo()
		return err
	}
	if full { // the records before it lead nowhere: the index has no gaps and no overlaps
		db.dropFiles(db.recs.list)
		db.recs.list = nil
	}
	db.show(p, l)
	return nil
}

// beginLine forgets the present line of a database before a record that replaces
// it is read; undo takes that back. db.mu is held.
func (db *DB) beginLine(in Incoming) (undo func()) {
	if !in.Replace {
		return func() {}
	}
	history, epoch, recs, at, base, applied := db.history, db.epoch, db.recs, db.at, db.base, db.applied
	if db.history != in.History {
		db.base, db.applied = position{}, position{}
	}
	db.history, db.epoch, db.recs, db.at = in.History, in.Epoch, records{}, position{}
	return func() {
		db.history, db.epoch, db.recs, db.at, db.base, db.applied = history, epoch, recs, at, base, applied
	}
}

// decodeIncoming reads and checks the whole record. The layer holds its pages.
func (db *DB) decodeIncoming(in Incoming, dec *ltx.Decoder, h ltx.Header) (*pending, *layer, error) {
	before := db.at
	resized := in.Replace || before.PageSize != 0 && before.PageSize != h.PageSize
	p := &pending{time: time.UnixMilli(h.Timestamp)}
	l := newLayer(db.st.pool)
	fail := func(err error) (*pending, *layer, error) {
		l.Reset()
		return nil, nil, fmt.Errorf("%s: %w", db.name, err)
	}
	total := uint64(before.PostApplyChecksum)
	if resized {
		total = 0
	} else {
		gone, err := db.xorSums(h.Commit, before.Commit)
		if err != nil {
			return fail(err)
		}
		total ^= gone
	}
	buf := make([]byte, h.PageSize)
	next := before.Commit + 1 // of the pages that growth must bring (invariant 11)
	if resized {
		next = 1
	}
	lock := ltx.LockPgno(h.PageSize)
	for {
		pgno, err := dec.DecodePage(buf)
		if err == io.EOF {
			break
		}
		if err != nil {
			return fail(fmt.Errorf("%w: %w", ErrCorrupt, err))
		}
		if pgno > h.Commit {
			return fail(fmt.Errorf("page %d beyond the end %d: %w", pgno, h.Commit, ErrCorrupt))
		}
		if next == lock {
			next++
		}
		if pgno > next || pgno == next {
			if pgno != next {
				return fail(fmt.Errorf("page %d is missing: %w", next, ErrCorrupt))
			}
			next++
		}
		sum := uint64(ltx.PageChecksumFromCRC(pgno, h.PageSize, dec.PageCRC()))
		if !resized && pgno <= before.Commit {
			old, err := db.sum(pgno)
			if err != nil {
				return fail(err)
			}
			total ^= old
		}
		total ^= sum
		p.sums = append(p.sums, pageSum{pgno, sum})
		if err := l.WriteAt(buf, int64(pgno-1)*int64(h.PageSize), nil); err != nil {
			return fail(db.st.noSpace(err))
		}
	}
	if next == lock {
		next++
	}
	if next <= h.Commit {
		return fail(fmt.Errorf("page %d is missing: %w", next, ErrCorrupt))
	}
	if err := dec.Close(); err != nil {
		return fail(fmt.Errorf("%w: %w", ErrCorrupt, err))
	}
	post := ltx.ChecksumFlag | ltx.Checksum(total)
	if got := dec.Trailer().PostApplyChecksum; got != post {
		return fail(fmt.Errorf("says checksum %s, its pages give %s: %w", got, post, ErrCorrupt))
	}
	p.after = position{ltx.Pos{TXID: h.MaxTXID, PostApplyChecksum: post}, h.PageSize, h.Commit}
	p.entry.fill(h, post, in.Size)
	p.entry.full = p.entry.full || resized
	if limit := p.after.size(); resized || limit < before.size() {
		if resized {
			limit = 0 // everything is in the layer
		}
		l.under.Store(limit)
	}
	return p, l, nil
}

// appendIncoming puts the record into the log as it came, or into a file of its
// own.
func (db *DB) appendIncoming(in Incoming, p *pending, h ltx.Header) error {
	if err := db.register(); err != nil {
		return db.st.noSpace(err)
	}
	payload, err := db.incomingPayload(in, p, h, db.st.opt.Large)
	if err != nil {
		return db.st.noSpace(err)
	}
	header := db.header(commitlog.KindLTX, p.entry.flags())
	if p.entry.path != "" {
		header.Kind = commitlog.KindReference
	}
	lsn, ref, err := db.st.wlog.Append(header, commitlog.Staged, payload)
	if err != nil {
		return db.st.noSpace(fmt.Errorf("%s: append %s to the log: %w", db.name, p.after.Pos, err))
	}
	p.lsn, p.entry.lsn, p.entry.ref = lsn, lsn, ref
	db.last = lsn
	db.markDirty(lsn)
	return nil
}

// incomingPayload returns what the log holds of a record: its bytes, or beyond
// large of them the reference to the side file made of them.
func (db *DB) incomingPayload(in Incoming, p *pending, h ltx.Header, large int64) ([]byte, error) {
	if in.Size <= large {
		payload := make([]byte, in.Size)
		if _, err := in.LTX.ReadAt(payload, 0); err != nil && err != io.EOF {
			return nil, err
		}
		return payload, nil
	}
	name, err := db.writeSide(in, h)
	if err != nil {
		return nil, err
	}
	p.entry.path = name
	return appendReference(nil, h, ltx.Trailer{PostApplyChecksum: p.after.PostApplyChecksum}, in.Size)
}

func (db *DB) writeSide(in Incoming, h ltx.Header) (string, error) {
	if err := db.makeDir(); err != nil {
		return "", err
	}
	dir := db.levelDir(0)
	if err := disk.MkdirAll(db.st.fs, dir, 0o700); err != nil {
		return "", err
	}
	name := path.Join(dir, sideFilename(h.MinTXID, h.MaxTXID))
	return name, db.st.copyDurable(name, io.NewSectionReader(in.LTX, 0, in.Size))
}

// show makes an applied record what programs see. db.mu is held, and the locks
// of readers.
func (db *DB) show(p *pending, l *layer) {
	s := *db.stack.Load()
	s.committed[0].pos = db.at
	wasThere := db.exists
	top := s.committed[0]
	if l.Len() <= db.st.opt.Large/4 && l.under.Load() > p.after.size() && !top.fresh {
		err := l.Runs(func(b []byte, off int64) error { return top.WriteAt(b, off, nil) })
		if err == nil {
			l.Reset()
			l = nil
		}
	}
	if l != nil {
		s.committed = append([]*layer{l}, s.committed...)
		db.stack.Store(&s)
	}
	db.size.Store(p.after.size())
	db.confirm(p)
	db.st.dropReplicaSides(db)
	if db.exists && !wasThere {
		if err := db.st.place(db); err != nil {
			db.log.Error("database does not show at the mount", "err", err)
		}
		name := db.name
		db.st.later(func(peer Peer) {
			peer.InvalidateEntry(name)
			for _, suffix := range computedSuffixes {
				peer.InvalidateEntry(name + suffix)
			}
		})
	}
	if !db.exists && wasThere {
		db.st.unplace(db)
	}
	db.st.flushSoon(db)
}

// unplace takes a dropped database from the mount; open handles go on reading
// what they see.
func (st *Store) unplace(db *DB) {
	st.nsMu.Lock()
	delete(st.files, db.name)
	st.nsMu.Unlock()
	db.file.gone.Store(true)
	db.file.isDB.Store(false)
	name := db.name
	st.later(func(peer Peer) {
		for _, suffix := range []string{"", "-wal", "-shm", "-pos", "-acked", "-writer"} {
			peer.InvalidateEntry(name + suffix)
		}
	})
}

// keepBranch saves the present history of a database before another replaces
// it, as a snapshot beside its level files: nothing is discarded.
func (db *DB) keepBranch(history uint64) error {
	if db.at.TXID == 0 || db.at.Commit == 0 || db.history == history || sabotage.On(sabotage.BranchKept) {
		return nil
	}
	db.log.Warn("another history replaces the present one, which is kept as a branch",
		"history", fmt.Sprintf("%016x", db.history), "pos", db.at.Pos)
	dir := path.Join(db.dir, fmt.Sprintf("%016x", db.history), branchLevel)
	if err := db.makeDir(); err != nil {
		return err
	}
	if err := disk.MkdirAll(db.st.fs, dir, 0o700); err != nil {
		return err
	}
	_, err := db.st.writeDurable(path.Join(dir, ltx.FormatFilename(1, db.at.TXID)), func(w io.Writer) error {
		return db.encodeSnapshot(w, db.at)
	})
	if err == nil {
		db.tell(EventBranch, db.at.Pos, time.Time{})
	}
	return err
}

// readersWait bounds how long an apply waits for readers of a replica.
const readersWait = 5 * time.Second

// lockReaders keeps SQLite programs at this mount out of a replica while a
// record is applied. Where nobody has it open it costs nothing.
func (db *DB) lockReaders() (unlock func(), err error) {
	peer := db.st.peer()
	f := db.file
	switch {
	case peer == nil:
		return func() {}, nil
	case !f.inUse(): // the kernel may still have pages of the last reader
		return func() { peer.InvalidateData(f, 0, -1) }, nil
	}
	type lock struct {
		shm    Node
		off, n int64
	}
	var want []lock
	if shm := f.shmNode(); shm != nil {
		want = append(want, lock{shm, walWriteLock, 8})
	} else {
		want = append(want, lock{nil, sqlitefile.LockStart, 1}, lock{nil, sqlitefile.LockStart + 1, sqlitefile.LockLen - 1})
	}
	var held []lock
	drop := func() {
		for _, l := range held {
			if l.shm != nil {
				_ = peer.UnlockShm(l.shm, l.off, l.n)
			} else {
				_ = peer.UnlockDatabase(f, l.off, l.n)
			}
		}
	}
	deadline := time.Now().Add(readersWait)
	pause := 200 * time.Microsecond
	for _, l := range want {
		for {
			var ok bool
			if l.shm != nil {
				ok, err = peer.LockShm(l.shm, l.off, l.n)
			} else {
				ok, err = peer.LockDatabase(f, l.off, l.n)
			}
			if err != nil {
				drop()
				return nil, err
			}
			if ok {
				held = append(held, l)
				break
			}
			if time.Now().After(deadline) {
				drop()
				return nil, fmt.Errorf("%s: a reader holds it for more than %s: %w", db.name, readersWait, ErrBusy)
			}
			time.Sleep(pause)
			pause = min(2*pause, 20*time.Millisecond)
		}
	}
	return func() {
		if shm := f.shmNode(); shm != nil {
			bumpWALIndex(peer, shm)
		}
		peer.InvalidateData(f, 0, -1)
		drop()
	}, nil
}

// bumpWALIndex changes both copies of the wal-index header, so that every
// connection sees that the database is another and forgets its pages.
func bumpWALIndex(peer Peer, shm Node) {
	var b [sqlitefile.WALIndexHeaderSize]byte
	if n, err := peer.ReadShm(shm, b[:], 0); err != nil || n < len(b) {
		return
	}
	if !sqlitefile.BumpWALIndex(b[:]) {
		return
	}
	_, _ = peer.WriteShm(shm, b[:], 0)
}
