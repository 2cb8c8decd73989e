package store

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/sabotage"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// lazyApply is how long committed pages may wait in memory: the longer, the more
// versions of a page cost one write to the card.
const lazyApply = 10 * time.Second

// flushSoon asks for the committed layers of db to be applied: at once when they
// are large, else within lazyApply. It never blocks.
func (st *Store) flushSoon(db *DB) {
	if !db.queued.Swap(true) {
		st.flushListMu.Lock()
		st.flushList[db] = struct{}{}
		st.flushListMu.Unlock()
	}
	if st.pool.Used() > st.opt.Memory/2 || db.layersLen() > st.opt.Large {
		st.kickFlush()
	} else if !st.flushArmed.Swap(true) {
		select {
		case st.flushArm <- struct{}{}:
		default:
		}
	}
}

func (st *Store) kickFlush() {
	select {
	case st.flushKick <- struct{}{}:
	default:
	}
}

// logGrew counts what transactions add to the log, so that the flusher looks at
// its length once a segment and not at every commit.
func (st *Store) logGrew(n int64) {
	st.ahead.Add(n)
	if st.sinceLook.Add(n) > st.opt.SegmentSize/2 {
		st.sinceLook.Store(0)
		st.kickFlush()
	}
}

func (db *DB) layersLen() (n int64) {
	for _, l := range db.stack.Load().committed {
		n += l.Len()
	}
	return n
}

// flushLoop applies committed layers and keeps the log short.
func (st *Store) flushLoop() {
	defer st.wg.Done()
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	tidy := time.AfterFunc(time.Hour, st.tidy)
	defer tidy.Stop()
	waiting := repeated{log: st.log, msg: "committed pages wait in memory: the data folder refuses them"}
	for {
		select {
		case <-st.done:
			return
		case <-st.flushArm:
			timer.Reset(lazyApply)
			continue
		case <-st.flushKick:
		case <-timer.C:
			st.flushArmed.Store(false)
		}
		err := st.flushAll()
		tidy.Reset(tidyAfter)
		waiting.report(err)
		st.waiting.Store(&err)
		if err != nil && !st.flushArmed.Swap(true) {
			timer.Reset(lazyApply)
		}
		st.checkpointIfNeeded()
	}
}

// tidyAfter is how long after the last work memory that served it is given back.
const tidyAfter = 2 * time.Second

// tidyFrom is how many bytes of heap, live or not, are worth the work.
const tidyFrom = 6 << 20

// tidy gives memory that a busy time left back to the system.
func (st *Store) tidy() {
	heap := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/free:bytes"}}
	metrics.Read(heap)
	if heap[0].Value.Uint64()+heap[1].Value.Uint64() < tidyFrom {
		return
	}
	st.pool.Tidy()
	debug.FreeOSMemory()
}

// A repeated fault is logged when it begins, at most every 30 s with the number
// of times while it lasts, and when it is over.
type repeated struct {
	log *slog.Logger
	msg string

	n    int // times since it began
	last time.Time
}

// report takes note of the fault, or with nil of its end.
func (r *repeated) report(err error) {
	if err == nil {
		if r.n > 0 {
			r.log.Info(r.msg+": over", "n", r.n)
		}
		r.n = 0
		return
	}
	r.n++
	if r.n == 1 || time.Since(r.last) > 30*time.Second {
		r.log.Warn(r.msg, "err", err, "n", r.n)
		r.last = time.Now()
	}
}

// flushAll applies the committed layers of every database that has some.
func (st *Store) flushAll() error {
	st.flushListMu.Lock()
	list := make([]*DB, 0, len(st.flushList))
	for db := range st.flushList {
		db.queued.Store(false)
		list = append(list, db)
	}
	clear(st.flushList)
	st.flushListMu.Unlock()
	slices.SortFunc(list, func(a, b *DB) int { return cmp.Compare(a.id, b.id) })
	var errs []error
	for _, db := range list {
		if err := db.flush(); err != nil {
			errs = append(errs, err)
			db.queued.Store(true)
			st.flushListMu.Lock()
			st.flushList[db] = struct{}{}
			st.flushListMu.Unlock()
		}
	}
	return errors.Join(errs...)
}

// flush applies the committed layers to the database and checksum files, after
// the log is durable past them (invariant 3). It does not make the files durable.
func (db *DB) flush() error {
	db.flushMu.Lock()
	defer db.flushMu.Unlock()
	return db.flushLocked()
}

func (db *DB) flushLocked() error {
	db.mu.Lock()
	if db.dropped || db.held.Load() != nil {
		db.mu.Unlock()
		return nil
	}
	s := *db.stack.Load()
	if top := s.committed[0]; !top.empty() {
		if len(db.walPending()) == 0 {
			top.pos = db.at
		} else {
			top.pos = db.applied
		}
		top.lsn = max(top.lsn, 1)
		s.committed = append([]*layer{newLayer(db.st.pool)}, s.committed...)
		db.stack.Store(&s)
	} else if len(s.committed) == 1 && len(db.walPending()) == 0 {
		db.applied = db.at
	}
	db.mu.Unlock()
	for {
		list := db.stack.Load().committed
		if len(list) == 1 {
			return nil
		}
		if err := db.applyLayer(list[len(list)-1]); err != nil {
			return err
		}
	}
}

