package store

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// A commit frame that SQLite repeats up to the end of a sector, and headers that it
// writes again in order (iReCksum), make one transaction.
func TestRepeatedAndRewrittenFrames(t *testing.T) {
	r := newTrap(t, nil)
	db := r.made("a.db", pager.WAL, 6)
	at := r.txid("a.db")
	for range 60 { // the stand-in repeats the frame of one commit in three
		ch := r.change(db, 6, 2)
		ch.Spill = r.w.Rand.IntN(4) // written before the commit, and their headers again
		r.must(db.Commit(ch))
		if at++; r.txid("a.db") != at {
			t.Fatalf("the database is at %d after a commit, want %d", r.txid("a.db"), at)
		}
		r.must(db.Check())
	}
	r.again(false)
}

// VACUUM to another page size writes pages of the old size, and truncates before
// the commit or after it. Its rollback finds the old bytes.
func TestVacuumToAnotherPageSize(t *testing.T) {
	for _, to := range []int{512, 4096} {
		for _, late := range []bool{false, true} {
			for n := 0; ; n++ {
				r := newTrap(t, nil)
				db := r.made("a.db", pager.Delete, 9)
				ch := pager.Change{PageSize: to, Count: 5, Pages: map[int][]byte{}, Late: late}
				for pgno := 2; pgno <= ch.Count; pgno++ {
					ch.Pages[pgno] = r.page(to)
				}
				killed := r.killedAt(n, func() { r.must(db.Commit(ch)) })
				r.w.Kill()
				r.must(db.Check()) // of a killed program: rolled back, or there
				if n == 0 {
					if info := r.st.DB("a.db").Info(); info.PageSize != uint32(to) || info.Commit != 5 {
						t.Fatalf("%d pages of %d bytes, want 5 of %d", info.Commit, info.PageSize, to)
					}
				}
				r.verify()
				r.again(false)
				if n > 0 && !killed {
					break
				}
			}
		}
	}
}

// Zeros beyond the last page are an extension, as posix_fallocate and SIZE_HINT
// make it; anything else there is refused.
func TestZeroExtension(t *testing.T) {
	r := newTrap(t, nil)
	db := r.made("a.db", pager.Delete, 3)
	r.must(db.Check()) // opens it
	n, err := r.st.Lookup("a.db")
	r.must(err)
	h, err := n.Open(true)
	r.must(err)
	defer h.Release()
	for off := int64(3 * 1024); off < 16<<10; off += 512 { // one byte a block
		if _, err := h.WriteAt([]byte{0}, off); err != nil {
			t.Fatalf("a zero at %d: %v", off, err)
		}
	}
	r.must(h.Allocate(0, 64<<10))
	if got := n.Attr().Size; got != 64<<10 {
		t.Errorf("size %d after the extension, want 65536", got)
	}
	if _, err := h.WriteAt([]byte{1}, 5000); !errors.Is(err, ErrOverwrite) {
		t.Errorf("a byte beyond the last page without a lock: %v, want ErrOverwrite", err)
	}
	at := r.txid("a.db")
	r.must(db.Check())
	r.must(db.Commit(r.change(db, 4, 3)))
	if got := r.txid("a.db"); got != at+1 {
		t.Errorf("the extension made %d transactions", got-at-1)
	}
	r.again(false)
}

