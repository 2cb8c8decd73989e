package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/litefs-agent/litefs-agent/ltx"
	"github.com/litefs-agent/litefs-agent/store"
	"github.com/litefs-agent/litefs-agent/transport"
)

const (
	// bulkSize is the size in bytes above which a record goes as a stream of its
	// own beside the live ones.
	bulkSize = 256 << 10
	// bulkN is how many such streams run at once.
	bulkN = 2
	// compactLimit bounds the bytes of records that are compacted into one.
	compactLimit = 1 << 20
	// turn is how many records one database may send before the next gets its turn.
	turn = 16
	// unreadable is how many faults in a row make what cannot be read a gap.
	unreadable = 3
)

// A session ships the engine's databases over one connection. One goroutine
// sends the live records of all databases, one receives, and up to bulkN send
// what is large.
type session struct {
	l   *Link
	st  *store.Store
	c   transport.Conn
	lim transport.Limits

	kick chan struct{} // 1 token: look again
	wg   sync.WaitGroup

	groups uint64 // transactions over several databases that were sent; owned by send

	streamMu sync.Mutex // held from the choice of a stream's number until its Push is queued
	stream   uint64

	mu        sync.Mutex // guards what follows; no call of the engine is made with it held
	ships     map[string]*shipping
	dirty     map[string]struct{} // databases that may have something to send
	undurable map[string]struct{} // those that wait for the disk
	used      int64               // bytes of live records in flight
	bulk      int                 // streams under way
}

// A shipping is what a session knows of one database. Guarded by session.mu, but
// for held, next, whole and pages, which the sending goroutine alone uses
// while busy is false, and the bulk goroutine while it is true.
type shipping struct {
	name    string
	history uint64
	next    ltx.Pos         // where the hub will be once all that was sent has arrived
	whole   bool            // only a snapshot helps
	pages   bool            // only what changed is known, not by which transactions
	held    *store.Shipment // read from the engine, waits for room or for its group
	size    int64           // of the database, for the order
	busy    bool            // a bulk goroutine sends
	cancel  context.CancelFunc
	flight  []flight
	resync  *transport.DatabaseState // the hub stands elsewhere: start from there
	faults  int                      // refusals in a row
	pause   time.Time                // send nothing before
}

// A flight is one record on its way.
type flight struct {
	stream uint64
	pos    ltx.Pos
	size   int64 // counted against the window
}

// ship runs one session until it fails or ctx ends.
func (l *Link) ship(ctx context.Context, c transport.Conn, w *transport.Welcome) error {
	s := &session{
		l: l, st: l.st, c: c, lim: c.Limits(), kick: make(chan struct{}, 1),
		ships: make(map[string]*shipping), dirty: make(map[string]struct{}), undurable: make(map[string]struct{}),
	}
	for _, d := range w.Databases {
		s.ships[d.Name] = &shipping{name: d.Name, resync: &d}
		s.dirty[d.Name] = struct{}{}
	}
	// First to be told of changes, then to look: no database is missed in between.
	l.mu.Lock()
	l.session = s
	l.mu.Unlock()
	for _, db := range s.st.DBs() {
		info := db.Info()
		s.mu.Lock()
		s.shipping(info.Name).size = int64(info.Commit) * int64(info.PageSize)
		s.dirty[info.Name] = struct{}{}
		s.mu.Unlock()
	}
	ctx, cancel := context.WithCancel(ctx)
	received := make(chan error, 1)
	s.wg.Go(func() {
		received <- s.receive(ctx)
		cancel()
	})
	err := s.send(ctx)
	cancel()
	c.Close()
	s.wg.Wait()
	s.mu.Lock()
	for _, x := range s.ships {
		x.drop()
	}
	s.mu.Unlock()
	s.st.LinkDown()
	if rerr := <-received; rerr != nil && (err == nil || errors.Is(err, context.Canceled)) {
		err = rerr
	}
	return err
}

// changed is told by the engine; nil means that the log is durable further.
func (s *session) changed(db *store.DB) {
	s.mu.Lock()
	if db != nil {
		s.dirty[db.Name()] = struct{}{}
	} else {
		if len(s.undurable) == 0 {
			s.mu.Unlock()
			return
		}
		for name := range s.undurable {
			s.dirty[name] = struct{}{}
		}
		clear(s.undurable)
	}
	s.mu.Unlock()
	s.wake()
}

