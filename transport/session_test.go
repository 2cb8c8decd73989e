package transport_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/litefs-agent/litefs-agent/transport"
)

// netPipe is a session's pipe over net.Pipe, whose other end the test plays.
type netPipe struct{ net.Conn }

func (p netPipe) CloseWrite() error { return nil }
func (p netPipe) Abort()            { p.Close() }

// session returns one end as a Conn and the other as raw bytes.
func session(cfg transport.Config) (transport.Conn, net.Conn) {
	a, b := net.Pipe()
	return transport.NewSession(netPipe{a}, cfg, cfg.Limits()), b
}

func unhex(t *testing.T, s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestMisbehaviour: what cannot be understood ends the session, is said to the
// peer, and does not take away what came before.
func TestMisbehaviour(t *testing.T) {
	ok, err := transport.AppendFrame(nil, &transport.Cancel{Stream: 1}, 1024)
	if err != nil {
		t.Fatal(err)
	}
	hello, err := transport.AppendFrame(nil, &transport.Hello{}, 1024)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		b    []byte
		want error
		code transport.Code
	}{
		{"unknown message", unhex(t, "0000000163"), transport.ErrUnknown, transport.CodeUnknown},
		{"unknown mandatory field", unhex(t, "0000000412400161"), transport.ErrUnknown, transport.CodeUnknown},
		{"oversized", unhex(t, "0001000012"), transport.ErrTooLarge, transport.CodeTooLarge},
		{"corrupt", unhex(t, "00000004127f7f7f"), transport.ErrCorrupt, transport.CodeCorrupt},
		{"hello again", hello, transport.ErrCorrupt, transport.CodeProtocol},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, raw := session(transport.Config{})
				defer c.Close()
				defer raw.Close()
				go func() { _, _ = raw.Write(append(bytes.Clone(ok), test.b...)) }()
				m, _, err := transport.ReadFrame(raw, 1024)
				if bye, ok := m.(*transport.Bye); err != nil || !ok || bye.Code != test.code || bye.Text == "" {
					t.Errorf("peer got %+v, %v; want a bye with %s", m, err, test.code)
				}
				if m, err := c.Recv(t.Context()); err != nil || m.Kind() != transport.KindCancel {
					t.Errorf("first: got %v, %v, want the message before", m, err)
				}
				if _, err := c.Recv(t.Context()); !errors.Is(err, test.want) {
					t.Errorf("recv: got %v, want %v", err, test.want)
				}
				if err := c.Send(t.Context(), &transport.Cancel{Stream: 1}); !errors.Is(err, test.want) {
					t.Errorf("send: got %v, want %v", err, test.want)
				}
			})
		})
	}
}

// TestCutFrame: an end inside a frame, or without a Bye, is a loss.
func TestCutFrame(t *testing.T) {
	b, err := transport.AppendFrame(nil, &transport.Cancel{Stream: 1, Text: "abc"}, 1024)
	if err != nil {
		t.Fatal(err)
	}
	for n := range len(b) {
		synctest.Test(t, func(t *testing.T) {
			c, raw := session(transport.Config{})
			defer c.Close()
			go func() {
				_, _ = raw.Write(b[:n])
				raw.Close()
			}()
			if _, err := c.Recv(t.Context()); !errors.Is(err, transport.ErrLost) {
				t.Errorf("cut at %d: got %v, want lost", n, err)
			}
		})
	}
}

// TestSilence: on a virtual clock, the session ends DeadAfter after the last byte,
// not before.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, raw := session(transport.Config{DeadAfter: 30 * time.Second})
		defer c.Close()
		defer raw.Close()
		pings := make(chan int, 1)
		go func() {
			n := 0
			for {
				m, _, err := transport.ReadFrame(raw, 1024)
				if err != nil {
					pings <- n
					return
				}
				if m.Kind() == transport.KindPing {
					n++
				}
			}
		}()
		pong, err := transport.AppendFrame(nil, &transport.Pong{Echo: 1}, 1024)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(29 * time.Second)
		if _, err := raw.Write(pong[:1]); err != nil { // a byte is a sign of life
			t.Fatal(err)
		}
		began := time.Now()
		_, err = c.Recv(t.Context())
		if d := time.Since(began); !errors.Is(err, transport.ErrLost) || d < 30*time.Second || d > 36*time.Second {
			t.Errorf("got %v after %s, want lost after 30 s", err, d)
		}
		if n := <-pings; n < 6 || n > 13 {
			t.Errorf("%d pings in 60 s, want about one every 10 s or less", n)
		}
	})
}

// TestCloseGrace: a peer that takes nothing delays Close by CloseGrace, no more.
func TestCloseGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, raw := session(transport.Config{CloseGrace: 2 * time.Second})
		defer raw.Close()
		if err := c.Send(t.Context(), &transport.Cancel{Stream: 1}); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		c.Close()
		if d := time.Since(began); d != 2*time.Second {
			t.Errorf("close took %s, want 2 s", d)
		}
	})
}

