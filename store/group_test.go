package store

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
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
