package ltx

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/pierrec/lz4/v4"
)

// inflate inflates an LZ4 block into dst, which it must fill.
func inflate(block, dst []byte) error {
	n, err := lz4.UncompressBlock(block, dst)
	if err != nil {
		return err
	}
	if n != len(dst) {
		return fmt.Errorf("block inflates to %d bytes, want %d", n, len(dst))
	}
	return nil
}

// maxFrameSize bounds the frames of either kind that hold pageSize bytes.
func maxFrameSize(pageSize uint32) int64 {
	const lz4Overhead = 19 + 4 + 4 + 4 + 4 // descriptor, one block's size and checksum, end, checksum
	return int64(maxBlockSize(pageSize)) + FrameHeaderSize + lz4Overhead
}

// An lz4FrameReader reads the LZ4 frame of a page in an older file, and not a
// byte more, as package lz4 would. Integers are little-endian.
//
//	0            4     5    6               6|14       7|15
//	+------------+-----+----+---------------+----+--------------------+-----+----------+
//	| 0x184d2204 | FLG | BD | content size? | HC | block size, block  | 0   | content  |
//	|            |     |    | u64           |    | checksum? ...      | u32 | checksum?|
//	+------------+-----+----+---------------+----+--------------------+-----+----------+
//
// Its checksums are skipped: the file checksum covers the page.
// Source: lz4_Frame_format.md, version 1.6.
type lz4FrameReader struct {
	r   io.Reader
	off int64 // of the next byte in the file
}

const (
	lz4Magic           = 0x184d2204
	lz4FlagDict        = 1 << 0
	lz4FlagChecksum    = 1 << 2
	lz4FlagContentSize = 1 << 3
	lz4FlagBlockSum    = 1 << 4
	lz4FlagIndependent = 1 << 5
	lz4Stored          = 1 << 31 // in a block size: not compressed
)

// read fills dst from the frame. buf is scratch space.
func (lr *lz4FrameReader) read(dst []byte, buf *[]byte) error {
	var b [8]byte
	if err := lr.full(b[:6]); err != nil {
		return err
	}
	flags := b[4]
	if binary.LittleEndian.Uint32(b[:]) != lz4Magic || flags>>6 != 1 || flags&lz4FlagDict != 0 {
		return corruptf(lr.off-6, "lz4 frame: header % x", b[:6])
	}
	if flags&lz4FlagContentSize != 0 {
		if err := lr.full(b[:8]); err != nil {
			return err
		}
		if n := binary.LittleEndian.Uint64(b[:]); n != uint64(len(dst)) {
			return corruptf(lr.off-8, "lz4 frame: %d bytes, want %d", n, len(dst))
		}
	}
	if err := lr.full(b[:1]); err != nil {
		return err
	}
	done := 0
	for {
		if err := lr.full(b[:4]); err != nil {
			return err
		}
		size := binary.LittleEndian.Uint32(b[:])
		if size == 0 {
			break
		}
		n, err := lr.block(dst, done, size, flags, buf)
		if err != nil {
			return err
		}
		done += n
	}
	if done != len(dst) {
		return corruptf(lr.off, "lz4 frame inflates to %d bytes, want %d", done, len(dst))
	}
	if flags&lz4FlagChecksum != 0 {
		return lr.full(b[:4])
	}
	return nil
}

// block reads one block into dst[done:] and returns how many bytes it gave.
func (lr *lz4FrameReader) block(dst []byte, done int, size uint32, flags byte, buf *[]byte) (int, error) {
	at := lr.off - 4
	stored := size&lz4Stored != 0
	size &^= lz4Stored
	if size == 0 || size > uint32(maxBlockSize(uint32(len(dst)))) || stored && int(size) > len(dst)-done {
		return 0, corruptf(at, "lz4 frame: block of %d bytes after %d of %d", size, done, len(dst))
	}
	n := int(size)
	if stored {
		if err := lr.full(dst[done : done+n]); err != nil {
			return 0, err
		}
	} else {
		*buf = grow((*buf)[:0], n)
		block := (*buf)[:n]
		if err := lr.full(block); err != nil {
			return 0, err
		}
		var dict []byte
		if flags&lz4FlagIndependent == 0 {
			dict = dst[:done]
		}
		var err error
		if n, err = lz4.UncompressBlockWithDict(block, dst[done:], dict); err != nil || n == 0 {
			return 0, corruptf(at, "lz4 frame: block of %d bytes gives %d (%v)", size, n, err)
		}
	}
	if flags&lz4FlagBlockSum != 0 {
		var b [4]byte
		if err := lr.full(b[:]); err != nil {
			return 0, err
		}
	}
	return n, nil
}

func (lr *lz4FrameReader) full(p []byte) error {
	n, err := io.ReadFull(lr.r, p)
	lr.off += int64(n)
	if err != nil {
		return readError(lr.off, "lz4 frame", err)
	}
	return nil
}