// walPending returns the pages that are committed only in the WAL. db.mu is held.
func (db *DB) walPending() map[uint32]int64 {
	if db.wal == nil {
		return nil
	}
	return db.wal.pages
}

// applyLayer brings the oldest committed layer to the files. db.flushMu is held.
func (db *DB) applyLayer(l *layer) error {
	if sabotage.On(sabotage.LogBeforeData) {
		l.lsn = 0
	}
	if err := db.st.wlog.Wait(l.lsn); err != nil {
		return err
	}
	if err := db.prepareFiles(l); err != nil {
		return err
	}
	files, err := db.openFiles(true)
	if err != nil {
		return err
	}
	if limit := l.under.Load(); limit != math.MaxInt64 {
		size, err := files.data.Size()
		if err != nil {
			return err
		}
		if size > limit {
			if err := files.data.Truncate(limit); err != nil {
				return fmt.Errorf("%s: truncate to %d: %w", db.name, limit, err)
			}
		}
	}
	err = l.Runs(func(p []byte, off int64) error {
		_, err := files.data.WriteAt(p, off)
		return err
	})
	if err == nil {
		err = l.sums.writeTo(files.sums)
	}
	if err != nil && !sabotage.On(sabotage.WrittenBeforeGone) {
		return fmt.Errorf("%s: apply committed pages: %w", db.name, err)
	}
	db.mu.Lock()
	s := *db.stack.Load()
	s.committed = slices.Clone(s.committed[:len(s.committed)-1])
	db.stack.Store(&s)
	if l.pos.TXID >= db.applied.TXID {
		db.applied = l.pos
	}
	db.mu.Unlock()
	l.retire()
	return nil
}

// prepareFiles does what a layer asks for before its pages: the files of a
// dropped database go, an ordinary file that became a database moves.
func (db *DB) prepareFiles(l *layer) error {
	fsys := db.st.fs
	if l.fresh {
		db.mu.Lock()
		db.onDisk.Store(false) // first: nobody opens again what goes
		db.closeFiles()
		db.mu.Unlock()
		for _, name := range []string{"data", "sums"} {
			if err := fsys.Remove(path.Join(db.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("%s: remove the dropped content: %w", db.name, err)
			}
		}
		l.fresh = false
	}
	if f := db.file; l.takes && f.backed() {
		name := path.Join(filesDir, f.name())
		if err := db.makeDir(); err != nil {
			return err
		}
		if l.adopted {
			db.mu.Lock()
			db.onDisk.Store(false) // as above: a stale file would be taken for the one that moves here
			db.closeFiles()        // those of a dropped database of the name
			db.mu.Unlock()
			if err := fsys.Rename(name, path.Join(db.dir, "data")); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("%s: take over the file: %w", db.name, err)
			}
		} else if err := fsys.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s: remove the file it grew from: %w", db.name, err)
		}
		if _, err := db.openFiles(true); err != nil {
			return err
		}
		f.unback()
	}
	return nil
}

// checkpointIfNeeded frees log segments when more than the ring's target are in
// use.
func (st *Store) checkpointIfNeeded() {
	ahead := st.ahead.Load()
	defer func() { // also after an error: then the disk's own limits hold
		st.ahead.Add(-ahead)
		st.roomMu.Lock()
		close(st.room)
		st.room = make(chan struct{})
		st.roomMu.Unlock()
	}()
	segs := st.wlog.Segments()
	if len(segs) <= st.ringTarget {
		return
	}
	if err := st.checkpoint(segs[len(segs)-st.ringTarget/2-1].Last + 1); err != nil {
		st.log.Warn("log segments cannot be reused yet", "err", err)
	}
}

// checkpoint makes everything of log records below lsn durable elsewhere:
// database files and base, or level files. Then their segments may be reused
// (invariant 7).
func (st *Store) checkpoint(below commitlog.LSN) error {
	st.checkpointMu.Lock()
	defer st.checkpointMu.Unlock()
	for _, db := range st.all() {
		db.mu.Lock()
		if p := db.pend; p != nil {
			below = min(below, p.lsn) // only the log has it until it is confirmed
		}
		db.mu.Unlock()
	}
	if err := st.wlog.Wait(below - 1); err != nil {
		return err
	}
	// More than once, since a database may be dropped meanwhile: then its
	// successor has what is dirty.
	for range 4 {
		list := st.dirtyBelow(below)
		if len(list) == 0 || sabotage.On(sabotage.BaseBeforeReuse) {
			st.wlog.Release(below)
			return st.shrink()
		}
		if err := st.moveBases(list, below); err != nil {
			return err
		}
	}
	return errors.New("databases come and go faster than they can be made durable")
}