func (s *session) wake() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// shipping returns what is known of a database. s.mu is held, or nobody else has s.
func (s *session) shipping(name string) *shipping {
	x := s.ships[name]
	if x == nil {
		x = &shipping{name: name, resync: &transport.DatabaseState{Name: name}}
		s.ships[name] = x
	}
	return x
}

// send passes over the databases that have something to send until ctx ends.
func (s *session) send(ctx context.Context) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		again, err := s.pass(ctx)
		if err != nil {
			return err
		}
		timer.Reset(cmp.Or(again, time.Hour))
		select {
		case <-s.kick:
		case <-timer.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// An outcome says what became of a turn.
type outcome uint8

const (
	idle      outcome = iota // nothing to send
	more                     // sent some, there may be more
	blocked                  // waits for room or for other databases: a kick will come
	undurable                // waits for the disk
	paused                   // waits for time
)

// pass gives every dirty database its turns, small ones first, until none can go
// on. again is when to look even without a kick, 0 for never.
func (s *session) pass(ctx context.Context) (again time.Duration, err error) {
	for {
		var list []*shipping
		s.mu.Lock()
		for name := range s.dirty {
			list = append(list, s.shipping(name))
		}
		clear(s.dirty)
		s.mu.Unlock()
		slices.SortFunc(list, func(a, b *shipping) int {
			return cmp.Or(cmp.Compare(a.size, b.size), cmp.Compare(a.name, b.name))
		})
		progress := false
		for _, x := range list {
			out, err := s.turns(ctx, x)
			if err != nil {
				return 0, err
			}
			s.mu.Lock()
			switch out {
			case more:
				progress = true
				s.dirty[x.name] = struct{}{}
			case blocked:
				s.dirty[x.name] = struct{}{}
			case undurable:
				s.undurable[x.name] = struct{}{}
			case paused:
				s.dirty[x.name] = struct{}{}
				if d := max(time.Millisecond, time.Until(x.pause)); again == 0 || d < again {
					again = d
				}
			}
			s.mu.Unlock()
			if out == undurable {
				// The disk may have been faster than us: its word came before.
				if o, err := s.turns(ctx, x); err != nil {
					return 0, err
				} else if o == more {
					progress = true
					s.changed(nil)
				}
			}
		}
		if !progress {
			return again, nil
		}
	}
}

func (s *session) turns(ctx context.Context, x *shipping) (out outcome, err error) {
	for range turn {
		if out, err = s.shipOne(ctx, x); out != more || err != nil {
			return out, err
		}
	}
	return more, nil
}

// shipOne sends the next record of a database.
func (s *session) shipOne(ctx context.Context, x *shipping) (outcome, error) {
	s.mu.Lock()
	if x.busy {
		s.mu.Unlock()
		return idle, nil // the bulk goroutine wakes us
	}
	if time.Now().Before(x.pause) {
		s.mu.Unlock()
		return paused, nil
	}
	hub := x.resync
	x.resync = nil
	s.mu.Unlock()
	db := s.st.DB(x.name)
	if db == nil {
		return idle, nil // the hub has it and we do not
	}
	if hub != nil {
		if err := s.start(x, db, *hub); err != nil {
			s.fault(x, err, time.Second)
			return paused, nil
		}
	}
	if x.whole || x.pages {
		return s.startBulk(ctx, x, db), nil
	}
	if x.held == nil {
		sh, err := db.Next(x.next, s.l.opt.CompactFrom, compactLimit)
		switch {
		case errors.Is(err, store.ErrUndurable):
			return undurable, nil
		case errors.Is(err, store.ErrNothing):
			return idle, nil
		case errors.Is(err, store.ErrPages):
			x.pages = true
			return more, nil
		case errors.Is(err, store.ErrGap), err != nil && s.gaveUp(x):
			x.whole = true
			return more, nil
		case err != nil:
			s.fault(x, fmt.Errorf("read what follows %s: %w", x.next, err), time.Second)
			return paused, nil
		}
		x.held = sh
	}
	if x.held.History != x.history {
		s.mu.Lock()
		x.resync = &transport.DatabaseState{Name: x.name, History: transport.History(x.history), Pos: x.next}
		x.drop()
		s.mu.Unlock()
		return more, nil
	}
	if x.held.Group != 0 {
		return s.sendGroup(ctx, x)
	}
	if x.held.Size > bulkSize {
		return s.startBulk(ctx, x, db), nil
	}
	if !s.reserve(x.held.Size) {
		return blocked, nil
	}
	return more, s.sendHeld(ctx, x, 0)
}

// gaveUp reports whether reading what follows failed too often: the content says
// the same.
func (s *session) gaveUp(x *shipping) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return x.faults >= unreadable
}

