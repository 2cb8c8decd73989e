package ltx_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/litefs-agent/litefs-agent/ltx"
)

// FuzzDecode decodes any bytes as a file. What decodes survives encode and
// decode, compaction by itself, and reading by its index.
func FuzzDecode(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := decode(b)
		if m := rightChecksum.FindStringSubmatch(fmt.Sprint(err)); m != nil {
			// Nobody guesses a checksum: put in the right one and go on.
			sum, _ := ltx.ParseChecksum(m[1])
			b = binary.BigEndian.AppendUint64(bytes.Clone(b[:len(b)-8]), uint64(sum))
			got, err = decode(b)
		}
		if err != nil {
			if !errors.Is(err, ltx.ErrCorrupt) {
				t.Fatalf("got %v, want ErrCorrupt", err)
			}
			return
		}
		again, err := decode(got.encode(t))
		if err != nil {
			t.Fatal(err)
		}
		got.mustEqual(t, again)
		out, err := compact(b)
		if err != nil {
			t.Fatal(err)
		}
		if again, err = decode(out); err != nil {
			t.Fatal(err)
		}
		got.h.WALOffset, got.h.WALSize, got.h.WALSalt1, got.h.WALSalt2, got.h.NodeID = 0, 0, 0, 0, 0
		got.mustEqual(t, again)
		checkIndex(t, out, again)
	})
}

var rightChecksum = regexp.MustCompile(`content gives ([0-9a-f]{16})$`)

// FuzzReadIndex reads index and pages of any bytes.
func FuzzReadIndex(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) { checkDamagedIndex(t, b) })
}

// FuzzReadPage reads any bytes as a frame, behind a place for the header.
func FuzzReadPage(f *testing.F) {
	f.Fuzz(func(t *testing.T, sizeLog uint8, pgno uint32, frame []byte) {
		size := uint32(512) << (sizeLog % 8)
		dst := make([]byte, size)
		e := ltx.IndexEntry{Pgno: pgno, Offset: ltx.HeaderSize, Size: int64(len(frame))}
		b := append(make([]byte, ltx.HeaderSize), frame...)
		if err := ltx.ReadPage(bytes.NewReader(b), e, size, dst); err != nil && !errors.Is(err, ltx.ErrCorrupt) {
			t.Fatalf("got %v, want ErrCorrupt", err)
		}
	})
}