// TestSendOrder: a full queue lets Sends in by turns, none lost, and bulk is not
// starved by live messages.
func TestSendOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, raw := session(transport.Config{SendQueue: 2048, MaxFrame: 1024})
		defer c.Close()
		ctx, cancel := context.WithCancel(t.Context())
		for range 4 {
			go func() {
				for c.Send(ctx, &transport.Cancel{Stream: 1, Text: string(make([]byte, 400))}) == nil {
				}
			}()
		}
		go func() {
			for i := int64(0); c.Send(ctx, &transport.Data{Stream: 9, Offset: i, Payload: make([]byte, 900)}) == nil; i++ {
			}
		}()
		synctest.Wait()
		next := int64(0)
		for range 1000 {
			m, _, err := transport.ReadFrame(raw, 1024)
			if err != nil {
				t.Fatal(err)
			}
			if d, ok := m.(*transport.Data); ok {
				if d.Offset != next {
					t.Fatalf("chunk %d, want %d", d.Offset, next)
				}
				next++
			}
		}
		if next < 10 { // its share hangs on scheduling; that it has one does not
			t.Errorf("%d chunks among 1000 messages: starved", next)
		}
		cancel()
		raw.Close()
	})
}

func TestInbound(t *testing.T) {
	push := func(stream uint64, size int64) *transport.Push {
		return &transport.Push{Stream: stream, Name: "a", MinTXID: 1, MaxTXID: 1, Size: size}
	}
	in := transport.Inbound{Max: 2}
	data := func(stream uint64, offset int64, n int, last bool) error {
		_, err := in.Data(&transport.Data{Stream: stream, Offset: offset, Payload: make([]byte, n), Last: last})
		return err
	}
	for i, test := range []struct {
		got, want error
	}{
		{in.Push(push(1, 10)), nil},
		{in.Push(push(1, 10)), transport.ErrCorrupt},
		{in.Push(push(3, -1)), nil},
		{in.Push(push(4, -1)), transport.ErrTooLarge},
		{data(9, 0, 1, false), transport.ErrCorrupt},
		{data(2, 0, 1, false), nil}, // given up long ago
		{data(1, 0, 4, false), nil},
		{data(1, 0, 4, false), transport.ErrCorrupt},
		{data(1, 4, 7, false), transport.ErrCorrupt},
		{data(1, 4, 5, true), transport.ErrCorrupt},
		{data(1, 4, 6, true), nil},
		{data(3, 0, 5, false), nil},
		{data(3, 5, 0, true), nil},
	} {
		if !errors.Is(test.got, test.want) {
			t.Errorf("step %d: got %v, want %v", i, test.got, test.want)
		}
	}
}

// sink is a Conn that keeps what is sent.
type sink struct {
	transport.Conn
	limits transport.Limits
	got    []transport.Message
}

func (s *sink) Limits() transport.Limits { return s.limits }

func (s *sink) Send(_ context.Context, m transport.Message) error {
	b, err := transport.AppendFrame(nil, m, s.limits.MaxFrame)
	if err != nil {
		return err
	}
	m, _, err = transport.DecodeFrame(b, s.limits.MaxFrame)
	s.got = append(s.got, m)
	return err
}

// TestSendPush: every size around the frame limit arrives whole; a reader that is
// shorter or longer than announced cancels the stream.
func TestSendPush(t *testing.T) {
	content := make([]byte, 5000)
	for i := range content {
		content[i] = byte(i * 31)
	}
	for size := 0; size <= len(content); size++ {
		for _, announced := range []int64{int64(size), -1} {
			s := &sink{limits: transport.Limits{MaxFrame: 1024}}
			p := &transport.Push{Stream: 1, Name: "a", MinTXID: 1, MaxTXID: 1, Size: announced}
			if err := transport.SendPush(t.Context(), s, p, bytes.NewReader(content[:size])); err != nil {
				t.Fatalf("size %d: %v", size, err)
			}
			in := transport.Inbound{Max: 1}
			first := s.got[0].(*transport.Push)
			if err := in.Push(first); err != nil {
				t.Fatal(err)
			}
			got, done := first.Payload, first.Last
			for _, m := range s.got[1:] {
				d := m.(*transport.Data)
				if _, err := in.Data(d); err != nil || done {
					t.Fatalf("size %d: %v", size, err)
				}
				got, done = append(got, d.Payload...), d.Last
			}
			if !done || !bytes.Equal(got, content[:size]) {
				t.Fatalf("size %d: got %d bytes, done %t", size, len(got), done)
			}
		}
	}
	for name, r := range map[string]io.Reader{
		"short": bytes.NewReader(content[:4000]), "long": bytes.NewReader(content),
		"fault": io.MultiReader(bytes.NewReader(content[:2000]), errReader{}),
	} {
		s := &sink{limits: transport.Limits{MaxFrame: 1024}}
		err := transport.SendPush(t.Context(), s, &transport.Push{Stream: 1, Name: "a", MinTXID: 1, MaxTXID: 1, Size: 4500}, r)
		last := s.got[len(s.got)-1]
		if name == "long" { // what is beyond the announced size is not read
			if err == nil {
				continue
			}
		}
		if err == nil || last.Kind() != transport.KindCancel {
			t.Errorf("%s: got %v and %s last, want an error and cancel", name, err, last.Kind())
		}
	}
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, errors.New("disk") }
