// Package testrig runs the built program for tests: nodes and hubs as child
// processes, sqlite3 on their mounts, helper processes, all in a mount namespace
// of their own that nothing survives.
//
// A test package calls [Main] from TestMain. What a test starts through an [Env]
// is stopped at the test's end, when the rig also verifies every database and
// looks for mounts and processes that were left.
package testrig

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// User is the uid and gid of programs that are not root.
const User = 1000

const (
	// roleEnv chooses what the test binary is: nothing, the outermost process;
	// "tests", the one that runs them; else one of the helpers.
	roleEnv = "TESTRIG_ROLE"
	// ownerEnv is in the environment of all that an Env starts: the Env's folder.
	ownerEnv = "TESTRIG_OWNER"
	// fsType is in mountinfo's line of our mounts.
	fsType = "fuse.litefs-agent"
)

var programFlag = flag.String("program", "", "test this `FILE` and do not build one")

// A Helper is a part that the test binary plays as another process. It returns
// the exit status.
type Helper func(args []string) int

// Main is what TestMain does: it runs the tests in a mount namespace with a
// /dev/fuse and a fuse.conf for everybody. It does not return.
func Main(m *testing.M, helpers map[string]Helper) {
	role := os.Getenv(roleEnv)
	if helper, ok := helpers[role]; ok {
		os.Exit(helper(os.Args[1:]))
	}
	if role == "" {
		os.Exit(inNamespace())
	}
	inherited = Mounts()
	code := 1
	if err := Furnish(); err != nil {
		fmt.Fprintln(os.Stderr, "testrig:", err)
	} else {
		code = m.Run()
	}
	if left := Mounts(); len(left) > 0 {
		fmt.Fprintln(os.Stderr, "testrig: mounts left behind:", left)
		code = 1
	}
	if workDir != "" {
		os.RemoveAll(workDir)
	}
	os.Exit(code)
}

// inNamespace runs the tests where their mounts are nobody else's.
func inNamespace() int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "testrig: these tests mount file systems: run them as root")
		return 1
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), roleEnv+"=tests")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	for _, base := range workBases() { // a test that ran out of time has not cleaned up
		left, _ := filepath.Glob(filepath.Join(base, workName(os.Getpid())+"*"))
		for _, dir := range left {
			os.RemoveAll(dir)
		}
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode()
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "testrig:", err)
		return 1
	}
	return 0
}

// Furnish makes the /run of a namespace of the test's own, with a device node
// that everybody may open, a fuse.conf that admits allow_other to ordinary users,
// and a name for [User], which fusermount3 wants.
func Furnish() error {
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("tmpfs on /run: %w", err)
	}
	const dev, conf, passwd = "/run/fuse", "/run/fuse.conf", "/run/passwd"
	if err := unix.Mknod(dev, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 229))); err != nil {
		return fmt.Errorf("mknod %s: %w", dev, err)
	}
	users, err := os.ReadFile("/etc/passwd")
	if err != nil {
		return err
	}
	if _, err := user.LookupId(fmt.Sprint(User)); err != nil {
		users = fmt.Appendf(users, "litefs-test:x:%d:%d::/nonexistent:/usr/sbin/nologin\n", User, User)
	}
	return errors.Join(os.Chmod(dev, 0o666), // whatever the umask
		os.WriteFile(conf, []byte("user_allow_other\n"), 0o644),
		os.WriteFile(passwd, users, 0o644),
		unix.Mount(dev, "/dev/fuse", "", unix.MS_BIND, ""),
		unix.Mount(conf, "/etc/fuse.conf", "", unix.MS_BIND, ""),
		unix.Mount(passwd, "/etc/passwd", "", unix.MS_BIND, ""))
}

// inherited are mounts of others, copied into this namespace.
var inherited []string

// Mounts returns the mount points of the program that the tests made.
func Mounts() []string {
	return slices.DeleteFunc(mountPoints(), func(dir string) bool { return slices.Contains(inherited, dir) })
}

