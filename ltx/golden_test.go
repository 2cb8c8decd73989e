package ltx_test

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/litefs-agent/litefs-agent/ltx"
)

var update = flag.Bool("update", false, "rewrite the golden files that we make")

// goldenDB is the database of the two files that the reference made. It came
// from Python, whose sqlite3 module was at SQLite 3.40.1:
//
//	c=sqlite3.connect('app.db'); c.execute('PRAGMA page_size=512'); c.execute('CREATE TABLE t(a INTEGER PRIMARY KEY, b)')
//	c.executemany('INSERT INTO t(b) VALUES(?)',[('row %d'%i,) for i in range(80)]); c.commit()
const goldenDB = "app.db"

func golden(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "golden", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// goldenFiles returns the files that we make, by name. `go test ./ltx -update`
// writes them.
func goldenFiles() map[string]file {
	const pre, post = ltx.ChecksumFlag | 0x1111, ltx.ChecksumFlag | 0x2222
	snapshot := file{h: ltx.Header{PageSize: 512, Commit: 3, MinTXID: 1, MaxTXID: 4, Timestamp: 1700000000000, NodeID: 42}}
	snapshot.pages, snapshot.post = pagesOf(512, 1, 1, 2, 3)
	resize := file{h: ltx.Header{PageSize: 1024, Commit: 2, MinTXID: 9, MaxTXID: 9, Timestamp: 1700000000000, PreApplyChecksum: pre}}
	resize.pages, resize.post = pagesOf(1024, 1, 1, 2)
	tx, _ := pagesOf(512, 1, 1, 7)
	return map[string]file{
		"transaction.ltx": {
			h: ltx.Header{PageSize: 512, Commit: 9, MinTXID: 5, MaxTXID: 5, Timestamp: 1700000000000, PreApplyChecksum: pre,
				WALOffset: 32, WALSize: 2 * (24 + 512), WALSalt1: 0x01020304, WALSalt2: 0x05060708, NodeID: 42},
			pages: tx, post: post,
		},
		"snapshot.ltx":  snapshot,
		"page-size.ltx": resize,
		"drop.ltx": {
			h:    ltx.Header{PageSize: 512, MinTXID: 6, MaxTXID: 6, Timestamp: 1700000000000, PreApplyChecksum: pre},
			post: ltx.ChecksumFlag,
		},
		"no-checksum.ltx": {
			h:     ltx.Header{Flags: ltx.FlagNoChecksum, PageSize: 512, Commit: 9, MinTXID: 5, MaxTXID: 5},
			pages: tx,
		},
	}
}

// pagesOf makes pages and the checksum of a database that has no others.
func pagesOf(size uint32, seed uint64, pgnos ...uint32) (pages []ltx.Page, sum ltx.Checksum) {
	for _, pgno := range pgnos {
		p := page(pgno, size, seed)
		pages = append(pages, p)
		sum ^= ltx.PageChecksum(pgno, p.Data)
	}
	return pages, sum | ltx.ChecksumFlag
}

func TestGolden(t *testing.T) {
	for name, f := range goldenFiles() {
		t.Run(name, func(t *testing.T) {
			got := f.encode(t)
			if *update {
				if err := os.WriteFile(filepath.Join("testdata", "golden", name), got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if want := golden(t, name); !bytes.Equal(got, want) {
				t.Errorf("got\n%x\nwant\n%x", got, want)
			}
			back, err := decode(got)
			if err != nil {
				t.Fatal(err)
			}
			f.mustEqual(t, back)
		})
	}
}

// TestReferenceGolden reads files that the reference made of goldenDB.
func TestReferenceGolden(t *testing.T) {
	for _, tc := range []struct{ name, made string }{
		{"reference-v0.5.2.ltx", "go run ./internal/reftool encode testdata/golden/app.db testdata/golden/reference-v0.5.2.ltx"},
		// This version writes LZ4 frames without a size.
		{"reference-v0.5.1.ltx", "the same, after `go get github.com/superfly/ltx@v0.5.1` in reftool's module"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := golden(t, tc.name)
			f, err := decode(b)
			if err != nil {
				t.Fatal(err)
			}
			var db []byte
			for _, p := range f.pages {
				db = append(db, p.Data...)
			}
			if !bytes.Equal(db, golden(t, goldenDB)) {
				t.Error("pages are not those of the database")
			}
			checkIndex(t, b, f)
			// Compacting it alone rewrites old frames as blocks.
			var out bytes.Buffer
			if _, _, err := ltx.Compact(&out, bytes.NewReader(b)); err != nil {
				t.Fatal(err)
			}
			back, err := decode(out.Bytes())
			if err != nil {
				t.Fatal(err)
			}
			f.mustEqual(t, back)
		})
	}
}