// reserve takes room in the hub's window. One record always fits.
func (s *session) reserve(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used > 0 && uint64(s.used+n) > s.lim.Window {
		return false
	}
	s.used += n
	return true
}

// sendHeld sends the record that was read, for which room is reserved.
func (s *session) sendHeld(ctx context.Context, x *shipping, group uint64) error {
	sh := x.held
	x.held = nil
	return s.push(ctx, x, sh, group, sh.Size)
}

// sendGroup sends the record of a transaction over several databases together with
// its siblings, once all of them are up to it (invariant 12). One whose siblings are
// at the hub already, or void, goes alone.
func (s *session) sendGroup(ctx context.Context, x *shipping) (outcome, error) {
	var list []*shipping
	var size int64
	for _, part := range x.held.Parts {
		y, out := s.sibling(x, part)
		if out != more {
			return out, nil
		}
		if y != nil {
			list = append(list, y)
			size += y.held.Size
		}
	}
	if !s.reserve(size) {
		return blocked, nil
	}
	group := uint64(0)
	if len(list) > 1 {
		// Not the engine's number: what is sent once more must not be taken for a
		// part of what was sent before, of which the hub may still be busy.
		s.groups++
		group = s.groups
	}
	for _, y := range list {
		y.held.Parts = y.held.Parts[:len(list)]
		if err := s.sendHeld(ctx, y, group); err != nil {
			return idle, err
		}
	}
	return more, nil
}

