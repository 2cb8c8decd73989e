package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// VACUUM takes a database from the smallest pages to the largest and back, in the
// rollback modes: committed, rolled back since the program is killed in it, and
// brought back from the log. Its writes come in pages of the old size, and it
// cuts the file before or after the commit.
func TestPageSizeByVacuum(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	t.Run("all", func(t *testing.T) {
		for _, mode := range modes[:3] {
			t.Run(mode, func(t *testing.T) {
				t.Parallel()
				p := newPair(env.For(t), node, mode, mode, "PRAGMA cache_size=20;")
				p.do("PRAGMA page_size=512; VACUUM; CREATE TABLE t(v,n); CREATE INDEX i ON t(n);" + fill("t", 200, 700))
				for _, size := range []string{"65536", "512", "65536", "512"} {
					p.run(step{"page size " + size, "PRAGMA page_size=" + size + "; VACUUM; PRAGMA page_size;", 1, same})
					if got := p.do("PRAGMA page_size;"); got != size {
						t.Fatalf("page size: got %s, want %s", got, size)
					}
					p.run(step{"rows", "DELETE FROM t WHERE n%3=1;" + fill("t", 60, 700), 2, same})
				}
				p.finish()
			})
		}
	})
	node.Restart() // from the records
	for _, mode := range modes[:3] {
		path := node.Path(mode + ".db")
		checkDB(env, path)
		sameFile(t, path, filepath.Join(env.Dir, "ext4", mode+".db"))
		// First what takes a lock: SQLite guesses a page size without one.
		const look = "SELECT count(*), sum(n) FROM t; PRAGMA page_size; PRAGMA integrity_check;"
		for i, size := range []string{"65536", "512"} {
			if i == 1 { // the other way round
				env.SQL(path, "PRAGMA page_size=65536; VACUUM;")
			}
			want, before := env.SQL(path, look), env.Pos(path)
			w := env.Session(path)
			w.Do("PRAGMA synchronous=FULL;")
			h := holdAt(env, w.Pid(), "fdatasync", 1, path, "enter") // all is written
			done := make(chan bool)
			go func() {
				_, ok := w.Try("PRAGMA page_size=" + size + "; VACUUM;")
				done <- ok
			}()
			h.wait("the fsync of VACUUM", func() bool { return testrig.Exists(path + "-journal") })
			syscall.Kill(w.Pid(), syscall.SIGKILL)
			h.end()
			if <-done {
				t.Error("VACUUM returned though its program was killed in it")
			}
			w.Kill()
			if got := env.SQL(path, look); got != want {
				t.Errorf("%s: killed in VACUUM to %s: got %s, want %s", mode, size, got, want)
			}
			if after := env.Pos(path); after != before {
				t.Errorf("%s: position went from %v to %v", mode, before, after)
			}
		}
	}
}

// A program reserves room for a database: SQLite by SQLITE_FCNTL_CHUNK_SIZE,
// which is posix_fallocate, or fallocate(1) at any moment. The zeros are no
// transaction, and the next one is right.
func TestPreallocated(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			env := env.For(t)
			path := node.Path(mode + ".db")
			out := filepath.Join(env.Dir, mode+".out")
			w := env.SessionOf(env.Command("strace", "-D", "-qq", "-o", out, "-e", "trace=fallocate,pwrite64", "-P", path, "sqlite3", "-batch", path))
			w.Do(".filectrl chunk_size 1048576\nPRAGMA journal_mode=" + mode + "; CREATE TABLE t(v,n);" + fill("t", 200, 100))
			if mode == "wal" {
				w.Do("PRAGMA wal_checkpoint;")
			}
			if fi, err := os.Stat(path); err != nil || fi.Size() != 1<<20 {
				t.Errorf("a database in chunks of 1 MiB: got %d bytes (%v)", fi.Size(), err)
			}
			if text, err := readFile(out); err != nil || !strings.Contains(text, "fallocate(") && strings.Count(text, `"\0", 1, `) < 100 {
				t.Errorf("posix_fallocate was not used (%v): this tests nothing\n%.500s", err, text)
			}
			before, want := env.Pos(path), w.Do("SELECT count(*), sum(n) FROM t;")
			env.Run("fallocate", "-l", "3000000", path)
			env.Run("fallocate", "-o", "100", "-l", "5000", path)
			if after := env.Pos(path); after != before {
				t.Errorf("fallocate: position went from %v to %v", before, after)
			}
			if got := w.Do("SELECT count(*), sum(n) FROM t; PRAGMA integrity_check;"); got != want+"\nok" {
				t.Errorf("after fallocate: got %s, want %s", got, want)
			}
			w.Do("INSERT INTO t VALUES(zeroblob(100000),1);")
			txid(env, path, before.TXID+1)
			w.Do("DELETE FROM t; VACUUM;")
			w.Do(fill("t", 50, 1000))
			w.Close()
			checkDB(env, path)
			node.Verify()
		})
	}
	node.Restart()
	for _, mode := range modes {
		if got := env.SQL(node.Path(mode+".db"), "SELECT count(*), sum(n) FROM t; PRAGMA integrity_check;"); got != "50|1275\nok" {
			t.Errorf("%s after a restart: got %s", mode, got)
		}
	}
}
