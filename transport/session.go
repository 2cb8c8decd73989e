package transport

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// A Pipe is what a carrier provides once hello is done: an ordered, reliable
// stream of bytes each way. [NewSession] makes a [Conn] of it.
type Pipe interface {
	// Read is called by one goroutine. A carrier reports a cut as an error other
	// than io.EOF where it can tell; the session needs no such help.
	io.Reader
	// Write is called by one goroutine with whole frames, and returns when it
	// does not need them any more. It blocks rather than buffer without bound.
	io.Writer
	// CloseWrite ends the outgoing stream; it follows the last Write.
	CloseWrite() error
	// Abort makes Read and Write return, now and later. It is called from any
	// goroutine, once.
	Abort()
}

// A session is the Conn over a Pipe. Four goroutines: reader, writer and keeper
// live until the pipe is aborted; done is closed when they have returned.
//
//	open --(Close, fault of the peer)--> draining: Bye queued, writer drains, keeper waits
//	open --(Bye of the peer)-----------> draining: nothing more to write
//	open --(link broken, silence)------> aborted
//	draining --(peer closed, or CloseGrace over)--> aborted --> done
type session struct {
	pipe  Pipe
	cfg   Config    // with defaults; constant
	lim   Limits    // agreed; constant
	start time.Time // the monotonic zero of the clocks below

	ended      chan struct{} // closed by end
	readerDone chan struct{}
	writerDone chan struct{}
	done       chan struct{}
	wakeWriter chan struct{} // 1 token: out, or the state, has changed
	wakeRecv   chan struct{} // 1 token: in may be not empty
	wakeReader chan struct{} // 1 token: in has room

	mu      sync.Mutex // guards what follows; not held while blocking
	out     []byte     // frames for the writer
	writing bool       // the writer is inside Write
	live    []*waiter  // Sends that wait for room, in order
	bulk    []*waiter  // the same, of Data
	err     error      // why the session ended; nil while open
	drain   bool       // the writer sends what is in out before it stops
	bye     bool       // a Bye is queued: nothing may follow
	pong    bool       // a Pong is in out
	in      []received // for Recv
	inSize  int        // bytes of frames in in

	every time.Duration // how often the peer wants to hear us; set by NewSession, then constant
	idle  time.Duration // how long to send nothing; set by NewSession, then constant
	timer *time.Timer   // of keep

	lastHeard, readBegan, lastSent atomic.Int64 // nanoseconds since start; readBegan 0: not in Read
	rtt                            atomic.Int64
	sentN, recvN                   atomic.Int64
	sentBytes, recvBytes           atomic.Int64
}

type received struct {
	m    Message
	size int
}

// A waiter is a Send that found the queue full.
type waiter struct {
	frame []byte
	bye   bool
	ready chan error // 1: nil once frame is queued
	taken bool       // guarded by session.mu: ready has its value
}

// NewSession makes a Conn of an established pipe. limits are those returned by
// [Config.Answer] or [Config.Agree]. The Conn owns the pipe.
func NewSession(p Pipe, cfg Config, limits Limits) Conn {
	s := &session{
		pipe: p, cfg: cfg.WithDefaults(), lim: limits, start: time.Now(),
		ended:      make(chan struct{}),
		readerDone: make(chan struct{}), writerDone: make(chan struct{}), done: make(chan struct{}),
		wakeWriter: make(chan struct{}, 1), wakeRecv: make(chan struct{}, 1), wakeReader: make(chan struct{}, 1),
	}
	s.every = s.cfg.DeadAfter / 3
	if h := s.lim.Heartbeat; h > 0 {
		s.every = min(s.every, h)
	}
	s.every = max(s.every, 10*time.Millisecond)
	// Two sides that wait equally long would go on to send at the same moments.
	s.idle = s.every*5/8 + rand.N(s.every/4)
	s.timer = time.NewTimer(s.every / 2)
	go s.readLoop()
	go s.writeLoop()
	go s.keep()
	return s
}

// Done returns a channel that is closed when c has let go of its pipe. c must be
// from [NewSession].
func Done(c Conn) <-chan struct{} { return c.(*session).done }

// Ended returns a channel that is closed when c can no longer send, for whatever
// reason. c must be from [NewSession].
func Ended(c Conn) <-chan struct{} { return c.(*session).ended }

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (s *session) now() int64 { return int64(time.Since(s.start)) + 1 }