func mountPoints() (dirs []string) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		panic(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, fsType) {
			dirs = append(dirs, strings.Fields(line)[4])
		}
	}
	return dirs
}

// workDir holds the program and the Envs; it is on a real disk.
var (
	workDir  string
	makeWork = sync.OnceValue(func() error {
		for _, base := range workBases() {
			var st unix.Statfs_t
			if err := unix.Statfs(base, &st); err != nil {
				continue
			}
			switch uint32(st.Type) { // 32 bits on 32-bit boards, some of them negative
			case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC:
				dir, err := os.MkdirTemp(base, workName(os.Getppid()))
				if err != nil {
					return err
				}
				workDir = dir
				return os.Chmod(dir, 0o755)
			}
		}
		return errors.New("neither TMPDIR nor /var/tmp is on ext4, xfs, f2fs or btrfs: a durability test needs a real disk")
	})
	build = sync.OnceValues(func() (string, error) {
		if err := makeWork(); err != nil {
			return "", err
		}
		root, err := moduleRoot()
		if err != nil {
			return "", err
		}
		if *programFlag != "" {
			return filepath.Abs(*programFlag)
		}
		program := filepath.Join(workDir, "litefs-agent")
		cmd := exec.Command("go", "build", "-o", program, ".")
		cmd.Dir = root
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("%s: %w\n%s", cmd, err, out)
		}
		return program, nil
	})
)

func workBases() []string { return []string{os.TempDir(), "/var/tmp"} }

// workName is how the work folder's name begins; pid is the outermost process's.
func workName(pid int) string { return fmt.Sprintf("lfse2e-%d-", pid) }

func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	for ; err == nil; dir = filepath.Dir(dir) {
		if _, statErr := os.Stat(filepath.Join(dir, "go.mod")); statErr == nil {
			return dir, nil
		} else if dir == "/" {
			return "", errors.New("no go.mod above the working folder")
		}
	}
	return "", err
}

// Program returns the path of the program under test, built once.
func Program(tb testing.TB) string {
	tb.Helper()
	program, err := build()
	if err != nil {
		tb.Fatal(err)
	}
	return program
}

// An Env is a folder on a real disk with all that a test starts there.
type Env struct {
	testing.TB
	Dir     string
	Program string

	mu       sync.Mutex
	services []*Service
}

// New makes an Env for the length of a test.
func New(tb testing.TB) *Env {
	tb.Helper()
	program := Program(tb)
	dir, err := os.MkdirTemp(workDir, "")
	if err != nil {
		tb.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil { // ordinary users must reach the mount
		tb.Fatal(err)
	}
	env := &Env{TB: tb, Dir: dir, Program: program}
	tb.Cleanup(env.close)
	return env
}

// For is the Env for a subtest: what fails there fails tb. Services belong to the
// test that made the Env.
func (env *Env) For(tb testing.TB) *Env {
	return &Env{TB: tb, Dir: env.Dir, Program: env.Program}
}

// stopTime is how long a service may take to stop.
const stopTime = 20 * time.Second

// close verifies and stops the services, and looks for what was left.
func (env *Env) close() {
	for _, s := range env.services {
		if s.Running() && !env.Failed() {
			s.Verify()
		}
	}
	for _, s := range slices.Backward(env.services) {
		s.Stop()
	}
	env.noneLeft()
	if env.Failed() {
		for _, s := range env.services {
			env.Logf("log of %s:\n%s", s.ID, tail(s.logFile, 60))
		}
	}
	for _, dir := range env.mounts() {
		env.Errorf("mount left behind: %s", dir)
		unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH)
	}
	if err := os.RemoveAll(env.Dir); err != nil {
		env.Error(err)
	}
}

// mounts are those below the Env's folder.
func (env *Env) mounts() []string {
	return slices.DeleteFunc(mountPoints(), func(dir string) bool { return !strings.HasPrefix(dir, env.Dir+"/") })
}

