package commitlog

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"path"
	"strings"
	"syscall"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/simdisk"
)

var (
	crashSeed = flag.Uint64("crash.seed", 0, "run only the crash test of this seed, and say what it does")
	crashN    = flag.Int("crash.n", 4000, "number of seeds of the crash test")
)

// TestCrash runs a log on a simulated disk, stops it at a random operation by a
// power cut or a kill, opens it again and compares, up to four times a seed.
func TestCrash(t *testing.T) {
	if *crashSeed != 0 {
		c := newCrasher(t, *crashSeed)
		c.verbose = true
		c.run()
		return
	}
	var sum crashCounts
	for seed := uint64(1); seed <= uint64(*crashN) && !t.Failed(); seed++ {
		c := newCrasher(t, seed)
		c.run()
		sum.add(c.counts)
	}
	t.Logf("%+v", sum)
	if *crashN >= 1000 {
		for name, n := range map[string]int{
			"cuts": sum.cuts, "kills": sum.kills, "crashes in Open": sum.inOpen, "rescues": sum.rescues,
			"failed logs": sum.failed, "full disks": sum.full, "reused segments": sum.reused, "undecided records": sum.undecided,
		} {
			if n < 20 {
				t.Errorf("%d %s: the test does not reach them", n, name)
			}
		}
	}
}

type crashCounts struct {
	points, cuts, kills, inOpen, rescues, failed, full, reused, records, undecided int
}

func (a *crashCounts) add(b crashCounts) {
	a.points += b.points
	a.cuts += b.cuts
	a.kills += b.kills
	a.inOpen += b.inOpen
	a.rescues += b.rescues
	a.failed += b.failed
	a.full += b.full
	a.reused += b.reused
	a.records += b.records
	a.undecided += b.undecided
}

// crasher is one run and what it must find again.
type crasher struct {
	t       *testing.T
	seed    uint64
	rng     *rand.Rand
	d       *simdisk.Disk
	o       Options
	l       *Log
	verbose bool
	counts  crashCounts

	direct    bool // direct I/O works, so that recovery sees the medium
	faulty    bool // inject errors
	records   map[LSN][]byte
	refs      map[LSN]Ref
	appended  LSN // by appends that returned
	maybe     LSN // and the one that did not, if any
	confirmed LSN // survives a power cut
	killSafe  LSN // survives a kill
	released  LSN // records from here on must be there
	need      LSN // what the next Open must find at least
	syncFault bool
	rescues   uint64 // when syncFault was set

	written map[string][]int8 // of each segment file, a sector: 1 written, 2 synced since
	seen    map[string]bool   // files that held a segment
}

func newCrasher(t *testing.T, seed uint64) *crasher {
	c := &crasher{t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 77))}
	so := simdisk.Options{Seed: seed, BlockSize: 512 << c.rng.IntN(4), NoDirect: c.rng.IntN(5) == 0, NoAlloc: c.rng.IntN(5) == 0}
	c.direct = !so.NoDirect
	c.faulty = c.rng.IntN(3) == 0
	if c.rng.IntN(4) == 0 {
		so.Capacity = int64(c.rng.IntN(300)) << 10
	}
	c.d = simdisk.New(so)
	c.o = Options{
		Dir: "a/log", SegmentSize: int64(4+c.rng.IntN(6)) * pageSize, Target: 1 + c.rng.IntN(4), inline: true,
		FlushBytes: []int64{-1, 3000, 1 << 20}[c.rng.IntN(3)], Rand: zeroReader{c.rng},
	}
	c.records, c.refs = map[LSN][]byte{}, map[LSN]Ref{}
	c.released = 1
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
	c.t.Fatalf("seed %d (go test ./internal/commitlog -run TestCrash -crash.seed=%d): %s", c.seed, c.seed, fmt.Sprintf(format, args...))
}

func (c *crasher) logf(format string, args ...any) {
	if c.verbose {
		c.t.Logf(format, args...)
	}
}

