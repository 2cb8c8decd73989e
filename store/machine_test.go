package store

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"strings"
	"syscall"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/simdisk"
)

// A machine is one engine on a simulated disk that stops, fails and runs full.
type machine struct {
	c    *crasher
	name string
	d    *simdisk.Disk
	o    Options
	st   *Store

	rng     *rand.Rand
	faulty  bool  // inject errors of the disk
	direct  bool  // direct reads work: after a failed sync the page cache is not believed
	failing fault // the next one
	failIn  int   // operations of its kind until then
	stopAt  int64

	wasCut   bool
	errored  bool // an injected error was seen in this life
	full     bool // the capacity of the disk was bounded in this life
	forgot   map[string]bool
	uncopied bool // the disk refused to make a database of a copied file

	watch *watch
	seen  error // breach of an invariant
}

type fault int

const (
	noFault fault = iota
	writeFails
	syncFails
	noRoom
)

func newMachine(c *crasher, name string, seed uint64) *machine {
	m := &machine{c: c, name: name, rng: rand.New(rand.NewPCG(seed, 99)), forgot: map[string]bool{}, watch: newWatch()}
	so := simdisk.Options{Seed: seed, BlockSize: 512 << m.rng.IntN(4), NoDirect: m.rng.IntN(5) == 0, NoAlloc: m.rng.IntN(5) == 0}
	m.faulty = m.rng.IntN(4) == 0
	m.d = simdisk.New(so)
	m.direct = !so.NoDirect
	m.o = Options{
		Node: name, SegmentSize: int64(16+16*m.rng.IntN(4)) << 10, Memory: int64(8+m.rng.IntN(120)) << 10,
		Large: int64(2+m.rng.IntN(30)) << 10, Budget: int64(256<<m.rng.IntN(3)) << 10, Flush: time.Hour,
		Durability: Durability{Commit: m.rng.IntN(8) == 0},
		Rand:       zeroReader{m.rng}, Now: func() time.Time { return time.Unix(1e9, 0) }, inline: true,
	}
	m.o.Large = min(m.o.Large, m.o.SegmentSize/2)
	if m.rng.IntN(3) == 0 {
		m.o.History = time.Hour
	}
	m.o.Logger = slog.New(forgetting{m: m})
	return m
}

// forgetting is told by the engine's log which database's history was forgotten
// because the budget is used up.
type forgetting struct {
	m  *machine
	db string
}

func (h forgetting) Enabled(_ context.Context, l slog.Level) bool {
	return l >= slog.LevelWarn || h.m.c.verbose
}

func (h forgetting) Handle(_ context.Context, r slog.Record) error {
	if strings.HasPrefix(r.Message, "history forgotten") {
		h.m.forgot[h.db] = true
		h.m.c.count("history forgotten")
	}
	if strings.HasPrefix(r.Message, "copied database stays") {
		r.Attrs(func(a slog.Attr) bool {
			err, _ := a.Value.Any().(error)
			h.m.uncopied = h.m.uncopied || ofDisk(err)
			return true
		})
	}
	if h.m.c.verbose {
		var attrs []any
		r.Attrs(func(a slog.Attr) bool { attrs = append(attrs, a); return true })
		h.m.logf("says: %s %s %v", h.db, r.Message, attrs)
	}
	return nil
}

func (h forgetting) WithAttrs(attrs []slog.Attr) slog.Handler {
	for _, a := range attrs {
		if a.Key == "db" {
			h.db = a.Value.String()
		}
	}
	return h
}

func (h forgetting) WithGroup(string) slog.Handler { return h }

type zeroReader struct{ rng *rand.Rand }

func (z zeroReader) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(z.rng.Uint32())
	}
	return len(p), nil
}

func (m *machine) logf(format string, args ...any) {
	if m.c.verbose {
		m.c.t.Logf("%s %d: "+format, append([]any{m.name, m.d.Ordinal()}, args...)...)
	}
}

// stopped reports whether the machine is down.
func (m *machine) stopped() bool { return m.d.Ordinal() >= m.stopAt }

// excused reports whether an error may come from an injected fault, or a full
// disk.
func (m *machine) excused(err error) bool {
	return m.errored || m.stopped() || m.full && errors.Is(err, syscall.ENOSPC)
}

// hook watches every operation of the disk, and makes some fail.
func (m *machine) hook(op simdisk.Op) error {
	if *crashOps {
		data := op.Data
		op.Data = nil
		m.logf("%+v", op)
		op.Data = data
	}
	err := m.inject(op)
	if werr := m.watch.see(m, op, err); werr != nil && m.seen == nil {
		m.seen = werr // the engine holds locks here: checkWatch fails
	}
	return err
}

// checkWatch fails if the watch has seen a breach of an invariant.
func (m *machine) checkWatch() {
	if m.seen != nil {
		m.c.fatalf("%s: %v", m.name, m.seen)
	}
}

func (m *machine) inject(op simdisk.Op) error {
	match := false
	var err error = syscall.EIO
	switch m.failing {
	case noFault:
		return nil
	case writeFails:
		match = op.Kind == simdisk.OpWrite
	case syncFails:
		match = op.Kind == simdisk.OpDatasync || op.Kind == simdisk.OpSyncFS || op.Kind == simdisk.OpSyncDir
	case noRoom:
		match = op.Kind == simdisk.OpWrite || op.Kind == simdisk.OpAllocate || op.Kind == simdisk.OpOpen || op.Kind == simdisk.OpCreateTemp
		err = syscall.ENOSPC
	}
	if !match {
		return nil
	}
	if m.failIn--; m.failIn > 0 {
		return nil
	}
	m.failing = noFault
	m.errored = true
	m.c.count("injected faults")
	m.logf("inject %v: %s %s", err, op.Kind, op.Name)
	return err
}

