package commitlog

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/sabotage"
)

// Open opens the log in o.Dir, or makes one, hands each record to replay, oldest
// first, and starts a fresh segment. All that was replayed is durable. An error
// of replay ends it and is returned. Damage does not: see Damage.
func Open(o Options, replay func(Record) error) (*Log, error) {
	l, err := newLog(o)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.recoverLocked(replay); err != nil {
		l.closeFiles()
		return nil, fmt.Errorf("open log %s: %w", o.Dir, err)
	}
	if l.goodLocked() == 0 {
		l.backgroundLocked()
	}
	return l, nil
}

// found is a segment file as recovery meets it.
type found struct {
	slot *slot
	hdr  segHeader
	hole bool // the segment before it is missing
}

// recovery is the state of one replay.
type recovery struct {
	l      *Log
	replay func(Record) error
	next   LSN    // expected
	crc    uint64 // of the record before next
	after  bool   // damage was met
	buf    []byte // one segment
	budget int64  // bytes that look may still check
}

func (l *Log) recoverLocked(replay func(Record) error) error {
	if err := disk.MkdirAll(l.o.FS, l.o.Dir, 0o700); err != nil {
		return err
	}
	valid, err := l.findSegments()
	if err != nil {
		return err
	}
	r := &recovery{l: l, replay: replay, next: 1}
	chain, rest := r.link(valid)
	for i, f := range chain {
		if err := r.segment(chain, i); err != nil {
			return err
		}
		l.segs = append(l.segs, &segment{slot: f.slot, hdr: f.hdr, last: r.next - 1, end: l.durEnd})
	}
	for _, f := range rest {
		l.reuseOrDrop(f.slot)
	}
	l.durCRC, l.lastCRC = r.crc, r.crc
	l.durable.Store(uint64(r.next - 1))
	l.appended.Store(uint64(r.next - 1))
	l.notified = r.next - 1
	for i := range l.segs {
		if err := l.setAsideLocked(l.segs[i].slot); err != nil {
			return err
		}
	}
	return l.freshSegmentLocked()
}

