package e2e

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// A step is SQL that is run on the mount and on plain ext4, with what it does to
// the position.
type step struct {
	name string
	sql  string
	txns txns // in the rollback modes
	wal  txns // in WAL mode, where it differs
}

// txns is by how many TXIDs a step moves the position.
type txns int

const (
	same  txns = -iota // as the other; a wal of 0 means this
	none               // no transaction
	maybe              // SQLite decides
)

func (n txns) String() string {
	switch n {
	case none:
		return "0"
	case maybe:
		return "any"
	}
	return fmt.Sprint(int(n))
}

// fill makes n rows of size bytes each, the same at every run.
func fill(table string, n, size int) string {
	return fmt.Sprintf("INSERT INTO %s(v,n) WITH RECURSIVE c(i) AS (VALUES(1) UNION ALL SELECT i+1 FROM c WHERE i<%d) SELECT printf('%%.*c%%d',%d,char(97+i%%26),i),i FROM c;", table, n, size)
}

var basicSteps = []step{
	{name: "create", sql: "CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT, n INT);", txns: 1},
	{name: "insert", sql: "INSERT INTO t(v,n) VALUES('a',1);", txns: 1},
	{name: "insert rows", sql: fill("t", 200, 50), txns: 1},
	{name: "index", sql: "CREATE INDEX tn ON t(n);", txns: 1},
	{name: "two transactions", sql: "INSERT INTO t(v,n) VALUES('b',2); INSERT INTO t(v,n) VALUES('c',3);", txns: 2},
	{name: "update", sql: "UPDATE t SET v=v||'x' WHERE n%3=0;", txns: 1},
	{name: "update nothing", sql: "UPDATE t SET v='y' WHERE n=-1;", txns: none},
	{name: "update to the same", sql: "UPDATE t SET n=n WHERE id=5;", txns: 1, wal: none},
	{name: "delete", sql: "DELETE FROM t WHERE n%5=0;", txns: 1},
	{name: "rollback", sql: "BEGIN; INSERT INTO t(v,n) VALUES('gone',4); DELETE FROM t WHERE n<50; ROLLBACK;", txns: none},
	{name: "failed statement", sql: "BEGIN; INSERT INTO t(v,n) VALUES('kept',5); INSERT OR IGNORE INTO t(id) VALUES(1); COMMIT;", txns: 1},
	{name: "empty transaction", sql: "BEGIN; COMMIT;", txns: none},
	{name: "empty immediate", sql: "BEGIN IMMEDIATE; COMMIT;", txns: none},
	{name: "empty exclusive", sql: "BEGIN EXCLUSIVE; SELECT count(*) FROM t; COMMIT;", txns: none},
	{name: "read", sql: "SELECT count(*), sum(n) FROM t; PRAGMA quick_check;", txns: none},
	{name: "savepoints", sql: "BEGIN; INSERT INTO t(v,n) VALUES('s1',6); SAVEPOINT a; DELETE FROM t; ROLLBACK TO a; INSERT INTO t(v,n) VALUES('s2',7); SAVEPOINT b; UPDATE t SET n=n+1; ROLLBACK TO b; RELEASE a; COMMIT;", txns: 1},
	{name: "savepoint alone", sql: "SAVEPOINT a; INSERT INTO t(v,n) VALUES('s3',8); RELEASE a;", txns: 1},
	{name: "savepoint undone", sql: "SAVEPOINT a; INSERT INTO t(v,n) VALUES('s4',9); ROLLBACK TO a; RELEASE a;", txns: maybe},
	{name: "temp table", sql: "CREATE TEMP TABLE tt AS SELECT * FROM t; DROP TABLE tt;", txns: none},
	{name: "view and trigger", sql: "CREATE VIEW w AS SELECT id FROM t; CREATE TRIGGER g AFTER INSERT ON t WHEN NEW.n=99 BEGIN UPDATE t SET v='trigger' WHERE id=1; END;", txns: 2},
	{name: "trigger fires", sql: "INSERT INTO t(v,n) VALUES('d',99);", txns: 1},
	{name: "user version", sql: "PRAGMA user_version=7;", txns: 1},
	{name: "spill", sql: "PRAGMA cache_size=10; BEGIN; " + fill("t", 1500, 300) + " UPDATE t SET v=v||'z' WHERE n%7=0; COMMIT;", txns: 1},
	{name: "spill and rollback", sql: "BEGIN; UPDATE t SET v=v||'r'; DELETE FROM t WHERE n%2=0; " + fill("t", 1500, 300) + " ROLLBACK;", txns: none},
	{name: "spill and savepoint", sql: "BEGIN; UPDATE t SET n=n+1 WHERE n%2=0; SAVEPOINT a; " + fill("t", 1000, 300) + " DELETE FROM t WHERE n%3=0; ROLLBACK TO a; RELEASE a; COMMIT;", txns: 1},
	{name: "blobs", sql: "CREATE TABLE b(id INTEGER PRIMARY KEY, v TEXT, n INT); INSERT INTO b VALUES(1,printf('%.*c',200000,'q'),1); UPDATE b SET v=v||'tail'; INSERT INTO b VALUES(2,zeroblob(70000),2);", txns: 4},
	{name: "delete blobs", sql: "DELETE FROM b;", txns: 1},
	{name: "grow into freed pages", sql: fill("b", 300, 100), txns: 1},
	{name: "without rowid", sql: "CREATE TABLE k(a TEXT PRIMARY KEY, b) WITHOUT ROWID; INSERT INTO k SELECT id||v,n FROM b;", txns: 2},
	{name: "analyze", sql: "ANALYZE;", txns: 1},
	{name: "reindex", sql: "REINDEX;", txns: 1, wal: maybe},
	{name: "delete all", sql: "DELETE FROM t;", txns: 1},
	{name: "vacuum", sql: "VACUUM;", txns: 1},
	{name: "smaller pages", sql: "PRAGMA page_size=1024; VACUUM;", txns: 1},
	{name: "larger pages", sql: "PRAGMA page_size=16384; VACUUM; " + fill("t", 100, 100), txns: 2},
	{name: "512", sql: "PRAGMA page_size=512; VACUUM; " + fill("t", 100, 100), txns: 2},
	{name: "65536", sql: "PRAGMA page_size=65536; VACUUM; " + fill("t", 100, 100), txns: 2},
	{name: "default pages", sql: "PRAGMA page_size=4096; VACUUM;", txns: 1},
	{name: "auto_vacuum full", sql: "PRAGMA auto_vacuum=FULL; VACUUM; " + fill("b", 500, 400), txns: 2},
	{name: "shrink by auto_vacuum", sql: "DELETE FROM b WHERE n>20; PRAGMA page_count;", txns: 1},
	{name: "auto_vacuum rolled back", sql: "BEGIN; DELETE FROM b; ROLLBACK;", txns: none},
	{name: "auto_vacuum incremental", sql: "PRAGMA auto_vacuum=INCREMENTAL; " + fill("b", 500, 400) + " DELETE FROM b WHERE n>30;", txns: 3},
	{name: "incremental_vacuum", sql: "PRAGMA incremental_vacuum(5); PRAGMA page_count; PRAGMA incremental_vacuum; PRAGMA page_count;", txns: maybe},
	{name: "auto_vacuum off", sql: "PRAGMA auto_vacuum=NONE; VACUUM; PRAGMA auto_vacuum;", txns: 1},
	{name: "checkpoint", sql: "PRAGMA wal_checkpoint; INSERT INTO b(v) VALUES('p'); PRAGMA wal_checkpoint(FULL); INSERT INTO b(v) VALUES('q'); PRAGMA wal_checkpoint(RESTART); INSERT INTO b(v) VALUES('r'); PRAGMA wal_checkpoint(TRUNCATE);", txns: 3},
	{name: "journal_size_limit", sql: "PRAGMA journal_size_limit=2000; BEGIN; UPDATE b SET v=v||'l'; COMMIT; PRAGMA wal_checkpoint(RESTART); UPDATE b SET n=n+1;", txns: 2},
	{name: "drop", sql: "DROP TABLE b; DROP VIEW w;", txns: 2},
}

