//go:build !nohub

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/litefs-agent/litefs-agent/internal/control"
	"github.com/litefs-agent/litefs-agent/internal/disk"
)

func newDemo(a *app) *cobra.Command {
	var link string
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "run a hub and a node here, write through SQLite, show the data at the hub",
		Long: `demo runs a hub and a node on this machine, in a temporary folder and on loopback,
writes through the sqlite3 program on the node's mount, shows the rows at the hub,
kills the hub and brings it back while writing, and shows that nothing is missing.
It needs sqlite3, and root or fusermount3. It cleans up behind itself.

Exit status 0 only if all of it held.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch link {
			case "http":
			case "mqtt":
				return errors.New("--transport mqtt: this version carries the link over HTTP only: use --transport http")
			default:
				return usagef("--transport %q: must be http or mqtt", link)
			}
			runtime.LockOSThread() // the services end with this thread, however it ends
			defer runtime.UnlockOSThread()
			ctx, stop := stopContext(cmd.Context())
			defer stop()
			return a.demo(ctx)
		},
	}
	cmd.Flags().StringVar(&link, "transport", "http", "what carries the link: `http|mqtt`")
	return cmd
}

// demoPatience is how long anything in the demo may take.
const demoPatience = 30 * time.Second

// A demo is one run: a hub and a node below dir.
type demo struct {
	a         *app
	dir, self string
	addr      string // of the hub
	hub, node *demoService
	step      int
}

// A demoService is a running hub or node.
type demoService struct {
	name  string
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has
	err   error         // of its end
}

func (a *app) demo(ctx context.Context) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if _, err := exec.LookPath("sqlite3"); err != nil {
		return errors.New("the sqlite3 program is missing: apt install sqlite3")
	}
	dir, err := demoFolder()
	if err != nil {
		return err
	}
	d := &demo{a: a, dir: dir, self: self}
	began := time.Now()
	defer func() {
		cleanErr := d.cleanUp(err != nil)
		if err = errors.Join(err, cleanErr); err == nil {
			d.say("\nAll of it held, in %s. Nothing is left behind.\n", time.Since(began).Round(100*time.Millisecond))
		}
	}()
	for _, f := range []func(context.Context) error{d.start, d.writeModes, d.showHub, d.killHub, d.compare} {
		if err := f(ctx); err != nil {
			if ctx.Err() != nil {
				err = errors.New("interrupted")
			}
			return err
		}
	}
	return nil
}

// demoFolder makes the temporary folder where the data folders may be: not on a
// tmpfs, which many a /tmp is.
func demoFolder() (string, error) {
	var errs []error
	here, _ := os.Getwd()
	for _, parent := range []string{os.TempDir(), "/var/tmp", here} {
		if _, err := disk.Check(parent); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", parent, err))
			continue
		}
		dir, err := os.MkdirTemp(parent, "litefs-demo-")
		if err == nil {
			return dir, nil
		}
		errs = append(errs, err)
	}
	return "", fmt.Errorf("no folder for the demo: set TMPDIR to one on ext4, xfs or f2fs: %w", errors.Join(errs...))
}

func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.a.stdout, format, args...) }

func (d *demo) title(format string, args ...any) {
	d.step++
	d.say("\n%d. %s\n", d.step, fmt.Sprintf(format, args...))
}

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }

// start writes the configurations and brings hub and node up.
func (d *demo) start(ctx context.Context) error {
	d.title("A hub and a node, below %s", d.dir)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	d.addr = ln.Addr().String()
	ln.Close() // the hub takes it over
	for name, text := range map[string]string{
		"hub.toml": fmt.Sprintf("[hub]\nid = \"demo-hub\"\ndata = %q\n[http]\nlisten = %q\n[archive]\nurl = \"\"\n[mount]\ndir = %q\n[status]\nsocket = %q\n",
			d.path("hub-data"), d.addr, d.path("hub"), d.path("hub.sock")),
		"node.toml": fmt.Sprintf("[node]\nid = \"demo-node\"\ndata = %q\n[hub]\nurl = %q\n[mount]\ndir = %q\n[status]\nsocket = %q\n",
			d.path("node-data"), "http://"+d.addr, d.path("node"), d.path("node.sock")),
	} {
		if err := os.WriteFile(d.path(name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	if err := d.startHub(ctx); err != nil {
		return err
	}
	if d.node, err = d.spawn("node", "mount", "--config", d.path("node.toml")); err != nil {
		return err
	}
	var status control.StatusNode
	if err := d.until(ctx, d.node, &status, func() bool {
		return status.Healthy && status.Hub.State == control.LinkConnected
	}); err != nil {
		return err
	}
	d.say("   hub   at http://%s, its mount %s\n   node  mounted at %s, connected\n", d.addr, d.path("hub"), d.path("node"))
	return nil
}

func (d *demo) startHub(ctx context.Context) (err error) {
	if d.hub, err = d.spawn("hub", "hub", "--config", d.path("hub.toml")); err != nil {
		return err
	}
	var status control.StatusHub
	return d.until(ctx, d.hub, &status, func() bool { return status.Healthy })
}

// spawn starts one of the services; its log goes to a file.
func (d *demo) spawn(name string, args ...string) (*demoService, error) {
	log, err := os.OpenFile(d.path(name+".log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(d.self, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true} // Ctrl-C is ours to handle
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &demoService{name: name, cmd: cmd, ended: make(chan struct{})}
	go func() { // ends with the service
		s.err = cmd.Wait()
		close(s.ended)
	}()
	return s, nil
}

// until asks a service for its status until done, which looks at into.
func (d *demo) until(ctx context.Context, s *demoService, into any, done func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, demoPatience)
	defer cancel()
	client := control.NewClient(d.path(s.name + ".sock"))
	for {
		raw, err := client.Status(ctx)
		if err == nil {
			err = json.Unmarshal(raw, into)
		}
		if err == nil && done() {
			return nil
		}
		select {
		case <-s.ended:
			return fmt.Errorf("the %s ended: %w", s.name, cmp.Or(s.err, errors.New("without an error")))
		case <-ctx.Done():
			return fmt.Errorf("the %s did not get ready in %s: %w", s.name, demoPatience, errors.Join(err, ctx.Err()))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// sql runs the sqlite3 program on a database at a mount, read-only at the hub's.
func (d *demo) sql(ctx context.Context, file, text string, flags ...string) (string, error) {
	args := append(append([]string{"-batch", "-bail", "-cmd", ".timeout 5000"}, flags...), file, text)
	cmd := exec.CommandContext(ctx, "sqlite3", args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("sqlite3 %s %q: %w: %s", file, text, err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(string(out)), nil
}

// demoDatabases are written in the two kinds of journal mode.
var demoDatabases = []struct{ name, mode string }{{"orders.db", "DELETE"}, {"sensors/garden.db", "WAL"}}

func (d *demo) nodeFile(name string) string { return d.path("node/" + name) }
func (d *demo) hubFile(name string) string  { return d.path("hub/nodes/demo-node/" + name) }

// writeModes writes through SQLite and waits for the hub.
func (d *demo) writeModes(ctx context.Context) error {
	d.title("Two databases, written by the sqlite3 program at the node's mount")
	if err := os.Mkdir(d.path("node/sensors"), 0o750); err != nil {
		return err
	}
	for _, db := range demoDatabases {
		for _, text := range []string{
			"PRAGMA journal_mode = " + db.mode,
			"CREATE TABLE t (id INTEGER PRIMARY KEY, at TEXT, text TEXT)",
			"BEGIN; INSERT INTO t (at, text) VALUES (datetime(), 'one'), (datetime(), 'two'); COMMIT",
			"INSERT INTO t (at, text) VALUES (datetime(), 'three')",
		} {
			d.say("   $ sqlite3 %s \"%s\"\n", d.nodeFile(db.name), text)
			if _, err := d.sql(ctx, d.nodeFile(db.name), text); err != nil {
				return err
			}
		}
		began := time.Now()
		if err := d.acked(ctx, db.name); err != nil {
			return err
		}
		d.say("   $ litefs-agent wait --db %s --acked      # the hub has it on its disk: after %s\n",
			db.name, time.Since(began).Round(100*time.Microsecond))
	}
	return nil
}

func (d *demo) acked(ctx context.Context, name string) error {
	if err := control.NewClient(d.path("node.sock")).Wait(ctx, name, 0, true, demoPatience); err != nil {
		return fmt.Errorf("%s was not acknowledged by the hub: %w", name, err)
	}
	return nil
}

// showHub shows what the hub has.
func (d *demo) showHub(ctx context.Context) error {
	d.title("The same rows, read at the hub's mount")
	for _, db := range demoDatabases {
		const query = "SELECT * FROM t"
		rows, err := d.sql(ctx, d.hubFile(db.name), query, "-readonly")
		if err != nil {
			return err
		}
		d.say("   $ sqlite3 -readonly %s \"%s\"\n%s\n", d.hubFile(db.name), query, indent(rows))
		if own, err := d.sql(ctx, d.nodeFile(db.name), query); err != nil || own != rows {
			return errors.Join(fmt.Errorf("the node has other rows in %s:\n%s", db.name, indent(own)), err)
		}
	}
	return d.status(ctx)
}

// status shows what both services say of themselves.
func (d *demo) status(ctx context.Context) error {
	for _, name := range []string{"node", "hub"} {
		cmd := exec.CommandContext(ctx, d.self, "--socket", d.path(name+".sock"), "status")
		out, err := cmd.CombinedOutput()
		d.say("\n   $ litefs-agent --socket %s status\n%s\n", d.path(name+".sock"), indent(strings.TrimSpace(string(out))))
		if err != nil {
			return fmt.Errorf("status of the %s: %w", name, err)
		}
	}
	return nil
}

func indent(text string) string {
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		lines[i] = strings.TrimRight("     "+line, " ")
	}
	return strings.Join(lines, "\n")
}

// killHub kills the hub and brings it back while both databases are written.
func (d *demo) killHub(ctx context.Context) error {
	d.title("The hub is killed (SIGKILL) and comes back, while the node goes on writing")
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := make(chan struct{})
	var writers sync.WaitGroup
	written, errs := make([]int, len(demoDatabases)), make([]error, len(demoDatabases))
	for i, db := range demoDatabases {
		writers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, errs[i] = d.sql(ctx, d.nodeFile(db.name), "INSERT INTO t (at, text) VALUES (datetime(), hex(randomblob(500)))"); errs[i] != nil {
					return
				}
				written[i]++
			}
		})
	}
	err := d.outage(ctx)
	close(stop)
	writers.Wait()
	if err := errors.Join(append(errs, err)...); err != nil {
		return err
	}
	for i, db := range demoDatabases {
		if err := d.acked(ctx, db.name); err != nil {
			return err
		}
		count, err := d.sql(ctx, d.nodeFile(db.name), "SELECT count(*) FROM t")
		if err != nil {
			return err
		}
		if want := fmt.Sprint(3 + written[i]); count != want {
			return fmt.Errorf("%s has %s rows, SQLite committed %s", db.name, count, want)
		}
		d.say("   %-18s %3d more transactions committed and acknowledged\n", db.name, written[i])
	}
	return nil
}

func (d *demo) outage(ctx context.Context) error {
	pause := func(t time.Duration) {
		select {
		case <-ctx.Done():
		case <-time.After(t):
		}
	}
	pause(500 * time.Millisecond)
	if err := d.hub.cmd.Process.Kill(); err != nil {
		return err
	}
	<-d.hub.ended
	d.hub = nil
	d.say("   killed; the node writes on\n")
	pause(1500 * time.Millisecond)
	if err := d.startHub(ctx); err != nil {
		return err
	}
	d.say("   started again\n")
	var status control.StatusNode
	if err := d.until(ctx, d.node, &status, func() bool { return status.Hub.State == control.LinkConnected }); err != nil {
		return err
	}
	d.say("   connected again\n")
	pause(300 * time.Millisecond)
	return nil
}

// compare shows that nothing is missing.
func (d *demo) compare(ctx context.Context) error {
	d.title("Nothing is missing")
	for _, db := range demoDatabases {
		var counts, positions [2]string
		var err error
		for i, file := range []string{d.nodeFile(db.name), d.hubFile(db.name)} {
			if counts[i], err = d.sql(ctx, file, "SELECT count(*) FROM t; PRAGMA integrity_check", "-readonly"); err != nil {
				return err
			}
			counts[i] = strings.ReplaceAll(counts[i], "\n", " rows, integrity ")
			b, err := os.ReadFile(file + "-pos")
			if err != nil {
				return err
			}
			positions[i] = strings.TrimSpace(string(b))
		}
		d.say("   %s\n     node  %s  %s\n     hub   %s  %s\n", db.name, positions[0], counts[0], positions[1], counts[1])
		if positions[0] != positions[1] || counts[0] != counts[1] {
			return fmt.Errorf("%s differs", db.name)
		}
		own, err := d.export(ctx, "node", db.name)
		if err != nil {
			return err
		}
		hubs, err := d.export(ctx, "hub", "nodes/demo-node/"+db.name)
		if err != nil {
			return err
		}
		if !bytes.Equal(own, hubs) {
			return fmt.Errorf("%s: the exports of node and hub differ", db.name)
		}
		d.say("     exports of both: %d bytes, the same\n", len(own))
	}
	for _, name := range []string{"node", "hub"} {
		var result control.Result
		err := control.NewClient(d.path(name+".sock")).Verify(ctx, "", result.Add)
		if err != nil {
			return fmt.Errorf("verify the %s: %w", name, err)
		}
		d.say("   verify at the %-4s: %d checked, %d problems\n", name, result.Checked, result.Problems)
		if result.Problems > 0 {
			return fmt.Errorf("the %s does not verify", name)
		}
	}
	return d.status(ctx)
}

func (d *demo) export(ctx context.Context, name, db string) ([]byte, error) {
	var b bytes.Buffer
	if err := control.NewClient(d.path(name+".sock")).Export(ctx, db, &b); err != nil {
		return nil, fmt.Errorf("export %s of the %s: %w", db, name, err)
	}
	return b.Bytes(), nil
}

// cleanUp stops the services and removes the folder. After a failure it prints
// the ends of their logs.
func (d *demo) cleanUp(failed bool) error {
	var errs []error
	for _, s := range []*demoService{d.node, d.hub} {
		if s == nil {
			continue
		}
		if failed {
			if b, err := os.ReadFile(d.path(s.name + ".log")); err == nil {
				fmt.Fprintf(d.a.stderr, "\nlog of the %s:\n%s", s.name, b[max(0, len(b)-8<<10):])
			}
		}
		if err := s.stop(); err != nil && !failed {
			errs = append(errs, fmt.Errorf("the %s did not stop cleanly: %w", s.name, err))
		}
	}
	for _, name := range []string{"node", "hub"} { // a mount that stayed must not be emptied
		if err := os.Remove(d.path(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return errors.Join(append(errs, fmt.Errorf("mount point not removed: %w", err))...)
		}
	}
	return errors.Join(append(errs, os.RemoveAll(d.dir))...)
}

// stop ends a service as systemd does.
func (s *demoService) stop() error {
	_ = s.cmd.Process.Signal(syscall.SIGTERM) // it may have ended: err says how
	select {
	case <-s.ended:
		return s.err
	case <-time.After(demoPatience):
		_ = s.cmd.Process.Kill()
		<-s.ended
		return fmt.Errorf("killed after %s", demoPatience)
	}
}
