package store

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"syscall"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/sabotage"
	"github.com/litefs-agent/litefs-agent/internal/sparse"
	"github.com/litefs-agent/litefs-agent/internal/sqlitefile"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// A WAL transaction, seen from below SQLite:
//
//	frames …  commit frame complete        mxFrame reached, or a commit chained
//	 none ────────────────────────► tentative ──────────────────────► confirmed
//	  ▲                               │  over it, or EXCLUSIVE, or checkpointed
//	  └───────────────────────────────┘
//	   its frames overwritten, or the WAL restarted without it: abort record
//
// SQLite publishes a commit by updating the wal-index, later than the write of
// the commit frame (and than the FSYNC). A writer killed in between has not
// committed, and the next writer overwrites its frames.

// walState is one "-wal" file. Guarded by DB.mu, but data has its own lock.
type walState struct {
	node   *sideFile
	data   *sparse.File
	header sqlitefile.WALHeader
	valid  bool  // header holds
	end    int64 // offset behind the last commit frame that was accepted
	high   int64 // offset behind everything written in this generation
	sum    sqlitefile.WALSum

	// pages maps a page to the offset of its newest confirmed content in data, for
	// pages that no checkpoint has brought to the database file yet.
	pages map[uint32]int64
	// versions holds the checksum of every version of a page that is committed in
	// this generation (invariant 6). The page number is part of a page checksum.
	versions map[uint64]struct{}

	synced   bool // an FSYNC came after the newest commit frame
	eager    bool // the last commits were followed by an FSYNC: write through at once
	reserved int64

	buf, other []byte // of one frame each, reused
}

// buffers returns two buffers of one frame each.
func (w *walState) buffers() (a, b []byte) {
	if n := int(w.frameSize()); len(w.buf) != n {
		w.buf, w.other = make([]byte, n), make([]byte, n)
	}
	return w.buf, w.other
}

func (w *walState) frameSize() int64 {
	return sqlitefile.FrameHeaderSize + int64(w.header.PageSize)
}

// writeWAL is a WRITE of the WAL. db.mu is held.
func (db *DB) writeWAL(w *walState, p []byte, off int64) error {
	if err := db.fenced(); err != nil {
		return err
	}
	if err := db.refute(w, off); err != nil {
		return err
	}
	restart := off < sqlitefile.WALHeaderSize
	if restart {
		if err := db.resetWAL(w, true); err != nil {
			return err
		}
	}
	if err := db.reserveWAL(w, int64(len(p))); err != nil {
		return err
	}
	if err := w.data.WriteAt(p, off, nil); err != nil {
		return db.st.noSpace(err)
	}
	w.node.touch(db.st)
	w.high = max(w.high, off+int64(len(p)))
	if restart {
		w.high = off + int64(len(p))
		if err := db.readWALHeader(w); err != nil {
			return err
		}
	}
	if !w.valid {
		if off >= sqlitefile.WALHeaderSize {
			// SQLite writes the header first: a frame without one would be committed
			// for everybody but the log.
			return fmt.Errorf("%s: frame of a WAL that has no valid header: %w", db.name, syscall.EIO)
		}
		return nil
	}
	return db.scanWAL(w, off, off+int64(len(p)))
}

func (db *DB) reserveWAL(w *walState, n int64) error {
	need := 2*n + 4096
	if w.valid {
		need += max(0, w.high-w.end)
	}
	if need > db.st.opt.Large {
		return db.st.needFree(2 * need)
	}
	if w.reserved < need {
		step := (need - w.reserved + reserveStep - 1) / reserveStep * reserveStep
		if err := db.st.reserveLog(step); err != nil {
			return db.st.noSpace(fmt.Errorf("%s: reserve %d bytes in the log: %w", db.name, step, err))
		}
		w.reserved += step
	}
	return db.st.needFree(w.data.Size())
}

func (db *DB) unreserveWAL(w *walState) {
	db.st.wlog.Unreserve(w.reserved)
	w.reserved = 0
}

