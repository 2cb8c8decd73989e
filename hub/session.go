package hub

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/sabotage"
	"github.com/litefs-agent/litefs-agent/ltx"
	"github.com/litefs-agent/litefs-agent/store"
	"github.com/litefs-agent/litefs-agent/transport"
)

const (
	// queueBytes bounds the records of one session that wait to be applied.
	queueBytes = 8 << 20
	// recordCost is what a record takes in memory beside its bytes, at most.
	recordCost = 1 << 10
	// maxSubscriptions bounds what one session has asked for and not got.
	maxSubscriptions = 32
)

// A session is one node's, seen from the hub. One goroutine receives; each
// database with something to apply has one, so that none waits for another.
type session struct {
	h      *Ingest
	node   string
	peer   transport.Peer // set before the session is known to others
	c      transport.Conn
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when nothing is under way any more
	wg     sync.WaitGroup

	said    throttle           // what is logged of refused records
	in      transport.Inbound  // owned by receive
	streams map[uint64]*stream // owned by receive
	swept   time.Time          // when streams were looked at; owned by receive

	mu     sync.Mutex // guards what follows
	room   *sync.Cond // queued has fallen, or closed
	queues map[string][]*record
	queued int64 // bytes in memory of all queues
	groups map[uint64]*group
	lost   uint64 // number of the last group of which a record was refused
	asked  int    // subscriptions that are not answered yet
	closed bool

	sendMu sync.Mutex // held while a snapshot is sent; guards sendN
	sendN  uint64     // streams sent
}

// A record has arrived whole.
type record struct {
	push  *transport.Push // without payload
	body  io.ReaderAt
	size  int64
	close func()
	cost  int64 // bytes in memory
	err   error // what applying it gave
}

func newSession(h *Ingest, node string, c transport.Conn, cancel context.CancelCauseFunc) *session {
	s := &session{
		h: h, node: node, c: c, cancel: cancel, done: make(chan struct{}),
		streams: make(map[uint64]*stream), queues: make(map[string][]*record), groups: make(map[uint64]*group),
	}
	s.in.Max = maxStreams
	s.room = sync.NewCond(&s.mu)
	return s
}

// maxStreams is what the hub announces: transport's default.
const maxStreams = 16

func (s *session) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		s.mu.Lock()
		s.closed = true
		s.room.Broadcast()
		s.mu.Unlock()
	})
	defer stop()
	err := s.receive(ctx)
	s.cancel(err)
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.wg.Wait()
	for _, st := range s.streams {
		st.close()
	}
	return err
}

func (s *session) receive(ctx context.Context) error {
	heard := false
	for {
		m, err := s.recv(ctx)
		if err != nil {
			return err
		}
		if err := s.sweep(ctx); err != nil {
			return err
		}
		if m == nil {
			continue
		}
		if !heard {
			heard = true
			s.h.nodes.heard(s.node)
		}
		switch m := m.(type) {
		case *transport.Push:
			err = s.push(ctx, m)
		case *transport.Data:
			err = s.data(ctx, m)
		case *transport.Cancel:
			if p := s.in.Drop(m.Stream); p != nil {
				s.giveUp(p.Group)
				s.forget(m.Stream)
			}
		case *transport.Subscribe:
			err = s.subscribe(ctx, m)
		case *transport.Unsubscribe, *transport.Nak, *transport.Ack:
			// A node says how a restore went; the next hello says it again.
		default:
			err = transport.Refuse(transport.CodeProtocol, "%s is not for a hub", m.Kind())
		}
		if err != nil {
			return err
		}
	}
}

func (s *session) push(ctx context.Context, p *transport.Push) error {
	if err := s.in.Push(p); err != nil {
		return bye(err)
	}
	if !s.validName(p.Name) {
		s.in.Drop(p.Stream)
		s.giveUp(p.Group)
		return s.refuse(ctx, p, transport.NakRefused, errors.New("not a name for a database"))
	}
	if p.Last {
		body := p.Payload
		p.Payload = nil
		return s.enqueue(ctx, &record{push: p, body: bytes.NewReader(body), size: int64(len(body)), cost: recordCost + int64(len(body))})
	}
	st := &stream{push: p, room: room{h: s.h}, at: time.Now()}
	s.streams[p.Stream] = st
	payload := p.Payload
	p.Payload = nil
	return s.grow(ctx, st, payload)
}

// validName reports whether the node can have a database of that name: one that
// stays in its folder.
func (s *session) validName(name string) bool {
	return store.ValidName(name) && len(nameAt(s.node, name)) <= transport.MaxName
}

func (s *session) data(ctx context.Context, d *transport.Data) error {
	p, err := s.in.Data(d)
	if err != nil {
		return bye(err)
	}
	st := s.streams[d.Stream]
	if p == nil || st == nil {
		return nil // given up
	}
	st.at = time.Now()
	if err := s.grow(ctx, st, d.Payload); err != nil || !d.Last || s.streams[d.Stream] == nil {
		return err
	}
	delete(s.streams, d.Stream)
	r := &record{push: st.push, size: st.size, cost: recordCost}
	if st.file != nil {
		r.body, r.close = st.file, st.close
	} else {
		r.body, r.cost = bytes.NewReader(st.mem), recordCost+st.size
	}
	return s.enqueue(ctx, r)
}

