package store

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
)

// While the log waits for the disk, reads, stat, and the UNLINK that ends a
// prepared transaction, wait for nobody (invariant 20).
func TestReadWaitsForNoDisk(t *testing.T) {
	d := simdisk.New(simdisk.Options{})
	st := newTestStore(t, d)
	w := pager.New(testFS{st}, rand.New(rand.NewPCG(1, 2)))
	st.Attach(testPeer{w})
	db := w.DB("a.db")
	db.Sync = pager.Off
	if err := db.Commit(pager.Change{PageSize: 1024, Count: 3, Pages: map[int][]byte{2: make([]byte, 1024), 3: make([]byte, 1024)}}); err != nil {
		t.Fatal(err)
	}
	n, err := st.Lookup("a.db")
	if err != nil {
		t.Fatal(err)
	}
	h, err := n.Open(false)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Release()

	waits, free := make(chan struct{}), make(chan struct{})
	d.SetHook(func(op simdisk.Op) error {
		if op.Kind == simdisk.OpDatasync {
			d.SetHook(nil)
			close(waits)
			<-free
		}
		return nil
	})
	flushed := make(chan error)
	go func() { flushed <- st.flushAll() }()
	<-waits
	done := make(chan error)
	go func() {
		_ = n.Attr()
		_, err := h.ReadAt(make([]byte, 1024), 1024)
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("invariant 20: a READ waits for the disk")
	}
	close(free)
	if err := <-flushed; err != nil {
		t.Error(err)
	}
	w.Kill()
}
