package hub_test

import (
	"context"
	"testing"
	"time"

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
