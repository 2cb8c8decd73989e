package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// A program that lives through a crash of the agent gets errors, never stale
// rows, and does no harm to the database at the new mount.
func TestOldProgramAtNewMount(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	for _, mode := range modes {
		for _, mmap := range []int{0, 1 << 26} {
			for _, reading := range []bool{false, true} {
				t.Run(name("%s-%d-%v", mode, mmap>>20, reading), func(t *testing.T) {
					env := env.For(t)
					path := node.Path(name("%s-%d-%v.db", mode, mmap>>20, reading))
					old := env.Session(path)
					old.Do(name("PRAGMA journal_mode=%s; PRAGMA mmap_size=%d; CREATE TABLE t(v,n);", mode, mmap) + fill("t", 50, 200) + "SELECT count(*) FROM t;")
					if reading {
						old.Do("BEGIN; SELECT count(*) FROM t;")
					}
					node.Restart()
					env.SQL(path, fill("t", 200, 300))
					want := env.SQL(path, "SELECT count(*), sum(n) FROM t;")
					snapshot := reading // of a running transaction: SQLite has those pages in its heap
					for _, sql := range []string{"SELECT count(*) FROM t;", "INSERT INTO t VALUES('old',1);", "SELECT count(*) FROM t;", "COMMIT;", "SELECT count(*) FROM t;", "INSERT INTO t VALUES('old',2);", "PRAGMA wal_checkpoint(TRUNCATE);", "VACUUM;"} {
						out, ok := old.Try(sql)
						if ok && !testrig.IsError(out) && strings.HasPrefix(sql, "INSERT") {
							t.Errorf("%s through the dead mount was accepted: %s", sql, out)
						}
						if sql == "COMMIT;" {
							snapshot = false
						}
						if ok && out == "50" && !snapshot {
							t.Errorf("%s through the dead mount gave stale rows", sql)
						}
					}
					old.Close()
					if got := env.SQL(path, "SELECT count(*), sum(n) FROM t;"); got != want {
						t.Errorf("at the new mount: got %s, want %s", got, want)
					}
					checkDB(env, path)
					env.SQL(path, "INSERT INTO t VALUES('new',1);")
				})
			}
		}
	}
}

// The first transaction of a new database, in each mode and synchronous setting,
// and one that leaves pages to SQLite's ftruncate: the record holds every page.
func TestFirstTransaction(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	type made struct{ path, content string }
	var all []made
	for _, mode := range modes {
		for _, sync := range syncs {
			path := node.Path(mode + "-" + sync + ".db")
			env.SQL(path, "PRAGMA secure_delete=OFF; PRAGMA journal_mode="+mode+"; PRAGMA synchronous="+sync+"; BEGIN; CREATE TABLE t(v); INSERT INTO t VALUES(zeroblob(400000)); CREATE TABLE u(v); DROP TABLE t; COMMIT;")
			want := uint64(1)
			if mode == "wal" {
				want = 2 // SQLite writes page 1 when it switches the mode
			}
			txid(env, path, want)
			env.SQL(path, "INSERT INTO u VALUES(zeroblob(300000)); DELETE FROM u; INSERT INTO u VALUES(1);")
			all = append(all, made{path, env.SQL(path, ".dump")})
		}
	}
	node.Restart() // what is there now comes from the records
	for _, m := range all {
		if got := env.SQL(m.path, ".dump"); got != m.content {
			t.Errorf("%s: another content after the restart", m.path)
		}
		checkDB(env, m.path)
	}
}

// A person removes the journal or the WAL that a killed program left: nothing is
// half committed, nothing committed is lost.
func TestRemovedSidecars(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	for _, mode := range modes {
		for _, reader := range []bool{false, true} {
			t.Run(name("%s-%v", mode, reader), func(t *testing.T) {
				env := env.For(t)
				path := node.Path(name("%s-%v.db", mode, reader))
				suffix := "-journal"
				if mode == "wal" {
					suffix = "-wal"
				}
				env.SQL(path, "PRAGMA journal_mode="+mode+"; CREATE TABLE t(v,n);"+fill("t", 300, 200))
				w := env.Session(path)
				w.Do("PRAGMA wal_autocheckpoint=0; UPDATE t SET n=n+1;")
				want := w.Do("SELECT count(*), sum(n) FROM t;")
				before := env.Pos(path)
				if reader {
					r := env.Session(path)
					r.Do(".timeout 5000\nSELECT count(*) FROM t;")
					defer r.Kill()
				}
				w.Do("PRAGMA cache_size=5; BEGIN; UPDATE t SET v=v||'half', n=n+100; DELETE FROM t WHERE n%2=0;")
				w.Kill()
				if err := os.Remove(path + suffix); err != nil {
					t.Fatal(err)
				}
				if mode == "wal" && reader { // that connection has the removed WAL
					return
				}
				if got := env.SQL(path, "SELECT count(*), sum(n) FROM t;"); got != want {
					t.Errorf("got %s, want %s", got, want)
				}
				checkDB(env, path)
				if after := env.Pos(path); after != before {
					t.Errorf("position: got %v, want %v", after, before)
				}
				env.SQL(path, "INSERT INTO t VALUES('on',1);")
			})
		}
	}
}

