// Package config is what the configurations of node and hub share: the types of
// values, the sections that both have, and the decoding of a parsed TOML tree
// that finds all faults of a file at once, each with its key and line. It reads
// no file and no environment, and does not know TOML.
package config

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Duration is a time span, written "10s", "1h30m" or in days of 24 hours, "7d".
type Duration time.Duration

// Std returns d as the standard library's type.
func (d Duration) Std() time.Duration { return time.Duration(d) }

// String writes whole days as "7d", else like time.Duration without zero parts.
func (d Duration) String() string {
	const day = 24 * time.Hour
	std := d.Std()
	if std != 0 && std%day == 0 && std != day {
		return strconv.FormatInt(int64(std/day), 10) + "d"
	}
	text := std.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

// UnmarshalText reads what String writes.
func (d *Duration) UnmarshalText(text []byte) error {
	if days, ok := strings.CutSuffix(string(text), "d"); ok {
		n, err := strconv.ParseUint(days, 10, 31)
		if err != nil || n > math.MaxInt64/uint64(24*time.Hour) {
			return fmt.Errorf("%q: must be a duration such as \"10s\", \"5m\", \"24h\" or \"7d\"", text)
		}
		*d = Duration(time.Duration(n) * 24 * time.Hour)
		return nil
	}
	std, err := time.ParseDuration(string(text))
	if err != nil || std < 0 {
		return fmt.Errorf("%q: must be a duration such as \"10s\", \"5m\", \"24h\" or \"7d\"", text)
	}
	*d = Duration(std)
	return nil
}

// MarshalText is String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Size is a number of bytes, written "512", "96KiB", "64MiB", "2GiB" or "1TiB".
type Size int64

var sizeUnits = []struct {
	suffix string
	size   Size
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}, {"", 1}}

// String uses the largest unit that divides s.
func (s Size) String() string {
	for _, unit := range sizeUnits[:4] {
		if s != 0 && s%unit.size == 0 {
			return strconv.FormatInt(int64(s/unit.size), 10) + unit.suffix
		}
	}
	return strconv.FormatInt(int64(s), 10)
}

// UnmarshalText reads what String writes.
func (s *Size) UnmarshalText(text []byte) error {
	for _, unit := range sizeUnits {
		number, ok := strings.CutSuffix(string(text), unit.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(strings.TrimSpace(number), 10, 63)
		if err != nil || Size(n) > math.MaxInt64/unit.size {
			break
		}
		*s = Size(n) * unit.size
		return nil
	}
	return fmt.Errorf("%q: must be a size such as \"0\", \"96KiB\" or \"64MiB\"", text)
}

// MarshalText is String.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Mode is the permission bits of files, written in octal: "0660".
type Mode uint32

// UnmarshalText reads octal digits.
func (m *Mode) UnmarshalText(text []byte) error {
	n, err := strconv.ParseUint(string(text), 8, 32)
	if err != nil || n > 0o7777 {
		return fmt.Errorf("%q: must be permission bits in octal such as \"0660\"", text)
	}
	*m = Mode(n)
	return nil
}

// MarshalText writes four octal digits.
func (m Mode) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "%04o", uint32(m)), nil }

// Durability says when a commit is on the card: "app", as SQLite asked;
// "commit", every commit; or a duration, at the latest so late (weaker than
// SQLite asked).
type Durability struct {
	EveryCommit bool
	AtLatest    Duration // 0: not by time
}

// UnmarshalText reads what MarshalText writes.
func (d *Durability) UnmarshalText(text []byte) error {
	switch string(text) {
	case "app":
		*d = Durability{}
		return nil
	case "commit":
		*d = Durability{EveryCommit: true}
		return nil
	}
	var late Duration
	if late.UnmarshalText(text) != nil || late == 0 {
		return fmt.Errorf("%q: must be \"app\", \"commit\", or a duration above 0 such as \"5s\"", text)
	}
	*d = Durability{AtLatest: late}
	return nil
}

// MarshalText writes the word or the duration.
func (d Durability) MarshalText() ([]byte, error) {
	switch {
	case d.EveryCommit:
		return []byte("commit"), nil
	case d.AtLatest > 0:
		return d.AtLatest.MarshalText()
	}
	return []byte("app"), nil
}

// Strings is a list that may also be written as one string; "" is no element.
type Strings []string
