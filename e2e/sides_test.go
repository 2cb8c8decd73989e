package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// A database whose program was killed has a WAL or a hot journal beside it. However
// the two are copied in, what SQLite then shows and commits is in the records.
func TestJournalCopiedIn(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	src := env.Folder("src")
	env.Run("bash", "-c", `cd "$1"
		sqlite3 wal.db 'PRAGMA journal_mode=WAL; CREATE TABLE t(v); INSERT INTO t VALUES(1),(2);' '.shell cp wal.db w.db; cp wal.db-wal w.db-wal; cp wal.db-shm w.db-shm'
		sqlite3 del.db 'PRAGMA cache_size=5; CREATE TABLE t(v); INSERT INTO t VALUES(1),(2);' 'BEGIN; INSERT INTO t SELECT randomblob(5000) FROM t,t,t,t;' \
			'.shell cp del.db d.db; cp del.db-journal d.db-journal'`, "sh", src)
	for _, c := range []struct{ name, sides string }{{"w.db", "-wal -shm"}, {"d.db", "-journal"}} {
		for how, script := range map[string]string{
			"database first": `cp "$1/$2" "$4"; for s in $3; do cp "$1/$2$s" "$4$s"; done`,
			"journal first":  `for s in $3; do cp "$1/$2$s" "$4$s"; done; cp "$1/$2" "$4"`,
			"journal open":   `for s in $3; do cp "$1/$2$s" "$4$s"; done; exec 7<"${4}${3%% *}"; cp "$1/$2" "$4"`,
			"renamed": `cp "$1/$2" "$4"; cat "$4-pos" || true
				for s in $3; do cp "$1/$2$s" tmp$$; mv tmp$$ "$4$s"; done`,
		} {
			t.Run(c.name+" "+how, func(t *testing.T) {
				env := env.For(t)
				path := node.Path(strings.ReplaceAll(how, " ", "-") + "-" + c.name)
				cmd := env.Command("bash", "-euc", script, "sh", src, c.name, c.sides, path)
				cmd.Dir = node.Mount
				env.Must(cmd, "")
				if got := env.SQL(path, "SELECT v FROM t;"); got != "1\n2" {
					t.Errorf("got %q, want 1, 2", got)
				}
				before := env.Pos(path).TXID
				if got := env.SQL(path, "INSERT INTO t VALUES(3); SELECT count(*) FROM t; PRAGMA integrity_check;"); got != "3\nok" {
					t.Errorf("got %q, want 3, ok", got)
				}
				if after := env.Pos(path).TXID; after != before+1 {
					t.Errorf("the insert: got TXID %d after %d", after, before)
				}
				out := filepath.Join(env.Folder("out"), filepath.Base(path))
				env.Must(node.Client("export", "--db", filepath.Base(path), "-o", out), "")
				if got := env.SQL(out, "SELECT count(*) FROM t; PRAGMA integrity_check;"); got != "3\nok" {
					t.Errorf("exported: got %q, want 3, ok", got)
				}
				if rest, _ := filepath.Glob(filepath.Join(node.Data, "files", filepath.Base(path)+"-*")); len(rest) > 0 {
					t.Errorf("left as ordinary files: %v", rest)
				}
			})
		}
	}
	node.Restart()
	for _, name := range []string{"journal-first-w.db", "journal-first-d.db"} {
		if got := env.SQL(node.Path(name), "SELECT count(*) FROM t;"); got != "3" {
			t.Errorf("%s after a restart: got %s, want 3", name, got)
		}
	}
	if _, err := os.Stat(node.Path("journal-first-w.db-wal")); err == nil {
		t.Error("a WAL of the former life")
	}
}

// With a database goes the journal or WAL beside it, and the kernel may still know
// the name: a new database made at once must not be given the old one.
func TestNewDatabaseAtOnce(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			env, path := env.For(t), node.Path(mode+".db")
			make := "PRAGMA journal_mode=" + mode + "; CREATE TABLE t(v); INSERT INTO t VALUES(1);"
			var script strings.Builder
			for range 10 {
				script.WriteString(".open " + path + "\n" + make + "\n.shell rm " + path + "\n")
			}
			if out := env.SQL(path, script.String()+".open "+path+"\n"+make); strings.Count(out, mode) != 11 {
				t.Errorf("got %q, want 11 databases", out)
			}
			checkDB(env, path)
		})
	}
}

// A copy that is not closed yet, or that the agent's end left behind, becomes a
// database by the first transaction of SQLite; so does a copy under the name of a
// database that was removed a moment ago. None loses a page of it.
func TestUseOfUnclosedCopy(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	for _, mode := range []string{"wal", "delete"} {
		src := filepath.Join(env.Folder("src"), mode+".db")
		env.SQL(src, "PRAGMA journal_mode="+mode+"; CREATE TABLE t(v,n);"+fill("t", 500, 200))
		check := func(t *testing.T, path string) {
			t.Helper()
			if got := env.For(t).SQL(path, "SELECT count(*) FROM t; PRAGMA integrity_check;"); got != "501\nok" {
				t.Errorf("%s: got %.100q, want 501 rows, ok", filepath.Base(path), got)
			}
		}
		insert := `sqlite3 -bail "$2" "INSERT INTO t VALUES('new',1)"`
		names := map[string]string{
			"open":    `exec 7>"$2"; cat "$1" >&7; ` + insert,
			"removed": `for i in 1 2 3 4 5 6 7 8; do rm -f "$2"; exec 7>"$2"; cat "$1" >&7; ` + insert + `; exec 7>&-; done`,
		}
		for how, script := range names {
			t.Run(how+" "+mode, func(t *testing.T) {
				path := node.Path(how + "-" + mode + ".db")
				env.For(t).Run("bash", "-euc", script, "sh", src, path)
				check(t, path)
			})
		}
		t.Run("left behind "+mode, func(t *testing.T) {
			env, path := env.For(t), node.Path("left-"+mode+".db")
			copier := env.Command("bash", "-euc", `exec 7>"$2"; cat "$1" >&7; sync "$2"; echo written; read x`, "sh", src, path)
			in, err := copier.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out, err := copier.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := copier.Start(); err != nil {
				t.Fatal(err)
			}
			if _, err := out.Read(make([]byte, 16)); err != nil {
				t.Fatal(err)
			}
			node.Restart()
			in.Close()
			_ = copier.Wait()
			env.Run("bash", "-euc", insert, "sh", src, path)
			check(t, path)
		})
		node.Stop() // all is flushed, and no page cache hides it
		node.Start()
		for _, how := range []string{"open", "removed", "left"} {
			check(t, node.Path(how+"-"+mode+".db"))
		}
	}
}
