package hub_test

import (
	"context"
	"flag"
	"fmt"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
	"github.com/litefs-agent/litefs-agent/store"
)

var (
	faultSeed   = flag.Uint64("hub.seed", 0, "first seed of TestShipThroughFaults")
	faultRounds = flag.Int("hub.rounds", 12, "number of seeds of TestShipThroughFaults")
)

func TestShip(t *testing.T) {
	r := newRig(t, 1)
	r.startHub()
	r.startNode()
	for i := range 50 {
		r.commit(fmt.Sprintf("db%d.db", i%3), 20)
	}
	r.settle()
}

// Whatever happens to either side and to the link, what is acknowledged is at the
// hub, and in the end both have the same.
func TestShipThroughFaults(t *testing.T) {
	for i := range *faultRounds {
		seed := *faultSeed + uint64(i)
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, seed)
			r.startHub()
			r.startNode()
			for range 40 {
				r.event()
				if r.hub == nil {
					r.startHub()
				}
			}
			r.settle()
			if n := r.branches(); n > 0 {
				t.Errorf("%d branches, want none: no line was forked", n)
			}
		})
	}
}

// event commits some transactions, and lets something happen meanwhile.
func (r *rig) event() {
	r.tb.Helper()
	some := func() {
		for range 1 + r.rng.IntN(12) {
			r.commit(fmt.Sprintf("db%d.db", r.rng.IntN(3)), 1+r.rng.IntN(60))
		}
	}
	switch r.rng.IntN(10) {
	case 0, 1:
		r.relay.cutAfter(int64(r.rng.IntN(40_000)), true)
		some()
	case 2:
		r.relay.cutAfter(int64(r.rng.IntN(2_000)), false)
		some()
	case 3: // power cut at the hub
		some()
		r.closeHub(true)
		some()
	case 4: // the hub is restarted
		some()
		r.closeHub(false)
		some()
	case 5: // power cut at the node
		some()
		r.restartNode(true)
	case 6: // the node is restarted
		some()
		r.restartNode(false)
	case 7: // several databases in one transaction
		dbs := []*pager.DB{r.world.DB("g1.db"), r.world.DB("g2.db")}
		for _, db := range dbs {
			db.Sync = pager.Full
			r.commit(db.Name, 10)
		}
		changes := []pager.Change{dbs[0].RandomChange(10), dbs[1].RandomChange(10)}
		changes[0].Rollback, changes[1].Rollback = false, false
		if err := r.world.Group(dbs, changes); err != nil {
			r.tb.Fatalf("group: %v", err)
		}
	case 8: // a drop, and perhaps another database of that name
		r.commit("drop.db", 10)
		if err := r.world.DB("drop.db").Drop(); err != nil {
			r.tb.Fatalf("drop: %v", err)
		}
		if r.rng.IntN(2) == 0 {
			r.commit("drop.db", 10)
		}
	case 9: // a short outage
		r.relay.cut()
		some()
	}
}

// branches counts the branches kept at the hub.
func (r *rig) branches() (n int) {
	for _, db := range r.hub.DBs() {
		n += len(db.Branches())
	}
	return n
}

// A hub that lost everything gets everything again.
func TestHubLosesState(t *testing.T) {
	r := newRig(t, 3)
	r.startHub()
	r.startNode()
	for range 30 {
		r.commit("a.db", 20)
		r.commit("b.db", 20)
	}
	r.settle()
	r.closeHub(false)
	r.hubFS = simdisk.New(simdisk.Options{Seed: 99, BlockSize: 4096})
	r.commit("a.db", 20)
	r.startHub()
	r.settle()
	if n := r.branches(); n > 0 {
		t.Errorf("%d branches, want none", n)
	}
}

// A hub that comes back older than it was is brought up again.
func TestHubGoesBack(t *testing.T) {
	for _, forgotten := range []bool{false, true} { // whether the node still has what the hub lacks
		r := newRig(t, 4)
		if !forgotten {
			r.nodeOpt.History = time.Hour
		}
		r.startHub()
		r.startNode()
		for range 10 {
			r.commit("a.db", 20)
		}
		r.settle()
		r.closeHub(false)
		backup := clone(t, r.hubFS)
		r.startHub()
		for range 30 {
			r.commit("a.db", 60)
		}
		r.settle()
		r.closeHub(false)
		r.hubFS = backup
		r.startHub()
		r.commit("a.db", 20)
		r.settle()
		if n := r.branches(); n > 0 {
			t.Errorf("%d branches, want none: it is one line", n)
		}
	}
}

