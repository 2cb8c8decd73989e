package hub_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/transport"
	httptransport "github.com/litefs-agent/litefs-agent/transport/http"
)

// logText keeps what is logged.
type logText struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logText) has(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.b.String(), text)
}

// linkSays waits until the node's link has an error with the text.
func (r *rig) linkSays(text string) {
	r.tb.Helper()
	deadline := time.Now().Add(patience)
	for !strings.Contains(deref(r.link.Status().Error), text) {
		if time.Now().After(deadline) {
			r.tb.Fatalf("the link says %q, want %q", deref(r.link.Status().Error), text)
		}
		time.Sleep(time.Millisecond) // polls a condition of the link
	}
}

// closeNode ends the node, as when its board is switched off.
func (r *rig) closeNode() {
	r.tb.Helper()
	r.closeLink()
	r.world.Kill()
	if err := r.node.Close(); err != nil {
		r.tb.Fatal(err)
	}
	r.node = nil
}

// A clone of a card, on another board, is refused until it has another id, or an
// operator decides that it is the node: then the first one is the clone.
func TestClone(t *testing.T) {
	r := newRig(t, 31)
	r.startHub()
	r.startNode()
	r.commit("a.db", 20)
	r.settle()
	r.closeNode()
	image, head := clone(t, r.nodeFS), r.world.DB("a.db").Head()
	r.startNode()
	r.world.DB("a.db").Forget(head)
	r.commit("a.db", 20)
	r.settle()
	old := r.node.DB("a.db").Info()
	r.closeNode()
	original := r.nodeFS

	r.nodeFS, r.linkOpt.Hardware = image, 2
	r.startNode()
	r.world.DB("a.db").Forget(head)
	r.commit("a.db", 20)
	r.linkSays("give this one another [node] id and an empty data folder")
	r.linkSays("'litefs-agent node accept n1'")
	if got := r.hub.DB("nodes/n1/a.db").Place(); got.Pos != old.Pos || got.History != old.History {
		t.Fatalf("the hub moved to %s by a clone, want %s", got.Pos, old.Pos)
	}
	for _, bad := range []string{"0000000000000009", "2", "x"} {
		if _, err := r.ingest.AcceptNode("n1", bad); err == nil {
			t.Errorf("accept of hardware %q succeeded", bad)
		}
	}
	if _, err := r.ingest.AcceptNode("n2", ""); err == nil {
		t.Error("accept of a node without clone succeeded")
	}
	// The hub forgets neither the refusal nor the decision.
	r.closeHub(true)
	r.startHub()
	if _, err := r.ingest.AcceptNode("n1", ""); err != nil {
		t.Fatal(err)
	}
	r.closeHub(true)
	r.startHub()
	r.settle()
	if n := r.branches(); n != 1 {
		t.Errorf("%d branches, want 1: both lines are kept", n)
	}
	r.closeNode()

	r.nodeFS, r.linkOpt.Hardware = original, 1
	r.startNode()
	r.linkSays("this card is a clone")
}

// A new board with an empty card in place of a broken one wants the operator's
// word.
func TestReplacedBoard(t *testing.T) {
	r := newRig(t, 32)
	r.startHub()
	r.startNode()
	r.commit("a.db", 20)
	r.settle()
	r.closeNode()
	r.nodeFS, r.linkOpt.Hardware = simdisk.New(simdisk.Options{Seed: 5, BlockSize: 4096}), 2
	r.startNode()
	r.linkSays("if this board replaces it, run 'litefs-agent node accept n1' at the hub")
	if _, err := r.ingest.AcceptNode("n1", "0000000000000002"); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(patience)
	for r.link.Site() == "" {
		if time.Now().After(deadline) {
			t.Fatalf("not connected: %s", deref(r.link.Status().Error))
		}
		time.Sleep(time.Millisecond) // polls a condition of the link
	}
}

