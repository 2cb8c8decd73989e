package store

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
)

var (
	crashSeed   = flag.Uint64("store.seed", 0, "run only the crash test of this seed, and say what it does")
	crashOps    = flag.Bool("store.ops", false, "with -store.seed: say every operation of the disk")
	crashPoints = flag.Int("store.points", 1000, "number of crash points of TestCrashSoak")
)

// testFS shows a Store to the stand-in for SQLite.
type testFS struct{ st *Store }

type testFile struct {
	n Node
	h Handle
}

func (f testFile) ReadAt(p []byte, off int64) (int, error)  { return f.h.ReadAt(p, off) }
func (f testFile) WriteAt(p []byte, off int64) (int, error) { return f.h.WriteAt(p, off) }
func (f testFile) Truncate(size int64) error                { return f.n.SetSize(f.h, size) }
func (f testFile) Sync() error                              { return f.h.Sync() }
func (f testFile) Size() int64                              { return f.n.Attr().Size }
func (f testFile) Close() {
	if h, ok := f.h.(Flusher); ok {
		h.Flush()
	}
	f.h.Release()
}

func notExist(err error) error {
	if errors.Is(err, ErrNotExist) {
		return fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	return err
}

func (t testFS) Open(name string, create bool) (pager.File, error) {
	if create {
		n, h, err := t.st.Create(name, 0o644, false)
		return testFile{n, h}, notExist(err)
	}
	n, err := t.st.Lookup(name)
	if err != nil {
		return nil, notExist(err)
	}
	h, err := n.Open(true)
	return testFile{n, h}, err
}

func (t testFS) Exists(name string) bool {
	_, err := t.st.Lookup(name)
	return err == nil
}

func (t testFS) IsDatabase(name string) bool {
	n, err := t.st.Lookup(name)
	f, ok := n.(*file)
	return err == nil && ok && f.isDB.Load()
}

func (t testFS) Remove(name string) error { return notExist(t.st.Unlink(name)) }
func (t testFS) Rename(oldName, newName string) error {
	return notExist(t.st.Rename(oldName, newName, false))
}

// testPeer answers for the kernel from the locks of the stand-in.
type testPeer struct{ w *pager.World }

func (p testPeer) Reserved(n Node) (bool, error) { return p.w.Reserved(n.(*file).name()), nil }
func (p testPeer) ReadShm(n Node, b []byte, off int64) (int, error) {
	if n.(*sideFile).opens.Load() == 0 {
		return 0, nil
	}
	return (&sideHandle{n.(*sideFile)}).ReadAt(b, off)
}
func (p testPeer) WriteShm(n Node, b []byte, off int64) (int, error) {
	return (&sideHandle{n.(*sideFile)}).WriteAt(b, off)
}
func (p testPeer) LockShm(n Node, off, _ int64) (bool, error) {
	return off != walWriteLock || !p.w.WALLocked(n.(*sideFile).owner.name()), nil
}
func (p testPeer) UnlockShm(Node, int64, int64) error            { return nil }
func (p testPeer) LockDatabase(Node, int64, int64) (bool, error) { return true, nil }
func (p testPeer) UnlockDatabase(Node, int64, int64) error       { return nil }
func (p testPeer) InvalidateData(Node, int64, int64)             {}
func (p testPeer) InvalidateEntry(string)                        {}

type crashCounts struct {
	points, cuts, kills, inOpen, clean, programKills, commits, groups, faults, failed, full, checks, applied int
	modes                                                                                                    [4]int
}

func (a *crashCounts) add(b crashCounts) {
	a.points += b.points
	a.cuts += b.cuts
	a.kills += b.kills
	a.inOpen += b.inOpen
	a.clean += b.clean
	a.programKills += b.programKills
	a.commits += b.commits
	a.groups += b.groups
	a.faults += b.faults
	a.failed += b.failed
	a.full += b.full
	a.checks += b.checks
	a.applied += b.applied
	for i := range a.modes {
		a.modes[i] += b.modes[i]
	}
}

// crasher is one life story of a data folder.
type crasher struct {
	t       testing.TB
	seed    uint64
	rng     *rand.Rand
	d       *simdisk.Disk
	o       Options
	st      *Store
	w       *pager.World
	counts  crashCounts
	verbose bool
	faulty  bool // inject errors of the disk
	failing int  // the fault to inject: 0 none, 1 EIO of a write, 2 of a fdatasync, 3 ENOSPC
	failIn  int
	stopAt  int64
	killIn  int // calls until the program is killed
	wasCut  bool
	errored bool // an injected error was seen in this life: anything undecided may show
	maxPage int
}

func newCrasher(t testing.TB, seed uint64) *crasher {
	c := &crasher{t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 99))}
	so := simdisk.Options{Seed: seed, BlockSize: 512 << c.rng.IntN(4), NoDirect: c.rng.IntN(5) == 0, NoAlloc: c.rng.IntN(5) == 0}
	c.faulty = c.rng.IntN(4) == 0
	c.d = simdisk.New(so)
	c.o = Options{
		Node: "n", SegmentSize: int64(16+16*c.rng.IntN(4)) << 10, Memory: int64(8+c.rng.IntN(120)) << 10,
		Large: int64(2+c.rng.IntN(30)) << 10, Budget: 1 << 20, Flush: time.Hour,
		Durability: Durability{Commit: c.rng.IntN(8) == 0},
		Rand:       zeroReader{c.rng}, Now: func() time.Time { return time.Unix(1e9, 0) }, inline: true,
	}
	if c.rng.IntN(3) == 0 {
		c.o.History = time.Hour
	}
	c.maxPage = 4 + c.rng.IntN(30)
	c.w = pager.New(nil, c.rng)
	c.w.Step, c.w.Down = c.step, c.stopped
	return c
}

