package store

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/sabotage"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// A change is what a transaction did, as the capture found it.
type change struct {
	pageSize, commit uint32
	pages            []uint32 // candidates, ascending; those of the growth are added by encode
	read             func(pgno uint32, p []byte) error
	wal              ltx.Header // only the WAL fields count
	large            int64      // bytes of pages beyond which it goes to a side file; 0: Options.Large
}

type pageSum struct {
	pgno uint32
	sum  uint64
}

// A pending record is in the log and not yet confirmed: a prepared rollback
// transaction or a tentative WAL one. Its effect on position and checksums is
// kept here until then, so that an abort has nothing to undo.
type pending struct {
	lsn   commitlog.LSN
	entry entry
	after position
	sums  []pageSum // of the pages that changed
	time  time.Time // of the commit, by the clock that may be wrong
	made  time.Time // the same, for measuring

	wal              bool
	walStart, walEnd int64  // its frames, as offsets in the WAL
	walFrame         uint32 // number of its last frame, from 1
	frames           map[uint32]int64
	versions         []uint64 // that it added to walState.versions
}

// scratch is what encoding one transaction needs, reused.
type scratch struct {
	page  []byte // page contents, one behind the other
	old   []byte
	pages []ltx.Page
	out   []byte
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// encode turns a change into an LTX record and appends it to the log. It returns
// nil without error if nothing changed (invariant 25). db.mu is held.
//
// Small transactions are built in memory. Beyond Options.Large they are
// streamed to a side file, which is durable before its reference is appended.
func (db *DB) encode(c change, flags uint8, mode commitlog.Mode) (*pending, error) {
	p, payload, sc, err := db.build(c)
	if sc != nil {
		defer scratches.Put(sc)
	}
	if p == nil || err != nil {
		return nil, err
	}
	if err := db.register(); err != nil {
		return nil, err
	}
	h := db.header(commitlog.KindLTX, flags|p.entry.flags())
	if p.entry.path != "" {
		h.Kind = commitlog.KindReference
	}
	lsn, ref, err := db.st.wlog.Append(h, mode, payload)
	if err != nil {
		return nil, fmt.Errorf("%s: append %s to the log: %w", db.name, p.after.Pos, err)
	}
	p.lsn, p.entry.lsn, p.entry.ref = lsn, lsn, ref
	if db.st.opt.Shipping && h.Kind == commitlog.KindLTX {
		db.st.recent.put(ref, payload)
	}
	db.last = lsn
	db.markDirty(lsn)
	return p, nil
}

func (e *entry) flags() uint8 {
	if e.full {
		return flagFull
	}
	return 0
}

func (db *DB) markDirty(lsn commitlog.LSN) {
	if db.dirty == 0 {
		db.dirty = lsn
	}
}

func (db *DB) header(kind commitlog.Kind, flags uint8) commitlog.Header {
	return commitlog.Header{
		Kind: kind, Flags: flags, DB: db.id, History: db.history,
		EpochN: db.epoch.N, EpochGrant: db.epoch.Grant,
	}
}

// register gives the database its id, and writes the record that names it.
func (db *DB) register() error {
	if db.id != 0 {
		return nil
	}
	if db.history == 0 {
		db.history = db.st.random()
	}
	db.id = db.st.newID(db)
	h := db.header(commitlog.KindCreate, 0)
	lsn, _, err := db.st.wlog.Append(h, commitlog.Lazy, []byte(db.name))
	if err != nil {
		db.st.nsMu.Lock()
		delete(db.st.byID, db.id) // else a later id would list the database twice
		db.st.nsMu.Unlock()
		db.id = 0
		return fmt.Errorf("%s: append creation to the log: %w", db.name, err)
	}
	db.last = lsn
	db.markDirty(lsn)
	return nil
}

// candidates returns the pages to look at: those of the change, those of the
// growth (invariant 11), and all if the page size changed.
func (db *DB) candidates(c change) []uint32 {
	before := db.at
	from := before.Commit
	if before.PageSize != c.pageSize {
		from = 0
	}
	list := slices.Clone(c.pages)
	for pgno := from + 1; pgno <= c.commit && pgno > from && !sabotage.On(sabotage.HolesNamed); pgno++ {
		list = append(list, pgno)
	}
	slices.Sort(list)
	list = slices.Compact(list)
	lock := ltx.LockPgno(c.pageSize)
	return slices.DeleteFunc(list, func(pgno uint32) bool {
		return pgno == lock || pgno > c.commit || pgno == 0
	})
}

// build makes the LTX bytes, or the side file and its reference.
func (db *DB) build(c change) (*pending, []byte, *scratch, error) {
	before := db.at
	resized := before.PageSize != 0 && before.PageSize != c.pageSize
	pages := db.candidates(c)
	now := db.st.opt.Now()
	p := &pending{time: now, made: time.Now()}
	h := ltx.Header{
		PageSize: c.pageSize, Commit: c.commit,
		MinTXID: before.TXID + 1, MaxTXID: before.TXID + 1,
		Timestamp: now.UnixMilli(), PreApplyChecksum: before.PostApplyChecksum,
		WALOffset: c.wal.WALOffset, WALSize: c.wal.WALSize, WALSalt1: c.wal.WALSalt1, WALSalt2: c.wal.WALSalt2,
		NodeID: db.st.nodeHash,
	}
	if before.TXID == 0 {
		h.PreApplyChecksum = 0
	}
	total := uint64(before.PostApplyChecksum)
	if resized {
		total = 0
	} else {
		gone, err := db.xorSums(c.commit, before.Commit)
		if err != nil {
			return nil, nil, nil, err
		}
		total ^= gone
	}

	sc := scratches.Get().(*scratch)
	large := int64(len(pages))*int64(c.pageSize) > cmp.Or(c.large, db.st.opt.Large)
	var enc *sideEncoder
	if large {
		var err error
		if enc, err = db.newSideEncoder(h); err != nil {
			return nil, nil, sc, err
		}
		defer enc.abandon()
	}
	if len(pages) >= manySums {
		p.sums = make([]pageSum, 0, len(pages))
	}
	sc.pages, sc.page = sc.pages[:0], sc.page[:0]
	if need := len(pages) * int(c.pageSize); !large && cap(sc.page) < need {
		sc.page = make([]byte, 0, need)
	}
	for _, pgno := range pages {
		n := len(sc.page)
		sc.page = append(sc.page[:n], make([]byte, c.pageSize)...)
		data := sc.page[n:]
		if err := c.read(pgno, data); err != nil {
			return nil, nil, sc, fmt.Errorf("%s: read page %d: %w", db.name, pgno, err)
		}
		crc := ltx.PageCRC(data)
		sum := uint64(ltx.PageChecksumFromCRC(pgno, c.pageSize, crc))
		if !resized && pgno <= before.Commit {
			old, err := db.sum(pgno)
			if err != nil {
				return nil, nil, sc, fmt.Errorf("%s: read checksum of page %d: %w", db.name, pgno, err)
			}
			if old == sum && db.samePage(pgno, data, sc) {
				sc.page = sc.page[:n]
				continue
			}
			total ^= old
		}
		total ^= sum
		p.sums = append(p.sums, pageSum{pgno, sum})
		if large {
			if err := enc.page(pgno, data, crc); err != nil {
				return nil, nil, sc, err
			}
			sc.page = sc.page[:n]
			continue
		}
		sc.pages = append(sc.pages, ltx.Page{Pgno: pgno, Data: data, CRC: crc})
	}
	if len(p.sums) == 0 && c.commit == before.Commit && !resized && !sabotage.On(sabotage.NothingNothing) {
		return nil, nil, sc, nil // invariant 25
	}
	post := ltx.ChecksumFlag | ltx.Checksum(total)
	p.after = position{ltx.Pos{TXID: h.MaxTXID, PostApplyChecksum: post}, c.pageSize, c.commit}
	p.entry = entry{
		min: h.MinTXID, max: h.MaxTXID, pre: before.PostApplyChecksum, post: post,
		commit: c.commit, pageSize: c.pageSize, time: h.Timestamp,
		full: resized || before.Commit == 0 || c.commit == 0,
	}
	if large {
		payload, err := enc.finish(post, &p.entry)
		return p, payload, sc, err
	}
	out, err := ltx.AppendFile(sc.out[:0], h, sc.pages, post)
	if err != nil {
		return nil, nil, sc, fmt.Errorf("%s: encode %s: %w", db.name, p.after.Pos, err)
	}
	sc.out = out
	p.entry.size = int64(len(out))
	return p, out, sc, nil
}

// samePage compares a page byte for byte with the committed one, after their
// checksums were found equal.
func (db *DB) samePage(pgno uint32, data []byte, sc *scratch) bool {
	if cap(sc.old) < len(data) {
		sc.old = make([]byte, len(data))
	}
	old := sc.old[:len(data)]
	return db.page(pgno, old) == nil && string(old) == string(data)
}

// xorSums returns the XOR of the checksums of pages (from, to], those that a
// shrink takes away.
func (db *DB) xorSums(from, to uint32) (uint64, error) {
	var total uint64
	lock := ltx.LockPgno(max(db.at.PageSize, 512))
	for pgno := from + 1; pgno <= to; pgno++ {
		if pgno == lock || sabotage.On(sabotage.SumsOfTheGone) {
			continue
		}
		v, err := db.sum(pgno)
		if err != nil {
			return 0, err
		}
		total ^= v
	}
	return total, nil
}

// confirm makes a pending record the position of the database. The caller has
// moved, or moves, the pages. db.mu is held.
func (db *DB) confirm(p *pending) {
	top := db.stack.Load().committed[0]
	if db.at.PageSize != p.after.PageSize && db.at.PageSize != 0 {
		top.sums.reset()
	}
	top.sums.add(p.sums)
	top.lsn = max(top.lsn, p.lsn)
	db.at = p.after
	db.lastTime = p.time
	db.mtime.Store(p.time.UnixNano())
	db.exists = p.after.Commit > 0
	db.recs.add(p.entry)
	if db.pend == p {
		db.pend = nil
		close(db.resolved)
		db.resolved = make(chan struct{})
	}
	db.st.logGrew(p.entry.size)
	db.tell(EventCommit, db.at.Pos, p.time)
	db.st.committed(db)
}

// abort takes a pending record back: an abort record follows it in the log, so
// that recovery does not take it as committed. With wait it is durable when
// abort returns. db.mu is held.
func (db *DB) abort(p *pending, wait bool) error {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], uint64(p.lsn))
	mode := commitlog.Lazy
	if wait {
		mode = commitlog.Staged
	}
	kind := commitlog.KindAbort
	if sabotage.On(sabotage.AbortLogged) {
		kind = commitlog.KindConfirm // that nobody heeds
	}
	lsn, _, err := db.st.wlog.Append(db.header(kind, 0), mode, b[:])
	if err == nil && wait {
		err = db.st.wlog.Wait(lsn)
	}
	if err != nil {
		db.fenceWith(fmt.Errorf("abort record of %s: %w", p.after.Pos, err))
		return db.fenced()
	}
	db.last = lsn
	if p.entry.path != "" {
		db.side = append(db.side, p.entry.path)
	}
	if db.pend == p {
		db.pend = nil
		close(db.resolved)
		db.resolved = make(chan struct{})
	}
	return nil
}

