// Package conformance tests what every carrier of the link must do: order, flow
// control, the end of sessions, and what a bad network does to them.
package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/ltx"
	"github.com/litefs-agent/litefs-agent/transport"
)

// A Carrier is what is tested.
type Carrier struct {
	// Serve starts a hub that gives sessions to h, and returns the TCP address
	// that nodes connect to. It is stopped by the returned function, which
	// returns when all sessions have ended.
	Serve func(tb testing.TB, h transport.Handler, cfg transport.Config) (addr string, stop func())
	// Dialer connects to a hub at addr, a TCP address, which may be a proxy's.
	Dialer func(tb testing.TB, addr string, cfg transport.Config) transport.Dialer
}

// patience is how long anything that must happen may take on a loaded machine.
const patience = 20 * time.Second

// Run runs the suite.
func Run(t *testing.T, c Carrier) {
	for _, test := range []struct {
		name string
		f    func(*testing.T, Carrier)
	}{
		{"order", testOrder},
		{"pipeline", testPipeline},
		{"interleave", testInterleave},
		{"backpressure", testBackpressure},
		{"slow receiver outlives DeadAfter", testStall},
		{"idle", testIdle},
		{"cancel", testCancel},
		{"close", testClose},
		{"close before a full queue", testCloseFull},
		{"close at any moment", testCloseAnytime},
		{"bye", testBye},
		{"hub stops", testStop},
		{"refused", testRefused},
		{"too large", testTooLarge},
		{"cut", testCut},
		{"black hole", testBlackHole},
		{"noise", testNoise},
		{"nobody there", testNobody},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := runtime.NumGoroutine()
			t.Cleanup(func() { noLeak(t, before) })
			test.f(t, c)
		})
	}
}

// noLeak waits until no more goroutines than before are left.
func noLeak(t *testing.T, before int) {
	deadline := time.Now().Add(patience)
	for runtime.NumGoroutine() > before {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Errorf("%d goroutines, want %d:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
			return
		}
		time.Sleep(5 * time.Millisecond) // the runtime has no event to wait for
	}
}

// A hub hands the sessions it gets to the test.
type hub struct {
	accept func(*transport.Hello) (*transport.Welcome, error)
	serve  func(context.Context, transport.Conn) error // nil: give it to conns, wait for its end
	conns  chan transport.Conn
	keep   chan struct{} // if not nil, Serve holds the session until it is closed
}

func (h *hub) Accept(_ context.Context, _ transport.Peer, hello *transport.Hello) (*transport.Welcome, error) {
	if h.accept != nil {
		return h.accept(hello)
	}
	return &transport.Welcome{Hub: "hub", Session: hello.Session + 1, Databases: hello.Databases}, nil
}

func (h *hub) Serve(ctx context.Context, c transport.Conn, _ *transport.Hello, _ *transport.Welcome) error {
	if h.serve != nil {
		return h.serve(ctx, c)
	}
	h.conns <- c
	<-ctx.Done()
	if h.keep != nil {
		<-h.keep // what was received is still to be read
	}
	return nil
}

// serve starts a hub, stopped with the test.
func serve(tb testing.TB, c Carrier, cfg transport.Config, h *hub) string {
	tb.Helper()
	h.conns, h.keep = make(chan transport.Conn, 64), make(chan struct{})
	addr, stop := c.Serve(tb, h, cfg)
	tb.Cleanup(stop)
	tb.Cleanup(func() { close(h.keep) })
	return addr
}

func dial(tb testing.TB, c Carrier, addr string, cfg transport.Config) (transport.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, _, err := c.Dialer(tb, addr, cfg).Dial(ctx, &transport.Hello{Node: "node", Session: 7})
	if err == nil {
		tb.Cleanup(func() { conn.Close() })
	}
	return conn, err
}

// connect returns both ends of a session; through, if not nil, is in between.
func connect(tb testing.TB, c Carrier, cfg transport.Config, through *proxy) (node, hubEnd transport.Conn) {
	tb.Helper()
	h := &hub{}
	addr := serve(tb, c, cfg, h)
	if through != nil {
		addr = through.start(tb, addr)
	}
	node, err := dial(tb, c, addr, cfg)
	if err != nil {
		tb.Fatalf("dial: %v", err)
	}
	return node, <-h.conns
}

func within(tb testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	tb.Cleanup(cancel)
	return ctx
}