func (db *DB) readWALHeader(w *walState) error {
	var b [sqlitefile.WALHeaderSize]byte
	if _, err := w.data.ReadAt(b[:], 0); err != nil && err != io.EOF {
		return fmt.Errorf("%s: read the header of its WAL: %w", db.name, err)
	}
	w.header, w.valid = sqlitefile.ParseWALHeader(b[:])
	w.end, w.sum = sqlitefile.WALHeaderSize, w.header.Sum
	w.pages = make(map[uint32]int64)
	w.versions = make(map[uint64]struct{})
	return nil
}

// refute takes the tentative record back if a WRITE at off goes over its frames:
// the next writer does that when the commit was never published.
func (db *DB) refute(w *walState, off int64) error {
	p := db.pend
	if p == nil || !p.wal || off < sqlitefile.WALHeaderSize || off >= p.walEnd || sabotage.On(sabotage.Refute) {
		return nil
	}
	return db.refuteTentative(w, p)
}

func (db *DB) refuteTentative(w *walState, p *pending) error {
	if err := db.abort(p, false); err != nil {
		return err
	}
	for _, sum := range p.versions {
		delete(w.versions, sum)
	}
	w.end = p.walStart
	return db.chainFrom(w)
}

// chainFrom computes the running checksum up to w.end again.
func (db *DB) chainFrom(w *walState) error {
	w.sum = w.header.Sum
	if w.end == sqlitefile.WALHeaderSize {
		return nil
	}
	// The frame before w.end was accepted: its header holds the checksum.
	var b [sqlitefile.FrameHeaderSize]byte
	if _, err := w.data.ReadAt(b[:], w.end-w.frameSize()); err != nil {
		return err
	}
	w.sum = sqlitefile.ParseFrameHeader(b[:]).Sum
	return nil
}

// scanWAL looks for commit frames that the bytes in [from, to) completed.
func (db *DB) scanWAL(w *walState, from, to int64) error {
	size := w.frameSize()
	from = max(from, w.end)
	if to <= from {
		return nil
	}
	first := (from - sqlitefile.WALHeaderSize) / size
	last := (to - 1 - sqlitefile.WALHeaderSize) / size
	have := w.data.Size()
	var b [sqlitefile.FrameHeaderSize]byte
	for k := first; k <= last; k++ {
		at := sqlitefile.WALHeaderSize + k*size
		if at+size > have {
			return nil
		}
		if _, err := w.data.ReadAt(b[:], at); err != nil {
			return err
		}
		h := sqlitefile.ParseFrameHeader(b[:])
		if h.Commit == 0 || h.Salt1 != w.header.Salt1 || h.Salt2 != w.header.Salt2 {
			continue
		}
		if err := db.commitFrames(w, at+size, h.Commit); err != nil {
			return err
		}
	}
	return nil
}

// commitFrames checks the chain from the last commit to the frame that ends at
// end, and appends the tentative record if it holds. A chain that does not hold
// is no error: SQLite writes frames in more than one step.
func (db *DB) commitFrames(w *walState, end int64, commit uint32) error {
	frames, sum, ok, err := w.chain(end)
	if err == nil && !ok {
		frames, sum, ok, err = w.broken(end)
	}
	if err != nil || !ok {
		return err
	}
	if p := db.pend; p != nil && p.wal && commit == p.after.Commit && db.repeats(w, p, frames) {
		// psow=0: SQLite repeats the commit frame up to the end of the sector.
		w.end, w.sum, p.walEnd = end, sum, end
		return nil
	}
	if db.pend != nil && !sabotage.On(sabotage.OneTentative) {
		db.confirmWAL(w, db.pend) // chained over: it was published
	}
	c := change{pageSize: w.header.PageSize, commit: commit}
	c.wal = ltx.Header{WALOffset: w.end, WALSize: end - w.end, WALSalt1: w.header.Salt1, WALSalt2: w.header.Salt2}
	for pgno := range frames {
		c.pages = append(c.pages, pgno)
	}
	slices.Sort(c.pages)
	c.read = func(pgno uint32, p []byte) error {
		if off, ok := frames[pgno]; ok {
			_, err := w.data.ReadAt(p, off)
			return err
		}
		return db.page(pgno, p)
	}
	p, err := db.encode(c, flagTentative, db.walMode(w))
	if err == nil {
		if err = db.unchangedVersions(w, c.pages, p); err != nil && p != nil {
			err = errors.Join(err, db.abort(p, false))
		}
	}
	if err != nil {
		// The WRITE fails, so a later recovery of the WAL must not find this commit.
		zero := make([]byte, sqlitefile.FrameHeaderSize)
		if zerr := w.data.WriteAt(zero, end-w.frameSize(), nil); zerr != nil {
			db.fenceWith(fmt.Errorf("take a commit frame back: %w", zerr))
		}
		return db.st.noSpace(err)
	}
	start := w.end
	w.end, w.sum, w.synced = end, sum, false
	db.unreserveWAL(w)
	if p == nil {
		return nil
	}
	p.wal, p.walStart, p.walEnd, p.frames = true, start, end, frames
	p.walFrame = uint32((end - sqlitefile.WALHeaderSize) / w.frameSize())
	for _, s := range p.sums {
		if _, there := w.versions[s.sum]; !there {
			w.versions[s.sum] = struct{}{}
			p.versions = append(p.versions, s.sum)
		}
	}
	db.pend = p
	if db.file.shmOpen() && !sabotage.On(sabotage.TentativeUntilKnown) {
		db.st.resolveIn(db, resolveLazy)
	} else {
		db.confirmWAL(w, p) // locking_mode=EXCLUSIVE: nobody else can be asked
	}
	if db.st.opt.Durability.Commit {
		return db.st.wlog.Wait(p.lsn)
	}
	return nil
}