// Without powersafe overwrite SQLite repeats the commit frame to the end of a
// sector: still one transaction. And chunks that it reserves by posix_fallocate
// or ftruncate are no content.
func TestUnusualIO(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	for _, mode := range modes {
		path := node.Path("psow-" + mode + ".db")
		env.SQL("file:"+path+"?psow=0", "PRAGMA journal_mode="+mode+"; PRAGMA synchronous=FULL; PRAGMA page_size=512; CREATE TABLE t(v,n);")
		before := env.Pos(path).TXID
		env.SQL("file:"+path+"?psow=0", "PRAGMA synchronous=FULL; INSERT INTO t VALUES('a',1); INSERT INTO t VALUES('b',2);"+fill("t", 100, 100))
		txid(env, path, before+3)
		checkDB(env, path)

		// .filectrl chunk_size makes the file grow in steps that no transaction has.
		chunk := node.Path("chunk-" + mode + ".db")
		env.SQL(chunk, ".filectrl chunk_size 65536\nPRAGMA journal_mode="+mode+"; CREATE TABLE t(v,n);"+fill("t", 200, 100)+"DELETE FROM t WHERE n>20; VACUUM;")
		checkDB(env, chunk)
	}
	node.Verify()
	node.Restart()
	for _, mode := range modes {
		if got := env.SQL(node.Path("chunk-"+mode+".db"), "SELECT count(*) FROM t; PRAGMA integrity_check;"); got != "20\nok" {
			t.Errorf("chunk_size in mode %s: got %s", mode, got)
		}
	}
}

// Transactions over three databases are all or nothing when the program or the
// agent is killed at any moment.
func TestKillSuperJournal(t *testing.T) {
	r := random(t)
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	for _, mode := range []string{"delete", "persist"} {
		t.Run(mode, func(t *testing.T) {
			env := env.For(t)
			var paths []string
			for i := range 3 {
				path := node.Path(name("%s-%d.db", mode, i))
				env.SQL(path, "PRAGMA journal_mode="+mode+"; CREATE TABLE t"+strconv.Itoa(i)+"(n,v);")
				paths = append(paths, path)
			}
			n := 1
			for round := range 20 * *soak {
				w := env.Session(paths[0])
				w.Do(name("PRAGMA synchronous=%s; ATTACH '%s' AS a; ATTACH '%s' AS b;", syncs[1+r.IntN(3)], paths[1], paths[2]))
				acked := n - 1
				stop := time.AfterFunc(time.Duration(r.IntN(50))*time.Millisecond, func() {
					if round%4 == 3 {
						syscall.Kill(node.Pid(), syscall.SIGKILL)
					} else {
						w.Signal(syscall.SIGKILL)
					}
				})
				for {
					out, ok := w.Try(name("BEGIN; INSERT INTO t0 VALUES(%[1]d,'x'); INSERT INTO t1 VALUES(%[1]d,printf('%%.*c',9000,'y')); INSERT INTO t2 VALUES(%[1]d,'z'); COMMIT;", n))
					if !ok || out != "" {
						break
					}
					acked = n
					n++
				}
				stop.Stop()
				w.Kill()
				if round%4 == 3 {
					node.Kill() // waits for what the timer did
					node.Start()
				}
				// The first to look rolls back what is hot, as on ext4.
				var max []int
				for i, path := range paths {
					m, err := strconv.Atoi(env.SQL(path, name("SELECT ifnull(max(n),0) FROM t%d WHERE (SELECT count(*) FROM t%d)=(SELECT max(n) FROM t%d) OR n=0;", i, i, i)))
					if err != nil {
						t.Fatal(err)
					}
					max = append(max, m)
					checkDB(env, path)
				}
				if max[0] != max[1] || max[1] != max[2] || max[0] != acked && max[0] != acked+1 {
					t.Fatalf("round %d: got rows to %v, want the same in all, %d or one more", round, max, acked)
				}
				n = max[0] + 1
			}
			if left, _ := filepath.Glob(node.Path("*-mj*")); len(left) > 0 {
				t.Logf("super-journals of killed programs: %v", left)
			}
			if n < 10 {
				t.Errorf("only %d transactions: this tests nothing", n)
			}
		})
	}
}