func (st *Store) dirtyBelow(below commitlog.LSN) []*DB {
	var list []*DB
	for _, db := range st.all() {
		db.mu.Lock()
		if db.dirty != 0 && db.dirty < below {
			list = append(list, db)
		}
		db.mu.Unlock()
	}
	return list
}

// syncfsAbove is the number of databases from which one syncfs replaces the
// fdatasyncs of each.
const syncfsAbove = 6

// moveBases applies, makes durable, and writes the metadata of each database that
// was not dropped meanwhile.
func (st *Store) moveBases(all []*DB, below commitlog.LSN) error {
	many := len(all) > syncfsAbove
	bases := make([]baseMove, 0, len(all))
	list := make([]*DB, 0, len(all))
	for _, db := range all {
		db.flushMu.Lock()
		defer db.flushMu.Unlock()
		if db.isDropped() {
			continue // its successor has folder and metadata now
		}
		list = append(list, db)
		if err := db.flushLocked(); err != nil {
			return err
		}
		b, err := db.beginBase(below, many)
		if err != nil {
			return err
		}
		bases = append(bases, b)
	}
	if many {
		if err := st.fs.SyncFS(); err != nil {
			err = fmt.Errorf("sync the data folder: %w", err)
			for _, db := range list {
				db.fenceWith(err) // nobody knows whose bytes were lost
			}
			return err
		}
	}
	for i, db := range list {
		if err := db.writeMeta(bases[i].meta, many); err != nil {
			return err
		}
	}
	if many {
		if err := st.fs.SyncFS(); err != nil {
			return fmt.Errorf("sync the data folder: %w", err)
		}
	}
	for i, db := range list {
		db.metaSlot = 1 - db.metaSlot
		db.finishBase(bases[i])
	}
	return nil
}

// A baseMove is a checkpoint of one database in progress.
type baseMove struct {
	meta  dbMeta
	dirty commitlog.LSN // what stays dirty afterwards
	side  []string
	need  ltx.TXID // records before it are forgotten
}

// beginBase makes the files of db durable (unless one syncfs for many follows)
// and what the log below lsn holds of its history too, and returns the metadata
// to write. db.flushMu is held.
func (db *DB) beginBase(below commitlog.LSN, many bool) (baseMove, error) {
	var b baseMove
	db.mu.Lock()
	base := db.applied
	if db.applied.TXID < db.base.TXID {
		base = db.base
	}
	gone := false
	if db.fenced() != nil {
		// What its files hold is in doubt: level files keep what follows the base.
		gone, base = true, db.base
	}
	db.mu.Unlock()
	if !gone {
		if err := db.syncFiles(base, many); err != nil {
			return b, err
		}
	}
	if below > 0 {
		var err error
		if b.need, err = db.keepHistory(below, base); err != nil {
			return b, err
		}
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	b.meta = db.metaLocked(base)
	b.side = slices.Clone(db.side)
	b.dirty = db.dirty
	if below > 0 {
		b.dirty = db.dirtyAbove(below)
	}
	return b, nil
}

// syncFiles makes the files of db durable (unless one syncfs for many follows)
// at base: also what recovery, or a checkpoint before they were closed, wrote to
// them. db.flushMu is held.
func (db *DB) syncFiles(base position, many bool) error {
	files, err := db.openFiles(false)
	if files == nil || err != nil {
		return err
	}
	// Pages at the end that SQLite never wrote.
	if size, err := files.data.Size(); err != nil {
		return err
	} else if size < base.size() {
		if err := files.data.Truncate(base.size()); err != nil {
			return fmt.Errorf("%s: extend to %d: %w", db.name, base.size(), err)
		}
	}
	if many || sabotage.On(sabotage.BaseSynced) {
		return nil
	}
	err = files.data.Datasync()
	if err == nil {
		err = files.sums.Datasync()
	}
	if err != nil {
		err = fmt.Errorf("%s: make its files durable: %w", db.name, err)
		db.fenceWith(err)
		return err
	}
	return db.st.fs.SyncDir(db.dir)
}

// dirtyAbove returns the first log record at or above lsn that is not in the
// files: 0 if there is none. db.mu is held.
func (db *DB) dirtyAbove(below commitlog.LSN) commitlog.LSN {
	if max(db.last, db.lastAny) < below {
		return 0
	}
	return below
}

func (db *DB) finishBase(b baseMove) {
	db.mu.Lock()
	defer db.mu.Unlock()
	db.base = b.meta.base()
	if b.dirty == 0 && max(db.last, db.lastAny) > b.meta.LSN {
		b.dirty = b.meta.LSN + 1 // appended meanwhile
	}
	db.dirty = b.dirty
	n := len(db.side)
	db.forget(b.need)
	b.side = append(b.side, db.side[n:]...)
	for _, name := range b.side {
		// A new transaction may have taken the name of an aborted one.
		if i := slices.Index(db.side, name); i >= 0 {
			db.side = slices.Delete(db.side, i, i+1)
			db.st.removeKept(name)
		}
	}
	if !db.file.inUse() {
		db.closeFiles()
	}
}
