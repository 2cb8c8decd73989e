package store

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"hash/maphash"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
	"github.com/litefs-agent/litefs-agent/ltx"
)

var (
	crashSeed   = flag.Uint64("store.seed", 0, "run only the crash test of this seed, and say what it does")
	crashOps    = flag.Bool("store.ops", false, "with -store.seed: say every operation of the disk")
	crashPoints = flag.Int("store.points", 5000, "number of crash points of TestCrashSoak")
)

// A crasher is the life story of two data folders: those of a node, where
// programs write, and of a hub, that takes the node's records.
type crasher struct {
	t    testing.TB
	seed uint64
	rng  *rand.Rand
	*machine
	hub     *machine
	w       *pager.World
	link    link
	files   map[string]*plainFile
	past    map[string]map[uint64]bool // every content that a database ever had
	inos    map[uint64]int             // life of the node in which an inode number was first seen
	life    int
	counts  map[string]int
	verbose bool
	killIn  int // calls until the program is killed
	maxPage int
}

func newCrasher(t testing.TB, seed uint64) *crasher {
	c := &crasher{t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 98)), counts: map[string]int{}, past: map[string]map[uint64]bool{}, inos: map[uint64]int{}}
	c.machine = newMachine(c, "node", seed)
	c.o.Shipping = c.rng.IntN(4) > 0
	c.hub = newMachine(c, "hub", ^seed)
	c.hub.o.Writable = func(string) bool { return false }
	c.link = newLink(c)
	c.files = map[string]*plainFile{}
	c.maxPage = 4 + c.rng.IntN(30)
	c.w = pager.New(nil, c.rng)
	c.w.Step, c.w.Down = c.step, c.stopped
	return c
}

func (c *crasher) count(what string) { c.counts[what]++ }

func (c *crasher) fatalf(format string, args ...any) {
	c.t.Helper()
	c.t.Fatalf("seed %d (go test ./store -run TestCrashSoak -store.seed=%d): %s", c.seed, c.seed, fmt.Sprintf(format, args...))
}

// step is called by the stand-in before each of its calls.
func (c *crasher) step() {
	if c.stopped() {
		panic(pager.Killed{})
	}
	if c.killIn > 0 {
		if c.killIn--; c.killIn == 0 {
			panic(pager.Killed{})
		}
	}
}

// ops is how many operations of the disk a life lasts.
func (c *crasher) ops() int64 { return int64(1 + c.rng.IntN([]int{30, 300, 1500}[c.rng.IntN(3)])) }

func (c *crasher) run() {
	c.w.Logf = nil
	if c.verbose {
		c.w.Logf, c.w.Trace = c.logf, *crashOps
	}
	c.hub.boot(0)
	c.hub.stopAt = c.hub.d.Ordinal() + c.ops()
	c.hub.d.StopAt(c.hub.stopAt)
	for c.life = range 5 {
		ops := c.ops()
		if c.life == 4 {
			ops = 0
		}
		if c.open(ops) {
			c.work()
			if c.rng.IntN(4) == 0 && !c.stopped() {
				c.closeNode()
			}
		}
		c.crash()
	}
	if c.life++; !c.open(0) {
		c.fatalf("the last Open failed")
	}
	c.link.finish()
	c.verify()
	c.w.Kill()
	if err := c.st.Close(); err != nil {
		c.fatalf("Close: %v", err)
	}
	if err := c.hub.st.Close(); err != nil {
		c.fatalf("hub: Close: %v", err)
	}
}

func (c *crasher) closeNode() {
	c.w.Kill()
	if err := c.st.Close(); err == nil && !c.stopped() {
		c.count("clean stops")
		c.logf("closed")
	} else {
		c.logf("close: %v", err)
	}
}

func (c *crasher) crash() {
	c.w.Kill()
	c.remember()
	c.down()
	c.link.nodeDown()
}

// open starts the node and compares what it recovered. It returns false if the
// machine stopped meanwhile.
func (c *crasher) open(ops int64) bool {
	if !c.boot(ops) {
		return false
	}
	c.w.FS = watchedFS{testFS{c.st}, c}
	c.st.Attach(testPeer{c.w})
	c.undisturbed(func() {
		c.healthy()
		c.compare()
		c.compareFiles()
		c.link.nodeUp()
		c.checkInvariants()
	})
	c.wasCut = false
	return true
}

