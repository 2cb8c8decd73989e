package e2e

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// A load is one program that commits numbered rows and, with them, so much that
// the log's segments are soon reused.
type load struct {
	name  string   // of its database
	mode  string   // journal mode
	setup []string // SQL of a connection, one of them a round
	more  []string // databases that each of its transactions changes, too
	next  int      // row
	bulk  int      // bytes that a commit may write beside its row
	prog  *numberer
}

const loadSchema = "CREATE TABLE t(writer,n,v); CREATE INDEX i ON t(writer,n); CREATE TABLE bulk(id INTEGER PRIMARY KEY, v);"

func (l *load) create(env *testrig.Env, node *testrig.Service) {
	env.Helper()
	for _, base := range append([]string{l.name}, l.more...) {
		env.SQL(node.Path(base), "PRAGMA journal_mode="+l.mode+";"+loadSchema)
	}
	l.next = 1
}

func (l *load) start(env *testrig.Env, node *testrig.Service, writer int, r *rand.Rand) {
	env.Helper()
	setup := "PRAGMA cache_size=20; " + l.setup[r.IntN(len(l.setup))]
	schemas := []string{"main"}
	for i, base := range l.more {
		setup += name(" ATTACH '%s' AS a%d; PRAGMA a%d.synchronous=FULL;", node.Path(base), i, i)
		schemas = append(schemas, fmt.Sprint("a", i))
	}
	seed := r.Uint64()
	own := rand.New(rand.NewPCG(seed, 5))
	l.prog = startStream(env, node.Path(l.name), setup, writer, l.next, func(n int) string {
		var sql strings.Builder
		sql.WriteString("BEGIN IMMEDIATE;")
		for _, schema := range schemas {
			fmt.Fprintf(&sql, " INSERT INTO %s.t VALUES(%d,%d,randomblob(%d));", schema, writer, n, 1+own.IntN(200))
			if own.IntN(3) > 0 {
				fmt.Fprintf(&sql, " REPLACE INTO %s.bulk VALUES(%d,randomblob(%d));", schema, own.IntN(20), own.IntN(l.bulk))
			}
			if own.IntN(40) == 0 {
				fmt.Fprintf(&sql, " DELETE FROM %s.bulk;", schema)
			}
		}
		sql.WriteString(" COMMIT;")
		return sql.String()
	})
}

// check looks for every row that the program saw committed, after its end.
func (l *load) check(env *testrig.Env, node *testrig.Service, writer int) {
	env.Helper()
	acked := l.prog.kill()
	last := checkRows(env, node.Path(l.name), writer, acked)
	checkDB(env, node.Path(l.name))
	for _, base := range l.more { // invariant 12
		if got := checkRows(env, node.Path(base), writer, acked); got != last {
			env.Errorf("one transaction over %s and %s: got rows to %d and to %d", l.name, base, last, got)
		}
		checkDB(env, node.Path(base))
	}
	l.next = last + 1
}

// reused returns how often a segment of the log was taken again, by the header of
// each: sequence numbers ascend with every use, the numbers of files with every
// file. Source: the drawing in internal/commitlog/format.go.
func reused(env *testrig.Env, node *testrig.Service) int {
	env.Helper()
	names, _ := filepath.Glob(filepath.Join(node.Data, "log", "*.seg"))
	var files, uses uint64
	for _, file := range names {
		var id uint64
		if _, err := fmt.Sscanf(filepath.Base(file), "%d.seg", &id); err != nil {
			env.Fatal(err)
		}
		f, err := os.Open(file)
		if err != nil {
			env.Fatal(err)
		}
		var head [24]byte
		_, err = f.ReadAt(head[:], 0)
		f.Close()
		if err != nil {
			env.Fatal(err)
		}
		files = max(files, id+1)
		uses = max(uses, binary.LittleEndian.Uint64(head[16:]))
	}
	return max(0, int(uses)-int(files))
}

