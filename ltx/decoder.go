package ltx

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
)

// A Decoder reads one file from a stream and verifies it. It needs about two
// pages of memory, however large the file. It is not safe for concurrent use.
//
//	DecodeHeader   once
//	DecodePage     until io.EOF
//	Close          once
//
// Pages are to be believed once Close has returned nil. After any error but
// io.EOF and [ErrState] each call returns that error, until Reset.
type Decoder struct {
	r     reader
	own   *bufio.Reader // r, when the caller's reader has no ReadByte
	state decoderState
	err   error // the first one

	off     int64 // bytes read
	crc     uint64
	pageCRC uint64
	seq     pageSequence
	trailer Trailer
	frame   frameHeader // the frame whose body is next, with inBody
	block   []byte      // LZ4 block of the last page; empty after an old frame
	small   [512]byte   // scratch space; on the stack it would escape

	// The index repeats what the frames said, in one possible way. The bytes it
	// must have are hashed as the frames go by, so that nothing need be kept.
	want  maphash.Hash
	wantN int64
}

type reader interface {
	io.Reader
	io.ByteReader
}

// A decoderState is what a Decoder waits for.
//
//	atHeader ──DecodeHeader──► atFrame ──end of frames──► atIndex ──Close──► atEnd
//	                           atFrame ──nextFrame──► inBody ──frameBody──► atFrame
type decoderState int

const (
	atHeader decoderState = iota
	atFrame
	inBody
	atIndex
	atEnd
)

type frameHeader struct {
	off  int64
	pgno uint32
	size int // of the LZ4 block; 0 in an old frame
}

// NewDecoder returns a Decoder for the file that r begins with. Where r is an
// io.ByteReader, such as a bufio.Reader, nothing after the file is read from it;
// else the Decoder reads ahead.
func NewDecoder(r io.Reader) *Decoder {
	dec := new(Decoder)
	dec.Reset(r)
	return dec
}

// Reset makes the Decoder begin a new file on r, with its buffers.
func (dec *Decoder) Reset(r io.Reader) {
	if br, ok := r.(reader); ok {
		dec.r = br
	} else {
		if dec.own == nil {
			dec.own = bufio.NewReader(r)
		}
		dec.own.Reset(r)
		dec.r = dec.own
	}
	dec.state, dec.err = atHeader, nil
	dec.off, dec.crc, dec.pageCRC, dec.trailer = 0, ^uint64(0), 0, Trailer{}
	dec.want.Reset()
	dec.wantN = 0
}

// N returns the number of bytes of the file read so far.
func (dec *Decoder) N() int64 { return dec.off }

// Trailer returns the trailer, once Close has returned nil.
func (dec *Decoder) Trailer() Trailer { return dec.trailer }

// PageCRC returns the [PageCRC] of the page just decoded.
func (dec *Decoder) PageCRC() uint64 { return dec.pageCRC }

// DecodeHeader reads the header.
func (dec *Decoder) DecodeHeader() (Header, error) {
	if err := dec.expect(atHeader, "header"); err != nil {
		return Header{}, err
	}
	h, err := dec.header()
	dec.err = err
	return h, err
}

func (dec *Decoder) header() (h Header, err error) {
	b := dec.small[:HeaderSize]
	if err := dec.full(b, "header"); err != nil {
		return h, err
	}
	if err := h.UnmarshalBinary(b); err != nil {
		return h, err
	}
	dec.seq = newPageSequence(h)
	dec.state = atFrame
	return h, nil
}

// DecodePage reads the next page into data, which has Header.PageSize bytes,
// and returns its number. After the last page it returns io.EOF.
func (dec *Decoder) DecodePage(data []byte) (pgno uint32, err error) {
	pgno, err = dec.nextFrame()
	if err != nil {
		return 0, err
	}
	return pgno, dec.frameBody(data)
}

// nextFrame reads up to the body of the next frame. It returns io.EOF after the
// last.
func (dec *Decoder) nextFrame() (pgno uint32, err error) {
	if dec.err == nil && dec.state == atIndex {
		return 0, io.EOF
	}
	if err := dec.expect(atFrame, "page"); err != nil {
		return 0, err
	}
	dec.err = dec.frameHeader()
	if dec.err == nil && dec.state == atIndex {
		return 0, io.EOF
	}
	return dec.frame.pgno, dec.err
}

func (dec *Decoder) frameHeader() error {
	at := dec.off
	b := dec.small[:FrameHeaderSize]
	if err := dec.full(b[:shortFrameHeaderSize], "page frame"); err != nil {
		return err
	}
	if [shortFrameHeaderSize]byte(b) == [shortFrameHeaderSize]byte{} {
		dec.state = atIndex
		return nil
	}
	pgno, flags := binary.BigEndian.Uint32(b), binary.BigEndian.Uint16(b[4:])
	if err := dec.seq.next(pgno); err != nil {
		return corruptf(at, "%w", err)
	}
	if flags&^flagSize != 0 {
		return corruptf(at+4, "page %d: flags %#x", pgno, flags)
	}
	dec.frame = frameHeader{off: at, pgno: pgno}
	if flags == flagSize {
		if err := dec.full(b[shortFrameHeaderSize:], "page frame"); err != nil {
			return err
		}
		size := binary.BigEndian.Uint32(b[shortFrameHeaderSize:])
		if limit := maxBlockSize(dec.seq.h.PageSize); size == 0 || uint64(size) > uint64(limit) {
			return corruptf(at+shortFrameHeaderSize, "page %d: block of %d bytes, at most %d", pgno, size, limit)
		}
		dec.frame.size = int(size)
	}
	dec.state = inBody
	return nil
}

