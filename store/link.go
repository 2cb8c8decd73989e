package store

import (
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// This file is what services ask of the engine besides records.

// Failed returns why nothing can be written any more, nil while all is well.
func (st *Store) Failed() error { return st.wlog.Err() }

// Problems returns what is wrong with the data folder at this moment, each with
// what to do about it.
func (st *Store) Problems() []error {
	var list []error
	if err := st.Failed(); err != nil {
		list = append(list, fmt.Errorf("read-only: %w; mend the disk or its file system, then restart the agent", err))
	}
	if need := st.shortOf.Load(); need > 0 {
		switch free, err := st.fs.Free(); {
		case err != nil:
			list = append(list, err)
		case free < need:
			list = append(list, fmt.Errorf("disk full: %d bytes are free in the data folder, the last write wanted %d; free some space there", free, need))
		default:
			st.shortOf.CompareAndSwap(need, 0)
		}
	}
	if err := st.waiting.Load(); err != nil && *err != nil {
		list = append(list, fmt.Errorf("committed pages wait in memory, the data folder refuses them: %w; see whether its disk is full, read-only or broken", *err))
	}
	return list
}

// FenceNode fences the database that a node at the mount belongs to, if any.
func (st *Store) FenceNode(n Node, err error) {
	f, _ := n.(*file)
	if s, ok := n.(*sideFile); ok {
		f = s.owner
	}
	if f == nil {
		return
	}
	if db := f.db.Load(); db != nil {
		db.Fence(err)
	}
}

// VerifyPages is the part of Verify that reads the present content.
func (db *DB) VerifyPages() (ltx.Pos, error) {
	defer db.pin()()
	db.settle()
	pos, faults := db.verifyPages()
	return pos, errors.Join(faults...)
}

// VerifyRecords is the part of Verify that reads the records. It returns their
// number and size.
func (db *DB) VerifyRecords() (n int, size int64, err error) {
	defer db.pin()()
	db.mu.Lock()
	for _, e := range db.recs.list {
		size += e.size
	}
	db.mu.Unlock()
	n, faults := db.verifyRecords()
	return n, size, errors.Join(faults...)
}

// EachRecord calls fn for what is held of the history, ascending and without
// gaps from TXID 1: every record, or, where the first ones are gone, a snapshot of
// the present and what was committed since.
func (db *DB) EachRecord(fn func(min, max ltx.TXID, size int64, body io.Reader) error) error {
	defer db.pin()()
	db.settle()
	if err := db.Sync(); err != nil {
		return err
	}
	list := db.chain()
	if len(list) == 0 || list[0].min != 1 {
		s, err := db.SnapshotShipment()
		if err != nil {
			return err
		}
		err = fn(s.Min, s.Max, s.Size, s.Body)
		if err := errors.Join(err, s.Body.Close()); err != nil {
			return err
		}
		list = slices.DeleteFunc(list, func(e entry) bool { return e.min <= s.Max })
	}
	for _, e := range list {
		r, err := db.st.openRecord(e)
		if err == nil {
			err = errors.Join(fn(e.min, e.max, e.size, r), r.Close())
		}
		if err != nil {
			return fmt.Errorf("%s: record %s-%s: %w", db.name, e.min, e.max, err)
		}
	}
	return nil
}

// chain returns the durable records from the newest one on that starts at 1, if
// there is one, else all.
func (db *DB) chain() []entry {
	db.mu.Lock()
	defer db.mu.Unlock()
	durable := db.st.wlog.Durable()
	list := slices.Clone(db.recs.list)
	list = slices.DeleteFunc(list, func(e entry) bool { return e.lsn > durable })
	for i := len(list) - 1; i >= 0; i-- {
		if list[i].set {
			return list[i+1:]
		}
		if list[i].min == 1 {
			return list[i:]
		}
	}
	return list
}

// NewHistory gives the database a new history that begins with its present
// content: what a node does when its hub holds a line that it does not know.
// It fails with ErrBusy while the content of the database file is behind, in
// WAL mode until the WAL is reset.
func (db *DB) NewHistory() error {
	db.settle()
	if err := db.st.moveBases([]*DB{db}, 0); err != nil {
		return err
	}
	db.flushMu.Lock()
	defer db.flushMu.Unlock()
	db.mu.Lock()
	if db.base != db.at || db.pend != nil {
		db.mu.Unlock()
		return fmt.Errorf("%s: cannot begin a history: its WAL is in use: %w", db.name, ErrBusy)
	}
	old := db.recs
	oldHistory := db.history
	db.history = db.st.random()
	db.recs = records{}
	m := db.metaLocked(db.base)
	lsn, _, err := db.st.wlog.Append(db.header(commitlog.KindBase, 0), commitlog.Staged, nil)
	if err == nil {
		db.lastAny = lsn
		db.markDirty(lsn) // until the metadata names the new history, only the log does
		m.LSN = lsn
	} else {
		db.history, db.recs = oldHistory, old
	}
	db.mu.Unlock()
	if err != nil {
		return err
	}
	if err := db.st.wlog.Wait(lsn); err != nil {
		return err
	}
	db.log.Warn("the hub has another line of this database: a new history begins here",
		"old", fmt.Sprintf("%016x", oldHistory), "new", fmt.Sprintf("%016x", m.History))
	err = db.writeMeta(m, false)
	if err == nil {
		db.metaSlot = 1 - db.metaSlot
	}
	return err
}

// Acked returns the position that the hub has confirmed: at the hub, what is
// durable.
func (db *DB) Acked() ltx.Pos {
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.ackedLocked()
}

func (db *DB) ackedLocked() ltx.Pos {
	durable := db.st.wlog.Durable()
	switch {
	case !db.st.opt.Home:
		return db.recs.acked
	case db.last <= durable:
		return db.at.Pos
	}
	for _, e := range slices.Backward(db.recs.list) {
		if e.lsn <= durable {
			return ltx.Pos{TXID: e.max, PostApplyChecksum: e.post}
		}
	}
	return db.base.Pos
}

// A Branch is a history of a database that is not its current one, kept.
type Branch struct {
	History uint64
	Pos     ltx.Pos
	Since   time.Time
	path    string
}

// Branches lists what was kept when another history replaced the present one.
func (db *DB) Branches() []Branch {
	dirs, err := db.st.fs.ReadDir(db.dir)
	if err != nil {
		return nil // nothing was ever written
	}
	var list []Branch
	for _, d := range dirs {
		history, err := strconv.ParseUint(d.Name(), 16, 64)
		if err != nil || len(d.Name()) != 16 {
			continue
		}
		dir := path.Join(db.dir, d.Name(), branchLevel)
		names, err := db.st.fs.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, n := range names {
			e, err := db.readLevelFile(path.Join(dir, n.Name()))
			if err != nil {
				continue
			}
			list = append(list, Branch{
				History: history, Pos: ltx.Pos{TXID: e.max, PostApplyChecksum: e.post},
				Since: time.UnixMilli(e.time), path: e.path,
			})
		}
	}
	return list
}

// branchLevel is the level, as in names, of the snapshots of branches.
const branchLevel = "9"

// A Place says where a database stands on which line. It is what Info says of it,
// for a fraction of the cost.
type Place struct {
	History uint64
	Epoch   Epoch
	Pos     ltx.Pos // last confirmed transaction
}

// Place returns the present one. It does not wait for a tentative record.
func (db *DB) Place() Place {
	db.mu.Lock()
	defer db.mu.Unlock()
	return Place{db.history, db.epoch, db.at.Pos}
}