// pair is one database on the mount and the same on plain ext4.
type pair struct {
	env        *testrig.Env
	mount, ref string // paths
	m, r       *testrig.Session
	wal        bool
	mode       string
	setup      string
}

func newPair(env *testrig.Env, node *testrig.Service, base, mode, setup string) *pair {
	p := &pair{
		env: env, mount: node.Path(base + ".db"), ref: filepath.Join(env.Folder("ext4"), base+".db"),
		wal: mode == "wal", mode: mode, setup: setup,
	}
	p.open()
	if got := p.do("PRAGMA journal_mode=" + mode + ";"); got != mode {
		env.Fatalf("journal_mode: got %s, want %s", got, mode)
	}
	return p
}

// open starts a process at each side.
func (p *pair) open() {
	p.env.Helper()
	p.m, p.r = p.env.Session(p.mount), p.env.Session(p.ref)
	p.do(".timeout 10000\n" + p.setup)
}

func (p *pair) close() {
	p.env.Helper()
	p.m.Close()
	p.r.Close()
}

// do runs SQL at both sides, which must print the same.
func (p *pair) do(sql string) string {
	p.env.Helper()
	got, want := p.m.Do(sql), p.r.Do(sql)
	p.equal(sql, got, want)
	return got
}

// try is do for SQL that may fail.
func (p *pair) try(sql string) string {
	p.env.Helper()
	got, ok := p.m.Try(sql)
	want, okRef := p.r.Try(sql)
	if !ok || !okRef {
		p.env.Fatalf("sqlite3 ended in: %.300s", sql)
	}
	p.equal(sql, got, want)
	return got
}

