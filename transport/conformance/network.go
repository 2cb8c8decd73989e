package conformance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/transport"
)

// This file is what a bad network does.

// badNetwork sends records both ways through p and checks that what arrives is
// what was sent, from the first, and that both ends get done.
func badNetwork(t *testing.T, c Carrier, p *proxy) {
	t.Helper()
	cfg := transport.Config{DeadAfter: 500 * time.Millisecond, HelloTimeout: time.Second, CloseGrace: 100 * time.Millisecond}
	h := &hub{serve: func(ctx context.Context, end transport.Conn) error {
		exchange(t, p, end)
		return nil
	}}
	h.conns = make(chan transport.Conn, 1)
	addr, stop := c.Serve(t, h, cfg)
	defer stop()
	defer p.stop()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, _, err := c.Dialer(t, p.start(t, addr), cfg).Dial(ctx, &transport.Hello{Node: "node"})
	if err != nil {
		if ctx.Err() != nil {
			t.Errorf("%s: dial hung", p)
		}
		return
	}
	exchange(t, p, conn)
	conn.Close()
}

func exchange(t *testing.T, p *proxy, end transport.Conn) {
	const n = 60
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { _ = sendRecords(ctx, end, n, 700) }) // may fail at any record
	got, err := recvRecords(ctx, end, n)
	if p.flip < 0 && strings.Contains(fmt.Sprint(err), "wrong record") {
		t.Errorf("%s: after %d records: %v", p, got, err)
	}
	wg.Wait()
	if ctx.Err() != nil {
		t.Errorf("%s: hung after %d records", p, got)
	}
}

func testCut(t *testing.T, c Carrier) {
	step := int64(997)
	if testing.Short() {
		step *= 5
	}
	for n := int64(0); n < 60_000; n += step {
		for _, up := range []bool{true, false} {
			badNetwork(t, c, &proxy{up: up, cut: n, flip: -1})
		}
	}
}

func testNoise(t *testing.T, c Carrier) {
	for n := int64(0); n < 30_000; n += 1499 {
		for _, up := range []bool{true, false} {
			badNetwork(t, c, &proxy{up: up, cut: -1, flip: n})
		}
	}
}

func testBlackHole(t *testing.T, c Carrier) {
	cfg := transport.Config{DeadAfter: 400 * time.Millisecond, CloseGrace: 100 * time.Millisecond}
	p := &proxy{cut: -1, flip: -1}
	node, hub := connect(t, c, cfg, p)
	p.freeze()
	began := time.Now()
	for _, end := range []transport.Conn{node, hub} {
		go func() { _ = sendRecords(context.Background(), end, 1<<40, 9000) }() // ends with the session
		_, err := end.Recv(within(t, patience))
		if !errors.Is(err, transport.ErrLost) {
			t.Errorf("got %v, want lost", err)
		}
	}
	if d := time.Since(began); d > cfg.DeadAfter+5*time.Second { // of a loaded machine
		t.Errorf("noticed after %s, want about %s", d, cfg.DeadAfter)
	}
	for _, end := range []transport.Conn{node, hub} {
		end.Close()
	}

	// A hub that never answers the connection.
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if _, _, err := c.Dialer(t, p.addr(), cfg).Dial(ctx, &transport.Hello{}); err == nil {
		t.Error("dial into a black hole succeeded")
	}
	p.stop()
}

func testNobody(t *testing.T, c Carrier) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if _, err := dial(t, c, ln.Addr().String(), transport.Config{}); err == nil {
		t.Error("dial to a closed port succeeded")
	}
}
