package commitlog

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
	"sync/atomic"

	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/sabotage"
)

// Endings of file names. A damaged segment is still part of the log until it is
// released; then, or if not even its header is readable, it is only kept.
const (
	extSegment = ".seg"
	extDamaged = ".damaged"
	extKept    = ".kept"
)

// slot is a segment file, whatever it holds at the moment.
type slot struct {
	id      uint32
	size    int64
	ext     string        // guarded by Log.mu
	f       disk.File     // through the page cache
	direct  disk.File     // of the current segment, if direct I/O works; guarded by Log.mu
	seq     atomic.Uint64 // of the segment in it, 0 while it is none; readers look before and after
	discard bool          // not to be reused; guarded by Log.mu
	was     uint64        // seq that the file may still bear on the disk when seq is 0; guarded by Log.mu
}

// segment is a slot in use.
type segment struct {
	slot *slot
	hdr  segHeader
	last LSN   // of the segments before the current one
	end  int64 // where the last record ends; of the segments before the current one
}

func slotName(id uint32, ext string) string { return fmt.Sprintf("%08d%s", id, ext) }

func parseSlotName(name string) (id uint32, ext string, ok bool) {
	ext = path.Ext(name)
	if ext != extSegment && ext != extDamaged && ext != extKept {
		return 0, "", false
	}
	digits := strings.TrimSuffix(name, ext)
	n, err := strconv.ParseUint(digits, 10, 32)
	if err != nil || slotName(uint32(n), ext) != name {
		return 0, "", false
	}
	return uint32(n), ext, true
}

func (l *Log) path(name string) string { return path.Join(l.o.Dir, name) }

var zeros [64 << 10]byte

// createSlot makes a file of zeros and syncs it: blocks that were written once
// need no journal commit of the file system when they are written again.
func (l *Log) createSlot(id uint32) (*slot, error) {
	name := l.path(slotName(id, extSegment))
	f, err := l.o.FS.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create log segment: %w", err)
	}
	size := l.o.SegmentSize
	err = f.Allocate(0, size) // meets a full disk before the work is done
	if errors.Is(err, errors.ErrUnsupported) {
		err = nil
	}
	for off := int64(0); off < size && err == nil; off += int64(len(zeros)) {
		err = writeFull(f, zeros[:min(int64(len(zeros)), size-off)], off)
	}
	if err == nil {
		err = l.datasync(f)
	}
	if err == nil {
		err = l.o.FS.SyncDir(l.o.Dir)
	}
	if err != nil {
		f.Close()
		if rerr := l.o.FS.Remove(name); rerr != nil {
			err = errors.Join(err, rerr)
		}
		return nil, fmt.Errorf("create log segment: %w", err)
	}
	return &slot{id: id, size: size, ext: extSegment, f: f}, nil
}

// makeSlotLocked creates a slot without holding mu.
func (l *Log) makeSlotLocked() (*slot, error) {
	for l.creating {
		l.cond.Wait()
	}
	l.creating = true
	id := l.nextSlot
	l.nextSlot++
	l.mu.Unlock()
	s, err := l.createSlot(id)
	l.mu.Lock()
	l.creating = false
	l.cond.Broadcast()
	if err != nil {
		return nil, err
	}
	l.rmu.Lock()
	l.slots[id] = s
	l.rmu.Unlock()
	return s, nil
}

// takeSlotLocked returns a free slot, or makes one. The oldest segment goes
// first: recovery, which may still look for those that the current header lists,
// takes one that is missing below all others for released.
func (l *Log) takeSlotLocked() (*slot, error) {
	for l.creating && l.goodLocked() == 0 {
		l.cond.Wait()
	}
	best := -1
	for i, s := range l.free {
		if !s.discard && (best < 0 || s.seq.Load() < l.free[best].seq.Load()) {
			best = i
		}
	}
	if best >= 0 {
		s := l.free[best]
		l.free = slices.Delete(slices.Clone(l.free), best, best+1)
		return s, nil
	}
	return l.makeSlotLocked()
}

// newHeader draws up the header of the segment that follows the current one.
func (l *Log) newHeader(first LSN) (segHeader, error) {
	var salt [8]byte
	if _, err := io.ReadFull(l.o.Rand, salt[:]); err != nil {
		return segHeader{}, err
	}
	if sabotage.On(sabotage.Chain) {
		salt = [8]byte{}
	}
	h := segHeader{
		size: l.o.SegmentSize, seq: l.nextSeq, salt: binary.LittleEndian.Uint64(salt[:]), first: first, oldest: l.nextSeq,
	}
	// Even if this header fails it may be on the disk: never use the number twice.
	l.nextSeq++
	h.formerCRC = l.durCRC
	if len(l.segs) > 0 {
		h.oldest = l.segs[0].hdr.seq
		h.formerSeq, h.formerEnd = l.cur().hdr.seq, l.durEnd
	}
	return h, nil
}