func (p *pair) equal(sql, got, want string) {
	p.env.Helper()
	got = strings.ReplaceAll(got, p.mount, p.ref)
	if got != want {
		p.env.Fatalf("on the mount got\n%s\nwant as on ext4\n%s\nafter: %.300s", got, want, sql)
	}
}

// pos returns the position; the zero one where there is no database yet.
func (p *pair) pos() testrig.Pos {
	p.env.Helper()
	if !testrig.Exists(p.mount + "-pos") {
		return testrig.Pos{}
	}
	return p.env.Pos(p.mount)
}

// run runs a step and checks content, integrity and position.
func (p *pair) run(s step) {
	p.env.Helper()
	before := p.pos()
	p.do(s.sql)
	p.moved(s, before)
	if got := p.do("PRAGMA integrity_check;"); got != "ok" {
		p.env.Fatalf("%s: integrity_check: %s", s.name, got)
	}
	p.do(".sha3sum")
	if !p.wal && !sameFile(p.env, p.mount, p.ref) {
		p.env.Fatalf("after step %q", s.name)
	}
}

func (p *pair) moved(s step, before testrig.Pos) {
	p.env.Helper()
	want := s.txns
	if p.wal && s.wal != same {
		want = s.wal
	}
	after := p.pos()
	moved := txns(after.TXID - before.TXID)
	switch {
	case want == maybe:
	case want == none && after == before:
	case want == moved:
	default:
		p.env.Errorf("%s: position went from %v to %v, want %v transactions", s.name, before, after, want)
	}
}