type zeroReader struct{ rng *rand.Rand }

func (z zeroReader) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(z.rng.Uint32())
	}
	return len(p), nil
}

func (c *crasher) fatalf(format string, args ...any) {
	c.t.Helper()
	c.t.Fatalf("seed %d (go test ./store -run TestCrashSoak -store.seed=%d): %s", c.seed, c.seed, fmt.Sprintf(format, args...))
}

func (c *crasher) logf(format string, args ...any) {
	if c.verbose {
		c.t.Logf("%d: "+format, append([]any{c.d.Ordinal()}, args...)...)
	}
}

// stopped reports whether the machine is down.
func (c *crasher) stopped() bool { return c.d.Ordinal() >= c.stopAt }

// step is called by the stand-in before each of its calls.
func (c *crasher) step() {
	if c.stopped() {
		panic(pager.Killed{})
	}
	if c.killIn > 0 {
		if c.killIn--; c.killIn == 0 {
			panic(pager.Killed{})
		}
	}
}

// hook injects errors of the disk.
func (c *crasher) hook(op simdisk.Op) error {
	if *crashOps {
		c.logf("%+v", op)
	}
	if c.failing == 0 {
		return nil
	}
	match := false
	var err error = syscall.EIO
	switch c.failing {
	case 1:
		match = op.Kind == simdisk.OpWrite
	case 2:
		match = op.Kind == simdisk.OpDatasync || op.Kind == simdisk.OpSyncFS || op.Kind == simdisk.OpSyncDir
	case 3:
		match = op.Kind == simdisk.OpWrite || op.Kind == simdisk.OpAllocate || op.Kind == simdisk.OpOpen || op.Kind == simdisk.OpCreateTemp
		err = syscall.ENOSPC
	}
	if !match {
		return nil
	}
	if c.failIn--; c.failIn > 0 {
		return nil
	}
	c.failing = 0
	c.errored = true
	c.counts.faults++
	c.logf("inject %v: %+v", err, op)
	return err
}

func (c *crasher) run() {
	c.w.Logf = nil
	if c.verbose {
		c.w.Logf, c.w.Trace = c.logf, *crashOps
	}
	for life := range 5 {
		c.d.SetHook(c.hook)
		c.stopAt = 1 + c.d.Ordinal() + int64(c.rng.IntN([]int{30, 300, 1500}[c.rng.IntN(3)]))
		if life == 4 {
			c.stopAt = 1 << 60
		}
		c.d.StopAt(c.stopAt)
		c.logf("==== life %d stops at %d", life, c.stopAt)
		if !c.open() {
			c.counts.inOpen++
		} else {
			c.work()
			if c.rng.IntN(4) == 0 && !c.stopped() {
				c.w.Kill()
				if err := c.st.Close(); err == nil && !c.stopped() {
					c.counts.clean++
					c.logf("closed")
				} else {
					c.logf("close: %v", err)
				}
			}
		}
		c.crash()
	}
	c.stopAt = 1 << 60
	if !c.open() {
		c.fatalf("the last Open failed")
	}
	c.verify()
	c.w.Kill()
	if err := c.st.Close(); err != nil {
		c.fatalf("Close: %v", err)
	}
}