// record is push n, whose content follows from n.
func record(n uint64, size int) *transport.Push {
	payload := make([]byte, size)
	for i := range payload {
		payload[i] = byte(n) + byte(i)*7
	}
	return &transport.Push{Stream: n, Name: "a/b.db", History: 5, MinTXID: ltx.TXID(n), MaxTXID: ltx.TXID(n),
		PostApply: ltx.Checksum(crc32.ChecksumIEEE(payload)) + 1, PageSize: 4096, Size: int64(size), Payload: payload, Last: true}
}

// checkRecord returns what is wrong with m as push n.
func checkRecord(m transport.Message, n uint64) error {
	p, ok := m.(*transport.Push)
	if !ok {
		return fmt.Errorf("got %s, want push %d", m.Kind(), n)
	}
	if p.Stream != n || p.MaxTXID != ltx.TXID(n) || ltx.Checksum(crc32.ChecksumIEEE(p.Payload))+1 != p.PostApply {
		return fmt.Errorf("got push %d of %d bytes, want %d whole", p.Stream, len(p.Payload), n)
	}
	return nil
}

// sendRecords sends pushes 1 to n of various sizes below size.
func sendRecords(ctx context.Context, c transport.Conn, n uint64, size int) error {
	for i := uint64(1); i <= n; i++ {
		if err := c.Send(ctx, record(i, int(i*37)%size)); err != nil {
			return fmt.Errorf("send %d: %w", i, err)
		}
	}
	return nil
}

// recvRecords receives pushes from 1 up to n and returns how many came.
func recvRecords(ctx context.Context, c transport.Conn, n uint64) (uint64, error) {
	for i := uint64(1); i <= n; i++ {
		m, err := c.Recv(ctx)
		if err != nil {
			return i - 1, err
		}
		if err := checkRecord(m, i); err != nil {
			return i - 1, fmt.Errorf("wrong record: %w", err)
		}
	}
	return n, nil
}

// both runs all of fs and fails the test with their errors.
func both(t *testing.T, fs ...func() error) {
	t.Helper()
	errs := make(chan error, len(fs))
	for _, f := range fs {
		go func() { errs <- f() }()
	}
	for range fs {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func testOrder(t *testing.T, c Carrier) {
	node, hub := connect(t, c, transport.Config{}, nil)
	ctx := within(t, patience)
	const n = 2000
	recv := func(c transport.Conn) func() error {
		return func() error { _, err := recvRecords(ctx, c, n); return err }
	}
	both(t,
		func() error { return sendRecords(ctx, node, n, 9000) }, recv(hub),
		func() error { return sendRecords(ctx, hub, n, 5000) }, recv(node))
	if s := node.Stats(); s.SentN != n || s.RecvN != n || s.RecvBytes == 0 {
		t.Errorf("stats %+v, want %d sent and received", s, n)
	}
}

func testPipeline(t *testing.T, c Carrier) {
	node, hub := connect(t, c, transport.Config{}, nil)
	ctx := within(t, patience)
	const n = 10_000
	both(t,
		func() error { return sendRecords(ctx, node, n, 200) },
		func() error {
			for i := uint64(1); i <= n; i++ {
				m, err := hub.Recv(ctx)
				if err == nil {
					err = checkRecord(m, i)
				}
				if err == nil {
					err = hub.Send(ctx, &transport.Ack{Name: "a/b.db", History: 5, Pos: m.(*transport.Push).Pos(), Level: transport.AckDurable})
				}
				if err != nil {
					return err
				}
			}
			return nil
		},
		func() error {
			for i := ltx.TXID(1); i <= n; i++ {
				m, err := node.Recv(ctx)
				if err != nil {
					return err
				}
				if a, ok := m.(*transport.Ack); !ok || a.Pos.TXID != i {
					return fmt.Errorf("got %+v, want ack %d", m, i)
				}
			}
			return nil
		})
}

// meter counts what has been read.
type meter struct {
	r  io.Reader
	mu sync.Mutex
	n  int64
	at chan struct{} // closed when n passes mark
}

const meterMark = 2 << 20

func (m *meter) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.n < meterMark && m.n+int64(n) >= meterMark {
		close(m.at)
	}
	m.n += int64(n)
	return n, err
}

func (m *meter) read() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.n
}