// Handles of a database that was removed read on, and write nothing; what is made
// under the name again continues its transactions.
func TestRemovedDatabase(t *testing.T) {
	for _, mode := range []pager.Mode{pager.Delete, pager.WAL} {
		r := newTrap(t, nil)
		db := r.made("a.db", mode, 3)
		r.must(db.Commit(r.change(db, 3, 2)))
		n, err := r.st.Lookup("a.db")
		r.must(err)
		h, err := n.Open(true)
		r.must(err)
		before := r.content("a.db")
		ino, at := n.Attr().Ino, r.txid("a.db")
		r.must(r.st.Unlink("a.db")) // while programs have it open
		for _, suffix := range []string{"", "-wal", "-shm", "-journal"} {
			if _, err := r.st.Lookup("a.db" + suffix); !errors.Is(err, ErrNotExist) {
				t.Errorf("%s: a.db%s is still there: %v", mode, suffix, err)
			}
		}
		got := make([]byte, len(before))
		if _, err := h.ReadAt(got, 0); err != nil || !bytes.Equal(got, before) && mode != pager.WAL {
			t.Errorf("%s: an old handle reads something else: %v", mode, err)
		}
		if _, err := h.WriteAt(before[:1024], 0); !errors.Is(err, ErrStale) {
			t.Errorf("%s: an old handle writes: %v, want ErrStale", mode, err)
		}
		h.Release()
		r.w.Kill()
		db.Forget(pager.Version{})
		db.Mode = pager.Delete
		r.must(db.Commit(r.change(db, 2, 2)))
		if got := r.txid("a.db"); got != at+2 {
			t.Errorf("%s: the new database is at %d, want %d", mode, got, at+2)
		}
		n, err = r.st.Lookup("a.db")
		r.must(err)
		if n.Attr().Ino == ino {
			t.Errorf("%s: inode %d again", mode, ino)
		}
		r.again(false)
	}
}

// invalidations notes what the kernel is told to forget.
type invalidations struct {
	testPeer
	mu   sync.Mutex
	list []string
}

func (p *invalidations) InvalidateData(n Node, _, _ int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.list = append(p.list, n.(interface{ Path() string }).Path())
}

// When the engine discards what a transaction wrote, the kernel forgets the pages
// of it that it may have.
func TestDiscardedPagesAreForgotten(t *testing.T) {
	d := simdisk.New(simdisk.Options{})
	st, err := Open(Options{FS: d, Node: "n", SegmentSize: 64 << 10}) // with its goroutines
	if err != nil {
		t.Fatal(err)
	}
	w := pager.New(testFS{st}, rand.New(rand.NewPCG(1, 2)))
	r := &trap{t: t, d: d, st: st, w: w}
	peer := &invalidations{testPeer: testPeer{w}}
	st.Attach(peer)
	db := r.made("a.db", pager.Delete, 4)
	for n := 1; ; n++ {
		if !r.killedAt(n, func() { r.must(db.Commit(r.change(db, 4, 2))) }) {
			t.Fatal("no journal with changes was ever left")
		}
		w.Kill()
		x := st.DB("a.db")
		x.mu.Lock()
		open := x.journal != nil && x.journal.open
		x.mu.Unlock()
		if open {
			break
		}
		r.must(db.Check())
	}
	r.must(db.RemoveRemains())
	if err := st.Close(); err != nil { // waits for what is told later
		t.Fatal(err)
	}
	peer.mu.Lock()
	defer peer.mu.Unlock()
	if !slices.Contains(peer.list, "a.db") {
		t.Errorf("the kernel was told to forget %q, want a.db", peer.list)
	}
	w.Kill()
}

// An export needs no lock of SQLite's: it holds what is committed, in the middle
// of a transaction, and says where that is.
func TestExportInTheMiddle(t *testing.T) {
	for n := 1; ; n++ {
		r := newTrap(t, nil)
		db := r.made("a.db", pager.Delete, 6)
		want, at := r.content("a.db"), r.st.DB("a.db").Pos()
		killed := r.killedAt(n, func() { r.must(db.Commit(r.change(db, 9, 2))) })
		img, err := r.st.DB("a.db").Snapshot()
		r.must(err)
		var b bytes.Buffer
		_, err = img.WriteTo(&b)
		r.must(errors.Join(err, img.Close()))
		if killed && img.Pos == at && !bytes.Equal(b.Bytes(), want) {
			t.Fatalf("call %d: the export at %s is not what is committed", n, at)
		}
		var total ltx.Checksum
		for i := 0; i < b.Len(); i += 1024 {
			total ^= ltx.PageChecksum(uint32(i/1024+1), b.Bytes()[i:i+1024])
		}
		if total|ltx.ChecksumFlag != img.Pos.PostApplyChecksum {
			t.Fatalf("call %d: the export says %s, its pages give %s", n, img.Pos, total|ltx.ChecksumFlag)
		}
		if !killed {
			return
		}
	}
}

