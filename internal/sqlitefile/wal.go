package sqlitefile

import "encoding/binary"

// Sizes in bytes of the WAL's header and of a frame's header.
const (
	WALHeaderSize   = 32
	FrameHeaderSize = 24
)

// WALHeader is the header of a WAL, with the running checksum that the first
// frame continues.
type WALHeader struct {
	BigEndian    bool // of the checksums
	PageSize     uint32
	Salt1, Salt2 uint32
	Sum          WALSum
}

// WALSum is the running checksum of a WAL.
type WALSum struct{ A, B uint32 }

// ParseWALHeader reads and checks the 32 bytes at the start of a WAL.
func ParseWALHeader(p []byte) (h WALHeader, ok bool) {
	if len(p) < WALHeaderSize {
		return h, false
	}
	magic := binary.BigEndian.Uint32(p)
	if magic&^1 != 0x377f0682 || binary.BigEndian.Uint32(p[4:]) != 3007000 {
		return h, false
	}
	h.BigEndian = magic&1 != 0
	h.PageSize = binary.BigEndian.Uint32(p[8:])
	h.Salt1 = binary.BigEndian.Uint32(p[16:])
	h.Salt2 = binary.BigEndian.Uint32(p[20:])
	h.Sum = WALSum{}.Update(h.BigEndian, p[:24])
	ok = ValidPageSize(h.PageSize) &&
		h.Sum == WALSum{binary.BigEndian.Uint32(p[24:]), binary.BigEndian.Uint32(p[28:])}
	return h, ok
}

// Update continues the checksum over p, a multiple of eight bytes.
func (s WALSum) Update(bigEndian bool, p []byte) WALSum {
	a, b := s.A, s.B
	if bigEndian {
		for ; len(p) >= 8; p = p[8:] {
			a += binary.BigEndian.Uint32(p) + b
			b += binary.BigEndian.Uint32(p[4:]) + a
		}
		return WALSum{a, b}
	}
	for ; len(p) >= 8; p = p[8:] {
		a += binary.LittleEndian.Uint32(p) + b
		b += binary.LittleEndian.Uint32(p[4:]) + a
	}
	return WALSum{a, b}
}

// FrameHeader is the header of one WAL frame.
type FrameHeader struct {
	Pgno         uint32
	Commit       uint32 // database size in pages after the transaction, 0 unless it ends one
	Salt1, Salt2 uint32
	Sum          WALSum
}

// ParseFrameHeader reads 24 bytes.
func ParseFrameHeader(p []byte) FrameHeader {
	return FrameHeader{
		Pgno:   binary.BigEndian.Uint32(p),
		Commit: binary.BigEndian.Uint32(p[4:]),
		Salt1:  binary.BigEndian.Uint32(p[8:]),
		Salt2:  binary.BigEndian.Uint32(p[12:]),
		Sum:    WALSum{binary.BigEndian.Uint32(p[16:]), binary.BigEndian.Uint32(p[20:])},
	}
}

// WALIndexHeaderSize is the length of both copies of the wal-index header.
const WALIndexHeaderSize = 96

// WALIndexHeader is what the engine needs of the wal-index.
type WALIndexHeader struct {
	MxFrame      uint32
	Pages        uint32
	Salt1, Salt2 uint32
}

// ParseWALIndex reads the two copies of the wal-index header, each 48 bytes in
// the machine's byte order; ok is false where they differ, are not initialised,
// or their checksum is wrong, as while a writer is between the two.
func ParseWALIndex(p []byte) (h WALIndexHeader, ok bool) {
	if len(p) < WALIndexHeaderSize || string(p[:48]) != string(p[48:96]) || p[12] == 0 {
		return h, false
	}
	order := binary.NativeEndian
	var a, b uint32
	for q := p[:40]; len(q) >= 8; q = q[8:] {
		a += order.Uint32(q) + b
		b += order.Uint32(q[4:]) + a
	}
	if order.Uint32(p[40:]) != a || order.Uint32(p[44:]) != b {
		return h, false
	}
	h.MxFrame = order.Uint32(p[16:])
	h.Pages = order.Uint32(p[20:])
	// The salts are copied from the WAL header as bytes, so they keep its order.
	h.Salt1 = binary.BigEndian.Uint32(p[32:])
	h.Salt2 = binary.BigEndian.Uint32(p[36:])
	return h, true
}

// BumpWALIndex raises the change counter in both copies of a wal-index header
// and puts their checksum right, so that connections forget the pages they
// hold. It reports whether the header was initialised. Source: wal.c,
// walIndexWriteHdr and walIndexTryHdr.
func BumpWALIndex(p []byte) bool {
	if len(p) < WALIndexHeaderSize || p[12] == 0 {
		return false
	}
	order := binary.NativeEndian
	order.PutUint32(p[8:], order.Uint32(p[8:])+1)
	var a, b uint32
	for q := p[:40]; len(q) >= 8; q = q[8:] {
		a += order.Uint32(q) + b
		b += order.Uint32(q[4:]) + a
	}
	order.PutUint32(p[40:], a)
	order.PutUint32(p[44:], b)
	copy(p[48:96], p[:48])
	return true
}
