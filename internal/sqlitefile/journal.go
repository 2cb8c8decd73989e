package sqlitefile

import (
	"encoding/binary"
	"io"
	"strings"
)

// JournalMagic begins a rollback journal that can be played back, and ends one
// that names a super-journal.
const JournalMagic = "\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"

// MaxSuperJournalName bounds the length of a name that is believed.
const MaxSuperJournalName = 4096

// SuperJournal returns the name of the super-journal at the end of a journal of
// size bytes, "" where there is none. The tail is, from its end: magic (8),
// checksum of the name (4, the sum of its bytes as signed chars), length (4),
// name, lock page number (4). Source: pager.c, readSuperJournal and
// writeSuperJournal.
func SuperJournal(r io.ReaderAt, size int64) (string, error) {
	var tail [16]byte
	if size < int64(len(tail)) {
		return "", nil
	}
	if _, err := r.ReadAt(tail[:], size-16); err != nil && err != io.EOF {
		return "", err
	}
	if string(tail[8:]) != JournalMagic {
		return "", nil
	}
	n := int64(binary.BigEndian.Uint32(tail[0:]))
	if n == 0 || n > MaxSuperJournalName || n > size-16 {
		return "", nil
	}
	name := make([]byte, n)
	if _, err := r.ReadAt(name, size-16-n); err != nil && err != io.EOF {
		return "", err
	}
	sum := binary.BigEndian.Uint32(tail[4:])
	for _, c := range name {
		sum -= uint32(int32(int8(c)))
	}
	if sum != 0 {
		return "", nil
	}
	return strings.TrimRight(string(name), "\x00"), nil
}

// IsSuperJournalName reports whether a base name looks like NAME-mjXXXXXX9XX,
// and returns NAME. Source: vdbeaux.c, "%s-mj%06X9%02X".
func IsSuperJournalName(base string) (db string, ok bool) {
	i := strings.LastIndex(base, "-mj")
	if i <= 0 || len(base)-i-3 != 9 {
		return "", false
	}
	for j, c := range base[i+3:] {
		hex := c >= '0' && c <= '9' || c >= 'A' && c <= 'F'
		if !hex || j == 6 && c != '9' {
			return "", false
		}
	}
	return base[:i], true
}