// A node that starts over with an empty data folder and does not restore makes
// another line: the hub has both.
func TestTwoHistories(t *testing.T) {
	r := newRig(t, 5)
	r.startHub()
	r.startNode()
	for range 10 {
		r.commit("a.db", 20)
	}
	r.settle()
	old := r.hub.DB("nodes/n1/a.db").Info()
	r.closeLink()
	r.world.Kill()
	if err := r.node.Close(); err != nil {
		t.Fatal(err)
	}
	r.nodeFS = simdisk.New(simdisk.Options{Seed: 77, BlockSize: 4096})
	r.world = pager.New(nil, r.rng)
	r.startNode()
	for range 3 {
		r.commit("a.db", 20)
	}
	r.settle()
	for range 2 { // after a restart of the hub too
		list := r.hub.DB("nodes/n1/a.db").Branches()
		if len(list) != 1 || list[0].History != old.History || list[0].Pos != old.Pos {
			t.Fatalf("got branches %+v, want one of history %016x at %s", list, old.History, old.Pos)
		}
		r.closeHub(true)
		r.startHub()
		r.settle()
	}
}

// A card that was restored from an old image goes on from there: the hub keeps
// what it had as a branch, whether the new line is shorter or longer.
func TestRestoredCard(t *testing.T) {
	for _, more := range []int{1, 30} {
		r := newRig(t, 6)
		r.startHub()
		r.startNode()
		for range 5 {
			r.commit("a.db", 20)
		}
		r.settle()
		r.closeLink()
		r.world.Kill()
		if err := r.node.Close(); err != nil {
			t.Fatal(err)
		}
		image, head := clone(t, r.nodeFS), r.world.DB("a.db").Head()
		r.startNode()
		r.world.DB("a.db").Forget(head)
		for range 10 {
			r.commit("a.db", 20)
		}
		r.settle()
		old := r.node.DB("a.db").Info()
		r.closeLink()
		r.world.Kill()
		if err := r.node.Close(); err != nil {
			t.Fatal(err)
		}

		r.nodeFS = image
		addr := r.relay.aimed()
		r.relay.aim("")
		r.startNode()
		r.world.DB("a.db").Forget(head)
		for range more {
			r.commit("a.db", 20)
		}
		r.relay.aim(addr)
		r.settle()
		for range 2 {
			list := r.hub.DB("nodes/n1/a.db").Branches()
			if len(list) != 1 || list[0].Pos != old.Pos || list[0].History != old.History {
				t.Fatalf("got branches %+v, want one of %016x at %s", list, old.History, old.Pos)
			}
			r.restartNode(true)
			r.closeHub(true)
			r.startHub()
			r.commit("a.db", 20)
			r.settle()
		}
	}
}

// A card that was restored from an old image, and on which nothing was written
// since, takes what the hub has.
func TestRestoredCardWithNothingNew(t *testing.T) {
	r := newRig(t, 16)
	r.startHub()
	r.startNode()
	for range 5 {
		r.commit("a.db", 20)
	}
	r.settle()
	r.closeLink()
	r.world.Kill()
	if err := r.node.Close(); err != nil {
		t.Fatal(err)
	}
	image := clone(t, r.nodeFS)
	head := r.world.DB("a.db").Head()
	r.startNode()
	r.world.DB("a.db").Forget(head)
	for range 10 {
		r.commit("a.db", 20)
	}
	r.settle()
	newest, now := r.node.DB("a.db").Info(), r.world.DB("a.db").Head()
	r.closeLink()
	r.world.Kill()
	if err := r.node.Close(); err != nil {
		t.Fatal(err)
	}

	r.nodeFS = image
	r.startNode()
	deadline := time.Now().Add(patience)
	for r.node.DB("a.db").Place().Pos != newest.Pos {
		if time.Now().After(deadline) {
			t.Fatalf("the node stays at %s, the hub is at %s", r.node.DB("a.db").Place().Pos, newest.Pos)
		}
		time.Sleep(time.Millisecond) // polls a condition of two processes
	}
	r.world.DB("a.db").Forget(now)
	r.commit("a.db", 20)
	r.settle()
	if got := r.node.DB("a.db").Info().History; got != newest.History {
		t.Errorf("history %016x, want %016x as before", got, newest.History)
	}
	if list := r.hub.DB("nodes/n1/a.db").Branches(); len(list) != 0 {
		t.Errorf("the hub keeps branches %+v, want none", list)
	}
}

