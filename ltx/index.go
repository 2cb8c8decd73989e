package ltx

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// The index follows the frames, so that single pages can be read from a file.
//
//	+------+--------+------+     +---+-----------+
//	| Pgno | Offset | Size | ... | 0 | bytes u64 |
//	+------+--------+------+     +---+-----------+
//
// All but the last are uvarints as in package encoding/binary, of the least
// length. Offset is that of the frame in the file, Size that of the frame, its
// header included. The last number counts the bytes of the varints, the zero
// included. As the frames follow each other, so must the entries.

// An IndexEntry says where the frame of a page is.
type IndexEntry struct {
	Pgno   uint32
	Offset int64 // from the start of the file
	Size   int64 // of the frame, header included
}

func appendIndexEntry(b []byte, e IndexEntry) []byte {
	b = binary.AppendUvarint(b, uint64(e.Pgno))
	b = binary.AppendUvarint(b, uint64(e.Offset))
	return binary.AppendUvarint(b, uint64(e.Size))
}

// ReadIndex reads header, index and trailer of the file r of size bytes. It
// checks that the entries are possible and cover all frames, but reads no frame
// and verifies no checksum.
func ReadIndex(r io.ReaderAt, size int64) ([]IndexEntry, Trailer, error) {
	h, err := ReadHeader(r)
	if err != nil {
		return nil, Trailer{}, err
	}
	const least = shortFrameHeaderSize + 1 + 8 + TrailerSize
	if size < HeaderSize+least {
		return nil, Trailer{}, corruptf(size, "file ends before its trailer: %w", io.ErrUnexpectedEOF)
	}
	var b [8 + TrailerSize]byte
	off := size - int64(len(b))
	if _, err := r.ReadAt(b[:], off); err != nil && !errors.Is(err, io.EOF) {
		return nil, Trailer{}, readError(off, "trailer", err)
	}
	t := trailerOf(b[8:])
	indexSize := binary.BigEndian.Uint64(b[:])
	if indexSize < 1 || indexSize > uint64(off-HeaderSize-shortFrameHeaderSize) {
		return nil, Trailer{}, corruptf(off, "index has %d bytes", indexSize)
	}
	start := off - int64(indexSize)
	frames, err := readEntries(r, h, start, off)
	if err != nil {
		return nil, Trailer{}, err
	}
	if err := h.checkPost(t.PostApplyChecksum); err != nil {
		return nil, Trailer{}, corruptf(off+8, "trailer: %w", err)
	}
	return frames, t, nil
}

// readEntries reads the index of r, which lies between start and end.
func readEntries(r io.ReaderAt, h Header, start, end int64) ([]IndexEntry, error) {
	framesEnd := start - shortFrameHeaderSize
	ir := indexReader{r: bufio.NewReader(io.NewSectionReader(r, framesEnd, end-framesEnd)), off: framesEnd}
	for range shortFrameHeaderSize {
		if b, err := ir.r.ReadByte(); err != nil {
			return nil, readError(ir.off, "end of frames", err)
		} else if b != 0 {
			return nil, corruptf(ir.off, "end of frames: byte is %#x", b)
		}
		ir.off++
	}
	var entries []IndexEntry
	seq, next := newPageSequence(h), int64(HeaderSize)
	for {
		at := ir.off
		pgno, err := ir.uvarint()
		if err != nil {
			return nil, err
		}
		if pgno == 0 {
			break
		}
		offset, err := ir.uvarint()
		if err != nil {
			return nil, err
		}
		size, err := ir.uvarint()
		if err != nil {
			return nil, err
		}
		if pgno > 0xffffffff {
			return nil, corruptf(at, "index: page %d", pgno)
		}
		if err := seq.next(uint32(pgno)); err != nil {
			return nil, corruptf(at, "index: %w", err)
		}
		if offset != uint64(next) || size > uint64(framesEnd-next) || size <= shortFrameHeaderSize {
			return nil, corruptf(at, "index: page %d at %d+%d: frames from %d to %d", pgno, offset, size, next, framesEnd)
		}
		entries = append(entries, IndexEntry{uint32(pgno), next, int64(size)})
		next += int64(size)
	}
	if ir.off != end {
		return nil, corruptf(ir.off, "index ends %d bytes early", end-ir.off)
	}
	if next != framesEnd {
		return nil, corruptf(ir.off, "index: frames end at %d, want %d", next, framesEnd)
	}
	return entries, nil
}

// An indexReader reads uvarints and counts bytes.
type indexReader struct {
	r   *bufio.Reader
	off int64 // of the next byte in the file
}

func (ir *indexReader) uvarint() (v uint64, err error) {
	at := ir.off
	for shift := uint(0); shift < 64; shift += 7 {
		b, err := ir.r.ReadByte()
		if err != nil {
			return 0, readError(ir.off, "index", err)
		}
		ir.off++
		if b == 0 && shift > 0 || shift == 63 && b > 1 {
			break
		}
		v |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return v, nil
		}
	}
	return 0, corruptf(at, "index: malformed number")
}

var framePool = sync.Pool{New: func() any { return new([]byte) }}

// ReadPage reads the page of entry e, which [ReadIndex] returned for file r,
// into dst, of pageSize bytes. The LZ4 block alone is checked, as no checksum
// covers a single page.
func ReadPage(r io.ReaderAt, e IndexEntry, pageSize uint32, dst []byte) error {
	if !IsPageSize(pageSize) || len(dst) != int(pageSize) {
		return fmt.Errorf("%w: buffer of %d bytes for a page of %d", ErrInvalid, len(dst), pageSize)
	}
	if e.Offset < HeaderSize || e.Size <= shortFrameHeaderSize || e.Size > maxFrameSize(pageSize) {
		return corruptf(e.Offset, "page %d: frame of %d bytes", e.Pgno, e.Size)
	}
	buf := framePool.Get().(*[]byte)
	defer framePool.Put(buf)
	*buf = grow((*buf)[:0], int(e.Size))
	b := (*buf)[:e.Size]
	if n, err := r.ReadAt(b, e.Offset); n < len(b) {
		return readError(e.Offset+int64(n), "page frame", err)
	}
	pgno, flags := binary.BigEndian.Uint32(b), binary.BigEndian.Uint16(b[4:])
	if pgno != e.Pgno {
		return corruptf(e.Offset, "frame of page %d where the index has page %d", pgno, e.Pgno)
	}
	switch {
	case flags == flagSize && len(b) > FrameHeaderSize:
		if n := binary.BigEndian.Uint32(b[6:]); int64(n) != e.Size-FrameHeaderSize {
			return corruptf(e.Offset, "page %d: block of %d bytes in a frame of %d", pgno, n, e.Size)
		}
		if err := inflate(b[FrameHeaderSize:], dst); err != nil {
			return corruptf(e.Offset, "page %d: %w", pgno, err)
		}
	case flags == 0:
		lr := lz4FrameReader{r: bytes.NewReader(b[shortFrameHeaderSize:]), off: e.Offset + shortFrameHeaderSize}
		if err := lr.read(dst, new([]byte)); err != nil {
			return fmt.Errorf("page %d: %w", pgno, err)
		}
		if lr.off != e.Offset+e.Size {
			return corruptf(lr.off, "page %d: frame of %d bytes goes on", pgno, e.Size)
		}
	default:
		return corruptf(e.Offset+4, "page %d: flags %#x", pgno, flags)
	}
	return nil
}