// A sideEncoder streams a large transaction into a level-0 file.
type sideEncoder struct {
	db   *DB
	h    ltx.Header
	name string // final path
	file disk.File
	out  *offsetWriter
	enc  *ltx.Encoder
	done bool
}

type offsetWriter struct {
	w   io.WriterAt
	off int64
	buf []byte
}

const offsetWriterSize = 128 << 10

func (o *offsetWriter) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		if len(o.buf) == offsetWriterSize {
			if err := o.flush(); err != nil {
				return 0, err
			}
		}
		k := min(len(p), offsetWriterSize-len(o.buf))
		o.buf = append(o.buf, p[:k]...)
		p = p[k:]
	}
	return n, nil
}

func (o *offsetWriter) flush() error {
	_, err := o.w.WriteAt(o.buf, o.off)
	o.off += int64(len(o.buf))
	o.buf = o.buf[:0]
	return err
}

// levelDir returns the folder of one level of the present history.
func (db *DB) levelDir(level int) string {
	return path.Join(db.dir, fmt.Sprintf("%016x", db.history), fmt.Sprint(level))
}

// A side file has an ending of its own while the log refers to it: only what a
// record of the log names counts. It becomes a level file when the log is about
// to lose that record.
const (
	extSide  = ".side"
	extLevel = ".ltx"
)