// enqueue hands a record to its database's goroutine. It waits while too much is
// queued, which stops the node.
func (s *session) enqueue(ctx context.Context, r *record) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.queued > 0 && s.queued+r.cost > queueBytes && !s.closed {
		s.room.Wait()
	}
	if s.closed {
		r.done()
		return context.Cause(ctx)
	}
	s.queued += r.cost
	if g := r.push.Group; g != 0 && g != s.lost && s.groups[g] == nil {
		s.groups[g] = &group{applied: make(chan struct{})}
	}
	name := r.push.Name
	queue, running := s.queues[name]
	s.queues[name] = append(queue, r)
	if !running {
		s.wg.Go(func() { s.work(ctx, name) })
	}
	return nil
}

func (r *record) done() {
	if r.close != nil {
		r.close()
		r.close = nil
	}
}

// work applies what is queued of one database, in order, until nothing is left.
// What came while it was busy is made durable by one flush, and acknowledged at
// once: a group commit over all databases and nodes.
func (s *session) work(ctx context.Context, name string) {
	for {
		s.mu.Lock()
		list := s.queues[name]
		if len(list) == 0 {
			delete(s.queues, name)
			s.mu.Unlock()
			return
		}
		s.queues[name] = nil
		s.mu.Unlock()
		s.applyAll(ctx, name, list)
		s.mu.Lock()
		for _, r := range list {
			s.queued -= r.cost
			r.done()
		}
		s.room.Broadcast()
		s.mu.Unlock()
	}
}

func (s *session) applyAll(ctx context.Context, name string, list []*record) {
	any := false
	for _, r := range list {
		if ctx.Err() != nil {
			return // the node sends it again
		}
		if r.push.Group != 0 {
			r.err = s.applyGroup(ctx, r)
		} else {
			r.err = s.apply(r)
		}
		if r.err == nil {
			any = true
			continue
		}
		if ctx.Err() == nil {
			s.answer(ctx, r)
		}
	}
	if !any {
		return
	}
	db := s.h.opt.Store.DB(nameAt(s.node, name))
	if db == nil {
		return
	}
	info := db.Place()
	durable := db.Sync
	if sabotage.On(sabotage.AckDurable) {
		durable = func() error { return nil }
	}
	if err := durable(); err != nil {
		s.h.log.Error("records cannot be made durable", "peer", s.node, "db", name, "err", err)
		s.cancel(transport.Refuse(transport.CodeInternal, "the hub's disk fails"))
		return
	}
	s.h.emitAck(db.Name(), info)
	_ = s.c.Send(ctx, &transport.Ack{ // an error is the session's end
		Name: name, History: transport.History(info.History), Epoch: transport.Epoch(info.Epoch),
		Pos: info.Pos, Level: transport.AckDurable,
	})
}

func (s *session) apply(r *record) error {
	in, err := s.h.incoming(s.node, r)
	if err != nil {
		return err
	}
	db, err := s.h.opt.Store.Apply(in)
	if err != nil {
		return err
	}
	return s.check(db, r.push)
}

// check finds a record that the engine took for one it has, and is not.
func (s *session) check(db *store.DB, p *transport.Push) error {
	pos := db.Place().Pos
	if pos.TXID == p.MaxTXID && pos.PostApplyChecksum != p.PostApply {
		return &store.PositionError{Name: p.Name, Have: pos, Start: ltx.Pos{TXID: p.MinTXID - 1, PostApplyChecksum: p.PreApply}}
	}
	return nil
}

// answer tells the node why a record was not taken, and where the hub stands.
func (s *session) answer(ctx context.Context, r *record) {
	code := transport.NakBusy
	switch {
	case errors.Is(r.err, store.ErrPosition):
		code = transport.NakPosMismatch
	case errors.Is(r.err, store.ErrHistory):
		code = transport.NakUnknownHistory
	case errors.Is(r.err, store.ErrCorrupt):
		code = transport.NakCorrupt
	case errors.Is(r.err, errHold), errors.Is(r.err, errTooMany):
		code = transport.NakRefused
	case errors.Is(r.err, errGivenUp):
		code = transport.NakCanceled
	}
	level := s.h.log.Debug
	hidden, ok := 0, false
	if code != transport.NakPosMismatch && code != transport.NakUnknownHistory {
		if hidden, ok = s.said.allow(time.Now()); ok {
			level = s.h.log.Warn
		}
	}
	level("record not taken", "peer", s.node, "db", r.push.Name, "txid", r.push.MaxTXID, "unlogged", hidden, "err", r.err)
	_ = s.refuse(ctx, r.push, code, r.err) // an error is the session's end
}

// refuse sends the Nak of a push.
func (s *session) refuse(ctx context.Context, p *transport.Push, code transport.NakCode, err error) error {
	nak := &transport.Nak{Name: p.Name, Code: code, MinTXID: p.MinTXID, MaxTXID: p.MaxTXID, Stream: p.Stream}
	if nak.Text = err.Error(); len(nak.Text) > transport.MaxText {
		nak.Text = nak.Text[:transport.MaxText]
	}
	if code == transport.NakBusy {
		nak.RetryAfter = time.Second
	}
	if db := s.h.opt.Store.DB(nameAt(s.node, p.Name)); db != nil {
		if err := db.Sync(); err != nil {
			return bye(err)
		}
		d := s.h.state(s.node, db)
		nak.History, nak.Epoch, nak.Pos = d.History, d.Epoch, d.Pos
	}
	return s.c.Send(ctx, nak)
}

// bye makes an error the reason that the node is told.
func bye(err error) error {
	switch {
	case errors.Is(err, transport.ErrTooLarge):
		return transport.Refuse(transport.CodeTooLarge, "%v", err)
	case errors.Is(err, transport.ErrCorrupt):
		return transport.Refuse(transport.CodeCorrupt, "%v", err)
	}
	return err
}

// heard is when the node was last heard.
func (s *session) heard() time.Time { return time.Now().Add(-s.c.Stats().LastHeard) }
