package ltx

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Sizes in bytes.
const (
	HeaderSize  = 100
	TrailerSize = 16
	// FrameHeaderSize is what precedes the LZ4 block of each page.
	FrameHeaderSize = 10
	// MinPageSize and MaxPageSize bound the page size, a power of two.
	MinPageSize = 512
	MaxPageSize = 65536
)

const magic = "LTX1"

// FlagNoChecksum in Header.Flags says that nobody tracks the checksum of the
// database: both database checksums of the file are 0. We read such files and
// compact them; our own always carry checksums.
const FlagNoChecksum uint32 = 1 << 1

// A Header begins each file. Integers are big-endian.
//
//	0       4       8          12       16        24        32          40
//	+-------+-------+----------+--------+---------+---------+-----------+
//	| LTX1  | Flags | PageSize | Commit | MinTXID | MaxTXID | Timestamp |
//	+-------+-------+----------+--------+---------+---------+-----------+
//	40                 48          56        64         68         72       80
//	+------------------+-----------+---------+----------+----------+--------+
//	| PreApplyChecksum | WALOffset | WALSize | WALSalt1 | WALSalt2 | NodeID |
//	+------------------+-----------+---------+----------+----------+--------+
//
// Twenty zero bytes follow. Source: module github.com/superfly/ltx v0.5.2,
// ltx.go, type Header.
type Header struct {
	Flags            uint32 // FlagNoChecksum or 0
	PageSize         uint32 // bytes
	Commit           uint32 // database size afterwards, in pages; 0 drops it
	MinTXID          TXID   // first transaction of the file; 1 makes it a snapshot
	MaxTXID          TXID   // last transaction of the file
	Timestamp        int64  // when it was committed, Unix time in milliseconds; informative
	PreApplyChecksum Checksum
	WALOffset        int64  // of the frames in the WAL they came from; else 0
	WALSize          int64  // of those frames; else 0
	WALSalt1         uint32 // of that WAL; else 0
	WALSalt2         uint32
	NodeID           uint64 // who made the file; 0 for unknown
}

// IsSnapshot reports whether the file holds every page of the database.
func (h Header) IsSnapshot() bool { return h.MinTXID == 1 }

// NoChecksum reports whether the file carries no database checksums.
func (h Header) NoChecksum() bool { return h.Flags&FlagNoChecksum != 0 }

// PreApplyPos returns the position that a database must be at for the file to
// be applied, the zero Pos for a snapshot.
func (h Header) PreApplyPos() Pos { return Pos{h.MinTXID - 1, h.PreApplyChecksum} }

// Validate returns an [ErrInvalid] that says why h may not begin a file, or nil.
func (h Header) Validate() error {
	if err := h.check(); err != nil {
		return fmt.Errorf("%w: header: %w", ErrInvalid, err)
	}
	return nil
}

func (h Header) check() error {
	switch {
	case h.Flags&^FlagNoChecksum != 0:
		return fmt.Errorf("unknown flags %#x", h.Flags)
	case !IsPageSize(h.PageSize):
		return fmt.Errorf("page size %d: want a power of two from %d to %d", h.PageSize, MinPageSize, MaxPageSize)
	case h.MinTXID == 0:
		return fmt.Errorf("min txid is 0")
	case h.MaxTXID < h.MinTXID:
		return fmt.Errorf("max txid %s is below min txid %s", h.MaxTXID, h.MinTXID)
	case h.WALOffset < 0 || h.WALSize < 0:
		return fmt.Errorf("negative WAL range %d+%d", h.WALOffset, h.WALSize)
	case h.WALOffset == 0 && (h.WALSize != 0 || h.WALSalt1 != 0 || h.WALSalt2 != 0):
		return fmt.Errorf("WAL size or salt without WAL offset")
	case h.IsSnapshot() || h.NoChecksum():
		if h.PreApplyChecksum != 0 {
			return fmt.Errorf("pre-apply checksum %s: want none", h.PreApplyChecksum)
		}
	case h.PreApplyChecksum&ChecksumFlag == 0:
		return fmt.Errorf("pre-apply checksum %s: top bit not set", h.PreApplyChecksum)
	}
	return nil
}

// AppendBinary appends the HeaderSize bytes of h, which it does not validate,
// to b. Its error is always nil.
func (h Header) AppendBinary(b []byte) ([]byte, error) { return h.appendTo(b), nil }

