package hub_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/hub"
	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/transport"
)

// This file plays nodes that mean harm, over the real link.

// withTokens makes the rig's hub ask for tokens, and returns one for each node.
func (r *rig) withTokens(nodes ...string) (tokens []string) {
	r.tb.Helper()
	cfg := hub.DefaultConfig()
	cfg.Auth.Tokens = filepath.Join(r.tb.TempDir(), "tokens")
	file := hub.TokenFile{Path: cfg.Auth.Tokens}
	for _, node := range nodes {
		text, err := file.Add(node)
		if err != nil {
			r.tb.Fatal(err)
		}
		tokens = append(tokens, text)
	}
	var err error
	if r.auth, err = hub.NewAuth(cfg, nil, slog.New(slog.DiscardHandler)); err != nil {
		r.tb.Fatal(err)
	}
	return tokens
}

// snapshot returns a good record of a database of the node, and its push.
func (r *rig) snapshot(name string) (*transport.Push, []byte) {
	r.tb.Helper()
	sh, err := r.node.DB(name).SnapshotShipment()
	if err != nil {
		r.tb.Fatal(err)
	}
	defer sh.Body.Close()
	body, err := io.ReadAll(sh.Body)
	if err != nil {
		r.tb.Fatal(err)
	}
	return &transport.Push{
		Name: name, History: transport.History(sh.History), Flags: transport.PushSnapshot,
		MinTXID: sh.Min, MaxTXID: sh.Max, PostApply: sh.Post, PageSize: sh.PageSize, Size: int64(len(body)),
	}, body
}

// evil is a session of a node that means harm.
type evil struct {
	t      *testing.T
	c      transport.Conn
	stream uint64
}

func (r *rig) evil(t *testing.T, token string) *evil {
	t.Helper()
	c, _, err := hello(t, r.relay.aimed(), &transport.Hello{Node: "evil", Hardware: 9}, token)
	if err != nil {
		t.Fatal(err)
	}
	return &evil{t: t, c: c}
}

func (e *evil) send(m transport.Message) error {
	ctx, cancel := context.WithTimeout(e.t.Context(), patience)
	defer cancel()
	return e.c.Send(ctx, m)
}

// push sends a record under a name, and returns the answer.
func (e *evil) push(p *transport.Push, body []byte, name string) transport.Message {
	e.t.Helper()
	e.stream++
	head := *p
	head.Stream, head.Name, head.Size = e.stream, name, int64(len(body))
	ctx, cancel := context.WithTimeout(e.t.Context(), patience)
	defer cancel()
	if err := transport.SendPush(ctx, e.c, &head, bytes.NewReader(body)); err != nil {
		e.t.Fatalf("push %q: %v", name, err)
	}
	return e.answer()
}

func (e *evil) answer() transport.Message {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.t.Context(), patience)
	defer cancel()
	m, err := e.c.Recv(ctx)
	if err != nil {
		e.t.Fatalf("no answer: %v", err)
	}
	return m
}

func (e *evil) wantNak(m transport.Message, what string, code transport.NakCode) {
	e.t.Helper()
	if nak, ok := m.(*transport.Nak); !ok || nak.Code != code {
		e.t.Errorf("%s: got %+v, want Nak %s", what, m, code)
	}
}

// ended wants the session to have ended with a Bye.
func (e *evil) ended(what string, code transport.Code) {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.t.Context(), patience)
	defer cancel()
	for {
		if _, err := e.c.Recv(ctx); err != nil {
			wantCode(e.t, what, err, code)
			return
		}
	}
}

// names are what a node may call a database to get out of its folder, or to upset
// the hub.
var hostileNames = []string{
	"..", ".", "/", "../n1/a.db", "../../nodes/n1/a.db", "/nodes/n1/a.db", "x/../../n1/a.db", "./../n1/a.db", "..//n1/a.db", "a//b", "a/", "/a",
	"a/./b", "n1/../../n1/a.db", "\x00", "a\x00b", "../n1", "../../id", "../../log/0", "a/..", strings.Repeat("x", 510), strings.Repeat("a/", 253) + "b",
}

