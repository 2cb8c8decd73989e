package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/litefs-agent/litefs-agent/ltx"
	"github.com/litefs-agent/litefs-agent/store"
	"github.com/litefs-agent/litefs-agent/transport"
)

// catchUp takes from the hub, before anything is sent, what this node lost of
// databases that it owns: what a damaged log or file held, and what an older
// card does not have. It returns errors of the session alone.
func (l *Link) catchUp(ctx context.Context, c transport.Conn, w *transport.Welcome) error {
	for _, d := range w.Databases {
		db := l.st.DB(d.Name)
		if db == nil || d.Owner != transport.OwnerNode {
			continue
		}
		place := db.Place()
		var err error
		switch damage := db.Damaged(); {
		case uint64(d.History) != place.History:
		case damage != nil && !db.CanMend(uint64(d.History), d.Pos):
			err = fmt.Errorf("the hub, at %s, lacks what was lost here: %w", d.Pos, damage)
		case damage != nil:
			err = l.mend(ctx, c, db)
		case d.Pos.TXID > place.Pos.TXID:
			err = l.follow(ctx, c, db, place, d.Pos)
		}
		if serr, ok := errors.AsType[*sessionError](err); ok {
			return serr.error
		}
		if err != nil {
			l.log.Error("database not brought to the hub's position", "db", d.Name, "pos", place.Pos, "hub", d.Pos, "err", err)
		}
	}
	return nil
}

// A sessionError ends the session.
type sessionError struct{ error }

// mend asks for a snapshot of a damaged database.
func (l *Link) mend(ctx context.Context, c transport.Conn, db *store.DB) error {
	if err := c.Send(ctx, &transport.Subscribe{Name: db.Name(), Snapshot: true}); err != nil {
		return &sessionError{err}
	}
	f, err := l.opt.FS.CreateTemp(".")
	if err != nil {
		return &sessionError{err} // the answer is on its way
	}
	defer f.Close()
	p, size, err := receiveRecord(ctx, c, db.Name(), f)
	if err != nil {
		return err
	}
	err = db.Mend(store.Incoming{
		Name: db.Name(), History: uint64(p.History), Epoch: store.Epoch(p.Epoch), Replace: true, LTX: f, Size: size,
	})
	if err == nil {
		err = db.Sync()
	}
	return err
}

// follow takes the records that the hub has beyond the position here, if it is
// one of the hub's line: a card that was restored and has nothing new. Else
// nothing happens, and both lines will be kept.
func (l *Link) follow(ctx context.Context, c transport.Conn, db *store.DB, from store.Place, to ltx.Pos) error {
	s := &transport.Subscribe{Name: db.Name(), History: transport.History(from.History), Pos: from.Pos}
	if err := c.Send(ctx, s); err != nil {
		return &sessionError{err}
	}
	var failed error
	for at := from.Pos; at.TXID < to.TXID; {
		f, err := l.opt.FS.CreateTemp(".")
		if err != nil {
			return &sessionError{err}
		}
		p, size, err := receiveRecord(ctx, c, db.Name(), f)
		if nak, ok := errors.AsType[*nakError](err); ok && nak.Code == transport.NakPosMismatch {
			err = errors.Join(failed, f.Close())
			l.log.Warn("the hub is ahead, on a line that this node left", "db", db.Name(), "pos", from.Pos, "hub", to)
			return err
		}
		if err != nil {
			_ = f.Close()
			return err
		}
		if failed == nil { // else the rest is on its way and of no use
			_, failed = l.st.Apply(store.Incoming{
				Name: db.Name(), History: uint64(p.History), Epoch: store.Epoch(p.Epoch), LTX: f, Size: size,
			})
		}
		_ = f.Close()
		if p.MaxTXID <= at.TXID {
			return &sessionError{fmt.Errorf("push of %s after %s: %w", p.MaxTXID, at, transport.ErrCorrupt)}
		}
		at = p.Pos()
	}
	if failed != nil {
		return failed
	}
	if err := db.Sync(); err != nil {
		return err
	}
	l.log.Warn("this node was behind the hub and has taken what it lacked", "db", db.Name(), "from", from.Pos, "to", to)
	return db.SetAcked(to)
}
