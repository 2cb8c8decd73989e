package e2e

import (
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// Several writers and readers on one database: no row is lost, none comes
// twice, and no reader ever sees fewer rows than before.
func TestWritersAndReaders(t *testing.T) {
	const writers, readers = 3, 2
	rows := 120 * *soak
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	for _, mode := range modes {
		for _, mmap := range []int{0, 64 << 20} {
			t.Run(name("%s-%d", mode, mmap>>20), func(t *testing.T) {
				env := env.For(t)
				path := node.Path(name("%s-%d.db", mode, mmap>>20))
				env.SQL(path, "PRAGMA journal_mode="+mode+"; CREATE TABLE t(writer,n,v); CREATE INDEX i ON t(writer,n);")
				first := env.Pos(path).TXID
				done := make(chan struct{})
				var reading, writing sync.WaitGroup
				for range readers {
					r := env.Session(path)
					reading.Go(func() {
						last := -1
						r.Try(name(".timeout 20000\nPRAGMA mmap_size=%d;", mmap))
						for ended := false; !ended; {
							select {
							case <-done:
								ended = true
							default:
							}
							// The second column is 0 where every writer's rows are 1 to max.
							out, ok := r.Try("SELECT count(*), ifnull((SELECT sum(c<>m) FROM (SELECT count(*) c, max(n) m FROM t GROUP BY writer)),0) FROM t;")
							count, gaps, _ := strings.Cut(out, "|")
							n, err := strconv.Atoi(count)
							if !ok || err != nil || n < last || gaps != "0" {
								t.Errorf("reader: got %q after %d rows", out, last)
								return
							}
							last = n
						}
						if last != writers*rows {
							t.Errorf("reader at the end: got %d rows, want %d", last, writers*rows)
						}
					})
				}
				for w := range writers {
					writing.Go(func() {
						var script strings.Builder
						fmt.Fprintf(&script, "PRAGMA mmap_size=%d; PRAGMA synchronous=%s;\n", mmap, syncs[w])
						for n := 1; n <= rows; n++ {
							fmt.Fprintf(&script, "BEGIN IMMEDIATE; INSERT INTO t VALUES(%d,%d,printf('%%.*c',%d,'x')); COMMIT;\n", w, n, n*7)
						}
						if out, err := env.TrySQL(path, script.String()); err != nil {
							t.Errorf("writer %d: %v\n%s", w, err, out)
						}
					})
				}
				writing.Wait()
				close(done)
				reading.Wait()
				checkDB(env, path)
				if got, want := env.Pos(path).TXID-first, uint64(writers*rows); got != want {
					t.Errorf("transactions: got %d, want %d", got, want)
				}
			})
		}
	}
}

// A commit shows in NAME-pos when COMMIT has returned, and in every other
// connection, in each mode.
func TestPositionShowsAtOnce(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			env := env.For(t)
			path := node.Path(mode + ".db")
			a := env.Session(path)
			a.Do("PRAGMA journal_mode=" + mode + "; PRAGMA synchronous=OFF; CREATE TABLE t(n);")
			b := env.Session(path)
			started := time.Now()
			for n := 1; n <= 300; n++ {
				before := env.Pos(path).TXID
				a.Do(name("INSERT INTO t VALUES(%d);", n))
				if got := env.Pos(path).TXID; got != before+1 {
					t.Fatalf("position after COMMIT: got %d, want %d", got, before+1)
				}
				if got, want := b.Do("SELECT max(n) FROM t;"), strconv.Itoa(n); got != want {
					t.Fatalf("another connection: got %s, want %s", got, want)
				}
			}
			if took := time.Since(started); took > 20*time.Second {
				t.Errorf("300 transactions took %v", took)
			}
		})
	}
}