// A node reaches nothing but its own folder, whatever it says.
func TestHostileNames(t *testing.T) {
	r := newRig(t, 41)
	tokens := r.withTokens("n1", "evil")
	r.token = tokens[0]
	r.startHub()
	r.startNode()
	r.commit("a.db", 20)
	r.settle()
	before := r.hub.DB("nodes/n1/a.db").Place()
	addr := r.relay.aimed()
	for name, try := range map[string]struct{ node, token string }{
		"another node's name": {"n1", tokens[1]}, "no token": {"evil", ""}, "wrong token": {"evil", strings.Repeat("0", 64)},
		"another node's token": {"evil", tokens[0]}, "a path": {"evil/../n1", tokens[1]}, "the hub's name": {"hub", tokens[1]},
	} {
		_, _, err := hello(t, addr, &transport.Hello{Node: try.node}, try.token)
		wantCode(t, name, err, transport.CodeAuth)
	}
	e := r.evil(t, tokens[1])
	p, body := r.snapshot("a.db")
	for _, name := range hostileNames {
		e.wantNak(e.push(p, body, name), "push "+name, transport.NakRefused)
		for _, snapshot := range []bool{true, false} {
			if err := e.send(&transport.Subscribe{Name: name, Snapshot: snapshot}); err != nil {
				t.Fatal(err)
			}
			e.wantNak(e.answer(), "subscribe "+name, transport.NakRefused)
		}
	}
	// Names that are good in themselves are of its own folder.
	for _, name := range []string{"nodes/n1/a.db", "n1/a.db", "a.db", "...", "..a", "a.db-wal", "a.db-journal", "a.db/b.db"} {
		if ack, ok := e.push(p, body, name).(*transport.Ack); !ok || ack.Name != name {
			t.Errorf("push %q: got %+v, want an ack", name, ack)
		}
	}
	if err := e.send(&transport.Subscribe{Name: "never.db", Snapshot: true}); err != nil {
		t.Fatal(err)
	}
	e.wantNak(e.answer(), "subscribe to nothing", transport.NakUnknownDatabase)
	for _, db := range r.hub.DBs() {
		if name := db.Name(); name != "nodes/n1/a.db" && !strings.HasPrefix(name, "nodes/evil/") {
			t.Errorf("the hub has %q", name)
		}
	}
	if got := r.hub.DB("nodes/n1/a.db").Place(); got != before {
		t.Errorf("the other node's database moved from %v to %v", before, got)
	}
	r.commit("a.db", 20)
	r.settle()
}

// When its token goes, the session of a node ends; that of another does not.
func TestRevokedSession(t *testing.T) {
	r := newRig(t, 42)
	cfg := hub.DefaultConfig()
	cfg.Auth.Tokens = filepath.Join(t.TempDir(), "tokens")
	file := hub.TokenFile{Path: cfg.Auth.Tokens}
	good, err := file.Add("n1")
	if err != nil {
		t.Fatal(err)
	}
	bad, err := file.Add("evil")
	if err != nil {
		t.Fatal(err)
	}
	if r.auth, err = hub.NewAuth(cfg, nil, r.log); err != nil {
		t.Fatal(err)
	}
	r.token = good
	r.startHub()
	r.startNode()
	r.commit("a.db", 20)
	r.settle()
	e := r.evil(t, bad)
	if _, err := file.Revoke("evil", false); err != nil {
		t.Fatal(err)
	}
	r.ingest.Recheck()
	e.ended("revoked", transport.CodeAuth)
	if r.link.Status().State != "connected" {
		t.Error("the other node lost its session")
	}
	// Also when nobody has a token any more: that does not open the hub.
	if _, err := file.Revoke("n1", false); err != nil {
		t.Fatal(err)
	}
	_, _, err = hello(t, r.relay.aimed(), &transport.Hello{Node: "x"})
	wantCode(t, "without a token", err, transport.CodeAuth)
}

