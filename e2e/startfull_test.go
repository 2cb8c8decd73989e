package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// The agent is started on a disk without any room after a kill -9. Without room
// for a segment of its log it does not start, and says so; nothing is lost by the
// attempt. With room for that alone, the database whose last transactions do not fit is
// held back, named by status with the cure, and the others are served. Once there
// is room it comes back by itself, with everything acknowledged in it. That is a
// database in WAL mode, whose file grows by the checkpoint; in a rollback mode it
// has grown at the WRITE (invariant 23).
func TestStartOnFullDisk(t *testing.T) {
	const segment = 4 << 20
	env := testrig.New(t)
	v := newVolume(env, "ext4", 96)
	for _, mode := range []string{"delete", "wal"} {
		t.Run(mode, func(t *testing.T) {
			v.room(64 << 20)
			node := v.node(testrig.Options{ID: mode, Config: "[sync]\nmemory = \"64MiB\""})
			env := env.For(t)
			v := v.forTest(env)
			large, small := node.Path("large.db"), node.Path("small.db")
			for _, path := range []string{large, small} {
				env.SQL(path, "PRAGMA journal_mode="+mode+"; CREATE TABLE t(v,n);"+fill("t", 100, 100))
			}
			node.Stop() // so far the files are up to date
			node.Start()
			// In the log only, where they are small: the file has to grow by 4.9 MB.
			w := env.Session(large)
			w.Do("PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=0;")
			for n := range 7 {
				w.Do(name("INSERT INTO t VALUES(printf('%%.*c',700000,'l'),%d);", 1000+n))
			}
			w.Do("DELETE FROM t WHERE n=1000;")
			const look = "SELECT count(*), sum(n), sum(length(v)), total(unicode(substr(v,100,1))) FROM t;"
			want := map[string]string{large: w.Do(look)}
			env.SQL(small, "PRAGMA synchronous=FULL; INSERT INTO t VALUES('kept',7);")
			want[small] = env.SQL(small, look)
			pos := map[string]testrig.Pos{large: env.Pos(large), small: env.Pos(small)}
			node.Kill()
			w.Kill()
			// A spare segment may be left for the first attempts.
			for i, err := 0, errors.New("signal: killed"); i < 6 && err.Error() == "signal: killed"; i++ {
				v.room(0)
				if _, err = testrig.Output(env.Command(env.Program, "mount", "--config", node.Config(), "--", "sh", "-c", "kill -9 $PPID"), ""); err == nil {
					t.Fatal("killed and ended with status 0")
				}
			}
			out, err := testrig.Output(env.Command(env.Program, "mount", "--config", node.Config()), "")
			if err == nil || err.Error() != "exit status 1" || !strings.Contains(out, "no space left") || !strings.Contains(out, "nothing is lost: free some space there") {
				t.Fatalf("start on a full disk: got %v, want exit status 1, no space left, the cure\n%s", err, out)
			}
			v.room(segment + 1<<20)
			node.Start()
			state := problems(env, node)
			if mode == "wal" {
				if !strings.Contains(state, "large.db") || !strings.Contains(state, "nothing is lost: free space") || strings.Contains(state, "small.db") {
					t.Fatalf("status with room for the log alone: got %q, want large.db held back, with the cure", state)
				}
				if out, err := env.TrySQL(large, look); err == nil {
					t.Errorf("a database in the middle of a transaction is shown: %s", out)
				}
			} else if got := env.SQL(large, look); got != want[large] {
				t.Errorf("a database whose file had grown at the WRITE: got %s, want %s", got, want[large])
			}
			if got := env.SQL(small, look); got != want[small] {
				t.Errorf("another database: got %s, want %s", got, want[small])
			}
			for path, at := range pos {
				if got := env.Pos(path); got != at {
					t.Errorf("%s: got position %v, want %v", filepath.Base(path), got, at)
				}
			}
			v.room(64 << 20)
			env.Wait(15*time.Second, "the database comes back by itself", func() bool { return problems(env, node) == "" })
			for path, rows := range want {
				if got := env.SQL(path, look); got != rows {
					t.Errorf("%s with room again: got %s, want %s", filepath.Base(path), got, rows)
				}
				if got := env.Pos(path); got != pos[path] {
					t.Errorf("%s: got position %v, want %v", filepath.Base(path), got, pos[path])
				}
				checkDB(env, path)
				env.SQL(path, "INSERT INTO t VALUES('on',1);")
			}
			node.Verify()
			node.Stop()
			os.RemoveAll(node.Data)
		})
	}
}