// testInterleave sends two large streams, one of unknown size, and small records
// that must not wait for them.
func testInterleave(t *testing.T, c Carrier) {
	node, hub := connect(t, c, transport.Config{}, nil)
	ctx := within(t, patience)
	content := make([]byte, 8<<20)
	for i := range content {
		content[i] = byte(rand.Uint32())
	}
	big := func(stream uint64, size int64) *transport.Push {
		p := record(stream, 0)
		p.Name, p.Size, p.PostApply, p.Flags = "big.db", size, ltx.Checksum(crc32.ChecksumIEEE(content)), transport.PushSnapshot
		return p
	}
	src := &meter{r: bytes.NewReader(content), at: make(chan struct{})}
	const smallN = 20
	var readAt [smallN]int64 // of src when each small record was given to Send
	var mu sync.Mutex        // guards readAt
	both(t,
		func() error { return transport.SendPush(ctx, node, big(1, int64(len(content))), src) },
		func() error {
			<-src.at // so that stream 2 opens after 1
			for i := range smallN {
				mu.Lock()
				readAt[i] = src.read()
				mu.Unlock()
				if err := node.Send(ctx, record(uint64(10+i), 300)); err != nil {
					return err
				}
			}
			return transport.SendPush(ctx, node, big(100, -1), bytes.NewReader(content))
		},
		func() error {
			in := transport.Inbound{Max: 4}
			sums := map[uint64]uint32{}
			bytesOf1, small := int64(0), 0
			for done := 0; done < 2; {
				m, err := hub.Recv(ctx)
				if err != nil {
					return err
				}
				switch m := m.(type) {
				case *transport.Push:
					if err := in.Push(m); err != nil {
						return err
					}
					if m.Name == "big.db" {
						continue
					}
					if err := checkRecord(m, uint64(10+small)); err != nil {
						return err
					}
					mu.Lock()
					late := bytesOf1 - readAt[small]
					mu.Unlock()
					if late > 3*transport.DefaultMaxFrame {
						return fmt.Errorf("small record %d waited for %d bytes of the stream", small, late)
					}
					small++
				case *transport.Data:
					p, err := in.Data(m)
					if err != nil {
						return err
					}
					if m.Stream == 1 {
						bytesOf1 += int64(len(m.Payload))
					}
					sums[m.Stream] = crc32.Update(sums[m.Stream], crc32.IEEETable, m.Payload)
					if m.Last {
						done++
						if ltx.Checksum(sums[m.Stream]) != p.PostApply {
							return fmt.Errorf("stream %d arrived changed", m.Stream)
						}
					}
				}
			}
			if small != smallN {
				return fmt.Errorf("%d small records, want %d", small, smallN)
			}
			return nil
		})
}

// fill sends to who does not receive until Send blocks for a while.
func fill(t *testing.T, c transport.Conn, most uint64) (sent uint64) {
	t.Helper()
	for sent < most {
		ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
		err := c.Send(ctx, record(sent+1, 8000))
		cancel()
		if errors.Is(err, context.DeadlineExceeded) {
			return sent
		}
		if err != nil {
			t.Fatalf("send %d: %v", sent+1, err)
		}
		sent++
	}
	t.Fatalf("%d records of 8000 bytes were taken from a sender whose receiver stopped", sent)
	return 0
}

func testBackpressure(t *testing.T, c Carrier) {
	node, hub := connect(t, c, transport.Config{SendQueue: 64 << 10, RecvQueue: 64 << 10}, nil)
	for _, end := range []struct {
		name     string
		from, to transport.Conn
	}{{"up", node, hub}, {"down", hub, node}} {
		sent := fill(t, end.from, 4000)
		t.Logf("%s: %d bytes under way when blocked", end.name, sent*8000)
		if _, err := recvRecords(within(t, patience), end.to, sent); err != nil {
			t.Fatalf("%s: %v", end.name, err)
		}
	}
}

func testStall(t *testing.T, c Carrier) {
	cfg := transport.Config{DeadAfter: 300 * time.Millisecond}
	node, hub := connect(t, c, cfg, nil)
	sent := fill(t, node, 100_000)
	time.Sleep(4 * cfg.DeadAfter) // the thing itself: nothing must happen
	if _, err := recvRecords(within(t, patience), hub, sent); err != nil {
		t.Fatal(err)
	}
	if err := node.Send(within(t, patience), record(sent+1, 10)); err != nil {
		t.Fatal(err)
	}
}

