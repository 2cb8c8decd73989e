package e2e

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// walWrites is what one program wrote to a WAL, by strace.
type walWrites struct {
	rewritten int // page images written again over frames of the transaction
	headers   int // frame headers alone, below the end: recomputed checksums
	total     int // writes
}

// readWALWrites reads an output file of strace -P WAL -e trace=pwrite64 of a
// database with that page size.
func readWALWrites(t testing.TB, file string, pageSize int64) (w walWrites) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	end := int64(0)
	for lines := bufio.NewScanner(f); lines.Scan(); {
		_, args, found := strings.Cut(lines.Text(), `, ""..., `)
		var n, off int64
		if _, err := fmt.Sscanf(args, "%d, %d)", &n, &off); !found || err != nil {
			continue
		}
		w.total++
		switch {
		case off >= end:
		case n == pageSize:
			w.rewritten++
		case n == 24: // WAL_FRAME_HDRSIZE, sqlite3's wal.c
			w.headers++
		}
		end = max(end, off+n)
	}
	return w
}

// A transaction in WAL mode is larger than SQLite's cache and changes the same
// pages again and again: SQLite writes over frames of its own that it has
// written, and at COMMIT the checksums of all that follow. Content, hub and the
// next life are as on ext4; killed within that, there is nothing of it.
func TestRewrittenFrames(t *testing.T) {
	env := testrig.New(t)
	addr := freeAddr(t)
	hub := env.NewHub(addr, testrig.Options{Mount: true})
	hub.Start()
	node := env.Node(withHub(addr))
	for psow, pageSize := range []int64{512, 4096} { // without powersafe overwrite, and with it
		t.Run(name("%d-psow%d", pageSize, psow), func(t *testing.T) {
			env := env.For(t)
			base := name("rewritten-%d-%d", pageSize, psow)
			p := newPair(env, node, base, "delete", name("PRAGMA page_size=%d;", pageSize))
			p.do("CREATE TABLE t(id INTEGER PRIMARY KEY, v, n); CREATE INDEX i ON t(n);" + fill("t", 120*(1+3*psow), 300))
			p.do("PRAGMA journal_mode=wal;")
			p.close()
			uri := func(path string) string { return name("file:%s?psow=%d", path, psow) }
			setup := "PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=0; PRAGMA cache_size=5; PRAGMA cache_spill=1;"
			var txn strings.Builder
			txn.WriteString("BEGIN;")
			for i := range 3 {
				fmt.Fprintf(&txn, "UPDATE t SET v=substr(v,2)||'%d' WHERE id%%3=%d; UPDATE t SET n=n+%d WHERE id%%40=0;", i, i%3, i)
			}
			end := "SAVEPOINT a; UPDATE t SET v='gone', n=-n; ROLLBACK TO a; RELEASE a; COMMIT;"
			out := filepath.Join(env.Dir, base+".out")
			strace := func(path string, more ...string) *testrig.Session {
				// -D: the session's process is sqlite3's own.
				args := append([]string{"-D", "-qq", "-s", "0", "-o", out, "-e", "trace=pwrite64", "-P", path + "-wal"}, more...)
				return env.SessionOf(env.Command("strace", append(args, "sqlite3", "-batch", uri(path))...))
			}
			p.m, p.r = strace(p.mount), env.Session(uri(p.ref))
			p.do(setup)
			before := env.Pos(p.mount)
			p.do(txn.String())
			p.do(end)
			txid(env, p.mount, before.TXID+1)
			p.do("PRAGMA integrity_check;")
			p.do(".sha3sum")
			got := readWALWrites(t, out, pageSize)
			if got.rewritten < 10 || got.headers < 10 {
				t.Errorf("writes to the WAL: %+v: SQLite rewrote no frames, this tests nothing", got)
			}
			p.do(txn.String() + "ROLLBACK;")
			p.do(txn.String() + "COMMIT; PRAGMA wal_checkpoint; " + txn.String() + "COMMIT;")
			txid(env, p.mount, before.TXID+3)
			want := p.do("PRAGMA integrity_check; SELECT count(*), sum(n), total(length(v)) FROM t;")
			p.finish() // compares the files
			sameAtHub(env, node, hub, base+".db")

			// Killed between two of the headers that COMMIT writes. What they are is seen
			// on ext4, where it goes to its end.
			twin := strace(p.ref)
			twin.Do(setup + txn.String() + end)
			got = readWALWrites(t, out, pageSize)
			twin.Kill()
			pos := env.Pos(p.mount)
			other := env.Session(p.mount)
			other.Do("SELECT count(*) FROM t;") // keeps the wal-index
			for _, left := range []int{1, got.headers / 2, got.headers - 1} {
				w := strace(p.mount, "-e", name("inject=pwrite64:signal=KILL:when=%d", got.total-left))
				w.Do(setup)
				if out, ok := w.Try(txn.String() + end); ok {
					t.Fatalf("not killed: %s", out)
				}
				w.Kill()
				if got := other.Do("PRAGMA integrity_check; SELECT count(*), sum(n), total(length(v)) FROM t;"); got != want {
					t.Errorf("killed %d writes before the end: got %s, want %s", left, got, want)
				}
				if after := env.Pos(p.mount); after != pos {
					t.Errorf("killed %d writes before the end: position went from %v to %v", left, pos, after)
				}
			}
			other.Close()
			env.SQL(p.mount, "INSERT INTO t(v,n) VALUES('on',1);")
			txid(env, p.mount, pos.TXID+1)
			sameAtHub(env, node, hub, base+".db")
		})
	}
	node.Verify()
	node.Restart()
	for _, base := range []string{"rewritten-512-0.db", "rewritten-4096-1.db"} {
		checkDB(env, node.Path(base))
		sameAtHub(env, node, hub, base)
	}
}
