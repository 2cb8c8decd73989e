package store

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path"
	"strings"
	"syscall"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// The tests here show single ways to lose or corrupt data that a file system
// below SQLite has, and how the engine does not fall for them.

// A trap is an engine on a simulated disk, with programs.
type trap struct {
	t  *testing.T
	d  *simdisk.Disk
	o  Options
	st *Store
	w  *pager.World
}

func newTrap(t *testing.T, change func(*Options)) *trap {
	t.Helper()
	r := &trap{t: t, d: simdisk.New(simdisk.Options{Seed: 7}), o: Options{Node: "n", SegmentSize: 64 << 10, inline: true}}
	if change != nil {
		change(&r.o)
	}
	r.w = pager.New(nil, rand.New(rand.NewPCG(1, 2)))
	r.start()
	t.Cleanup(func() { r.st.abandon() })
	return r
}

func (r *trap) start() {
	r.t.Helper()
	r.o.FS = r.d
	st, err := Open(r.o)
	if err != nil {
		r.t.Fatal(err)
	}
	r.st, r.w.FS = st, testFS{st}
	st.Attach(testPeer{r.w})
}

// again is a power cut, or a kill of the agent, and the next start. Databases are
// at their newest committed version.
func (r *trap) again(kill bool) {
	r.t.Helper()
	r.w.Kill()
	if kill {
		r.d = r.d.Kill()
	} else {
		r.d = r.d.Cut(nil)
	}
	r.st.abandon()
	r.start()
	for _, name := range r.w.Names() {
		db := r.w.DBs[name]
		db.Forget(db.Head())
		r.must(db.Check())
	}
	r.verify()
}

func (r *trap) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *trap) verify() {
	r.t.Helper()
	for _, db := range r.st.DBs() {
		if _, _, err := db.Verify(); err != nil {
			r.t.Fatal(err)
		}
	}
}

// made makes a database of count pages of 1 KiB in the given mode.
func (r *trap) made(name string, mode pager.Mode, count int) *pager.DB {
	r.t.Helper()
	db := r.w.DB(name)
	db.Sync = pager.Full
	r.must(db.Commit(r.change(db, count, 2)))
	r.must(db.SetMode(mode))
	return db
}

// change is a transaction that writes pages from to the end.
func (r *trap) change(db *pager.DB, count, from int) pager.Change {
	ch := pager.Change{PageSize: 1024, Count: count, Pages: map[int][]byte{}}
	for pgno := max(from, 2); pgno <= count; pgno++ {
		ch.Pages[pgno] = r.page(1024)
	}
	return ch
}

func (r *trap) page(size int) []byte {
	p := make([]byte, size)
	for i := range p {
		p[i] = byte(r.w.Rand.Uint32())
	}
	return p
}

func (r *trap) txid(name string) ltx.TXID {
	r.t.Helper()
	db := r.st.DB(name)
	if db == nil {
		return 0
	}
	return db.Pos().TXID
}

// killedAt runs fn with the program killed before its n-th call, and reports
// whether fn had so many.
func (r *trap) killedAt(n int, fn func()) bool {
	left := n
	r.w.Step = func() {
		if left--; left == 0 {
			panic(pager.Killed{})
		}
	}
	alive := r.w.Run(fn)
	r.w.Step = func() {}
	return !alive
}

// A WAL writer that is killed before it published its commit has not committed:
// while another connection lives the next writer goes over its frames, and
// neither position nor file remembers them.
func TestWALCommitNeverPublished(t *testing.T) {
	for n := 1; ; n++ {
		r := newTrap(t, nil)
		db := r.made("a.db", pager.WAL, 4)
		r.must(db.Commit(r.change(db, 4, 2)))
		killed := r.killedAt(n, func() { r.must(db.Commit(r.change(db, 6, 3))) })
		r.must(db.Check()) // the other connection
		r.must(db.Commit(r.change(db, 5, 4)))
		r.must(db.Check())
		r.must(db.Checkpoint(true))
		r.must(db.Check())
		r.verify()
		r.again(false)
		if !killed {
			if n < 5 {
				t.Fatalf("a commit of %d calls", n)
			}
			return
		}
	}
}

