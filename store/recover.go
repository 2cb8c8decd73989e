package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/sabotage"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// A recovering database collects what its folder and the log say of it.
type recovering struct {
	db      *DB
	meta    dbMeta
	hasMeta bool
	logged  []entry       // records in the log, ascending, aborted ones taken out
	grouped []entry       // parts of group files
	marked  bool          // a sent mark follows the metadata
	firstN  commitlog.LSN // first log record beyond the metadata
	rebased uint64        // history that began with the content at the metadata's base
}

type recovery struct {
	st       *Store
	byID     map[uint32]*recovering
	nameless map[uint32]bool // met in records that follow damage; told of once
}

// recover reads the folders and the log, and brings every database to its last
// committed transaction.
func (st *Store) recover() error {
	r := &recovery{st: st, byID: make(map[uint32]*recovering), nameless: make(map[uint32]bool)}
	if err := r.readFolders(); err != nil {
		return err
	}
	var err error
	lo := commitlog.Options{
		FS: st.fs, Dir: logDir, SegmentSize: st.opt.SegmentSize, Target: st.ringTarget,
		FlushAfter: st.flushAfter(), NoDirect: st.opt.NoDirect, Logger: st.log, Rand: st.opt.Rand,
	}
	if st.opt.inline {
		lo = lo.Inline()
	}
	st.wlog, err = commitlog.Open(lo, r.replay)
	if err != nil {
		return fmt.Errorf("open the log: %w", err)
	}
	st.wlog.OnDurable(func(commitlog.LSN) { st.notify(nil) })
	for _, d := range st.wlog.Damage() {
		st.log.Error("the log is damaged: records are missing; the segment is kept aside",
			"file", d.File, "from", d.From, "to", d.To, "reason", d.Reason)
	}
	if err := r.readGroups(); err != nil {
		return err
	}
	ids := make([]uint32, 0, len(r.byID))
	for id := range r.byID {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		if err := r.byID[id].finish(); err != nil {
			return err
		}
	}
	return st.collectGroups()
}

func (st *Store) flushAfter() time.Duration {
	d := st.opt.Flush
	if a := st.opt.Durability.After; a > 0 {
		d = min(d, a)
	}
	return d
}

func (r *recovery) readFolders() error {
	dirs, err := r.st.fs.ReadDir(dbsDir)
	if err != nil {
		return fmt.Errorf("read the data folder: %w", err)
	}
	if len(dirs) > 0 {
		// What a killed agent left in the page cache is going to be relied on.
		if err := r.st.fs.SyncFS(); err != nil {
			return fmt.Errorf("sync the data folder: %w", err)
		}
	}
	for _, d := range dirs {
		dir := path.Join(dbsDir, d.Name())
		m, ok, err := readMeta(r.st.fs, dir)
		if err != nil {
			return fmt.Errorf("read %s: %w", dir, err)
		}
		if !ok {
			continue // not yet known but to the log
		}
		rec := r.database(m.ID, m.Name)
		rec.meta, rec.hasMeta = m, true
		rec.db.history, rec.db.epoch = m.History, Epoch{m.EpochN, m.EpochGrant}
	}
	return nil
}

func (r *recovery) database(id uint32, name string) *recovering {
	if rec := r.byID[id]; rec != nil {
		return rec
	}
	f := r.st.newFile(name, r.st.databaseMode(name))
	db := r.st.newDB(f, name)
	db.id = id
	rec := &recovering{db: db}
	r.byID[id] = rec
	r.st.byID[id], r.st.byName[name] = db, db
	r.st.lastID = max(r.st.lastID, id)
	return rec
}

// replay takes one record of the log.
func (r *recovery) replay(rec commitlog.Record) error {
	if rec.Kind == commitlog.KindGroup {
		return splitGroup(rec.Payload, func(h commitlog.Header, off int64, body []byte) error {
			part := rec
			part.Header = h
			return r.replayOne(part, off, body, uint64(rec.LSN))
		})
	}
	return r.replayOne(rec, 0, rec.Payload, 0)
}

