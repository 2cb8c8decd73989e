package store

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// copyRecords applies what follows a position at one engine to another one.
func copyRecords(t *testing.T, from *DB, to *Store, after ltx.Pos) ltx.Pos {
	t.Helper()
	for {
		sh, err := from.Next(after, 0, 0)
		if err != nil {
			return after
		}
		b, err := io.ReadAll(sh.Body)
		if err != nil {
			t.Fatal(err)
		}
		_ = sh.Body.Close()
		if _, err := to.Apply(Incoming{Name: from.Name(), History: sh.History, Epoch: sh.Epoch, LTX: bytes.NewReader(b), Size: int64(len(b))}); err != nil {
			t.Fatal(err)
		}
		after = sh.Pos()
	}
}

// At the hub a position is acked once it is durable, not when it shows.
func TestAckedAtHome(t *testing.T) {
	node := newTestStore(t, simdisk.New(simdisk.Options{}))
	w := pager.New(testFS{node}, rand.New(rand.NewPCG(5, 6)))
	node.Attach(testPeer{w})
	db := w.DB("a.db")
	db.Sync = pager.Full
	commit := func() ltx.Pos {
		ch := db.RandomChange(4)
		ch.Rollback = false
		if err := db.Commit(ch); err != nil {
			t.Fatal(err)
		}
		return node.DB("a.db").Pos()
	}
	home, err := Open(Options{FS: simdisk.New(simdisk.Options{}), Node: "hub", SegmentSize: 64 << 10, Home: true, inline: true})
	if err != nil {
		t.Fatal(err)
	}
	first := commit()
	copyRecords(t, node.DB("a.db"), home, ltx.Pos{})
	there := home.DB("a.db")
	if err := there.Sync(); err != nil {
		t.Fatal(err)
	}
	if got := there.Acked(); got != first {
		t.Errorf("after the flush: acked %s, want %s", got, first)
	}
	second := commit()
	copyRecords(t, node.DB("a.db"), home, first)
	if got := there.Pos(); got != second {
		t.Fatalf("position %s, want %s", got, second)
	}
	if got := there.Acked(); got != first {
		t.Errorf("before the flush: acked %s, want %s", got, first)
	}
	if err := there.Sync(); err != nil {
		t.Fatal(err)
	}
	if got := there.Acked(); got != second {
		t.Errorf("after the second flush: acked %s, want %s", got, second)
	}
	w.Kill()
	if err := home.Close(); err != nil {
		t.Fatal(err)
	}
}