// writeHeader makes s the segment of header h, durably.
func (l *Log) writeHeader(s *slot, h segHeader) error {
	s.seq.Store(0)
	var page [pageSize]byte
	h.encode(page[:])
	if err := writeFull(s.f, page[:], 0); err != nil {
		return err
	}
	l.n.bytes.Add(pageSize)
	return l.datasync(s.f)
}

// openDirect opens s for direct I/O if that works here.
func (l *Log) openDirect(s *slot) {
	if l.o.NoDirect || s.direct != nil {
		return
	}
	f, err := l.o.FS.OpenFile(l.path(slotName(s.id, s.ext)), os.O_RDWR|disk.Direct, 0)
	if err != nil {
		l.log.Debug("log without direct i/o", "err", err)
		return
	}
	s.direct = f
}

// startSegmentLocked makes slot s the current segment. Every record is durable
// and the caller is exclusive; mu is given up meanwhile. After an error the log
// stands where it stood, but the old segment takes no more records: the new
// header, which names its end, may be on the disk all the same.
func (l *Log) startSegmentLocked(s *slot) error {
	first := l.Appended() + 1
	h, err := l.newHeader(first)
	if err != nil {
		l.free = append([]*slot{s}, l.free...)
		return err
	}
	l.closedSeg = true
	s.was = s.seq.Load()
	l.mu.Unlock()
	err = l.writeHeader(s, h)
	if err == nil {
		l.openDirect(s)
	}
	l.mu.Lock()
	if err != nil {
		s.discard = true
		l.free = append(l.free, s)
		return fmt.Errorf("start log segment: %w", err)
	}
	l.setCurrentLocked(s, h)
	l.end, l.durEnd = pageSize, pageSize
	if l.goodLocked() == 0 {
		l.backgroundLocked()
	}
	return nil
}

// setCurrentLocked puts a segment whose header is durable at the head.
func (l *Log) setCurrentLocked(s *slot, h segHeader) {
	if len(l.segs) > 0 {
		old := l.cur()
		old.last, old.end = h.first-1, h.formerEnd
		if old.slot.direct != nil {
			old.slot.direct.Close()
			old.slot.direct = nil
		}
	}
	l.rmu.Lock()
	l.segs = append(l.segs, &segment{slot: s, hdr: h})
	l.rmu.Unlock()
	s.seq.Store(h.seq)
	s.was = 0
	l.block = pageSize
	if s.direct != nil {
		l.block = int64(l.o.FS.BlockSize())
	}
	l.closedSeg = false
	l.tailDirect, l.sealed = true, true
}

// dropSlotLocked forgets slot s and deletes its file as far as that works.
func (l *Log) dropSlotLocked(s *slot) {
	l.rmu.Lock()
	delete(l.slots, s.id)
	l.rmu.Unlock()
	l.mu.Unlock()
	if err := l.removeFile(s); err != nil {
		l.log.Warn("delete log segment", "err", err)
	}
	l.mu.Lock()
}

// removeFile deletes the file of a slot that nobody knows any more, or keeps it
// under another name if it is damaged. That is durable on return.
func (l *Log) removeFile(s *slot) error {
	s.seq.Store(0)
	err := s.f.Close()
	if s.direct != nil {
		err = errors.Join(err, s.direct.Close())
	}
	name := l.path(slotName(s.id, s.ext))
	if s.ext == extDamaged {
		err = errors.Join(err, l.o.FS.Rename(name, l.path(slotName(s.id, extKept))))
	} else {
		err = errors.Join(err, l.o.FS.Remove(name))
	}
	return errors.Join(err, l.o.FS.SyncDir(l.o.Dir))
}

// closeFiles closes every file; the log is not used any more.
func (l *Log) closeFiles() error {
	l.rmu.Lock()
	defer l.rmu.Unlock()
	var errs []error
	for _, s := range l.slots {
		s.seq.Store(0)
		errs = append(errs, s.f.Close())
		if s.direct != nil {
			errs = append(errs, s.direct.Close())
		}
	}
	clear(l.slots)
	return errors.Join(errs...)
}