// unchangedVersions notes the checksums of frames that brought the content that
// was there already: a checkpoint may write them when they are not the newest any
// more.
func (db *DB) unchangedVersions(w *walState, pages []uint32, p *pending) error {
	for _, pgno := range pages {
		if p != nil && p.changes(pgno) || pgno > db.at.Commit {
			continue
		}
		sum, err := db.sum(pgno)
		if err != nil {
			return err
		}
		w.versions[sum] = struct{}{}
	}
	return nil
}

// walMode chooses how the tentative record reaches the log. It must survive a
// kill of the agent when the WRITE returns; where an FSYNC is going to follow it
// is written around the page cache at once, so that the FSYNC costs the flush
// alone.
func (db *DB) walMode(w *walState) commitlog.Mode {
	w.eager = w.synced
	if w.eager && db.st.opt.Durability.After == 0 || db.st.opt.Durability.Commit {
		return commitlog.Written
	}
	return commitlog.Lazy
}

// chain validates the frames in [w.end, end) and returns the offset of the
// newest content of each page in them.
func (w *walState) chain(end int64) (map[uint32]int64, sqlitefile.WALSum, bool, error) {
	size := w.frameSize()
	sum := w.sum
	frames := make(map[uint32]int64, (end-w.end)/size)
	buf, _ := w.buffers()
	for at := w.end; at < end; at += size {
		if _, err := w.data.ReadAt(buf, at); err != nil {
			return nil, sum, false, err
		}
		h := sqlitefile.ParseFrameHeader(buf)
		if h.Salt1 != w.header.Salt1 || h.Salt2 != w.header.Salt2 || h.Pgno == 0 {
			return nil, sum, false, nil
		}
		if h.Commit != 0 && at+size < end {
			return nil, sum, false, nil // an earlier commit that was not accepted
		}
		sum = sum.Update(w.header.BigEndian, buf[:8])
		sum = sum.Update(w.header.BigEndian, buf[sqlitefile.FrameHeaderSize:])
		if sum != h.Sum {
			return nil, sum, false, nil
		}
		frames[h.Pgno] = at + sqlitefile.FrameHeaderSize
	}
	return frames, sum, true, nil
}

