// Package http carries the link over HTTP: as two frame streams inside one HTTP/2
// request (cleartext with prior knowledge, or TLS), and where HTTP/2 does not get
// through, as short requests and a long poll with the same frames. The paths are
// specified in docs/protocol.md.
package http

import (
	"net"
	nethttp "net/http"
	"sync"
	"syscall"
	"time"

	"github.com/litefs-agent/litefs-agent/transport"
)

// Names on the wire.
const (
	pathSession = "/v1/session"
	pathOpen    = "/v1/session/open"
	// pathIdentity says whom credentials name.
	pathIdentity = "/v1/identity"

	contentType   = "application/x-litefs-frames"
	headerSession = "Litefs-Session"
	headerOffset  = "Litefs-Offset"
)

// Values of Peer.Carrier.
const (
	CarrierStream = "http/2"
	CarrierPoll   = "http polling"
)

const (
	// unsentBytes is how much the kernel may hold that it has not sent: a live
	// record waits behind it.
	unsentBytes = 64 << 10
	// pollChunk is the most a push request carries.
	pollChunk = 64 << 10
	// maxPushBody is the most that the hub takes in one push request.
	maxPushBody = 4 << 20
	// maxHeaderBytes bounds the header of requests and responses.
	maxHeaderBytes = 16 << 10
)

// identityJSON is the answer of pathIdentity.
type identityJSON struct {
	Site  string `json:"site,omitempty"`
	Hub   string `json:"hub,omitempty"`
	Node  string `json:"node,omitempty"`
	Error string `json:"error,omitempty"`
}

// http2Config bounds what HTTP/2 holds for a connection.
func http2Config(c transport.Config) *nethttp.HTTP2Config {
	return &nethttp.HTTP2Config{
		MaxConcurrentStreams:          16,
		MaxReadFrameSize:              64 << 10,
		MaxReceiveBufferPerStream:     max(c.RecvQueue, 64<<10),
		MaxReceiveBufferPerConnection: max(2*c.RecvQueue, 128<<10),
		SendPingTimeout:               c.DeadAfter,
		PingTimeout:                   c.DeadAfter,
		WriteByteTimeout:              c.DeadAfter,
	}
}

// limitUnsent sets TCP_NOTSENT_LOWAT, so that what waits for a slow link waits in
// the session's queue, where live records pass large streams.
func limitUnsent(c syscall.RawConn) {
	const tcpNotSentLowat = 25 // linux/tcp.h
	_ = c.Control(func(fd uintptr) {
		_ = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpNotSentLowat, unsentBytes) // only latency depends on it
	})
}

// A cutter holds the network connections of one session, to close them at once.
type cutter struct {
	mu    sync.Mutex // guards what follows
	conns []net.Conn
	cut   bool
}

func (c *cutter) add(conn net.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cut {
		conn.Close()
		return
	}
	c.conns = append(c.conns, conn)
}

// connected reports whether any connection was ever made.
func (c *cutter) connected() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.conns) > 0
}

func (c *cutter) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut = true
	for _, conn := range c.conns {
		conn.Close()
	}
}

func orDefault(d, def time.Duration) time.Duration {
	if d == 0 {
		return def
	}
	return d
}
