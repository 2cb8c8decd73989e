package commitlog

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/litefs-agent/litefs-agent/internal/sabotage"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// A segment file. Integers are little-endian.
//
//	0         4096                                          segment size
//	+---------+----------+----------+-----+----------+------+
//	| header  | record n | record   | gap | record   | old  |
//	| page    |          | n+1      |     | n+2      | data |
//	+---------+----------+----------+-----+----------+------+
//
// The header page holds the header at 0 and a copy at 2048, each within one
// sector of 512 bytes; where both are valid and differ (a torn header write) the
// one with the higher sequence counts.
//
//	0       8         12     16    24     32        40       48
//	+-------+---------+------+-----+------+---------+--------+
//	| magic | version | size | seq | salt | first   | oldest |
//	+-------+---------+------+-----+------+---------+--------+
//	48           56           64           72    80
//	+------------+------------+------------+-----+
//	| former seq | former end | former CRC | CRC |
//	+------------+------------+------------+-----+
//
// size is the file's in bytes; seq ascends from 1 and may skip numbers; first is
// the LSN of the first record; oldest is the lowest seq that was in use when the
// header was written: segments below it are released. Former seq, end and CRC
// name the segment before (0 for none), the offset where its last record ends
// and that record's CRC: whatever follows there is not part of the log. The
// header is durable before the first record is written, and everything before
// first is durable before the header is. CRC is the CRC-64 of bytes 0 to 72.
//
// A record begins at a multiple of 8: where the former one ends, or at one of
// the multiples of 512 up to the end of that 4 KiB page.
//
//	0       4        8     16        24         32     33      34   36
//	+-------+--------+-----+---------+----------+------+-------+----+----+
//	| magic | length | LSN | durable | prev CRC | kind | flags | 0  | DB |
//	+-------+--------+-----+---------+----------+------+-------+----+----+
//	40        48       56            64    72        72+length
//	+---------+--------+-------------+-----+---------+
//	| history | epochN | epoch grant | CRC | payload | zeros up to 8
//	+---------+--------+-------------+-----+---------+
//
// length is the payload's. durable is the log's durable LSN when the record was
// made: it proves that everything up to there had been durable before (the
// "batch" of invariant 15). prev CRC is the CRC field of the record with the LSN
// before, in whatever segment. CRC is the CRC-64, begun with the segment's salt,
// of bytes 0 to 64 and the payload.
const (
	segMagic   = 0x474f4c2d41465401 // 01 "TFA-LOG"
	recMagic   = 0x4345524c         // "LREC"
	version    = 1
	pageSize   = 4096 // no page is written both directly and through the cache
	sectorSize = 512
	headerSize = 72 // of a record
	segHdrSize = 80
	copyAt     = 2048 // second copy of the segment header

	minSegment = 4 * pageSize
	maxSegment = 1 << 30
)

var (
	errNoHeader = errors.New("no segment header")
	errRecord   = errors.New("no valid record")
)

// checksum continues CRC-64/ISO crc over p.
func checksum(crc uint64, p []byte) uint64 { return ltx.CRC64(crc, p) }

func roundUp(n, unit int64) int64 { return (n + unit - 1) &^ (unit - 1) }

// segHeader is the header of a segment; see the drawing above.
type segHeader struct {
	size      int64
	seq       uint64
	salt      uint64
	first     LSN
	oldest    uint64
	formerSeq uint64
	formerEnd int64
	formerCRC uint64
}

// encode fills the header page p (pageSize bytes).
func (h segHeader) encode(p []byte) {
	clear(p)
	le := binary.LittleEndian
	le.PutUint64(p[0:], segMagic)
	le.PutUint32(p[8:], version)
	le.PutUint32(p[12:], uint32(h.size))
	le.PutUint64(p[16:], h.seq)
	le.PutUint64(p[24:], h.salt)
	le.PutUint64(p[32:], uint64(h.first))
	le.PutUint64(p[40:], h.oldest)
	le.PutUint64(p[48:], h.formerSeq)
	le.PutUint64(p[56:], uint64(h.formerEnd))
	le.PutUint64(p[64:], h.formerCRC)
	le.PutUint64(p[72:], checksum(0, p[:72]))
	copy(p[copyAt:], p[:segHdrSize])
}

// decodeSegHeader reads the header page p. It returns errNoHeader, or an error
// that names a version of the future.
func decodeSegHeader(p []byte) (segHeader, error) {
	if len(p) < pageSize {
		return segHeader{}, errNoHeader
	}
	a, aerr := decodeSegHeaderCopy(p[:segHdrSize])
	b, berr := decodeSegHeaderCopy(p[copyAt : copyAt+segHdrSize])
	if aerr != nil || berr == nil && b.seq > a.seq {
		if berr != nil {
			return segHeader{}, aerr
		}
		return b, nil
	}
	return a, nil
}

