package e2e

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// A numberer is a sqlite3 process that commits rows n, n+1, ... of its writer
// number and prints each after COMMIT has returned.
type numberer struct {
	cmd    *exec.Cmd
	writer int
	first  int

	mu    sync.Mutex
	acked int // the last number printed
	done  chan struct{}
}

// statements that commit row %[2]d of writer %[1]d, each in its way.
var commits = []string{
	"INSERT INTO t VALUES(%[1]d,%[2]d,printf('%%.*c',50,'a'));",
	"BEGIN IMMEDIATE; INSERT INTO t VALUES(%[1]d,%[2]d,printf('%%.*c',9000,'b')); DELETE FROM scratch; COMMIT;",
	"BEGIN IMMEDIATE; INSERT INTO scratch SELECT printf('%%.*c',300,'s') FROM t LIMIT 40; INSERT INTO t VALUES(%[1]d,%[2]d,'c'); COMMIT;",
	"BEGIN IMMEDIATE; SAVEPOINT a; DELETE FROM t; ROLLBACK TO a; INSERT INTO t VALUES(%[1]d,%[2]d,'d'); COMMIT;",
	"BEGIN IMMEDIATE; DELETE FROM scratch; ROLLBACK; INSERT INTO t VALUES(%[1]d,%[2]d,'e');",
}

const numbererSchema = "CREATE TABLE t(writer,n,v); CREATE INDEX i ON t(writer,n); CREATE TABLE scratch(v);"

// startNumberer starts at row first; setup is SQL before.
func startNumberer(env *testrig.Env, path, setup string, writer, first int, seed uint64) *numberer {
	env.Helper()
	r := rand.New(rand.NewPCG(seed, uint64(writer)))
	return startStream(env, path, setup, writer, first, func(n int) string {
		return fmt.Sprintf(commits[r.IntN(len(commits))], writer, n)
	})
}

// startStream is startNumberer for a program whose n-th commit is commit(n).
func startStream(env *testrig.Env, path, setup string, writer, first int, commit func(n int) string) *numberer {
	env.Helper()
	cmd := env.Command("sqlite3", "-batch", "-bail", path)
	in, err := cmd.StdinPipe()
	if err != nil {
		env.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		env.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		env.Fatal(err)
	}
	w := &numberer{cmd: cmd, writer: writer, first: first, acked: first - 1, done: make(chan struct{})}
	var pumps sync.WaitGroup
	pumps.Go(func() {
		_, err := io.WriteString(in, ".timeout 20000\n"+setup+"\n")
		for n := first; err == nil; n++ {
			_, err = fmt.Fprintf(in, "%s\n.print %d\n", commit(n), n)
		}
	})
	pumps.Go(func() {
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if n, err := strconv.Atoi(lines.Text()); err == nil {
				w.mu.Lock()
				w.acked = n
				w.mu.Unlock()
			}
		}
		in.Close()
	})
	go func() {
		pumps.Wait()
		cmd.Wait()
		close(w.done)
	}()
	return w
}

// kill ends the program, if it still runs, and returns the last row acknowledged.
func (w *numberer) kill() int {
	w.cmd.Process.Kill()
	<-w.done
	return w.acked
}

// checkRows fails where an acknowledged row is missing or more than one row is
// there that was not, and returns the number of the last one.
func checkRows(env *testrig.Env, path string, writer, acked int) int {
	env.Helper()
	out := env.SQL(path, name("SELECT count(*), ifnull(min(n),1), ifnull(max(n),0), count(DISTINCT n) FROM t WHERE writer=%d;", writer))
	var count, first, last, distinct int
	if _, err := fmt.Sscanf(strings.ReplaceAll(out, "|", " "), "%d %d %d %d", &count, &first, &last, &distinct); err != nil {
		env.Fatalf("%q: %v", out, err)
	}
	if count != last || distinct != last || first != 1 {
		env.Errorf("writer %d: rows are not 1 to %d: %d rows from %d", writer, last, count, first)
	}
	if last != acked && last != acked+1 {
		env.Errorf("writer %d: got rows to %d, want %d or one more: it was acknowledged", writer, last, acked)
	}
	return last
}

