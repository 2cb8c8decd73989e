package fuse_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/fuse"
)

// A server is another process that serves a mount, so that it can be killed.
type server struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// startServer starts a server as uid; first is the first line it says.
func startServer(t testing.TB, dir, method string, uid uint32, others bool) (s *server, first string) {
	t.Helper()
	other := "-"
	if others {
		other = "other"
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"serve", dir, method, other}
	cmd.Env = append(os.Environ(), role+"=serve")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if uid != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uid, Gid: uid}
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s = &server{t, cmd, in, bufio.NewReader(out)}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
		unix.Unmount(dir, unix.MNT_DETACH)
	})
	line := "time="
	for strings.HasPrefix(line, "time=") { // its log
		if line, err = s.out.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	if !strings.HasPrefix(line, "ready") {
		rest, _ := io.ReadAll(s.out)
		line += string(rest)
	}
	return s, strings.TrimSpace(line)
}

func (s *server) stop() string {
	s.t.Helper()
	s.in.Close()
	out, err := io.ReadAll(s.out)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.cmd.Wait(); err != nil {
		s.t.Errorf("server: %v\n%s", err, out)
	}
	return strings.TrimSpace(string(out))
}

func (s *server) kill() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
}

// userFolder is a folder that the ordinary user owns.
func userFolder(t testing.TB) string {
	t.Helper()
	dir := folder(t)
	if err := os.Chown(dir, ordinaryUser, ordinaryUser); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestMethods(t *testing.T) {
	for _, tc := range []struct {
		name, method, used string
		uid                uint32
		mode               string
	}{
		{"root, auto", "auto", "direct", 0, "0"},
		{"root, fusermount", "fusermount", "fusermount", 0, "0"},
		{"user, auto", "auto", "fusermount", ordinaryUser, "700"},
		{"user, fusermount", "fusermount", "fusermount", ordinaryUser, "700"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := filepath.Join(userFolder(t), "a folder")
			s, first := startServer(t, dir, tc.method, tc.uid, true)
			if want := "ready " + tc.used; first != want {
				t.Fatalf("got %s, want %s", first, want)
			}
			db := filepath.Join(dir, "app.db")
			for _, mode := range []string{"delete", "wal"} {
				got := command(t, "pragma journal_mode="+mode+"; create table if not exists t(x); insert into t values(1); select count(*) > 0 from t;", "sqlite3", db)
				if want := mode + "\n1"; got != want {
					t.Errorf("got %s, want %s", got, want)
				}
			}
			if got := s.stop(); got != "closed" {
				t.Errorf("got %s, want closed", got)
			}
			st, err := os.Stat(dir)
			if err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprintf("%o", st.Mode().Perm()); got != tc.mode {
				t.Errorf("mount point: got mode %s, want %s", got, tc.mode)
			}
		})
	}
}