// finish closes both and compares the files.
func (p *pair) finish() {
	p.env.Helper()
	p.close()
	for _, suffix := range []string{"-journal", "-wal", "-shm"} {
		if got, want := testrig.Exists(p.mount+suffix), testrig.Exists(p.ref+suffix); got != want {
			p.env.Errorf("%s%s: on the mount %v, on ext4 %v", p.mount, suffix, got, want)
		}
	}
	sameFile(p.env, p.mount, p.ref)
	if got, want := p.env.SQL(p.mount, ".dump"), p.env.SQL(p.ref, ".dump"); got != want {
		p.env.Errorf("dump of %s differs from that on ext4", p.mount)
	}
}

// Every mode, synchronous setting and mmap: the same statements give the same
// files as on ext4, and the position moves with the content and only then.
func TestModes(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	t.Run("all", func(t *testing.T) {
		for _, mode := range modes {
			for _, sync := range syncs {
				for _, mmap := range []int{0, 64 << 20} {
					base := name("%s-%s-%d", mode, sync, mmap>>20)
					t.Run(base, func(t *testing.T) {
						t.Parallel()
						p := newPair(env.For(t), node, base, mode, name("PRAGMA synchronous=%s; PRAGMA mmap_size=%d;", sync, mmap))
						for _, s := range basicSteps {
							p.run(s)
						}
						p.finish()
						p.open()
						p.run(step{"reopened", "INSERT INTO t(v,n) VALUES('again',1);", 1, same})
						p.finish()
					})
				}
			}
		}
	})
}

// The same in locking_mode=EXCLUSIVE, which keeps others out, and back.
func TestExclusive(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	t.Run("all", func(t *testing.T) { exclusive(t, env, node) })
}

func exclusive(t *testing.T, env *testrig.Env, node *testrig.Service) {
	for _, mode := range modes {
		for _, early := range []bool{true, false} {
			base := name("%s-%v", mode, early)
			t.Run(base, func(t *testing.T) {
				t.Parallel()
				env := env.For(t)
				var p *pair
				const exclusive = "PRAGMA locking_mode=EXCLUSIVE;"
				if early { // before the first access: WAL without shm
					p = newPair(env, node, base, mode, exclusive)
				} else {
					p = newPair(env, node, base, mode, "")
					p.do("SELECT count(*) FROM sqlite_schema;" + exclusive)
				}
				for _, s := range basicSteps {
					if s.name == "update to the same" {
						s.txns = none // SQLite counts changes only once while it keeps the lock
					}
					p.run(s)
				}
				if out, err := env.TrySQL(p.mount, ".timeout 1\nSELECT count(*) FROM t;"); err == nil || !strings.Contains(out, "locked") {
					t.Errorf("another program at an exclusive database: got %v, %s; want locked", err, out)
				}
				if mode == "wal" && early { // has no wal-index: SQLite keeps it exclusive while it is open
					p.finish()
					p.open()
				}
				p.do("PRAGMA locking_mode=NORMAL; SELECT count(*) FROM t;")
				p.run(step{"normal again", "INSERT INTO t(v,n) VALUES('n',1);", 1, same})
				env.SQL(p.mount, "SELECT count(*) FROM t;")
				p.finish()
			})
		}
	}
}

// Journal modes are switched in both directions, alone and with another
// connection, which SQLite may refuse: as on ext4.
func TestModeSwitches(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	for _, others := range []bool{false, true} {
		base := name("others-%v", others)
		t.Run(base, func(t *testing.T) {
			env := env.For(t)
			p := newPair(env, node, base, "delete", "PRAGMA synchronous=normal;")
			p.do(".timeout 50")
			p.run(step{"create", "CREATE TABLE t(v,n);", 1, same})
			now := "delete"
			for _, from := range modes {
				for _, to := range modes {
					for _, mode := range []string{from, to} {
						var m, r *testrig.Session
						if others {
							m, r = env.Session(p.mount), env.Session(p.ref)
							m.Do("SELECT count(*) FROM t;")
							r.Do("SELECT count(*) FROM t;")
						}
						before := p.pos()
						out := p.try("PRAGMA journal_mode=" + mode + ";")
						got := p.do("PRAGMA journal_mode;")
						want := none
						if (got == "wal") != (now == "wal") {
							want = 1
						}
						p.moved(step{name: name("%s to %s: %s", now, mode, out), txns: want}, before)
						now, p.wal = got, got == "wal"
						p.run(step{"insert in " + got, "INSERT INTO t VALUES('x',1);", 1, same})
						if others {
							if a, b := m.Do("SELECT count(*) FROM t;"), r.Do("SELECT count(*) FROM t;"); a != b {
								t.Errorf("another connection: got %s rows, want %s", a, b)
							}
							m.Do("INSERT INTO t VALUES('other',2);")
							r.Do("INSERT INTO t VALUES('other',2);")
							m.Close()
							r.Close()
						}
						p.do("SELECT count(*) FROM t;")
					}
				}
			}
			p.finish()
		})
	}
}

