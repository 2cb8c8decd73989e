package transport

import (
	"fmt"
	"strconv"
	"strings"
)

// A History is the 64 random bits that name one line of transactions of a
// database. 0 is none.
type History uint64

// String returns 16 lower-case hex digits.
func (h History) String() string { return fmt.Sprintf("%016x", uint64(h)) }

// An Epoch names one grant of the right to write a database. Two are the same
// grant only if both numbers are equal; order is by N alone. The zero Epoch is
// that of a node-owned database, which nobody has to grant.
type Epoch struct {
	N     uint64 // counts the grants of a database
	Grant uint64 // random
}

// IsZero reports whether e is the epoch of a node-owned database.
func (e Epoch) IsZero() bool { return e == Epoch{} }

// String returns N-GRANT, N in decimal, GRANT as 16 hex digits, or 0 for the zero Epoch.
func (e Epoch) String() string {
	if e.IsZero() {
		return "0"
	}
	return fmt.Sprintf("%d-%016x", e.N, e.Grant)
}

// ParseEpoch reads what [Epoch.String] wrote, and nothing else.
func ParseEpoch(s string) (Epoch, error) {
	if s == "0" {
		return Epoch{}, nil
	}
	n, grant, ok := strings.Cut(s, "-")
	if ok && len(grant) == 16 {
		var e Epoch
		var err1, err2 error
		e.N, err1 = strconv.ParseUint(n, 10, 64)
		e.Grant, err2 = strconv.ParseUint(grant, 16, 64)
		if err1 == nil && err2 == nil && e.String() == s {
			return e, nil
		}
	}
	return Epoch{}, fmt.Errorf("epoch %q: want N-GRANT, decimal and 16 lower-case hex digits, or 0", s)
}

// MarshalText implements encoding.TextMarshaler.
func (e Epoch) MarshalText() ([]byte, error) { return []byte(e.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (e *Epoch) UnmarshalText(b []byte) (err error) {
	*e, err = ParseEpoch(string(b))
	return err
}
