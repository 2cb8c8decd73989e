// Package transport says what the link between a node and its hub does: the
// messages, the rules of a session, the errors, and the bookkeeping that every
// carrier shares. Packages below it carry the link (http, later mqtt); package
// conformance tests them all alike. The bytes are specified in docs/protocol.md.
//
// # A session
//
//	node                                   hub
//	 | -- Hello ---------------------------> |   Dialer.Dial, Handler.Accept
//	 | <------------------- Welcome (or Bye) |
//	 | == Push, Data, Ack, ... both ways == |   Conn, Handler.Serve
//	 | -- Bye -----------------------------> |   either side, once; nothing follows it
//
// Delivery means one thing: an [Ack] of the hub that names history, epoch and
// position. That Send returned nil, or that an HTTP request was answered with
// 200, means nothing. Pushing a record again is harmless, so after any error the
// caller dials again, reads the hub's positions in the Welcome, and goes on from
// there.
package transport

import (
	"context"
	"crypto/tls"
	"time"
)

// A Conn is one established session, seen from one end. All methods are safe for
// concurrent use.
//
// Each direction is ordered: messages arrive in the order in which Send accepted
// them, each once, without gaps, until the session ends; then everything not
// acknowledged is in doubt. Heartbeats ([Ping], [Pong]) are sent and answered by
// the Conn itself and never reach Recv; a peer that is silent for longer than
// Config.DeadAfter ends the session with [ErrLost].
type Conn interface {
	// Send queues m and returns; it does not wait for the peer. The queue is
	// bounded in bytes: when it is full Send blocks until there is room, ctx ends,
	// or the session does. [Data] has less room than all else, so that a live
	// record or an ack waits for about one chunk of a large stream and no more.
	//
	// m and its payload belong to the caller again once Send returns. When ctx
	// ended (its error) m was not queued and the session is intact. A frame
	// larger than Limits().MaxFrame gives [ErrTooLarge] and changes nothing.
	// After a [Bye] nothing can be sent. Other errors are final: [ErrClosed],
	// [ErrEnded], [ErrLost], [ErrCorrupt], [ErrUnknown].
	Send(ctx context.Context, m Message) error

	// Recv returns the next message, which belongs to the caller with its payload.
	// It blocks until there is one, ctx ends (its error; nothing is lost), or the
	// session does. What arrived before the end is delivered before the error:
	// [ErrEnded] as a [*ByeError] when the peer said goodbye, [ErrLost] when the
	// link broke or went silent, [ErrCorrupt] or [ErrUnknown] when the peer sent
	// what cannot be understood. After Close it returns [ErrClosed] at once.
	//
	// A caller that stops receiving stops the peer, in bounded memory at both ends.
	Recv(ctx context.Context) (Message, error)

	// Limits returns what was agreed in hello, constant for the session.
	Limits() Limits

	// Stats returns counters and the time since the peer was last heard.
	Stats() Stats

	// Close sends what is queued and a [Bye] (unless one was sent), for at most
	// Config.CloseGrace, then cuts the link and waits for the goroutines of the
	// session. Send and Recv in progress return [ErrClosed]. It is idempotent.
	Close() error
}

// A Dialer opens sessions to one hub. It makes one attempt; the caller owns the
// backoff.
type Dialer interface {
	// Dial connects and exchanges hello for welcome. hello is not kept. The
	// caller follows Welcome.MovedURL itself: when it is set the Conn is nil, and
	// no session was opened.
	//
	// Errors: a [*ByeError] when the hub answered with a refusal ([ErrRefused]: trying
	// again cannot help; [ErrBusy]: it can, after RetryAfter; [ErrVersion]: no
	// common version or a feature is missing); anything else may be tried again.
	Dial(ctx context.Context, hello *Hello) (Conn, *Welcome, error)
}

// A Handler is the hub's side of the link, given to a carrier's server.
type Handler interface {
	// Accept answers a hello. The carrier has already refused hellos without a
	// common version; Accept sets the rest, and leaves Version, Features and
	// Limits zero for the carrier to fill in with what both sides support. An
	// error refuses the session: a [*ByeError] is sent as it is, any other error is
	// sent as CodeInternal, without its text.
	Accept(ctx context.Context, peer Peer, hello *Hello) (*Welcome, error)

	// Serve runs an accepted session until it ends. ctx ends with the session. The
	// carrier closes c when Serve returns; an error that is a [*ByeError] goes to the
	// peer as its Bye. Serve must return soon after c failed.
	Serve(ctx context.Context, c Conn, hello *Hello, welcome *Welcome) error
}

// A Peer is what the carrier knows of the other end, beside its hello.
type Peer struct {
	Carrier string               // "http/2", "http/1.1 polling", ...
	Addr    string               // network address, for the log
	TLS     *tls.ConnectionState // nil without TLS
	Token   string               // bearer token, "" if none; not checked by the carrier
}

// Config is what both ends of every carrier can be tuned by. The zero value of a
// field means its default.
type Config struct {
	// MaxFrame is the largest frame accepted, length field included, in bytes;
	// 64 KiB by default, at least [MinMaxFrame]. The smaller of both ends' counts.
	MaxFrame uint32
	// SendQueue bounds the bytes that Send queues, RecvQueue those received and
	// not yet taken by Recv; 256 KiB each by default. One frame always fits.
	SendQueue, RecvQueue int
	// Window is how many bytes of pushes may be unacknowledged, for the peer to
	// observe; 4 MiB by default.
	Window uint64
	// MaxStreams is how many streams the peer may have open; 16 by default.
	MaxStreams uint32
	// DeadAfter is how long the peer may be silent before the session ends with
	// [ErrLost]; 30 s by default. The peer is asked for a sign of life three times
	// as often.
	DeadAfter time.Duration
	// HelloTimeout bounds the exchange of hello and welcome; 10 s by default.
	HelloTimeout time.Duration
	// CloseGrace is how long Close waits for queued messages to leave; 1 s by
	// default.
	CloseGrace time.Duration
}

// WithDefaults returns c with its zero fields filled in.
func (c Config) WithDefaults() Config {
	def := func(p *uint32, v uint32) {
		if *p == 0 {
			*p = v
		}
	}
	def(&c.MaxFrame, DefaultMaxFrame)
	c.MaxFrame = max(c.MaxFrame, MinMaxFrame)
	def(&c.MaxStreams, 16)
	if c.SendQueue == 0 {
		c.SendQueue = 256 << 10
	}
	if c.RecvQueue == 0 {
		c.RecvQueue = 256 << 10
	}
	if c.Window == 0 {
		c.Window = 4 << 20
	}
	if c.DeadAfter == 0 {
		c.DeadAfter = 30 * time.Second
	}
	if c.HelloTimeout == 0 {
		c.HelloTimeout = 10 * time.Second
	}
	if c.CloseGrace == 0 {
		c.CloseGrace = time.Second
	}
	return c
}

// Limits returns what this end announces in its hello or welcome.
func (c Config) Limits() Limits {
	c = c.WithDefaults()
	return Limits{
		MaxFrame:   c.MaxFrame,
		Window:     c.Window,
		MaxStreams: c.MaxStreams,
		Heartbeat:  max(c.DeadAfter/3, time.Millisecond),
	}
}

// Stats are counters of one session.
type Stats struct {
	LastHeard            time.Duration // since any byte of the peer arrived
	RTT                  time.Duration // of the last heartbeat answered; 0 before the first
	SentBytes, RecvBytes int64         // frames, with their headers
	SentN, RecvN         int64         // messages, without heartbeats
}