// FuzzCompact compacts any two files.
func FuzzCompact(f *testing.F) {
	f.Fuzz(func(t *testing.T, a, b []byte) {
		out, err := compact(a, b)
		if err != nil {
			if !errors.Is(err, ltx.ErrCorrupt) && !errors.Is(err, ltx.ErrNotContiguous) {
				t.Fatalf("got %v", err)
			}
			return
		}
		if _, err := decode(out); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzHeader decodes any bytes as a header.
func FuzzHeader(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		var h ltx.Header
		if err := h.UnmarshalBinary(b); err != nil {
			if !errors.Is(err, ltx.ErrCorrupt) {
				t.Fatalf("got %v, want ErrCorrupt", err)
			}
			return
		}
		if again, _ := h.MarshalBinary(); !bytes.Equal(again, b[:ltx.HeaderSize]) {
			t.Fatalf("got %x, want %x", again, b)
		}
	})
}

// FuzzText parses any text as each of the textual forms.
func FuzzText(f *testing.F) {
	f.Fuzz(func(t *testing.T, s string) {
		check := func(got string, err error) {
			if err == nil && got != s || err != nil && !errors.Is(err, ltx.ErrInvalid) {
				t.Errorf("%q: got %q, %v", s, got, err)
			}
		}
		pos, err := ltx.ParsePos(s)
		check(pos.String(), err)
		txid, err := ltx.ParseTXID(s)
		check(txid.String(), err)
		sum, err := ltx.ParseChecksum(s)
		check(sum.String(), err)
		lo, hi, err := ltx.ParseFilename(s)
		check(ltx.FormatFilename(lo, hi), err)
	})
}

// fuzzSeeds are the committed seeds, by target and name; -update writes them.
func fuzzSeeds(t testing.TB) map[string]map[string][]any {
	seeds := map[string]map[string][]any{
		"FuzzDecode": {}, "FuzzReadIndex": {}, "FuzzHeader": {}, "FuzzReadPage": {},
		"FuzzText": {
			"pos": {"0000000000000065/8b73bc1d07d84988"}, "txid": {"00000000000000ff"}, "checksum": {"8b73bc1d07d84988"},
			"filename": {"0000000000000001-00000000000000ff.ltx"},
		},
		"FuzzCompressor": {
			"text": {byte(3), []byte("2026-01-02T03:04:05Z sensor-1 ")}, "short": {byte(0), []byte{1, 2, 3}}, "zeros": {byte(7), []byte{}},
			"row": {byte(0), tx(5, 0, 1, 512, 9, 1).pages[0].Data},
		},
		"FuzzCompact": {
			"overlap":   {tx(5, 0, 1, 512, 3, 1, 2).encode(t), tx(6, 1, 2, 512, 3, 2, 3).encode(t)},
			"shrunk":    {tx(5, 0, 1, 512, 9, 1, 8).encode(t), tx(6, 1, 2, 512, 7, 2).encode(t)},
			"page-size": {tx(5, 0, 1, 512, 9, 1).encode(t), tx(6, 1, 2, 1024, 1, 1).encode(t)},
			"drop":      {tx(5, 0, 1, 512, 9, 1).encode(t), tx(6, 1, 0, 512, 0).encode(t)},
		},
	}
	names := []string{"reference-v0.5.1.ltx", "reference-v0.5.2.ltx"}
	for name := range goldenFiles() {
		names = append(names, name)
	}
	for _, name := range names {
		b := golden(t, name)
		key := strings.TrimSuffix(name, ".ltx")
		seeds["FuzzDecode"][key] = []any{b}
		seeds["FuzzReadIndex"][key] = []any{b}
		seeds["FuzzHeader"][key] = []any{b[:ltx.HeaderSize]}
		h, err := ltx.ReadHeader(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		entries, _, err := ltx.ReadIndex(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) > 0 {
			e := entries[len(entries)-1]
			seeds["FuzzReadPage"][key] = []any{byte(h.PageSize >> 10), e.Pgno, b[e.Offset : e.Offset+e.Size]}
		}
	}
	return seeds
}

// TestFuzzSeeds checks that each target has its seeds.
func TestFuzzSeeds(t *testing.T) {
	if *update {
		for target, seeds := range fuzzSeeds(t) {
			dir := filepath.Join("testdata", "fuzz", target)
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			for name, args := range seeds {
				text := "go test fuzz v1\n"
				for _, arg := range args {
					switch v := arg.(type) {
					case []byte:
						text += fmt.Sprintf("[]byte(%+q)\n", v)
					case byte:
						text += fmt.Sprintf("byte('\\x%02x')\n", v)
					default:
						text += fmt.Sprintf("%T(%#v)\n", v, v)
					}
				}
				writeFile(t, filepath.Join(dir, name), []byte(text))
			}
		}
	}
	for _, target := range fuzzTargets(t) {
		if found, err := os.ReadDir(filepath.Join("testdata", "fuzz", target)); err != nil || len(found) == 0 {
			t.Errorf("%s has no seeds: %v", target, err)
		}
	}
}

// fuzzTargets returns the names of the targets in this folder.
func fuzzTargets(t testing.TB) (targets []string) {
	t.Helper()
	names, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		src, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^func (Fuzz\w+)\(`).FindAllSubmatch(src, -1) {
			targets = append(targets, string(m[1]))
		}
	}
	if len(targets) == 0 {
		t.Error("no fuzz targets")
	}
	return targets
}
