package store

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/simdisk"
)

func FuzzMeta(f *testing.F) {
	f.Fuzz(func(t *testing.T, p []byte) {
		if m, ok := parseMeta(p); !ok && m != (dbMeta{}) {
			t.Fatalf("invalid metadata gave %+v", m)
		}
	})
}

func FuzzGroup(f *testing.F) {
	f.Fuzz(func(t *testing.T, p []byte) {
		_ = splitGroup(p, func(_ commitlog.Header, off int64, body []byte) error {
			if !bytes.Equal(p[off:off+int64(len(body))], body) {
				t.Fatalf("part at %d is not there", off)
			}
			return nil
		})
	})
}

// FuzzReplay gives recovery a record of any kind and payload.
func FuzzReplay(f *testing.F) {
	f.Fuzz(func(t *testing.T, kind uint8, flags uint8, history uint64, p []byte) {
		st := newTestStore(t, simdisk.New(simdisk.Options{}))
		r := &recovery{st: st, byID: map[uint32]*recovering{}}
		_ = r.replay(commitlog.Record{Header: commitlog.Header{Kind: commitlog.KindCreate, DB: 1, History: 1}, LSN: 1, Payload: []byte("a.db")})
		h := commitlog.Header{Kind: commitlog.Kind(kind), Flags: flags, DB: 1, History: history}
		_ = r.replay(commitlog.Record{Header: h, LSN: 2, Payload: p})
	})
}

func newTestStore(t testing.TB, d *simdisk.Disk) *Store {
	t.Helper()
	st, err := Open(Options{FS: d, Node: "n", SegmentSize: 64 << 10, inline: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	return st
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