// broken is chain for what SQLite leaves (seen with 3.40.1) when a savepoint is rolled
// back in a transaction that had rewritten frames: it forgets to go back with the
// frame from which checksums are to be made at the commit (iReCksum), so that frames
// before it keep salts and checksums of zero. The commit is published all the same
// and checkpoints bring it to the database: it counts, though SQLite itself would
// not find it in the WAL after a crash. What SQLite does write is the commit
// frame's checksum, last of all, on top of whatever the frame before says.
func (w *walState) broken(end int64) (map[uint32]int64, sqlitefile.WALSum, bool, error) {
	size := w.frameSize()
	frames := make(map[uint32]int64, (end-w.end)/size)
	buf, _ := w.buffers()
	sum, gap := w.sum, false
	for at := w.end; at < end; at += size {
		if _, err := w.data.ReadAt(buf, at); err != nil {
			return nil, sum, false, err
		}
		h := sqlitefile.ParseFrameHeader(buf)
		last := at+size == end
		bare := h.Salt1 == 0 && h.Salt2 == 0 && h.Sum == (sqlitefile.WALSum{})
		switch {
		case h.Pgno == 0, (h.Commit != 0) != last:
			return nil, sum, false, nil
		case bare && !last:
			gap = true
		case h.Salt1 != w.header.Salt1 || h.Salt2 != w.header.Salt2:
			return nil, sum, false, nil
		}
		if last {
			sum = sum.Update(w.header.BigEndian, buf[:8])
			sum = sum.Update(w.header.BigEndian, buf[sqlitefile.FrameHeaderSize:])
			frames[h.Pgno] = at + sqlitefile.FrameHeaderSize
			return frames, sum, gap && sum == h.Sum, nil
		}
		sum = h.Sum
		frames[h.Pgno] = at + sqlitefile.FrameHeaderSize
	}
	return nil, sum, false, nil
}

// repeats reports whether the frames hold only pages of the tentative record
// with the same content.
func (db *DB) repeats(w *walState, p *pending, frames map[uint32]int64) bool {
	a, b := w.buffers()
	a, b = a[:w.header.PageSize], b[:w.header.PageSize]
	for pgno, off := range frames {
		old, ok := p.frames[pgno]
		if !ok {
			return false
		}
		if _, err := w.data.ReadAt(a, off); err != nil {
			return false
		}
		if _, err := w.data.ReadAt(b, old); err != nil || string(a) != string(b) {
			return false
		}
	}
	return true
}

// confirmWAL makes a tentative record the position. Its pages stay in the WAL
// until a checkpoint. db.mu is held.
func (db *DB) confirmWAL(w *walState, p *pending) {
	for pgno, off := range p.frames {
		if pgno <= p.after.Commit {
			w.pages[pgno] = off
		}
	}
	if p.after.Commit < db.at.Commit {
		for pgno := range w.pages {
			if pgno > p.after.Commit {
				delete(w.pages, pgno)
			}
		}
	}
	if db.file.backed() && !db.file.isDB.Load() {
		db.takeOver() // the pages that are not in the WAL
	}
	db.promote()
	db.confirm(p)
}

// checkpointWrite is a WRITE of the database in WAL mode: SQLite brings pages
// from the WAL. It is accepted if each whole page equals a version of it in this
// generation (invariant 6).
func (db *DB) checkpointWrite(w *walState, p []byte, off int64) error {
	ps := int64(w.header.PageSize)
	if !w.valid || off%ps != 0 || int64(len(p))%ps != 0 {
		return fmt.Errorf("%s: write of %d bytes at %d outside a checkpoint: %w", db.name, len(p), off, ErrRefused)
	}
	sums := make([]uint64, 0, int64(len(p))/ps)
	for i := int64(0); i < int64(len(p)); i += ps {
		pgno := uint32((off+i)/ps) + 1
		sum := uint64(ltx.PageChecksum(pgno, p[i:i+ps]))
		sums = append(sums, sum)
		if _, ok := w.versions[sum]; !ok && !db.committedVersion(pgno, sum) && !sabotage.On(sabotage.CheckpointVersion) {
			return fmt.Errorf("%s: page %d is no version of this WAL: %w", db.name, pgno, ErrRefused)
		}
		if db.pend != nil && db.pend.wal && db.pend.has(pgno, sum) {
			db.confirmWAL(w, db.pend) // only published frames are checkpointed
		}
	}
	for n, sum := range sums {
		i := int64(n) * ps
		if err := db.checkpointPage(w, uint32((off+i)/ps)+1, p[i:i+ps], sum); err != nil {
			return err
		}
	}
	db.size.Store(max(db.size.Load(), off+int64(len(p))))
	return nil
}