func (c *crasher) run() {
	kill := false
	for range 4 {
		c.written, c.seen = map[string][]int8{}, map[string]bool{}
		c.d.SetHook(c.hook)
		c.d.StopAt(1 + c.d.Ordinal() + int64(c.rng.IntN([]int{12, 60, 250}[c.rng.IntN(3)])))
		c.o.FS = c.d
		if c.open(kill) {
			c.work()
		} else {
			c.counts.inOpen++
		}
		if v := c.d.Violations(); len(v) > 0 {
			c.fatalf("%q", v)
		}
		c.counts.points++
		need := c.confirmed
		kill = c.rng.IntN(3) == 0
		if kill {
			c.counts.kills++
			if !c.syncFault || c.l != nil && c.l.n.rescues.Load() > c.rescues {
				need = c.killSafe
			}
			c.d = c.d.Kill()
		} else {
			c.counts.cuts++
			c.d = c.d.Cut(c.rng)
		}
		if c.l != nil {
			c.counts.rescues += int(c.l.n.rescues.Load())
			if c.l.failed != nil {
				c.counts.failed++
			}
		}
		c.logf("crash: kill=%v confirmed=%d killSafe=%d appended=%d maybe=%d need=%d released=%d",
			kill, c.confirmed, c.killSafe, c.appended, c.maybe, need, c.released)
		c.need = need
		if !kill {
			c.killSafe = c.confirmed
			c.syncFault = false
		}
		c.l = nil
	}
	// The last look is undisturbed.
	c.o.FS = c.d
	if c.d.SetCapacity(0); !c.open(kill) {
		c.fatalf("the last Open failed")
	}
	c.l.Close()
}

// open opens the log and checks what it replays. It returns false if the disk
// stopped meanwhile.
func (c *crasher) open(afterKill bool) bool {
	var got []Record
	l, err := Open(c.o, func(r Record) error {
		r.Payload = bytes.Clone(r.Payload)
		got = append(got, r)
		return nil
	})
	if err != nil {
		if !expected(err) {
			c.fatalf("Open: %v", err)
		}
		c.logf("Open: %v", err)
		if l != nil {
			c.fatalf("Open returned a log and %v", err)
		}
		return false
	}
	if len(l.Damage()) > 0 {
		c.fatalf("damage: %+v", l.Damage())
	}
	last := l.Durable()
	c.logf("open: %d records up to %d, want at least %d; segments %+v", len(got), last, c.need, l.Segments())
	if last < c.need {
		c.fatalf("records end at %d, want at least %d", last, c.need)
	}
	if last > max(c.appended, c.maybe) {
		c.fatalf("records end at %d, appended up to %d and maybe %d", last, c.appended, c.maybe)
	}
	if last > c.appended {
		c.counts.undecided++
	}
	clear(c.refs)
	for i, r := range got {
		c.refs[r.LSN] = r.Ref
		if i > 0 && r.LSN != got[i-1].LSN+1 {
			c.fatalf("record %d follows %d", r.LSN, got[i-1].LSN)
		}
		if !bytes.Equal(r.Payload, c.records[r.LSN]) || r.AfterDamage {
			c.fatalf("record %d differs", r.LSN)
		}
		p := make([]byte, len(r.Payload))
		if err := l.ReadAt(r.Ref, p, 0); err != nil && !errors.Is(err, simdisk.ErrStopped) && !errors.Is(err, ErrReleased) || err == nil && !bytes.Equal(p, r.Payload) {
			c.fatalf("ReadAt of record %d: %v", r.LSN, err)
		}
	}
	if last >= c.released && (len(got) == 0 || got[0].LSN > c.released || got[len(got)-1].LSN != last) {
		c.fatalf("replay of %d records up to %d, want from %d on", len(got), last, c.released)
	}
	c.l = l
	c.appended, c.maybe, c.confirmed, c.killSafe = last, 0, last, last
	c.syncFault = false
	return true
}

func expected(err error) bool {
	return errors.Is(err, simdisk.ErrStopped) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EIO) || errors.Is(err, ErrFailed)
}

