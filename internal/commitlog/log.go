package commitlog

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/sabotage"
)

// Log is the durable log. It is safe for concurrent use.
//
// Two things may happen to the current segment's file at a time: one write
// (writing) and one flush (flushing). What replaces the segment (rotation,
// rescue) is exclusive: it waits for both and keeps every Append out.
type Log struct {
	o          Options // set by Open, then constant
	log        *slog.Logger
	maxPayload int64 // set by Open, then constant

	durable  atomic.Uint64 // LSN
	appended atomic.Uint64 // LSN
	n        counters

	mu   sync.Mutex // guards all below; held over page cache writes, never over direct ones or a flush
	cond *sync.Cond // of mu: one of the flags below changed, or durable moved

	writing   bool  // somebody writes directly without mu
	flushing  bool  // a leader is at work
	exclusive bool  // the current segment is being replaced
	creating  bool  // a new file is being written
	suspect   error // a write or flush of the current file failed; rescue comes
	failed    error // wraps ErrFailed
	closed    bool
	closedSeg bool // the current segment's end was maybe announced: no more records in it

	segs     []*segment // in use, ascending; the last is the current one
	free     []*slot    // ready for reuse, ascending by seq
	nextSlot uint32
	nextSeq  uint64
	damage   []DamageInfo

	block      int64  // unit of direct writes to the current segment
	end        int64  // where the last record ends, in memory or file
	tailDirect bool   // the last record in the file was written directly
	sealed     bool   // the page that ends at end holds records that a flush covers
	lastCRC    uint64 // of the last record
	durEnd     int64  // where the last durable record ends, in the current segment
	durCRC     uint64 // of the last durable record
	takenN     int    // recs[:takenN] are in the file or being written to it
	writtenN   int    // recs[:writtenN] are in the file
	dbuf       []byte // aligned; owned by whoever set writing
	reserved   int64  // bytes of payload promised by Reserve

	onDurable func(LSN)
	notified  LSN
	timer     *time.Timer
	armed     bool // timer runs
	bg        bool // a background flush or preparation runs
	wg        sync.WaitGroup

	// rmu guards what ReadAt looks at, and is taken after mu: writers hold both,
	// so either is enough to read. Never held over I/O.
	rmu   sync.RWMutex
	slots map[uint32]*slot
	moved map[place]Ref // records that a rescue took elsewhere
	pend  []byte        // the undurable records, encoded, in order
	recs  []pendRec     // where they are; all belong to the current segment
}

// pendRec is an undurable record.
type pendRec struct {
	lsn  LSN
	off  int64 // in the segment
	pos  int   // in pend
	size int   // encoded, a multiple of 8
	made time.Time
}

// place is the part of a Ref that tells payloads apart.
type place struct {
	seq uint64
	off int64
}

type counters struct {
	fdatasyncs, flushes, bytes, records, rescues atomic.Uint64
}

func newLog(o Options) (*Log, error) {
	if o.SegmentSize == 0 {
		o.SegmentSize = 4 << 20
	}
	if o.SegmentSize < minSegment || o.SegmentSize > maxSegment || o.SegmentSize%pageSize != 0 {
		return nil, fmt.Errorf("log segment size %d: want a multiple of %d from %d to %d",
			o.SegmentSize, pageSize, minSegment, maxSegment)
	}
	if o.Target == 0 {
		o.Target = 4
	}
	if o.FlushBytes == 0 {
		o.FlushBytes = 256 << 10
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Rand == nil {
		o.Rand = rand.Reader
	}
	l := &Log{
		o: o, log: o.Logger,
		maxPayload: min(o.SegmentSize-pageSize-headerSize, math.MaxInt32),
		slots:      make(map[uint32]*slot),
		moved:      make(map[place]Ref),
	}
	l.cond = sync.NewCond(&l.mu)
	return l, nil
}

func (l *Log) cur() *segment { return l.segs[len(l.segs)-1] }

// MaxPayload is the size of the largest payload in bytes.
func (l *Log) MaxPayload() int64 { return l.maxPayload }

// Durable returns the LSN up to which all records survive a power cut.
func (l *Log) Durable() LSN { return LSN(l.durable.Load()) }

// Appended returns the LSN of the newest record.
func (l *Log) Appended() LSN { return LSN(l.appended.Load()) }

// OnDurable sets the function that is told each time Durable has moved. Calls
// ascend and never overlap, and no lock is held, but the next flush waits for
// the call: f must be short and must not call Append, Wait or Close.
func (l *Log) OnDurable(f func(LSN)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.onDurable = f
	l.notified = l.Durable()
}

// Err returns why nothing can be appended any more (ErrFailed), or nil.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failed
}

