package store

import (
	"errors"
	"fmt"
	"path"
	"syscall"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/sabotage"
	"github.com/litefs-agent/litefs-agent/internal/sqlitefile"
)

// A rollback-mode transaction, seen from below SQLite:
//
//	          magic written            WRITE of the database
//	 idle ───────────────────► armed ───────────────────────► open ◄──┐
//	  ▲                          │                             │ │     │ WRITE: abort,
//	  │     journal ends: no     │                             │ │     │ durable
//	  │◄─────── change ──────────┘          FSYNC of database  │ │     │
//	  │                                                        │ └► prepared
//	  │◄──────────── journal ends: build the record ───────────┘       │
//	  │◄──────────── journal ends: confirm in memory ──────────────────┘
//
// The journal ends when it is unlinked, truncated to nothing, or the first byte
// of its header becomes zero; that is the commit if somebody holds RESERVED or
// more (invariant 18), else a person removed it and the engine rolls back.

// journalState is what the engine knows of the rollback journal of one database.
// Guarded by DB.mu.
type journalState struct {
	node  *sideFile
	armed bool // its magic is there

	open      bool      // the database was written in this transaction
	writer    *dbHandle // the handle that wrote last
	dirty     bool      // written since the last prepare
	asked     bool      // an FSYNC was seen: durability asked for
	committed bool      // a group record committed it already; its end is no event
	reserved  int64     // bytes reserved in the log
}

// reserveStep is the unit of reservations in the log, in bytes.
const reserveStep = 64 << 10

// writeTxn is a WRITE of the database inside an armed journal. db.mu is held.
func (db *DB) writeTxn(h *dbHandle, p []byte, off int64) error {
	j := db.journal
	if err := db.beginTxn(j); err != nil {
		return err
	}
	txn := db.stack.Load().txn
	err := db.reserveTxn(j, int64(len(p)), off+int64(len(p)))
	if err == nil {
		err = db.overwrite(txn, p, off)
	}
	if errors.Is(err, syscall.ENOSPC) && db.restores(p, off) {
		// On a full disk SQLite must still be able to roll back: what it restores
		// needs no room, neither in the log nor beside what the overlay holds.
		err = nil
		if txn.Touches(off, int64(len(p))) || off+int64(len(p)) > txn.under.Load() {
			err = db.overwrite(txn, p, off)
		}
	}
	if err != nil {
		return err
	}
	if sabotage.On(sabotage.OverlayOnly) {
		if files, _ := db.openFiles(false); files != nil {
			_, _ = files.data.WriteAt(p, off)
		}
	}
	db.size.Store(max(db.size.Load(), off+int64(len(p))))
	j.writer, j.dirty = h, true
	return nil
}

// beginTxn opens the overlay at the first change of the database.
func (db *DB) beginTxn(j *journalState) error {
	if j.open {
		return nil
	}
	held, err := db.st.reserved(db.file)
	if err != nil {
		return err
	}
	if !held {
		return fmt.Errorf("%s: write without an SQLite lock: %w", db.name, ErrOverwrite)
	}
	s := *db.stack.Load()
	s.txn = newLayer(db.st.pool)
	db.stack.Store(&s)
	j.open = true
	return nil
}

func (db *DB) underTxn(txn *layer) func(p []byte, off int64) error {
	return func(p []byte, off int64) error {
		if limit := txn.under.Load(); off >= limit {
			clear(p)
			return nil
		}
		return db.readCommitted(p, off)
	}
}

// supersede aborts a prepared record because the transaction goes on or is being
// rolled back; the abort is durable on return. db.mu is held.
func (db *DB) supersede() error {
	if db.pend == nil || db.pend.wal {
		return nil
	}
	db.journal.dirty = true
	return db.abort(db.pend, true)
}

// reserveTxn keeps the promise that a full disk is met at a WRITE (invariant
// 23): room in the log, or for a side file, and for the growth of the database.
func (db *DB) reserveTxn(j *journalState, n, end int64) error {
	if sabotage.On(sabotage.Reserve) {
		return nil
	}
	need := db.stack.Load().txn.Len() + 2*n + 4096
	if need > db.st.opt.Large {
		return db.st.needFree(2 * need)
	}
	if j.reserved < need {
		step := (need - j.reserved + reserveStep - 1) / reserveStep * reserveStep
		if err := db.st.reserveLog(step); err != nil {
			return db.st.noSpace(fmt.Errorf("%s: reserve %d bytes in the log: %w", db.name, step, err))
		}
		j.reserved += step
	}
	return db.st.needFree(max(0, end-db.at.size()))
}

// overwrite puts p into the overlay.
func (db *DB) overwrite(txn *layer, p []byte, off int64) error {
	if err := db.supersede(); err != nil {
		return err
	}
	return db.st.noSpace(txn.WriteAt(p, off, db.underTxn(txn)))
}