// No byte of a transaction is in the database file before the log is durable
// past it, though nobody asked for durability.
func TestLogGoesBeforeData(t *testing.T) {
	r := newTrap(t, nil)
	db := r.w.DB("a.db")
	db.Sync = pager.Off
	r.must(db.Commit(r.change(db, 4, 2)))
	synced := false
	r.d.SetHook(func(op simdisk.Op) error {
		switch {
		case op.Kind == simdisk.OpDatasync && strings.HasPrefix(op.Name, logDir+"/"):
			synced = true
		case op.Kind == simdisk.OpWrite && strings.HasPrefix(op.Name, dbsDir+"/") && !synced:
			t.Errorf("%s is written before the log is durable", op.Name)
		}
		return nil
	})
	r.must(r.st.flushAll())
	if !synced {
		t.Error("nothing was flushed")
	}
	r.again(false)
}

// FULL costs one flush of the log a commit, in every mode; NORMAL in WAL mode none
// a commit, and two a checkpoint at most.
func TestFlushesPerCommit(t *testing.T) {
	const n = 20
	for _, x := range []struct {
		mode pager.Mode
		sync pager.Sync
		want uint64
	}{
		{pager.Delete, pager.Full, n}, {pager.Truncate, pager.Full, n}, {pager.Persist, pager.Full, n},
		{pager.WAL, pager.Full, n}, {pager.WAL, pager.Normal, 0}, {pager.Delete, pager.Off, 0},
	} {
		t.Run(fmt.Sprint(x.mode, x.sync), func(t *testing.T) {
			r := newTrap(t, func(o *Options) { o.SegmentSize = 1 << 20 })
			db := r.made("a.db", x.mode, 4)
			db.Sync = x.sync
			r.must(db.Commit(r.change(db, 4, 3)))
			before := r.st.Stats().Fdatasyncs
			for range n {
				r.must(db.Commit(r.change(db, 4, 3)))
			}
			if got := r.st.Stats().Fdatasyncs - before; got != x.want {
				t.Errorf("%d flushes of the log for %d commits, want %d", got, n, x.want)
			}
			before = r.st.Stats().Fdatasyncs
			r.must(db.Checkpoint(false))
			if got := r.st.Stats().Fdatasyncs - before; got > 2 {
				t.Errorf("%d flushes for a checkpoint, want at most 2", got)
			}
		})
	}
}

// Pages that only a WAL holds, which a reader keeps from being checkpointed,
// survive a power cut after the log's segments were used again.
func TestLongReaderWhileTheLogTurns(t *testing.T) {
	r := newTrap(t, func(o *Options) { o.SegmentSize, o.Large = 16<<10, 8<<10 })
	db := r.made("a.db", pager.WAL, 8)
	r.must(db.Commit(r.change(db, 8, 2)))
	db.StartReader(1)
	for range 40 {
		r.must(db.Commit(r.change(db, 8, 6)))
		r.must(db.Checkpoint(false))
	}
	segs := r.st.wlog.Segments()
	r.must(r.st.checkpoint(segs[len(segs)-1].First))
	if left := r.st.wlog.Segments(); len(left) >= len(segs) || len(segs) < 3 {
		t.Fatalf("%d of %d segments are left: the log did not turn", len(left), len(segs))
	}
	r.must(db.Check())
	r.again(false)
}

// The transaction over several databases commits at the UNLINK of the
// super-journal. What becomes of the journals after that is nobody's business.
func TestGroupCommitsAtSuperJournal(t *testing.T) {
	for n := 1; ; n++ {
		r := newTrap(t, nil)
		a, b := r.made("a.db", pager.Delete, 3), r.made("b.db", pager.Delete, 3)
		done := false
		killed := r.killedAt(n, func() {
			r.must(r.w.Group([]*pager.DB{a, b}, []pager.Change{r.change(a, 3, 3), r.change(b, 3, 3)}))
			done = true
		})
		before := r.txid("a.db")
		if before != r.txid("b.db") {
			t.Fatalf("killed at call %d: a.db is at %d, b.db at %d", n, before, r.txid("b.db"))
		}
		r.w.Kill()
		r.d = r.d.Cut(nil)
		r.st.abandon()
		r.start()
		if got := r.txid("a.db"); got != r.txid("b.db") || got < before {
			t.Fatalf("killed at call %d, after a power cut: a.db is at %d, b.db at %d, want %d or more", n, got, r.txid("b.db"), before)
		}
		r.verify()
		if !killed {
			if !done || before != 2 {
				t.Fatalf("the whole group leaves a.db at %d, want 2", before)
			}
			return
		}
	}
}