// work uses the log until the disk stops.
func (c *crasher) work() {
	for range 400 {
		var err error
		switch n := c.rng.IntN(20); {
		case n < 13:
			err = c.append()
		case n < 15:
			lsn := c.appended - LSN(c.rng.IntN(3))
			if lsn == 0 || lsn > c.appended {
				continue
			}
			err = c.wait(lsn)
		case n < 17:
			if before := c.released + LSN(c.rng.IntN(30)); before <= c.confirmed {
				c.released = max(c.released, before)
				c.l.Release(before)
			}
		case n < 18:
			size := int64(c.rng.IntN(20000))
			if err = c.l.Reserve(size); err == nil {
				err = c.append() // small: must find room
				if errors.Is(err, syscall.ENOSPC) && !c.faulty {
					c.fatalf("full disk within a reservation of %d: %v", size, err)
				}
				c.l.Unreserve(size)
			}
		default:
			lsn := c.released + LSN(c.rng.IntN(int(c.appended-min(c.released, c.appended))+1))
			ref, ok := c.refs[lsn]
			if !ok {
				continue
			}
			p := make([]byte, ref.Len)
			if err = c.l.ReadAt(ref, p, 0); err == nil && !bytes.Equal(p, c.records[lsn]) || errors.Is(err, ErrReleased) {
				c.fatalf("ReadAt of record %d: %v", lsn, err)
			}
		}
		if err == nil {
			continue
		}
		c.logf("%v", err)
		if !expected(err) {
			c.fatalf("%v", err)
		}
		if errors.Is(err, simdisk.ErrStopped) || errors.Is(err, ErrFailed) {
			return
		}
		if errors.Is(err, syscall.ENOSPC) {
			c.counts.full++
		}
	}
}

func (c *crasher) append() error {
	size := c.rng.IntN([]int{1, 40, 600, 6000}[c.rng.IntN(4)])
	if c.rng.IntN(40) == 0 {
		size = int(c.l.MaxPayload()) - c.rng.IntN(3)
	}
	p := make([]byte, size)
	for i := range p {
		p[i] = byte(c.rng.Uint32())
	}
	if size > 80 && c.rng.IntN(3) == 0 { // looks like a record
		copy(p, []byte{0x4c, 0x52, 0x45, 0x43, 1, 0, 0, 0})
		p[8] = byte(c.appended) + 2
		clear(p[9:24])
	}
	mode := Mode(c.rng.IntN(3))
	lsn := c.appended + 1
	c.maybe = lsn
	c.records[lsn] = p
	got, ref, err := c.l.Append(Header{Kind: KindLTX, DB: uint32(lsn)}, mode, p)
	c.logf("append %d mode %d size %d: %+v %v", lsn, mode, size, ref, err)
	if err != nil {
		if c.l.failed == nil {
			c.maybe = 0 // nothing has changed
		}
		return err
	}
	if got != lsn {
		c.fatalf("Append = %d, want %d", got, lsn)
	}
	c.appended, c.maybe = lsn, 0
	c.refs[lsn] = ref
	c.counts.records++
	if mode != Staged {
		c.killSafe = lsn
	}
	c.confirmed = max(c.confirmed, c.l.Durable())
	if mode == Staged && c.rng.IntN(3) > 0 {
		return c.wait(lsn)
	}
	return nil
}

func (c *crasher) wait(lsn LSN) error {
	err := c.l.Wait(lsn)
	c.logf("wait %d: %v, durable %d", lsn, err, c.l.Durable())
	if err == nil {
		if c.l.Durable() < lsn {
			c.fatalf("Wait(%d) = nil with Durable %d", lsn, c.l.Durable())
		}
		c.confirmed = max(c.confirmed, c.l.Durable())
		c.killSafe = max(c.killSafe, c.confirmed)
	}
	return err
}

