package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// inFsync returns the file whose fsync or fdatasync the kernel carries out for
// process pid at this moment, "" if there is none.
func inFsync(pid int) string {
	line, err := readFile(fmt.Sprintf("/proc/%d/syscall", pid))
	var call, fd int // "running" is no number
	if err != nil {
		return ""
	}
	if n, _ := fmt.Sscanf(line, "%d 0x%x", &call, &fd); n != 2 || call != unix.SYS_FSYNC && call != unix.SYS_FDATASYNC {
		return ""
	}
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd))
	if err != nil {
		return ""
	}
	return path
}

// An fsyncRig is one database whose writers are killed inside the fsync of their
// commit.
type fsyncRig struct {
	env    *testrig.Env
	path   string
	target string // the file whose fsync it is
	n      int    // of rows
}

func newFsyncRig(env *testrig.Env, path, mode string) *fsyncRig {
	env.Helper()
	f := &fsyncRig{env: env, path: path, target: path}
	if mode == "wal" {
		f.target += "-wal"
	}
	env.SQL(path, "PRAGMA journal_mode="+mode+"; CREATE TABLE t(writer,n,v); CREATE INDEX i ON t(writer,n); CREATE TABLE tally(v,n);"+
		fill("tally", 60, 500)+"UPDATE tally SET n=0;")
	return f
}

// row is the transaction that makes row n: it changes a dozen pages.
func (f *fsyncRig) row() string {
	return name("BEGIN IMMEDIATE; INSERT INTO t VALUES(1,%d,printf('%%.*c',9000,'x')); UPDATE tally SET n=n+1; COMMIT;", f.n+1)
}

// kill runs one commit that is acknowledged and one whose program is killed
// inside the fsync. It returns the position between the two; also kills whoever
// is named beside. Where the program was not caught in it, caught is false.
func (f *fsyncRig) kill(sync string, also ...int) (pos testrig.Pos, caught bool) {
	f.env.Helper()
	w := f.env.Session(f.path)
	w.Do(".timeout 20000\nPRAGMA synchronous=" + sync + ";" + f.row())
	f.n++
	pos = f.env.Pos(f.path)
	ended := make(chan string, 1)
	go func() {
		out, ok := w.Try(f.row())
		ended <- fmt.Sprintln(ok, out)
	}()
	at := ""
	for deadline := time.Now().Add(10 * time.Second); at != f.target; at = inFsync(w.Pid()) {
		select {
		case out := <-ended:
			if out != "true \n" {
				f.env.Fatalf("COMMIT: %s", out)
			}
			f.n++
			w.Kill()
			return pos, false
		default:
		}
		time.Sleep(300 * time.Microsecond)
		if time.Now().After(deadline) {
			f.env.Fatalf("no fsync of %s", f.target)
		}
	}
	syscall.Kill(w.Pid(), syscall.SIGKILL)
	// The signal wakes it up to wait on: it is still inside, and will not come back.
	for at = ""; at == "" && len(ended) == 0; at = inFsync(w.Pid()) {
	}
	for _, pid := range also {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	<-ended
	w.Kill()
	return pos, at == f.target
}

// look opens the database as the next program does, and returns whether the
// transaction that was being committed is there.
func (f *fsyncRig) look() bool {
	f.env.Helper()
	last := checkRows(f.env, f.path, 1, f.n)
	if got, want := f.env.SQL(f.path, "SELECT min(n), max(n) FROM tally; PRAGMA integrity_check;"), name("%d|%d\nok", last, last); got != want {
		f.env.Errorf("row %d is there and the tally is %s: half a transaction", last, got)
	}
	committed := last > f.n
	f.n = last
	return committed
}

// A writer is killed inside the fsync of its commit, which nobody was told of. In
// the rollback modes the next program rolls it back. In WAL mode it is there, as
// SQLite recovers the WAL, unless another connection has kept the old wal-index:
// then the next writer overwrites it. As on ext4; and the position says the same.
func TestKillInFsync(t *testing.T) {
	env := testrig.New(t)
	addr := freeAddr(t)
	hub := env.NewHub(addr, testrig.Options{Mount: true})
	hub.Start()
	v := newVolume(env, "ext4", 96)
	node := v.node(withHub(addr))
	v.tell("slow 40ms") // as an SD card
	t.Run("program", func(t *testing.T) {
		for _, mode := range modes {
			for _, beside := range []bool{false, true} {
				base := name("%s-%v", mode, beside)
				t.Run(base, func(t *testing.T) {
					t.Parallel()
					env := env.For(t)
					f := newFsyncRig(env, node.Path(base+".db"), mode)
					if beside {
						r := env.Session(f.path)
						r.Do(".timeout 20000\nSELECT count(*) FROM t;")
						defer r.Close()
					}
					for round, missed := 0, 0; round < 4**soak; round++ {
						before, caught := f.kill([]string{"FULL", "EXTRA"}[round%2])
						committed := f.look()
						if !caught {
							if missed++; missed > 20**soak {
								t.Fatal("programs are not caught in their fsync")
							}
							round--
							continue
						}
						// Nobody was told. A WAL commit that its writer did not publish is taken
						// by the next opener or aborted by the agent, whoever comes first.
						if committed && (mode != "wal" || beside) {
							t.Fatalf("round %d: the transaction is committed", round)
						}
						want := before.TXID + 1
						if committed {
							want++
						}
						env.SQL(f.path, ".timeout 20000\n"+f.row())
						f.n++
						txid(env, f.path, want)
					}
					checkDB(env, f.path)
					sameAtHub(env, node, hub, base+".db")
				})
			}
		}
	})
	// And the agent with it: committed or not, but whole.
	for i, mode := range modes {
		f := newFsyncRig(env, node.Path(name("both-%d.db", i)), mode)
		for range *soak {
			before, caught := f.kill("FULL", node.Pid())
			node.Kill()
			node.Start()
			committed, after := f.look(), env.Pos(f.path)
			if !caught {
				continue
			}
			if committed != (after.TXID == before.TXID+1) || !committed && after != before {
				t.Errorf("%s: the position went from %v to %v; is it committed: %v", mode, before, after, committed)
			}
		}
		sameAtHub(env, node, hub, filepath.Base(f.path))
	}
	node.Verify()
}
