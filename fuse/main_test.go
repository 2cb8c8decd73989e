package fuse_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/fuse"
	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// ordinaryUser is the uid and gid of tests that are not root.
const ordinaryUser = testrig.User

// The test binary plays several parts, chosen by this variable: itself in a
// mount namespace of its own ("tests"), a program on the mount ("calls"), a
// server that can be killed ("serve").
const role = "FUSE_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(role) {
	case "":
		os.Exit(inNamespace())
	case "tests":
		inherited = mounts()
		os.Setenv("GORACE", "atexit_sleep_ms=0") // of the programs: else each takes a second to end
		if err := testrig.Furnish(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		code := m.Run()
		if left := mounts(); len(left) > 0 {
			fmt.Fprintln(os.Stderr, "mounts left behind:", left)
			code = 1
		}
		os.Exit(code)
	case "calls":
		os.Exit(calls(os.Args[1:]))
	case "serve":
		os.Exit(serve(os.Args[1:]))
	case "asuser":
		os.Exit(m.Run())
	}
}

// inNamespace runs the tests where their mounts are nobody else's.
func inNamespace() int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests mount file systems: run them as root")
		return 1
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), role+"=tests")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// fuseConf replaces /etc/fuse.conf in this namespace.
func fuseConf(text string) error {
	f, err := os.CreateTemp("/run", "fuse.conf")
	if err != nil {
		return err
	}
	if _, err := f.WriteString(text); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return unix.Mount(f.Name(), "/etc/fuse.conf", "", unix.MS_BIND, "")
}

// inherited are mounts of others, copied into this namespace.
var inherited []string

// mounts returns the mount points of our mounts.
func mounts() (dirs []string) {
	b, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(b)) {
		dir := strings.Fields(line)[4]
		if strings.Contains(line, "fuse.litefs-agent") && !slices.Contains(inherited, dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// folder makes a folder in which everybody may look for the mount point.
func folder(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "fuse-test-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// mountFS mounts fs for the length of a test.
func mountFS(t testing.TB, fs *memFS, opt fuse.Options) (*fuse.Server, string) {
	t.Helper()
	if opt.Dir == "" {
		opt.Dir = filepath.Join(folder(t), "mnt")
	}
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.NewTextHandler(testWriter{t}, nil))
	}
	s, err := fuse.Mount(context.Background(), fs, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := s.Wait(); err != nil {
			t.Error(err)
		}
	})
	return s, opt.Dir
}

// command runs a program as root and returns what it wrote.
func command(t testing.TB, stdin string, name string, args ...string) string {
	t.Helper()
	out, err := try(stdin, name, args...)
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return out
}

func try(stdin string, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return strings.TrimSpace(out.String()), err
}

// serve is the role of a server: serve DIR METHOD. It says "ready" and serves
// until its standard input ends.
func serve(args []string) int {
	fs := newMemFS()
	fs.root.mode = 0o777
	s, err := fuse.Mount(context.Background(), fs, fuse.Options{
		Dir: args[0], Method: args[1], AllowOther: args[2] == "other",
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("ready", s.Method())
	io.Copy(io.Discard, os.Stdin)
	if err := s.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("closed")
	return 0
}
