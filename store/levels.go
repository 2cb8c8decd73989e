package store

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// maxLevelFiles is how many level files of one database may stand side by side
// before neighbours are compacted, and how many become one.
const maxLevelFiles = 16

// keepHistory writes level files for the records below lsn that the log is about
// to lose and somebody still needs: recovery (above base), a link (not acked),
// or the history that the operator wants. It returns the first TXID that is still
// needed: what lies before is forgotten once the metadata with the new base is
// durable (forget). db.flushMu is held, db.mu is not.
func (db *DB) keepHistory(below commitlog.LSN, base position) (ltx.TXID, error) {
	db.mu.Lock()
	n := 0
	for n < len(db.recs.list) && db.recs.list[n].lsn < below {
		n++
	}
	list := slices.Clone(db.recs.list[:n])
	need := db.neededFrom(base)
	db.mu.Unlock()
	drop := 0
	for drop < len(list) && list[drop].max < need {
		drop++
	}
	kept, err := db.writeLevels(list[drop:], db.classes(base))
	if err != nil {
		return 0, err
	}
	db.mu.Lock()
	db.recs.list = slices.Concat(list[:drop], kept, db.recs.list[n:])
	db.mu.Unlock()
	return need, db.mergeLevels(drop, base)
}

// A class says with what else a record may be compacted: with its neighbours of
// the same class. The zero class stays single.
type class struct {
	kind int8
	step int64 // of the backlog: one position of each step is kept
}

// classes returns the function that tells the class of a record. Those that the
// hub may stand between (sent and not acked) stay single, and so do parts of
// groups that it lacks and sets of pages. What recovery does not need stays
// apart.
func (db *DB) classes(base position) func(entry) class {
	db.mu.Lock()
	defer db.mu.Unlock()
	acked, sent, shipping := db.recs.acked.TXID, db.recs.boundary(), db.st.opt.Shipping
	step := db.st.opt.BacklogStep.Milliseconds()
	return func(e entry) class {
		switch {
		case e.set:
			return class{}
		case e.max <= acked && e.max <= base.TXID:
			return class{kind: 1}
		case e.max <= acked:
			return class{kind: 2}
		case e.group != 0 && shipping:
			return class{}
		case e.min > sent:
			return class{3, e.time / step}
		}
		return class{}
	}
}

// forget drops the records before need from the index. db.mu is held.
func (db *DB) forget(need ltx.TXID) {
	n := 0
	for n < len(db.recs.list) && db.recs.list[n].max < need {
		n++
	}
	db.dropFiles(db.recs.list[:n])
	db.recs.list = slices.Clone(db.recs.list[n:])
}

// dropFiles has the files of entries that do not count any more removed when the
// metadata with the new base is durable: until then recovery needs them. db.mu is
// held.
func (db *DB) dropFiles(list []entry) {
	for _, e := range list {
		if e.path != "" && !e.inGroupFile() {
			db.side = append(db.side, e.path)
		}
		if e.group != 0 && e.lsn == 0 {
			db.side = append(db.side, groupPath(e.group))
		}
	}
}

// neededFrom returns the first TXID whose record must be kept. db.mu is held.
func (db *DB) neededFrom(base position) ltx.TXID {
	need := base.TXID + 1
	if db.st.opt.Shipping {
		need = min(need, db.recs.acked.TXID+1)
	}
	oldest := db.st.opt.Now().Add(-db.st.opt.History).UnixMilli()
	for _, e := range db.recs.list {
		if e.max >= need {
			break
		}
		if e.time > oldest {
			return e.min
		}
	}
	return need
}

// writeLevels makes files of the records that are only in the log: runs of one
// class become one file.
func (db *DB) writeLevels(list []entry, class func(entry) class) ([]entry, error) {
	var kept []entry
	for i := 0; i < len(list); {
		e := list[i]
		if e.path != "" || e.group != 0 {
			if err := db.keepSingle(&e); err != nil {
				return nil, err
			}
			kept = append(kept, e)
			i++
			continue
		}
		k := i + 1
		for c := class(e); k < len(list) && list[k].path == "" && list[k].group == 0 && c.kind != 0 && class(list[k]) == c; {
			k++
		}
		level := 0
		if k > i+1 {
			level = 1
		}
		m, err := db.writeLevel(level, list[i:k])
		if err != nil {
			return nil, err
		}
		kept = append(kept, m)
		i = k
	}
	return kept, nil
}

// keepSingle has a record that the log is about to lose, and that cannot be
// compacted, refer to files: a part of a group to the group's, and a side file,
// which becomes a level file.
func (db *DB) keepSingle(e *entry) error {
	if e.group != 0 && e.lsn != 0 {
		if err := db.st.keepGroup(e); err != nil {
			return fmt.Errorf("%s: %w", db.name, err)
		}
	}
	e.lsn, e.ref = 0, commitlog.Ref{}
	name, ok := strings.CutSuffix(e.path, extSide)
	if !ok {
		return nil
	}
	err := db.st.fs.Rename(e.path, name+extLevel)
	if errors.Is(err, os.ErrNotExist) {
		// A checkpoint that failed later came as far as this.
		_, err = db.st.fs.Stat(name + extLevel)
	}
	if err == nil {
		err = db.st.fs.SyncDir(path.Dir(name))
	}
	if err != nil {
		return fmt.Errorf("%s: keep %s: %w", db.name, e.path, err)
	}
	e.path = name + extLevel
	return nil
}

