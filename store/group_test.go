package store

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// Many databases, each just below the bound of a side file, do not fit one log
// record: the transaction over all of them commits all the same.
func TestGroupBeyondOneRecord(t *testing.T) {
	d := simdisk.New(simdisk.Options{})
	st := newTestStore(t, d)
	w := pager.New(testFS{st}, rand.New(rand.NewPCG(1, 2)))
	st.Attach(testPeer{w})
	var dbs []*pager.DB
	var changes []pager.Change
	for i := range 8 {
		db := w.DB(fmt.Sprintf("%d.db", i))
		db.Sync = pager.Full
		ch := pager.Change{PageSize: 1024, Count: 15, Pages: map[int][]byte{}}
		for pgno := 2; pgno <= ch.Count; pgno++ {
			p := make([]byte, 1024)
			for k := range p {
				p[k] = byte(w.Rand.Uint32())
			}
			ch.Pages[pgno] = p
		}
		dbs, changes = append(dbs, db), append(changes, ch)
	}
	if err := w.Group(dbs, changes); err != nil {
		t.Fatal(err)
	}
	for _, db := range dbs {
		if err := db.Check(); err != nil {
			t.Fatal(err)
		}
		if _, _, err := st.DB(db.Name).Verify(); err != nil {
			t.Fatal(err)
		}
	}
	w.Kill()
}

// The parts of a transaction over several databases stay bound to each other when
// the log has given their record up, over a restart too, and the file that binds
// them goes with the last one (invariant 12).
func TestGroupBeyondTheLog(t *testing.T) {
	d := simdisk.New(simdisk.Options{})
	opt := Options{FS: d, Node: "n", SegmentSize: 64 << 10, Large: 8 << 10, Shipping: true, inline: true}
	w := pager.New(nil, rand.New(rand.NewPCG(3, 4)))
	open := func() *Store {
		st, err := Open(opt)
		if err != nil {
			t.Fatal(err)
		}
		w.FS = testFS{st}
		st.Attach(testPeer{w})
		return st
	}
	st := open()
	dbs := []*pager.DB{w.DB("a.db"), w.DB("b.db")}
	commit := func(pages int) {
		t.Helper()
		var changes []pager.Change
		for _, db := range dbs {
			db.Sync = pager.Full
			ch := db.RandomChange(pages)
			ch.Rollback = false
			changes = append(changes, ch)
		}
		if err := w.Group(dbs, changes); err != nil {
			t.Fatal(err)
		}
	}
	giveUp := func() {
		t.Helper()
		if err := st.checkpoint(st.wlog.Durable() + 1); err != nil {
			t.Fatal(err)
		}
	}
	files := func() int {
		list, err := d.ReadDir(groupsDir)
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	commit(4)
	commit(64) // its parts are side files
	giveUp()
	check := func(when string) {
		t.Helper()
		var after [2]ltx.Pos
		for n := 1; n <= 2; n++ {
			var ships [2]*Shipment
			for i, db := range dbs {
				s, err := st.DB(db.Name).Next(after[i], 1, 1<<20)
				if err != nil {
					t.Fatalf("%s: transaction %d of %s: %v", when, n, db.Name, err)
				}
				if _, _, err := ltx.Verify(s.Body); err != nil {
					t.Fatalf("%s: transaction %d of %s: %v", when, n, db.Name, err)
				}
				_ = s.Body.Close()
				ships[i], after[i] = s, s.Pos()
			}
			if g := ships[0].Group; g == 0 || ships[1].Group != g || len(ships[0].Parts) != 2 || ships[0].Records != 1 {
				t.Fatalf("%s: transaction %d is shipped as %+v and %+v, want two parts of one group", when, n, ships[0], ships[1])
			}
		}
	}
	check("after the log gave it up")
	if got := files(); got != 2 {
		t.Errorf("%d group files, want 2", got)
	}
	for range 2 { // the second time nothing of it is in the log at all
		w.Kill()
		if err := st.Close(); err != nil {
			t.Fatal(err)
		}
		st = open()
		check("after a restart")
		giveUp()
	}
	for i, db := range dbs {
		x := st.DB(db.Name)
		if err := x.SetAcked(x.Pos()); err != nil {
			t.Fatal(err)
		}
		opt.Now = func() time.Time { return time.Now().Add(time.Hour) }
		x.st.opt.Now = opt.Now
		commit(2)
		giveUp()
		// The first two go when both databases need them no more.
		if got, want := files(), 3-i; got != want {
			t.Errorf("%d databases acknowledged: %d group files, want %d", i+1, got, want)
		}
	}
	w.Kill()
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
}

// A journal in a spill file that cannot be read when the super-journal goes: the
// transaction fails, since SQLite takes every error after that for none.
func TestGroupWithUnreadableJournal(t *testing.T) {
	d := simdisk.New(simdisk.Options{})
	st, err := Open(Options{FS: d, Node: "n", SegmentSize: 256 << 10, Memory: 1 << 10, inline: true})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	reads := 0
	w := pager.New(removeFS{testFS{st}, func(name string) {
		if strings.Contains(name, "-mj") {
			d.SetHook(func(op simdisk.Op) error {
				if op.Kind == simdisk.OpRead && strings.HasSuffix(op.Name, "(unnamed)") {
					reads++
					return syscall.EIO
				}
				return nil
			})
		}
	}}, rand.New(rand.NewPCG(1, 2)))
	st.Attach(testPeer{w})
	var dbs []*pager.DB
	for i := range 2 {
		db := w.DB(fmt.Sprintf("%d.db", i))
		db.Sync = pager.Full
		dbs = append(dbs, db)
	}
	change := func(n int) pager.Change {
		ch := pager.Change{PageSize: 1024, Count: 40, Pages: map[int][]byte{}}
		for pgno := 2; pgno <= ch.Count; pgno++ {
			ch.Pages[pgno] = []byte(strings.Repeat(string(rune('a'+n)), 1024))
		}
		return ch
	}
	if err := w.Group(dbs, []pager.Change{change(0), change(1)}); err == nil {
		t.Error("a group with an unreadable journal: got no error")
	}
	d.SetHook(nil)
	if reads == 0 {
		t.Error("no journal was read from a spill file: this tests nothing")
	}
	for _, db := range dbs {
		if pos := st.DB(db.Name); pos != nil {
			t.Errorf("%s: got %v, want no transaction", db.Name, pos.Pos())
		}
	}
	w.Kill()
}

// removeFS calls before ahead of each Remove.
type removeFS struct {
	testFS
	before func(name string)
}

func (r removeFS) Remove(name string) error {
	r.before(name)
	return r.testFS.Remove(name)
}
