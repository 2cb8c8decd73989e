package ltx

import (
	"encoding/hex"
	"fmt"
	"strings"
)

// A TXID numbers the transactions of a database, from 1 and without gaps. Its
// text is 16 lower-case hex digits.
type TXID uint64

// ParseTXID is the inverse of [TXID.String]. Its error is [ErrInvalid].
func ParseTXID(s string) (TXID, error) {
	v, ok := parseHex16(s)
	if !ok {
		return 0, fmt.Errorf("%w: txid %q: want 16 lower-case hex digits", ErrInvalid, s)
	}
	return TXID(v), nil
}

func (t TXID) String() string { return string(appendHex16(nil, uint64(t))) }

// MarshalText implements encoding.TextMarshaler, so that JSON holds a string.
func (t TXID) MarshalText() ([]byte, error) { return appendHex16(nil, uint64(t)), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (t *TXID) UnmarshalText(b []byte) (err error) {
	*t, err = ParseTXID(string(b))
	return err
}

// A Checksum is the checksum of one page, of a database or of a file, always
// with [ChecksumFlag] set, or 0 for none. Its text is 16 lower-case hex digits.
type Checksum uint64

// ChecksumFlag is set in every checksum, so that none is 0. By itself it is the
// checksum of a database without pages.
const ChecksumFlag Checksum = 1 << 63

// ParseChecksum is the inverse of [Checksum.String]. Its error is [ErrInvalid].
func ParseChecksum(s string) (Checksum, error) {
	v, ok := parseHex16(s)
	if !ok {
		return 0, fmt.Errorf("%w: checksum %q: want 16 lower-case hex digits", ErrInvalid, s)
	}
	return Checksum(v), nil
}

func (c Checksum) String() string { return string(appendHex16(nil, uint64(c))) }

// MarshalText implements encoding.TextMarshaler, so that JSON holds a string.
func (c Checksum) MarshalText() ([]byte, error) { return appendHex16(nil, uint64(c)), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *Checksum) UnmarshalText(b []byte) (err error) {
	*c, err = ParseChecksum(string(b))
	return err
}

// Pos says where a database is: its last transaction and the checksum of the
// whole database after it. The zero Pos is before the first transaction.
type Pos struct {
	TXID              TXID
	PostApplyChecksum Checksum
}

// ParsePos is the inverse of [Pos.String]. Its error is [ErrInvalid].
func ParsePos(s string) (Pos, error) {
	txid, checksum, ok := strings.Cut(s, "/")
	if !ok {
		return Pos{}, fmt.Errorf("%w: position %q: want TXID/CHECKSUM", ErrInvalid, s)
	}
	t, err := ParseTXID(txid)
	if err != nil {
		return Pos{}, err
	}
	c, err := ParseChecksum(checksum)
	if err != nil {
		return Pos{}, err
	}
	return Pos{t, c}, nil
}

// String returns p as TXID/CHECKSUM, 33 characters.
func (p Pos) String() string {
	b := appendHex16(make([]byte, 0, 33), uint64(p.TXID))
	return string(appendHex16(append(b, '/'), uint64(p.PostApplyChecksum)))
}

// IsZero reports whether p is before the first transaction.
func (p Pos) IsZero() bool { return p == Pos{} }

// MarshalText implements encoding.TextMarshaler, so that JSON holds a string.
func (p Pos) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (p *Pos) UnmarshalText(b []byte) (err error) {
	*p, err = ParsePos(string(b))
	return err
}

// FormatFilename returns the name MIN-MAX.ltx of the file that holds the
// transactions min to max.
func FormatFilename(min, max TXID) string {
	b := append(appendHex16(make([]byte, 0, 37), uint64(min)), '-')
	return string(append(appendHex16(b, uint64(max)), ".ltx"...))
}

// ParseFilename is the inverse of [FormatFilename]; name has no folder. It
// refuses, with [ErrInvalid], any other name and ranges that are empty or begin
// with 0.
func ParseFilename(name string) (min, max TXID, err error) {
	bad := func() (TXID, TXID, error) {
		return 0, 0, fmt.Errorf("%w: file name %q: want MIN-MAX.ltx", ErrInvalid, name)
	}
	base, ok := strings.CutSuffix(name, ".ltx")
	if !ok {
		return bad()
	}
	a, b, ok := strings.Cut(base, "-")
	if !ok {
		return bad()
	}
	lo, ok1 := parseHex16(a)
	hi, ok2 := parseHex16(b)
	if !ok1 || !ok2 || lo == 0 || lo > hi {
		return bad()
	}
	return TXID(lo), TXID(hi), nil
}

func appendHex16(b []byte, v uint64) []byte {
	const digits = "0123456789abcdef"
	for shift := 60; shift >= 0; shift -= 4 {
		b = append(b, digits[v>>uint(shift)&15])
	}
	return b
}

func parseHex16(s string) (v uint64, ok bool) {
	if len(s) != 16 || strings.ToLower(s) != s {
		return 0, false
	}
	var b [8]byte
	if _, err := hex.Decode(b[:], []byte(s)); err != nil {
		return 0, false
	}
	for _, x := range b {
		v = v<<8 | uint64(x)
	}
	return v, true
}
