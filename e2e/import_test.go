package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// import replaces a database in one transaction, under programs that have it open,
// in both kinds of journal modes, or makes it; what is no database is refused,
// and a database whose WAL is in use.
func TestImport(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	one, two := makeDB(env, "one", 10), makeDB(env, "two", 500)
	path := node.Path("a.db")
	env.Must(node.Client("import", "--db", "a.db", one), "")
	txid(env, path, 1)
	sameFile(t, path, one)
	if got := rows(env, path); got != "10" {
		t.Errorf("rows of an imported database: got %s, want 10", got)
	}

	// A connection that has the database in its cache sees the new content.
	open := env.Session(path)
	want := func(sql, want string) {
		t.Helper()
		if got := open.Do(sql); got != want {
			t.Errorf("%s: got %s, want %s", sql, got, want)
		}
	}
	want("SELECT count(*) FROM t;", "10")
	env.Must(node.Client("import", "--db", "a.db", two), "")
	want("SELECT count(*) FROM t;", "500")
	want("INSERT INTO t VALUES('x',0); SELECT count(*) FROM t;", "501")
	txid(env, path, 3)

	want("PRAGMA journal_mode=wal; INSERT INTO t VALUES('y',0);", "wal")
	out, err := testrig.Output(node.Client("import", "--db", "a.db", one), "")
	if err == nil || !strings.Contains(out, "in use") {
		t.Errorf("import over a WAL in use: got %v, %s", err, out)
	}
	open.Close()
	env.Must(node.Client("import", "--db", "a.db", one), "")
	if got := rows(env, path); got != "10" {
		t.Errorf("rows after the WAL was closed: got %s, want 10", got)
	}

	text := filepath.Join(env.Folder("files"), "text")
	if err := os.WriteFile(text, []byte(strings.Repeat("no database\n", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"import", "--db", "a.db", text},
		{"import", "--db", "b.db", text},
		{"import", "--db", "nodes/x/b.db", one},
		{"import", "--db", "../b.db", one},
		{"import", "--db", "no/folder/b.db", one},
	} {
		if out, err := testrig.Output(node.Client(args...), ""); err == nil {
			t.Errorf("%q: got %s, want an error", args, out)
		}
	}
	if got := rows(env, path); got != "10" {
		t.Errorf("rows after refusals: got %s, want 10", got)
	}
	if _, err := os.Stat(node.Path("b.db")); !os.IsNotExist(err) {
		t.Errorf("b.db after a refusal: got %v", err)
	}
	node.Verify()
}
