package e2e

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// The disk fails under load: writes, flushes or everything end in EIO, or the
// file system turns read-only. What a program saw committed is there once the
// disk is mended and the agent started again; status says that something is
// wrong and what to do; nothing hangs (invariant 14).
func TestDiskErrors(t *testing.T) {
	faults := []struct {
		name   string
		begin  func(v *volume)
		device bool // requests of the device must have failed
	}{
		{"write", func(v *volume) { v.tell("fail write") }, true},
		{"flush", func(v *volume) { v.tell("fail flush") }, true},
		{"all", func(v *volume) { v.tell("fail read,write,flush") }, true},
		{"read-only", (*volume).readOnly, false},
	}
	for _, fault := range faults {
		t.Run(fault.name, func(t *testing.T) {
			r := random(t)
			env := testrig.New(t)
			v := newVolume(env, "ext4", 128)
			node := v.node(testrig.Options{Config: "[sync]\nflush = \"20ms\""})
			var loads []*load
			for _, mode := range modes {
				l := &load{name: mode + ".db", mode: mode, setup: []string{"PRAGMA synchronous=FULL;", "PRAGMA synchronous=EXTRA;"}, bulk: 60000}
				l.create(env, node)
				loads = append(loads, l)
			}
			for range *soak {
				diskError(env, v, node, loads, r, fault.begin, fault.device)
				if t.Failed() {
					return
				}
			}
		})
	}
}

func diskError(env *testrig.Env, v *volume, node *testrig.Service, loads []*load, r *rand.Rand, begin func(*volume), device bool) {
	env.Helper()
	for i, l := range loads {
		l.start(env, node, i, r)
	}
	time.Sleep(time.Duration(200+r.IntN(300)) * time.Millisecond)
	begin(v)
	// Every program meets the error and ends, by -bail.
	for _, l := range loads {
		select {
		case <-l.prog.done:
		case <-time.After(30 * time.Second):
			env.Errorf("%s: the program still writes 30 s after the disk broke", l.name)
		}
	}
	got := problems(env, node)
	if !strings.Contains(got, "restart the agent") {
		env.Errorf("status with a broken disk: got %q, want the cure", got)
	}
	if out, err := testrig.Output(node.Client("status"), ""); err == nil || !strings.Contains(out, "NOT HEALTHY") || !strings.Contains(out, "restart the agent") {
		env.Errorf("status for people: got %v\n%s", err, out)
	}
	for _, l := range loads {
		out, err := env.TrySQL(node.Path(l.name), "INSERT INTO t VALUES(99,99,'no');")
		if err == nil {
			env.Errorf("%s: a commit on a broken disk was accepted: %s", l.name, out)
		}
	}
	if refused := v.tell("on"); device && refused == 0 {
		env.Error("the device refused nothing: this tests nothing")
	}
	node.Kill() // as the operator who mends the disk: its memory is gone
	v.unmount()
	v.mount()
	node.Start()
	for i, l := range loads {
		l.check(env, node, i)
		if l.next < 2 {
			env.Errorf("%s: no transaction: this tests nothing", l.name)
		}
	}
	env.Wait(10*time.Second, "healthy on the mended disk", func() bool { return problems(env, node) == "" })
	node.Verify()
}

// readOnly makes ext4 read-only as after an error that it found itself: with
// files open for writing the kernel refuses an ordinary remount.
func (v *volume) readOnly() {
	v.env.Helper()
	if err := unix.Mount("", v.dir, "", unix.MS_REMOUNT, "abort"); err != nil {
		v.env.Fatalf("remount read-only: %v", err)
	}
	if err := os.WriteFile(filepath.Join(v.dir, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		v.env.Fatalf("on a read-only file system: got %v, want EROFS", err)
	}
}

// A flush that fails once costs nothing: the log goes on in a new segment.
func TestFlushFailsOnce(t *testing.T) {
	env := testrig.New(t)
	v := newVolume(env, "ext4", 128)
	node := v.node(testrig.Options{})
	path := node.Path("a.db")
	w := env.Session(path)
	w.Do("PRAGMA journal_mode=wal; PRAGMA synchronous=FULL; CREATE TABLE t(n);")
	rescued, acked := false, 0
	for n := 1; n <= 40; n++ {
		v.tell("fail flush once")
		if out, ok := w.Try(name("INSERT INTO t VALUES(%d);", n)); ok && out == "" {
			acked++
		} else {
			break
		}
		log, err := readFile(node.Dir + "/log")
		if err != nil {
			t.Fatal(err)
		}
		rescued = strings.Contains(log, "log moved to a new segment")
		if rescued {
			break
		}
	}
	v.tell("on")
	if !rescued {
		t.Fatal("no flush failed: this tests nothing")
	}
	for n := range 5 {
		w.Do(name("INSERT INTO t VALUES(%d);", 100+n))
		acked++
	}
	if got := problems(env, node); got != "" {
		t.Errorf("status after one failed flush: got %q, want healthy", got)
	}
	w.Close()
	v.powerOff(cutDevice, 7)
	node.Kill()
	v.powerOn()
	node.Start()
	if got, want := env.SQL(path, "SELECT count(*) FROM t; PRAGMA integrity_check;"), name("%d\nok", acked); got != want {
		t.Errorf("after power loss: got %s, want %s", got, want)
	}
}