// frameBody reads the page of the frame that nextFrame began.
func (dec *Decoder) frameBody(data []byte) error {
	if err := dec.expect(inBody, "page body"); err != nil {
		return err
	}
	if len(data) != int(dec.seq.h.PageSize) {
		dec.err = fmt.Errorf("%w: buffer of %d bytes for a page of %d", ErrInvalid, len(data), dec.seq.h.PageSize)
	} else {
		dec.err = dec.body(data)
	}
	dec.state = atFrame
	return dec.err
}

func (dec *Decoder) body(data []byte) error {
	f := dec.frame
	if f.size == 0 {
		lr := lz4FrameReader{r: dec.r, off: dec.off}
		err := lr.read(data, &dec.block)
		dec.off, dec.block = lr.off, dec.block[:0]
		if err != nil {
			return fmt.Errorf("page %d: %w", f.pgno, err)
		}
	} else {
		dec.block = grow(dec.block[:0], f.size)[:f.size]
		n, err := io.ReadFull(dec.r, dec.block)
		dec.off += int64(n)
		if err != nil {
			return readError(dec.off, "page frame", err)
		}
		if err := inflate(dec.block, data); err != nil {
			return corruptf(f.off, "page %d: %w", f.pgno, err)
		}
	}
	dec.pageCRC = PageCRC(data)
	dec.crc = shiftPage(dec.crc, dec.seq.h.PageSize) ^ dec.pageCRC
	dec.seq.checked(dec.pageCRC)

	entry := appendIndexEntry(dec.small[:0], IndexEntry{f.pgno, f.off, dec.off - f.off})
	_, _ = dec.want.Write(entry)
	dec.wantN += int64(len(entry))
	return nil
}

// Close reads what follows the last page and verifies index, trailer and the
// checksum of the file; for a snapshot also that it is complete and that its
// pages give the post-apply checksum. It returns [ErrState] before the last
// page. It does not look whether anything follows the file.
func (dec *Decoder) Close() error {
	if dec.state == atEnd && dec.err == nil {
		return nil
	}
	if err := dec.expect(atIndex, "end"); err != nil {
		return err
	}
	dec.err = dec.end()
	dec.state = atEnd
	return dec.err
}

func (dec *Decoder) end() error {
	at := dec.off
	_ = dec.want.WriteByte(0)
	dec.wantN++
	var got maphash.Hash
	got.SetSeed(dec.want.Seed())
	for n := dec.wantN; n > 0; {
		b := dec.small[:min(n, int64(len(dec.small)))]
		if err := dec.full(b, "index"); err != nil {
			return err
		}
		_, _ = got.Write(b)
		n -= int64(len(b))
	}
	if got.Sum64() != dec.want.Sum64() {
		return corruptf(at, "index does not describe the pages")
	}
	at = dec.off
	b := dec.small[:8+8]
	if err := dec.full(b, "trailer"); err != nil {
		return err
	}
	if n := binary.BigEndian.Uint64(b); n != uint64(dec.wantN) {
		return corruptf(at, "index has %d bytes, says %d", dec.wantN, n)
	}
	post := Checksum(binary.BigEndian.Uint64(b[8:]))
	if err := dec.seq.end(post); err != nil {
		return corruptf(at+8, "%w", err)
	}
	at, want := dec.off, ChecksumFlag|Checksum(^dec.crc)
	if err := dec.full(b[:8], "trailer"); err != nil {
		return err
	}
	if got := Checksum(binary.BigEndian.Uint64(b)); got != want {
		return corruptf(at, "file checksum %s, content gives %s", got, want)
	}
	dec.trailer = Trailer{PostApplyChecksum: post, FileChecksum: want}
	return nil
}

func (dec *Decoder) expect(want decoderState, what string) error {
	if dec.err != nil {
		return dec.err
	}
	if dec.state != want {
		return fmt.Errorf("%w: decode %s", ErrState, what)
	}
	return nil
}

// full reads bytes that count as they are for the checksum of the file.
func (dec *Decoder) full(b []byte, what string) error {
	n, err := io.ReadFull(dec.r, b)
	dec.off += int64(n)
	if err != nil {
		return readError(dec.off, what, err)
	}
	dec.crc = linearCRC(dec.crc, b)
	return nil
}

// Verify reads a whole file, verifies it as [Decoder.Close] does, and that
// nothing follows it.
func Verify(r io.Reader) (Header, Trailer, error) {
	dec := NewDecoder(r)
	h, err := dec.DecodeHeader()
	if err != nil {
		return Header{}, Trailer{}, err
	}
	data := make([]byte, h.PageSize)
	for {
		if _, err := dec.DecodePage(data); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return Header{}, Trailer{}, err
		}
	}
	if err := dec.Close(); err != nil {
		return Header{}, Trailer{}, err
	}
	if _, err := dec.r.ReadByte(); err == nil {
		return Header{}, Trailer{}, corruptf(dec.off, "bytes after the end of the file")
	} else if !errors.Is(err, io.EOF) {
		return Header{}, Trailer{}, readError(dec.off, "end of file", err)
	}
	return h, dec.Trailer(), nil
}
