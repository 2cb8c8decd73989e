package commitlog

import (
	"encoding/binary"
	"fmt"
	"slices"
)

func payloadLen(p []byte) int { return int(binary.LittleEndian.Uint32(p[4:])) }

// Reserve makes sure that n more payload bytes can be appended without meeting a
// full disk (invariant 23); it makes spare segments for that, and fails with
// ENOSPC if it cannot. Appends without a reservation must be small. Every
// Reserve is undone by Unreserve, after the append or instead of it; calls may
// be split or joined as long as the sum is right.
func (l *Log) Reserve(n int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reserved += n
	for len(l.free) < l.sparesLocked() {
		err := l.failed
		if err == nil && l.closed {
			err = ErrClosed
		}
		if err == nil && l.creating {
			l.cond.Wait()
			continue
		}
		var s *slot
		if err == nil {
			s, err = l.makeSlotLocked()
		}
		if err != nil {
			l.reserved -= n
			return fmt.Errorf("reserve %d bytes in the log: %w", n, err)
		}
		l.free = append(l.free, s)
	}
	return nil
}

// Unreserve takes back n bytes of Reserve.
func (l *Log) Unreserve(n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reserved = max(l.reserved-n, 0)
}

// sparesLocked is how many free segments the reservations need. A record is in
// one segment, so that in the worst case each is half empty; 64 KiB are for the
// heads and gaps. The rest of the current segment is not counted.
func (l *Log) sparesLocked() int {
	if l.reserved == 0 {
		return 0
	}
	room := l.o.SegmentSize - pageSize
	return int((2*l.reserved + min(64<<10, room/2) + room - 1) / room)
}

// Segments lists the segments in use, oldest first.
func (l *Log) Segments() []SegmentInfo {
	l.mu.Lock()
	defer l.mu.Unlock()
	list := make([]SegmentInfo, len(l.segs))
	for i, s := range l.segs {
		info := SegmentInfo{Seq: s.hdr.seq, First: s.hdr.first, Last: s.last, Bytes: max(s.end-pageSize, 0)}
		if i == len(l.segs)-1 {
			info.Last, info.Bytes = l.Appended(), l.end-pageSize
		}
		list[i] = info
	}
	return list
}

// Damage lists the holes that Open found; see DamageInfo.
func (l *Log) Damage() []DamageInfo {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.damage)
}

// Release says that no record below before is needed any more. Segments that
// hold nothing else are reused, or deleted if there are more than Target; replay
// may still show them after a crash. The current segment stays.
func (l *Log) Release(before LSN) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	n := 0
	for n < len(l.segs)-1 && l.segs[n].last < before {
		n++
	}
	if n == 0 {
		return
	}
	for _, seg := range l.segs[:n] {
		s := seg.slot
		s.discard = s.discard || s.ext != extSegment || s.size != l.o.SegmentSize
		l.free = append(l.free, s)
		for at, ref := range l.moved {
			if ref.Seq == seg.hdr.seq {
				l.rmu.Lock()
				delete(l.moved, at)
				l.rmu.Unlock()
			}
		}
	}
	l.rmu.Lock()
	l.segs = slices.Clone(l.segs[n:])
	l.rmu.Unlock()
	slices.SortFunc(l.free, func(a, b *slot) int { return compare(a.seq.Load(), b.seq.Load()) })

	// Files go in the order of their segments, each durably before the next, so
	// that what a crash leaves has no hole.
	drop := len(l.segs) + len(l.free) - l.o.Target
	drop = min(drop, len(l.free)-max(1, l.sparesLocked()))
	for i, s := range l.free {
		if s.discard {
			drop = max(drop, i+1)
		}
	}
	if drop <= 0 {
		return
	}
	gone := slices.Clone(l.free[:drop])
	l.free = slices.Clone(l.free[drop:])
	for _, s := range gone {
		l.dropSlotLocked(s)
	}
	for len(l.free) < l.sparesLocked() && l.failed == nil && !l.closed { // discarded ones served a reservation
		s, err := l.makeSlotLocked()
		if err != nil {
			l.log.Warn("no spare log segment", "err", err)
			break
		}
		l.free = append(l.free, s)
	}
}

func compare(a, b uint64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}
