package e2e

import (
	"os"
	"strings"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// A program has a transaction and its journal open when the agent is killed.
// At the new mount another program is in a transaction of its own, with a journal
// of that name. Whatever the old one does, ends its transaction, goes on, is closed or killed: it
// neither commits the other's half transaction nor leaves a journal that is played
// back.
func TestOldProgramsJournal(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	old := map[string]string{ // how far the old program is
		"locked":  "BEGIN IMMEDIATE;",
		"journal": "BEGIN IMMEDIATE; UPDATE t SET n=n+100 WHERE n<5;",
		"spilled": "BEGIN IMMEDIATE; UPDATE t SET v=v||'old', n=n+100;",
	}
	ends := []string{"ROLLBACK;", "COMMIT;", "DELETE FROM t WHERE n%2=0; COMMIT;", ".quit", "kill"}
	type try struct {
		old      *testrig.Session
		path     string
		end      string
		want     string
		new      *testrig.Session
		rollback bool
	}
	for _, mode := range []string{"delete", "truncate", "persist"} {
		var tries []*try
		for far, sql := range old {
			for i, end := range ends {
				for _, rollback := range []bool{true, false} {
					tr := &try{path: node.Path(name("%s-%s-%d-%v.db", mode, far, i, rollback)), end: end, rollback: rollback}
					env.SQL(tr.path, "PRAGMA journal_mode="+mode+"; CREATE TABLE t(v,n);"+fill("t", 60, 300))
					tr.old = env.Session(tr.path)
					tr.old.Do("PRAGMA journal_mode=" + mode + "; PRAGMA cache_size=5; INSERT INTO t VALUES('first',0);" + sql)
					tries = append(tries, tr)
				}
			}
		}
		node.Restart()
		for _, tr := range tries {
			const look = "SELECT count(*), sum(n), sum(length(v)) FROM t;"
			tr.want = env.SQL(tr.path, look)
			if !strings.HasPrefix(tr.want, "61|1830|") {
				t.Fatalf("%s: got %s after the restart: the open transaction was committed", tr.path, tr.want)
			}
			before := env.Pos(tr.path)
			tr.new = env.Session(tr.path)
			tr.new.Do("PRAGMA journal_mode=" + mode + "; PRAGMA cache_size=5; BEGIN IMMEDIATE; UPDATE t SET v=v||'new', n=n+1;")
			if fi, err := os.Stat(tr.path + "-journal"); err != nil || fi.Size() == 0 {
				t.Fatalf("%s-journal: %v: the new program has no journal", tr.path, err)
			}
			if tr.end == "kill" {
				tr.old.Kill()
			} else if out, ok := tr.old.Try(tr.end); ok && tr.end != ".quit" && tr.end != "ROLLBACK;" && !testrig.IsError(out) && !strings.Contains(tr.path, "-locked-") {
				t.Errorf("%s: the old program's %s succeeds: %s", tr.path, tr.end, out)
			}
			if !testrig.Exists(tr.path + "-journal") {
				t.Errorf("%s: %s of the old program removed the new one's journal", tr.path, tr.end)
			}
			if got := env.Pos(tr.path); got != before {
				t.Errorf("%s: %s of the old program: position went from %v to %v", tr.path, tr.end, before, got)
			}
			end, txns := "COMMIT;", uint64(1)
			if tr.rollback {
				end, txns = "ROLLBACK;", 0
			} else {
				tr.want = tr.new.Do(look)
			}
			tr.new.Do(end)
			tr.old.Close()
			tr.new.Close()
			if got := env.SQL(tr.path, look); got != tr.want {
				t.Errorf("%s after %s by the old and %s by the new program: got %s, want %s", tr.path, tr.end, end, got, tr.want)
			}
			txid(env, tr.path, before.TXID+txns)
			checkDB(env, tr.path)
		}
	}
}
