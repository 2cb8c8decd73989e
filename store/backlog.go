package store

import (
	"cmp"
	"slices"
	"time"
)

// logWait bounds how long a WRITE waits for the log: a node never stops writing.
const logWait = time.Second

// LogAhead reports whether programs commit faster than the log can be brought to
// databases and level files: the next WRITE of a database or WAL is to call
// AwaitLog first, outside of any lock.
func (st *Store) LogAhead() bool {
	return st.ahead.Load() > aheadSegments*st.opt.SegmentSize
}

// AwaitLog waits, for a second at most, until the log is shorter.
func (st *Store) AwaitLog() {
	if st.opt.inline || !st.LogAhead() {
		return
	}
	st.kickFlush()
	st.roomMu.Lock()
	room := st.room
	st.roomMu.Unlock()
	select {
	case <-room:
	case <-st.done:
	case <-time.After(logWait):
	}
}

// keptBytes returns how much of the budget level files take.
func (db *DB) keptBytes() (n int64) {
	db.mu.Lock()
	defer db.mu.Unlock()
	for _, e := range db.recs.list {
		if e.lsn == 0 && !e.set {
			n += e.size
		}
	}
	return n
}

// aheadSegments is how many segments the log may grow while it is brought to
// databases and level files, before writers wait for that.
const aheadSegments = 2

// levelBudget is what of the budget level files may take: two thirds of what is
// not the log's, since a file is written before those that it replaces go.
func (st *Store) levelBudget() int64 {
	return max(st.opt.Budget/4, (st.opt.Budget-int64(st.ringTarget+aheadSegments)*st.opt.SegmentSize)*2/3)
}

// shrink brings the level files below the budget, and no further than it must:
// first the history goes that nobody lacks, then what the hub lacks is compacted
// into one record a database, then only the set of changed pages is kept of it, the
// largest backlog first each time. checkpointMu is held, and bases have moved.
func (st *Store) shrink() error {
	type share struct {
		db    *DB
		bytes int64
	}
	var list []share
	var total int64
	for _, db := range st.all() {
		if n := db.keptBytes(); n > 0 {
			list = append(list, share{db, n})
			total += n
		}
	}
	for _, step := range []func(*DB) error{(*DB).forgetAcked, (*DB).joinBacklog, (*DB).keepPagesOnly} {
		slices.SortFunc(list, func(a, b share) int { return cmp.Compare(b.bytes, a.bytes) })
		for i := range list {
			if total <= st.levelBudget() {
				return nil
			}
			x := &list[i]
			if err := step(x.db); err != nil {
				return err
			}
			now := x.db.keptBytes()
			total += now - x.bytes
			x.bytes = now
		}
	}
	if total > st.levelBudget() {
		st.log.Warn("the records that must be kept exceed the budget", "bytes", total, "budget", st.opt.Budget)
	}
	return nil
}

// replaceKept puts one entry, or none, in the place of files at index i to k of
// the history, and removes them.
func (db *DB) replaceKept(i, k int, by ...entry) {
	db.mu.Lock()
	gone := slices.Clone(db.recs.list[i:k])
	db.recs.list = slices.Concat(db.recs.list[:i], by, db.recs.list[k:])
	n := len(db.side)
	db.dropFiles(gone)
	files := slices.Clone(db.side[n:])
	db.side = db.side[:n]
	db.mu.Unlock()
	for _, name := range files {
		db.st.removeKept(name)
	}
}

// keptRun returns the level files that ok accepts, from the first that it does on
// without gaps: indexes i to k, and copies.
func (db *DB) keptRun(from int, ok func(entry) bool) (i, k int, list []entry) {
	db.mu.Lock()
	defer db.mu.Unlock()
	all := db.recs.list
	i = from
	for i < len(all) && (all[i].lsn != 0 || !ok(all[i])) {
		i++
	}
	k = i
	for k < len(all) && all[k].lsn == 0 && ok(all[k]) {
		k++
	}
	return i, k, slices.Clone(all[min(i, len(all)):k])
}

// forgetAcked gives up the history that only the operator wants.
func (db *DB) forgetAcked() error {
	db.flushMu.Lock()
	defer db.flushMu.Unlock()
	db.mu.Lock()
	limit := db.base.TXID
	if db.st.opt.Shipping {
		limit = min(limit, db.recs.acked.TXID)
	}
	db.mu.Unlock()
	i, k, list := db.keptRun(0, func(e entry) bool { return e.max <= limit })
	if i > 0 || len(list) == 0 {
		return nil
	}
	db.log.Info("history given up: the budget is used up", "to", list[len(list)-1].max)
	db.replaceKept(i, k)
	return nil
}

// joinBacklog compacts what the hub lacks, and cannot stand in, into one record,
// unless most of it is one record already: then it would gain little.
func (db *DB) joinBacklog() error {
	db.flushMu.Lock()
	defer db.flushMu.Unlock()
	for from := 0; ; {
		i, k, list := db.unsent(from, func(e entry) bool { return !e.set && e.group == 0 })
		if len(list) == 0 {
			return nil
		}
		from = k
		var total, most int64
		for _, e := range list {
			total += e.size
			most = max(most, e.size)
		}
		if len(list) < 2 || (total-most)*4 < total {
			continue
		}
		e, err := db.joinFiles(list)
		if err != nil {
			return err
		}
		db.replaceKept(i, k, e)
		from = i + 1
	}
}

// unsent is keptRun of records beyond those that the hub may stand between. With
// no link there are none.
func (db *DB) unsent(from int, ok func(entry) bool) (i, k int, list []entry) {
	db.mu.Lock()
	sent, shipping := db.recs.boundary(), db.st.opt.Shipping
	db.mu.Unlock()
	return db.keptRun(from, func(e entry) bool { return shipping && e.min > sent && ok(e) })
}

// joinFiles compacts any number of level files into one, a few at a time.
func (db *DB) joinFiles(list []entry) (entry, error) {
	for len(list) > 1 {
		var next []entry
		for part := range slices.Chunk(list, maxLevelFiles) {
			e := part[0]
			if len(part) > 1 {
				var err error
				if e, err = db.writeLevel(2, part); err != nil {
					return e, err
				}
			}
			next = append(next, e)
		}
		for _, e := range list {
			// Only what was made on the way: the rest counts until it is replaced.
			if !slices.ContainsFunc(next, func(x entry) bool { return x.path == e.path }) && !db.stillThere(e) {
				db.st.removeKept(e.path)
			}
		}
		list = next
	}
	return list[0], nil
}

// keepPagesOnly keeps of what the hub lacks only which pages changed, as far as
// the database file has their content.
func (db *DB) keepPagesOnly() error {
	db.flushMu.Lock()
	defer db.flushMu.Unlock()
	db.mu.Lock()
	base := db.base.TXID
	db.mu.Unlock()
	i, k, list := db.unsent(0, func(e entry) bool { return e.max <= base })
	if len(list) == 0 || len(list) == 1 && list[0].set {
		return nil
	}
	e, err := db.writePages(list)
	if err != nil {
		return err
	}
	db.log.Info("the backlog is kept as a set of pages: the budget is used up",
		"from", e.min, "to", e.max, "pages", e.size/int64(max(e.pageSize, 1)))
	db.replaceKept(i, k, e)
	return nil
}
