package ltx

import (
	"encoding/binary"
	"math/bits"
	"unsafe"
)

const (
	wordSize   = bits.UintSize / 8
	foldWords  = 64                       // a remainder of foldCRC
	foldMin    = 2 * foldWords * wordSize // bytes from which foldCRC pays
	chunkBytes = 2048
)

var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

// foldCRC is linearCRC for whole machine words, at least 2*foldWords of them. Let
// x^W be the word that is one, so y = x^W with W = 32 or 64. As 64*W is a power of
// two times 64,
//
//	y^64 = y^4 + y^3 + y + 1    modulo p
//
// which has whole words only. Dividing by y^64 + y^4 + y^3 + y + 1 leaves 64
// words that have the CRC of all, and takes XOR alone: word n of the quotient is
// word n of the input plus words n-60, n-61, n-63 and n-64 of the quotient.
func foldCRC(s uint64, p []byte) uint64 {
	// buf holds the last 64 words of the quotient, then input that becomes
	// quotient. It is seen as bytes, never bytes as words, for alignment.
	var buf [foldWords + chunkBytes/wordSize]uint
	in := unsafe.Slice((*byte)(unsafe.Pointer(&buf[foldWords])), chunkBytes)
	left := len(p) - foldWords*wordSize // bytes that become quotient
	for first := true; left > 0; first = false {
		n := copy(in, p[:min(left, chunkBytes)])
		p, left = p[n:], left-n
		if first {
			addRegister(buf[foldWords:], s)
		}
		divide(buf[:foldWords+n/wordSize])
		copy(buf[:foldWords], buf[n/wordSize:][:foldWords])
	}
	copy(in, p)
	tail := [foldWords]uint(buf[foldWords:])
	q := (*[foldWords + 4]uint)(buf[:])
	clear(q[foldWords:]) // no quotient goes there
	for i := range tail {
		tail[i] ^= q[i] ^ q[i+1] ^ q[i+3] ^ q[i+4]
	}
	return remainder(&tail)
}

// addRegister adds the register s to the first 64 bits of the input.
func addRegister(b []uint, s uint64) {
	b[0] ^= uint(s)
	if wordSize == 4 {
		b[1] ^= uint(s >> 32)
	}
}

// divide turns the input b[64:] into quotient; b[:64] is the quotient before.
func divide(b []uint) {
	// With d[i] = q[i] + q[i+1], word i+64 is added d[i] + d[i+3].
	for len(b) >= foldWords+4 {
		q, w := (*[8]uint)(b), (*[4]uint)(b[foldWords:])
		q3, q4 := q[3], q[4]
		d3 := q3 ^ q4
		w[0] ^= q[0] ^ q[1] ^ d3
		d4 := q4 ^ q[5]
		w[1] ^= q[1] ^ q[2] ^ d4
		d5 := q[5] ^ q[6]
		w[2] ^= q[2] ^ q3 ^ d5
		w[3] ^= d3 ^ q[6] ^ q[7]
		b = b[4:]
	}
	for len(b) > foldWords {
		b[foldWords] ^= b[0] ^ b[1] ^ b[3] ^ b[4]
		b = b[1:]
	}
}

// remainder returns the linear CRC of r.
func remainder(r *[foldWords]uint) (s uint64) {
	if wordSize == 4 {
		for i := 0; i < foldWords; i += 2 {
			s = mulX64(s ^ (uint64(r[i]) | uint64(r[i+1])<<32))
		}
		return s
	}
	// x^512 = x^32 + x^24 + x^8 + 1 leaves eight words.
	const keep = 8
	for i := range foldWords - keep {
		v := uint64(r[i])
		r[i+keep] ^= uint(v ^ v>>8 ^ v>>24 ^ v>>32)
		r[i+keep-1] ^= uint(v<<56 ^ v<<40 ^ v<<32)
	}
	for _, v := range r[foldWords-keep:] {
		s = mulX64(s ^ uint64(v))
	}
	return s
}
