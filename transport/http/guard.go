package http

import (
	"context"
	"errors"
	"net"
	nethttp "net/http"
	"net/netip"
	"sync"
	"syscall"
	"time"
)

// The limits of connections. A stranger is a connection over which nobody has
// shown good credentials yet.
const (
	strangersPerOrigin = 256
	strangersInAll     = 1024
	connsPerOrigin     = 2048 // of origins but loopback, where a proxy may be
	// Failed authentications of one origin: so many at once, then so many a
	// second. Beyond it they are not answered.
	failureBurst = 20
	failureRate  = 0.2
	// maxOrigins bounds what is remembered of failures.
	maxOrigins = 64 << 10
)

// A guard counts the connections of a server. Whom it turns away finds the
// connection closed; others do not notice.
type guard struct {
	maxConns int

	mu        sync.Mutex // guards what follows
	conns     int
	strangers int
	origins   map[netip.Prefix]*origin
}

// An origin is an address, or in IPv6 the 64-bit network that one host may have.
type origin struct {
	conns, strangers int
	debt             float64   // failures not yet forgiven
	at               time.Time // of debt
}

func newGuard(maxConns int) *guard {
	return &guard{maxConns: maxConns, origins: make(map[netip.Prefix]*origin)}
}

// originOf returns the origin of a network address; all that have none share one.
func originOf(addr string) netip.Prefix {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return netip.Prefix{}
	}
	ip := ap.Addr().Unmap().WithZone("")
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	p, _ := ip.Prefix(bits)
	return p
}

func (g *guard) originLocked(p netip.Prefix) *origin {
	o := g.origins[p]
	if o == nil {
		if len(g.origins) >= maxOrigins {
			for k, o := range g.origins {
				if o.conns == 0 && o.forgive(time.Now()) == 0 {
					delete(g.origins, k)
				}
			}
		}
		o = new(origin)
		g.origins[p] = o
	}
	return o
}

// admit reports whether one more connection may be held, and counts it.
func (g *guard) admit(p netip.Prefix) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	o := g.originLocked(p)
	switch {
	case g.conns >= g.maxConns, g.strangers >= strangersInAll, o.strangers >= strangersPerOrigin:
	case o.conns >= connsPerOrigin && !p.Addr().IsLoopback():
	default:
		g.conns++
		g.strangers++
		o.conns++
		o.strangers++
		return true
	}
	return false
}

func (g *guard) release(c *guardedConn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	o := g.origins[c.origin]
	g.conns--
	o.conns--
	if !c.known {
		g.strangers--
		o.strangers--
	}
	if o.conns == 0 && o.forgive(time.Now()) == 0 {
		delete(g.origins, c.origin)
	}
}

// known notes that good credentials were shown over a connection.
func (g *guard) known(c *guardedConn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !c.known && !c.closed {
		c.known = true
		g.strangers--
		g.origins[c.origin].strangers--
	}
}

// forgive returns the debt at a time.
func (o *origin) forgive(now time.Time) float64 {
	o.debt = max(0, o.debt-failureRate*now.Sub(o.at).Seconds())
	o.at = now
	return o.debt
}

// failed notes a failed authentication. It reports whether it may be answered.
func (g *guard) failed(addr string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	o := g.originLocked(originOf(addr))
	if o.forgive(time.Now()) >= failureBurst {
		return false
	}
	o.debt++
	return true
}

// A guardedListener hands out connections that g counts.
type guardedListener struct {
	net.Listener
	g *guard
}

func (l guardedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		p := originOf(conn.RemoteAddr().String())
		if !l.g.admit(p) {
			cut(conn)
			continue
		}
		return &guardedConn{Conn: conn, g: l.g, origin: p}, nil
	}
}

// cut closes a connection without waiting for the peer and without keeping its
// address busy.
func cut(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

// A guardedConn is one connection of a guard.
type guardedConn struct {
	net.Conn
	g      *guard
	origin netip.Prefix

	known  bool // guarded by g.mu
	closed bool // guarded by g.mu
}

func (c *guardedConn) Close() error {
	c.g.mu.Lock()
	first := !c.closed
	c.closed = true
	c.g.mu.Unlock()
	if first {
		c.g.release(c)
	}
	return c.Conn.Close()
}

// SyscallConn implements syscall.Conn.
func (c *guardedConn) SyscallConn() (syscall.RawConn, error) {
	if sc, ok := c.Conn.(syscall.Conn); ok {
		return sc.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}

type connKey struct{}

// withConn remembers the connection of the requests.
func withConn(ctx context.Context, c net.Conn) context.Context {
	if g, ok := c.(*guardedConn); ok {
		return context.WithValue(ctx, connKey{}, g)
	}
	return ctx
}

func (g *guard) knownRequest(r *nethttp.Request) {
	if c, ok := r.Context().Value(connKey{}).(*guardedConn); ok {
		g.known(c)
	}
}

// cutRequest closes the connection of a request.
func cutRequest(r *nethttp.Request) {
	if c, ok := r.Context().Value(connKey{}).(*guardedConn); ok {
		_ = c.Close()
	}
}
