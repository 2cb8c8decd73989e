package hub

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/litefs-agent/litefs-agent/ltx"
	"github.com/litefs-agent/litefs-agent/store"
	"github.com/litefs-agent/litefs-agent/transport"
)

// subscribe answers a node that asks for its own database: a snapshot, or what
// follows the position where it stands. The subscription ends with that.
func (s *session) subscribe(ctx context.Context, m *transport.Subscribe) error {
	if !s.validName(m.Name) {
		return s.c.Send(ctx, &transport.Nak{Name: m.Name, Code: transport.NakRefused, Text: "not a name for a database"})
	}
	db := s.h.opt.Store.DB(nameAt(s.node, m.Name))
	if db == nil {
		return s.c.Send(ctx, &transport.Nak{Name: m.Name, Code: transport.NakUnknownDatabase, Text: "no such database"})
	}
	history := uint64(m.History)
	send := s.sendSnapshot
	if history != 0 && !m.Snapshot {
		if !db.Owed(history, m.Pos) {
			d := s.h.state(s.node, db)
			return s.c.Send(ctx, &transport.Nak{
				Name: m.Name, Code: transport.NakPosMismatch, History: d.History, Epoch: d.Epoch, Pos: d.Pos,
				Text: fmt.Sprintf("%s of history %016x is not known here", m.Pos, history),
			})
		}
		send = func(ctx context.Context, name string, db *store.DB) error { return s.sendFrom(ctx, name, db, m.Pos) }
	}
	s.mu.Lock()
	s.asked++
	full := s.asked > maxSubscriptions
	if full {
		s.asked--
	}
	s.mu.Unlock()
	if full {
		return s.c.Send(ctx, &transport.Nak{Name: m.Name, Code: transport.NakBusy, Text: "too many subscriptions at once", RetryAfter: time.Second})
	}
	s.wg.Go(func() {
		defer func() {
			s.mu.Lock()
			s.asked--
			s.mu.Unlock()
		}()
		if err := send(ctx, m.Name, db); err != nil && ctx.Err() == nil {
			s.h.log.Warn("database not sent", "peer", s.node, "db", m.Name, "err", err)
			_ = s.c.Send(ctx, &transport.Nak{Name: m.Name, Code: transport.NakBusy, Text: "see the hub's log", RetryAfter: time.Second})
		}
	})
	return nil
}

func (s *session) sendSnapshot(ctx context.Context, name string, db *store.DB) error {
	s.sendMu.Lock()
	defer s.sendMu.Unlock()
	sh, err := db.SnapshotShipment()
	if err != nil {
		return err
	}
	defer sh.Body.Close()
	return s.sendShipment(ctx, name, sh)
}

// compactSent bounds the bytes of records that are sent to a node as one.
const compactSent = 4 << 20

// sendFrom sends what follows a position of the present history.
func (s *session) sendFrom(ctx context.Context, name string, db *store.DB, pos ltx.Pos) error {
	s.sendMu.Lock()
	defer s.sendMu.Unlock()
	for {
		sh, err := db.Next(pos, 2, compactSent)
		if errors.Is(err, store.ErrNothing) {
			return nil
		}
		if err != nil {
			return err
		}
		err = errors.Join(s.sendShipment(ctx, name, sh), sh.Body.Close())
		if err != nil {
			return err
		}
		pos = sh.Pos()
	}
}

// sendShipment sends one record of a node's database. s.sendMu is held.
func (s *session) sendShipment(ctx context.Context, name string, sh *store.Shipment) error {
	s.sendN++
	p := &transport.Push{
		Stream: s.sendN, Name: name, History: transport.History(sh.History), Epoch: transport.Epoch(sh.Epoch),
		MinTXID: sh.Min, MaxTXID: sh.Max, PreApply: sh.Pre, PostApply: sh.Post,
		CommitTime: sh.Time, PageSize: sh.PageSize, Size: sh.Size,
	}
	if sh.Full && sh.Min == 1 {
		p.Flags |= transport.PushSnapshot
		p.PreApply = 0
	}
	if sh.Commit == 0 {
		p.Flags |= transport.PushDrop
	}
	return transport.SendPush(ctx, s.c, p, sh.Body)
}
