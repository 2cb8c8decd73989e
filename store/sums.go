package store

import (
	"encoding/binary"
	"io"
	"maps"
	"slices"

	"github.com/litefs-agent/litefs-agent/ltx"
)

// The checksum file of a database holds eight bytes a page, big-endian, without
// a header: entry pgno-1 is the page's CRC-64/ISO with the top bit set, zero for
// the lock page and for pages that never were. Like the database file it holds
// no byte of a record that the log is not durable past (invariant 3); newer
// values wait in the committed layers.
const sumSize = 8

// sum returns the checksum of page pgno in the committed state. db.mu is held.
func (db *DB) sum(pgno uint32) (uint64, error) {
	for _, l := range db.stack.Load().committed {
		if v, ok := l.sums[pgno]; ok {
			return v, nil
		}
	}
	files, err := db.openFiles(false)
	if files == nil || err != nil {
		return 0, err
	}
	var b [sumSize]byte
	if n, err := files.sums.ReadAt(b[:], int64(pgno-1)*sumSize); n < sumSize {
		if err == io.EOF {
			return 0, nil
		}
		return 0, err
	}
	return binary.BigEndian.Uint64(b[:]), nil
}

// writeSums puts the checksums of a layer into the file, which the log is
// durable past.
func writeSums(f io.WriterAt, sums map[uint32]uint64) error {
	var b [sumSize]byte
	for _, pgno := range slices.Sorted(maps.Keys(sums)) {
		binary.BigEndian.PutUint64(b[:], sums[pgno])
		if _, err := f.WriteAt(b[:], int64(pgno-1)*sumSize); err != nil {
			return err
		}
	}
	return nil
}

// totalSum returns the database checksum of the first commit entries of a
// checksum file.
func totalSum(f io.ReaderAt, pageSize, commit uint32) (ltx.Checksum, error) {
	var total uint64
	buf := make([]byte, 32<<10)
	end := int64(commit) * sumSize
	lock := int64(ltx.LockPgno(pageSize)-1) * sumSize
	for off := int64(0); off < end; {
		n := min(int64(len(buf)), end-off)
		if m, err := f.ReadAt(buf[:n], off); int64(m) < n {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
		for i := int64(0); i < n; i += sumSize {
			if off+i != lock {
				total ^= binary.BigEndian.Uint64(buf[i:])
			}
		}
		off += n
	}
	return ltx.ChecksumFlag | ltx.Checksum(total), nil
}