// An empty data folder gets everything back from the hub, and goes on with the
// same history.
func TestRestore(t *testing.T) {
	r := newRig(t, 8)
	r.startHub()
	r.startNode()
	for range 10 {
		r.commit("a.db", 40)
		r.commit("b.db", 10)
	}
	r.commit("gone.db", 10)
	if err := r.world.DB("gone.db").Drop(); err != nil {
		t.Fatal(err)
	}
	r.settle()
	heads := map[string]pager.Version{}
	for _, name := range r.world.Names() {
		heads[name] = r.world.DB(name).Head()
	}
	r.closeLink()
	r.world.Kill()
	_ = r.node.Close()

	r.nodeFS = simdisk.New(simdisk.Options{Seed: 79, BlockSize: 4096})
	opt := r.nodeOpt
	opt.FS = r.nodeFS
	st, err := store.Open(opt)
	if err != nil {
		t.Fatal(err)
	}
	r.node = st
	r.newLink()
	if pending, err := r.link.RestorePending(); err != nil || !pending {
		t.Fatalf("RestorePending = %v, %v, want true", pending, err)
	}
	// The link breaks in the middle, once.
	r.relay.cutAfter(3000, false)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	n, err := r.link.Restore(ctx)
	if err != nil || n != 3 {
		t.Fatalf("Restore = %d, %v, want 3 databases", n, err)
	}
	if pending, err := r.link.RestorePending(); err != nil || pending {
		t.Fatalf("RestorePending = %v, %v after it, want false", pending, err)
	}
	r.restartNode(true)
	for name, head := range heads {
		r.world.DB(name).Forget(head)
	}
	r.settle()
	r.commit("a.db", 40)
	r.commit("gone.db", 10)
	r.settle()
	if n := r.branches(); n > 0 {
		t.Errorf("%d branches, want none: the node goes on with the hub's line", n)
	}
}

// Ten thousand updates of one page cost the link a few records.
func TestBacklogIsCompacted(t *testing.T) {
	const n = 2000
	r := newRig(t, 9)
	r.nodeOpt.SegmentSize, r.nodeOpt.Large = 1<<20, 256<<10
	r.startNode()
	db := r.world.DB("a.db")
	db.Sync = pager.Normal
	r.commit("a.db", 1)
	for range n {
		if err := db.Commit(pager.Change{PageSize: db.Head().PageSize, Count: len(db.Head().Pages), Pages: map[int][]byte{}}); err != nil {
			t.Fatal(err)
		}
		db.Versions = db.Versions[len(db.Versions)-1:] // the past is of no interest
		db.Cur = 0
	}
	r.startHub()
	r.settle()
	if got := r.hub.Stats().Transactions; got > n/20 {
		t.Errorf("the hub got %d records for %d transactions, want a few", got, n)
	}
}

// Small databases do not wait for the snapshot of a large one.
func TestSnapshotWhileWriting(t *testing.T) {
	r := newRig(t, 10)
	r.linkOpt.Rate = 2 << 20
	r.nodeOpt.SegmentSize, r.nodeOpt.Large, r.nodeOpt.Memory = 4<<20, 256<<10, 16<<20
	r.hubOpt.SegmentSize, r.hubOpt.Large, r.hubOpt.Memory = 4<<20, 256<<10, 16<<20
	r.startNode()
	big := r.world.DB("big.db")
	big.Sync = pager.Full
	pages := map[int][]byte{}
	for i := range 1000 {
		b := make([]byte, 4096)
		for k := range b {
			b[k] = byte(r.rng.Uint32())
		}
		pages[i+2] = b
	}
	if err := big.Commit(pager.Change{PageSize: 4096, Count: 1001, Pages: pages}); err != nil {
		t.Fatal(err)
	}
	r.startHub()
	began := time.Now()
	r.commit("small.db", 3)
	small := r.node.DB("small.db")
	for small.Acked() != small.Pos() {
		if time.Since(began) > patience {
			t.Fatal("small.db is not acknowledged")
		}
		time.Sleep(time.Millisecond) // polls a condition of the link
	}
	if acked := r.node.DB("big.db").Acked(); !acked.IsZero() {
		t.Logf("big.db was acknowledged first, in %s: the rate is not observed", time.Since(began))
		t.Fail()
	}
	for range 5 {
		r.commit("small.db", 3)
		if err := big.Commit(pager.Change{PageSize: 4096, Count: 1001, Pages: map[int][]byte{}}); err != nil {
			t.Fatal(err)
		}
	}
	r.settle()
}

// What the hub has acknowledged outlives a power cut of the hub: startHub asserts
// it.
func TestAckOutlivesPowerCut(t *testing.T) {
	r := newRig(t, 11)
	r.hubOpt.Flush = time.Hour // only what an ack asks for becomes durable
	r.startHub()
	r.startNode()
	for range 5 {
		r.commit("a.db", 20)
		r.commit("b.db", 20)
		r.acknowledged() // and no look at the hub, which would make it durable
		r.closeHub(true)
		r.startHub()
	}
	r.settle()
}