func (c *crasher) crash() {
	c.counts.points++
	kill := c.rng.IntN(3) == 0
	if c.st != nil {
		c.w.Kill()
		c.st.abandon()
		c.st = nil
	}
	if kill {
		c.counts.kills++
		c.d = c.d.Kill()
	} else {
		c.counts.cuts++
		c.d = c.d.Cut(c.rng)
		c.wasCut = true
	}
	c.logf("---- crash: kill=%v", kill)
}

// open starts the engine and compares what it recovered. It returns false if
// the machine stopped meanwhile.
func (c *crasher) open() bool {
	c.o.FS = c.d
	c.failing = 0
	st, err := Open(c.o)
	if c.stopped() {
		if err == nil {
			st.abandon()
		}
		return false
	}
	if err != nil {
		c.fatalf("Open: %v", err)
	}
	c.st = st
	c.w.FS = testFS{st}
	st.Attach(testPeer{c.w})
	// The machine does not stop while we look.
	rest := c.stopAt - c.d.Ordinal()
	c.stopAt = 1 << 60
	c.d.StopAt(0)
	defer func() {
		c.stopAt = min(c.stopAt, c.d.Ordinal()+rest)
		c.d.StopAt(c.stopAt)
	}()
	for _, db := range st.all() {
		if err := db.fenced(); err != nil {
			c.logf("%s: at %+v base %+v", db.name, db.at, db.base)
			for _, e := range db.recs.list {
				c.logf("record %d-%d lsn %d commit %d full %v path %q", e.min, e.max, e.lsn, e.commit, e.full, e.path)
			}
			c.fatalf("after Open: %v", err)
		}
	}
	c.compare()
	c.checkInvariants()
	c.wasCut, c.errored = false, false
	return true
}

// compare finds for each database the committed transaction that the recovered
// content is at.
func (c *crasher) compare() {
	type member struct {
		db        *pager.DB
		have, all bool
	}
	groups := map[int][]member{}
	for _, name := range c.w.Names() {
		m := c.w.DBs[name]
		need := 0
		for i, v := range m.Versions {
			if v.Void {
				continue
			}
			if v.Durable || v.Acked && !c.wasCut {
				need = i
			}
		}
		got := c.content(name)
		at := -1
		for i := len(m.Versions) - 1; i >= need; i-- {
			v := m.Versions[i]
			if (got == nil) == (v.Pages == nil) && bytes.Equal(got, v.Bytes()) {
				at = i
				break
			}
		}
		if at < 0 {
			what := "nothing that ever was"
			for i, v := range m.Versions {
				if (got == nil) == (v.Pages == nil) && bytes.Equal(got, v.Bytes()) {
					what = fmt.Sprintf("version %d", i)
				}
			}
			for i, v := range m.Versions {
				c.logf("version %d: %d bytes acked=%v durable=%v void=%v", i, len(v.Bytes()), v.Acked, v.Durable, v.Void)
			}
			c.diff(name, got, m.Versions[len(m.Versions)-1])
			c.diff(name, got, m.Versions[need])
			c.fatalf("%s has %d bytes, %s; want version %d to %d (cut=%v)", name, len(got), what, need, len(m.Versions)-1, c.wasCut)
		}
		for i, v := range m.Versions {
			if v.Group != 0 {
				groups[v.Group] = append(groups[v.Group], member{m, at >= i, false})
			}
		}
		c.logf("%s: version %d of %d, need %d", name, at, len(m.Versions)-1, need)
		c.counts.checks++
		v := m.Versions[at]
		defer m.Forget(v)
	}
	for g, list := range groups {
		for _, x := range list[1:] {
			if x.have != list[0].have {
				c.fatalf("group %d is half there (invariant 12): %s %v, %s %v", g, list[0].db.Name, list[0].have, x.db.Name, x.have)
			}
		}
	}
}

