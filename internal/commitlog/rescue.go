package commitlog

import (
	"fmt"
	"slices"

	"github.com/litefs-agent/litefs-agent/internal/disk"
)

// rescueLocked brings the undurable records to a new segment after a write or
// flush of the current file has failed: the kernel reports such an error once
// and then forgets it, so that nothing in that file that was not durable may be
// trusted, and nothing is written there again (invariant 14). The caller is
// exclusive. If this fails, too, the log is failed.
func (l *Log) rescueLocked() {
	cause := l.suspect
	l.suspect = nil
	if err := l.tryRescueLocked(); err != nil {
		l.failed = fmt.Errorf("%w: %w; and then: %w", ErrFailed, cause, err)
		l.log.Error("log failed", "err", l.failed)
		l.cond.Broadcast()
		return
	}
	l.n.rescues.Add(1)
	l.log.Warn("log moved to a new segment", "err", cause)
}

func (l *Log) tryRescueLocked() error {
	s, err := l.takeSlotLocked()
	if err != nil {
		return err
	}
	// A released segment gets our records before our header, so its own header
	// goes first, or recovery would read them by it. What is missing below all
	// others was released: older spares must not stay.
	for i := 0; i < len(l.free) && s.seq.Load() != 0; {
		older := l.free[i]
		if at := max(older.seq.Load(), older.was); at == 0 || at > s.seq.Load() {
			i++
			continue
		}
		l.free = slices.Delete(slices.Clone(l.free), i, i+1)
		l.mu.Unlock()
		err := l.removeFile(older)
		l.mu.Lock()
		if err != nil {
			return err
		}
		l.rmu.Lock()
		delete(l.slots, older.id)
		l.rmu.Unlock()
		i = 0
	}
	old := l.cur()
	h, err := l.newHeader(l.Durable() + 1)
	if err != nil {
		return err
	}
	// The records again, without gaps: new salt, new chain.
	used := int64(len(l.pend))
	buf := disk.AlignedBuffer(int(roundUp(used, pageSize)), pageSize)
	copy(buf, l.pend)
	crc := l.durCRC
	for _, rec := range l.recs {
		p := buf[rec.pos : rec.pos+rec.size]
		crc = sealRecord(p, payloadLen(p), l.Durable(), crc, h.salt)
	}
	l.mu.Unlock()
	// The header comes last: until it is durable a killed process finds the
	// records in the old file's page cache (invariant 1).
	if s.seq.Load() != 0 {
		s.seq.Store(0)
		if err = writeFull(s.f, zeros[:pageSize], 0); err == nil {
			err = l.datasync(s.f)
		}
	}
	if err == nil && used > 0 {
		if err = writeFull(s.f, buf, pageSize); err == nil {
			l.n.bytes.Add(uint64(len(buf)))
			err = l.datasync(s.f)
		}
	}
	if err == nil {
		err = l.writeHeader(s, h)
	}
	if err == nil {
		err = l.o.FS.SyncDir(l.o.Dir)
	}
	if err == nil {
		l.openDirect(s)
	}
	l.mu.Lock()
	if err != nil {
		return err // s stays as it is: its header may be on the disk
	}
	l.setCurrentLocked(s, h)
	l.lastCRC = crc
	l.end = pageSize + used
	l.tailDirect = false // written through the cache, and sealed
	old.slot.discard = true
	l.rmu.Lock()
	for _, rec := range l.recs {
		n := int32(payloadLen(l.pend[rec.pos:]))
		l.moved[place{old.hdr.seq, rec.off + headerSize}] = Ref{
			Slot: s.id, Seq: h.seq, Off: pageSize + int64(rec.pos) + headerSize, Len: n,
		}
	}
	l.rmu.Unlock()
	if n := len(l.recs); n > 0 {
		l.takenN, l.writtenN = n, n
		l.advanceLocked(n)
	}
	// Their place in the old segment was another.
	l.durEnd, l.durCRC = l.end, crc
	return nil
}
