package store

import (
	"errors"
	"fmt"

	"github.com/litefs-agent/litefs-agent/ltx"
)

// Verify computes the checksum of every page of the present content and compares
// it with the one kept, their XOR with that of the last transaction, and reads
// every record that is kept, in the log and in level files. It returns all
// faults joined, the position that was verified, and the number of records.
func (db *DB) Verify() (pos ltx.Pos, records int, err error) {
	defer db.pin()()
	db.settle()
	pos, faults := db.verifyPages()
	n, more := db.verifyRecords()
	return pos, n, errors.Join(append(faults, more...)...)
}

func (db *DB) verifyPages() (ltx.Pos, []error) {
	img, err := db.Snapshot()
	if errors.Is(err, ErrNotExist) {
		return db.Info().Pos, nil // dropped: nothing to read
	}
	if err != nil {
		return db.Info().Pos, []error{db.findDamage(err)}
	}
	defer img.Close()
	return img.Pos, nil
}

// findDamage names the pages whose content is not what their checksum says.
func (db *DB) findDamage(cause error) error {
	db.mu.Lock()
	defer db.mu.Unlock()
	errs := []error{cause}
	lock := ltx.LockPgno(max(db.at.PageSize, 512))
	buf := make([]byte, db.at.PageSize)
	for pgno := uint32(1); pgno <= db.at.Commit && len(errs) < 20; pgno++ {
		if pgno == lock {
			continue
		}
		want, err := db.sum(pgno)
		if err == nil {
			err = db.page(pgno, buf)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: page %d: %w", db.name, pgno, err))
			continue
		}
		if got := ltx.PageChecksum(pgno, buf); uint64(got) != want {
			errs = append(errs, fmt.Errorf("%s: page %d has checksum %s, not %s", db.name, pgno, got, ltx.Checksum(want)))
		}
	}
	return errors.Join(errs...)
}

func (db *DB) verifyRecords() (int, []error) {
	if err := db.Sync(); err != nil {
		return 0, []error{err}
	}
	db.mu.Lock()
	list := append([]entry(nil), db.recs.list...)
	db.mu.Unlock()
	var errs []error
	for i, e := range list {
		if i > 0 && !e.full && (list[i-1].post != e.pre || list[i-1].max+1 != e.min) {
			errs = append(errs, fmt.Errorf("%s: record %s-%s does not follow %s", db.name, e.min, e.max, list[i-1].max))
		}
		if e.set {
			if _, _, err := db.readPages(e.path); err != nil && db.stillThere(e) {
				errs = append(errs, fmt.Errorf("%s: %w", db.name, err))
			}
			continue
		}
		r, err := db.st.openRecord(e)
		if err != nil {
			if db.stillThere(e) {
				errs = append(errs, fmt.Errorf("%s: record %s-%s: %w", db.name, e.min, e.max, err))
			}
			continue
		}
		_, tr, err := ltx.Verify(r)
		_ = r.Close()
		if err == nil && tr.PostApplyChecksum != e.post {
			err = fmt.Errorf("ends at checksum %s, not %s", tr.PostApplyChecksum, e.post)
		}
		if err != nil && db.stillThere(e) {
			errs = append(errs, fmt.Errorf("%s: record %s-%s: %w", db.name, e.min, e.max, err))
		}
	}
	return len(list), errs
}

// stillThere reports whether a record was not replaced by a compacted one.
func (db *DB) stillThere(e entry) bool {
	db.mu.Lock()
	defer db.mu.Unlock()
	for _, x := range db.recs.list {
		if x.min == e.min && x.max == e.max && x.path == e.path {
			return true
		}
	}
	return false
}
