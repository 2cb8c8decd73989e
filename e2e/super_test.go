package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// A hold keeps one program before or after one of its system calls.
type hold struct {
	env *testrig.Env
	pid int
	end func() // lets it go on
}

// holdAt makes program pid stop at its n-th of these calls from now on (strace's
// words), of those that name path if it is given. at is "enter" or "exit".
func holdAt(env *testrig.Env, pid int, calls string, n int, path, at string) *hold {
	env.Helper()
	args := []string{"-qq", "-p", name("%d", pid), "-o", "/dev/null", "-e", "trace=" + calls, "-e", name("inject=%s:delay_%s=60000000:when=%d", calls, at, n)}
	if path != "" {
		args = append(args, "-P", path)
	}
	cmd := env.Command("strace", args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		env.Fatal(err)
	}
	ended := false
	h := &hold{env: env, pid: pid, end: func() {
		if !ended {
			ended = true
			cmd.Process.Signal(syscall.SIGTERM) // it lets the program go
			cmd.Wait()
		}
	}}
	env.Cleanup(h.end)
	env.Wait(10*time.Second, "strace at work", func() bool {
		text, _ := readFile(name("/proc/%d/status", pid))
		return strings.Contains(text, "TracerPid:") && !strings.Contains(text, "TracerPid:\t0\n")
	})
	return h
}

// wait returns when the program has stood still in the call for a while.
func (h *hold) wait(what string, there func() bool) {
	h.env.Helper()
	h.env.Wait(20*time.Second, "the program is held at "+what, func() bool {
		for range 40 { // it is stopped at each call that is traced, but only this one lasts
			line, _ := readFile(name("/proc/%d/stat", h.pid))
			if _, rest, _ := strings.Cut(line, ") "); !strings.HasPrefix(rest, "t") || !there() {
				return false
			}
			time.Sleep(2 * time.Millisecond)
		}
		return true
	})
}

