package store

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
)

// A disk that refuses the last transactions at the start damages nothing: that
// database is held back, reads too, others are served, and it comes back when the
// disk takes them.
func TestRecoveryWaitsForDisk(t *testing.T) {
	d := simdisk.New(simdisk.Options{})
	opt := Options{FS: d, Node: "n", SegmentSize: 64 << 10, inline: true}
	st, err := Open(opt)
	if err != nil {
		t.Fatal(err)
	}
	w := pager.New(testFS{st}, rand.New(rand.NewPCG(7, 8)))
	st.Attach(testPeer{w})
	commit := func(name string) {
		t.Helper()
		db := w.DB(name)
		db.Sync = pager.Full
		ch := db.RandomChange(10)
		ch.Rollback = false
		if err := db.Commit(ch); err != nil {
			t.Fatal(err)
		}
	}
	for range 5 {
		commit("a.db")
		commit("b.db")
	}
	w.Kill()
	want := map[string][]byte{"a.db": w.DB("a.db").Head().Bytes(), "b.db": w.DB("b.db").Head().Bytes()}
	pos := st.DB("a.db").Pos()
	for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EIO} {
		st.abandon()
		d = d.Cut(rand.New(rand.NewPCG(9, 9)))
		opt.FS = d
		d.SetHook(func(op simdisk.Op) error {
			if op.Kind == simdisk.OpWrite && strings.HasPrefix(op.Name, "dbs/a.db/data") {
				return errno
			}
			return nil
		})
		if st, err = Open(opt); err != nil {
			t.Fatal(err)
		}
		read := func(name string) ([]byte, error) {
			db := st.DB(name)
			p := make([]byte, db.size.Load())
			return p, db.readAt(p, 0)
		}
		db := st.DB("a.db")
		if err := db.Damaged(); err != nil {
			t.Errorf("%s: taken for damage: %v", errno, err)
		}
		if _, err := read("a.db"); err == nil {
			t.Errorf("%s: a.db can be read in the middle of a transaction", errno)
		}
		if db.fenced() == nil || !strings.Contains(db.fenced().Error(), "free space") {
			t.Errorf("%s: a.db is not fenced with a cure: %v", errno, db.fenced())
		}
		if got, err := read("b.db"); err != nil || !bytes.Equal(got, want["b.db"]) {
			t.Errorf("%s: b.db is not there: %v", errno, err)
		}
		if got := db.Pos(); got != pos {
			t.Errorf("%s: a.db is at %s, want %s", errno, got, pos)
		}
		if db.release() {
			t.Errorf("%s: it comes back while the disk refuses", errno)
		}
		d.SetHook(nil)
		if !db.release() || db.fenced() != nil {
			t.Fatalf("%s: it does not come back: %v", errno, db.fenced())
		}
		for name := range want {
			if got, err := read(name); err != nil || !bytes.Equal(got, want[name]) {
				t.Errorf("%s: %s is not what was committed: %v", errno, name, err)
			}
			if _, _, err := st.DB(name).Verify(); err != nil {
				t.Error(err)
			}
		}
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
}