// A new history begins with what is there, wherever a crash interrupts that.
func TestNewHistoryInterrupted(t *testing.T) {
	for stop := int64(1); ; stop++ {
		r := newTrap(t, func(o *Options) { o.Shipping = true })
		db := r.made("a.db", pager.Delete, 5)
		r.must(db.Commit(r.change(db, 5, 2)))
		x := r.st.DB("a.db")
		r.must(x.SetAcked(x.Pos()))
		before := x.Pos()
		r.d.StopAt(r.d.Ordinal() + stop)
		err := x.NewHistory()
		r.again(false)
		x = r.st.DB("a.db")
		if x == nil || x.Pos() != before {
			t.Fatalf("stopped at operation %d: the database is lost, or not at %s", stop, before)
		}
		if err == nil {
			if !x.Acked().IsZero() {
				t.Fatalf("the hub's ack of the former history counts for the new one")
			}
			return
		}
	}
}

// A record of a line that the hub takes after it refused one of another.
func TestRefusedFirstRecord(t *testing.T) {
	r := newTrap(t, func(o *Options) { o.Shipping = true })
	db := r.made("a.db", pager.Delete, 5)
	r.must(db.Check())
	s, err := r.st.DB("a.db").SnapshotShipment()
	r.must(err)
	p, err := bytesOf(s)
	r.must(err)
	hub := newTestStore(t, simdisk.New(simdisk.Options{}))
	bad := bytes.Clone(p)
	bad[len(bad)/2] ^= 1
	in := Incoming{Name: "x/a.db", History: s.History ^ 1, LTX: bytes.NewReader(bad), Size: int64(len(bad))}
	if _, err := hub.Apply(in); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("a corrupt record: %v, want ErrCorrupt", err)
	}
	in.History, in.LTX = s.History, bytes.NewReader(p)
	if _, err := hub.Apply(in); err != nil {
		t.Fatalf("the record of another line after it: %v", err)
	}
	// The same once more, as a snapshot of a later position: no gap, no overlap.
	r.must(db.Commit(r.change(db, 6, 3)))
	if s, err = r.st.DB("a.db").SnapshotShipment(); err == nil {
		p, err = bytesOf(s)
	}
	r.must(err)
	in.LTX, in.Size = bytes.NewReader(p), int64(len(p))
	x, err := hub.Apply(in)
	r.must(err)
	r.must(x.checkInvariants())
	if _, _, err := x.Verify(); err != nil {
		t.Fatal(err)
	}
}

// The parts of a transaction over many databases, each just below the bound of a
// side file, do not fit one log record of the hub: it takes them all the same.
func TestIncomingGroupBeyondOneRecord(t *testing.T) {
	r := newTrap(t, func(o *Options) { o.Shipping, o.SegmentSize = true, 256<<10 })
	var dbs []*pager.DB
	var changes []pager.Change
	for _, name := range []string{"a.db", "b.db", "c.db", "d.db", "e.db", "f.db", "g.db", "h.db"} {
		db := r.w.DB(name)
		db.Sync = pager.Full
		dbs, changes = append(dbs, db), append(changes, r.change(db, 15, 2))
	}
	r.must(r.w.Group(dbs, changes))
	hub := newTestStore(t, simdisk.New(simdisk.Options{}))
	var list []Incoming
	for _, db := range dbs {
		s, err := r.st.DB(db.Name).Next(ltx.Pos{}, 0, 0)
		r.must(err)
		p, err := bytesOf(s)
		r.must(err)
		list = append(list, Incoming{Name: "x/" + db.Name, History: s.History, LTX: bytes.NewReader(p), Size: int64(len(p))})
	}
	r.must(hub.ApplyGroup(list))
	for _, db := range dbs {
		if got, want := hub.DB("x/"+db.Name).Pos(), r.st.DB(db.Name).Pos(); got != want {
			t.Errorf("%s is at %s at the hub, want %s", db.Name, got, want)
		}
	}
	r.w.Kill()
}

// bytesOf reads the bytes of a shipment.
func bytesOf(s *Shipment) ([]byte, error) {
	var b bytes.Buffer
	_, err := b.ReadFrom(s.Body)
	return b.Bytes(), errors.Join(err, s.Body.Close())
}