// checkpointPage takes one page of a checkpoint, whose checksum is sum. An older version (a reader
// holds the checkpoint back) never goes over a newer one that is in the file
// already: base may have moved past it.
func (db *DB) checkpointPage(w *walState, pgno uint32, p []byte, sum uint64) error {
	newest, err := db.sum(pgno)
	if err != nil {
		return err
	}
	isNewest := newest == sum
	if _, waits := w.pages[pgno]; !waits && !isNewest && pgno <= db.at.Commit {
		return nil
	}
	if err := db.putCommitted(p, int64(pgno-1)*int64(len(p))); err != nil {
		return db.st.noSpace(err)
	}
	if isNewest {
		delete(w.pages, pgno)
	}
	return nil
}

// committedVersion reports whether sum is the present checksum of a page that a
// no-change frame brought into the WAL.
func (db *DB) committedVersion(pgno uint32, sum uint64) bool {
	v, err := db.sum(pgno)
	return err == nil && v == sum
}

func (p *pending) has(pgno uint32, sum uint64) bool {
	i, ok := p.find(pgno)
	return ok && p.sums[i].sum == sum
}

func (p *pending) changes(pgno uint32) bool {
	_, ok := p.find(pgno)
	return ok
}

func (p *pending) find(pgno uint32) (int, bool) {
	return slices.BinarySearchFunc(p.sums, pgno, func(s pageSum, n uint32) int { return cmp.Compare(s.pgno, n) })
}

// putCommitted writes committed bytes below the layers: straight to the file if
// the log is durable past them and no layer stands above it, else into the top
// layer. db.mu is held.
func (db *DB) putCommitted(p []byte, off int64) error {
	s := db.stack.Load()
	top := s.committed[0]
	direct := len(s.committed) == 1 && db.st.wlog.Durable() >= db.last &&
		off+int64(len(p)) <= top.under.Load() && !top.Touches(off, int64(len(p)))
	if direct && !db.file.backed() {
		files, err := db.openFiles(true)
		if err != nil {
			return err
		}
		_, err = files.data.WriteAt(p, off)
		return err
	}
	top.lsn = max(top.lsn, db.last)
	if err := top.WriteAt(p, off, nil); err != nil {
		return err
	}
	db.st.flushSoon(db)
	return nil
}

// resetWAL ends a generation of the WAL: SQLite writes a new header, truncates
// it to nothing, or removes it, after all its published frames were brought to
// the database file. What was not brought (a person removed the file) is brought
// here, so that nothing committed is lost. db.mu is held.
func (db *DB) resetWAL(w *walState, sqlite bool) error {
	if p := db.pend; p != nil && p.wal {
		if !sqlite {
			// A person removed the WAL. Whether it was published nobody can say any
			// more; what recovery would do is right.
			db.confirmWAL(w, p)
		} else if err := db.refuteTentative(w, p); err != nil {
			// SQLite's checkpoint would have confirmed it: it was never published.
			return err
		}
	}
	if len(w.pages) > 0 {
		if !sqlite {
			db.log.Warn("WAL removed before its checkpoint: pages kept", "pages", len(w.pages))
		}
		buf := make([]byte, w.header.PageSize)
		for _, pgno := range slices.Sorted(maps.Keys(w.pages)) {
			if _, err := w.data.ReadAt(buf, w.pages[pgno]); err != nil {
				return err
			}
			if err := db.putCommitted(buf, int64(pgno-1)*int64(len(buf))); err != nil {
				return db.st.noSpace(err)
			}
		}
		db.st.later(func(p Peer) { p.InvalidateData(db.file, 0, -1) })
	}
	if w.valid {
		if size := db.at.size(); db.exists && db.size.Load() < size {
			db.size.Store(size)
		}
	}
	w.valid = false
	w.pages, w.versions = nil, nil
	db.st.flushSoon(db)
	return nil
}

// syncWAL is FSYNC of the WAL.
func (db *DB) syncWAL(w *walState) error {
	db.mu.Lock()
	w.synced = true
	lsn, tentative := db.last, db.pend != nil
	db.mu.Unlock()
	if sabotage.On(sabotage.WALSyncDurable) {
		return nil
	}
	if err := db.st.waitAsked(lsn); err != nil {
		err = fmt.Errorf("%s: make the log durable: %w", db.name, err)
		db.fenceWith(err)
		return err
	}
	if tentative {
		db.st.quiet.Store(true)
	}
	return nil
}
