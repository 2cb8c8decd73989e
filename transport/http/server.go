package http

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	nethttp "net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/litefs-agent/litefs-agent/transport"
)

// ServerOptions tune a Server. The zero value of a field means its default.
type ServerOptions struct {
	transport.Config
	// MaxSessions bounds the sessions open or being opened; 4096 by default. More
	// are answered with CodeBusy.
	MaxSessions int
	// MaxSessionsOfOne bounds those of one peer that a [transport.Gate] knows, while
	// an older one ends for instance; 8 by default.
	MaxSessionsOfOne int
	// MaxConns bounds the connections of Serve; twice MaxSessions and 1024 by
	// default. More are closed at once.
	MaxConns int
	// PollWait is how long a long poll is held without anything to say; 20 s by
	// default.
	PollWait time.Duration
	// TLS is for Serve; nil is cleartext.
	TLS *tls.Config
	// Log gets session ends that a handler reports; nil discards.
	Log *slog.Logger
}

// A Server is the hub's end. It is an HTTP handler for /v1/session and everything
// below, to be mounted beside others; or it serves a listener by itself.
type Server struct {
	handler transport.Handler
	gate    transport.Gate // nil: the handler is none
	opt     ServerOptions
	guard   *guard
	ctx     context.Context // ends at Close or Shutdown: the life of all sessions
	cancel  context.CancelFunc

	mu      sync.Mutex // guards what follows
	closed  bool
	n       int                     // sessions, also those in hello
	of      map[string]int          // those of each peer that is known
	idle    chan struct{}           // closed when n fell to 0 after closed
	polls   map[string]*pollPipe    // by session id
	servers map[*nethttp.Server]any // of Serve
}

// NewServer returns a server that gives its sessions to h.
func NewServer(h transport.Handler, opt ServerOptions) *Server {
	opt.Config = opt.Config.WithDefaults()
	if opt.MaxSessions == 0 {
		opt.MaxSessions = 4096
	}
	if opt.MaxSessionsOfOne == 0 {
		opt.MaxSessionsOfOne = 8
	}
	if opt.MaxConns == 0 {
		opt.MaxConns = 2*opt.MaxSessions + 1024
	}
	opt.PollWait = orDefault(opt.PollWait, 20*time.Second)
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	gate, _ := h.(transport.Gate)
	s := &Server{handler: h, gate: gate, opt: opt, guard: newGuard(opt.MaxConns), idle: make(chan struct{}), of: make(map[string]int),
		polls: make(map[string]*pollPipe), servers: make(map[*nethttp.Server]any)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// HTTPServer returns a net/http server for h (usually a mux that includes s) with
// the protocols, limits and time-outs that sessions need.
func (s *Server) HTTPServer(h nethttp.Handler) *nethttp.Server {
	p := new(nethttp.Protocols)
	p.SetHTTP1(true)
	p.SetHTTP2(true)
	p.SetUnencryptedHTTP2(true)
	return &nethttp.Server{
		Handler:           h,
		Protocols:         p,
		HTTP2:             http2Config(s.opt.Config),
		TLSConfig:         s.opt.TLS.Clone(),
		ReadHeaderTimeout: s.opt.HelloTimeout,
		IdleTimeout:       2 * s.opt.PollWait,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(s.opt.Log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if t, ok := c.(*tls.Conn); ok {
				c = t.NetConn()
			}
			ctx = withConn(ctx, c)
			if sc, ok := c.(syscall.Conn); ok {
				if rc, err := sc.SyscallConn(); err == nil {
					limitUnsent(rc)
				}
			}
			return ctx
		},
	}
}

// Serve answers on ln, which it closes, until Close or Shutdown (ErrClosed) or
// until ln fails.
func (s *Server) Serve(ln net.Listener) error {
	hs := s.HTTPServer(s)
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		ln.Close()
		return transport.ErrClosed
	}
	s.servers[hs] = nil
	s.mu.Unlock()
	ln = guardedListener{ln, s.guard}
	var err error
	if s.opt.TLS != nil {
		err = hs.ServeTLS(ln, "", "")
	} else {
		err = hs.Serve(ln)
	}
	if errors.Is(err, nethttp.ErrServerClosed) {
		return transport.ErrClosed
	}
	return err
}

// Close ends all sessions, telling the peers to come back, waits until their
// handlers have returned, and closes what Serve opened. It is idempotent.
func (s *Server) Close() error {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		if s.n == 0 {
			close(s.idle)
		}
	}
	s.mu.Unlock()
	s.cancel()
	<-s.idle
	s.mu.Lock()
	servers := s.servers
	s.servers = nil
	s.mu.Unlock()
	for hs := range servers {
		hs.Close()
	}
	return nil
}

// acquire takes one of MaxSessions, and of those of the peer who, or says why
// not. release gives it back. who is "" where nobody asks.
func (s *Server) acquire(who string) *transport.Bye {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return transport.RetryIn(transport.CodeShutdown, time.Second, "the hub stops")
	case s.n >= s.opt.MaxSessions:
		return transport.RetryIn(transport.CodeBusy, 30*time.Second, "too many sessions")
	case who != "" && s.of[who] >= s.opt.MaxSessionsOfOne:
		return transport.RetryIn(transport.CodeBusy, 30*time.Second, "too many sessions of this node")
	}
	s.n++
	if who != "" {
		s.of[who]++
	}
	return nil
}