// noneLeft fails the test where processes of it still run, and kills them.
func (env *Env) noneLeft() {
	left := func() map[int]string { return env.processes() }
	for deadline := time.Now().Add(5 * time.Second); len(left()) > 0 && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	for pid, name := range left() {
		env.Errorf("process left behind: %d %s", pid, name)
		syscall.Kill(pid, syscall.SIGKILL)
	}
}

// processes returns those that carry the Env's mark, with their command lines.
func (env *Env) processes() map[int]string {
	found := map[int]string{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		env.Fatal(err)
	}
	mark := []byte(ownerEnv + "=" + env.Dir + "\x00")
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if environ, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "environ")); err == nil && bytes.Contains(environ, mark) {
			cmdline, _ := os.ReadFile(filepath.Join("/proc", entry.Name(), "cmdline"))
			found[pid] = strings.ReplaceAll(string(cmdline), "\x00", " ")
		}
	}
	return found
}

// Folder makes a folder of the Env that everybody may write to.
func (env *Env) Folder(name string) string {
	env.Helper()
	dir := filepath.Join(env.Dir, name)
	if err := errors.Join(os.MkdirAll(dir, 0o777), os.Chmod(dir, 0o777)); err != nil {
		env.Fatal(err)
	}
	return dir
}

// environ is what programs get: no configuration of whoever runs the tests.
func (env *Env) environ(more ...string) []string {
	vars := map[string]string{"PATH": os.Getenv("PATH") + ":/usr/sbin:/sbin", "HOME": env.Dir, "LC_ALL": "C", "TZ": "UTC", ownerEnv: env.Dir}
	for _, v := range more {
		name, value, _ := strings.Cut(v, "=")
		vars[name] = value
	}
	var list []string
	for _, name := range slices.Sorted(maps.Keys(vars)) {
		list = append(list, name+"="+vars[name])
	}
	return list
}

// Command prepares a program that dies with the tests.
func (env *Env) Command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Dir = env.Dir
	cmd.Env = env.environ()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// HelperCommand prepares the test binary in the part of one of its helpers.
func (env *Env) HelperCommand(role string, args ...string) *exec.Cmd {
	cmd := env.Command("/proc/self/exe", args...)
	cmd.Env = env.environ(roleEnv + "=" + role)
	return cmd
}

// AsUser makes cmd run as the ordinary user [User] with the given further groups.
func AsUser(cmd *exec.Cmd, groups ...uint32) *exec.Cmd {
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: User, Gid: User, Groups: groups}
	return cmd
}

// runTime is how long a program may run that a test waits for.
const runTime = 2 * time.Minute

// Output runs cmd with the given standard input and returns stdout and stderr in
// one and how it ended.
func Output(cmd *exec.Cmd, stdin string) (string, error) {
	var out bytes.Buffer
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		return "", err
	}
	timer := time.AfterFunc(runTime, func() { cmd.Process.Kill() })
	defer timer.Stop()
	err := cmd.Wait()
	return strings.TrimRight(out.String(), "\n"), err
}

// Run runs a program that must succeed and returns what it wrote.
func (env *Env) Run(name string, args ...string) string {
	env.Helper()
	return env.Must(env.Command(name, args...), "")
}

// Must runs cmd, which must succeed, and returns what it wrote.
func (env *Env) Must(cmd *exec.Cmd, stdin string) string {
	env.Helper()
	out, err := Output(cmd, stdin)
	if err != nil {
		env.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	return out
}

// Wait waits for a condition, at most for limit.
func (env *Env) Wait(limit time.Duration, what string, ok func() bool) {
	env.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			env.Fatalf("waited %v in vain: %s", limit, what)
		}
	}
}

// Exists reports whether there is a file of that name.
func Exists(name string) bool {
	_, err := os.Lstat(name)
	return !errors.Is(err, fs.ErrNotExist)
}

// tail returns the last lines of a file.
func tail(name string, n int) string {
	b, err := os.ReadFile(name)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