// restores reports whether p is what is committed at off.
func (db *DB) restores(p []byte, off int64) bool {
	committed := make([]byte, len(p))
	return db.readCommitted(committed, off) == nil && string(committed) == string(p)
}

func (db *DB) unreserve(j *journalState) {
	db.st.wlog.Unreserve(j.reserved)
	j.reserved = 0
}

// truncateTxn is a change of the database's size inside an armed journal.
func (db *DB) truncateTxn(h *dbHandle, size int64) error {
	j := db.journal
	if err := db.beginTxn(j); err != nil {
		return err
	}
	if err := db.reserveTxn(j, 0, size); err != nil {
		if !errors.Is(err, syscall.ENOSPC) || size != db.at.size() { // as in writeTxn
			return err
		}
	}
	if err := db.supersede(); err != nil {
		return err
	}
	if txn := db.stack.Load().txn; size < db.size.Load() {
		txn.cut(size)
	}
	db.size.Store(size)
	if h != nil {
		j.writer = h
	}
	j.dirty = true
	return nil
}

// syncDatabase is FSYNC of the database file: it prepares the record of a
// rollback transaction, and waits for every record of the database appended
// before.
func (db *DB) syncDatabase(h *dbHandle) error {
	db.mu.Lock()
	if err := db.prepare(h); err != nil {
		db.mu.Unlock()
		return err
	}
	p, lsn := db.pend, db.last
	db.mu.Unlock()
	if sabotage.On(sabotage.PrepareDurable) {
		return nil
	}
	err := db.st.waitAsked(lsn)
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%s: make the log durable: %w", db.name, err)
	if p != nil {
		db.fenceWith(err)
	}
	return err
}

// prepare appends the record of the running transaction, if this FSYNC is the
// one that ends SQLite's phase one: through the handle that wrote, without a
// super-journal, and something changed. db.mu is held.
func (db *DB) prepare(h *dbHandle) error {
	j := db.journal
	if j == nil || !j.armed || j.committed {
		return nil
	}
	j.asked = true
	if !j.open || !j.dirty || j.writer != h || db.pend != nil {
		return nil
	}
	if err := db.fenced(); err != nil {
		return err
	}
	if name, err := j.superJournal(); err != nil || name != "" && !sabotage.On(sabotage.GroupWhole) {
		return err
	}
	c, ok, err := db.rollbackChange()
	if err != nil || !ok {
		return err
	}
	mode := commitlog.Staged
	if db.st.opt.Durability.After > 0 {
		mode = commitlog.Lazy
	}
	p, err := db.encode(c, 0, mode)
	if err != nil {
		return db.st.noSpace(err)
	}
	db.pend, j.dirty = p, p == nil
	return nil
}

// superJournal returns the base name of the super-journal that the journal
// names, "" if none. Programs name it by a path of their own view of the mount.
func (j *journalState) superJournal() (string, error) {
	name, err := sqlitefile.SuperJournal(j.node.data, j.node.data.Size())
	if name == "" || err != nil {
		return "", err
	}
	return path.Base(name), nil
}

// rollbackChange describes what the overlay would commit. ok is false if there
// is no SQLite database in it: then the file is an ordinary one.
func (db *DB) rollbackChange() (c change, ok bool, err error) {
	size := db.size.Load()
	txn := db.stack.Load().txn
	var head [sqlitefile.HeaderSize]byte
	if size < int64(len(head)) {
		return c, false, nil
	}
	if err := db.readAt(head[:], 0); err != nil {
		return c, false, err
	}
	h, ok := sqlitefile.ParseDatabaseHeader(head[:])
	if !ok {
		return c, false, nil
	}
	c.pageSize, c.commit = h.PageSize, h.Pages
	if c.commit == 0 {
		c.commit = uint32((size + int64(h.PageSize) - 1) / int64(h.PageSize))
	}
	if txn != nil {
		c.pages = txn.Pages(c.pageSize)
		// What lies beyond a truncation became zeros or was written again.
		if limit := txn.under.Load(); limit < db.at.size() {
			for pgno := uint32(limit/int64(c.pageSize)) + 1; pgno <= c.commit; pgno++ {
				c.pages = append(c.pages, pgno)
			}
		}
	}
	c.read = func(pgno uint32, p []byte) error {
		return db.readAt(p, int64(pgno-1)*int64(c.pageSize))
	}
	return c, true, nil
}

