package http_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	nethttp "net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/ltx"
	"github.com/litefs-agent/litefs-agent/transport"
	httptransport "github.com/litefs-agent/litefs-agent/transport/http"
)

// echo is a hub that acks each push with its TXID, and keeps the order of what came.
type echo struct {
	peer atomic.Pointer[transport.Peer]
	got  atomic.Int64
}

func (h *echo) Accept(_ context.Context, p transport.Peer, _ *transport.Hello) (*transport.Welcome, error) {
	h.peer.Store(&p)
	return &transport.Welcome{Hub: "hub"}, nil
}

func (h *echo) Serve(ctx context.Context, c transport.Conn, _ *transport.Hello, _ *transport.Welcome) error {
	for {
		m, err := c.Recv(ctx)
		if err != nil {
			return nil
		}
		h.got.Add(1)
		p := m.(*transport.Push)
		if err := c.Send(ctx, &transport.Ack{Name: p.Name, Pos: p.Pos(), Level: transport.AckDurable}); err != nil {
			return nil
		}
	}
}

// exchange pushes n records and wants their acks in order.
func exchange(t *testing.T, c transport.Conn, n ltx.TXID) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	sent := make(chan error, 1)
	go func() {
		for i := ltx.TXID(1); i <= n; i++ {
			p := &transport.Push{Stream: uint64(i), Name: "a", MinTXID: i, MaxTXID: i, Size: 700, Payload: make([]byte, 700), Last: true}
			if err := c.Send(ctx, p); err != nil {
				sent <- fmt.Errorf("send %d: %w", i, err)
				return
			}
		}
		sent <- nil
	}()
	for i := ltx.TXID(1); i <= n; i++ {
		m, err := c.Recv(ctx)
		if err != nil {
			t.Fatalf("ack %d: %v", i, err)
		}
		if a := m.(*transport.Ack); a.Pos.TXID != i {
			t.Fatalf("got ack %d, want %d", a.Pos.TXID, i)
		}
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
}