// sibling returns who is to be sent together with x for one part of its group,
// nil if nobody is, and more; or why x has to wait.
func (s *session) sibling(x *shipping, part store.GroupPart) (*shipping, outcome) {
	db := s.st.DB(part.Name)
	if db == nil || db.Place().History != part.History {
		return nil, more // it was dropped, or began again: its part is void
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	y := s.shipping(part.Name)
	unanswered := y != x && slices.ContainsFunc(y.flight, func(f flight) bool { return f.pos.TXID >= part.TXID })
	switch {
	case y.busy || y.resync != nil || y.whole || y.pages:
		return nil, blocked
	case unanswered:
		// Sent before: if that is refused both go again, if not x goes alone.
		return nil, blocked
	case y.held != nil && y.held.Group == x.held.Group:
		return y, more
	case y.next.TXID < part.TXID:
		// It comes when its turn does; held is kept until then.
		s.dirty[y.name] = struct{}{}
		return nil, blocked
	}
	return nil, more
}

// push sends one shipment. counted bytes of it were taken from the window. Only
// errors of the session are returned.
func (s *session) push(ctx context.Context, x *shipping, sh *store.Shipment, group uint64, counted int64) error {
	defer sh.Body.Close()
	p := &transport.Push{
		Name: sh.Name, History: transport.History(sh.History), Epoch: transport.Epoch(sh.Epoch),
		MinTXID: sh.Min, MaxTXID: sh.Max, PreApply: sh.Pre, PostApply: sh.Post,
		CommitTime: sh.Time, PageSize: sh.PageSize, Size: sh.Size,
	}
	if group != 0 {
		p.Group, p.Parts = group, uint32(len(sh.Parts))
	}
	switch {
	case sh.Commit == 0:
		p.Flags |= transport.PushDrop
	case sh.Full && sh.Min > 1:
		p.Flags |= transport.PushReplace
	}
	if sh.Full && sh.Min == 1 {
		p.Flags |= transport.PushSnapshot
		p.PreApply = 0
	}
	s.streamMu.Lock()
	once := sync.OnceFunc(s.streamMu.Unlock)
	defer once()
	s.stream++
	p.Stream = s.stream
	s.mu.Lock()
	x.flight = append(x.flight, flight{p.Stream, sh.Pos(), counted})
	x.next = sh.Pos()
	s.mu.Unlock()
	err := transport.SendPush(ctx, limited{s.c, &s.l.rate, once}, p, sh.Body)
	if err != nil {
		return fmt.Errorf("send %s of %s: %w", sh.Pos(), sh.Name, err)
	}
	return nil
}

// limited is a Conn that observes the rate, and calls queued once its first
// message is on its way.
type limited struct {
	transport.Conn
	rate   *bucket
	queued func()
}

func (c limited) Send(ctx context.Context, m transport.Message) error {
	const header = 64
	switch m := m.(type) {
	case *transport.Push:
		if err := c.rate.take(ctx, header+len(m.Payload), true); err != nil {
			return err
		}
	case *transport.Data:
		if err := c.rate.take(ctx, header+len(m.Payload), false); err != nil {
			return err
		}
	}
	err := c.Conn.Send(ctx, m)
	c.queued()
	return err
}

// startBulk sends a snapshot, or the large record that was read, from a goroutine
// of its own, if there is room for one more.
func (s *session) startBulk(ctx context.Context, x *shipping, db *store.DB) outcome {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bulk >= min(bulkN, max(1, int(s.lim.MaxStreams)-1)) {
		return blocked
	}
	s.bulk++
	x.busy = true
	ctx, x.cancel = context.WithCancel(ctx)
	s.wg.Go(func() {
		err := s.sendBulk(ctx, x, db)
		s.mu.Lock()
		s.bulk--
		x.busy = false
		x.cancel()
		x.cancel = nil
		canceled := x.resync != nil
		s.dirty[x.name] = struct{}{}
		if err != nil && !canceled && x.resync == nil {
			x.resync = &transport.DatabaseState{Name: x.name, History: transport.History(x.history), Pos: x.next}
		}
		s.mu.Unlock()
		if err != nil && !canceled && ctx.Err() == nil {
			s.fault(x, err, time.Second)
		}
		s.wake()
	})
	return idle
}

func (s *session) sendBulk(ctx context.Context, x *shipping, db *store.DB) error {
	sh := x.held
	x.held = nil
	var err error
	switch {
	case x.whole:
		if sh, err = db.SnapshotShipment(); err != nil {
			return err
		}
		s.l.log.Info("sending a snapshot", "db", x.name, "pos", sh.Pos(), "bytes", sh.Size)
	case x.pages:
		sh, err = db.PagesShipment(x.next)
		if errors.Is(err, store.ErrGap) {
			x.whole = true
			return nil
		}
		if err != nil {
			return err
		}
		s.l.log.Info("sending the changed pages", "db", x.name, "from", sh.Min, "pos", sh.Pos(), "bytes", sh.Size)
	}
	before := x.next
	if err := s.push(ctx, x, sh, 0, 0); err != nil {
		s.mu.Lock()
		s.forget(x)
		x.next = before
		s.mu.Unlock()
		return err
	}
	x.whole, x.pages = false, false
	return nil
}

// drop forgets what was read and not sent. s.mu is held.
func (x *shipping) drop() {
	if x.held != nil {
		_ = x.held.Body.Close()
		x.held = nil
	}
}

// forget gives the room back that the records of x on their way take. s.mu is held.
func (s *session) forget(x *shipping) {
	for _, f := range x.flight {
		s.used -= f.size
	}
	x.flight = nil
}

// start finds out how to go on from where the hub stands:
//
//	nothing there ............................ from our first record on
//	a position of our line ................... from there on
//	of our line, but forgotten here .......... a snapshot
//	another line ............................. a snapshot that replaces it; the hub keeps both
func (s *session) start(x *shipping, db *store.DB, hub transport.DatabaseState) error {
	info := db.Info()
	if err := db.Damaged(); err != nil && hub.History == transport.History(info.History) {
		s.mu.Lock()
		x.resync = &hub
		s.mu.Unlock()
		return fmt.Errorf("what the hub has is kept from what is damaged here: %w", err)
	}
	s.mu.Lock()
	x.drop()
	s.forget(x)
	x.history, x.next, x.whole, x.pages = info.History, ltx.Pos{}, false, false
	s.mu.Unlock()
	switch {
	case hub.History == 0 || hub.Pos.IsZero():
		return db.SetAcked(ltx.Pos{})
	case uint64(hub.History) != info.History:
		x.whole = true
		return db.SetAcked(ltx.Pos{})
	case db.Owed(info.History, hub.Pos):
		x.next = hub.Pos
		return db.SetAcked(hub.Pos)
	case hub.Pos.TXID < info.Acked.TXID:
		s.l.log.Warn("the hub has lost what it had confirmed: sending a snapshot", "db", x.name, "pos", hub.Pos)
		x.whole = true
		return db.SetAcked(ltx.Pos{})
	}
	if err := db.NewHistory(); err != nil {
		s.mu.Lock()
		x.resync = &hub
		s.mu.Unlock()
		return err
	}
	history := db.Place().History
	s.mu.Lock()
	x.history, x.whole = history, true
	s.mu.Unlock()
	return db.SetAcked(ltx.Pos{})
}

// fault logs why a database cannot be shipped, and lets it rest for a while.
func (s *session) fault(x *shipping, err error, pause time.Duration) {
	s.mu.Lock()
	x.faults++
	n := x.faults
	x.pause = time.Now().Add(min(time.Minute, pause<<min(n-1, 10)))
	s.dirty[x.name] = struct{}{}
	s.mu.Unlock()
	if n == 1 || n%16 == 0 {
		s.l.log.Warn("database cannot be shipped; trying again", "db", x.name, "err", err)
	}
}

// receive takes the hub's answers until the session ends.
func (s *session) receive(ctx context.Context) error {
	for {
		m, err := s.c.Recv(ctx)
		if err != nil {
			return err
		}
		switch m := m.(type) {
		case *transport.Ack:
			err = s.ack(m)
		case *transport.Nak:
			s.nak(m)
		case *transport.Position:
			for _, d := range m.Databases {
				s.resync(d)
			}
		case *transport.Push, *transport.Data:
			err = fmt.Errorf("%s of a database that was not subscribed to: %w", m.Kind(), transport.ErrCorrupt)
		}
		if err != nil {
			return err
		}
	}
}

// ack notes what the hub has made durable.
func (s *session) ack(m *transport.Ack) error {
	if m.Level != transport.AckDurable {
		return nil
	}
	s.mu.Lock()
	x := s.ships[m.Name]
	if x == nil || uint64(m.History) != x.history || x.resync != nil {
		s.mu.Unlock()
		return nil
	}
	i := slices.IndexFunc(x.flight, func(f flight) bool { return f.pos == m.Pos })
	if i >= 0 {
		for _, f := range x.flight[:i+1] {
			s.used -= f.size
		}
		x.flight = slices.Delete(x.flight, 0, i+1)
		x.faults = 0
		defer s.wake() // also if nothing is dirty yet: somebody may be about to wait for room
	}
	s.mu.Unlock()
	db := s.st.DB(m.Name)
	if db == nil {
		return nil
	}
	if i < 0 && !db.Owed(uint64(m.History), m.Pos) {
		s.resync(transport.DatabaseState{Name: m.Name, History: m.History, Epoch: m.Epoch, Pos: m.Pos})
		return nil
	}
	return db.SetAcked(m.Pos)
}

// nak starts again from where the hub stands. A refusal of what is not on its
// way any more says nothing new.
func (s *session) nak(m *transport.Nak) {
	s.mu.Lock()
	x := s.ships[m.Name]
	if x == nil || x.resync != nil || !slices.ContainsFunc(x.flight, func(f flight) bool { return f.stream == m.Stream }) {
		s.mu.Unlock()
		return
	}
	faults := x.faults
	s.mu.Unlock()
	err := fmt.Errorf("the hub refuses %s to %s: %s: %s", m.MinTXID, m.MaxTXID, m.Code, m.Text)
	switch m.Code {
	case transport.NakPosMismatch, transport.NakUnknownHistory, transport.NakUnknownDatabase, transport.NakNeedSnapshot, transport.NakCanceled:
		if faults > 0 {
			s.fault(x, err, 100*time.Millisecond)
		} else {
			s.mu.Lock()
			x.faults++
			s.mu.Unlock()
		}
	case transport.NakRefused, transport.NakTooLarge, transport.NakEpoch:
		s.fault(x, err, time.Minute)
	default:
		s.fault(x, err, max(time.Second, m.RetryAfter))
	}
	s.resync(transport.DatabaseState{Name: m.Name, History: m.History, Epoch: m.Epoch, Pos: m.Pos})
}

func (s *session) resync(d transport.DatabaseState) {
	s.mu.Lock()
	x := s.shipping(d.Name)
	x.resync = &d
	if x.cancel != nil {
		x.cancel()
	}
	s.dirty[d.Name] = struct{}{}
	s.mu.Unlock()
	s.wake()
}