// The power goes while programs commit: with synchronous=FULL, or any setting
// under durability = "commit", nothing that a program saw committed is missing,
// also while the log goes round and checkpoints run.
func TestPowerLoss(t *testing.T) {
	full := []string{"PRAGMA synchronous=FULL;", "PRAGMA synchronous=EXTRA;"}
	any := []string{"PRAGMA synchronous=NORMAL;", "PRAGMA synchronous=OFF;", "PRAGMA synchronous=FULL;"}
	small := " PRAGMA wal_autocheckpoint=20;"
	for _, durability := range []string{"app", "commit"} {
		syncs := full
		if durability == "commit" {
			syncs = any
		}
		t.Run(durability, func(t *testing.T) {
			powerLoss(t, durability, 4**soak, []*load{
				{name: "turn.db", mode: "truncate", setup: syncs, bulk: 950000}, // below what gets a file of its own
				{name: "delete.db", mode: "delete", setup: syncs, bulk: 100000},
				{name: "truncate.db", mode: "truncate", setup: syncs, bulk: 100000},
				{name: "persist.db", mode: "persist", setup: syncs, bulk: 100000},
				{name: "wal.db", mode: "wal", setup: syncs, bulk: 100000},
				{name: "checkpoints.db", mode: "wal", setup: []string{syncs[0] + small, syncs[1] + small}, bulk: 200000},
				{name: "large.db", mode: "delete", setup: syncs, bulk: 2 << 20},
				{name: "group.db", mode: "delete", setup: full, more: []string{"group1.db", "group2.db"}, bulk: 50000},
			})
		})
	}
}

func powerLoss(t *testing.T, durability string, rounds int, loads []*load) {
	r := random(t)
	env := testrig.New(t)
	v := newVolume(env, "ext4", 384)
	node := v.node(testrig.Options{Config: name("[sync]\ndurability = %q\nbudget = \"8MiB\"\nflush = \"20ms\"", durability)})
	for _, l := range loads {
		l.create(env, node)
	}
	// Until the log goes round: from here on every segment is a used one.
	turn := loads[0]
	for i := 0; reused(env, node) == 0; i++ {
		if i > 60 {
			t.Fatal("60 MB and no segment of the log was reused")
		}
		env.SQL(node.Path(turn.name), "REPLACE INTO bulk VALUES(1,randomblob(950000)); UPDATE bulk SET v=randomblob(950000);")
	}
	turned, started := reused(env, node), time.Now()
	// At least until the power has gone once more after the next turn.
	for round := 0; round < rounds || reused(env, node) < turned+1+rounds/8 && round < 4*rounds; round++ {
		for i, l := range loads {
			l.start(env, node, i, r)
		}
		time.Sleep(time.Duration(200+r.IntN(1300)) * time.Millisecond)
		before := make([]testrig.Pos, len(loads))
		for i, l := range loads {
			before[i] = env.Pos(node.Path(l.name))
		}
		way := r.IntN(2)
		v.powerOff(way, r.Uint64())
		if r.IntN(2) == 0 { // it may notice
			time.Sleep(time.Duration(r.IntN(30)) * time.Millisecond)
		}
		node.Kill()
		for _, l := range loads {
			l.prog.kill()
		}
		v.powerOn()
		node.Start()
		for i, l := range loads {
			after := env.Pos(node.Path(l.name))
			l.check(env, node, i)
			if after.TXID+1 < before[i].TXID { // the last may not have been acknowledged yet
				t.Errorf("%s: position went back from %v to %v", l.name, before[i], after)
			}
		}
		node.Verify()
		if t.Failed() {
			t.Fatalf("in round %d, power off by way %d", round, way)
		}
	}
	total := 0
	for _, l := range loads {
		total += l.next - 1
		if l.next < 3 {
			t.Errorf("%s: %d transactions: this tests nothing", l.name, l.next-1)
		}
	}
	n := reused(env, node) - turned
	if n < 1+rounds/8 {
		t.Errorf("segments of the log were reused %d times in %d rounds: this tests nothing", n, rounds)
	}
	t.Logf("%d rounds in %v: %d transactions, %d segments reused", rounds, time.Since(started).Round(time.Second), total, n)
}