// diff says which pages are not those of v.
func (c *crasher) diff(name string, got []byte, v pager.Version) {
	if db := c.st.DB(name); db != nil {
		c.logf("%s: at %+v base %+v", name, db.at, db.base)
		_, _, err := db.Verify()
		c.logf("verify: %v", err)
	}
	for i, p := range v.Pages {
		if q := got[min(len(got), i*v.PageSize):min(len(got), (i+1)*v.PageSize)]; !bytes.Equal(p, q) {
			c.logf("page %d of size %d: got %x..., want %x...", i+1, v.PageSize, q[:min(8, len(q))], p[:8])
		}
	}
}

// content reads a database through the mount, nil if there is none.
func (c *crasher) content(name string) []byte {
	n, err := c.st.Lookup(name)
	if errors.Is(err, ErrNotExist) {
		return nil
	}
	if err != nil {
		c.fatalf("look up %s: %v", name, err)
	}
	if n.Kind() != KindDatabase {
		return nil
	}
	for _, suffix := range []string{"-journal", "-wal", "-shm"} {
		if (testFS{c.st}).Exists(name + suffix) {
			c.fatalf("%s%s exists after a start (invariant 24)", name, suffix)
		}
	}
	h, err := n.Open(false)
	if err != nil {
		c.fatalf("open %s: %v", name, err)
	}
	defer h.Release()
	b := make([]byte, n.Attr().Size)
	if k, err := h.ReadAt(b, 0); err != nil || k != len(b) {
		c.fatalf("read %s: %d of %d, %v", name, k, len(b), err)
	}
	return b
}

// work runs programs until the machine stops or enough was done.
func (c *crasher) work() {
	for range 10 + c.rng.IntN(60) {
		if c.stopped() {
			return
		}
		if c.faulty && c.failing == 0 && c.rng.IntN(20) == 0 {
			c.failing, c.failIn = 1+c.rng.IntN(3), 1+c.rng.IntN(12)
		}
		if c.rng.IntN(12) == 0 {
			c.killIn = 1 + c.rng.IntN(25)
		}
		alive := c.w.Run(c.act)
		c.killIn = 0
		if !alive {
			if c.stopped() {
				return
			}
			c.counts.programKills++
			c.logf("program killed")
			c.w.Kill()
			if c.rng.IntN(2) == 0 {
				c.st.resolveAll(true)
			}
		}
		if c.stopped() {
			return
		}
		c.background()
		if !c.stopped() {
			c.checkInvariants()
		}
	}
}

// background does what goroutines of the engine do.
func (c *crasher) background() {
	switch c.rng.IntN(8) {
	case 0, 1:
		c.st.resolveAll(c.rng.IntN(2) == 0)
	case 2:
		if err := c.st.flushAll(); err != nil && !c.stopped() {
			c.logf("flush: %v", err)
			c.wantFault("flush", err)
		}
	case 3:
		c.st.checkpointIfNeeded()
	case 4:
		segs := c.st.wlog.Segments()
		if err := c.st.checkpoint(segs[c.rng.IntN(len(segs))].Last + 1); err != nil && !c.stopped() {
			c.logf("checkpoint: %v", err)
			c.wantFault("checkpoint", err)
		}
	case 5:
		_ = c.st.wlog.Wait(c.st.wlog.Appended())
	}
}

func (c *crasher) wantFault(what string, err error) {
	if !c.errored {
		c.fatalf("%s: %v", what, err)
	}
}

var dbNames = []string{"a.db", "b.db", "d/c.db", "e.db"}

