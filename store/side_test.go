package store

import (
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
)

// A silentPeer cannot say who holds which lock.
type silentPeer struct{ testPeer }

func (silentPeer) Reserved(Node) (bool, error) { return false, errors.New("asked for locks") }

// UNLINK blocks its folder, so it must not wait for the mount to open a file
// there; of a WAL whose pages are all in the database nothing is to be asked.
func TestUnlinkOfSpentWALAsksNobody(t *testing.T) {
	st := newTestStore(t, simdisk.New(simdisk.Options{}))
	w := pager.New(testFS{st}, rand.New(rand.NewPCG(1, 2)))
	st.Attach(testPeer{w})
	db := w.DB("a.db")
	for _, err := range []error{db.Commit(db.RandomChange(5)), db.SetMode(pager.WAL), db.Commit(db.RandomChange(5))} {
		if err != nil {
			t.Fatal(err)
		}
	}
	st.Attach(silentPeer{testPeer{w}})
	if err := st.Unlink("a.db-wal"); err == nil {
		t.Fatal("the WAL holds pages: got nil, want the peer's error")
	}
	st.Attach(testPeer{w})
	if err := db.Checkpoint(false); err != nil {
		t.Fatal(err)
	}
	st.Attach(silentPeer{testPeer{w}})
	if err := st.Unlink("a.db-wal"); err != nil {
		t.Errorf("the WAL is spent: got %v, want nil", err)
	}
	w.Kill()
}
