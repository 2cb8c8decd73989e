package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// problems returns what status complains of, which must agree with healthy.
func problems(env *testrig.Env, node *testrig.Service) string {
	env.Helper()
	state := node.Status()
	var list []string
	all, _ := state["problems"].([]any) // left out where there are none
	for _, p := range all {
		list = append(list, p.(string))
	}
	if healthy := state["healthy"].(bool); healthy != (len(list) == 0) {
		env.Errorf("status: healthy is %v with problems %q", healthy, list)
	}
	return strings.Join(list, "\n")
}

// The data folder's disk is full, in each mode and wherever it is met: the log,
// the database, a spill file, a copy into the mount. Programs get SQLITE_FULL and
// their transaction is rolled back; readers and what fits go on; status says it;
// with room again everything goes on without a restart (invariants 13 and 23).
func TestFullDisk(t *testing.T) {
	env := testrig.New(t)
	v := newVolume(env, "ext4", 288)
	node := v.node(testrig.Options{Config: "[sync]\nmemory = \"1MiB\"\nbudget = \"8MiB\""})
	src := makeDB(env, "src", 20000) // 2.5 MB
	// What fills the disk: the SQL of one transaction. Its size decides what has to
	// grow: small ones the log; those above 1 MiB a file of their own, the database,
	// and the spill files of overlay, journal and WAL.
	fillers := []struct {
		name string
		sql  string
	}{
		{"log", "INSERT INTO t VALUES('x',randomblob(60000));"},
		{"spill", "BEGIN; INSERT INTO t SELECT 'y',randomblob(8000) FROM c LIMIT 400; COMMIT;"},
		{"update", "BEGIN; UPDATE t SET n=randomblob(length(n)); COMMIT;"},
		{"large", "INSERT INTO t VALUES('z',randomblob(9000000));"},
	}
	copies := 0
	for _, mode := range modes {
		for _, filler := range fillers {
			t.Run(mode+"-"+filler.name, func(t *testing.T) {
				env := env.For(t)
				v := v.forTest(env)
				v.room(220 << 20)
				path, other := node.Path(mode+"-"+filler.name+".db"), node.Path("other-"+mode+"-"+filler.name+".db")
				env.SQL(path, "PRAGMA journal_mode="+mode+"; CREATE TABLE t(v,n); CREATE TABLE c AS WITH RECURSIVE c(i) AS (VALUES(1) UNION ALL SELECT i+1 FROM c WHERE i<2000) SELECT i FROM c; INSERT INTO t SELECT 'w',randomblob(4000) FROM c LIMIT 200;")
				env.SQL(other, "PRAGMA journal_mode="+mode+"; CREATE TABLE t(v,n); INSERT INTO t VALUES('a',1);")
				reader := env.Session(path)
				reader.Do("SELECT count(*) FROM t;")
				// In WAL mode an open would want room for the wal-index.
				second := env.Session(other)
				second.Do("SELECT count(*) FROM t;")
				v.room(6 << 20)
				w := env.Session(path)
				w.Do("PRAGMA cache_size=20; PRAGMA synchronous=FULL;")
				acked, want, full := 0, env.SQL(path, "SELECT count(*), sum(length(n)), total(hex(substr(n,1,4))) FROM t;"), ""
				for ; acked < 4000 && full == ""; acked++ {
					out, ok := w.Try(filler.sql)
					if !ok || out != "" {
						full = out
						break
					}
					if acked%3 == 2 { // updates reuse what they wrote
						v.room(v.free() - 2<<20)
					}
					want = w.Do("SELECT count(*), sum(length(n)), total(hex(substr(n,1,4))) FROM t;")
				}
				if !strings.Contains(full, "full") {
					t.Fatalf("after %d transactions: got %q, want database or disk is full", acked, full)
				}
				w.Try("ROLLBACK;")
				// Whatever is given back meanwhile is taken, too, until status says it.
				state := problems(env, node)
				for i := 0; i < 50 && !strings.Contains(state, "disk full"); i++ {
					v.room(0)
					w.Try(filler.sql)
					w.Try("ROLLBACK;")
					want = w.Do("SELECT count(*), sum(length(n)), total(hex(substr(n,1,4))) FROM t;")
					state = problems(env, node)
				}
				if !strings.Contains(state, "disk full") || !strings.Contains(state, "free some space") {
					t.Errorf("status on a full disk: got %q", state)
				}
				if got := reader.Do("SELECT count(*), sum(length(n)), total(hex(substr(n,1,4))) FROM t;"); got != want {
					t.Errorf("a reader beside: got %s, want %s", got, want)
				}
				checkDB(env, path)
				// Another database: it goes on, or is told.
				if out, ok := second.Try("INSERT INTO t VALUES('b',2);"); !ok || out != "" && !strings.Contains(out, "full") {
					t.Errorf("another database: got %s; want success or full", out)
				}
				if got := second.Do("PRAGMA integrity_check;"); got != "ok" {
					t.Error(got)
				}
				// A copy into the mount.
				if out, err := testrig.Output(env.Command("cp", src, node.Path("copy-"+mode+filler.name+".db")), ""); err == nil {
					copies++
				} else if !strings.Contains(out, "No space left") {
					t.Errorf("cp: got %v, %s; want No space left", err, out)
				}
				os.Remove(node.Path("copy-" + mode + filler.name + ".db"))
				v.room(220 << 20)
				// The same connections, no restart.
				for range 2 {
					w.Do(filler.sql)
				}
				second.Do("INSERT INTO t VALUES('c',3);")
				second.Close()
				if got := reader.Do("PRAGMA integrity_check;"); got != "ok" {
					t.Error(got)
				}
				w.Close()
				reader.Close()
				env.Wait(15*time.Second, "status is healthy with room again: "+problems(env, node), func() bool { return problems(env, node) == "" })
				node.Verify()
				os.Remove(path)
				os.Remove(other)
			})
		}
	}
	if copies == len(modes)*len(fillers) {
		t.Error("every copy into the mount found room: this tests nothing")
	}
	// Killed on a full disk, started again with room.
	v.room(60 << 20)
	path := node.Path("again.db")
	env.SQL(path, "CREATE TABLE t(v,n);"+fill("t", 500, 300))
	out, err := "", error(nil)
	for range 20 { // what is given back while it runs is taken, too
		v.room(0)
		if out, err = env.TrySQL(path, strings.Repeat("INSERT INTO t VALUES('x',randomblob(60000));\n", 200)); err != nil {
			break
		}
	}
	if err == nil || !strings.Contains(out, "full") {
		t.Errorf("on a full disk: got %v, %s; want full", err, out)
	}
	want := env.SQL(path, "SELECT count(*) FROM t;")
	// What was committed may wait in the log for room in the file.
	node.Kill()
	v.room(220 << 20)
	node.Start()
	if got := env.SQL(path, "SELECT count(*) FROM t; PRAGMA integrity_check;"); got != want+"\nok" {
		t.Errorf("after a restart with room: got %s, want %s rows", got, want)
	}
	env.SQL(path, "INSERT INTO t VALUES('y',1);")
	if left, _ := filepath.Glob(node.Path("copy-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
