package e2e

import (
	"bufio"
	"encoding/json"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// A listener reads what events prints.
type listener struct {
	env   *testrig.Env
	cmd   *exec.Cmd
	lines chan map[string]any
}

// listen starts events; what happens before it listens it does not print.
func listen(env *testrig.Env, s *testrig.Service, args ...string) *listener {
	env.Helper()
	l := &listener{env: env, cmd: s.Client(append([]string{"events"}, args...)...), lines: make(chan map[string]any, 1000)}
	out, err := l.cmd.StdoutPipe()
	if err == nil {
		err = l.cmd.Start()
	}
	if err != nil {
		env.Fatal(err)
	}
	go func() { // ends with the process
		defer close(l.lines)
		scan := bufio.NewScanner(out)
		for scan.Scan() {
			var line map[string]any
			if json.Unmarshal(scan.Bytes(), &line) != nil {
				line = map[string]any{"broken": scan.Text()}
			}
			l.lines <- line
		}
	}()
	env.Cleanup(func() { l.cmd.Process.Kill() })
	return l
}

// next returns the next event of a kind, and drops those before it.
func (l *listener) next(kind string, fits func(map[string]any) bool) map[string]any {
	l.env.Helper()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case line, ok := <-l.lines:
			if !ok {
				l.env.Fatalf("events ended before %s", kind)
			}
			if line["broken"] != nil {
				l.env.Fatalf("not JSON: %s", line["broken"])
			}
			if _, err := time.Parse(time.RFC3339, line["time"].(string)); err != nil {
				l.env.Errorf("time: %v", err)
			}
			if line["event"] == kind && (fits == nil || fits(line)) {
				return line
			}
		case <-deadline:
			l.env.Fatalf("no event %s", kind)
		}
	}
}

func at(pos testrig.Pos) func(map[string]any) bool {
	return func(e map[string]any) bool { return name("%s/%s", e["txid"], e["checksum"]) == pos.String() }
}

func TestEvents(t *testing.T) {
	env := testrig.New(t)
	addr := freeAddr(t)
	hub := env.NewHub(addr, testrig.Options{Mount: true})
	hub.Start()
	node := env.Node(withHub(addr))
	path := node.Path("a.db")
	env.SQL(path, "CREATE TABLE t(v,n);")
	sameAtHub(env, node, hub, "a.db")
	mine, theirs, other := listen(env, node, "--db", "a.db"), listen(env, hub), listen(env, node)
	// They listen once an event has come.
	for _, l := range []*listener{mine, theirs, other} {
		for heard := false; !heard; {
			env.SQL(path, "INSERT INTO t VALUES(1,1);")
			select {
			case line, ok := <-l.lines:
				heard = ok && line["event"] != nil
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
	env.SQL(node.Path("b.db"), "CREATE TABLE t(v,n);")
	env.SQL(path, "INSERT INTO t VALUES(2,2);")
	pos := env.Pos(path)
	commit := mine.next("commit", at(pos))
	if commit["db"] != "a.db" || commit["epoch"] != "0" {
		t.Errorf("commit: %v", commit)
	}
	mine.next("ack", at(pos))
	if got := theirs.next("commit", at(pos)); got["db"] != "nodes/n1/a.db" || got["history"] != commit["history"] {
		t.Errorf("commit at the hub: %v", got)
	}
	theirs.next("ack", at(pos))
	other.next("commit", func(e map[string]any) bool { return e["db"] == "b.db" })

	hub.Kill()
	if link := other.next("link", nil); link["state"] != "connecting" || link["error"] == "" || link["db"] != nil || link["txid"] != nil {
		t.Errorf("link: %v", link)
	}
	hub.Start()
	theirs = listen(env, hub)
	node.Restart() // or it waits for its next try
	if link := theirs.next("link", func(e map[string]any) bool { return e["state"] == "connected" }); link["node"] != "n1" {
		t.Errorf("link at the hub: %v", link)
	}
	theirs.cmd.Process.Signal(syscall.SIGINT)
	if err := theirs.cmd.Wait(); err != nil {
		t.Errorf("events interrupted: got %v, want exit status 0", err)
	}
}
