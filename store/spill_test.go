package store

import (
	"errors"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
)

// A WAL in a spill file that cannot be read when SQLite begins it again: commits
// fail from then on. Were the header taken for none, nobody would see them.
func TestUnreadableWAL(t *testing.T) {
	d := simdisk.New(simdisk.Options{})
	st, err := Open(Options{FS: d, Node: "n", SegmentSize: 256 << 10, Memory: 1 << 10, inline: true})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	w := pager.New(testFS{st}, rand.New(rand.NewPCG(1, 2)))
	st.Attach(testPeer{w})
	db := w.DB("a.db")
	db.Sync = pager.Off
	n, last := 0, uint64(0)
	commit := func() error {
		n++
		ch := pager.Change{PageSize: 1024, Count: 20, Pages: map[int][]byte{}}
		for pgno := 2; pgno <= ch.Count; pgno++ {
			ch.Pages[pgno] = []byte(strings.Repeat(string(rune('a'+n)), 1024))
		}
		return db.Commit(ch)
	}
	if err := commit(); err != nil {
		t.Fatal(err)
	}
	if err := db.SetMode(pager.WAL); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := commit(); err != nil {
			t.Fatal(err)
		}
	}
	last = uint64(st.DB("a.db").Pos().TXID)
	if err := db.Checkpoint(false); err != nil {
		t.Fatal(err)
	}
	reads := 0
	d.SetHook(func(op simdisk.Op) error {
		if op.Kind == simdisk.OpRead && strings.HasSuffix(op.Name, "(unnamed)") {
			reads++
			return syscall.EIO
		}
		return nil
	})
	acked := uint64(0)
	for range 3 {
		if err := commit(); err == nil {
			acked++
		} else if !errors.Is(err, syscall.EIO) {
			t.Errorf("commit: got %v, want EIO", err)
		}
	}
	d.SetHook(nil)
	if reads == 0 {
		t.Error("nothing was read from a spill file: this tests nothing")
	}
	if got := uint64(st.DB("a.db").Pos().TXID) - last; got != acked {
		t.Errorf("%d commits were acknowledged, %d are in the log", acked, got)
	}
	w.Kill()
}

// A checkpoint that fails behind the first of two side files is repeated: that
// file has its new name by then.
func TestCheckpointAgain(t *testing.T) {
	d := simdisk.New(simdisk.Options{})
	st, err := Open(Options{FS: d, Node: "n", SegmentSize: 64 << 10, Large: 8 << 10, Shipping: true, inline: true})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	w := pager.New(testFS{st}, rand.New(rand.NewPCG(1, 2)))
	st.Attach(testPeer{w})
	db := w.DB("a.db")
	db.Sync = pager.Full
	for n := range 2 {
		ch := pager.Change{PageSize: 1024, Count: 20, Pages: map[int][]byte{}}
		for pgno := 2; pgno <= ch.Count; pgno++ {
			ch.Pages[pgno] = []byte(strings.Repeat(string(rune('a'+n)), 1024))
		}
		if err := db.Commit(ch); err != nil {
			t.Fatal(err)
		}
	}
	w.Kill()
	renames := 0
	d.SetHook(func(op simdisk.Op) error {
		if op.Kind == simdisk.OpRename && strings.HasSuffix(op.Name, extSide) {
			if renames++; renames == 2 {
				return syscall.ENOSPC
			}
		}
		return nil
	})
	below := st.wlog.Durable() + 1
	if err := st.checkpoint(below); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("checkpoint on a full disk: got %v, want ENOSPC", err)
	}
	if err := st.checkpoint(below); err != nil {
		t.Errorf("the checkpoint again: %v", err)
	}
	if _, _, err := st.DB("a.db").Verify(); err != nil {
		t.Error(err)
	}
}