// Stats returns the counters since Open.
func (l *Log) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Stats{
		Fdatasyncs: l.n.fdatasyncs.Load(), Flushes: l.n.flushes.Load(), BytesWritten: l.n.bytes.Load(),
		Records: l.n.records.Load(), Rescues: l.n.rescues.Load(),
		Segments: len(l.segs), Spare: len(l.free),
	}
}

// Append adds a record of the given payload parts, which are not kept. Its
// durability is that of its mode; see Mode. Errors: ErrTooLarge, ENOSPC and
// others of the disk when a segment had to be made (nothing has changed then),
// ErrFailed (the record may show after a restart, like a commit in flight),
// ErrClosed.
func (l *Log) Append(h Header, mode Mode, payload ...[]byte) (LSN, Ref, error) {
	n := 0
	for _, p := range payload {
		n += len(p)
		if int64(n) > l.maxPayload {
			return 0, Ref{}, fmt.Errorf("append %d bytes or more to the log: %w", n, ErrTooLarge)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	off, err := l.makeRoomLocked(mode, recordSize(int64(n)))
	if err != nil {
		return 0, Ref{}, fmt.Errorf("append to the log: %w", err)
	}
	rec := l.encodeLocked(h, off, n, payload)
	seg := l.cur()
	ref := Ref{Slot: seg.slot.id, Seq: seg.hdr.seq, Off: off + headerSize, Len: int32(n)}
	if mode == Staged || sabotage.On(sabotage.AppendBeforeReply) {
		return rec.lsn, ref, nil
	}
	if mode == Lazy && l.takenN == len(l.recs)-1 {
		err = l.writeLazyLocked(rec)
	} else {
		err = l.writeStagedLocked()
	}
	if err != nil {
		l.suspect = err
		l.acquireLocked() // rescues
		l.releaseLocked()
		if l.failed != nil {
			return 0, Ref{}, fmt.Errorf("append to the log: %w", l.failed)
		}
		return rec.lsn, l.followLocked(ref), nil
	}
	l.armLocked()
	return rec.lsn, ref, nil
}

// makeRoomLocked waits until a record of size bytes can be added in the given
// mode, with a new segment if it must, and returns the offset.
func (l *Log) makeRoomLocked(mode Mode, size int64) (int64, error) {
	for {
		switch {
		case l.failed != nil:
			return 0, l.failed
		case l.closed:
			return 0, ErrClosed
		case l.exclusive, mode != Staged && l.writing:
			// A write through the cache behind a direct one that is still on its way
			// would not survive a kill (invariant 1).
			l.cond.Wait()
			continue
		case mode == Lazy && l.o.FlushBytes > 0 && int64(len(l.pend)) > 4*l.o.FlushBytes:
			if l.flushing {
				l.cond.Wait()
			} else {
				l.flushLocked()
			}
			continue
		}
		off := l.nextOffsetLocked(mode)
		if !l.closedSeg && off+size <= l.cur().hdr.size {
			return off, nil
		}
		if err := l.rotateLocked(mode, size); err != nil {
			return 0, err
		}
	}
}

// nextOffsetLocked says where the next record goes, if there is room.
//
// Invariant 16: a direct batch begins on a fresh block and, like what goes
// through the cache after a flush or a direct write, never on a page of the
// other kind.
func (l *Log) nextOffsetLocked(mode Mode) int64 {
	switch {
	case l.takenN < len(l.recs): // a batch waits in memory: join it
		return l.end
	case mode == Lazy && !l.tailDirect && (!l.sealed || sabotage.On(sabotage.BlockSealed)):
		return l.end
	case mode != Lazy && l.tailDirect:
		return roundUp(l.end, l.block)
	default:
		return roundUp(l.end, pageSize)
	}
}

// encodeLocked adds the record to the undurable ones in memory.
func (l *Log) encodeLocked(h Header, off int64, n int, payload [][]byte) pendRec {
	size := int(recordSize(int64(n)))
	pos := len(l.pend)
	if need := pos + size + pageSize; need > cap(l.pend) { // room for writeLazyLocked's zeros
		grown := make([]byte, pos, max(need, 2*cap(l.pend), 16<<10))
		copy(grown, l.pend)
		l.rmu.Lock()
		l.pend = grown
		l.rmu.Unlock()
	}
	// Readers do not look beyond len(pend), so rmu is not needed to fill it.
	p := l.pend[pos : pos+size]
	at := headerSize
	for _, part := range payload {
		at += copy(p[at:], part)
	}
	rec := pendRec{lsn: l.Appended() + 1, off: off, pos: pos, size: size, made: time.Now()}
	l.lastCRC = encodeRecord(p, n, h, rec.lsn, l.Durable(), l.lastCRC, l.cur().hdr.salt)
	l.end = off + int64(size)
	l.rmu.Lock()
	l.pend = l.pend[:pos+size]
	l.recs = append(l.recs, rec)
	l.rmu.Unlock()
	l.appended.Store(uint64(rec.lsn))
	l.n.records.Add(1)
	return rec
}

// writeLazyLocked writes the newest record through the page cache. Its last page
// is filled with zeros when it is new, so that the kernel need not read it.
func (l *Log) writeLazyLocked(rec pendRec) error {
	end := rec.off + int64(rec.size)
	if rec.off%pageSize == 0 || end > roundUp(rec.off, pageSize) {
		end = roundUp(end, pageSize)
	}
	buf := l.pend[rec.pos : rec.pos+int(end-rec.off)]
	clear(buf[rec.size:])
	l.takenN = len(l.recs)
	l.tailDirect, l.sealed = false, false
	if err := writeFull(l.cur().slot.f, buf, rec.off); err != nil {
		return err
	}
	l.n.bytes.Add(uint64(len(buf)))
	l.writtenN = l.takenN
	return nil
}

// writeStagedLocked writes the records that wait in memory directly. It gives mu
// up meanwhile; writing must be false, and is again on return.
func (l *Log) writeStagedLocked() error {
	if l.takenN == len(l.recs) {
		return nil
	}
	first, last := l.recs[l.takenN], l.recs[len(l.recs)-1]
	used := last.pos + last.size - first.pos
	size := int(roundUp(int64(used), l.block))
	if size > len(l.dbuf) {
		l.dbuf = disk.AlignedBuffer(int(roundUp(int64(size), 16<<10)), pageSize)
	}
	buf := l.dbuf[:size]
	copy(buf, l.pend[first.pos:first.pos+used])
	clear(buf[used:])
	seg := l.cur()
	f := seg.slot.direct
	if f == nil {
		f = seg.slot.f
	}
	l.takenN = len(l.recs)
	l.tailDirect = true
	l.writing = true
	l.mu.Unlock()
	err := writeFull(f, buf, first.off)
	l.mu.Lock()
	l.writing = false
	if len(l.dbuf) > 256<<10 {
		l.dbuf = nil
	}
	if err == nil {
		l.n.bytes.Add(uint64(size))
		l.writtenN = l.takenN // what came meanwhile is in neither
	} else {
		l.suspect = err // before anybody else can use the file
	}
	l.cond.Broadcast()
	return err
}

func writeFull(f disk.File, p []byte, off int64) error {
	n, err := f.WriteAt(p, off)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return err
}

func (l *Log) datasync(f disk.File) error {
	l.n.fdatasyncs.Add(1)
	if sabotage.On(sabotage.Flush) {
		return nil
	}
	return f.Datasync()
}

// Wait returns nil when record lsn and all before it survive a power cut. One of
// the callers leads: it writes what is staged and flushes for all. The error
// wraps ErrFailed; the record may still show after a restart.
func (l *Log) Wait(lsn LSN) error {
	if l.Durable() >= lsn {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.waitLocked(lsn)
}

func (l *Log) waitLocked(lsn LSN) error {
	for l.Durable() < lsn {
		switch {
		case l.failed != nil:
			return fmt.Errorf("wait for log record %d: %w", lsn, l.failed)
		case lsn > l.Appended():
			return fmt.Errorf("wait for log record %d: the last one is %d", lsn, l.Appended())
		case l.flushing || l.exclusive:
			l.cond.Wait()
		default:
			l.flushLocked()
		}
	}
	return nil
}

// flushLocked leads one group commit. flushing and exclusive must be false.
func (l *Log) flushLocked() {
	l.flushing = true
	for l.writing {
		l.cond.Wait()
	}
	err := l.suspect
	if err == nil {
		err = l.writeStagedLocked()
	}
	if n := l.writtenN; err == nil && n > 0 {
		// Invariant 16: from here on these pages may hold durable records.
		l.sealed = true
		f := l.cur().slot.f
		l.mu.Unlock()
		err = l.datasync(f)
		if err != nil && sabotage.On(sabotage.FailedFileLeft) {
			err = l.datasync(f)
		}
		l.mu.Lock()
		if err == nil {
			l.n.flushes.Add(1)
			l.advanceLocked(n)
		}
	}
	if err != nil {
		l.suspect = err
		l.flushing = false
		l.cond.Broadcast()
		l.acquireLocked() // rescues, unless somebody else has by now
		l.releaseLocked()
		return
	}
	l.notifyLocked()
	l.flushing = false
	l.cond.Broadcast()
}

// advanceLocked takes note that the first n undurable records are durable now.
func (l *Log) advanceLocked(n int) {
	last := l.recs[n-1]
	l.durEnd = last.off + int64(last.size)
	l.durCRC = binary.LittleEndian.Uint64(l.pend[last.pos+64:])
	l.dropLocked(n)
	l.durable.Store(uint64(last.lsn))
	l.cond.Broadcast()
}

// dropLocked forgets the first n undurable records.
func (l *Log) dropLocked(n int) {
	last := l.recs[n-1]
	cut := last.pos + last.size
	l.rmu.Lock()
	defer l.rmu.Unlock()
	l.pend = l.pend[:copy(l.pend, l.pend[cut:])]
	l.recs = l.recs[:copy(l.recs, l.recs[n:])]
	for i := range l.recs {
		l.recs[i].pos -= cut
	}
	if len(l.recs) == 0 && int64(cap(l.pend)) > max(1<<20, 8*l.o.FlushBytes) {
		l.pend = nil
	}
	l.takenN -= n
	l.writtenN -= n
}

// notifyLocked calls OnDurable's function without mu. flushing or exclusive is
// set, so that calls do not overlap.
func (l *Log) notifyLocked() {
	f, durable := l.onDurable, l.Durable()
	if f == nil || durable <= l.notified {
		return
	}
	l.notified = durable
	l.mu.Unlock()
	f(durable)
	l.mu.Lock()
}

// acquireLocked makes the caller the only one who touches the current segment,
// and rescues the undurable records first if its file has failed.
func (l *Log) acquireLocked() {
	for l.exclusive {
		l.cond.Wait()
	}
	l.exclusive = true
	for l.flushing || l.writing {
		l.cond.Wait()
	}
	if l.suspect != nil && l.failed == nil {
		l.rescueLocked()
	}
}

func (l *Log) releaseLocked() {
	l.notifyLocked()
	l.exclusive = false
	l.cond.Broadcast()
}

// rotateLocked goes on to a new segment unless a record of size bytes fits by
// now. After an error nothing has changed.
func (l *Log) rotateLocked(mode Mode, size int64) error {
	l.acquireLocked()
	defer l.releaseLocked()
	if l.failed != nil {
		return l.failed
	}
	if !l.closedSeg && l.nextOffsetLocked(mode)+size <= l.cur().hdr.size {
		return nil
	}
	s, err := l.takeSlotLocked()
	if err != nil {
		return err
	}
	// All before the new segment is durable before its header names the end.
	if len(l.recs) > 0 {
		err := l.writeStagedLocked()
		if err == nil {
			f := l.cur().slot.f
			l.mu.Unlock()
			err = l.datasync(f)
			l.mu.Lock()
		}
		if err != nil {
			l.suspect = err
			l.free = append([]*slot{s}, l.free...)
			l.rescueLocked()
			return l.failed
		}
		l.advanceLocked(len(l.recs))
	}
	return l.startSegmentLocked(s)
}

// armLocked sees to it that what was just written becomes durable by and by. A
// flush in between does not stop the timer: to start it again would wake another
// thread, at every commit.
func (l *Log) armLocked() {
	if l.o.inline {
		return
	}
	if l.o.FlushAfter > 0 && len(l.recs) > 0 {
		l.startTimerLocked(l.o.FlushAfter)
	}
	if l.o.FlushBytes > 0 && int64(len(l.pend)) >= l.o.FlushBytes {
		l.backgroundLocked()
	}
}

func (l *Log) startTimerLocked(d time.Duration) {
	switch {
	case l.armed:
		return
	case l.timer == nil:
		l.timer = time.AfterFunc(d, l.flushTimer)
	default:
		l.timer.Reset(d)
	}
	l.armed = true
}

// flushTimer runs in its own goroutine when the timer has run down. It flushes
// if the oldest undurable record is FlushAfter old.
func (l *Log) flushTimer() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.armed = false
	if l.closed || len(l.recs) == 0 {
		return
	}
	if left := l.o.FlushAfter - time.Since(l.recs[0].made); left > 0 {
		l.startTimerLocked(left)
		return
	}
	l.wg.Add(1) // under mu and before closed: Close waits for it
	defer l.wg.Done()
	if err := l.waitLocked(l.Appended()); err != nil {
		l.log.Debug("background flush", "err", err)
	}
}

// backgroundLocked starts a goroutine that flushes, and prepares a spare segment
// if there is none, unless one is at it.
func (l *Log) backgroundLocked() {
	if l.bg || l.closed || l.failed != nil || l.o.inline {
		return
	}
	l.bg = true
	l.wg.Add(1)
	go func() {
		defer l.wg.Done()
		l.mu.Lock()
		defer l.mu.Unlock()
		defer func() { l.bg = false }()
		if l.o.FlushBytes > 0 && int64(len(l.pend)) >= l.o.FlushBytes {
			if err := l.waitLocked(l.Appended()); err != nil {
				l.log.Debug("background flush", "err", err)
			}
		}
		if l.goodLocked() == 0 && !l.closed && l.failed == nil {
			s, err := l.makeSlotLocked()
			if err != nil {
				l.log.Warn("no spare log segment", "err", err)
				return
			}
			l.free = append(l.free, s)
		}
	}()
}

// followLocked returns where ref's payload lies after a rescue.
func (l *Log) followLocked(ref Ref) Ref {
	for {
		next, ok := l.moved[place{ref.Seq, ref.Off}]
		if !ok {
			return ref
		}
		ref = next
	}
}

// ReadAt fills p with the payload of ref from off on, also while it is only
// staged. It waits for no write or flush. ErrReleased: the segment was reused.
func (l *Log) ReadAt(ref Ref, p []byte, off int64) error {
	if off < 0 || off+int64(len(p)) > int64(ref.Len) {
		return fmt.Errorf("read log payload: bytes %d to %d of %d", off, off+int64(len(p)), ref.Len)
	}
	l.rmu.RLock()
	ref = l.followLocked(ref)
	s := l.slots[ref.Slot]
	if s == nil || s.seq.Load() != ref.Seq {
		l.rmu.RUnlock()
		return ErrReleased
	}
	if len(l.recs) > 0 && l.cur().hdr.seq == ref.Seq && ref.Off >= l.recs[0].off {
		start := ref.Off - headerSize
		i := sort.Search(len(l.recs), func(i int) bool { return l.recs[i].off >= start })
		if i < len(l.recs) && l.recs[i].off == start {
			copy(p, l.pend[l.recs[i].pos+headerSize+int(off):])
			l.rmu.RUnlock()
			return nil
		}
	}
	f := s.f
	l.rmu.RUnlock()
	n, err := f.ReadAt(p, ref.Off+off)
	if s.seq.Load() != ref.Seq { // reused or closed while we read
		return ErrReleased
	}
	if n == len(p) {
		return nil
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read log segment %d at %d: %w", ref.Seq, ref.Off+off, err)
}

// Close flushes and closes the log. It is idempotent.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true // no more appends
	l.cond.Broadcast()
	if l.timer != nil {
		l.timer.Stop()
	}
	err := l.waitLocked(l.Appended())
	l.acquireLocked()
	l.releaseLocked()
	l.mu.Unlock()
	l.wg.Wait()
	l.mu.Lock()
	return errors.Join(err, l.closeFiles())
}
