package store

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/sabotage"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// replayAll brings the database file to the last committed transaction. A record
// that is missing or wrong fences the database (fenceDamaged); what is returned
// are errors of the disk, which may be gone the next time.
func (db *DB) replayAll(chains [][]entry) error {
	damage := db.replayChains(chains)
	if ofDisk(damage) {
		return damage
	}
	if db.at.TXID == 0 {
		return nil
	}
	if err := db.checkRecovered(); ofDisk(err) {
		return err
	} else if err != nil {
		damage = err
	} else if damage != nil {
		// It ends before a gap. The log need not hold what lies before any more.
		if err := db.syncFiles(db.at, false); err != nil {
			return err
		}
		db.base = db.at
	}
	db.applied = db.at
	if damage != nil {
		db.fenceDamaged(damage)
	}
	return nil
}

// ofDisk reports whether an error says that the disk is full or refuses, not
// that what is on it is wrong.
func ofDisk(err error) bool {
	var e syscall.Errno
	return errors.As(err, &e) && !errors.Is(err, os.ErrNotExist)
}

// holdBack refuses a database whose file could not be brought up to date, reads
// too, until that succeeds: its file is in the middle of a transaction. db is not
// yet shared.
func (db *DB) holdBack(chains [][]entry, err error) {
	if n := len(chains); n > 0 {
		last := chains[n-1][len(chains[n-1])-1]
		if last.max > db.base.TXID {
			db.at = position{ltx.Pos{TXID: last.max, PostApplyChecksum: last.post}, last.pageSize, last.commit}
		}
	}
	db.applied = db.base
	e := fmt.Errorf("%s: %w: its last transactions cannot be brought to its file: %w; nothing is lost: free space or mend the disk, and it comes back by itself", db.name, ErrFenced, err)
	db.fence.Store(&e)
	db.held.Store(&heldBack{chains: chains, err: e})
	db.log.Error("database held back: the disk refuses its last transactions; trying again", "pos", db.at.Pos, "err", err)
}

// A heldBack is a recovery of one database that waits for the disk.
type heldBack struct {
	chains [][]entry
	err    error
}

// heldAgain is how often a recovery that waits for the disk is tried again.
const heldAgain = 5 * time.Second

// finishHeld tries again to recover what was held back.
func (st *Store) finishHeld() {
	again := false
	for _, db := range st.all() {
		if db.held.Load() != nil && !db.release() {
			again = true
		}
	}
	if again {
		st.after(heldAgain, st.finishHeld)
	}
}

func (db *DB) release() bool {
	db.flushMu.Lock()
	defer db.flushMu.Unlock()
	db.mu.Lock()
	defer db.mu.Unlock()
	held := db.held.Load()
	at, applied := db.at, db.applied
	db.at = db.base
	db.fence.Store(nil)
	if err := db.replayAll(held.chains); err != nil {
		db.at, db.applied = at, applied
		db.fence.Store(&held.err)
		return false
	}
	db.held.Store(nil)
	db.log.Warn("database recovered: the disk takes its last transactions again", "pos", db.at.Pos)
	return true
}

// replayChains brings the database as far as its records follow each other. An
// error says what is missing or does not fit.
func (db *DB) replayChains(chains [][]entry) error {
	for _, list := range chains {
		if err := db.replayFrom(list); err != nil {
			return err
		}
	}
	return nil
}

// chainEntries joins level files and log records to ascending lists without
// gaps, and leaves out those that a larger one covers. With nothing lost there is
// one.
func chainEntries(files, logged []entry) [][]entry {
	all := slices.Concat(logged, files)
	slices.SortStableFunc(all, func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.min, b.min), cmp.Compare(b.max, a.max))
	})
	var chains [][]entry
	var list []entry
	for _, e := range all {
		n := len(list)
		switch {
		case n > 0 && e.max <= list[n-1].max:
			continue
		case n > 0 && (e.min != list[n-1].max+1 || e.pre != list[n-1].post && !e.full):
			chains = append(chains, list)
			list = nil
		}
		list = append(list, e)
	}
	if list != nil {
		chains = append(chains, list)
	}
	return chains
}

// replayFrom applies the records above base to the files (invariant 3 holds: the
// log was made durable when it was opened).
func (db *DB) replayFrom(list []entry) error {
	for _, e := range list {
		if e.max <= db.at.TXID {
			continue
		}
		if e.min > db.at.TXID+1 && !e.full {
			return fmt.Errorf("records %s to %s are missing", db.at.TXID+1, e.min-1)
		}
		if e.min == db.at.TXID+1 && !e.full && e.pre != db.at.PostApplyChecksum {
			return fmt.Errorf("record %s follows checksum %s, the one before it ends at %s", e.min, e.pre, db.at.PostApplyChecksum)
		}
		if err := db.replayEntry(e); err != nil {
			return fmt.Errorf("apply %s-%s: %w", e.min, e.max, err)
		}
	}
	return nil
}

func (db *DB) replayEntry(e entry) error {
	r, err := db.st.openRecord(e)
	if err != nil {
		return err
	}
	defer r.Close()
	files, err := db.openFiles(true)
	if err != nil {
		return err
	}
	dec := ltx.NewDecoder(r)
	h, err := dec.DecodeHeader()
	if err != nil {
		return err
	}
	if h.Commit == 0 {
		if err := files.data.Truncate(0); err != nil {
			return err
		}
	}
	if size := db.at.size(); h.PageSize == db.at.PageSize && int64(h.Commit)*int64(h.PageSize) < size {
		if err := files.data.Truncate(int64(h.Commit) * int64(h.PageSize)); err != nil {
			return err
		}
	}
	buf := make([]byte, h.PageSize)
	for {
		pgno, err := dec.DecodePage(buf)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if _, err := files.data.WriteAt(buf, int64(pgno-1)*int64(h.PageSize)); err != nil {
			return err
		}
		var b [sumSize]byte
		binary.BigEndian.PutUint64(b[:], uint64(ltx.PageChecksumFromCRC(pgno, h.PageSize, dec.PageCRC())))
		if _, err := files.sums.WriteAt(b[:], int64(pgno-1)*sumSize); err != nil {
			return err
		}
	}
	if err := dec.Close(); err != nil {
		return err
	}
	db.at = position{ltx.Pos{TXID: e.max, PostApplyChecksum: e.post}, h.PageSize, h.Commit}
	return nil
}

// checkRecovered truncates the file to the committed size and compares the
// checksum of all pages with that of the last transaction.
func (db *DB) checkRecovered() error {
	if db.at.Commit == 0 {
		return nil
	}
	db.onDisk.Store(true)
	files, err := db.openFiles(false)
	if err != nil {
		return err
	}
	size, err := files.data.Size()
	if err != nil {
		return err
	}
	want := db.at.size()
	if size < want && int64(ltx.LockPgno(db.at.PageSize)) != int64(db.at.Commit) {
		return fmt.Errorf("the database file has %d bytes, not %d", size, want)
	}
	if size != want && !sabotage.On(sabotage.SizeAtStart) {
		if err := files.data.Truncate(want); err != nil {
			return err
		}
	}
	got, err := totalSum(files.sums, db.at.PageSize, db.at.Commit)
	if err != nil {
		return fmt.Errorf("read checksums: %w", err)
	}
	if got != db.at.PostApplyChecksum {
		return fmt.Errorf("checksum of the database is %s, its last transaction %s says %s", got, db.at.TXID, db.at.PostApplyChecksum)
	}
	db.closeFiles()
	return nil
}
