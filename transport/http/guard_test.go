package http_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	nethttp "net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
	"github.com/litefs-agent/litefs-agent/transport"
	httptransport "github.com/litefs-agent/litefs-agent/transport/http"
)

// gatekeeper is an echo that knows nodes by tokens, which are their names.
type gatekeeper struct{ echo }

func (g *gatekeeper) Admit(_ context.Context, p transport.Peer) (*transport.Identity, error) {
	if !strings.HasPrefix(p.Token, "good") {
		return nil, transport.Refuse(transport.CodeAuth, "no such token")
	}
	return &transport.Identity{Site: transport.Site{7}, Hub: "hub", Node: p.Token}, nil
}

// A guarded is a server that wants tokens, on loopback.
type guarded struct {
	*testing.T
	addr string
}

func newGuarded(t *testing.T, opt httptransport.ServerOptions) *guarded {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := httptransport.NewServer(&gatekeeper{}, opt)
	done := make(chan error, 1)
	go func() { done <- s.Serve(ln) }()
	t.Cleanup(func() {
		s.Close()
		<-done
	})
	return &guarded{t, ln.Addr().String()}
}

func (g *guarded) dialer(token string, mode httptransport.Mode) *httptransport.Dialer {
	g.Helper()
	return dialer(g.T, "http://"+g.addr, httptransport.DialOptions{Mode: mode, Credentials: func() (httptransport.Credentials, error) {
		return httptransport.Credentials{Token: token}, nil
	}})
}

// raw opens a connection and sends text.
func (g *guarded) raw(text string) net.Conn {
	g.Helper()
	conn, err := net.Dial("tcp", g.addr)
	if err != nil { // turned away before this end was ready
		conn, _ = net.Pipe()
		conn.Close()
	}
	g.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = io.WriteString(conn, text) // a server that has closed already is what tests want
	return conn
}

// status reads the status code of an answer, 0 for none.
func status(conn net.Conn) int {
	resp, err := nethttp.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	return resp.StatusCode
}

func isTimeout(err error) bool {
	e, ok := errors.AsType[net.Error](err)
	return ok && e.Timeout()
}

// Connections over which nobody has shown credentials are bounded; those of nodes
// do not count, and nodes that are connected do not notice.
func TestStrangersAreBounded(t *testing.T) {
	g := newGuarded(t, httptransport.ServerOptions{})
	stream, poll := mustDial(t, g.dialer("good-1", httptransport.ModeStream)), mustDial(t, g.dialer("good-2", httptransport.ModePoll))
	var conns []net.Conn
	for range 400 {
		conns = append(conns, g.raw(""))
	}
	var open atomic.Int64
	var wg sync.WaitGroup
	for _, conn := range conns {
		wg.Go(func() {
			_ = conn.SetReadDeadline(time.Now().Add(time.Second))
			if _, err := conn.Read(make([]byte, 1)); isTimeout(err) {
				open.Add(1)
			}
		})
	}
	wg.Wait()
	if n := open.Load(); n < 200 || n > 256 {
		t.Errorf("%d of %d idle connections are held, want 256", n, len(conns))
	}
	began := time.Now()
	exchange(t, stream, 50)
	exchange(t, poll, 50) // over a new connection
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("nodes waited %s: until strangers were timed out", took)
	}
	for _, conn := range conns {
		conn.Close()
	}
	deadline := time.Now().Add(10 * time.Second)
	for { // their places are free again
		c, _, err := g.dialer("good-3", httptransport.ModeStream).Dial(t.Context(), &transport.Hello{Node: "n"})
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no place for a node after the flood: %v", err)
		}
		time.Sleep(10 * time.Millisecond) // polls a condition of the server
	}
}

