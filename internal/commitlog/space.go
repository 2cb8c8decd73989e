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
	for l.goodLocked() < l.sparesLocked() {
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

// goodLocked is how many spare segments can be used.
func (l *Log) goodLocked() int {
	n := 0
	for _, s := range l.free {
		if !s.discard {
			n++
		}
	}
	return n
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
	n := 0
	for n < len(l.segs)-1 && l.segs[n].last < before {
		n++
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
	if n > 0 {
		l.rmu.Lock()
		l.segs = slices.Clone(l.segs[n:])
		l.rmu.Unlock()
	}
	l.trimLocked()
}

// trimLocked deletes spare segments that are too many or must not be reused.
// Those with a seq from the current header's oldest on have to wait for the next
// header: until it is durable, recovery would miss them.
func (l *Log) trimLocked() {
	for !l.closed {
		good := l.goodLocked()
		many := good > max(1, l.sparesLocked()) && len(l.segs)+good > l.o.Target
		i := slices.IndexFunc(l.free, func(s *slot) bool {
			return max(s.seq.Load(), s.was) < l.cur().hdr.oldest && (s.discard || many)
		})
		if i < 0 {
			return
		}
		s := l.free[i]
		l.free = slices.Delete(slices.Clone(l.free), i, i+1)
		l.dropSlotLocked(s)
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