// A person who removes the super-journal of a killed program would half commit:
// refused, while journals name it.
func TestSuperJournalOfTheDead(t *testing.T) {
	for n := 1; ; n++ {
		r := newTrap(t, nil)
		a, b := r.made("a.db", pager.Delete, 3), r.made("b.db", pager.Delete, 3)
		if !r.killedAt(n, func() {
			r.must(r.w.Group([]*pager.DB{a, b}, []pager.Change{r.change(a, 3, 3), r.change(b, 3, 3)}))
		}) {
			t.Fatal("no journal ever named a super-journal")
		}
		r.w.Kill()
		super := ""
		for name := range r.st.sides {
			if strings.Contains(name, "-mj") {
				super = name
			}
		}
		if super == "" {
			continue
		}
		members, err := r.st.groupMembers(path.Base(super))
		r.must(err)
		if len(members) < 2 {
			continue
		}
		if err := r.st.Unlink(super); !errors.Is(err, ErrBusy) {
			t.Fatalf("unlink %s = %v, want ErrBusy", super, err)
		}
		r.must(a.Check()) // plays both back
		r.must(b.Check())
		return
	}
}

// The journal of the first transaction of a database says that it holds nothing.
func TestFirstTransactionIsCaptured(t *testing.T) {
	for _, sync := range []pager.Sync{pager.Off, pager.Normal, pager.Full} {
		r := newTrap(t, nil)
		db := r.w.DB("a.db")
		db.Sync = sync
		r.must(db.Commit(r.change(db, 3, 2)))
		if got := r.txid("a.db"); got != 1 {
			t.Fatalf("synchronous %d: the database is at %d, want 1", sync, got)
		}
		r.again(sync == pager.Off)
	}
}

// A record that grows the database names pages that SQLite never wrote.
func TestHolesAreInTheRecord(t *testing.T) {
	r := newTrap(t, nil)
	db := r.w.DB("a.db")
	db.Sync = pager.Full
	r.must(db.Commit(pager.Change{PageSize: 1024, Count: 40, Pages: map[int][]byte{3: r.page(1024), 29: r.page(1024)}}))
	s, err := r.st.DB("a.db").Next(ltx.Pos{}, 0, 0)
	r.must(err)
	defer s.Body.Close()
	body, err := io.ReadAll(s.Body)
	r.must(err)
	tx, err := parseTx(body)
	r.must(err)
	if len(tx.pages) != 40 || tx.header.Commit != 40 {
		t.Errorf("the record names %d pages of %d, want 40 of 40", len(tx.pages), tx.header.Commit)
	}
	r.again(false)
}

// rm of a journal that a killed program left is a rollback, and rm of a WAL loses
// nothing.
func TestRemovedRemains(t *testing.T) {
	for _, mode := range []pager.Mode{pager.Delete, pager.Truncate, pager.Persist, pager.WAL} {
		found := 0
		for n := 1; ; n++ {
			r := newTrap(t, nil)
			db := r.made("a.db", mode, 6)
			r.must(db.Commit(r.change(db, 6, 4)))
			ch := r.change(db, 8, 3)
			ch.Spill = 2
			killed := r.killedAt(n, func() { r.must(db.Commit(ch)) })
			r.w.Kill()
			if db.Remains() {
				found++
				r.must(db.RemoveRemains())
			}
			r.must(db.Check())
			r.verify()
			r.again(false)
			if !killed {
				break
			}
		}
		if found < 5 {
			t.Errorf("%s: a journal or WAL was left %d times", mode, found)
		}
	}
}

// journal_mode MEMORY or OFF has no commit point: refused. cp has none either, and
// becomes a database, whole.
func TestNoCommitPoint(t *testing.T) {
	r := newTrap(t, nil)
	db := r.w.DB("copy.db")
	r.must(db.Copy(20))
	if got := r.txid("copy.db"); got != 1 {
		t.Fatalf("the copy is at %d, want 1", got)
	}
	r.again(false)

	_, h, err := r.st.Create("memory.db", 0o600, true)
	r.must(err)
	defer h.Release()
	r.st.Attach(lockedPeer{testPeer{r.w}})
	if _, err := h.WriteAt(append([]byte("SQLite format 3\x00"), make([]byte, 1008)...), 0); !errors.Is(err, ErrRefused) {
		t.Errorf("a first page without a journal, under locks: %v, want ErrRefused", err)
	}
}

// lockedPeer says that every file is locked.
type lockedPeer struct{ testPeer }

func (lockedPeer) Reserved(Node) (bool, error) { return true, nil }

