package hub_test

import (
	"flag"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
)

var churn = flag.Int64("hub.churn", 24<<20, "bytes that TestOutage writes while the hub is away")

// treeSize returns the bytes of files below a folder, and the names of those
// with an ending.
func treeSize(t *testing.T, fs disk.FS, dir, ext string) (size int64, names []string) {
	t.Helper()
	list, err := fs.ReadDir(dir)
	if err != nil {
		return 0, nil
	}
	for _, e := range list {
		name := path.Join(dir, e.Name())
		if e.IsDir() {
			n, more := treeSize(t, fs, name, ext)
			size, names = size+n, append(names, more...)
			continue
		}
		fi, err := e.Info()
		if err != nil {
			continue // removed meanwhile
		}
		if base := path.Base(name); base != "data" && base != "sums" && base != "meta" {
			size += fi.Size()
		}
		if strings.HasSuffix(name, ext) {
			names = append(names, name)
		}
	}
	return size, names
}

// touch commits new content for n random pages of a database of count pages,
// which nothing can compress.
func (r *rig) touch(name string, count, n int) {
	r.tb.Helper()
	db := r.world.DB(name)
	db.Sync = pager.Full
	ch := pager.Change{PageSize: 1024, Count: count, Pages: map[int][]byte{}}
	pages := func(pgno int) {
		p := make([]byte, 1024)
		for i := 0; i < len(p); i += 8 {
			v := r.rng.Uint64()
			for k := range 8 {
				p[i+k] = byte(v >> (8 * k))
			}
		}
		ch.Pages[pgno] = p
	}
	for range n {
		pages(2 + r.rng.IntN(count-1))
	}
	for pgno := len(db.Head().Pages) + 1; pgno <= count; pgno++ {
		if pgno > 1 {
			pages(pgno)
		}
	}
	if err := db.Commit(ch); err != nil {
		r.tb.Fatalf("commit in %s: %v", name, err)
	}
	db.Forget(db.Head())
}

// A node without its hub for a week goes on within its budget, whatever the
// databases' size and however often the power goes, and then everything arrives:
// first as single positions, then as one record, in the end as changed pages.
func TestOutage(t *testing.T) {
	r := newRig(t, 17)
	r.nodeOpt.Budget = 1 << 20
	r.nodeOpt.BacklogStep = 5 * time.Minute
	now := time.Now()
	r.nodeOpt.Now = func() time.Time { return now }
	r.startHub()
	r.startNode()
	r.touch("wide.db", 4000, 1)
	r.touch("hot.db", 20, 1)
	r.touch("small.db", 5, 1)
	r.settle()
	history := r.node.DB("wide.db").Place().History
	addr := r.relay.aimed()
	r.relay.aim("")
	var written, most int64
	sets := false
	rounds := 0
	const week = 7 * 24 * time.Hour
	for written < *churn {
		wide := 4
		if written < *churn/4 {
			wide = 0 // at first only what one record can hold
		}
		for range 40 {
			r.touch("hot.db", 20, 8)
			if wide > 0 {
				r.touch("wide.db", 4000, wide)
			}
			written += int64(8+wide) << 10
			now = now.Add(week * 40 / time.Duration(*churn/(10<<10)*40))
		}
		r.touch("small.db", 5, 2)
		if rounds++; rounds%13 == 0 {
			r.cutNode()
			r.startNode()
		}
		size, names := treeSize(t, r.nodeFS, ".", ".pages")
		if written > 2<<20 { // by then what made the databases has gone
			most = max(most, size)
		}
		if len(names) > 0 {
			sets = true
			if wide == 0 {
				t.Fatalf("%s: only the changed pages are kept where one record would do", names)
			}
		}
	}
	// The log may be a segment or two ahead of its checkpoints, and a file is
	// written before the one that it replaces goes.
	if limit := r.nodeOpt.Budget + 512<<10; most > limit {
		t.Errorf("log and level files took %d bytes, the budget is %d", most, r.nodeOpt.Budget)
	}
	if !sets {
		t.Error("the backlog never shrank to a set of pages")
	}
	r.relay.aim(addr)
	for range 20 {
		r.touch("wide.db", 4000, 4)
		r.touch("hot.db", 20, 2)
		time.Sleep(2 * time.Millisecond) // programs go on writing while it is sent
	}
	r.settle()
	db := r.node.DB("wide.db")
	if got := db.Place().History; got != history {
		t.Errorf("history %016x, want %016x as before", got, history)
	}
	if n := len(r.hub.DB("nodes/n1/wide.db").Branches()); n != 0 {
		t.Errorf("%d branches at the hub, want none", n)
	}
	t.Logf("%d MiB written, at most %d KiB of log and level files", written>>20, most>>10)
}