// remember keeps what the databases were, for the hub's sake.
func (c *crasher) remember() {
	for name, db := range c.w.DBs {
		if c.past[name] == nil {
			c.past[name] = map[uint64]bool{contentKey(nil): true}
		}
		for _, v := range db.Versions {
			c.past[name][contentKey(v.Bytes())] = true
		}
	}
}

func contentKey(b []byte) uint64 { return maphash.Bytes(sectorSeed, b) }

// compare finds for each database the committed transaction that the recovered
// content is at.
func (c *crasher) compare() {
	type member struct {
		db   *pager.DB
		have bool
	}
	groups := map[int][]member{}
	for _, name := range c.w.Names() {
		m := c.w.DBs[name]
		need := 0
		for i, v := range m.Versions {
			if v.Void {
				continue
			}
			if v.Durable || v.Acked && !c.wasCut {
				need = i
			}
		}
		got := c.content(name)
		at := -1
		for i := len(m.Versions) - 1; i >= need; i-- {
			v := m.Versions[i]
			if (got == nil) == (v.Pages == nil) && bytes.Equal(got, v.Bytes()) {
				at = i
				break
			}
		}
		if at < 0 {
			c.explain(m, got, need)
		}
		for i, v := range m.Versions {
			if v.Group != 0 {
				groups[v.Group] = append(groups[v.Group], member{m, at >= i})
			}
		}
		c.logf("%s: version %d of %d, need %d", name, at, len(m.Versions)-1, need)
		c.count("comparisons")
		v := m.Versions[at]
		defer m.Forget(v)
	}
	for g, list := range groups {
		for _, x := range list[1:] {
			if x.have != list[0].have {
				c.fatalf("invariant 12: group %d is half there: %s %v, %s %v", g, list[0].db.Name, list[0].have, x.db.Name, x.have)
			}
		}
	}
}

// explain says how a database differs from what it should be, and fails.
func (c *crasher) explain(m *pager.DB, got []byte, need int) {
	what := "nothing that ever was"
	for i, v := range m.Versions {
		c.logf("version %d: %d bytes acked=%v durable=%v void=%v", i, len(v.Bytes()), v.Acked, v.Durable, v.Void)
		if (got == nil) == (v.Pages == nil) && bytes.Equal(got, v.Bytes()) {
			what = fmt.Sprintf("version %d", i)
		}
	}
	c.diff(m.Name, got, m.Versions[len(m.Versions)-1])
	c.diff(m.Name, got, m.Versions[need])
	c.fatalf("invariants 1, 2: %s has %d bytes, %s; want version %d to %d (cut=%v)", m.Name, len(got), what, need, len(m.Versions)-1, c.wasCut)
}

// diff says which pages are not those of v.
func (c *crasher) diff(name string, got []byte, v pager.Version) {
	if db := c.st.DB(name); db != nil {
		c.logf("%s: at %+v base %+v", name, db.at, db.base)
		_, _, err := db.Verify()
		c.logf("verify: %v", err)
	}
	for i, p := range v.Pages {
		if q := got[min(len(got), i*v.PageSize):min(len(got), (i+1)*v.PageSize)]; !bytes.Equal(p, q) {
			c.logf("page %d of size %d: got %x..., want %x...", i+1, v.PageSize, q[:min(8, len(q))], p[:8])
		}
	}
}

// content reads a database through the mount, nil if there is none.
func (c *crasher) content(name string) []byte {
	n, err := c.st.Lookup(name)
	if errors.Is(err, ErrNotExist) {
		return nil
	}
	if err != nil {
		c.fatalf("look up %s: %v", name, err)
	}
	if n.Kind() != KindDatabase {
		return nil
	}
	for _, suffix := range []string{"-journal", "-wal", "-shm"} {
		if (testFS{c.st}).Exists(name + suffix) {
			c.fatalf("invariant 24: %s%s exists after a start", name, suffix)
		}
	}
	h, err := n.Open(false)
	if err != nil {
		c.fatalf("open %s: %v", name, err)
	}
	defer h.Release()
	b := make([]byte, n.Attr().Size)
	if k, err := h.ReadAt(b, 0); err != nil || k != len(b) {
		c.fatalf("read %s: %d of %d, %v", name, k, len(b), err)
	}
	return b
}