// Programs are killed at any moment while others write and read: what they saw
// committed stays, and what they did not is there whole or not at all.
func TestKillPrograms(t *testing.T) {
	r := random(t)
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	t.Run("all", func(t *testing.T) {
		for _, mode := range modes {
			seed := r.Uint64()
			t.Run(mode, func(t *testing.T) {
				t.Parallel()
				r := rand.New(rand.NewPCG(seed, 3))
				env := env.For(t)
				path := node.Path(mode + ".db")
				env.SQL(path, "PRAGMA journal_mode="+mode+";"+numbererSchema)
				// A connection that stays keeps SQLite from recovering the WAL for
				// itself: an unpublished commit is then overwritten.
				watch := env.Session(path)
				watch.Do(".timeout 20000")
				next := []int{1, 1}
				for round := range 25 * *soak {
					sync := syncs[r.IntN(len(syncs))]
					var ws []*numberer
					for writer, first := range next {
						ws = append(ws, startNumberer(env, path, "PRAGMA synchronous="+sync+"; PRAGMA cache_size=10;", writer, first, r.Uint64()))
					}
					victim := r.IntN(len(ws))
					time.Sleep(time.Duration(5+r.IntN(60)) * time.Millisecond)
					if r.IntN(2) == 0 { // most programs are killed out of a sleep in a system call
						ws[victim].cmd.Process.Signal(syscall.SIGSTOP)
						time.Sleep(time.Duration(r.IntN(3)) * time.Millisecond)
					}
					acked := []int{0, 0}
					acked[victim] = ws[victim].kill()
					if round%3 == 0 {
						watch.Do("SELECT count(*) FROM t;")
					}
					acked[1-victim] = ws[1-victim].kill()
					for writer, n := range acked {
						next[writer] = checkRows(env, path, writer, n) + 1
					}
					if got := watch.Do("PRAGMA integrity_check;"); got != "ok" {
						t.Fatalf("round %d: %s", round, got)
					}
					if t.Failed() {
						t.Fatalf("in round %d", round)
					}
				}
				if next[0]+next[1] < 20 {
					t.Errorf("only %v rows were written: this tests nothing", next)
				}
			})
		}
	})
}

// The agent is killed while programs write: they get errors, what they saw
// committed is there after the restart, and the mount of before is gone.
func TestKillAgent(t *testing.T) {
	r := random(t)
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	next := make([]int, len(modes))
	for i, mode := range modes {
		env.SQL(node.Path(mode+".db"), "PRAGMA journal_mode="+mode+";"+numbererSchema)
		next[i] = 1
	}
	for round := range 12 * *soak {
		var ws []*numberer
		for i, mode := range modes {
			sync := syncs[r.IntN(len(syncs))]
			ws = append(ws, startNumberer(env, node.Path(mode+".db"), "PRAGMA synchronous="+sync+"; PRAGMA cache_size=10;", i, next[i], r.Uint64()))
		}
		time.Sleep(time.Duration(5+r.IntN(300)) * time.Millisecond)
		before := make([]testrig.Pos, len(modes))
		for i, mode := range modes {
			before[i] = env.Pos(node.Path(mode + ".db"))
		}
		node.Kill()
		if r.IntN(2) == 0 { // the programs notice by themselves
			for _, w := range ws {
				select {
				case <-w.done:
				case <-time.After(30 * time.Second):
					t.Errorf("%s: program still runs 30 s after the agent was killed", w.cmd)
				}
			}
		}
		node.Start()
		for i, mode := range modes {
			path := node.Path(mode + ".db")
			if after := env.Pos(path); after.TXID < before[i].TXID {
				t.Errorf("%s: position went back from %v to %v", mode, before[i], after)
			}
			next[i] = checkRows(env, path, i, ws[i].kill()) + 1
			checkDB(env, path)
		}
		node.Verify()
		if t.Failed() {
			t.Fatalf("in round %d", round)
		}
	}
	if next[0] < 10 || next[3] < 10 {
		t.Errorf("only %v rows were written: this tests nothing", next)
	}
}

// SIGTERM while programs have transactions open: the agent ends in time, with
// status 0, and nothing that they saw committed is missing.
func TestStopUnderLoad(t *testing.T) {
	r := random(t)
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	next := make([]int, len(modes))
	for i, mode := range modes {
		env.SQL(node.Path(mode+".db"), "PRAGMA journal_mode="+mode+";"+numbererSchema)
		next[i] = 1
	}
	for round := range 3 * *soak {
		var ws []*numberer
		var open []*testrig.Session
		for i, mode := range modes {
			path := node.Path(mode + ".db")
			ws = append(ws, startNumberer(env, path, "", i, next[i], r.Uint64()))
			idle := env.Session(path)
			idle.Do(".timeout 20000\nBEGIN; SELECT count(*) FROM t;")
			if mode != "wal" {
				idle.Do("COMMIT;")
			}
			half := env.Session(node.Path(name("half-%s-%d.db", mode, round)))
			half.Do("PRAGMA journal_mode=" + mode + "; CREATE TABLE t(v); PRAGMA cache_size=5; BEGIN; INSERT INTO t WITH RECURSIVE c(i) AS (VALUES(1) UNION ALL SELECT i+1 FROM c WHERE i<500) SELECT printf('%.*c',500,'h') FROM c;")
			open = append(open, idle, half)
		}
		time.Sleep(time.Duration(50+r.IntN(200)) * time.Millisecond)
		node.Stop()
		for _, s := range open {
			s.Kill()
		}
		acked := make([]int, len(ws))
		for i, w := range ws {
			acked[i] = w.kill()
		}
		node.Start()
		for i, mode := range modes {
			path := node.Path(mode + ".db")
			next[i] = checkRows(env, path, i, acked[i]) + 1
			checkDB(env, path)
			half := node.Path(name("half-%s-%d.db", mode, round))
			if got := env.SQL(half, "SELECT count(*) FROM t; PRAGMA integrity_check;"); got != "0\nok" {
				t.Errorf("%s: got %s, want no row of the transaction that was open", half, got)
			}
		}
		if t.Failed() {
			t.FailNow()
		}
	}
}