// Connections in all are bounded too.
func TestConnectionsAreBounded(t *testing.T) {
	g := newGuarded(t, httptransport.ServerOptions{MaxConns: 10})
	held := 0
	for range 30 {
		conn := g.raw("GET /v1/identity HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer good\r\n\r\n")
		if status(conn) == nethttp.StatusOK {
			held++
		}
	}
	if held != 10 {
		t.Errorf("%d connections are held, want 10", held)
	}
}

// Who sends a request slowly, or none, or one that is too large, is cut off.
func TestSlowAndLargeRequests(t *testing.T) {
	g := newGuarded(t, httptransport.ServerOptions{Config: transport.Config{HelloTimeout: 300 * time.Millisecond}, PollWait: 200 * time.Millisecond})
	const auth = "Host: h\r\nAuthorization: Bearer good\r\n"
	for name, tt := range map[string]struct {
		text string
		want int // status code; 0: none
	}{
		"nothing":           {"", 0},
		"half a header":     {"POST /v1/session/open HTTP/1.1\r\nHost: h\r\n", 0},
		"no HTTP/2 frames":  {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 0},
		"no hello":          {"POST /v1/session/open HTTP/1.1\r\n" + auth + "Content-Length: 100\r\n\r\n", 0},
		"half a hello":      {"POST /v1/session/open HTTP/1.1\r\n" + auth + "Content-Length: 100\r\n\r\n\x00\x00\x00\x50\x01", 0},
		"a huge hello":      {"POST /v1/session/open HTTP/1.1\r\n" + auth + "Content-Length: 9000000000\r\n\r\n\xff\xff\xff\xff\x01", 200},
		"huge headers":      {"GET /v1/identity HTTP/1.1\r\nX: " + strings.Repeat("x", 64<<10) + "\r\n" + auth + "\r\n", 431},
		"a huge token":      {"GET /v1/identity HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer " + strings.Repeat("x", 8<<10) + "\r\n\r\n", 401},
		"no such path":      {"GET /etc/passwd HTTP/1.1\r\n" + auth + "\r\n", 404},
		"no such session":   {"GET /v1/session/0123/pull?offset=0 HTTP/1.1\r\n" + auth + "\r\n", 404},
		"no such method":    {"PUT /v1/session/open HTTP/1.1\r\n" + auth + "\r\n", 405},
		"no credentials":    {"GET /v1/identity HTTP/1.1\r\nHost: h\r\n\r\n", 401},
		"other credentials": {"GET /v1/identity HTTP/1.1\r\nHost: h\r\nAuthorization: Basic Z29vZDo=\r\n\r\n", 401},
		"good credentials":  {"GET /v1/identity HTTP/1.1\r\n" + auth + "\r\n", 200},
	} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			conn := (&guarded{t, g.addr}).raw(tt.text)
			if got := status(conn); got != tt.want {
				t.Errorf("got status %d, want %d", got, tt.want)
			}
			if _, err := io.Copy(io.Discard, conn); isTimeout(err) {
				t.Errorf("the connection is held: %v", err)
			}
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("cut off after %s", took)
			}
		})
	}
	exchange(t, mustDial(t, g.dialer("good-1", httptransport.ModeAuto)), 20)
}

// A TLS handshake that does not go on is cut off.
func TestSlowHandshake(t *testing.T) {
	cert, err := tls.LoadX509KeyPair(testrig.NewCA(t, "CA").Server("hub"))
	if err != nil {
		t.Fatal(err)
	}
	g := newGuarded(t, httptransport.ServerOptions{
		Config: transport.Config{HelloTimeout: 300 * time.Millisecond}, TLS: &tls.Config{Certificates: []tls.Certificate{cert}},
	})
	for _, text := range []string{"", "\x16\x03\x01\x02\x00\x01", "GET / HTTP/1.1\r\nHost: h\r\n\r\n", strings.Repeat("\xff", 100_000)} {
		if _, err := io.Copy(io.Discard, g.raw(text)); isTimeout(err) {
			t.Errorf("%.20q: the connection is held", text)
		}
	}
}

