package ltx

import (
	"encoding/binary"
	"math/bits"

	"github.com/pierrec/lz4/v4"
)

// A compressor makes LZ4 blocks of pages. Package lz4 has one for data of any
// length, whose 136 KiB of tables are cleared in part for each page and miss the
// cache of a small machine at each step; this one's table is 8 KiB and as many
// entries are used as the page has bytes. Equal pages give equal blocks.
//
// A block is a row of sequences:
//
//	+-----------+-----------+----------+------------+----------+
//	| token     | more      | literals | offset     | more     |
//	| 1         | length    |          | 2, little- | length   |
//	|           | 0 or more |          | endian     |          |
//	+-----------+-----------+----------+------------+----------+
//
// The token's high half is the number of literals, its low half that of bytes to
// repeat from offset back, less four. A half of 15 continues in bytes that are
// added, to the first below 255. The last sequence ends with its literals, of
// which there are at least five, and no repetition begins in the last twelve
// bytes. Source: lz4_Block_format.md.
type compressor struct {
	// table has the last position at which four bytes of each hash were seen, or
	// 0. Of the hash so many bits are used as the page size needs.
	table [1 << maxHashBits]uint16
}

const (
	maxHashBits  = 12
	minMatch     = 4
	lastLiterals = 5
	matchLimit   = 12
)

// maxBlockSize returns the most bytes of an LZ4 block that holds n bytes.
func maxBlockSize(n uint32) int { return lz4.CompressBlockBound(int(n)) }

// appendBlock appends the block of page, which has at most MaxPageSize bytes, to
// dst.
func (c *compressor) appendBlock(dst, page []byte) []byte {
	dst = grow(dst, maxBlockSize(uint32(len(page))))
	hashBits := min(uint(bits.Len(uint(len(page)))), maxHashBits)
	clear(c.table[:1<<hashBits])

	anchor := 0                   // literals from here on are not written yet
	end := len(page) - matchLimit // a match begins before it
	misses := uint(0)             // since the last match; more of them, longer steps
	for i := 1; i < end; {
		word := binary.LittleEndian.Uint32(page[i:])
		h := hash(word, hashBits)
		j := int(c.table[h])
		c.table[h] = uint16(i)
		if j >= i || binary.LittleEndian.Uint32(page[j:]) != word {
			misses++
			i += 1 + int(misses>>6)
			continue
		}
		misses = 0
		for i > anchor && j > 0 && page[i-1] == page[j-1] {
			i, j = i-1, j-1
		}
		n := minMatch + common(page[i+minMatch:len(page)-lastLiterals], page[j+minMatch:])
		dst = appendSequence(dst, page[anchor:i], i-j, n)
		i += n
		anchor = i
		if i < end { // what is within the match helps the next
			c.table[hash(binary.LittleEndian.Uint32(page[i-2:]), hashBits)] = uint16(i - 2)
		}
	}
	return appendSequence(dst, page[anchor:], 0, 0)
}

// hash returns the top bits of a product with 2^32 divided by the golden ratio.
func hash(word uint32, hashBits uint) uint32 {
	return word * 0x9e3779b1 >> (32 - hashBits) & (1<<maxHashBits - 1)
}

// appendSequence appends literals, and a repetition of n bytes from offset back
// unless offset is 0.
func appendSequence(dst, literals []byte, offset, n int) []byte {
	token := min(len(literals), 15) << 4
	if offset > 0 {
		token |= min(n-minMatch, 15)
	}
	dst = append(dst, byte(token))
	dst = appendMore(dst, len(literals)-15)
	dst = append(dst, literals...)
	if offset == 0 {
		return dst
	}
	dst = append(dst, byte(offset), byte(offset>>8))
	return appendMore(dst, n-minMatch-15)
}

// appendMore appends what a length has beyond the 15 in the token, if it has.
func appendMore(dst []byte, n int) []byte {
	if n < 0 {
		return dst
	}
	for ; n >= 255; n -= 255 {
		dst = append(dst, 255)
	}
	return append(dst, byte(n))
}

// common returns how many bytes a and b, which is longer, have in common at the
// start.
func common(a, b []byte) (n int) {
	for len(a)-n >= 8 {
		if x := binary.LittleEndian.Uint64(a[n:]) ^ binary.LittleEndian.Uint64(b[n:]); x != 0 {
			return n + bits.TrailingZeros64(x)/8
		}
		n += 8
	}
	for n < len(a) && a[n] == b[n] {
		n++
	}
	return n
}
