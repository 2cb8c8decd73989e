// Command sqlitetests runs SQLite's own tests in a folder of the disk and at the
// mount of the real program, and compares case by case. 'make sqlite-tests' runs
// it; docs/testing.md says what the tests are.
//
// It fails where a case that passes on the disk does not pass at the mount, or is
// not reached there, unless the file differences.txt gives the reason; where an
// entry of that file has no such case any more; and where a list of results that
// is committed does not hold any more.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// inside is in the environment of the process that has a mount namespace of its own.
const inside = "SQLITETESTS_INSIDE"

// Where the namespace shows the folders of the flags, so that the ordinary user
// reaches them wherever they are.
const (
	sourceDir = "/run/sqlite"
	workDir   = "/run/work"
)

// plainDir is the folder of the disk below workDir. Its path is as long as the
// mount's, since some cases are named for the length of a path.
const plainDir = "plain-ext4"

type options struct {
	source, program, work, lists string
	only                         string
	update                       bool
	jobs                         int
	timeout                      time.Duration
}

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	var opts options
	flags := flag.NewFlagSet("sqlitetests", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&opts.source, "sqlite", "", "`FOLDER` in which SQLite's test programs were built")
	flags.StringVar(&opts.program, "agent", "", "the `PROGRAM`, litefs-agent")
	flags.StringVar(&opts.work, "work", "", "`FOLDER` for the tests, on ext4; what they print stays there")
	flags.StringVar(&opts.lists, "lists", "", "`FOLDER` of differences.txt and the lists of results")
	flags.StringVar(&opts.only, "only", "", "run only tests that match one of these `PATTERNS`, separated by commas: tcl/wal*")
	flags.BoolVar(&opts.update, "update", false, "write what the lists of results say of these tests anew")
	flags.IntVar(&opts.jobs, "jobs", runtime.NumCPU(), "run `N` tests at a time")
	flags.DurationVar(&opts.timeout, "timeout", 5*time.Minute, "time that one test may take")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if flags.NArg() > 0 || opts.source == "" || opts.program == "" || opts.work == "" || opts.lists == "" {
		fmt.Fprintln(stderr, "sqlitetests: wants -sqlite, -agent, -work and -lists, and nothing else")
		return 2
	}
	if os.Getenv(inside) == "" {
		return again(args, stdout, stderr)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ok, err := runInside(ctx, opts, stdout)
	if err != nil {
		fmt.Fprintln(stderr, "sqlitetests:", err)
	}
	if err != nil || !ok {
		return 1
	}
	return 0
}

// again runs this program in a mount namespace of its own.
func again(args []string, stdout, stderr io.Writer) int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(stderr, "sqlitetests: makes a mount namespace: run it as root")
		return 1
	}
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM) // they are the child's, which cleans up
	err := cmd.Start()
	if err == nil {
		go func() {
			for s := range signals {
				cmd.Process.Signal(s)
			}
		}()
		err = cmd.Wait()
		signal.Stop(signals)
		close(signals)
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return max(exit.ExitCode(), 1)
	} else if err != nil {
		fmt.Fprintln(stderr, "sqlitetests:", err)
		return 1
	}
	return 0
}

// runInside runs the tests on both sides. It reports whether all is as it must be.
func runInside(ctx context.Context, opts options, stdout io.Writer) (ok bool, err error) {
	known, err := readDifferences(filepath.Join(opts.lists, differencesFile))
	if err != nil {
		return false, err
	}
	if err := furnish(opts); err != nil {
		return false, err
	}
	chosen, err := choose(opts.only)
	if err != nil {
		return false, err
	}
	agent, err := startAgent(opts.program)
	if err != nil {
		return false, err
	}
	r := runner{ctx: ctx, agent: agent, timeout: opts.timeout, out: stdout}
	start := time.Now()
	disk, mount := r.runAll(chosen, opts.jobs)
	if err := errors.Join(ctx.Err(), agent.stop()); err != nil {
		return false, err
	}
	fmt.Fprintf(stdout, "%d tests on each side in %s\n", len(chosen), time.Since(start).Round(time.Second))

	problems := agent.problems()
	problems = append(problems, r.problems...)
	problems = append(problems, known.unexplained(disk, mount)...)
	if opts.only == "" {
		problems = append(problems, known.unused()...)
	}
	for name, results := range map[string]results{"ext4.txt": disk, "mount.txt": mount} {
		p, err := compareList(filepath.Join(opts.lists, name), results, opts.update)
		if err != nil {
			return false, err
		}
		problems = append(problems, p...)
	}
	for _, p := range problems {
		fmt.Fprintln(stdout, p)
	}
	fmt.Fprintf(stdout, "cases that pass: %d on ext4, %d at the mount; differences with a reason: %d; problems: %d\n",
		disk.passedN(), mount.passedN(), known.usedN(), len(problems))
	return len(problems) == 0, nil
}

// furnish prepares the namespace: what an ordinary user needs for a mount, and the
// folders at paths that this user reaches.
func furnish(opts options) error {
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make the namespace private: %w", err)
	}
	if err := os.MkdirAll(opts.work, 0o755); err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(opts.work, &st); err != nil {
		return err
	}
	if uint32(st.Type) != unix.EXT4_SUPER_MAGIC {
		return fmt.Errorf("%s is not on ext4, which the lists are of: choose another -work", opts.work)
	}
	binds := map[string]string{sourceDir: opts.source, workDir: opts.work}
	for at, dir := range binds { // before /run is another
		path, err := filepath.Abs(dir)
		if err != nil {
			return err
		}
		binds[at] = path
	}
	if err := testrig.Furnish(); err != nil {
		return err
	}
	for at, dir := range binds {
		if err := os.Mkdir(at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(dir, at, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s: %w", dir, err)
		}
	}
	for _, name := range []string{plainDir, "agent", "out"} {
		path := filepath.Join(workDir, name)
		if err := os.RemoveAll(path); err != nil {
			return err
		}
		if err := os.Mkdir(path, 0o755); err != nil {
			return err
		}
		if err := os.Chown(path, testrig.User, testrig.User); err != nil {
			return err
		}
	}
	return nil
}

// asUser makes cmd run as the ordinary user in a process group of its own.
func asUser(cmd *exec.Cmd, dir string) *exec.Cmd {
	cmd.Dir = dir
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME=" + workDir, "LC_ALL=C", "TZ=UTC"}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: testrig.User, Gid: testrig.User}, Setpgid: true, Pdeathsig: syscall.SIGKILL,
	}
	return cmd
}

// indent sets a text off from the line before it.
func indent(text string) string {
	return "    " + strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "\n    ")
}