// writeLevel compacts consecutive records into one durable file.
func (db *DB) writeLevel(level int, list []entry) (entry, error) {
	first, last := list[0], list[len(list)-1]
	dir := db.levelDir(level)
	if err := db.makeDir(); err != nil {
		return entry{}, err
	}
	if err := disk.MkdirAll(db.st.fs, dir, 0o700); err != nil {
		return entry{}, fmt.Errorf("%s: make %s: %w", db.name, dir, err)
	}
	name := path.Join(dir, ltx.FormatFilename(first.min, last.max))
	var e entry
	size, err := db.st.writeDurable(name, func(w io.Writer) (err error) {
		e, err = db.compact(w, list)
		return err
	})
	if err != nil {
		return entry{}, fmt.Errorf("%s: write %s: %w", db.name, name, err)
	}
	e.path, e.size = name, size
	return e, nil
}

// compact writes one LTX file that stands for consecutive records.
func (db *DB) compact(w io.Writer, list []entry) (entry, error) {
	first, last := list[0], list[len(list)-1]
	e := entry{
		min: first.min, max: last.max, pre: first.pre, post: last.post,
		commit: last.commit, pageSize: last.pageSize, time: last.time,
	}
	for _, x := range list {
		e.full = e.full || x.full
	}
	readers := make([]io.Reader, 0, len(list))
	for _, x := range list {
		r, err := db.st.openRecord(x)
		if err != nil {
			return e, err
		}
		defer r.Close()
		readers = append(readers, r)
	}
	if len(list) == 1 {
		_, err := io.Copy(w, readers[0])
		return e, err
	}
	_, tr, err := ltx.Compact(w, readers...)
	if err == nil && tr.PostApplyChecksum != last.post {
		err = fmt.Errorf("compaction ends at %s, not %s", tr.PostApplyChecksum, last.post)
	}
	return e, err
}

// mergeLevels compacts the level files of one database when there are many; those
// before index from are about to be forgotten. db.flushMu is held.
func (db *DB) mergeLevels(from int, base position) error {
	db.mu.Lock()
	n := from
	for n < len(db.recs.list) && db.recs.list[n].lsn == 0 {
		n++
	}
	list := slices.Clone(db.recs.list[from:n])
	n -= from
	db.mu.Unlock()
	if n <= maxLevelFiles {
		return nil
	}
	class := db.classes(base)
	var kept []entry
	for i := 0; i < n; {
		k := i + 1
		for c := class(list[i]); k < n && k-i < maxLevelFiles && c.kind != 0 && class(list[k]) == c; {
			k++
		}
		e := list[i]
		if k > i+1 {
			var err error
			if e, err = db.writeLevel(2, list[i:k]); err != nil {
				return err
			}
		}
		kept = append(kept, e)
		i = k
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	db.recs.list = slices.Concat(db.recs.list[:from], kept, db.recs.list[from+n:])
	db.dropFiles(slices.DeleteFunc(list, func(e entry) bool {
		return slices.ContainsFunc(kept, func(k entry) bool { return k.path == e.path })
	}))
	return nil
}

// openRecord reads the LTX bytes of a record, wherever they lie.
func (st *Store) openRecord(e entry) (io.ReadCloser, error) {
	r, off, err := st.recordAt(e)
	if err != nil {
		return nil, err
	}
	return section(r, off, e.size), nil
}

// readerAtCloser is what holds records.
type readerAtCloser interface {
	io.ReaderAt
	io.Closer
}

// recordAt opens what holds a record, and says where in it the LTX bytes begin.
func (st *Store) recordAt(e entry) (r readerAtCloser, off int64, err error) {
	if e.path == "" {
		return logReader{st.wlog, e.ref}, e.off, nil
	}
	if e.inGroupFile() {
		off = e.off
	}
	f, err := st.fs.OpenFile(e.path, os.O_RDONLY, 0)
	if name, ok := strings.CutSuffix(e.path, extSide); ok && errors.Is(err, os.ErrNotExist) {
		f, err = st.fs.OpenFile(name+extLevel, os.O_RDONLY, 0) // it has become a level file meanwhile
	}
	if err != nil {
		return nil, 0, err
	}
	return f, off, nil
}

// logReader reads the payload of one log record.
type logReader struct {
	log *commitlog.Log
	ref commitlog.Ref
}

func (r logReader) ReadAt(p []byte, off int64) (int, error) {
	if err := r.log.ReadAt(r.ref, p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Close does nothing: the log stays open.
func (r logReader) Close() error { return nil }