// findSegments opens all segment files. Those with a header are returned; the
// others are free, or set aside if somebody else's bytes are in the place of the
// header.
func (l *Log) findSegments() ([]found, error) {
	list, err := l.o.FS.ReadDir(l.o.Dir)
	if err != nil {
		return nil, err
	}
	var valid []found
	page := disk.AlignedBuffer(pageSize, pageSize)
	for _, entry := range list {
		id, ext, ok := parseSlotName(entry.Name())
		if !ok {
			continue
		}
		l.nextSlot = max(l.nextSlot, id+1)
		if ext == extKept {
			continue
		}
		f, err := l.o.FS.OpenFile(l.path(entry.Name()), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		s := &slot{id: id, ext: ext, f: f}
		l.slots[id] = s
		if s.size, err = f.Size(); err != nil {
			return nil, err
		}
		if err := l.readHeader(s, page); err != nil {
			return nil, fmt.Errorf("read %s: %w", entry.Name(), err)
		}
		h, err := decodeSegHeader(page)
		switch {
		case err == nil:
			l.nextSeq = max(l.nextSeq, h.seq)
			valid = append(valid, found{slot: s, hdr: h})
		case !errors.Is(err, errNoHeader):
			return nil, fmt.Errorf("%s: %w", entry.Name(), err)
		case allZero(page):
			l.reuseOrDrop(s)
		default:
			s.ext = extDamaged // so that removeFile keeps it
			if ext == extSegment {
				if err := l.o.FS.Rename(l.path(entry.Name()), l.path(slotName(id, extDamaged))); err != nil {
					return nil, err
				}
			}
			delete(l.slots, id)
			if err := l.removeFile(s); err != nil {
				return nil, err
			}
			l.damage = append(l.damage, DamageInfo{File: slotName(id, extKept), Reason: "unreadable segment header"})
			l.log.Error("log segment header unreadable", "file", slotName(id, extKept))
		}
	}
	l.nextSeq++
	slices.SortFunc(valid, func(a, b found) int { return compare(a.hdr.seq, b.hdr.seq) })
	return valid, nil
}

// readHeader fills page with the header page, zeros beyond the end of the file.
// It reads past the page cache where that works, for the reason given at read.
func (l *Log) readHeader(s *slot, page []byte) error {
	f := s.f
	l.openDirect(s)
	if s.direct != nil {
		f = s.direct
		defer func() {
			s.direct.Close()
			s.direct = nil
		}()
	}
	n, err := f.ReadAt(page, 0)
	if err != nil && err != io.EOF {
		return err
	}
	clear(page[n:])
	return nil
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// reuseOrDrop takes a file that holds nothing of the log.
func (l *Log) reuseOrDrop(s *slot) {
	s.seq.Store(0)
	if s.ext == extSegment && s.size == l.o.SegmentSize {
		l.free = append(l.free, s)
		return
	}
	delete(l.slots, s.id)
	if err := l.removeFile(s); err != nil {
		l.log.Warn("delete log segment", "err", err)
	}
}

// link follows the headers from the newest segment back to the oldest that was
// not released. What is not on that chain was released, or abandoned before it
// held a record.
func (r *recovery) link(valid []found) (chain, rest []found) {
	if len(valid) == 0 {
		return nil, nil
	}
	oldest := valid[len(valid)-1].hdr.oldest
	i := len(valid) - 1
	for {
		f := valid[i]
		former := f.hdr.formerSeq
		if former == 0 || former < oldest || i == 0 {
			// Nothing below: it was released and deleted since.
			chain = append(chain, f)
			rest = append(rest, valid[:i]...)
			break
		}
		j := i - 1
		for j > 0 && valid[j].hdr.seq > former {
			j--
		}
		if valid[j].hdr.seq > former || valid[j].hdr.seq < oldest {
			chain = append(chain, f)
			rest = append(rest, valid[:i]...)
			break
		}
		f.hole = valid[j].hdr.seq != former
		chain = append(chain, f)
		rest = append(rest, valid[j+1:i]...)
		i = j
	}
	slices.Reverse(chain)
	return chain, rest
}

// segment replays chain[i].
func (r *recovery) segment(chain []found, i int) error {
	l, f := r.l, chain[i]
	f.slot.seq.Store(f.hdr.seq)
	name := slotName(f.slot.id, f.slot.ext)
	if i == 0 {
		r.next, r.crc = f.hdr.first, f.hdr.formerCRC
	} else if f.hdr.first != r.next || f.hdr.formerCRC != r.crc {
		if f.hole {
			r.report(DamageInfo{File: name, Seq: f.hdr.formerSeq, From: r.next, To: f.hdr.first - 1, Reason: "segment missing"})
		} else if f.hdr.first != r.next {
			r.report(DamageInfo{File: name, Seq: f.hdr.seq, From: r.next, To: f.hdr.first - 1, Reason: "segments do not join"})
		}
		r.next, r.crc = f.hdr.first, f.hdr.formerCRC
	}
	// Where it ends, and what was durable for sure, is known from the next one.
	limit, last := f.hdr.size, LSN(0)
	if i+1 < len(chain) && !chain[i+1].hole {
		last = chain[i+1].hdr.first - 1
		limit = min(chain[i+1].hdr.formerEnd, limit)
	}
	buf, err := r.read(f, i == len(chain)-1)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	limit = max(min(limit, int64(len(buf))), pageSize)
	if len(buf) < pageSize { // truncated by somebody
		buf = make([]byte, pageSize)
	}
	buf = buf[:limit]
	pos := int64(pageSize)
	r.budget = 16 * f.hdr.size
	for last == 0 || r.next <= last {
		if rec, at, ok := r.find(buf, pos, f.hdr.salt); ok {
			if err := r.deliver(f, rec, at); err != nil {
				return err
			}
			pos = at + rec.size
			continue
		}
		at, lsn, prev, proof := r.look(buf, pos, f.hdr.salt)
		if last == 0 && (!proof || sabotage.On(sabotage.HoleReported)) { // a torn tail: nobody was told that it is durable
			break
		}
		hole := DamageInfo{File: name, Seq: f.hdr.seq, Off: pos, End: at, From: r.next, To: lsn - 1, Reason: "bad record before durable ones"}
		if lsn == 0 || last != 0 && lsn > last {
			hole.End, hole.To = limit, last
			lsn, prev, at = last+1, 0, limit
		}
		r.report(hole)
		f.slot.discard = true
		r.next, r.crc, pos = lsn, prev, at
	}
	l.durEnd = pos
	return nil
}

// read returns the content of a segment. The last one is brought to the disk
// first, as the new segment's header will say that it is there, and read past
// the page cache where that works: after a failed fdatasync in a killed process
// the cache may hold what the disk does not.
func (r *recovery) read(f found, last bool) ([]byte, error) {
	if r.buf == nil || int64(len(r.buf)) < f.hdr.size {
		r.buf = disk.AlignedBuffer(int(f.hdr.size), pageSize)
	}
	file := f.slot.f
	if last {
		if err := r.l.datasync(file); err != nil {
			return nil, err
		}
		r.l.openDirect(f.slot)
		if d := f.slot.direct; d != nil {
			file = d
			defer func() {
				d.Close()
				f.slot.direct = nil
			}()
		}
	}
	n, err := file.ReadAt(r.buf[:f.hdr.size], 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	return r.buf[:n], nil
}

// find looks for the next record where it may begin after one that ended at pos.
func (r *recovery) find(buf []byte, pos int64, salt uint64) (rawRecord, int64, bool) {
	end := roundUp(pos, pageSize)
	for at := pos; at <= end && at < int64(len(buf)); at = roundUp(at+1, sectorSize) {
		rec, err := decodeRecord(buf[at:], salt)
		if err == nil && rec.lsn == r.next && (rec.prev == r.crc || sabotage.On(sabotage.Chain)) { // invariant 15
			return rec, at, true
		}
	}
	return rawRecord{}, 0, false
}

// look searches for valid records behind the place where the expected one is
// not: the first of them, and whether any proves that the missing one was
// durable.
func (r *recovery) look(buf []byte, pos int64, salt uint64) (at int64, lsn LSN, prev uint64, proof bool) {
	for p := pos; p+headerSize <= int64(len(buf)); p += 8 {
		if buf[p] != recMagic&0xff || !plausible(buf[p:], r.next, int64(len(buf))) {
			continue
		}
		n := int64(payloadLen(buf[p:]))
		if r.budget -= n; r.budget < 0 {
			break // only a forged file gets here
		}
		rec, err := decodeRecord(buf[p:], salt)
		if err != nil {
			continue
		}
		if lsn == 0 {
			at, lsn, prev = p, rec.lsn, rec.prev
		}
		if rec.durable >= r.next {
			return at, lsn, prev, true
		}
		p += rec.size - 8
	}
	return at, lsn, prev, false
}

// plausible spares the CRC of what cannot be a record at or after next.
func plausible(p []byte, next LSN, room int64) bool {
	lsn, n := recordLSN(p)
	return lsn >= next && lsn-next <= LSN(room/headerSize) && headerSize+n <= int64(len(p))
}

func (r *recovery) deliver(f found, rec rawRecord, at int64) error {
	err := r.replay(Record{
		Header: rec.Header, LSN: rec.lsn, Payload: rec.payload, AfterDamage: r.after,
		Ref: Ref{Slot: f.slot.id, Seq: f.hdr.seq, Off: at + headerSize, Len: int32(len(rec.payload))},
	})
	if err != nil {
		return fmt.Errorf("replay record %d: %w", rec.lsn, err)
	}
	r.next, r.crc = rec.lsn+1, rec.crc
	return nil
}

func (r *recovery) report(d DamageInfo) {
	r.after = true
	r.l.damage = append(r.l.damage, d)
	r.l.log.Error("log damaged", "file", d.File, "off", d.Off, "from", uint64(d.From), "to", uint64(d.To), "err", d.Reason)
}

// setAsideLocked renames the file of a damaged segment. It stays part of the log
// until it is released, and is kept after that.
func (l *Log) setAsideLocked(s *slot) error {
	if !s.discard || s.ext != extSegment {
		return nil
	}
	from := slotName(s.id, extSegment)
	if err := l.o.FS.Rename(l.path(from), l.path(slotName(s.id, extDamaged))); err != nil {
		return err
	}
	s.ext = extDamaged
	for i := range l.damage {
		if l.damage[i].File == from {
			l.damage[i].File = slotName(s.id, extDamaged)
		}
	}
	return l.o.FS.SyncDir(l.o.Dir)
}

// freshSegmentLocked starts the segment that follows what was replayed, with a
// salt of its own, so that stale records behind the end never follow (B1).
func (l *Log) freshSegmentLocked() error {
	if n := len(l.segs); n > 0 {
		// Do not pile up segments when every start ends before the first append.
		empty := l.cur()
		if empty.last < empty.hdr.first && !empty.slot.discard && empty.slot.size == l.o.SegmentSize {
			h := empty.hdr
			l.segs = l.segs[:n-1]
			l.free = append([]*slot{empty.slot}, l.free...)
			l.durEnd = h.formerEnd
		}
	}
	s, err := l.takeSlotLocked()
	if err != nil {
		return err
	}
	return l.startSegmentLocked(s)
}