// trouble makes the disk fail soon, run full, or have room again.
func (m *machine) trouble() {
	if m.faulty && m.failing == noFault && m.rng.IntN(20) == 0 {
		m.failing, m.failIn = fault(1+m.rng.IntN(3)), 1+m.rng.IntN(12)
		if m.failing == syncFails && !m.direct {
			m.failing = noFault
		}
	}
	switch m.rng.IntN(60) {
	case 0:
		m.full = true
		m.d.SetCapacity(m.d.Used() + int64(m.rng.IntN(1300))<<10)
		m.st.freeLeft.Store(0) // what it knew of the free space is old
		m.c.count("bounded disks")
	case 1, 2, 3, 4, 5, 6:
		m.d.SetCapacity(0)
	}
}

// down is the end of the engine and of its page cache, if the power fails too. It
// checks what is left on the disk.
func (m *machine) down() {
	kill := m.c.rng.IntN(3) == 0
	if kill {
		m.c.count("kills")
		m.d = m.d.Kill()
	} else {
		m.c.count("cuts")
		m.d = m.d.Cut(m.c.rng)
		m.wasCut = true
	}
	m.d.SetCapacity(0)
	if m.st != nil {
		m.st.abandon()
		m.st = nil
	}
	m.c.count("crash points")
	m.logf("---- crash: kill=%v", kill)
	m.checkWatch()
	if err := m.checkImage(kill); err != nil {
		m.c.fatalf("%s, what is on the disk: %v", m.name, err)
	}
}

// boot starts the engine. It returns false if the machine stopped meanwhile.
func (m *machine) boot(ops int64) bool {
	m.d.SetHook(m.hook)
	m.stopAt = 1 + m.d.Ordinal() + ops
	if ops == 0 {
		m.stopAt = 1 << 60
	}
	m.d.StopAt(m.stopAt)
	m.o.FS = m.d
	m.failing, m.full, m.errored = noFault, false, false
	m.logf("==== life stops at %d", m.stopAt)
	st, err := Open(m.o)
	if m.stopped() {
		if err == nil {
			st.abandon()
		}
		m.c.count("crashes in Open")
		return false
	}
	if err != nil {
		m.c.fatalf("%s: Open: %v", m.name, err)
	}
	m.st = st
	if d := st.wlog.Damage(); len(d) > 0 {
		m.c.fatalf("%s: damage that nobody did (invariant 15): %+v", m.name, d)
	}
	if want := m.watch.durable; want != st.wlog.Appended() {
		m.c.fatalf("%s: the log on the disk ends at %d, recovery says %d (invariant 15)", m.name, want, st.wlog.Appended())
	}
	return true
}

// undisturbed lets fn look at a machine that does not stop meanwhile.
func (m *machine) undisturbed(fn func()) {
	rest, failing := m.stopAt-m.d.Ordinal(), m.failing
	m.stopAt, m.failing = 1<<60, noFault
	m.d.StopAt(0)
	capacity := m.d.SetCapacity(0)
	defer func() {
		m.failing = failing
		m.d.SetCapacity(capacity)
		m.stopAt = min(1<<60, m.d.Ordinal()+rest)
		m.d.StopAt(m.stopAt)
	}()
	fn()
}

// background does what goroutines of the engine do.
func (m *machine) background() {
	report := func(what string, err error) {
		if err == nil {
			m.c.count(what)
			return
		}
		m.logf("%s: %v", what, err)
		if !m.excused(err) {
			m.c.fatalf("%s: %s: %v", m.name, what, err)
		}
	}
	switch m.c.rng.IntN(8) {
	case 0, 1:
		m.st.resolveAll(m.c.rng.IntN(2) == 0)
	case 2:
		report("flushes", m.st.flushAll())
	case 3:
		m.st.checkpointIfNeeded()
	case 4:
		segs := m.st.wlog.Segments()
		report("checkpoints", m.st.checkpoint(segs[m.c.rng.IntN(len(segs))].Last+1))
	case 5:
		report("log flushes", m.st.wlog.Wait(m.st.wlog.Appended()))
	}
}

// healthy checks an engine that has just recovered: nothing is fenced, and every
// database verifies.
func (m *machine) healthy() {
	for _, db := range m.st.all() {
		if err := db.fenced(); err != nil {
			m.logf("%s: at %+v base %+v", db.name, db.at, db.base)
			for _, e := range db.recs.list {
				m.logf("record %d-%d lsn %d commit %d full %v path %q", e.min, e.max, e.lsn, e.commit, e.full, e.path)
			}
			m.c.fatalf("%s: after Open: %v", m.name, err)
		}
	}
	m.verify()
	m.checkRecoveredSizes()
}

// verify compares every byte and record with its checksum.
func (m *machine) verify() {
	for _, db := range m.st.DBs() {
		if _, _, err := db.Verify(); err != nil {
			m.c.fatalf("%s: verify: %v", m.name, err)
		}
		m.c.count("verified databases")
	}
}

// abandon forgets a store whose machine is down.
func (st *Store) abandon() {
	st.closeOnce.Do(func() { close(st.done) })
	_ = st.wlog.Close()
}