// endTransaction is the commit event. On error nothing has changed and the
// journal must stay as it is (invariant 13). db.mu is held.
func (db *DB) endTransaction() error {
	j := db.journal
	if j.committed || !j.open {
		j.disarm(db)
		return nil
	}
	held, err := db.st.reserved(db.file)
	if err != nil {
		return err
	}
	if !held && !sabotage.On(sabotage.LockHeld) {
		return db.rollBack()
	}
	if err := db.fenced(); err != nil {
		return err
	}
	p := db.pend
	if p == nil || j.dirty {
		if err := db.supersede(); err != nil {
			return err
		}
		c, ok, err := db.rollbackChange()
		if err != nil {
			return err
		}
		if !ok {
			return db.endOrdinary()
		}
		wait := j.asked && db.st.opt.Durability.After == 0 || db.st.opt.Durability.Commit
		mode := commitlog.Lazy
		if wait {
			mode = commitlog.Staged
		}
		if p, err = db.encode(c, 0, mode); err != nil {
			return err
		}
		if p != nil && wait {
			if err := db.st.wlog.Wait(p.lsn); err != nil {
				db.fenceWith(err)
				return err
			}
		}
	}
	db.commitTxn(p)
	j.disarm(db)
	return nil
}

// commitTxn moves the overlay of a transaction to the committed layers; p is nil
// if it changed nothing.
func (db *DB) commitTxn(p *pending) {
	s := *db.stack.Load()
	txn := s.txn
	s.txn = nil
	if p == nil {
		// As before, though the overlay may hold the old content once more.
		db.stack.Store(&s)
		txn.retire()
		if size := db.at.size(); db.exists && db.size.Load() != size {
			db.size.Store(size)
			db.st.later(func(peer Peer) { peer.InvalidateData(db.file, -1, 0) })
		}
		return
	}
	size := p.after.size()
	if err := db.absorb(txn, size); err != nil {
		db.fenceWith(err)
	}
	txn.DropFrom(size)
	if limit := min(txn.under.Load(), size); limit < db.at.size() {
		txn.under.Store(limit)
	}
	top := s.committed[0]
	top.pos = db.at
	if txn.Len() > db.st.opt.Large/4 {
		// Too much to copy: the overlay becomes a committed layer as it is.
		s.committed = append([]*layer{txn}, s.committed...)
		db.stack.Store(&s)
	} else {
		if limit := txn.under.Load(); limit < db.at.size() {
			top.cut(limit)
		}
		top.lsn = max(top.lsn, p.lsn) // also if it gets only a part
		err := txn.Runs(func(p []byte, off int64) error {
			return top.WriteAt(p, off, nil)
		})
		if err != nil {
			// The transaction is committed; its layer stays as it is.
			s.committed = append([]*layer{txn}, s.committed...)
			db.stack.Store(&s)
		} else {
			db.stack.Store(&s)
			txn.retire()
		}
	}
	db.promote()
	db.confirm(p)
	db.st.flushSoon(db)
}

// disarm ends the journal's transaction.
func (j *journalState) disarm(db *DB) {
	db.unreserve(j)
	*j = journalState{node: j.node}
}

// rollBack discards the overlay: a person removed the journal, or it is not to
// be committed. The kernel's cache may hold pages of it. db.mu is held.
func (db *DB) rollBack() error {
	if err := db.supersede(); err != nil {
		return err
	}
	s := *db.stack.Load()
	txn := s.txn
	s.txn = nil
	db.stack.Store(&s)
	if db.exists {
		db.size.Store(db.at.size())
	} else {
		db.size.Store(db.file.ordinarySize())
	}
	txn.retire()
	db.journal.disarm(db)
	db.log.Warn("journal removed without a lock: transaction rolled back")
	db.st.later(func(p Peer) { p.InvalidateData(db.file, 0, -1) })
	return nil
}

// endOrdinary ends a transaction over a file that holds no SQLite database: its
// bytes go to the ordinary file. db.mu is held.
func (db *DB) endOrdinary() error {
	if db.exists {
		return fmt.Errorf("%s: transaction leaves no SQLite header: %w", db.name, ErrRefused)
	}
	s := *db.stack.Load()
	f := db.file.backing()
	if f == nil {
		return syscall.EIO
	}
	if limit := s.txn.under.Load(); limit < db.file.ordinarySize() {
		if err := f.Truncate(limit); err != nil {
			return err
		}
	}
	err := s.txn.Runs(func(p []byte, off int64) error {
		_, err := f.WriteAt(p, off)
		return err
	})
	if err == nil {
		err = f.Truncate(db.size.Load())
	}
	if err != nil {
		return err
	}
	txn := s.txn
	s.txn = nil
	db.stack.Store(&s)
	txn.retire()
	db.journal.disarm(db)
	return nil
}

// noSpace makes a full disk look like one to SQLite, whatever wraps it.
func (st *Store) noSpace(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		st.shortOf.CompareAndSwap(0, spaceMargin)
		return fmt.Errorf("%w (%w)", syscall.ENOSPC, err)
	}
	return err
}