func (s *Server) release(who string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if who != "" {
		if s.of[who]--; s.of[who] == 0 {
			delete(s.of, who)
		}
	}
	if s.n--; s.n == 0 && s.closed {
		close(s.idle)
	}
}

// admit asks the gate about the peer of a request. It returns whom the
// credentials name, or the Bye to send. A peer that fails too often gets no
// answer: admit does not return.
func (s *Server) admit(r *nethttp.Request, peer transport.Peer) (*transport.Identity, *transport.Bye) {
	id := new(transport.Identity)
	if s.gate != nil {
		ctx, cancel := context.WithTimeout(r.Context(), s.opt.HelloTimeout)
		defer cancel()
		var err error
		if id, err = s.gate.Admit(ctx, peer); err != nil {
			bye := transport.ByeFor(err)
			if bye.Code == transport.CodeAuth && !s.guard.failed(r.RemoteAddr) {
				cutRequest(r)
				panic(nethttp.ErrAbortHandler)
			}
			return nil, bye
		}
	}
	s.guard.knownRequest(r)
	return id, nil
}

// serveIdentity tells somebody who shows credentials whom they name.
func (s *Server) serveIdentity(w nethttp.ResponseWriter, r *nethttp.Request) {
	if s.gate == nil {
		nethttp.NotFound(w, r)
		return
	}
	id, bye := s.admit(r, peerOf(r, "http"))
	var answer identityJSON
	status := nethttp.StatusOK
	switch {
	case bye == nil:
		answer.Site, answer.Hub, answer.Node = id.Site.String(), id.Hub, id.Node
	case bye.Code == transport.CodeAuth:
		status = nethttp.StatusUnauthorized
		answer.Error = bye.Text
	default:
		status = nethttp.StatusServiceUnavailable
		answer.Error = bye.Text
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(answer) // or the peer has gone
}

// ServeHTTP answers the paths of docs/protocol.md, "HTTP".
func (s *Server) ServeHTTP(w nethttp.ResponseWriter, r *nethttp.Request) {
	if r.URL.Path == pathIdentity && r.Method == nethttp.MethodGet {
		s.serveIdentity(w, r)
		return
	}
	rest, ok := strings.CutPrefix(r.URL.Path, pathSession)
	if !ok || rest != "" && rest[0] != '/' {
		nethttp.NotFound(w, r)
		return
	}
	method, serve := nethttp.MethodPost, s.serveStream
	id, action, _ := strings.Cut(strings.TrimPrefix(rest, "/"), "/")
	switch {
	case rest == "":
	case rest == "/open":
		serve = s.serveOpen
	case action == "push":
		serve = s.withPoll(id, (*pollPipe).servePush)
	case action == "pull":
		method, serve = nethttp.MethodGet, s.withPoll(id, (*pollPipe).servePull)
	case action == "":
		method, serve = nethttp.MethodDelete, s.withPoll(id, (*pollPipe).serveDelete)
	default:
		nethttp.NotFound(w, r)
		return
	}
	if r.Method != method {
		w.Header().Set("Allow", method)
		nethttp.Error(w, "want "+method, nethttp.StatusMethodNotAllowed)
		return
	}
	serve(w, r)
}

func (s *Server) withPoll(id string, serve func(*pollPipe, nethttp.ResponseWriter, *nethttp.Request)) nethttp.HandlerFunc {
	s.mu.Lock()
	p := s.polls[id]
	s.mu.Unlock()
	return func(w nethttp.ResponseWriter, r *nethttp.Request) {
		if p == nil || !samePeer(p.peer, peerOf(r, CarrierPoll)) {
			nethttp.Error(w, "no such session", nethttp.StatusNotFound)
			return
		}
		s.guard.knownRequest(r)
		serve(p, w, r)
	}
}

func peerOf(r *nethttp.Request, carrier string) transport.Peer {
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	return transport.Peer{Carrier: carrier, Addr: r.RemoteAddr, TLS: r.TLS, Token: token}
}

// samePeer reports whether two requests show the same credentials: the id of a
// session, which proxies may log, is not enough.
func samePeer(a, b transport.Peer) bool {
	return subtle.ConstantTimeCompare([]byte(a.Token), []byte(b.Token)) == 1 && bytes.Equal(leafOf(a), leafOf(b))
}

func leafOf(p transport.Peer) []byte {
	if p.TLS == nil || len(p.TLS.PeerCertificates) == 0 {
		return nil
	}
	return p.TLS.PeerCertificates[0].Raw
}

// An opening is a session whose hello was answered.
type opening struct {
	who     string // for release
	peer    transport.Peer
	hello   *transport.Hello
	welcome *transport.Welcome
	limits  transport.Limits
}

// hello reads the first frame of r and answers it on w. Without a session it
// returns nil.
func (s *Server) hello(w nethttp.ResponseWriter, r *nethttp.Request, carrier string) *opening {
	// A server that s is mounted in may have time-outs meant for short requests.
	rc := nethttp.NewResponseController(w)
	deadline := time.Now().Add(s.opt.HelloTimeout)
	_ = rc.SetReadDeadline(deadline) // a writer without deadlines has none to take away
	_ = rc.SetWriteDeadline(deadline)

	o := &opening{peer: peerOf(r, carrier)}
	id, bye := s.admit(r, o.peer)
	if bye == nil {
		o.who = id.Node
		bye = s.acquire(o.who)
	}
	if bye == nil {
		if bye = s.answer(r, o, deadline); bye != nil || o.welcome.MovedURL != "" {
			s.release(o.who)
		}
	}
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Cache-Control", "no-store")
	if bye != nil {
		b, _ := transport.AppendFrame(nil, bye, transport.MaxHelloFrame)
		_, _ = w.Write(b) // or the peer has gone
		return nil
	}
	b, err := transport.AppendFrame(nil, o.welcome, transport.MaxHelloFrame) // fits: answer has tried
	open := o.welcome.MovedURL == ""
	if open && carrier == CarrierPoll {
		w.Header().Set(headerSession, s.startPoll(o))
	}
	if err == nil {
		_, err = w.Write(b)
	}
	if err == nil {
		err = rc.Flush()
	}
	if !open {
		return nil
	}
	if err != nil && carrier == CarrierStream {
		s.release(o.who)
		return nil
	}
	_ = rc.SetReadDeadline(time.Time{})
	_ = rc.SetWriteDeadline(time.Time{})
	return o
}

// answer reads the hello and has it answered.
func (s *Server) answer(r *nethttp.Request, o *opening, deadline time.Time) (bye *transport.Bye) {
	first, _, err := transport.ReadFrame(r.Body, transport.MaxHelloFrame)
	ctx, cancel := context.WithDeadline(s.ctx, deadline)
	defer cancel()
	if o.welcome, o.limits, bye = s.opt.Answer(ctx, s.handler, o.peer, first, err); bye != nil {
		return bye
	}
	o.hello = first.(*transport.Hello)
	if _, err := transport.AppendFrame(nil, o.welcome, transport.MaxHelloFrame); err != nil {
		s.opt.Log.Error("welcome does not fit", "peer", o.hello.Node, "addr", r.RemoteAddr, "err", err)
		return &transport.Bye{Code: transport.CodeInternal, Text: "welcome does not fit"}
	}
	return nil
}

func (s *Server) serveStream(w nethttp.ResponseWriter, r *nethttp.Request) {
	if r.ProtoMajor < 2 {
		w.Header().Set("Connection", "close")
		nethttp.Error(w, "a stream needs HTTP/2; without it use "+pathOpen, nethttp.StatusHTTPVersionNotSupported)
		return
	}
	o := s.hello(w, r, CarrierStream)
	if o == nil {
		return
	}
	defer s.release(o.who)
	pipe := &serverPipe{w: w, body: r.Body, rc: nethttp.NewResponseController(w)}
	s.run(transport.NewSession(pipe, s.opt.Config, o.limits), o)
}

func (s *Server) run(c transport.Conn, o *opening) {
	if err := transport.Run(transport.WithPeer(s.ctx, o.peer), s.handler, c, o.hello, o.welcome); err != nil {
		s.opt.Log.Warn("session failed", "peer", o.hello.Node, "addr", o.peer.Addr, "err", err)
	}
}

// A serverPipe is the two bodies of one HTTP/2 request, at the server.
type serverPipe struct {
	w    nethttp.ResponseWriter
	body io.ReadCloser
	rc   *nethttp.ResponseController
}

func (p *serverPipe) Read(b []byte) (int, error) { return p.body.Read(b) }

func (p *serverPipe) Write(b []byte) (int, error) {
	n, err := p.w.Write(b)
	if err == nil {
		err = p.rc.Flush()
	}
	return n, err
}

// CloseWrite does nothing: the response ends when the handler returns.
func (p *serverPipe) CloseWrite() error { return nil }

func (p *serverPipe) Abort() {
	past := time.Unix(1, 0)
	_ = p.rc.SetReadDeadline(past) // HTTP/2 has both
	_ = p.rc.SetWriteDeadline(past)
	p.body.Close()
}

// startPoll runs a polling session, which outlives the request that opened it.
func (s *Server) startPoll(o *opening) string {
	var random [16]byte
	_, _ = rand.Read(random[:]) // never fails
	id := hex.EncodeToString(random[:])
	p := newPollPipe(s.opt, o.peer)
	s.mu.Lock()
	s.polls[id] = p
	s.mu.Unlock()
	go func() { // Close waits for release
		defer s.release(o.who)
		s.run(transport.NewSession(p, s.opt.Config, o.limits), o)
		s.mu.Lock()
		delete(s.polls, id)
		s.mu.Unlock()
	}()
	return id
}

func (s *Server) serveOpen(w nethttp.ResponseWriter, r *nethttp.Request) {
	s.hello(w, r, CarrierPoll)
}
