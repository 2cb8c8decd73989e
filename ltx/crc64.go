package ltx

import "encoding/binary"

// CRC-64/ISO divides by p = x^64 + x^4 + x^3 + x + 1. So few terms make tables
// needless, since modulo p
//
//	x^64     = x^4 + x^3 + x + 1
//	x^(64*k) = x^(4*k) + x^(3*k) + x^k + 1    for k a power of two
//
// (squaring a sum squares its terms). A register, like a word of input in
// little-endian order, holds the coefficient of x^63 in bit 0 and that of x^0
// in bit 63. Multiplying by x^n is a shift right by n, whose lost bits are
// multiplied by x^64 and added again.
//
// "Linear" below is a CRC without the inversions before and after, hence
// linear(a+b) = linear(a)*x^(8*len(b)) + linear(b), where + is XOR.

// CRC64 updates crc with p, as hash/crc64.Update with the ISO table does: begin
// with 0.
func CRC64(crc uint64, p []byte) uint64 { return ^linearCRC(^crc, p) }

// linearCRC returns the register s after p.
func linearCRC(s uint64, p []byte) uint64 {
	if len(p) >= foldMin && littleEndian {
		n := len(p) &^ (wordSize - 1)
		s = foldCRC(s, p[:n])
		p = p[n:]
	}
	for len(p) >= 8 {
		s = mulX64(s ^ binary.LittleEndian.Uint64(p))
		p = p[8:]
	}
	if n := uint(8 * len(p)); n > 0 {
		for i, b := range p {
			s ^= uint64(b) << (8 * uint(i))
		}
		s = s>>n ^ mulX64(s<<(64-n))
	}
	return s
}

// mulX64 returns s * x^64.
func mulX64(s uint64) uint64 {
	s ^= s<<63 ^ s<<61 ^ s<<60
	return s ^ s>>1 ^ s>>3 ^ s>>4
}

// mulX64k returns s * x^(64*k). k is a power of two up to 16.
func mulX64k(s uint64, k uint) uint64 {
	lost := s<<(64-k) ^ s<<(64-3*k) ^ s<<(64-4*k)
	return s ^ s>>k ^ s>>(3*k) ^ s>>(4*k) ^ mulX64(lost)
}

// shiftPage returns s * x^(8*pageSize), the register s after a page of zeros.
// pageSize is a power of two from 512.
func shiftPage(s uint64, pageSize uint32) uint64 {
	// With k = size/512 and y = x^(64*k), x^(8*size) = y^64 = y^4 + y^3 + y + 1.
	size := min(pageSize, 8192)
	k := uint(size / 512)
	for n := pageSize / size; n > 0; n-- {
		y := mulX64k(s, k)
		y3 := mulX64k(mulX64k(y, k), k)
		s ^= y ^ y3 ^ mulX64k(y3, k)
	}
	return s
}

// PageCRC returns the linear CRC of a page, from which its page checksum and
// its part of a file checksum follow without the page. It is 0 for a page of
// zeros.
func PageCRC(data []byte) uint64 { return linearCRC(0, data) }

// PageChecksum returns the checksum of page pgno: CRC-64/ISO of the number, as
// four big-endian bytes, and data, a whole page, with ChecksumFlag set. The
// checksum of a database is ChecksumFlag and the XOR of its page checksums, the
// lock page left out.
func PageChecksum(pgno uint32, data []byte) Checksum {
	return PageChecksumFromCRC(pgno, uint32(len(data)), PageCRC(data))
}

// PageChecksumFromCRC returns the checksum of page pgno, whose [PageCRC] is crc.
func PageChecksumFromCRC(pgno, pageSize uint32, crc uint64) Checksum {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], pgno)
	s := shiftPage(linearCRC(^uint64(0), b[:]), pageSize)
	return ChecksumFlag | Checksum(^(s ^ crc))
}
