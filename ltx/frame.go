package ltx

import (
	"encoding/binary"
	"fmt"
	"sync"
)

// A frame is one page inside a file. Integers are big-endian.
//
//	0       4       6          10            10+n
//	+-------+-------+----------+-------------+
//	| Pgno  | Flags | Size (n) | LZ4 block   |
//	+-------+-------+----------+-------------+
//
// Size excludes the ten bytes before it. The block inflates to exactly
// Header.PageSize bytes. Pgno ascends strictly and is neither the lock page nor
// beyond Header.Commit; a snapshot leaves none out. Six zero bytes end the
// frames. Older files have frames with Flags 0 and, from byte 6, an LZ4 frame
// without a size; see lz4frame.go.
// Source: module github.com/superfly/ltx v0.5.2, encoder.go.

const (
	shortFrameHeaderSize        = 6 // of an old frame, and of the end of frames
	flagSize             uint16 = 1 // a size follows, and an LZ4 block
)

// MaxFileSize returns an upper bound of the size of a file with pageN pages of
// pageSize bytes, whatever they hold.
func MaxFileSize(pageSize uint32, pageN int) int64 {
	const indexEntry = 5 + 10 + 3 // uvarints of 32 bits, 64 bits, and at most 65,819
	page := int64(FrameHeaderSize + maxBlockSize(pageSize) + indexEntry)
	return HeaderSize + int64(pageN)*page + shortFrameHeaderSize + 1 + 8 + TrailerSize
}

// pageSequence says which page numbers may follow each other in a file, for
// those who write it and those who read it.
type pageSequence struct {
	h    Header
	lock uint32 // lock page
	last uint32 // last page accepted; 0 before the first
	xor  Checksum
}

func newPageSequence(h Header) pageSequence {
	return pageSequence{h: h, lock: LockPgno(h.PageSize)}
}

// next accepts pgno as the next page, or says why not.
func (s *pageSequence) next(pgno uint32) error {
	switch {
	case pgno <= s.last:
		return fmt.Errorf("page %d after page %d", pgno, s.last)
	case pgno > s.h.Commit:
		return fmt.Errorf("page %d beyond commit %d", pgno, s.h.Commit)
	case pgno == s.lock:
		return fmt.Errorf("page %d is the lock page", pgno)
	case s.h.IsSnapshot() && pgno != s.successor():
		return fmt.Errorf("snapshot has page %d where page %d is due", pgno, s.successor())
	}
	s.last = pgno
	return nil
}

// successor returns the number after last, the lock page left out.
func (s *pageSequence) successor() uint32 {
	if s.last+1 == s.lock {
		return s.last + 2
	}
	return s.last + 1
}

// checked adds the page last accepted to the checksum of the database, where
// the file alone determines it.
func (s *pageSequence) checked(crc uint64) {
	if s.h.IsSnapshot() && !s.h.NoChecksum() {
		s.xor ^= PageChecksumFromCRC(s.last, s.h.PageSize, crc)
	}
}

// end says why the file may not end after the page last accepted with post, or
// nil.
func (s *pageSequence) end(post Checksum) error {
	if err := s.h.checkPost(post); err != nil {
		return err
	}
	if !s.h.IsSnapshot() {
		return nil
	}
	if s.last != s.h.Commit && s.successor() <= s.h.Commit {
		return fmt.Errorf("snapshot ends after page %d of %d", s.last, s.h.Commit)
	}
	if got := ChecksumFlag | s.xor; !s.h.NoChecksum() && got != post {
		return fmt.Errorf("post-apply checksum %s: pages give %s", post, got)
	}
	return nil
}

// A fileState is a file in the making: what must be remembered of the bytes
// before. Its methods append the next bytes to a buffer.
type fileState struct {
	seq   pageSequence
	n     int64  // bytes of the file so far
	crc   uint64 // linear CRC of the file so far
	index []byte // uvarints of the pages so far
}

// A scratch is what making a file needs besides.
type scratch struct {
	compressor
	index []byte
}

var scratchPool = sync.Pool{New: func() any { return new(scratch) }}

func (f *fileState) appendHeader(b []byte, h Header, index []byte) ([]byte, error) {
	if err := h.Validate(); err != nil {
		return b, err
	}
	*f = fileState{seq: newPageSequence(h), crc: ^uint64(0), index: index[:0]}
	return f.added(h.appendTo(b), len(b)), nil
}

// added accounts for b[from:], bytes that count as they are.
func (f *fileState) added(b []byte, from int) []byte {
	f.crc = linearCRC(f.crc, b[from:])
	f.n += int64(len(b) - from)
	return b
}

// appendPage appends the frame of a page. block is its LZ4 block, or empty to
// compress data with c.
func (f *fileState) appendPage(b []byte, pgno uint32, data []byte, crc uint64, block []byte, c *compressor) ([]byte, error) {
	size := f.seq.h.PageSize
	if len(data) != int(size) {
		return b, fmt.Errorf("%w: page %d has %d bytes: want %d", ErrInvalid, pgno, len(data), size)
	}
	if err := f.seq.next(pgno); err != nil {
		return b, fmt.Errorf("%w: %w", ErrOrder, err)
	}
	f.seq.checked(crc)

	start := len(b)
	b = binary.BigEndian.AppendUint32(b, pgno)
	b = binary.BigEndian.AppendUint16(b, flagSize)
	b = binary.BigEndian.AppendUint32(b, 0)
	if len(block) > 0 {
		b = append(b, block...)
	} else {
		b = c.appendBlock(b, data)
	}
	frame := b[start:]
	binary.BigEndian.PutUint32(frame[6:], uint32(len(frame)-FrameHeaderSize))

	f.index = appendIndexEntry(f.index, IndexEntry{pgno, f.n, int64(len(frame))})
	f.crc = shiftPage(linearCRC(f.crc, frame[:FrameHeaderSize]), size) ^ crc
	f.n += int64(len(frame))
	return b, nil
}

// appendEnd appends what follows the frames.
func (f *fileState) appendEnd(b []byte, post Checksum) ([]byte, Trailer, error) {
	if err := f.seq.end(post); err != nil {
		return b, Trailer{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	start := len(b)
	b = append(b, make([]byte, shortFrameHeaderSize)...)
	b = append(b, f.index...)
	b = append(b, 0)
	b = binary.BigEndian.AppendUint64(b, uint64(len(f.index)+1))
	b = binary.BigEndian.AppendUint64(b, uint64(post))
	b = f.added(b, start)
	t := Trailer{PostApplyChecksum: post, FileChecksum: ChecksumFlag | Checksum(^f.crc)}
	f.n += 8
	return binary.BigEndian.AppendUint64(b, uint64(t.FileChecksum)), t, nil
}

// grow returns b with room for n more bytes.
func grow(b []byte, n int) []byte {
	if cap(b)-len(b) >= n {
		return b
	}
	return append(b, make([]byte, n)...)[:len(b)]
}