// What a node sends against the rules ends its session or is refused, and harms
// nobody else.
func TestHostileStreams(t *testing.T) {
	r := newRig(t, 43)
	r.ingestOpt.MaxDatabases, r.ingestOpt.StreamStall = 5, 200*time.Millisecond
	r.hubFS = simdisk.New(simdisk.Options{Seed: 44, BlockSize: 4096, Capacity: 64 << 20})
	tokens := r.withTokens("n1", "evil")
	r.token = tokens[0]
	r.startHub()
	r.startNode()
	r.commit("a.db", 20)
	r.settle()
	p, body := r.snapshot("a.db")
	head := func(stream uint64, size int64) *transport.Push {
		x := *p
		x.Stream, x.Size = stream, size
		return &x
	}
	for _, tt := range []struct {
		name string
		send []transport.Message
		code transport.Code
	}{
		{"more than announced later", []transport.Message{head(1, 100), &transport.Data{Stream: 1, Payload: make([]byte, 101), Last: true}}, transport.CodeCorrupt},
		{"a gap", []transport.Message{head(1, 100), &transport.Data{Stream: 1, Offset: 7, Payload: make([]byte, 10)}}, transport.CodeCorrupt},
		{"no such stream", []transport.Message{&transport.Data{Stream: 7, Payload: make([]byte, 10)}}, transport.CodeCorrupt},
		{"the same stream", []transport.Message{head(1, 100), head(1, 100)}, transport.CodeCorrupt},
		{"not for a hub", []transport.Message{&transport.Position{}}, transport.CodeProtocol},
	} {
		e := r.evil(t, tokens[1])
		for _, m := range tt.send {
			if err := e.send(m); err != nil {
				break // it has ended already
			}
		}
		e.ended(tt.name, tt.code)
	}
	many := r.evil(t, tokens[1])
	for i := range uint64(17) {
		if many.send(head(i+1, 1<<20)) != nil {
			break
		}
	}
	many.ended("17 streams", transport.CodeTooLarge)

	e := r.evil(t, tokens[1])
	for _, size := range []int64{1 << 62, 1 << 40, 40 << 20} {
		e.stream++
		if err := e.send(head(e.stream, size)); err != nil {
			t.Fatal(err)
		}
		e.wantNak(e.answer(), "more than the disk holds", transport.NakBusy)
	}
	// Together they may not announce more than the disk holds either.
	for range 3 {
		e.stream++
		if err := e.send(head(e.stream, 10<<20)); err != nil {
			t.Fatal(err)
		}
	}
	e.wantNak(e.answer(), "a third of 10 MiB", transport.NakBusy)
	r.commit("a.db", 20) // others have room
	r.settle()
	for range 2 {
		e.wantNak(e.answer(), "a stream that stands still", transport.NakBusy)
	}
	e.stream++ // the room is there again
	if err := e.send(head(e.stream, 20<<20)); err != nil {
		t.Fatal(err)
	}
	if err := e.send(&transport.Cancel{Stream: e.stream}); err != nil {
		t.Fatal(err)
	}
	// One that does not say how large it is may not fill the disk.
	e.stream++
	if err := e.send(head(e.stream, -1)); err != nil {
		t.Fatal(err)
	}
	for offset := int64(0); offset < 60<<20; offset += 32 << 10 {
		if err := e.send(&transport.Data{Stream: e.stream, Offset: offset, Payload: make([]byte, 32<<10)}); err != nil {
			t.Fatal(err)
		}
	}
	e.wantNak(e.answer(), "an endless stream", transport.NakBusy)
	r.commit("a.db", 20)
	r.settle()

	rng := rand.New(rand.NewPCG(1, 2))
	for range 300 { // a record with some bytes changed, cut, or lengthened
		b := bytes.Clone(body)
		for range 1 + rng.IntN(8) {
			b[rng.IntN(len(b))] ^= byte(1 + rng.IntN(255))
		}
		if rng.IntN(3) == 0 {
			b = b[:rng.IntN(len(b))]
		}
		if ack, ok := e.push(p, b, "broken.db").(*transport.Ack); ok {
			t.Errorf("a broken record was taken: %+v", ack)
		}
	}
	for i := range 6 {
		m := e.push(p, body, string(rune('a'+i))+".db")
		if _, ok := m.(*transport.Ack); !ok {
			e.wantNak(m, "one database too many", transport.NakRefused)
			if i < 4 {
				t.Errorf("database %d was refused", i)
			}
		} else if i > 4 {
			t.Errorf("database %d was taken", i)
		}
	}
	r.commit("a.db", 20)
	r.settle()
}

// A node that asks and asks, and reads nothing, costs a bounded part of the hub.
func TestHostileSubscriptions(t *testing.T) {
	r := newRig(t, 45)
	tokens := r.withTokens("n1", "evil")
	r.token = tokens[0]
	r.startHub()
	r.startNode()
	r.commit("a.db", 200)
	r.settle()
	e := r.evil(t, tokens[1])
	p, body := r.snapshot("a.db")
	if _, ok := e.push(p, body, "a.db").(*transport.Ack); !ok {
		t.Fatal("a good record was not taken")
	}
	before := runtime.NumGoroutine()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	n := 0
	for e.c.Send(ctx, &transport.Subscribe{Name: "a.db", Snapshot: true}) == nil {
		n++
	}
	if more := runtime.NumGoroutine() - before; more > 100 {
		t.Errorf("%d subscriptions cost %d goroutines", n, more)
	}
	t.Logf("%d subscriptions until the hub took no more", n)
	r.commit("a.db", 20)
	r.settle()
}

// A node that dials and dials is told to wait; others are not.
func TestHostileHellos(t *testing.T) {
	r := newRig(t, 46)
	tokens := r.withTokens("n1", "evil")
	r.token = tokens[0]
	r.startHub()
	r.startNode()
	var err error
	n := 0
	for ; err == nil && n < 500; n++ {
		var c transport.Conn
		if c, _, err = hello(t, r.relay.aimed(), &transport.Hello{Node: "evil"}, tokens[1]); err == nil {
			c.Close()
		}
	}
	bye, ok := errors.AsType[*transport.ByeError](err)
	if !ok || bye.Code != transport.CodeBusy || bye.RetryAfter == 0 {
		t.Errorf("after %d hellos: got %v, want Bye busy with a time", n, err)
	}
	r.commit("a.db", 20)
	r.settle()
}