func (h Header) appendTo(b []byte) []byte {
	be := binary.BigEndian
	b = append(b, magic...)
	b = be.AppendUint32(b, h.Flags)
	b = be.AppendUint32(b, h.PageSize)
	b = be.AppendUint32(b, h.Commit)
	b = be.AppendUint64(b, uint64(h.MinTXID))
	b = be.AppendUint64(b, uint64(h.MaxTXID))
	b = be.AppendUint64(b, uint64(h.Timestamp))
	b = be.AppendUint64(b, uint64(h.PreApplyChecksum))
	b = be.AppendUint64(b, uint64(h.WALOffset))
	b = be.AppendUint64(b, uint64(h.WALSize))
	b = be.AppendUint32(b, h.WALSalt1)
	b = be.AppendUint32(b, h.WALSalt2)
	b = be.AppendUint64(b, h.NodeID)
	return append(b, make([]byte, 20)...)
}

// MarshalBinary returns the HeaderSize bytes of h, which it does not validate.
// Its error is always nil.
func (h Header) MarshalBinary() ([]byte, error) {
	return h.AppendBinary(make([]byte, 0, HeaderSize))
}

// UnmarshalBinary sets h from the first HeaderSize bytes of a file and
// validates it. Its error is [ErrCorrupt]; h is then unchanged.
func (h *Header) UnmarshalBinary(b []byte) error {
	if len(b) < HeaderSize {
		return corruptf(int64(len(b)), "header: %w", io.ErrUnexpectedEOF)
	}
	if string(b[:4]) != magic {
		return corruptf(0, "header: magic %q: want %q", b[:4], magic)
	}
	be := binary.BigEndian
	v := Header{
		Flags:            be.Uint32(b[4:]),
		PageSize:         be.Uint32(b[8:]),
		Commit:           be.Uint32(b[12:]),
		MinTXID:          TXID(be.Uint64(b[16:])),
		MaxTXID:          TXID(be.Uint64(b[24:])),
		Timestamp:        int64(be.Uint64(b[32:])),
		PreApplyChecksum: Checksum(be.Uint64(b[40:])),
		WALOffset:        int64(be.Uint64(b[48:])),
		WALSize:          int64(be.Uint64(b[56:])),
		WALSalt1:         be.Uint32(b[64:]),
		WALSalt2:         be.Uint32(b[68:]),
		NodeID:           be.Uint64(b[72:]),
	}
	for i, x := range b[80:HeaderSize] {
		if x != 0 {
			return corruptf(int64(80+i), "header: reserved byte is %#x", x)
		}
	}
	if err := v.check(); err != nil {
		return corruptf(0, "header: %w", err)
	}
	*h = v
	return nil
}

// ReadHeader reads the header of the file r. Nothing else is verified.
func ReadHeader(r io.ReaderAt) (Header, error) {
	var h Header
	b := make([]byte, HeaderSize)
	if n, err := r.ReadAt(b, 0); n < len(b) {
		return h, readError(int64(n), "header", err)
	}
	err := h.UnmarshalBinary(b)
	return h, err
}

// A Trailer ends each file: both fields, big-endian, in TrailerSize bytes.
type Trailer struct {
	PostApplyChecksum Checksum // of the database after the file; 0 with FlagNoChecksum
	FileChecksum      Checksum // of the file, its last eight bytes excluded; pages count uncompressed
}

func trailerOf(b []byte) Trailer {
	return Trailer{
		PostApplyChecksum: Checksum(binary.BigEndian.Uint64(b)),
		FileChecksum:      Checksum(binary.BigEndian.Uint64(b[8:])),
	}
}

// checkPost says why post may not end a file with header h, or nil.
func (h Header) checkPost(post Checksum) error {
	switch {
	case h.NoChecksum():
		if post != 0 {
			return fmt.Errorf("post-apply checksum %s: want none", post)
		}
	case post&ChecksumFlag == 0:
		return fmt.Errorf("post-apply checksum %s: top bit not set", post)
	case h.Commit == 0 && post != ChecksumFlag:
		return fmt.Errorf("post-apply checksum %s of an empty database: want %s", post, ChecksumFlag)
	}
	return nil
}

// IsPageSize reports whether a database may have pages of n bytes.
func IsPageSize(n uint32) bool {
	return n >= MinPageSize && n <= MaxPageSize && n&(n-1) == 0
}

// LockPgno returns the number of the page that holds SQLite's lock bytes, at
// 1 GiB. It is never part of a file or of a checksum. pageSize must be valid.
func LockPgno(pageSize uint32) uint32 { return 0x40000000/pageSize + 1 }