func (r *recovery) replayOne(rec commitlog.Record, off int64, body []byte, group uint64) error {
	if rec.Kind == commitlog.KindCreate {
		x := r.database(rec.DB, string(body))
		if !x.hasMeta {
			x.db.history = rec.History
		}
		x.saw(rec.LSN)
		return nil
	}
	x := r.byID[rec.DB]
	if x == nil {
		if rec.AfterDamage && rec.DB != 0 && !r.nameless[rec.DB] {
			r.nameless[rec.DB] = true
			r.st.log.Error("records of a database whose name is lost with the damaged part of the log", "id", rec.DB, "lsn", rec.LSN)
		}
		if rec.AfterDamage || rec.DB == 0 {
			return nil
		}
		return fmt.Errorf("log record %d is of database %d, which nothing names: %w", rec.LSN, rec.DB, errBadRecord)
	}
	x.saw(rec.LSN)
	if old := x.hasMeta && rec.LSN <= x.meta.LSN; rec.History != 0 && rec.History != x.db.history && (!old || !sabotage.On(sabotage.OldLineForgotten)) {
		if old {
			return nil // of a line that was replaced since
		}
		// Another line replaced the one before: nothing of that counts any more.
		x.db.history, x.db.epoch = rec.History, Epoch{rec.EpochN, rec.EpochGrant}
		x.db.recs = records{}
		x.logged = nil
		if rec.Kind == commitlog.KindBase {
			x.rebased = rec.History
		}
	}
	switch rec.Kind {
	case commitlog.KindLTX, commitlog.KindReference:
		e, err := x.db.parseEntry(rec, off, body)
		if err != nil {
			return fmt.Errorf("log record %d: %w", rec.LSN, err)
		}
		e.group = group
		x.logged = append(x.logged, e) // a gap shows when it is replayed
	case commitlog.KindAbort:
		if len(body) != 8 {
			return errBadRecord
		}
		target := commitlog.LSN(binary.BigEndian.Uint64(body))
		if n := len(x.logged); n > 0 && x.logged[n-1].lsn == target {
			x.logged = x.logged[:n-1]
		}
	case commitlog.KindAcked:
		if len(body) != 16 {
			return errBadRecord
		}
		x.db.recs.acked = ltx.Pos{
			TXID:              ltx.TXID(binary.BigEndian.Uint64(body)),
			PostApplyChecksum: ltx.Checksum(binary.BigEndian.Uint64(body[8:])),
		}
	case commitlog.KindSent:
		if len(body) != 8 {
			return errBadRecord
		}
		if rec.LSN > x.meta.LSN { // else the metadata says it, or something lower
			x.db.recs.mark, x.marked = ltx.TXID(binary.BigEndian.Uint64(body)), true
		}
	}
	return nil
}

func (x *recovering) saw(lsn commitlog.LSN) {
	x.db.last = lsn
	if x.firstN == 0 && lsn > x.meta.LSN {
		x.firstN = lsn
	}
}

// parseEntry describes an LTX or reference record.
func (db *DB) parseEntry(rec commitlog.Record, off int64, body []byte) (entry, error) {
	var h ltx.Header
	var e entry
	if len(body) < ltx.HeaderSize+ltx.TrailerSize {
		return e, errBadRecord
	}
	if err := h.UnmarshalBinary(body[:ltx.HeaderSize]); err != nil {
		return e, err
	}
	post := body[len(body)-ltx.TrailerSize:]
	size := int64(len(body))
	if rec.Kind == commitlog.KindReference {
		if len(body) != referenceSize {
			return e, errBadRecord
		}
		post = body[ltx.HeaderSize:]
		size = int64(binary.BigEndian.Uint64(body[ltx.HeaderSize+ltx.TrailerSize:]))
		e.path = path.Join(db.dir, fmt.Sprintf("%016x", rec.History), "0", sideFilename(h.MinTXID, h.MaxTXID))
	}
	e.fill(h, ltx.Checksum(binary.BigEndian.Uint64(post)), size)
	e.full = e.full || rec.Flags&flagFull != 0
	e.lsn, e.ref, e.off = rec.LSN, rec.Ref, off
	return e, nil
}

// flagFull marks a record that changes the page size or replaces everything: it
// holds every page.
const flagFull uint8 = 2

func (e *entry) fill(h ltx.Header, post ltx.Checksum, size int64) {
	e.min, e.max, e.pre, e.post = h.MinTXID, h.MaxTXID, h.PreApplyChecksum, post
	e.commit, e.pageSize, e.time, e.size = h.Commit, h.PageSize, h.Timestamp, size
	e.full = h.MinTXID == 1 || h.Commit == 0
}

// finish brings one database to its last committed transaction: its file at
// base, then level files and log records above it.
func (x *recovering) finish() error {
	db := x.db
	if err := x.findSideFiles(); err != nil {
		return err
	}
	files, err := db.levelFiles(slices.Concat(x.logged, x.grouped))
	if err != nil {
		return err
	}
	x.takeMeta()
	db.at = db.base
	chains := chainEntries(slices.Concat(x.grouped, files), x.logged)
	x.keepLast(chains)
	if err := db.removeCovered(files, chains); err != nil {
		return err
	}
	if err := db.replayAll(chains); err != nil {
		// Its records are whole: nothing is lost, it only cannot be shown.
		db.holdBack(chains, err)
	}
	if db.at.TXID == 0 {
		// Created, and no transaction survived: only the id and history are known.
		return nil
	}
	if db.damage == nil {
		// What was not there was not sent.
		db.recs.mark = min(db.recs.mark, db.at.TXID)
	}
	db.exists = db.at.Commit > 0
	db.size.Store(db.at.size())
	db.lastTime = db.recs.lastTime(x.meta.Time)
	db.mtime.Store(db.lastTime.UnixNano())
	if !db.exists {
		return nil
	}
	return db.st.place(db)
}

