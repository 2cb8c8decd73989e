package store

import (
	"errors"
	"fmt"
	"path"

	"github.com/litefs-agent/litefs-agent/ltx"
)

func (m *machine) checkInvariants() {
	m.c.t.Helper()
	m.checkWatch()
	for _, db := range m.st.all() {
		if err := db.checkInvariants(); err != nil {
			m.c.fatalf("%s, %s: %v", m.name, db.name, err)
		}
		if err := m.checkAborted(db); err != nil {
			m.c.fatalf("%s, %s: %v", m.name, db.name, err)
		}
	}
	if v := m.d.Violations(); len(v) > 0 {
		m.c.fatalf("%s: direct and buffered writes share a page: %q", m.name, v)
	}
}

// checkAborted asserts invariant 9: what an abort record names is no record.
func (m *machine) checkAborted(db *DB) error {
	gone := m.watch.aborted(m.st.wlog.Appended())
	db.mu.Lock()
	defer db.mu.Unlock()
	for _, e := range db.recs.list {
		if e.lsn != 0 && gone[e.lsn] {
			return fmt.Errorf("invariant 9: record %d-%d was aborted", e.min, e.max)
		}
	}
	return nil
}

// checkRecoveredSizes asserts that a start leaves each file as large as its
// database (invariant 24).
func (m *machine) checkRecoveredSizes() {
	for _, db := range m.st.all() {
		db.mu.Lock()
		at, exists := db.at, db.exists
		db.mu.Unlock()
		if !exists {
			continue
		}
		if size := int64(len(m.d.Image(path.Join(db.dir, "data")))); size != at.size() {
			m.c.fatalf("invariant 24: %s, %s: the file has %d bytes after a start, the database %d", m.name, db.name, size, at.size())
		}
	}
}

// checkInvariants asserts what can be seen without reading the disk. The
// numbers are those of ARCHITECTURE.md.
func (db *DB) checkInvariants() error {
	db.mu.Lock()
	defer db.mu.Unlock()
	var errs []error
	fail := func(n int, format string, args ...any) {
		errs = append(errs, fmt.Errorf("invariant %d: "+format, append([]any{n}, args...)...))
	}
	durable, appended := db.st.wlog.Durable(), db.st.wlog.Appended()
	if db.base.TXID > db.applied.TXID && db.applied.TXID != 0 || db.applied.TXID > db.at.TXID {
		fail(5, "base %s, applied %s, at %s", db.base, db.applied, db.at)
	}
	if db.recs.acked.TXID > db.at.TXID || durable > appended {
		fail(5, "acked %s, at %s, durable %d, appended %d", db.recs.acked, db.at, durable, appended)
	}
	list := db.recs.list
	for i, e := range list {
		switch {
		case e.min > e.max:
			fail(10, "record %d-%d", e.min, e.max)
		case i > 0 && (list[i-1].max+1 != e.min || list[i-1].post != e.pre && e.min != 1):
			fail(10, "record %d-%d (%s) does not follow %d-%d (%s)", e.min, e.max, e.pre, list[i-1].min, list[i-1].max, list[i-1].post)
		case i > 0 && e.lsn != 0 && e.lsn < list[i-1].lsn:
			fail(10, "record %d-%d is before the former in the log", e.min, e.max)
		}
		if e.max <= db.base.TXID || e.lsn == 0 {
			continue
		}
		if segs := db.st.wlog.Segments(); e.lsn < segs[0].First {
			fail(7, "record %d-%d above the base is in a segment that was reused", e.min, e.max)
		}
	}
	if n := len(list); n > 0 && (list[n-1].max != db.at.TXID || list[n-1].post != db.at.PostApplyChecksum) {
		fail(10, "the last record is %d, the position %s", list[n-1].max, db.at)
	}
	if p := db.pend; p != nil {
		if p.entry.min != db.at.TXID+1 || p.entry.pre != db.at.PostApplyChecksum {
			fail(8, "the undecided record %d does not follow %s", p.entry.min, db.at)
		}
		if p.wal != (db.wal != nil && p.walEnd > 0) {
			fail(8, "an undecided WAL record without its WAL")
		}
	}
	for _, l := range db.stack.Load().committed[1:] {
		if l.lsn > db.last {
			fail(3, "a layer waits for log record %d, the last one is %d", l.lsn, db.last)
		}
	}
	if sent := max(db.recs.sent, db.recs.mark); db.st.opt.Shipping && db.recs.acked.TXID > sent {
		fail(5, "acked %s, handed to a link up to %d", db.recs.acked, sent)
	}
	if db.recs.sent > db.at.TXID {
		fail(5, "handed to a link up to %d, at %s", db.recs.sent, db.at)
	}
	for _, e := range list {
		if e.max <= db.recs.sent && e.lsn > durable {
			fail(5, "record %d-%d was handed to a link and is not durable", e.min, e.max)
		}
	}
	if err := db.checkSums(); err != nil {
		errs = append(errs, err)
	}
	if used, most := db.st.pool.Used(), db.st.opt.Memory; used > most {
		fail(22, "%d bytes in memory, %d allowed", used, most)
	}
	return errors.Join(errs...)
}

// checkSums asserts that the checksums of all pages together are that of the
// position (invariant 10). db.mu is held.
func (db *DB) checkSums() error {
	if !db.exists || db.fenced() != nil {
		return nil
	}
	total := uint64(0)
	for pgno := uint32(1); pgno <= db.at.Commit; pgno++ {
		sum, err := db.sum(pgno)
		if err != nil {
			return nil // the disk
		}
		total ^= sum
	}
	if got := ltx.ChecksumFlag | ltx.Checksum(total); got != db.at.PostApplyChecksum {
		return fmt.Errorf("invariant 10: the pages have checksum %s at %s", got, db.at.Pos)
	}
	return nil
}