// hook injects errors and checks that no block with durable records is written
// again before its segment is reused (invariant 16).
func (c *crasher) hook(op simdisk.Op) error {
	c.logf("  op %d %s %s off %d len %d direct %v", op.N, op.Kind, op.Name, op.Off, op.Len, op.Direct)
	if c.faulty && c.rng.IntN(60) == 0 {
		switch {
		case op.Kind == simdisk.OpDatasync && c.direct:
			c.syncFault = true
			c.rescues = 0
			if c.l != nil {
				c.rescues = c.l.n.rescues.Load()
			}
			return syscall.EIO
		case op.Kind == simdisk.OpWrite:
			return []error{syscall.EIO, syscall.ENOSPC}[c.rng.IntN(2)]
		case op.Kind == simdisk.OpSyncDir, op.Kind == simdisk.OpAllocate, op.Kind == simdisk.OpRename, op.Kind == simdisk.OpRemove:
			return syscall.EIO
		}
	}
	if !strings.HasSuffix(op.Name, extSegment) {
		return nil
	}
	m := c.written[op.Name]
	if m == nil {
		m = make([]int8, c.o.SegmentSize/sectorSize)
		c.written[op.Name] = m
	}
	switch op.Kind {
	case simdisk.OpWrite:
		current := ""
		if c.l != nil && len(c.l.segs) > 0 {
			s := c.l.cur().slot
			current = path.Join(c.o.Dir, slotName(s.id, s.ext))
		}
		if op.Off == 0 && op.Len == pageSize || op.Off == pageSize && op.Name != current {
			if op.Off == 0 {
				if c.seen[op.Name] {
					c.counts.reused++
				}
				c.seen[op.Name] = true
			}
			if op.Name == current {
				c.fatalf("the current segment is written over")
			}
			if op.Off != 0 || m[pageSize/sectorSize] != 1 { // a rescue writes the header last
				clear(m)
			}
		}
		unit := int64(pageSize)
		if op.Direct {
			unit = int64(c.d.BlockSize())
		}
		for s := op.Off / unit * unit / sectorSize; s*sectorSize < roundUp(op.Off+op.Len, unit); s++ {
			if m[s] == 2 && op.Off != 0 {
				c.fatalf("op %d writes over a synced block at %d of %s", op.N, s*sectorSize, op.Name)
			}
			m[s] = 1
		}
	case simdisk.OpDatasync:
		for s := range m {
			if m[s] == 1 {
				m[s] = 2
			}
		}
	}
	return nil
}

// TestFullDiskChangesNothing fills the disk and goes on when there is room again.
func TestFullDiskChangesNothing(t *testing.T) {
	d := simdisk.New(simdisk.Options{Capacity: 100 << 10})
	o := Options{FS: d, Dir: "log", SegmentSize: 16 << 10, inline: true}
	l, _ := openLog(t, o)
	var n LSN
	for {
		lsn, _, err := l.Append(Header{}, Lazy, make([]byte, 3000))
		if errors.Is(err, syscall.ENOSPC) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		n = lsn
	}
	if err := l.Reserve(1000); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("Reserve = %v, want ENOSPC", err)
	}
	if l.Appended() != n {
		t.Fatalf("Appended = %d, want %d", l.Appended(), n)
	}
	d.SetCapacity(0)
	if err := l.Reserve(1000); err != nil {
		t.Fatal(err)
	}
	mustAppend(t, l, Staged, []byte("x"))
	if err := l.Wait(n + 1); err != nil {
		t.Fatal(err)
	}
	if _, got := openLog(t, Options{FS: d.Cut(nil), Dir: "log", SegmentSize: 16 << 10, inline: true}); LSN(len(got)) != n+1 {
		t.Fatalf("replayed %d records, want %d", len(got), n+1)
	}
}