// Who guesses tokens gets no answers any more, while good tokens of the same
// address pass.
func TestGuessedTokens(t *testing.T) {
	g := newGuarded(t, httptransport.ServerOptions{})
	refused, cut := 0, 0
	for range 60 {
		_, err := g.dialer("bad", httptransport.ModeStream).Identify(t.Context())
		if bye, ok := errors.AsType[*transport.ByeError](err); ok && bye.Code == transport.CodeAuth {
			refused++
		} else if err != nil {
			cut++
		}
	}
	if refused < 20 || refused > 25 || refused+cut != 60 {
		t.Errorf("of 60 wrong tokens %d were refused and %d cut off, want 20 refused and the rest cut off", refused, cut)
	}
	if _, _, err := g.dialer("bad", httptransport.ModeStream).Dial(t.Context(), &transport.Hello{Node: "n"}); err == nil {
		t.Error("a wrong token was taken")
	}
	id, err := g.dialer("good-1", httptransport.ModeStream).Identify(t.Context())
	if err != nil || id.Node != "good-1" || id.Hub != "hub" || id.Site != (transport.Site{7}) {
		t.Errorf("a good token: got %+v, %v", id, err)
	}
	for _, mode := range []httptransport.Mode{httptransport.ModeStream, httptransport.ModePoll} {
		exchange(t, mustDial(t, g.dialer("good-1", mode)), 20)
	}
}

// The id of a polling session is of no use without its credentials.
func TestPollingSessionNeedsItsCredentials(t *testing.T) {
	g := newGuarded(t, httptransport.ServerOptions{})
	frame, err := transport.AppendFrame(nil, transport.Config{}.Hello(&transport.Hello{Node: "n"}), transport.MaxHelloFrame)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(method, path, token string, body string) *nethttp.Response {
		t.Helper()
		req, err := nethttp.NewRequestWithContext(t.Context(), method, "http://"+g.addr+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		resp, err := nethttp.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp
	}
	id := ask("POST", "/v1/session/open", "good-1", string(frame)).Header.Get("Litefs-Session")
	if id == "" {
		t.Fatal("no session")
	}
	path := "/v1/session/" + id
	for _, token := range []string{"", "bad", "good-2"} {
		for method, action := range map[string]string{"POST": "/push?offset=0", "GET": "/pull?offset=0&wait=0", "DELETE": ""} {
			if resp := ask(method, path+action, token, ""); resp.StatusCode != nethttp.StatusNotFound {
				t.Errorf("%s %s with token %q: got %s, want 404", method, action, token, resp.Status)
			}
		}
	}
	if resp := ask("GET", path+"/pull?offset=0&wait=0", "good-1", ""); resp.StatusCode >= 300 {
		t.Errorf("pull with its own token: %s", resp.Status)
	}
	if resp := ask("POST", path+"/push?offset=0", "good-1", strings.Repeat("x", 5<<20)); resp.StatusCode == nethttp.StatusNoContent {
		t.Errorf("a push of 5 MiB: %s", resp.Status)
	}
}

// One node has few sessions, however many it opens; another finds its place.
func TestSessionsOfOneNode(t *testing.T) {
	g := newGuarded(t, httptransport.ServerOptions{MaxSessions: 10, MaxSessionsOfOne: 4})
	busy := 0
	for range 12 {
		c, _, err := g.dialer("good-1", httptransport.ModeStream).Dial(t.Context(), &transport.Hello{Node: "n"})
		if errors.Is(err, transport.ErrBusy) {
			busy++
		} else if err != nil {
			t.Fatal(err)
		} else {
			defer c.Close()
		}
	}
	if busy != 8 {
		t.Errorf("%d of 12 sessions of one node were refused, want 8", busy)
	}
	for i := range 3 {
		exchange(t, mustDial(t, g.dialer(fmt.Sprintf("good-%d", i+2), httptransport.ModeStream)), 20)
	}
}