func decodeSegHeaderCopy(p []byte) (segHeader, error) {
	le := binary.LittleEndian
	if le.Uint64(p) != segMagic || le.Uint64(p[72:]) != checksum(0, p[:72]) {
		return segHeader{}, errNoHeader
	}
	if v := le.Uint32(p[8:]); v != version {
		return segHeader{}, fmt.Errorf("segment version %d, want %d", v, version)
	}
	h := segHeader{
		size: int64(le.Uint32(p[12:])), seq: le.Uint64(p[16:]), salt: le.Uint64(p[24:]),
		first: LSN(le.Uint64(p[32:])), oldest: le.Uint64(p[40:]),
		formerSeq: le.Uint64(p[48:]), formerEnd: int64(le.Uint64(p[56:])), formerCRC: le.Uint64(p[64:]),
	}
	switch {
	case h.size < minSegment || h.size > maxSegment || h.size%pageSize != 0,
		h.seq == 0 || h.first == 0 || h.oldest > h.seq || h.formerSeq >= h.seq,
		h.formerEnd < 0 || h.formerEnd > maxSegment || h.formerEnd%8 != 0:
		return segHeader{}, errNoHeader
	}
	return h, nil
}

// recordSize is what a record with n payload bytes takes in a segment.
func recordSize(n int64) int64 { return roundUp(headerSize+n, 8) }

// encodeRecord fills p (recordSize bytes) and returns the record's CRC. The
// payload must already be in place at p[headerSize:].
func encodeRecord(p []byte, n int, h Header, lsn, durable LSN, prev, salt uint64) uint64 {
	le := binary.LittleEndian
	le.PutUint32(p[0:], recMagic)
	le.PutUint32(p[4:], uint32(n))
	le.PutUint64(p[8:], uint64(lsn))
	p[32], p[33], p[34], p[35] = byte(h.Kind), h.Flags, 0, 0
	le.PutUint32(p[36:], h.DB)
	le.PutUint64(p[40:], h.History)
	le.PutUint64(p[48:], h.EpochN)
	le.PutUint64(p[56:], h.EpochGrant)
	clear(p[headerSize+n:])
	return sealRecord(p, n, durable, prev, salt)
}

// sealRecord sets what depends on the place of an encoded record with n payload
// bytes, and returns the new CRC.
func sealRecord(p []byte, n int, durable LSN, prev, salt uint64) uint64 {
	le := binary.LittleEndian
	le.PutUint64(p[16:], uint64(durable))
	le.PutUint64(p[24:], prev)
	crc := checksum(checksum(salt, p[:64]), p[headerSize:headerSize+n])
	le.PutUint64(p[64:], crc)
	return crc
}

// A rawRecord is a decoded record; payload aliases the buffer.
type rawRecord struct {
	Header
	lsn     LSN
	durable LSN
	prev    uint64
	crc     uint64
	payload []byte
	size    int64 // in the segment
}

// decodeRecord reads the record at the beginning of p, which ends with the
// segment. It returns errRecord for anything else.
func decodeRecord(p []byte, salt uint64) (rawRecord, error) {
	le := binary.LittleEndian
	if len(p) < headerSize || le.Uint32(p) != recMagic {
		return rawRecord{}, errRecord
	}
	n := int64(le.Uint32(p[4:]))
	if n > int64(len(p))-headerSize || recordSize(n) > int64(len(p)) {
		return rawRecord{}, errRecord
	}
	r := rawRecord{
		lsn: LSN(le.Uint64(p[8:])), durable: LSN(le.Uint64(p[16:])), prev: le.Uint64(p[24:]), crc: le.Uint64(p[64:]),
		Header: Header{
			Kind: Kind(p[32]), Flags: p[33], DB: le.Uint32(p[36:]),
			History: le.Uint64(p[40:]), EpochN: le.Uint64(p[48:]), EpochGrant: le.Uint64(p[56:]),
		},
		payload: p[headerSize : headerSize+n],
		size:    recordSize(n),
	}
	if r.lsn == 0 || r.durable >= r.lsn || p[34] != 0 || p[35] != 0 {
		return rawRecord{}, errRecord
	}
	if checksum(checksum(salt, p[:64]), r.payload) != r.crc && !sabotage.On(sabotage.RecordChecksum) {
		return rawRecord{}, errRecord
	}
	return r, nil
}

// recordLSN reads the LSN and payload length of what may be a record.
func recordLSN(p []byte) (LSN, int64) {
	le := binary.LittleEndian
	if le.Uint32(p) != recMagic {
		return 0, 0
	}
	return LSN(le.Uint64(p[8:])), int64(le.Uint32(p[4:]))
}