// TestRescue makes one fdatasync fail under every mode and cuts the power.
func TestRescue(t *testing.T) {
	for _, mode := range []Mode{Lazy, Staged, Written} {
		d := simdisk.New(simdisk.Options{Seed: 3})
		o := Options{FS: d, Dir: "log", SegmentSize: 64 << 10, inline: true}
		l, _ := openLog(t, o)
		var refs []Ref
		for i := range 10 {
			lsn, ref := mustAppend(t, l, mode, payloadOf(i, 1000))
			refs = append(refs, ref)
			if i == 4 {
				if err := l.Wait(lsn); err != nil {
					t.Fatal(err)
				}
			}
		}
		fails := 1
		d.SetHook(func(op simdisk.Op) error {
			if op.Kind == simdisk.OpDatasync && fails > 0 {
				fails--
				return syscall.EIO
			}
			return nil
		})
		if err := l.Wait(10); err != nil {
			t.Fatal(err)
		}
		if st := l.Stats(); st.Rescues != 1 {
			t.Fatalf("rescues = %d, want 1", st.Rescues)
		}
		for i, ref := range refs {
			p := make([]byte, 1000)
			if err := l.ReadAt(ref, p, 0); err != nil || !bytes.Equal(p, payloadOf(i, 1000)) {
				t.Fatalf("ReadAt of record %d by its old place: %v", i+1, err)
			}
		}
		mustAppend(t, l, mode, payloadOf(10, 1000))
		if err := l.Wait(11); err != nil {
			t.Fatal(err)
		}
		o.FS = d.Cut(nil)
		if _, got := openLog(t, o); len(got) != 11 || !bytes.Equal(got[10].Payload, payloadOf(10, 1000)) {
			t.Fatalf("replayed %d records, want 11", len(got))
		}
	}
}

// TestFailedLog makes every fdatasync fail: nothing is confirmed or appended any
// more, and reads go on.
func TestFailedLog(t *testing.T) {
	d := simdisk.New(simdisk.Options{Seed: 3})
	l, _ := openLog(t, Options{FS: d, Dir: "log", SegmentSize: 64 << 10, inline: true})
	_, ref := mustAppend(t, l, Lazy, []byte("abc"))
	d.SetHook(func(op simdisk.Op) error {
		if op.Kind == simdisk.OpDatasync {
			return syscall.EIO
		}
		return nil
	})
	if err := l.Wait(1); !errors.Is(err, ErrFailed) || !errors.Is(err, syscall.EIO) {
		t.Fatalf("Wait = %v, want ErrFailed and EIO", err)
	}
	if _, _, err := l.Append(Header{}, Lazy, nil); !errors.Is(err, ErrFailed) {
		t.Fatalf("Append = %v, want ErrFailed", err)
	}
	p := make([]byte, 3)
	if err := l.ReadAt(ref, p, 0); err != nil || string(p) != "abc" {
		t.Fatalf("ReadAt = %q, %v", p, err)
	}
}

// TestDamage flips a byte in each record in turn: later records that prove it
// durable make it damage, not a torn tail.
func TestDamage(t *testing.T) {
	for bad := range 30 {
		d := simdisk.New(simdisk.Options{Seed: 5})
		o := Options{FS: d, Dir: "log", SegmentSize: 32 << 10, inline: true}
		l, _ := openLog(t, o)
		var refs []Ref
		for i := range 30 {
			lsn, ref := mustAppend(t, l, Mode(i%3), payloadOf(i, 2000))
			refs = append(refs, ref)
			if i%2 == 1 {
				if err := l.Wait(lsn); err != nil {
					t.Fatal(err)
				}
			}
		}
		l.Close()
		d = d.Kill()
		o.FS = d
		file := path.Join("log", slotName(refs[bad].Slot, extSegment))
		d.Corrupt(file, refs[bad].Off+7, 0x10)
		for round := range 2 { // it stays reported until it is released
			l, got := openLog(t, o)
			dmg := l.Damage()
			if bad == 29 || bad == 28 { // nothing after it was written later than a flush of it
				if len(dmg) != 0 || len(got) != bad {
					t.Fatalf("torn tail at %d: %d records, damage %+v", bad, len(got), dmg)
				}
				break
			}
			if len(dmg) != 1 || dmg[0].From != LSN(bad+1) || dmg[0].To != LSN(bad+1) || len(got) != 29 {
				t.Fatalf("round %d, record %d: %d records, damage %+v", round, bad+1, len(got), dmg)
			}
			for _, r := range got {
				if r.AfterDamage != (r.LSN > LSN(bad+1)) || !bytes.Equal(r.Payload, payloadOf(int(r.LSN-1), 2000)) {
					t.Fatalf("record %d: AfterDamage %v", r.LSN, r.AfterDamage)
				}
			}
			if _, err := d.Stat(path.Join("log", slotName(refs[bad].Slot, extDamaged))); err != nil {
				t.Fatalf("not set aside: %v", err)
			}
			if round == 1 {
				l.Release(31)
				mustAppend(t, l, Lazy, []byte("x"))
				mustAppend(t, l, Lazy, make([]byte, l.MaxPayload())) // a new header
				l.Release(31)
			}
			l.Close()
			d = d.Kill()
			o.FS = d
		}
		l, got := openLog(t, o)
		if bad < 28 && (len(l.Damage()) != 0 || len(got) != 2) {
			t.Fatalf("after the release: %d records, damage %+v", len(got), l.Damage())
		}
		if _, err := d.Stat(path.Join("log", slotName(refs[bad].Slot, extKept))); bad < 28 && err != nil {
			t.Fatalf("not kept: %v", err)
		}
	}
}