func sideFilename(min, max ltx.TXID) string {
	return strings.TrimSuffix(ltx.FormatFilename(min, max), extLevel) + extSide
}

func (db *DB) newSideEncoder(h ltx.Header) (*sideEncoder, error) {
	if db.history == 0 {
		db.history = db.st.random()
	}
	if err := db.makeDir(); err != nil {
		return nil, err
	}
	dir := db.levelDir(0)
	if err := disk.MkdirAll(db.st.fs, dir, 0o700); err != nil {
		return nil, fmt.Errorf("%s: make %s: %w", db.name, dir, err)
	}
	e := &sideEncoder{db: db, h: h, name: path.Join(dir, sideFilename(h.MinTXID, h.MaxTXID))}
	if i := slices.Index(db.side, e.name); i >= 0 {
		// The log still refers to an aborted file of that name: its abort comes first.
		if err := db.st.wlog.Wait(db.last); err != nil {
			return nil, err
		}
		db.side = slices.Delete(db.side, i, i+1)
	}
	f, err := db.st.fs.OpenFile(e.name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%s: create %s: %w", db.name, e.name, err)
	}
	e.file = f
	e.out = &offsetWriter{w: f, buf: make([]byte, 0, offsetWriterSize)}
	e.enc = ltx.NewEncoder(e.out)
	if err := e.enc.EncodeHeader(h); err != nil {
		e.abandon()
		return nil, err
	}
	return e, nil
}

