package ltx

import (
	"fmt"
	"io"
)

// An Encoder writes one file to a stream, a Write a page. It remembers some ten
// bytes a page for the index. It is not safe for concurrent use.
//
//	EncodeHeader   once
//	EncodePage     any number of times
//	Close          once
//
// After any error but [ErrState] the file is lost and each call returns that
// error, until Reset.
type Encoder struct {
	w     io.Writer
	state encoderState
	err   error // the first one
	file  fileState
	buf   []byte // bytes of the part being written
	lz4   compressor
}

// An encoderState is what an Encoder waits for.
//
//	wantHeader ──EncodeHeader──► wantPage ──Close──► closed
//	                             wantPage ──EncodePage──► wantPage
type encoderState int

const (
	wantHeader encoderState = iota
	wantPage
	closed
)

// NewEncoder returns an Encoder that writes to w.
func NewEncoder(w io.Writer) *Encoder { return &Encoder{w: w} }

// Reset makes the Encoder begin a new file on w, with its buffers.
func (enc *Encoder) Reset(w io.Writer) {
	enc.w, enc.state, enc.err = w, wantHeader, nil
	enc.file = fileState{index: enc.file.index[:0]}
}

// N returns the number of bytes written so far.
func (enc *Encoder) N() int64 { return enc.file.n }

// EncodeHeader begins the file. It returns [ErrInvalid] if h is not valid.
func (enc *Encoder) EncodeHeader(h Header) error {
	if err := enc.expect(wantHeader, "header"); err != nil {
		return err
	}
	b, err := enc.file.appendHeader(enc.buf[:0], h, enc.file.index)
	enc.state = wantPage
	return enc.write(b, err)
}

// EncodePage appends page pgno. data, a whole page, is not kept. It returns
// [ErrOrder] if pgno may not come next, [ErrInvalid] if data has the wrong size.
func (enc *Encoder) EncodePage(pgno uint32, data []byte) error {
	return enc.EncodePageCRC(pgno, data, PageCRC(data))
}

// EncodePageCRC is EncodePage for a page whose [PageCRC] is known.
func (enc *Encoder) EncodePageCRC(pgno uint32, data []byte, crc uint64) error {
	return enc.encodePage(pgno, data, crc, nil)
}

// encodePage is EncodePageCRC for a page whose LZ4 block is known, unless block
// is empty.
func (enc *Encoder) encodePage(pgno uint32, data []byte, crc uint64, block []byte) error {
	if err := enc.expect(wantPage, "page"); err != nil {
		return err
	}
	b, err := enc.file.appendPage(enc.buf[:0], pgno, data, crc, block, &enc.lz4)
	return enc.write(b, err)
}

// Close ends the file; post is the checksum of the database after it. It
// returns [ErrInvalid] if post cannot be right or a snapshot lacks pages. It
// neither flushes nor closes the writer.
func (enc *Encoder) Close(post Checksum) (Trailer, error) {
	if err := enc.expect(wantPage, "end"); err != nil {
		return Trailer{}, err
	}
	b, t, err := enc.file.appendEnd(enc.buf[:0], post)
	enc.state = closed
	return t, enc.write(b, err)
}

func (enc *Encoder) expect(want encoderState, what string) error {
	if enc.err != nil {
		return enc.err
	}
	if enc.state != want {
		return fmt.Errorf("%w: encode %s", ErrState, what)
	}
	return nil
}

// write writes the part in b unless making it gave err.
func (enc *Encoder) write(b []byte, err error) error {
	enc.buf = b
	if err == nil {
		if _, err = enc.w.Write(b); err != nil {
			err = fmt.Errorf("write ltx file: %w", err)
		}
	}
	enc.err = err
	return err
}