// TestDamageInTheLastSegment is TestDamage where no segment follows: only what a
// later record says of the durable ones tells a hole from a torn tail.
func TestDamageInTheLastSegment(t *testing.T) {
	for bad := range 10 {
		d := simdisk.New(simdisk.Options{Seed: 5})
		o := Options{FS: d, Dir: "log", SegmentSize: 64 << 10, inline: true}
		l, _ := openLog(t, o)
		var refs []Ref
		for i := range 12 {
			lsn, ref := mustAppend(t, l, Mode(i%3), payloadOf(i, 2000))
			refs = append(refs, ref)
			if err := l.Wait(lsn); err != nil {
				t.Fatal(err)
			}
		}
		l.Close()
		o.FS = d.Kill()
		o.FS.(*simdisk.Disk).Corrupt(path.Join("log", slotName(refs[bad].Slot, extSegment)), refs[bad].Off+7, 0x10)
		l, got := openLog(t, o)
		if dmg := l.Damage(); len(dmg) != 1 || dmg[0].From != LSN(bad+1) || len(got) != 11 {
			t.Fatalf("record %d: %d records, damage %+v", bad+1, len(got), dmg)
		}
		l.Close()
	}
}

// TestDamagedHeader loses the header of each segment in turn.
func TestDamagedHeader(t *testing.T) {
	for bad := range 4 {
		d := simdisk.New(simdisk.Options{Seed: 5})
		o := Options{FS: d, Dir: "log", SegmentSize: 16 << 10, inline: true}
		l, _ := openLog(t, o)
		for i := range 20 {
			mustAppend(t, l, Lazy, payloadOf(i, 2000))
		}
		if err := l.Wait(20); err != nil {
			t.Fatal(err)
		}
		segs := l.Segments()
		if len(segs) != 4 {
			t.Fatalf("%d segments, want 4", len(segs))
		}
		l.Close()
		d = d.Kill()
		o.FS = d
		file := path.Join("log", slotName(uint32(bad), extSegment))
		d.Corrupt(file, 30, 1)
		d.Corrupt(file, copyAt+30, 1)
		l, got := openLog(t, o)
		dmg := l.Damage()
		if len(dmg) == 0 || dmg[0].File != slotName(uint32(bad), extKept) {
			t.Fatalf("segment %d: damage %+v", bad, dmg)
		}
		lost := segs[bad]
		if want := 20 - int(lost.Last-lost.First+1); len(got) != want {
			t.Fatalf("segment %d: replayed %d records, want %d", bad, len(got), want)
		}
		for _, r := range got {
			// A missing first segment may also have been released: only the file is reported.
			if after := bad > 0 && r.LSN > lost.Last; r.AfterDamage != after {
				t.Fatalf("segment %d, record %d: AfterDamage %v", bad, r.LSN, r.AfterDamage)
			}
		}
		if bad == 1 || bad == 2 {
			if len(dmg) != 2 || dmg[1].From != lost.First || dmg[1].To != lost.Last {
				t.Fatalf("segment %d: damage %+v", bad, dmg)
			}
		}
	}
}
