package conformance

import (
	"fmt"
	"net"
	"sync"
	"testing"
)

// A proxy is a TCP relay that misbehaves, once: after that many bytes in one
// direction, counted over all connections. -1 is never.
type proxy struct {
	up   bool  // the direction that is counted: towards the hub
	cut  int64 // the connection is reset after this many bytes
	flip int64 // this byte is changed

	ln     net.Listener
	target string
	wg     sync.WaitGroup

	mu     sync.Mutex // guards what follows
	n      int64      // bytes seen in the counted direction
	conns  []net.Conn
	closed bool
	frozen chan struct{} // closed by freeze: nothing is forwarded any more
}

func (p *proxy) String() string {
	dir := "down"
	if p.up {
		dir = "up"
	}
	return fmt.Sprintf("%s, cut at %d, flip at %d", dir, p.cut, p.flip)
}

// start relays to target until stop or the end of the test.
func (p *proxy) start(tb testing.TB, target string) string {
	tb.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	p.ln, p.target, p.frozen = ln, target, make(chan struct{})
	p.wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", p.target)
			if err != nil {
				conn.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, conn, out)
			closed := p.closed
			p.mu.Unlock()
			if closed {
				conn.Close()
				out.Close()
				return
			}
			p.wg.Go(func() { p.relay(conn, out, p.up) })
			p.wg.Go(func() { p.relay(out, conn, !p.up) })
		}
	})
	tb.Cleanup(p.stop)
	return p.addr()
}

func (p *proxy) addr() string { return p.ln.Addr().String() }

func (p *proxy) stop() {
	p.ln.Close()
	p.mu.Lock()
	p.closed = true
	for _, c := range p.conns {
		c.Close()
	}
	p.mu.Unlock()
	p.wg.Wait()
}

func (p *proxy) freeze() { close(p.frozen) }

func (p *proxy) relay(from, to net.Conn, counted bool) {
	buf := make([]byte, 4096)
	for {
		n, err := from.Read(buf)
		select {
		case <-p.frozen:
			// A black hole takes everything and gives nothing, not even an end.
			if err != nil {
				return
			}
			continue
		default:
		}
		b := buf[:n]
		if counted {
			p.mu.Lock()
			start := p.n
			p.n += int64(n)
			p.mu.Unlock()
			if p.flip >= start && p.flip < start+int64(n) {
				b[p.flip-start] ^= 0x55
			}
			if p.cut >= start && p.cut < start+int64(n) {
				_, _ = to.Write(b[:p.cut-start]) // it is being cut
				for _, c := range []net.Conn{from, to} {
					_ = c.(*net.TCPConn).SetLinger(0) // a reset, not an end
					c.Close()
				}
				return
			}
		}
		if len(b) > 0 {
			if _, werr := to.Write(b); werr != nil {
				from.Close()
				return
			}
		}
		if err != nil {
			to.Close()
			return
		}
	}
}