func dialer(t *testing.T, url string, opt httptransport.DialOptions) *httptransport.Dialer {
	t.Helper()
	d, err := httptransport.NewDialer(url, opt)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func mustDial(t *testing.T, d transport.Dialer) transport.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, _, err := d.Dial(ctx, &transport.Hello{Node: "n"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func trusting(pool *x509.CertPool, token string) func() (httptransport.Credentials, error) {
	return func() (httptransport.Credentials, error) {
		return httptransport.Credentials{TLS: &tls.Config{RootCAs: pool}, Token: token}, nil
	}
}

// TestFallback: where HTTP/2 does not get through, ModeAuto polls, and next time
// does so at once.
func TestFallback(t *testing.T) {
	for _, test := range []struct {
		name string
		tls  bool
	}{{"http", false}, {"https", true}} {
		t.Run(test.name, func(t *testing.T) {
			h := &echo{}
			s := httptransport.NewServer(h, httptransport.ServerOptions{})
			defer s.Close()
			front := httptest.NewUnstartedServer(s) // HTTP/1.1 only
			opt := httptransport.DialOptions{}
			if test.tls {
				front.StartTLS()
				pool := x509.NewCertPool()
				pool.AddCert(front.Certificate())
				opt.Credentials = trusting(pool, "")
			} else {
				front.Start()
			}
			defer front.Close()
			d := dialer(t, front.URL, opt)
			for range 2 {
				c := mustDial(t, d)
				exchange(t, c, 300)
				if p := h.peer.Load(); p.Carrier != httptransport.CarrierPoll || (p.TLS != nil) != test.tls {
					t.Errorf("peer %+v, want polling", p)
				}
				c.Close()
			}
		})
	}
}

// TestHoldingProxy: a proxy that speaks HTTP/2 but passes a request on only when it
// has its whole body, and an answer only when it is complete.
func TestHoldingProxy(t *testing.T) {
	h := &echo{}
	s := httptransport.NewServer(h, httptransport.ServerOptions{})
	defer s.Close()
	front := httptest.NewUnstartedServer(nethttp.HandlerFunc(func(w nethttp.ResponseWriter, r *nethttp.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		rec := httptest.NewRecorder()
		s.ServeHTTP(rec, r)
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		w.WriteHeader(rec.Code)
		_, _ = w.Write(rec.Body.Bytes())
	}))
	front.Config.Protocols = new(nethttp.Protocols)
	front.Config.Protocols.SetHTTP1(true)
	front.Config.Protocols.SetUnencryptedHTTP2(true)
	front.Start()
	defer front.Close()
	c := mustDial(t, dialer(t, front.URL, httptransport.DialOptions{Config: transport.Config{HelloTimeout: 500 * time.Millisecond}}))
	exchange(t, c, 300)
	if p := h.peer.Load(); p.Carrier != httptransport.CarrierPoll {
		t.Errorf("peer %+v, want polling", p)
	}
	c.Close()
}

// TestTLS: HTTP/2 over TLS, beside another handler and below a path, with a token,
// in a server whose time-outs are meant for short requests.
func TestTLS(t *testing.T) {
	h := &echo{}
	s := httptransport.NewServer(h, httptransport.ServerOptions{})
	defer s.Close()
	mux := nethttp.NewServeMux()
	mux.Handle("/hub/", nethttp.StripPrefix("/hub", s))
	mux.HandleFunc("/metrics", func(w nethttp.ResponseWriter, _ *nethttp.Request) { io.WriteString(w, "metrics") })
	front := httptest.NewUnstartedServer(mux)
	front.EnableHTTP2 = true
	front.Config.ReadTimeout, front.Config.WriteTimeout = 200*time.Millisecond, 200*time.Millisecond
	front.StartTLS()
	defer front.Close()
	pool := x509.NewCertPool()
	pool.AddCert(front.Certificate())
	for _, mode := range []httptransport.Mode{httptransport.ModeAuto, httptransport.ModePoll} {
		c := mustDial(t, dialer(t, front.URL+"/hub", httptransport.DialOptions{
			Mode:        mode,
			Credentials: trusting(pool, "secret"),
		}))
		exchange(t, c, 10)
		time.Sleep(300 * time.Millisecond) // past the server's time-outs
		exchange(t, c, 300)
		want := httptransport.CarrierStream
		if mode == httptransport.ModePoll {
			want = httptransport.CarrierPoll
		}
		if p := h.peer.Load(); p.Carrier != want || p.Token != "secret" || p.TLS == nil {
			t.Errorf("peer %+v, want %s with the token", p, want)
		}
		c.Close()
	}

	if _, _, err := dialer(t, front.URL, httptransport.DialOptions{}).Dial(t.Context(), &transport.Hello{}); err == nil {
		t.Error("dial without the certificate succeeded")
	}
}

// TestLossyPolling: requests that fail before or after they took effect, and
// answers cut in the middle, neither lose nor repeat nor reorder anything.
func TestLossyPolling(t *testing.T) {
	h := &echo{}
	s := httptransport.NewServer(h, httptransport.ServerOptions{})
	defer s.Close()
	var lost atomic.Int64
	front := httptest.NewServer(nethttp.HandlerFunc(func(w nethttp.ResponseWriter, r *nethttp.Request) {
		luck := rand.IntN(10)
		if strings.HasSuffix(r.URL.Path, "/open") || r.Method == nethttp.MethodDelete {
			luck = 9
		}
		switch luck {
		case 0: // never arrives
			lost.Add(1)
			panic(nethttp.ErrAbortHandler)
		case 1: // arrives in part
			lost.Add(1)
			r.Body = struct {
				io.Reader
				io.Closer
			}{io.MultiReader(io.LimitReader(r.Body, 1000), broken{}), r.Body}
			s.ServeHTTP(httptest.NewRecorder(), r)
			panic(nethttp.ErrAbortHandler)
		case 2: // takes effect, but the answer is lost in the middle
			lost.Add(1)
			rec := httptest.NewRecorder()
			s.ServeHTTP(rec, r)
			for k, v := range rec.Header() {
				w.Header()[k] = v
			}
			w.WriteHeader(rec.Code)
			_, _ = w.Write(rec.Body.Bytes()[:rec.Body.Len()/2])
			panic(nethttp.ErrAbortHandler)
		case 3: // a proxy's answer
			lost.Add(1)
			nethttp.Error(w, "bad gateway", nethttp.StatusBadGateway)
		default:
			s.ServeHTTP(w, r)
		}
	}))
	front.Config.ErrorLog = nil
	defer front.Close()
	c := mustDial(t, dialer(t, front.URL, httptransport.DialOptions{Mode: httptransport.ModePoll}))
	for lost.Load() < 40 {
		exchange(t, c, 500)
	}
	c.Close()
	t.Logf("%d requests lost, %d records", lost.Load(), h.got.Load())
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// TestMaxSessions: one too many is told to come back, and room made is used.
func TestMaxSessions(t *testing.T) {
	for _, mode := range []httptransport.Mode{httptransport.ModeStream, httptransport.ModePoll} {
		s := httptransport.NewServer(&echo{}, httptransport.ServerOptions{MaxSessions: 1})
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- s.Serve(ln) }()
		d := dialer(t, "http://"+ln.Addr().String(), httptransport.DialOptions{Mode: mode})
		c := mustDial(t, d)
		_, _, err = d.Dial(t.Context(), &transport.Hello{})
		bye, ok := errors.AsType[*transport.ByeError](err)
		if !ok || bye.Code != transport.CodeBusy || bye.RetryAfter == 0 {
			t.Errorf("got %v, want busy", err)
		}
		c.Close()
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			if c, _, err := d.Dial(t.Context(), &transport.Hello{}); err == nil {
				c.Close()
				break
			} else if time.Now().After(deadline) {
				t.Fatalf("no room after a session ended: %v", err)
			}
		}
		s.Close()
		if err := <-served; !errors.Is(err, transport.ErrClosed) {
			t.Errorf("serve: got %v, want closed", err)
		}
	}
}

// TestRequests: what is no session is answered in words.
func TestRequests(t *testing.T) {
	s := httptransport.NewServer(&echo{}, httptransport.ServerOptions{Config: transport.Config{HelloTimeout: time.Second}})
	defer s.Close()
	front := httptest.NewServer(s)
	defer front.Close()
	for _, test := range []struct {
		method, path, body string
		want               int
	}{
		{"GET", "/v1/session", "", 405},
		{"POST", "/v1/session", "", 505},
		{"POST", "/v1/sessions", "", 404},
		{"POST", "/v1/session/abc/push?offset=0", "", 404},
		{"GET", "/v1/session/abc/pull?offset=0", "", 404},
		{"DELETE", "/v1/session/abc", "", 404},
		{"POST", "/v1/session/abc/else", "", 404},
		{"POST", "/v1/session/open", "GET / HTTP/1.1", 200}, // with a bye
	} {
		r, err := nethttp.NewRequest(test.method, front.URL+test.path, strings.NewReader(test.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := nethttp.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != test.want || len(body) == 0 {
			t.Errorf("%s %s: got %d %q, want %d", test.method, test.path, resp.StatusCode, body, test.want)
		}
		if test.want == 200 {
			m, _, err := transport.ReadFrame(bytes.NewReader(body), transport.MaxHelloFrame)
			if bye, ok := m.(*transport.Bye); err != nil || !ok || bye.Code != transport.CodeTooLarge {
				t.Errorf("got %+v, %v, want a bye", m, err)
			}
		}
	}
}

func TestNewDialer(t *testing.T) {
	for url, ok := range map[string]bool{
		"http://h": true, "https://h:1/path/": true, "ftp://h": false, "http://": false, "h:1": false, "http://h/?q": false, "http://h/#f": false,
	} {
		if _, err := httptransport.NewDialer(url, httptransport.DialOptions{}); (err == nil) != ok {
			t.Errorf("%s: %v", url, err)
		}
	}
}