// After a failed fdatasync the records go to another segment, and the commit
// returns; if that fails too the node is read-only, and reads go on.
func TestFailedFlush(t *testing.T) {
	for _, failures := range []int{1, 1000} {
		r := newTrap(t, nil)
		db := r.made("a.db", pager.Delete, 4)
		left := failures
		r.d.SetHook(func(op simdisk.Op) error {
			if op.Kind == simdisk.OpDatasync && strings.HasPrefix(op.Name, logDir+"/") && left > 0 {
				left--
				return syscall.EIO
			}
			return nil
		})
		err := db.Commit(r.change(db, 4, 2))
		r.d.SetHook(nil)
		if (err == nil) != (failures == 1) {
			t.Fatalf("%d failures: commit = %v", failures, err)
		}
		if err == nil {
			r.again(false)
			continue
		}
		if r.st.Failed() == nil {
			t.Error("the log does not say that it failed")
		}
		p := make([]byte, 1024)
		n, lerr := r.st.Lookup("a.db")
		r.must(lerr)
		h, oerr := n.Open(false)
		r.must(oerr)
		if k, err := h.ReadAt(p, 1024); k != len(p) || err != nil {
			t.Errorf("read = %d, %v", k, err)
		}
		h.Release()
		other := r.w.DB("b.db")
		other.Sync = pager.Full
		if err := other.Commit(r.change(other, 2, 2)); err == nil {
			t.Error("a commit succeeds on a log that failed")
		}
	}
}

// A power cut loses no commit that asked for durability.
func TestCutLosesNothingDurable(t *testing.T) {
	for _, mode := range []pager.Mode{pager.Delete, pager.Truncate, pager.Persist, pager.WAL} {
		r := newTrap(t, nil)
		db := r.made("a.db", mode, 4)
		for range 10 {
			r.must(db.Commit(r.change(db, 4, 2)))
			r.again(false)
		}
	}
}

// A kill of the agent loses no commit that returned, whoever asked for what.
func TestKillLosesNoCommit(t *testing.T) {
	for _, mode := range []pager.Mode{pager.Delete, pager.Truncate, pager.Persist, pager.WAL} {
		for _, sync := range []pager.Sync{pager.Off, pager.Normal, pager.Full} {
			r := newTrap(t, nil)
			db := r.made("a.db", mode, 4)
			db.Sync = sync
			for range 5 {
				r.must(db.Commit(r.change(db, 4, 2)))
				r.again(true)
			}
		}
	}
}

// A large transaction goes to a file of its own: the log holds a reference, and
// memory stays within its budget.
func TestLargeTransaction(t *testing.T) {
	r := newTrap(t, func(o *Options) { o.Large, o.Memory = 8<<10, 64<<10 })
	db := r.w.DB("a.db")
	db.Sync = pager.Full
	before := r.st.Stats().LogBytes
	r.must(db.Commit(r.change(db, 2000, 2)))
	if got := r.st.Stats().LogBytes - before; got > 64<<10 {
		t.Errorf("%d bytes of the log for a transaction of 2 MiB", got)
	}
	if used := r.st.Stats().Memory; used > r.o.Memory {
		t.Errorf("%d bytes of memory, %d allowed", used, r.o.Memory)
	}
	r.again(false)
}

// A full disk is met at a WRITE, which SQLite takes for SQLITE_FULL: the
// transaction is rolled back, and when there is room again all goes on.
func TestFullDiskAtWrite(t *testing.T) {
	r := newTrap(t, func(o *Options) { o.Large = 8 << 10 })
	db := r.made("a.db", pager.Delete, 4)
	r.w.FS = eventFS{testFS{r.st}, t}
	r.d.SetCapacity(r.d.Used() + 1<<20 + 500<<10) // the engine leaves a margin
	r.st.freeLeft.Store(0)
	if err := db.Commit(r.change(db, 4000, 2)); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("a commit of 4 MB on a full disk = %v", err)
	}
	r.must(db.Check())
	r.d.SetCapacity(0)
	r.st.freeLeft.Store(0)
	r.must(db.Commit(r.change(db, 4000, 2)))
	r.again(false)
}

// eventFS fails the test if the UNLINK of a journal meets a full disk.
type eventFS struct {
	testFS
	t *testing.T
}

func (f eventFS) Remove(name string) error {
	err := f.testFS.Remove(name)
	if errors.Is(err, syscall.ENOSPC) {
		f.t.Errorf("remove %s: %v (invariant 23)", name, err)
	}
	return err
}

// content reads a whole file of the mount.
func (r *trap) content(name string) []byte {
	r.t.Helper()
	n, err := r.st.Lookup(name)
	r.must(err)
	h, err := n.Open(false)
	r.must(err)
	defer h.Release()
	b := make([]byte, n.Attr().Size)
	_, err = h.ReadAt(b, 0)
	r.must(err)
	return bytes.Clone(b)
}
