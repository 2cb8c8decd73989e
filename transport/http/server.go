package http

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
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
	opt     ServerOptions
	ctx     context.Context // ends at Close or Shutdown: the life of all sessions
	cancel  context.CancelFunc

	mu      sync.Mutex // guards what follows
	closed  bool
	n       int                     // sessions, also those in hello
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
	opt.PollWait = orDefault(opt.PollWait, 20*time.Second)
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{handler: h, opt: opt, idle: make(chan struct{}),
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

// acquire takes one of MaxSessions, or says why not. release gives it back.
func (s *Server) acquire() *transport.Bye {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return transport.RetryIn(transport.CodeShutdown, time.Second, "the hub stops")
	case s.n >= s.opt.MaxSessions:
		return transport.RetryIn(transport.CodeBusy, 30*time.Second, "too many sessions")
	}
	s.n++
	return nil
}

func (s *Server) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n--; s.n == 0 && s.closed {
		close(s.idle)
	}
}

// ServeHTTP answers the paths of docs/protocol.md, "HTTP".
func (s *Server) ServeHTTP(w nethttp.ResponseWriter, r *nethttp.Request) {
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
		if p == nil {
			nethttp.Error(w, "no such session", nethttp.StatusNotFound)
			return
		}
		serve(p, w, r)
	}
}

func peerOf(r *nethttp.Request, carrier string) transport.Peer {
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	return transport.Peer{Carrier: carrier, Addr: r.RemoteAddr, TLS: r.TLS, Token: token}
}

// hello reads the first frame of r and answers it on w.
func (s *Server) hello(w nethttp.ResponseWriter, r *nethttp.Request, carrier string) (*transport.Hello, *transport.Welcome, transport.Limits, bool) {
	// A server that s is mounted in may have time-outs meant for short requests.
	rc := nethttp.NewResponseController(w)
	deadline := time.Now().Add(s.opt.HelloTimeout)
	_ = rc.SetReadDeadline(deadline) // a writer without deadlines has none to take away
	_ = rc.SetWriteDeadline(deadline)

	bye := s.acquire()
	ok := bye == nil
	var first transport.Message
	var welcome *transport.Welcome
	var limits transport.Limits
	if ok {
		defer func() {
			if !ok {
				s.release()
			}
		}()
		var err error
		first, _, err = transport.ReadFrame(r.Body, transport.MaxHelloFrame)
		ctx, cancel := context.WithDeadline(s.ctx, deadline)
		defer cancel()
		welcome, limits, bye = s.opt.Answer(ctx, s.handler, peerOf(r, carrier), first, err)
	}
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Cache-Control", "no-store")
	var answer transport.Message = welcome
	if bye != nil {
		answer, ok = bye, false
	} else if welcome.MovedURL != "" {
		ok = false
	}
	b, err := transport.AppendFrame(nil, answer, transport.MaxHelloFrame)
	if err != nil {
		s.opt.Log.Error("welcome does not fit", "peer", r.RemoteAddr, "err", err)
		b, _ = transport.AppendFrame(nil, &transport.Bye{Code: transport.CodeInternal, Text: "welcome does not fit"}, transport.MaxHelloFrame)
		ok = false
	}
	if carrier == CarrierPoll {
		if ok {
			id := s.startPoll(r, first.(*transport.Hello), welcome, limits)
			w.Header().Set(headerSession, id)
		}
	}
	if _, err := w.Write(b); err == nil {
		err = rc.Flush()
		if err != nil && carrier == CarrierStream {
			ok = false
		}
	} else if carrier == CarrierStream {
		ok = false
	}
	if !ok {
		return nil, nil, limits, false
	}
	_ = rc.SetReadDeadline(time.Time{})
	_ = rc.SetWriteDeadline(time.Time{})
	return first.(*transport.Hello), welcome, limits, true
}

func (s *Server) serveStream(w nethttp.ResponseWriter, r *nethttp.Request) {
	if r.ProtoMajor < 2 {
		w.Header().Set("Connection", "close")
		nethttp.Error(w, "a stream needs HTTP/2; without it use "+pathOpen, nethttp.StatusHTTPVersionNotSupported)
		return
	}
	hello, welcome, limits, ok := s.hello(w, r, CarrierStream)
	if !ok {
		return
	}
	defer s.release()
	pipe := &serverPipe{w: w, body: r.Body, rc: nethttp.NewResponseController(w)}
	s.run(transport.NewSession(pipe, s.opt.Config, limits), hello, welcome, r.RemoteAddr)
}

func (s *Server) run(c transport.Conn, hello *transport.Hello, welcome *transport.Welcome, addr string) {
	if err := transport.Run(s.ctx, s.handler, c, hello, welcome); err != nil {
		s.opt.Log.Warn("session failed", "peer", hello.Node, "addr", addr, "err", err)
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
func (s *Server) startPoll(r *nethttp.Request, hello *transport.Hello, welcome *transport.Welcome, limits transport.Limits) string {
	var random [16]byte
	_, _ = rand.Read(random[:]) // never fails
	id := hex.EncodeToString(random[:])
	p := newPollPipe(s.opt)
	s.mu.Lock()
	s.polls[id] = p
	s.mu.Unlock()
	addr := r.RemoteAddr
	go func() { // Close waits for release
		defer s.release()
		s.run(transport.NewSession(p, s.opt.Config, limits), hello, welcome, addr)
		s.mu.Lock()
		delete(s.polls, id)
		s.mu.Unlock()
	}()
	return id
}

func (s *Server) serveOpen(w nethttp.ResponseWriter, r *nethttp.Request) {
	s.hello(w, r, CarrierPoll)
}