func TestDiagnose(t *testing.T) {
	t.Run("user_allow_other", func(t *testing.T) {
		if err := fuseConf("# nothing\n"); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount("/etc/fuse.conf", unix.MNT_DETACH)
		s, first := startServer(t, filepath.Join(userFolder(t), "m"), "fusermount", ordinaryUser, true)
		if !strings.Contains(first, "cure: add a line user_allow_other to /etc/fuse.conf") {
			t.Errorf("got %s", first)
		}
		s.cmd.Wait()
		_, first = startServer(t, filepath.Join(userFolder(t), "m"), "fusermount", ordinaryUser, false)
		if first != "ready fusermount" {
			t.Errorf("without allow_other: got %s", first)
		}
	})
	t.Run("device", func(t *testing.T) {
		if err := os.Chmod("/dev/fuse", 0o600); err != nil {
			t.Fatal(err)
		}
		defer os.Chmod("/dev/fuse", 0o666)
		_, first := startServer(t, filepath.Join(userFolder(t), "m"), "auto", ordinaryUser, false)
		if !strings.Contains(first, "cure: chmod 0666 /dev/fuse") {
			t.Errorf("got %s", first)
		}
	})
	t.Run("direct as user", func(t *testing.T) {
		_, first := startServer(t, filepath.Join(userFolder(t), "m"), "direct", ordinaryUser, false)
		if !strings.Contains(first, "cause: mount(2) needs root") {
			t.Errorf("got %s", first)
		}
	})
	t.Run("folder of somebody else", func(t *testing.T) {
		dir := folder(t)
		_, first := startServer(t, dir, "fusermount", ordinaryUser, false)
		if !strings.Contains(first, "cure: chown it to uid 1000") {
			t.Errorf("got %s", first)
		}
	})
	t.Run("fusermount3 missing", func(t *testing.T) {
		bin, err := exec.LookPath("fusermount3")
		if err != nil {
			t.Fatal(err)
		}
		if bin, err = filepath.EvalSymlinks(bin); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("/dev/null", bin, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount(bin, unix.MNT_DETACH)
		_, first := startServer(t, filepath.Join(userFolder(t), "m"), "fusermount", ordinaryUser, false)
		if !strings.Contains(first, "cure: ") {
			t.Errorf("got %s", first)
		}
	})
	t.Run("no directory", func(t *testing.T) {
		file := filepath.Join(folder(t), "file")
		if err := os.WriteFile(file, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		_, err := fuse.Mount(context.Background(), newMemFS(), fuse.Options{Dir: file})
		if !errors.Is(err, unix.ENOTDIR) {
			t.Errorf("got %v, want %v", err, unix.ENOTDIR)
		}
	})
}

func TestMountTwice(t *testing.T) {
	_, dir := mountFS(t, newMemFS(), fuse.Options{})
	_, first := startServer(t, dir, "direct", 0, false)
	if !strings.Contains(first, "already mounted") {
		t.Errorf("got %s", first)
	}
	if got := mounts(); len(got) != 1 {
		t.Errorf("got mounts %v, want one", got)
	}
}

// TestKill kills the server under a program that has its files open, and mounts
// again on top of what is left.
func TestKill(t *testing.T) {
	for _, tc := range []struct {
		method string
		uid    uint32
	}{{"direct", 0}, {"fusermount", ordinaryUser}} {
		t.Run(tc.method, func(t *testing.T) {
			dir := filepath.Join(userFolder(t), "m")
			s, _ := startServer(t, dir, tc.method, tc.uid, true)
			old := newProgram(t, dir, 0)
			old.want("open a x.db rw,create = ok", "write a 0 hello = ok", "open s x.db-shm rw,create = ok", "ftruncate s 4096 = ok", "map s 4096 = ok")
			time.Sleep(50 * time.Millisecond) // the server has its own descriptors by now
			start := time.Now()
			s.kill()
			if took := time.Since(start); took > time.Second {
				t.Errorf("the server took %s to die", took)
			}
			old.want("fsync a = ENOTCONN", "stat y.db = ENOTCONN")
			_, first := startServer(t, dir, tc.method, tc.uid, true)
			if first != "ready "+tc.method {
				t.Fatalf("got %s", first)
			}
			fresh := newProgram(t, dir, 0)
			fresh.want("stat x.db = ENOENT", "open a x.db rw,create = ok", "write a 0 new = ok")
			old.want("fsync a = ENOTCONN")
		})
	}
}

// TestCloseInUse closes a mount under programs that use it: they get errors, not
// what they have cached, and nothing hangs.
func TestCloseInUse(t *testing.T) {
	for _, tc := range []struct {
		method string
		uid    uint32
	}{{"direct", 0}, {"fusermount", ordinaryUser}} {
		t.Run(tc.method, func(t *testing.T) {
			dir := filepath.Join(userFolder(t), "m")
			s, _ := startServer(t, dir, tc.method, tc.uid, true)
			db := filepath.Join(dir, "app.db")
			command(t, "pragma journal_mode=wal; create table t(x); insert into t values(7);", "sqlite3", db)
			p := newProgram(t, dir, 0)
			p.want("open a app.db rw = ok", "read a 0 6 = ok \"SQLite\"", "chdir . = ok")
			start := time.Now()
			got := s.stop()
			if !strings.HasSuffix(got, "closed") {
				t.Errorf("got %s, want closed", got)
			}
			if took := time.Since(start); took > 3*time.Second {
				t.Errorf("closing took %s", took)
			}
			p.want("read a 0 6 = ok \"\\x00\\x00\\x00\\x00\\x00\\x00\"", "fsync a = ENOTCONN", "fstat a = ENOTCONN")
			if left := mounts(); len(left) > 0 {
				t.Errorf("got mounts %v, want none", left)
			}
		})
	}
}

// TestCloseWithCopy closes a mount of which another mount namespace has a copy, as
// a container has: the connection must not live as long as that.
func TestCloseWithCopy(t *testing.T) {
	for _, tc := range []struct {
		method string
		uid    uint32
	}{{"direct", 0}, {"fusermount", ordinaryUser}} {
		t.Run(tc.method, func(t *testing.T) {
			dir := filepath.Join(userFolder(t), "m")
			s, _ := startServer(t, dir, tc.method, tc.uid, true)
			copied := exec.Command("sleep", "60")
			copied.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
			if err := copied.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				copied.Process.Kill()
				copied.Wait()
			}()
			root := fmt.Sprintf("/proc/%d/root", copied.Process.Pid)
			if _, err := os.Stat(filepath.Join(root, dir)); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			if got := s.stop(); !strings.HasSuffix(got, "closed") {
				t.Errorf("got %s, want closed", got)
			}
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("closing took %s", took)
			}
			if _, err := os.Stat(filepath.Join(root, dir, "x")); !errors.Is(err, syscall.ENOTCONN) {
				t.Errorf("in the copy: got %v, want %v", err, syscall.ENOTCONN)
			}
		})
	}
}

// TestUnmountedByOthers takes the mount away from outside.
func TestUnmountedByOthers(t *testing.T) {
	dir := filepath.Join(folder(t), "m")
	s, err := fuse.Mount(context.Background(), newMemFS(), fuse.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	go func() { time.Sleep(10 * time.Second); unix.Unmount(dir, unix.MNT_FORCE) }()
	if err := s.Wait(); !errors.Is(err, fuse.ErrUnmounted) {
		t.Errorf("got %v, want %v", err, fuse.ErrUnmounted)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
