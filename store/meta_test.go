package store

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// The metadata that names a new base is on the disk before the log may use the
// segments again that the base made dispensable.
func TestMetadataBeforeReuse(t *testing.T) {
	for seed := range uint64(8) {
		d := simdisk.New(simdisk.Options{Seed: seed})
		opt := Options{FS: d, Node: "n", SegmentSize: 16 << 10, inline: true}
		st, err := Open(opt)
		if err != nil {
			t.Fatal(err)
		}
		w := pager.New(testFS{st}, rand.New(rand.NewPCG(seed, 1)))
		st.Attach(testPeer{w})
		commit := func(name string) {
			t.Helper()
			db := w.DB(name)
			db.Sync = pager.Full
			ch := db.RandomChange(8)
			ch.Rollback = false
			if err := db.Commit(ch); err != nil {
				t.Fatal(err)
			}
		}
		for range 5 {
			commit("a.db")
		}
		// Checkpoints of the other databases alone do not write a.db's again.
		first := st.wlog.Segments()[0].Seq
		for st.wlog.Segments()[0].Seq < first+8 {
			commit("b.db")
			if err := st.checkpoint(st.wlog.Durable() + 1); err != nil {
				t.Fatal(err)
			}
		}
		want := st.DB("a.db").Pos()
		w.Kill()
		st.abandon()
		opt.FS = d.Cut(rand.New(rand.NewPCG(seed, 2)))
		if st, err = Open(opt); err != nil {
			t.Fatal(err)
		}
		db := st.DB("a.db")
		if db == nil || db.Pos() != want || db.fenced() != nil {
			t.Fatalf("seed %d: a.db is %v after a power cut, want it at %s", seed, db, want)
		}
		if _, _, err := db.Verify(); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if err := st.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// The metadata reflects no log record that a power cut may take: its number will be
// another record's, which then counts.
func TestMetadataNamesDurableRecords(t *testing.T) {
	for seed := range uint64(16) {
		namesDurable(t, seed)
	}
}

func namesDurable(t *testing.T, seed uint64) {
	t.Helper()
	d := simdisk.New(simdisk.Options{Seed: seed})
	opt := Options{FS: d, Node: "n", SegmentSize: 64 << 10, Shipping: true, inline: true}
	w := pager.New(nil, rand.New(rand.NewPCG(3, 1)))
	open := func() *Store {
		t.Helper()
		opt.FS = d
		st, err := Open(opt)
		if err != nil {
			t.Fatal(err)
		}
		w.FS = testFS{st}
		st.Attach(testPeer{w})
		return st
	}
	st := open()
	db := w.DB("a.db")
	db.Sync = pager.Full
	for range 3 {
		ch := db.RandomChange(8)
		ch.Rollback = false
		if err := db.Commit(ch); err != nil {
			t.Fatal(err)
		}
	}
	x := st.DB("a.db")
	if err := x.SetAcked(ltx.Pos{TXID: 1, PostApplyChecksum: x.recs.list[0].post}); err != nil {
		t.Fatal(err)
	}
	x.mu.Lock()
	x.ackWritten, x.ackTime = 0, time.Time{}
	x.mu.Unlock()
	if err := x.SetAcked(x.Pos()); err != nil { // appended, and not durable
		t.Fatal(err)
	}
	if err := x.SetAcked(ltx.Pos{}); err != nil {
		t.Fatal(err)
	}
	if lost := max(x.last, x.lastAny); lost <= st.wlog.Durable() {
		t.Fatalf("record %d is durable: the test shows nothing", lost)
	}
	if err := st.moveBases([]*DB{x}, 0); err != nil {
		t.Fatal(err)
	}
	cut := func() {
		w.Kill()
		old := st
		d = d.Cut(rand.New(rand.NewPCG(seed, 1))) // first: what the log closes with is lost too
		old.abandon()
		st = open()
	}
	cut()
	sh, err := st.DB("a.db").Next(ltx.Pos{}, 0, 0) // its sent mark takes the number
	if err != nil {
		t.Fatal(err)
	}
	_ = sh.Body.Close()
	cut()
	x = st.DB("a.db")
	if got := x.recs.boundary(); got < sh.Max {
		t.Errorf("seed %d: what was handed to a link ends at %d after two power cuts, want %d or more", seed, got, sh.Max)
	}
	w.Kill()
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
}
