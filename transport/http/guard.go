package http

import (
	"container/list"
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
	strangers list.List // of *guardedConn, oldest first
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

// admit reports whether one more connection may be held, and counts it. Where
// strangers are in its way the oldest of them goes, and is returned to be cut: a
// node that shares its address with a flood still gets through.
func (g *guard) admit(c *guardedConn) (victim *guardedConn, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	o := g.originLocked(c.origin)
	full := false // without a victim there is no room
	switch {
	case o.strangers >= strangersPerOrigin:
		victim = g.oldestLocked(c.origin)
	case o.conns >= connsPerOrigin && !c.origin.Addr().IsLoopback():
		victim, full = g.oldestLocked(c.origin), true
	case g.conns >= g.maxConns, g.strangers.Len() >= strangersInAll:
		full = true
		if oldest := g.strangers.Front(); oldest != nil {
			victim = oldest.Value.(*guardedConn)
		}
	}
	if full && victim == nil {
		return nil, false
	}
	if victim != nil {
		victim.closed = true
		g.releaseLocked(victim)
		o = g.originLocked(c.origin) // it may have gone with its last connection
	}
	g.conns++
	o.conns++
	o.strangers++
	c.stranger = g.strangers.PushBack(c)
	return victim, true
}

// oldestLocked returns the oldest stranger of an origin, nil if it has none.
func (g *guard) oldestLocked(p netip.Prefix) *guardedConn {
	for e := g.strangers.Front(); e != nil; e = e.Next() {
		if c := e.Value.(*guardedConn); c.origin == p {
			return c
		}
	}
	return nil
}

func (g *guard) releaseLocked(c *guardedConn) {
	o := g.origins[c.origin]
	g.conns--
	o.conns--
	g.knownLocked(c)
	if o.conns == 0 && o.forgive(time.Now()) == 0 {
		delete(g.origins, c.origin)
	}
}

// known notes that good credentials were shown over a connection.
func (g *guard) known(c *guardedConn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.knownLocked(c)
}

func (g *guard) knownLocked(c *guardedConn) {
	if c.stranger != nil {
		g.strangers.Remove(c.stranger)
		c.stranger = nil
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
		c := &guardedConn{Conn: conn, g: l.g, origin: originOf(conn.RemoteAddr().String())}
		victim, ok := l.g.admit(c)
		if victim != nil {
			cut(victim.Conn)
		}
		if !ok {
			cut(conn)
			continue
		}
		return c, nil
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

	stranger *list.Element // guarded by g.mu; nil once good credentials were shown
	closed   bool          // guarded by g.mu
}

func (c *guardedConn) Close() error {
	c.g.mu.Lock()
	if !c.closed {
		c.closed = true
		c.g.releaseLocked(c)
	}
	c.g.mu.Unlock()
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
