package hub_test

import (
	"context"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/agent"
	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
	"github.com/litefs-agent/litefs-agent/ltx"
	"github.com/litefs-agent/litefs-agent/store"
	"github.com/litefs-agent/litefs-agent/transport"
	httptransport "github.com/litefs-agent/litefs-agent/transport/http"
)

// A record whose sibling in a transaction over several databases was refused is
// refused at once, before and after the sibling, and not held until a timeout;
// what the node sends next of that database is taken.
func TestGroupWithoutSibling(t *testing.T) {
	for _, refusedFirst := range []bool{false, true} {
		r := newRig(t, 11)
		r.startHub()
		r.startNode()
		r.commit("a.db", 5)
		r.settle()
		r.closeLink()
		r.commit("c.db", 5)
		sh, err := r.node.DB("c.db").Next(ltx.Pos{}, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience/2)
		defer cancel()
		d, err := httptransport.NewDialer("http://"+r.relay.aimed(), httptransport.DialOptions{Config: linkConfig, Mode: httptransport.ModeStream})
		if err != nil {
			t.Fatal(err)
		}
		c, _, err := d.Dial(ctx, &transport.Hello{Node: "n1", Hardware: 1, Site: r.site})
		if err != nil {
			t.Fatal(err)
		}
		good := push(sh)
		good.Stream, good.Group, good.Parts = 2, 9, 2
		bad := *good
		bad.Name, bad.Stream = "../b.db", 3
		if refusedFirst {
			bad.Stream, good.Stream = 2, 3
		}
		send := func(p *transport.Push) {
			t.Helper()
			sh, err := r.node.DB("c.db").Next(ltx.Pos{}, 0, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer sh.Body.Close()
			if err := transport.SendPush(ctx, c, p, sh.Body); err != nil {
				t.Fatal(err)
			}
		}
		if refusedFirst {
			send(&bad)
			send(good)
		} else {
			send(good)
			send(&bad)
		}
		began := time.Now()
		for n := 0; n < 2; {
			m, err := c.Recv(ctx)
			if err != nil {
				t.Fatalf("refused first %v: after %d refusals: %v", refusedFirst, n, err)
			}
			nak, ok := m.(*transport.Nak)
			if !ok {
				continue
			}
			n++
			if nak.Stream == good.Stream && nak.Code != transport.NakCanceled {
				t.Errorf("refused first %v: the sibling is refused with %s, want %s", refusedFirst, nak.Code, transport.NakCanceled)
			}
		}
		t.Logf("refused in %s", time.Since(began))
		alone := push(sh)
		alone.Stream = 4
		send(alone)
		for {
			m, err := c.Recv(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if ack, ok := m.(*transport.Ack); ok && ack.Name == "c.db" {
				break
			}
		}
		_ = sh.Body.Close()
		c.Close()
	}
}

func push(sh *store.Shipment) *transport.Push {
	p := &transport.Push{
		Name: sh.Name, History: transport.History(sh.History), Epoch: transport.Epoch(sh.Epoch),
		MinTXID: sh.Min, MaxTXID: sh.Max, PreApply: sh.Pre, PostApply: sh.Post,
		CommitTime: sh.Time, PageSize: sh.PageSize, Size: sh.Size,
	}
	if sh.Full && sh.Min == 1 {
		p.Flags |= transport.PushSnapshot
		p.PreApply = 0
	}
	return p
}

// A transaction over several databases that is sent again goes under another
// number: the hub may still have parts of the first one in its queues.
func TestGroupSentAgain(t *testing.T) {
	r := newRig(t, 12)
	c := &scripted{sent: make(chan *transport.Push, 64), answers: make(chan transport.Message, 8)}
	st, err := store.Open(store.Options{FS: r.nodeFS, Node: "n1", Shipping: true})
	if err != nil {
		t.Fatal(err)
	}
	r.node = st
	r.world.FS = nodeFS{st}
	st.Attach(peer{w: r.world})
	dbs := []*pager.DB{r.world.DB("g1.db"), r.world.DB("g2.db")}
	changes := []pager.Change{dbs[0].RandomChange(5), dbs[1].RandomChange(5)}
	for i := range dbs {
		dbs[i].Sync, changes[i].Rollback = pager.Full, false
	}
	if err := r.world.Group(dbs, changes); err != nil {
		t.Fatal(err)
	}
	l, err := agent.NewLink(agent.LinkOptions{ID: "n1", FS: r.nodeFS, Endpoints: []agent.Endpoint{{URL: "test", Dialer: c}}})
	if err != nil {
		t.Fatal(err)
	}
	l.Attach(st)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.Run(ctx)
	}()
	r.stopLink = func() {
		cancel()
		<-done
	}
	seen := map[uint64]bool{}
	for range 3 {
		var parts [2]*transport.Push
		for i := range parts {
			select {
			case parts[i] = <-c.sent:
			case <-ctx.Done():
				t.Fatal("the node sends nothing")
			}
		}
		group := parts[0].Group
		if group == 0 || parts[1].Group != group || parts[0].Parts != 2 || parts[0].Name == parts[1].Name {
			t.Fatalf("got %+v and %+v, want two parts of one group", parts[0], parts[1])
		}
		if seen[group] {
			t.Fatalf("group %d was sent twice", group)
		}
		seen[group] = true
		for _, p := range parts {
			c.answers <- &transport.Nak{Name: p.Name, Code: transport.NakPosMismatch, Stream: p.Stream, MinTXID: p.MinTXID, MaxTXID: p.MaxTXID}
		}
	}
}

// scripted is a hub that a test plays.
type scripted struct {
	sent    chan *transport.Push
	answers chan transport.Message
}

func (c *scripted) Dial(context.Context, *transport.Hello) (transport.Conn, *transport.Welcome, error) {
	return c, &transport.Welcome{Site: transport.Site{1}, Hub: "hub", Session: 1}, nil
}

func (c *scripted) Send(_ context.Context, m transport.Message) error {
	if p, ok := m.(*transport.Push); ok {
		c.sent <- p
	}
	return nil
}

func (c *scripted) Recv(ctx context.Context) (transport.Message, error) {
	select {
	case m := <-c.answers:
		return m, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (c *scripted) Limits() transport.Limits {
	return transport.Limits{MaxFrame: 1 << 20, Window: 1 << 20, MaxStreams: 16}
}
func (c *scripted) Stats() transport.Stats { return transport.Stats{} }
func (c *scripted) Close() error           { return nil }

// However long a node was without its hub, and whatever became of the log
// meanwhile, the records of a transaction over several databases go together.
func TestGroupAfterOutage(t *testing.T) {
	r := newRig(t, 13)
	r.nodeOpt.Budget = 1 << 20 // four segments
	r.linkOpt.CompactFrom = 2
	r.startNode()
	r.closeLink()
	names := []string{"g1.db", "g2.db", "g3.db"}
	type member struct {
		name string
		txid ltx.TXID
	}
	groups := make(map[member]int) // of which transaction a record is a part
	for i := range 40 {
		r.commit(names[i%3], 6)
		pair := []string{names[i%3], names[(i+1)%3]}
		var dbs []*pager.DB
		var changes []pager.Change
		for _, name := range pair {
			db := r.world.DB(name)
			db.Sync = pager.Full
			ch := db.RandomChange(6)
			ch.Rollback = false
			dbs, changes = append(dbs, db), append(changes, ch)
		}
		if err := r.world.Group(dbs, changes); err != nil {
			t.Fatal(err)
		}
		for _, name := range pair {
			groups[member{name, r.node.DB(name).Pos().TXID}] = i + 1
		}
		for range 3 { // until the ring has turned
			r.commit("other.db", 30)
		}
	}
	r.closeLink()
	r.world.Kill()
	if err := r.node.Close(); err != nil {
		t.Fatal(err)
	}
	if list, err := r.nodeFS.ReadDir("groups"); err != nil || len(list) < 20 {
		t.Fatalf("%d group files, error %v: the log has not given the records up", len(list), err)
	}
	r.startHub()
	sent := make(chan *transport.Push, 4096)
	r.tap = sent
	r.startNode()
	r.settle()
	r.closeLink()
	close(sent)
	numbers := make(map[int]uint64)
	for p := range sent {
		want := groups[member{p.Name, p.MaxTXID}]
		switch {
		case want == 0 && p.Group != 0:
			t.Errorf("%s of %s is no part of a group and is sent as one", p.MaxTXID, p.Name)
		case want != 0 && (p.Group == 0 || p.Parts != 2 || p.MinTXID != p.MaxTXID):
			t.Errorf("%s of %s is sent as %s to %s, group %d of %d; want one part of 2", p.MaxTXID, p.Name, p.MinTXID, p.MaxTXID, p.Group, p.Parts)
		case want != 0 && numbers[want] != 0 && numbers[want] != p.Group:
			t.Errorf("transaction %d is sent as groups %d and %d", want, numbers[want], p.Group)
		case want != 0:
			numbers[want] = p.Group
			delete(groups, member{p.Name, p.MaxTXID})
		}
	}
	if len(groups) > 0 {
		t.Errorf("never sent as parts: %v", groups)
	}
}

// tapped is a Dialer that copies the pushes of its connections.
type tapped struct {
	transport.Dialer
	pushes chan<- *transport.Push
}

func (d tapped) Dial(ctx context.Context, h *transport.Hello) (transport.Conn, *transport.Welcome, error) {
	c, w, err := d.Dialer.Dial(ctx, h)
	return tappedConn{c, d.pushes}, w, err
}

type tappedConn struct {
	transport.Conn
	pushes chan<- *transport.Push
}

func (c tappedConn) Send(ctx context.Context, m transport.Message) error {
	if p, ok := m.(*transport.Push); ok {
		c.pushes <- p
	}
	return c.Conn.Send(ctx, m)
}