func (e *sideEncoder) page(pgno uint32, data []byte, crc uint64) error {
	if err := e.enc.EncodePageCRC(pgno, data, crc); err != nil {
		return fmt.Errorf("%s: write %s: %w", e.db.name, e.name, err)
	}
	return nil
}

// finish makes the file and its name durable and returns the reference payload:
// the LTX header, trailer, and size of the file.
func (e *sideEncoder) finish(post ltx.Checksum, ent *entry) ([]byte, error) {
	tr, err := e.enc.Close(post)
	if err == nil {
		err = e.out.flush()
	}
	if err == nil && !sabotage.On(sabotage.SideSynced) {
		err = e.file.Datasync()
	}
	if err == nil {
		err = e.db.st.fs.SyncDir(path.Dir(e.name))
	}
	if err != nil {
		return nil, fmt.Errorf("%s: write %s: %w", e.db.name, e.name, err)
	}
	e.done = true
	_ = e.file.Close()
	ent.path, ent.size = e.name, e.out.off
	return appendReference(nil, e.h, tr, e.out.off)
}

// abandon removes an unfinished file.
func (e *sideEncoder) abandon() {
	if e.done {
		return
	}
	e.done = true
	_ = e.file.Close()
	_ = e.db.st.fs.Remove(e.name)
}

const referenceSize = ltx.HeaderSize + ltx.TrailerSize + 8

func appendReference(b []byte, h ltx.Header, tr ltx.Trailer, size int64) ([]byte, error) {
	b, err := h.AppendBinary(b)
	if err != nil {
		return nil, err
	}
	b = binary.BigEndian.AppendUint64(b, uint64(tr.PostApplyChecksum))
	b = binary.BigEndian.AppendUint64(b, uint64(tr.FileChecksum))
	return binary.BigEndian.AppendUint64(b, uint64(size)), nil
}