// A card that was put into another board is the node still.
func TestMovedCard(t *testing.T) {
	r := newRig(t, 33)
	said := new(logText)
	r.log = slog.New(slog.NewTextHandler(said, nil))
	r.startHub()
	r.startNode()
	r.commit("a.db", 20)
	r.settle()
	head := r.world.DB("a.db").Head()
	r.closeNode()
	r.linkOpt.Hardware = 2
	r.startNode()
	r.world.DB("a.db").Forget(head)
	r.commit("a.db", 20)
	r.settle()
	if !said.has("node is on other hardware than before: a moved card") {
		t.Error("the hub did not warn of a moved card")
	}
	if n := r.branches(); n != 0 {
		t.Errorf("%d branches, want none", n)
	}
}

// A hub of another site gets nothing, whichever of the two notices.
func TestForeignSite(t *testing.T) {
	r := newRig(t, 34)
	r.startHub()
	r.startNode()
	r.commit("a.db", 20)
	r.settle()
	r.closeHub(false)
	mine, own := r.site, r.hubFS
	r.site, r.hubFS = transport.Site{9}, simdisk.New(simdisk.Options{Seed: 6, BlockSize: 4096})
	r.startHub()
	r.commit("a.db", 20)
	r.linkSays("start the hub with --site " + mine.String())
	if list := r.hub.DBs(); len(list) != 0 {
		t.Errorf("a hub of another site has %s", list[0].Name())
	}
	r.closeHub(false)
	r.site, r.hubFS = mine, own
	r.startHub()
	r.settle()
}

// hello opens a session as no node of ours would, and returns its number.
func hello(t *testing.T, addr string, h *transport.Hello, token ...string) (transport.Conn, *transport.Welcome, error) {
	t.Helper()
	d, err := httptransport.NewDialer("http://"+addr, httptransport.DialOptions{
		Config: linkConfig, Mode: httptransport.ModeStream, Credentials: bearer(strings.Join(token, "")),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, w, err := d.Dial(ctx, h)
	if err == nil {
		t.Cleanup(func() { c.Close() })
	}
	return c, w, err
}

func wantCode(t *testing.T, what string, err error, code transport.Code) {
	t.Helper()
	bye, ok := errors.AsType[*transport.ByeError](err)
	if !ok || bye.Code != code {
		t.Errorf("%s: got %v, want Bye %s", what, err, code)
	}
}

// The number before the last is good until the node was heard on the last one,
// as a Welcome may be lost; then it is a clone's.
func TestSessionNumbers(t *testing.T) {
	r := newRig(t, 35)
	r.startHub()
	addr := r.relay.aimed()
	c, w, err := hello(t, addr, &transport.Hello{Node: "n1", Hardware: 1})
	if err != nil || w.Session != 1 {
		t.Fatalf("first hello: session %v, %v", w, err)
	}
	c.Close()
	// The Welcome with number 2 is lost: no byte of the node comes after it.
	r.relay.cut()
	_, w, err = hello(t, addr, &transport.Hello{Node: "n1", Hardware: 1, Session: 1})
	if err != nil || w.Session != 2 {
		t.Fatalf("second hello: %v, %v", w, err)
	}
	r.closeHub(true)
	r.startHub()
	addr = r.relay.aimed()
	c, w, err = hello(t, addr, &transport.Hello{Node: "n1", Hardware: 1, Session: 1})
	if err != nil || w.Session != 3 {
		t.Fatalf("the number before, Welcome lost: %v, %v", w, err)
	}
	if err := c.Send(t.Context(), &transport.Unsubscribe{Name: "a"}); err != nil {
		t.Fatal(err)
	}
	c.Close()
	_, _, err = hello(t, addr, &transport.Hello{Node: "n1", Hardware: 2, Session: 1})
	wantCode(t, "a clone with the number before", err, transport.CodeClone)
	_, w, err = hello(t, addr, &transport.Hello{Node: "n1", Hardware: 1, Session: 1})
	if err != nil || w.Session != 4 {
		t.Errorf("a restored card, same hardware: %v, %v", w, err)
	}
	for _, id := range []string{"hub", "", "..", "a/b", "n1/../n2", strings.Repeat("x", 65), "ä"} {
		_, _, err := hello(t, addr, &transport.Hello{Node: id})
		if id == "" || len(id) > 64 { // the frame itself is not allowed, or has no such field
			if err == nil {
				t.Errorf("node %q was taken", id)
			}
			continue
		}
		wantCode(t, "node "+id, err, transport.CodeNodeID)
	}
}