// work runs programs and the link until the machine stops or enough was done.
func (c *crasher) work() {
	for range 10 + c.rng.IntN(60) {
		if c.stopped() {
			return
		}
		c.trouble()
		c.hub.trouble()
		if c.rng.IntN(12) == 0 {
			c.killIn = 1 + c.rng.IntN(25)
		}
		alive := c.w.Run(c.act)
		c.killIn = 0
		if !alive {
			if c.stopped() {
				return
			}
			c.count("killed programs")
			c.logf("program killed")
			if c.rng.IntN(2) == 0 {
				c.w.Orphan()
				c.count("killed programs beside others")
			} else {
				c.w.Kill()
			}
			if c.rng.IntN(2) == 0 {
				c.st.resolveAll(true)
			}
		}
		if !c.stopped() {
			c.link.act()
		}
		if c.stopped() {
			return
		}
		c.background()
		if !c.stopped() {
			c.checkInvariants()
		}
		if c.hub.stopped() {
			c.link.hubDown()
			continue
		}
		c.hub.background()
		if c.hub.stopped() {
			c.link.hubDown()
			continue
		}
		c.hub.checkInvariants()
	}
}

// want lists what TestCrashSoak must have met, each at least so often in 5,000
// crash points: a check that is never reached does not count.
var want = map[string]int{
	"crash points": 5000,
	"cuts":         1000, "kills": 1000, "crashes in Open": 100, "clean stops": 50, "killed programs": 100, "comparisons": 1000, "verified databases": 1000,
	"injected faults": 100, "bounded disks": 20, "full disks": 20, "failed calls": 100,
	"killed programs beside others": 50, "crashes of the hub": 100, "failed commit events": 3,
	"flushes": 100, "checkpoints": 100, "log flushes": 100,
	"commits in delete": 500, "commits in truncate": 50, "commits in persist": 50, "commits in wal": 50,
	"groups": 100, "checkpoints of a WAL": 100, "closed WALs": 50, "changes of the journal mode": 50, "vacuums": 50, "checks": 500,
	"drops": 50, "copies": 20, "renames to a new name": 10, "renames over a database": 50, "exports": 50, "new histories": 50,
	"transactions without a change": 100, "refused writes": 100, "removed remains": 3,
	"written files": 100, "removed files": 20, "renamed files": 10, "read files": 100, "synced files found again": 100,
	"shipments": 1000, "compacted shipments": 100, "shipped snapshots": 100, "gaps": 20, "broken sessions": 100, "acks": 1000, "acks taken back": 50,
	"applied records": 1000, "applied replacements": 50, "applied groups": 50, "branches found again": 50, "snapshots for a hub that went back": 20,
	"corrupt records": 50, "torn records": 50, "records of another history": 20, "records from the future": 3,
	"records that outlived their node": 50, "positions known again": 500, "databases equal in the end": 500,
}

// TestCrashSoak lets a node and its hub die, over and over, at random operations
// of their disks, by a kill or a power cut, also while they recover, looks at
// what is left on the disk, and compares what is found again with what SQLite, and
// the node, were told.
func TestCrashSoak(t *testing.T) {
	if *crashSeed != 0 {
		c := newCrasher(t, *crashSeed)
		c.verbose = true
		c.run()
		return
	}
	sum := soak(t, *crashPoints)
	if t.Failed() {
		return
	}
	for _, what := range slices.Sorted(maps.Keys(want)) {
		if n := sum[what]; n < want[what] && *crashPoints >= 5000 {
			t.Errorf("%d %s, want at least %d: the test does not reach them", n, what, want[what])
		}
	}
}

// soak runs seeds, from 1 on, until they came to so many crash points.
func soak(t *testing.T, points int) map[string]int {
	var mu sync.Mutex // guards what follows
	sum := map[string]int{}
	next := uint64(1)
	start := time.Now()
	t.Run("seeds", func(t *testing.T) {
		for i := range runtime.GOMAXPROCS(0) {
			t.Run(fmt.Sprint(i), func(t *testing.T) {
				t.Parallel()
				for {
					mu.Lock()
					seed, done := next, sum["crash points"] >= points || t.Failed()
					next++
					mu.Unlock()
					if done {
						return
					}
					c := newCrasher(t, seed)
					c.run()
					mu.Lock()
					for what, n := range c.counts {
						sum[what] += n
					}
					mu.Unlock()
				}
			})
		}
	})
	t.Logf("%v in %s", sum, time.Since(start).Round(time.Millisecond))
	return sum
}

// posOf names a position of one line.
type posOf struct {
	history uint64
	pos     ltx.Pos
}