func testIdle(t *testing.T, c Carrier) {
	cfg := transport.Config{DeadAfter: 300 * time.Millisecond}
	node, hub := connect(t, c, cfg, nil)
	time.Sleep(4 * cfg.DeadAfter) // the thing itself
	both(t,
		func() error { return sendRecords(within(t, patience), node, 3, 100) },
		func() error { _, err := recvRecords(within(t, patience), hub, 3); return err })
	for _, s := range []transport.Stats{node.Stats(), hub.Stats()} {
		if s.RTT <= 0 || s.LastHeard > cfg.DeadAfter {
			t.Errorf("stats %+v, want a round trip, and heard within %s", s, cfg.DeadAfter)
		}
	}
}

func testCancel(t *testing.T, c Carrier) {
	node, hub := connect(t, c, transport.Config{}, nil)
	ctx, cancel := context.WithCancel(context.Background())
	failed := make(chan error, 1)
	go func() { _, err := hub.Recv(ctx); failed <- err }()
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("recv: %v, want canceled", err)
	}
	if err := node.Send(ctx, record(1, 10)); !errors.Is(err, context.Canceled) {
		t.Errorf("send: %v, want canceled", err)
	}
	sent := fill(t, node, 100_000) // whose last Send was given up
	if _, err := recvRecords(within(t, patience), hub, sent); err != nil {
		t.Fatal(err)
	}
	if err := node.Send(within(t, patience), record(sent+1, 10)); err != nil {
		t.Fatal(err)
	}
	m, err := hub.Recv(within(t, patience))
	if err == nil {
		err = checkRecord(m, sent+1)
	}
	if err != nil {
		t.Errorf("after a Send that was given up: %v", err)
	}
}

func testClose(t *testing.T, c Carrier) {
	for _, side := range []string{"node", "hub"} {
		a, b := connect(t, c, transport.Config{}, nil)
		if side == "hub" {
			a, b = b, a
		}
		ctx := within(t, patience)
		blocked := make(chan error, 1)
		go func() { _, err := a.Recv(ctx); blocked <- err }()
		if err := sendRecords(ctx, a, 100, 1000); err != nil {
			t.Fatal(err)
		}
		a.Close()
		a.Close()
		if err := <-blocked; !errors.Is(err, transport.ErrClosed) {
			t.Errorf("%s: recv in progress: %v, want closed", side, err)
		}
		if err := a.Send(ctx, record(1, 1)); !errors.Is(err, transport.ErrClosed) {
			t.Errorf("%s: send: %v, want closed", side, err)
		}
		n, err := recvRecords(ctx, b, 101)
		if bye, ok := errors.AsType[*transport.ByeError](err); n != 100 || !ok || bye.Code != transport.CodeNone {
			t.Errorf("%s: after its close the other got %d records and %v, want 100 and a plain bye", side, n, err)
		}
		if err := b.Send(ctx, record(1, 1)); !errors.Is(err, transport.ErrEnded) {
			t.Errorf("%s: send to who closed: %v, want ended", side, err)
		}
		b.Close()
	}
}

// testCloseFull: Close cannot deliver what the other end does not take, but the
// other end learns of it all the same, long before DeadAfter.
func testCloseFull(t *testing.T, c Carrier) {
	for _, side := range []string{"node", "hub"} {
		a, b := connect(t, c, transport.Config{DeadAfter: time.Hour, CloseGrace: 50 * time.Millisecond}, nil)
		if side == "hub" {
			a, b = b, a
		}
		sent := fill(t, a, 100_000)
		a.Close()
		n, err := recvRecords(within(t, patience), b, sent+1)
		if !errors.Is(err, transport.ErrLost) && !errors.Is(err, transport.ErrEnded) {
			t.Errorf("%s closed: the other got %d of %d records and %v, want lost or ended", side, n, sent, err)
		}
		b.Close()
	}
}

func testCloseAnytime(t *testing.T, c Carrier) {
	h := &hub{}
	addr := serve(t, c, transport.Config{}, h)
	for i := range 40 {
		node, err := dial(t, c, addr, transport.Config{})
		if err != nil {
			t.Fatal(err)
		}
		ends := []transport.Conn{node, <-h.conns}
		ctx := within(t, patience)
		var wg sync.WaitGroup
		for _, end := range ends {
			wg.Go(func() { _ = sendRecords(ctx, end, 1<<40, 5000) }) // until it ends
			wg.Go(func() {
				n, err := recvRecords(ctx, end, 1<<40)
				if errors.Is(err, context.DeadlineExceeded) || strings.Contains(fmt.Sprint(err), "wrong record") {
					t.Errorf("round %d: after %d records: %v", i, n, err)
				}
			})
		}
		time.Sleep(time.Duration(rand.IntN(8000)) * time.Microsecond) // the moment
		began := time.Now()
		ends[i%2].Close()
		if d := time.Since(began); d > 10*time.Second {
			t.Errorf("round %d: close took %s", i, d)
		}
		wg.Wait()
		ends[1-i%2].Close()
	}
}

