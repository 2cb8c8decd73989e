// Package sqlitefile reads the parts of SQLite's files that the engine must
// understand: the database header, the rollback journal, the WAL and the
// wal-index. Source of every layout: SQLite's "Database File Format" and "WAL
// Format" pages, and the named lines of SQLite 3.40.1.
package sqlitefile

import "encoding/binary"

// HeaderSize is the length in bytes of the database header on page 1.
const HeaderSize = 100

// DatabaseMagic is how every SQLite database begins.
const DatabaseMagic = "SQLite format 3\x00"

// Lock bytes of the database file. A writer holds a write lock on some of
// [LockStart, LockStart+LockLen): PENDING, RESERVED and the SHARED range.
const (
	LockStart = 0x40000000
	LockLen   = 512
)

// DatabaseHeader is what the engine needs of the first 100 bytes.
type DatabaseHeader struct {
	PageSize uint32 // bytes, 512 to 65536
	WAL      bool   // read and write version are 2
	// Pages is the in-header database size, or 0 where it is not valid: bytes 24
	// to 27 (change counter) and 92 to 95 (version-valid-for) differ, as after a
	// write by an SQLite older than 3.7.0.
	Pages uint32
}

// ParseDatabaseHeader reads a database header; ok is false where p is shorter
// than 100 bytes or not the start of an SQLite database.
func ParseDatabaseHeader(p []byte) (h DatabaseHeader, ok bool) {
	if len(p) < HeaderSize || string(p[:16]) != DatabaseMagic {
		return h, false
	}
	h.PageSize = uint32(binary.BigEndian.Uint16(p[16:]))
	if h.PageSize == 1 {
		h.PageSize = 65536
	}
	if !ValidPageSize(h.PageSize) {
		return h, false
	}
	h.WAL = p[18] == 2 && p[19] == 2
	if binary.BigEndian.Uint32(p[24:]) == binary.BigEndian.Uint32(p[92:]) {
		h.Pages = binary.BigEndian.Uint32(p[28:])
	}
	return h, true
}

// ValidPageSize reports whether n is a power of two from 512 to 65536.
func ValidPageSize(n uint32) bool { return n >= 512 && n <= 65536 && n&(n-1) == 0 }
