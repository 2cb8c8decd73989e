package store

import (
	"fmt"
	"io"
	"slices"

	"github.com/litefs-agent/litefs-agent/internal/sqlitefile"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// Damaged returns what recovery found missing or wrong, nil if nothing or since
// Mend. The database is fenced, and shows its last state before the gap.
func (db *DB) Damaged() error {
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.damage
}

// fenceDamaged stops all writes to a database of which recovery found a part
// missing.
func (db *DB) fenceDamaged(err error) {
	db.damage = err
	e := fmt.Errorf("%s: %w: damaged: %w; what the hub has of it is fetched once that answers, and what is here can be exported", db.name, ErrFenced, err)
	db.fence.Store(&e)
	db.log.Error("database damaged: writes fail until the hub has given what was lost", "pos", db.at.Pos, "err", err)
}

// CanMend reports whether the content at a position of a history, together with
// the records that are held here, is all that was committed.
func (db *DB) CanMend(history uint64, pos ltx.Pos) bool {
	db.mu.Lock()
	defer db.mu.Unlock()
	_, ok := db.tailAfter(pos)
	return db.damage != nil && history == db.history && ok
}

// tailAfter returns the records that are held above pos, and whether they follow
// it. db.mu is held.
func (db *DB) tailAfter(pos ltx.Pos) ([]entry, bool) {
	list := db.recs.list
	if len(list) == 0 {
		return nil, pos.TXID > db.at.TXID || pos == db.at.Pos
	}
	if last := list[len(list)-1]; pos.TXID >= last.max {
		return nil, pos.TXID > last.max || pos.PostApplyChecksum == last.post
	}
	i := db.recs.after(pos.TXID)
	return slices.Clone(list[i:]), list[i].min == pos.TXID+1 && list[i].pre == pos.PostApplyChecksum
}

// Mend replaces a damaged database by a snapshot of its history, on which
// it puts the records that are held here. The next start finds both, or the damage
// again.
func (db *DB) Mend(in Incoming) error {
	unlock, err := db.lockReaders()
	if err != nil {
		return err
	}
	defer unlock()
	db.flushMu.Lock()
	defer db.flushMu.Unlock()
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.damage == nil {
		return fmt.Errorf("%s: is not damaged: %w", db.name, ErrBusy)
	}
	if err := db.quiet(); err != nil {
		return err
	}
	dec := ltx.NewDecoder(io.NewSectionReader(in.LTX, 0, in.Size))
	h, err := dec.DecodeHeader()
	if err != nil {
		return fmt.Errorf("%s: %w: %w", db.name, ErrCorrupt, err)
	}
	if in.History != db.history || h.MinTXID != 1 {
		return fmt.Errorf("%s: no snapshot of %016x: %w", db.name, db.history, ErrHistory)
	}
	in.Replace = true
	p, l, err := db.decodeIncoming(in, dec, h)
	if err != nil {
		return err
	}
	tail, ok := db.tailAfter(p.after.Pos)
	if !ok {
		l.Reset()
		return &PositionError{db.name, db.at.Pos, p.after.Pos}
	}
	damage, old, recs := db.damage, db.at.Pos, db.recs
	undo := db.beginLine(in)
	db.recs.acked, db.recs.sent, db.recs.mark, db.recs.heard = recs.acked, recs.sent, recs.mark, recs.heard
	if err := db.appendIncoming(in, p, h); err != nil {
		l.Reset()
		undo()
		return err
	}
	db.show(p, l)
	for _, e := range tail {
		if err := db.redo(e); err != nil {
			db.fenceWith(err)
			return fmt.Errorf("put record %s-%s on top: %w", e.min, e.max, err)
		}
	}
	db.damage = nil
	db.fence.Store(nil)
	db.log.Warn("database mended: the hub had what was lost here", "damage", damage, "was", old, "pos", db.at.Pos)
	return nil
}

// redo applies a record that is held already. db.mu is held.
func (db *DB) redo(e entry) error {
	r, off, err := db.st.recordAt(e)
	if err != nil {
		return err
	}
	defer r.Close()
	in := Incoming{
		Name: db.name, History: db.history, Epoch: db.epoch, Replace: e.full,
		LTX: io.NewSectionReader(r, off, e.size), Size: e.size,
	}
	dec := ltx.NewDecoder(io.NewSectionReader(r, off, e.size))
	h, err := dec.DecodeHeader()
	if err != nil {
		return err
	}
	p, l, err := db.decodeIncoming(in, dec, h)
	if err != nil {
		return err
	}
	p.entry, p.lsn = e, db.last
	db.show(p, l)
	return nil
}

// quiet fails with ErrBusy while a program at this mount has something in a
// journal or a WAL: then nothing can be applied. db.mu is held.
func (db *DB) quiet() error {
	switch {
	case db.pend != nil:
	case db.journal != nil && db.journal.armed:
	case db.wal != nil && db.wal.high > sqlitefile.WALHeaderSize:
	default:
		return nil
	}
	return fmt.Errorf("%s: its journal or WAL is in use: %w", db.name, ErrBusy)
}
