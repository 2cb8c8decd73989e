package sqlitefile_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/sqlitefile"
)

func FuzzSuperJournal(f *testing.F) {
	f.Fuzz(func(t *testing.T, p []byte) {
		name, err := sqlitefile.SuperJournal(bytes.NewReader(p), int64(len(p)))
		if err != nil {
			t.Fatal(err) // a reader without errors
		}
		if len(name) > sqlitefile.MaxSuperJournalName || name != "" && !bytes.Contains(p, []byte(name)) {
			t.Fatalf("name %q is not in the journal", name)
		}
	})
}

func FuzzWALHeader(f *testing.F) {
	f.Fuzz(func(t *testing.T, p []byte) {
		if h, ok := sqlitefile.ParseWALHeader(p); ok {
			if !sqlitefile.ValidPageSize(h.PageSize) || h.Salt1 != binary.BigEndian.Uint32(p[16:]) {
				t.Fatalf("%+v", h)
			}
		}
		if len(p) >= sqlitefile.FrameHeaderSize {
			h := sqlitefile.ParseFrameHeader(p)
			s := h.Sum.Update(true, p)
			if len(p) < 8 && s != h.Sum {
				t.Fatal("a checksum over nothing moved")
			}
		}
	})
}

func FuzzDatabaseHeader(f *testing.F) {
	f.Fuzz(func(t *testing.T, p []byte) {
		if h, ok := sqlitefile.ParseDatabaseHeader(p); ok && !sqlitefile.ValidPageSize(h.PageSize) {
			t.Fatalf("%+v", h)
		}
	})
}

func FuzzWALIndex(f *testing.F) {
	f.Fuzz(func(t *testing.T, p []byte) {
		before, ok := sqlitefile.ParseWALIndex(p)
		if !ok {
			return
		}
		if !sqlitefile.BumpWALIndex(p) {
			t.Fatal("a valid header was not bumped")
		}
		if after, ok := sqlitefile.ParseWALIndex(p); !ok || after != before {
			t.Fatalf("bumped to %+v, %v, want %+v", after, ok, before)
		}
	})
}

func TestSeedsAreThere(t *testing.T) {
	src, err := os.ReadFile("fuzz_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(src)) {
		name, ok := strings.CutPrefix(line, "func Fuzz")
		if !ok {
			continue
		}
		name = "Fuzz" + name[:strings.IndexByte(name, '(')]
		if list, err := os.ReadDir(filepath.Join("testdata", "fuzz", name)); err != nil || len(list) == 0 {
			t.Errorf("no seeds of %s: %v", name, err)
		}
	}
}

func TestSuperJournalName(t *testing.T) {
	for name, want := range map[string]string{
		"app.db-mj0123AB9CD": "app.db", "a-mjx-mj0000009FF": "a-mjx", "-mj0000009FF": "", "app.db-mj0123AB8CD": "",
		"app.db-mj0123ab9cd": "", "app.db-mj0123AB9CDE": "", "app.db": "",
	} {
		if got, ok := sqlitefile.IsSuperJournalName(name); got != want || ok != (want != "") {
			t.Errorf("%s: got %q, %v, want %q", name, got, ok, want)
		}
	}
}