// act is one thing that a program does.
func (c *crasher) act() {
	db := c.w.DB(dbNames[c.rng.IntN(len(dbNames))])
	if len(db.Versions) == 1 && !db.Exists() && db.Name == "d/c.db" {
		_, _ = c.st.Mkdir("d", 0o770)
	}
	var err error
	what := "commit"
	switch n := c.rng.IntN(30); {
	case n < 14:
		db.Sync = pager.Sync(c.rng.IntN(3))
		ch := db.RandomChange(c.maxPage)
		err = db.Commit(ch)
		c.counts.commits++
		c.counts.modes[db.Mode]++
	case n < 16:
		what = "group"
		err = c.group()
	case n < 18:
		what = "checkpoint"
		err = db.Checkpoint(c.rng.IntN(2) == 0)
	case n < 19:
		what = "mode"
		db.Exclusive = false
		m := pager.Mode(c.rng.IntN(4))
		err = db.SetMode(m)
		db.Exclusive = m == pager.WAL && c.rng.IntN(4) == 0
	case n < 20:
		what = "close"
		err = db.CloseWAL()
	case n < 21:
		what = "drop"
		if db.Exists() {
			err = db.Drop()
		}
	case n < 22:
		what = "copy"
		if !db.Exists() {
			err = db.Copy(c.maxPage)
		}
	case n < 23:
		what = "vacuum"
		if db.Exists() {
			err = db.Commit(db.RandomVacuum(c.maxPage))
		}
	case n < 25:
		db.StartReader(c.rng.IntN(3))
	case n < 27:
		db.EndReader(c.rng.IntN(3))
	default:
		what = "check"
		err = db.Check()
	}
	c.logf("%s (%s, sync %d, excl %v) %s: version %d, %v", db.Name, db.Mode, db.Sync, db.Exclusive, what, db.Cur, err)
	if err == nil {
		return
	}
	if c.stopped() {
		panic(pager.Killed{})
	}
	c.logf("%s %s: %v", db.Name, what, err)
	if errors.Is(err, pager.ErrMismatch) {
		c.fatalf("%s: %v", what, err)
	}
	c.counts.failed++
	if errors.Is(err, syscall.ENOSPC) {
		c.counts.full++
	}
	if !c.errored {
		c.fatalf("%s %s (%s): %v", what, db.Name, db.Mode, err)
	}
}

func (c *crasher) group() error {
	var dbs []*pager.DB
	var changes []pager.Change
	for _, i := range c.rng.Perm(len(dbNames))[:2+c.rng.IntN(2)] {
		db := c.w.DB(dbNames[i])
		if db.Mode == pager.WAL || db.Name == "d/c.db" {
			continue
		}
		db.Sync = pager.Sync(1 + c.rng.IntN(2))
		ch := db.RandomChange(c.maxPage)
		ch.Rollback = false
		dbs, changes = append(dbs, db), append(changes, ch)
	}
	if len(dbs) < 2 {
		return nil
	}
	c.counts.groups++
	return c.w.Group(dbs, changes)
}

// verify compares every byte and record with its checksum.
func (c *crasher) verify() {
	for _, db := range c.st.DBs() {
		if _, _, err := db.Verify(); err != nil {
			c.fatalf("verify: %v", err)
		}
	}
}

// abandon forgets a store whose machine is down.
func (st *Store) abandon() {
	st.closeOnce.Do(func() { close(st.done) })
	_ = st.wlog.Close()
}

// TestCrashSoak lets the engine die, over and over, at random operations of the
// disk, by a kill or a power cut, also while it recovers, and compares what it
// finds again with what SQLite was told.
func TestCrashSoak(t *testing.T) {
	if *crashSeed != 0 {
		c := newCrasher(t, *crashSeed)
		c.verbose = true
		c.run()
		return
	}
	var sum crashCounts
	start := time.Now()
	for seed := uint64(1); sum.points < *crashPoints && !t.Failed(); seed++ {
		c := newCrasher(t, seed)
		c.run()
		sum.add(c.counts)
	}
	t.Logf("%+v in %s", sum, time.Since(start).Round(time.Millisecond))
	if *crashPoints < 1000 {
		return
	}
	for name, n := range map[string]int{
		"cuts": sum.cuts, "kills": sum.kills, "crashes in Open": sum.inOpen, "clean stops": sum.clean, "killed programs": sum.programKills,
		"groups": sum.groups, "injected faults": sum.faults, "failed calls": sum.failed,
		"delete": sum.modes[0], "truncate": sum.modes[1], "persist": sum.modes[2], "wal": sum.modes[3],
	} {
		if n < 20 {
			t.Errorf("%d %s: the test does not reach them", n, name)
		}
	}
}
