package e2e

import (
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// As an ordinary user, the agent mounts through fusermount3, and programs of that
// user get what they get at root's mount.
func TestOrdinaryUser(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{User: true, Method: "fusermount"})
	t.Run("all", func(t *testing.T) {
		for _, mode := range modes {
			t.Run(mode, func(t *testing.T) {
				t.Parallel()
				p := newPair(env.For(t), node, mode, mode, "PRAGMA synchronous=NORMAL;")
				for _, s := range basicSteps {
					p.run(s)
				}
				p.finish()
			})
		}
	})
	for _, mode := range modes {
		path := node.Path("user-" + mode + ".db")
		cmd := testrig.AsUser(env.Command("sqlite3", "-batch", "-bail", path))
		out := env.Must(cmd, "PRAGMA journal_mode="+mode+"; CREATE TABLE t(v); INSERT INTO t VALUES(1); SELECT count(*) FROM t;")
		if want := mode + "\n1"; out != want {
			t.Errorf("as the user: got %s, want %s", out, want)
		}
	}
	before := env.Pos(node.Path("wal.db"))
	node.Restart() // the stale mount goes without root, too
	if after := env.Pos(node.Path("wal.db")); after != before {
		t.Errorf("position after kill -9: got %v, want %v", after, before)
	}
	for _, mode := range modes {
		checkDB(env, node.Path(mode+".db"))
	}
}