// takeMeta takes over what the metadata says, where the log does not say
// something newer.
func (x *recovering) takeMeta() {
	if !x.hasMeta {
		return
	}
	db, m := x.db, x.meta
	db.metaSeq, db.metaSlot, db.metaNamed = m.Seq, m.slot, true
	if m.History == db.history || x.rebased == db.history {
		db.base = m.base()
	}
	if m.History != db.history {
		m.AckedTXID, m.Sent = 0, 0
	}
	if m.LSN > db.last {
		db.last = m.LSN
	}
	if db.recs.acked.TXID < m.AckedTXID {
		db.recs.acked = ltx.Pos{TXID: m.AckedTXID, PostApplyChecksum: m.AckedSum}
	}
	if !x.marked {
		db.recs.mark = m.Sent
	}
}

// keepLast makes the last chain the history that is held. Files of others are of
// use until the database is replayed, at most.
func (x *recovering) keepLast(chains [][]entry) {
	db := x.db
	db.dirty = x.firstN
	for i, list := range chains {
		if i == len(chains)-1 && list[len(list)-1].max >= db.base.TXID {
			db.recs.list = list
		} else {
			// Before a gap, or forgotten and come back with a power cut.
			db.dropFiles(list)
		}
	}
	for _, e := range db.recs.list {
		if e.lsn != 0 && (db.dirty == 0 || e.lsn < db.dirty) {
			db.dirty = e.lsn
		}
	}
}

// removeCovered removes the files that a larger one, or the log, covers: what a
// crash left in the middle of a compaction. At once, since their names may be
// wanted again.
func (db *DB) removeCovered(files []entry, chains [][]entry) error {
	for _, e := range files {
		same := func(x entry) bool { return x.path == e.path }
		if slices.ContainsFunc(chains, func(list []entry) bool { return slices.ContainsFunc(list, same) }) {
			continue
		}
		if err := db.st.fs.Remove(e.path); err != nil {
			return fmt.Errorf("%s: remove %s: %w", db.name, e.path, err)
		}
	}
	return nil
}

// findSideFiles takes those references out of what was logged whose file has
// gone into a level file already.
func (x *recovering) findSideFiles() error {
	var err error
	x.logged = slices.DeleteFunc(x.logged, func(e entry) bool {
		if e.path == "" {
			return false
		}
		_, serr := x.db.st.fs.Stat(e.path)
		if serr != nil && !errors.Is(serr, os.ErrNotExist) {
			err = serr
		}
		return serr != nil
	})
	return err
}

// place shows a database at the mount.
func (st *Store) place(db *DB) error {
	f := db.file
	f.isDB.Store(true)
	f.gone.Store(false) // a replica that was dropped and made again
	f.db.Store(db)
	if d := path.Dir(db.name); d != "." {
		if err := disk.MkdirAll(st.fs, path.Join(filesDir, d), 0o770); err != nil {
			return fmt.Errorf("make folder %s: %w", d, err)
		}
	}
	// What it grew from, when the agent stopped before it was removed.
	if err := st.fs.Remove(path.Join(filesDir, db.name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s: remove the file it grew from: %w", db.name, err)
	}
	st.nsMu.Lock()
	st.files[db.name] = f
	st.nsMu.Unlock()
	return nil
}

// levelFiles lists the level files of the present history but for known ones, and
// removes what a crash left of unfinished ones.
func (db *DB) levelFiles(known []entry) ([]entry, error) {
	root := path.Join(db.dir, fmt.Sprintf("%016x", db.history))
	levels, err := db.st.fs.ReadDir(root)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var list []entry
	for _, l := range levels {
		if _, err := strconv.Atoi(l.Name()); err != nil {
			continue
		}
		names, err := db.st.fs.ReadDir(path.Join(root, l.Name()))
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			name := path.Join(root, l.Name(), n.Name())
			if slices.ContainsFunc(known, func(e entry) bool { return e.path == name }) {
				continue
			}
			var e entry
			if strings.HasSuffix(name, extPages) {
				e, _, err = db.readPages(name)
			} else {
				e, err = db.readLevelFile(name)
			}
			if err != nil || !strings.HasSuffix(name, extLevel) && !e.set {
				if err := db.st.fs.Remove(name); err != nil {
					return nil, err
				}
				continue
			}
			list = append(list, e)
		}
	}
	return list, nil
}

func (db *DB) readLevelFile(name string) (entry, error) {
	f, err := db.st.fs.OpenFile(name, os.O_RDONLY, 0)
	if err != nil {
		return entry{}, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return entry{}, err
	}
	if size < ltx.HeaderSize+ltx.TrailerSize {
		return entry{}, io.ErrUnexpectedEOF
	}
	h, err := ltx.ReadHeader(f)
	if err != nil {
		return entry{}, err
	}
	min, max, err := ltx.ParseFilename(path.Base(name))
	if err != nil || min != h.MinTXID || max != h.MaxTXID {
		return entry{}, fmt.Errorf("%s: name and content differ", name)
	}
	var tr [ltx.TrailerSize]byte
	if _, err := f.ReadAt(tr[:], size-ltx.TrailerSize); err != nil && err != io.EOF {
		return entry{}, err
	}
	e := entry{path: name}
	e.fill(h, ltx.Checksum(binary.BigEndian.Uint64(tr[:])), size)
	return e, nil
}