func testBye(t *testing.T, c Carrier) {
	h := &hub{serve: func(context.Context, transport.Conn) error {
		return &transport.ByeError{Code: transport.CodeReplaced, Text: "newer", RetryAfter: time.Minute}
	}}
	node, err := dial(t, c, serve(t, c, transport.Config{}, h), transport.Config{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = node.Recv(within(t, patience))
	bye, ok := errors.AsType[*transport.ByeError](err)
	if !ok || bye.Code != transport.CodeReplaced || bye.Text != "newer" || bye.RetryAfter != time.Minute {
		t.Errorf("got %v, want the hub's reason", err)
	}
}

func testStop(t *testing.T, c Carrier) {
	h := &hub{conns: make(chan transport.Conn, 1)}
	addr, stop := c.Serve(t, h, transport.Config{})
	node, err := dial(t, c, addr, transport.Config{})
	if err != nil {
		stop()
		t.Fatal(err)
	}
	stop()
	_, err = node.Recv(within(t, patience))
	if !errors.Is(err, transport.ErrBusy) || errors.Is(err, transport.ErrRefused) {
		t.Errorf("got %v, want a shutdown", err)
	}
}

func testRefused(t *testing.T, c Carrier) {
	h := &hub{accept: func(hello *transport.Hello) (*transport.Welcome, error) {
		switch hello.Node {
		case "clone":
			return nil, transport.Refuse(transport.CodeClone, "session %d is of other hardware", hello.Session)
		case "fault":
			return nil, errors.New("secret")
		case "moved":
			return &transport.Welcome{MovedURL: "http://elsewhere"}, nil
		}
		return &transport.Welcome{Databases: hello.Databases}, nil
	}}
	addr := serve(t, c, transport.Config{}, h)
	d := c.Dialer(t, addr, transport.Config{})
	for _, test := range []struct {
		name  string
		hello transport.Hello
		want  error
		text  string
	}{
		{"clone", transport.Hello{Node: "clone", Session: 7}, transport.ErrRefused, "session 7 is of other hardware"},
		{"fault", transport.Hello{Node: "fault"}, transport.ErrBusy, "log"},
		{"too new", transport.Hello{MinVersion: 900, MaxVersion: 901}, transport.ErrVersion, "900"},
		{"unknown feature", transport.Hello{Required: 1 << 40}, transport.ErrVersion, "feature"},
		{"name too long", transport.Hello{Node: strings.Repeat("n", 65)}, transport.ErrTooLarge, ""},
		{"hello too large", transport.Hello{Databases: make([]transport.DatabaseState, 10)}, transport.ErrCorrupt, ""},
	} {
		_, _, err := d.Dial(within(t, patience), &test.hello)
		if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.text) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: got %v, want %v: %s", test.name, err, test.want, test.text)
		}
	}
	conn, w, err := d.Dial(within(t, patience), &transport.Hello{Node: "moved"})
	if err != nil || conn != nil || w.MovedURL != "http://elsewhere" {
		t.Errorf("moved: got %v, %v, %v", conn, w, err)
	}
	hello := &transport.Hello{Node: "many"}
	for i := range 2000 {
		hello.Databases = append(hello.Databases, transport.DatabaseState{Name: fmt.Sprintf("folder/database-%d.db", i), History: 1, PageSize: 4096})
	}
	h.conns = make(chan transport.Conn, 1)
	conn, w, err = d.Dial(within(t, patience), hello)
	if err != nil || len(w.Databases) != 2000 {
		t.Fatalf("2000 databases: %v", err)
	}
	conn.Close()
}

func testTooLarge(t *testing.T, c Carrier) {
	node, hub := connect(t, c, transport.Config{MaxFrame: 4096}, nil)
	ctx := within(t, patience)
	if err := node.Send(ctx, record(1, 5000)); !errors.Is(err, transport.ErrTooLarge) {
		t.Errorf("got %v, want too large", err)
	}
	both(t,
		func() error { return sendRecords(ctx, node, 10, 3000) },
		func() error { _, err := recvRecords(ctx, hub, 10); return err })
}