func (s *session) Limits() Limits { return s.lim }

func (s *session) Stats() Stats {
	return Stats{
		LastHeard: time.Duration(s.now() - s.lastHeard.Load()),
		RTT:       time.Duration(s.rtt.Load()),
		SentBytes: s.sentBytes.Load(), RecvBytes: s.recvBytes.Load(),
		SentN: s.sentN.Load(), RecvN: s.recvN.Load(),
	}
}

var framePool = sync.Pool{New: func() any { return new([]byte) }}

func (s *session) Send(ctx context.Context, m Message) error {
	switch m.Kind() {
	case KindHello, KindWelcome, KindPing, KindPong:
		return fmt.Errorf("send %s: only the carrier does: %w", m.Kind(), ErrCorrupt)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	buf := framePool.Get().(*[]byte)
	defer framePool.Put(buf)
	frame, err := AppendFrame((*buf)[:0], m, s.lim.MaxFrame)
	*buf = frame[:0]
	if err != nil {
		return err
	}
	bulk, bye := m.Kind() == KindData, m.Kind() == KindBye

	s.mu.Lock()
	if err := s.sendErrLocked(); err != nil {
		s.mu.Unlock()
		return err
	}
	if len(s.live) == 0 && (!bulk || len(s.bulk) == 0) && s.roomLocked(len(frame), bulk) {
		s.queueLocked(frame, bye)
		s.mu.Unlock()
		return nil
	}
	w := &waiter{frame: frame, bye: bye, ready: make(chan error, 1)}
	list := &s.live
	if bulk {
		list = &s.bulk
	}
	*list = append(*list, w)
	s.mu.Unlock()

	select {
	case err := <-w.ready:
		return err
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if w.taken {
		return <-w.ready
	}
	for i, x := range *list {
		if x == w {
			*list = append((*list)[:i], (*list)[i+1:]...)
			break
		}
	}
	return ctx.Err()
}

func (s *session) sendErrLocked() error {
	if s.err == nil && s.bye {
		return ErrClosed
	}
	return s.err
}

// roomLocked reports whether n more bytes may be queued.
func (s *session) roomLocked(n int, bulk bool) bool {
	limit := s.cfg.SendQueue
	if bulk {
		limit = min(limit, int(s.lim.MaxFrame))
	}
	return len(s.out) == 0 || len(s.out)+n <= limit
}

func (s *session) queueLocked(frame []byte, bye bool) {
	s.out = append(s.out, frame...)
	s.bye = s.bye || bye
	s.sentN.Add(1)
	wake(s.wakeWriter)
}

// admitLocked lets waiting Sends in after the queue was emptied: one chunk of bulk,
// so that it never starves, then what is live, then more bulk.
func (s *session) admitLocked() {
	admit := func(list *[]*waiter, bulk bool, n int) {
		for ; n > 0 && len(*list) > 0 && s.sendErrLocked() == nil && s.roomLocked(len((*list)[0].frame), bulk); n-- {
			w := (*list)[0]
			*list = (*list)[1:]
			w.taken = true
			s.queueLocked(w.frame, w.bye)
			w.ready <- nil
		}
		if len(*list) == 0 {
			*list = nil
		}
	}
	admit(&s.bulk, true, 1)
	admit(&s.live, false, len(s.live))
	admit(&s.bulk, true, len(s.bulk))
	if s.bye {
		s.refuseLocked(ErrClosed)
	}
}

// refuseLocked fails all waiting Sends.
func (s *session) refuseLocked(err error) {
	for _, w := range append(s.live, s.bulk...) {
		w.taken = true
		w.ready <- err
	}
	s.live, s.bulk = nil, nil
}

func (s *session) Recv(ctx context.Context) (Message, error) {
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		s.mu.Lock()
		if s.err == ErrClosed { // set by Close only, never wrapped
			s.mu.Unlock()
			return nil, ErrClosed
		}
		if len(s.in) > 0 {
			r := s.in[0]
			s.in[0] = received{}
			if s.in = s.in[1:]; len(s.in) == 0 {
				s.in = nil
			} else {
				wake(s.wakeRecv)
			}
			s.inSize -= r.size
			s.mu.Unlock()
			wake(s.wakeReader)
			return r.m, nil
		}
		if err := s.err; err != nil {
			s.mu.Unlock()
			return nil, err
		}
		s.mu.Unlock()
		select {
		case <-s.wakeRecv:
		case <-s.ended:
		case <-ctx.Done():
		}
	}
}

func (s *session) Close() error {
	s.end(ErrClosed, &Bye{}, true)
	s.mu.Lock()
	s.err = ErrClosed // also when it had failed before
	s.in, s.inSize = nil, 0
	s.mu.Unlock()
	<-s.done
	return nil
}

// closeWith is Close with a reason for the peer.
func (s *session) closeWith(bye *Bye) {
	s.end(ErrClosed, bye, true)
	_ = s.Close()
}

// CloseWith closes c, which must be from [NewSession], as Conn.Close does, and
// tells the peer why.
func CloseWith(c Conn, bye *Bye) { c.(*session).closeWith(bye) }

// end ends the session for reason err, unless it has ended. bye, if not nil, is
// queued for the peer; drain lets the writer finish.
func (s *session) end(err error, bye *Bye, drain bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	if !drain || bye == nil {
		s.out = nil
	}
	if bye != nil && !s.bye {
		if b, err := AppendFrame(s.out, bye, MinMaxFrame); err == nil {
			s.out = b
		}
	}
	s.err, s.drain, s.bye = err, drain, true
	s.refuseLocked(err)
	close(s.ended)
	wake(s.wakeWriter)
}

// lost ends the session because of the link.
func (s *session) lost(format string, args ...any) {
	s.end(fmt.Errorf("%w: %w", ErrLost, fmt.Errorf(format, args...)), nil, false)
}

// keep sends heartbeats, watches for silence, and after the end brings the
// session down.
func (s *session) keep() {
	defer close(s.done)
	defer s.timer.Stop()
	for open := true; open; {
		select {
		case <-s.ended:
			open = false
		case <-s.timer.C:
			s.timer.Reset(s.beat())
		}
	}
	s.mu.Lock()
	drain := s.drain
	s.mu.Unlock()
	if drain {
		grace := time.NewTimer(s.cfg.CloseGrace)
		defer grace.Stop()
		for _, c := range []chan struct{}{s.writerDone, s.readerDone} {
			select {
			case <-c:
			case <-grace.C:
				grace.Reset(0)
			}
		}
	}
	s.pipe.Abort()
	<-s.writerDone
	<-s.readerDone
}

// beat sends a heartbeat if nothing was sent for s.idle, and ends the session
// after a silence. It returns after how long it wants to be called again: an idle
// link should not wake anybody for nothing. The answer to the peer's heartbeat is
// a sending too, so the side with the shorter idle is the only one that sends them.
func (s *session) beat() time.Duration {
	now := s.now()
	next := s.every / 2
	// Silence counts only while we listen: a reader that waits for Recv hears nothing.
	if began := s.readBegan.Load(); began != 0 {
		silent := time.Duration(now - max(began, s.lastHeard.Load()))
		if silent > s.cfg.DeadAfter {
			s.lost("nothing heard for %s", silent.Round(time.Millisecond))
			return s.every
		}
		next = s.cfg.DeadAfter - silent + 1
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil || s.bye {
		return next
	}
	if s.writing || len(s.out) > 0 {
		return min(next, s.every/2)
	}
	left := s.idle - time.Duration(now-s.lastSent.Load())
	if left <= 0 || s.rtt.Load() == 0 { // each side wants to know its round trip once
		s.out, _ = AppendFrame(s.out, &Ping{Clock: uint64(now)}, MinMaxFrame)
		wake(s.wakeWriter)
		left = s.idle
	}
	return min(next, left)
}

func (s *session) writeLoop() {
	defer close(s.writerDone)
	var batch []byte
	for {
		s.mu.Lock()
		s.writing = false
		for len(s.out) == 0 && s.err == nil {
			s.mu.Unlock()
			<-s.wakeWriter
			s.mu.Lock()
		}
		batch, s.out = s.out, batch[:0]
		if s.err != nil && (!s.drain || len(batch) == 0) {
			drain := s.drain
			s.mu.Unlock()
			if drain {
				_ = s.pipe.CloseWrite() // the peer learns of it by the Bye
			}
			return
		}
		s.writing, s.pong = true, false
		s.admitLocked()
		s.mu.Unlock()

		_, err := s.pipe.Write(batch)
		s.lastSent.Store(s.now())
		if err != nil {
			// The peer may have said why before it closed: let the reader find it.
			grace := time.NewTimer(s.cfg.CloseGrace)
			defer grace.Stop()
			select {
			case <-s.readerDone:
			case <-s.ended:
			case <-grace.C:
			}
			s.lost("write: %w", err)
			return
		}
		s.sentBytes.Add(int64(len(batch)))
		if cap(batch) > s.cfg.SendQueue+int(s.lim.MaxFrame) {
			batch = nil
		}
	}
}

// timedReader notes when a Read begins and that something came.
type timedReader struct{ s *session }

func (r timedReader) Read(p []byte) (int, error) {
	s := r.s
	s.readBegan.Store(s.now())
	n, err := s.pipe.Read(p)
	s.readBegan.Store(0)
	if n > 0 {
		s.lastHeard.Store(s.now())
	}
	return n, err
}

func (s *session) readLoop() {
	defer close(s.readerDone)
	s.lastHeard.Store(s.now())
	r := bufio.NewReaderSize(timedReader{s}, 16<<10)
	for {
		m, size, err := ReadFrame(r, s.lim.MaxFrame)
		if err != nil {
			s.readFailed(err)
			return
		}
		s.recvBytes.Add(int64(size))
		switch m := m.(type) {
		case *Ping:
			s.queuePong(m.Clock)
			continue
		case *Pong:
			if rtt := s.now() - int64(m.Echo); rtt > 0 && m.Echo != 0 {
				s.rtt.Store(rtt)
			}
			continue
		case *Bye:
			s.end(&ByeError{Code: m.Code, Text: m.Text, RetryAfter: m.RetryAfter}, nil, true)
			return
		case *Hello, *Welcome:
			err := fmt.Errorf("%s inside a session: %w", m.Kind(), ErrCorrupt)
			s.end(err, &Bye{Code: CodeProtocol, Text: err.Error()}, true)
			return
		}
		s.recvN.Add(1)
		if !s.deliver(m, size) {
			// Closed here: read on, for the peer's end, and forget it.
			continue
		}
	}
}

// readFailed ends the session for what ReadFrame returned.
func (s *session) readFailed(err error) {
	switch {
	case errors.Is(err, ErrUnknown):
		s.end(err, &Bye{Code: CodeUnknown, Text: err.Error()}, true)
	case errors.Is(err, ErrTooLarge):
		s.end(err, &Bye{Code: CodeTooLarge, Text: err.Error()}, true)
	case errors.Is(err, ErrCorrupt):
		s.end(err, &Bye{Code: CodeCorrupt, Text: err.Error()}, true)
	case errors.Is(err, io.EOF):
		s.lost("ended without goodbye")
	default:
		s.lost("read: %w", err)
	}
}

// deliver hands m to Recv once there is room. It returns false when the session
// has ended.
func (s *session) deliver(m Message, size int) bool {
	for {
		s.mu.Lock()
		if s.err != nil {
			s.mu.Unlock()
			return false
		}
		if len(s.in) == 0 || s.inSize+size <= s.cfg.RecvQueue {
			s.in = append(s.in, received{m, size})
			s.inSize += size
			s.mu.Unlock()
			wake(s.wakeRecv)
			return true
		}
		s.mu.Unlock()
		select {
		case <-s.wakeReader:
		case <-s.ended:
		}
	}
}

// queuePong answers a Ping; of several that wait only one is answered.
func (s *session) queuePong(clock uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil && !s.bye && !s.pong {
		s.pong = true
		s.out, _ = AppendFrame(s.out, &Pong{Echo: clock}, MinMaxFrame)
		wake(s.wakeWriter)
		if s.rtt.Load() != 0 { // else the first look, which asks for it, would never come
			s.timer.Reset(s.idle) // no need to look before
		}
	}
}

// ReadFrame reads one frame and returns its size. It reads nothing beyond it. The
// error is io.EOF only if r ended before the first byte.
func ReadFrame(r io.Reader, limit uint32) (Message, int, error) {
	var header [frameHeader]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return nil, 0, err
	}
	kind, n, err := frameSize(header, limit)
	if err != nil {
		return nil, 0, err
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, 0, err
	}
	m, err := DecodeBody(kind, body)
	return m, frameHeader + n, err
}