// One transaction over several databases, each in its own mode.
func TestAttach(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	combos := [][]string{
		{"delete", "delete"}, {"truncate", "persist"}, {"persist", "delete", "truncate"}, {"delete", "delete", "delete"},
		{"wal", "wal"}, {"wal", "delete", "persist"}, {"wal", "wal", "delete"},
	}
	for _, combo := range combos {
		for _, sync := range []string{"off", "full", "extra"} {
			base := strings.Join(append(slices.Clone(combo), sync), "-")
			t.Run(base, func(t *testing.T) {
				env := env.For(t)
				var pairs []*pair
				for i, mode := range combo {
					p := newPair(env, node, name("%s-%d", base, i), mode, "PRAGMA synchronous="+sync+";")
					p.run(step{"create", name("CREATE TABLE t%d(v,n);", i), 1, same})
					p.close()
					pairs = append(pairs, p)
				}
				p := pairs[0]
				p.open()
				var insert, remove strings.Builder
				for i, other := range pairs {
					if i > 0 {
						p.m.Do(name("ATTACH '%s' AS a%d; PRAGMA a%d.synchronous=%s;", other.mount, i, i, sync))
						p.r.Do(name("ATTACH '%s' AS a%d; PRAGMA a%d.synchronous=%s;", other.ref, i, i, sync))
					}
					insert.WriteString(fill(name("t%d", i), 30, 200))
					remove.WriteString(name("DELETE FROM t%d WHERE n%%3=1;", i))
				}
				all := []struct {
					step
					only int // database that changes; -1: all
				}{
					{step{"insert into all", "BEGIN;" + insert.String() + "COMMIT;", 1, same}, -1},
					{step{"rollback", "BEGIN;" + insert.String() + "ROLLBACK;", none, same}, -1},
					{step{"one of them", "BEGIN; INSERT INTO t1 VALUES('one',1); SELECT count(*) FROM t0; COMMIT;", 1, same}, 1},
					{step{"spill", "PRAGMA cache_size=5; BEGIN;" + strings.Repeat(insert.String(), 10) + "COMMIT;", 1, same}, -1},
					{step{"delete", "BEGIN;" + remove.String() + "COMMIT;", 1, same}, -1},
					{step{"rollback of a delete", "BEGIN;" + remove.String() + "ROLLBACK;", none, same}, -1},
				}
				for _, s := range all {
					before := make([]testrig.Pos, len(pairs))
					for i, other := range pairs {
						before[i] = other.pos()
					}
					p.do(s.sql)
					for i, other := range pairs {
						each := s.step
						if s.only >= 0 && s.only != i {
							each.txns = none
						}
						other.moved(each, before[i])
						if !slices.Contains(combo, "wal") {
							sameFile(t, other.mount, other.ref)
						}
					}
				}
				p.finish()
				for _, other := range pairs {
					sameFile(t, other.mount, other.ref)
					checkDB(env, other.mount)
				}
				if left, _ := filepath.Glob(node.Path("*-mj*")); len(left) > 0 {
					t.Errorf("super-journals left: %v", left)
				}
			})
		}
	}
}
