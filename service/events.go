package service

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/control"
	"github.com/litefs-agent/litefs-agent/store"
)

// eventsN is how many events wait for one reader. A reader that is slower misses
// what comes then, and is told how much.
const eventsN = 1024

// events hands what happens to all that listen. While nobody does it costs a
// look at a counter.
type events struct {
	n atomic.Int32 // listeners

	mu   sync.Mutex // guards what follows; held for no longer than a copy takes
	list map[*listener]struct{}
}

// A listener is one reader. Guarded by events.mu, but for ready.
type listener struct {
	db     string // "" for all
	wait   []control.Event
	missed int
	ready  chan struct{} // 1 token: there is something
}

// Emit tells all that listen. It does not block.
func (c *Core) Emit(e control.Event) {
	if c.events.n.Load() == 0 {
		return
	}
	c.events.mu.Lock()
	defer c.events.mu.Unlock()
	for l := range c.events.list {
		if l.db != "" && (e.DB == nil || *e.DB != l.db) {
			continue
		}
		if len(l.wait) >= eventsN {
			l.missed++
		} else {
			l.wait = append(l.wait, e)
		}
		select {
		case l.ready <- struct{}{}:
		default:
		}
	}
}

// take returns what waits for l. The events that were missed came after those
// before them in the list, and before all that come later.
func (e *events) take(l *listener) []control.Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	list := l.wait
	if l.missed > 0 {
		list = append(list, control.Event{Time: time.Now().UTC(), Event: control.EventMissed, Missed: l.missed})
	}
	l.wait, l.missed = nil, 0
	return list
}

// Events implements control.Service.
func (c *Core) Events(ctx context.Context, db string, report func(control.Event) error) error {
	l := &listener{db: db, ready: make(chan struct{}, 1)}
	e := &c.events
	e.mu.Lock()
	if e.list == nil {
		e.list = make(map[*listener]struct{})
	}
	e.list[l] = struct{}{}
	e.mu.Unlock()
	e.n.Add(1)
	defer func() {
		e.n.Add(-1)
		e.mu.Lock()
		delete(e.list, l)
		e.mu.Unlock()
	}()
	for {
		for _, event := range e.take(l) {
			if err := report(event); err != nil {
				return err
			}
		}
		select {
		case <-l.ready:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// EmitDatabase tells what happened to a database. It does not block.
func (c *Core) EmitDatabase(e store.Event) {
	if c.events.n.Load() == 0 {
		return
	}
	kind := control.EventCommit
	switch e.Kind {
	case store.EventAck:
		kind = control.EventAck
	case store.EventBranch:
		kind = control.EventBranch
	}
	c.Emit(databaseEvent(kind, e))
}

func databaseEvent(kind string, e store.Event) control.Event {
	at := e.Time
	if at.IsZero() {
		at = time.Now()
	}
	return control.Event{
		Time: at.UTC(), Event: kind, DB: &e.Name, TXID: ptr(e.Pos.TXID.String()), Checksum: ptr(fmt.Sprintf("%016x", uint64(e.Pos.PostApplyChecksum))),
		History: fmt.Sprintf("%016x", e.History), Epoch: e.Epoch.String(),
	}
}