// Two databases in one transaction, and something fails at the second child: the
// disk is full at its write, does not flush at its fsync or when the
// super-journal goes, which is the commit; or the agent is killed there. All or
// nothing in both, at once, for the next programs, and after a restart. After the
// commit nothing fails: the children's unlinks need no disk (invariant 13).
func TestSuperJournalErrors(t *testing.T) {
	env := testrig.New(t)
	v := newVolume(env, "ext4", 96)
	node := v.node(testrig.Options{})
	const unlink, sync = "?unlink,unlinkat", "fdatasync"
	broken := func() { v.tell("fail read,write,flush") }
	killed := func() { node.Kill() }
	cases := []struct {
		name      string
		calls     string // that the program is held at
		n         int
		side, at  string // of the second child
		now       func()
		answer    string // to COMMIT
		committed bool
	}{
		{"fsync fails", sync, 1, "", "enter", broken, "disk I/O error", false},
		{"commit fails", unlink, 1, "", "enter", broken, "disk I/O error", false},
		{"first unlink on a broken disk", unlink, 2, "", "enter", broken, "", true},
		{"second unlink on a broken disk", unlink, 3, "", "enter", broken, "", true},
		{"killed before fsync", sync, 1, "", "enter", killed, "disk I/O error", false},
		{"killed after fsync", sync, 1, "", "exit", killed, "disk I/O error", false},
		{"killed before commit", unlink, 1, "", "enter", killed, "disk I/O error", false},
		{"killed after commit", unlink, 1, "", "exit", killed, "", true},
		{"killed between the unlinks", unlink, 2, "", "exit", killed, "", true},
	}
	for i, c := range cases {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			env := env.For(t)
			first, second := node.Path(name("first%d.db", i)), node.Path(name("second%d.db", i))
			for _, path := range []string{first, second} {
				env.SQL(path, "CREATE TABLE t(v,n);"+fill("t", 100, 200))
			}
			before := map[string]testrig.Pos{first: env.Pos(first), second: env.Pos(second)}
			w := env.Session(first)
			w.Do(name("PRAGMA synchronous=FULL; ATTACH '%s' AS b; PRAGMA b.synchronous=FULL; BEGIN; UPDATE main.t SET n=n+1000; UPDATE b.t SET n=n+1000;", second))
			path := ""
			if c.calls == sync {
				path = second
			}
			h := holdAt(env, w.Pid(), c.calls, c.n, path, c.at)
			answer := make(chan string, 1)
			go func() {
				out, _ := w.Try("COMMIT;")
				answer <- out
			}()
			h.wait(c.name, func() bool {
				mj, _ := filepath.Glob(first + "-mj*")
				gone := c.calls == unlink && (c.n > 1 || c.at == "exit")
				return gone == (len(mj) == 0)
			})
			if len(answer) > 0 {
				t.Fatalf("COMMIT was not held: %s", <-answer)
			}
			c.now()
			h.end()
			if got := <-answer; c.answer == "" && got != "" || !strings.Contains(got, c.answer) {
				t.Errorf("COMMIT: got %q, want %q", got, c.answer)
			}
			check := func(when, disk string) {
				t.Helper()
				for _, path := range []string{first, second} {
					want := "5050"
					if c.committed {
						want = "105050"
					}
					got, err := env.TrySQL(path, "SELECT sum(n) FROM t; PRAGMA integrity_check;")
					if err != nil && !c.committed && disk == "broken" && strings.Contains(got, "disk I/O error") {
						continue // the journal is hot, and nothing can be written
					}
					if err != nil || got != want+"\nok" {
						t.Errorf("%s, %s: got %s, want %s", when, filepath.Base(path), got, want)
					}
					if after := env.Pos(path); (after != before[path]) != c.committed || c.committed && after.TXID != before[path].TXID+1 {
						t.Errorf("%s, %s: position went from %v to %v; committed: %v", when, filepath.Base(path), before[path], after, c.committed)
					}
				}
			}
			if node.Running() {
				check("on the broken disk", "broken")
				node.Kill()
				v.powerOn()
			}
			w.Kill()
			node.Start()
			check("after the kill", "")
			node.Stop()
			node.Start()
			check("after another start", "")
			for _, path := range []string{first, second} {
				env.SQL(path, "INSERT INTO t VALUES('on',1);")
			}
		})
	}
	t.Run("second-child-on-a-full-disk", func(t *testing.T) {
		env := env.For(t)
		v := v.forTest(env)
		first, second := node.Path("small.db"), node.Path("large.db")
		for _, path := range []string{first, second} {
			env.SQL(path, "CREATE TABLE t(v,n);"+fill("t", 100, 200))
		}
		before := map[string]testrig.Pos{first: env.Pos(first), second: env.Pos(second)}
		w := env.Session(first)
		// Without spilling, all that the second child writes it writes in COMMIT.
		w.Do(name("ATTACH '%s' AS b; PRAGMA cache_spill=0; PRAGMA b.cache_size=-64000; BEGIN; UPDATE main.t SET n=n+1000; UPDATE b.t SET n=n+1000; INSERT INTO b.t SELECT randomblob(20000),0 FROM b.t;", second))
		v.room(1500 << 10)
		if got, _ := w.Try("COMMIT;"); !strings.Contains(got, "full") {
			t.Errorf("COMMIT on a full disk: got %q, want full", got)
		}
		w.Try("ROLLBACK;")
		check := func(when string) {
			t.Helper()
			for _, path := range []string{first, second} {
				if got := env.SQL(path, "SELECT sum(n), count(*) FROM t; PRAGMA integrity_check;"); got != "5050|100\nok" {
					t.Errorf("%s, %s: got %s, want 5050|100", when, filepath.Base(path), got)
				}
				if after := env.Pos(path); after != before[path] {
					t.Errorf("%s, %s: position went from %v to %v", when, filepath.Base(path), before[path], after)
				}
			}
		}
		check("on the full disk")
		w.Kill()
		check("reopened")
		v.room(60 << 20)
		node.Restart()
		check("after the kill")
	})
}
