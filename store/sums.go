package store

import (
	"cmp"
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

// sums are page checksums that wait in a layer.
type sums struct {
	few  map[uint32]uint64
	many [][]pageSum // of large transactions, each ascending; newer last, none of them older than few
}

// manySums is from how many pages on a transaction's checksums are kept as they
// come.
const manySums = 1024

func (s *sums) empty() bool { return len(s.few) == 0 && len(s.many) == 0 }

// reset forgets all.
func (s *sums) reset() {
	clear(s.few)
	s.many = nil
}

// add takes the checksums of one transaction, ascending; the list stays with s.
func (s *sums) add(list []pageSum) {
	if len(list) < manySums {
		for _, x := range list {
			s.few[x.pgno] = x.sum
		}
		return
	}
	for pgno := range s.few {
		if _, ok := findSum(list, pgno); ok {
			delete(s.few, pgno)
		}
	}
	s.many = append(s.many, list)
}

func (s *sums) get(pgno uint32) (uint64, bool) {
	if v, ok := s.few[pgno]; ok {
		return v, true
	}
	for _, list := range slices.Backward(s.many) {
		if v, ok := findSum(list, pgno); ok {
			return v, true
		}
	}
	return 0, false
}

func findSum(list []pageSum, pgno uint32) (uint64, bool) {
	i, ok := slices.BinarySearchFunc(list, pgno, func(s pageSum, n uint32) int { return cmp.Compare(s.pgno, n) })
	if !ok {
		return 0, false
	}
	return list[i].sum, true
}

// sum returns the checksum of page pgno in the committed state. db.mu is held.
func (db *DB) sum(pgno uint32) (uint64, error) {
	for _, l := range db.stack.Load().committed {
		if v, ok := l.sums.get(pgno); ok {
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

// writeTo puts the checksums into the file, which the log is durable past.
func (s *sums) writeTo(f io.WriterAt) error {
	for _, list := range s.many {
		if err := writeSums(f, list); err != nil {
			return err
		}
	}
	list := make([]pageSum, 0, len(s.few))
	for _, pgno := range slices.Sorted(maps.Keys(s.few)) {
		list = append(list, pageSum{pgno, s.few[pgno]})
	}
	return writeSums(f, list)
}

// writeSums writes an ascending list, neighbours together.
func writeSums(f io.WriterAt, list []pageSum) error {
	var buf [4096]byte
	for len(list) > 0 {
		n := 0
		for n < len(list) && n < len(buf)/sumSize && list[n].pgno == list[0].pgno+uint32(n) {
			binary.BigEndian.PutUint64(buf[n*sumSize:], list[n].sum)
			n++
		}
		if _, err := f.WriteAt(buf[:n*sumSize], int64(list[0].pgno-1)*sumSize); err != nil {
			return err
		}
		list = list[n:]
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
