package fuse_test

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A program is another process that makes system calls on a mount. Tests never
// make them from the process that serves it.
type program struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// newProgram starts a program with the given working folder and user.
func newProgram(t testing.TB, dir string, uid uint32) *program {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"calls", dir}
	cmd.Env = append(os.Environ(), role+"=calls")
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
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &program{t: t, cmd: cmd, in: in, out: bufio.NewReader(out)}
	t.Cleanup(p.end)
	return p
}

// end ends the program, which closes its files.
func (p *program) end() {
	p.in.Close()
	p.cmd.Wait()
}

// do makes one system call and returns "ok", "ok RESULT" or the error's name.
func (p *program) do(format string, args ...any) string {
	p.t.Helper()
	p.start(format, args...)
	return p.result()
}

func (p *program) start(format string, args ...any) {
	p.t.Helper()
	if _, err := fmt.Fprintf(p.in, format+"\n", args...); err != nil {
		p.t.Fatal(err)
	}
}

func (p *program) result() string {
	p.t.Helper()
	t := time.AfterFunc(20*time.Second, func() {
		p.cmd.Process.Kill()
	})
	defer t.Stop()
	line, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatalf("the program ended: %v", err)
	}
	return strings.TrimSuffix(line, "\n")
}

// want makes system calls, each given with its result after " = ".
func (p *program) want(lines ...string) {
	p.t.Helper()
	for _, line := range lines {
		call, want, _ := strings.Cut(line, " = ")
		if got := p.do("%s", call); got != want {
			p.t.Errorf("%s: got %s, want %s", call, got, want)
		}
	}
}

// calls is the role of a program: calls DIR. Each line of standard input is one
// system call.
func calls(args []string) int {
	if args[0] != "-" {
		if err := os.Chdir("/"); err != nil {
			return 1
		}
	}
	unix.Umask(0o022)
	c := &caller{dir: args[0], fds: map[string]int{}, maps: map[string][]byte{}}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		value, err := c.call(strings.Fields(lines.Text()))
		switch {
		case err != nil:
			if no, ok := err.(syscall.Errno); ok {
				fmt.Println(unix.ErrnoName(no))
			} else {
				fmt.Println(err)
			}
		case value == "":
			fmt.Println("ok")
		default:
			fmt.Println("ok", value)
		}
	}
	return 0
}

type caller struct {
	dir  string
	fds  map[string]int
	maps map[string][]byte
}

func number(s string) int64 {
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil {
		panic(err)
	}
	return n
}

func describe(st *unix.Stat_t) string {
	return fmt.Sprintf("%o %d links=%d", st.Mode, st.Size, st.Nlink)
}

func (c *caller) call(f []string) (string, error) {
	path := func(i int) string { return c.dir + "/" + f[i] }
	fd := func(i int) int {
		n, ok := c.fds[f[i]]
		if !ok {
			return -1
		}
		return n
	}
	n := func(i int) int64 { return number(f[i]) }
	var st unix.Stat_t
	switch f[0] {
	case "open": // open SLOT NAME FLAG,FLAG [MODE]
		flags := unix.O_CLOEXEC
		for word := range strings.SplitSeq(f[3], ",") {
			flags |= map[string]int{
				"ro": unix.O_RDONLY, "wo": unix.O_WRONLY, "rw": unix.O_RDWR, "create": unix.O_CREAT, "excl": unix.O_EXCL,
				"trunc": unix.O_TRUNC, "append": unix.O_APPEND, "dir": unix.O_DIRECTORY, "tmpfile": unix.O_TMPFILE,
			}[word]
		}
		mode := uint32(0o666)
		if len(f) > 4 {
			mode = uint32(n(4))
		}
		fd, err := unix.Open(path(2), flags, mode)
		if err == nil {
			c.fds[f[1]] = fd
		}
		return "", err
	case "close":
		return "", unix.Close(fd(1))
	case "write": // write SLOT OFF TEXT
		k, err := unix.Pwrite(fd(1), []byte(f[3]), n(2))
		if err == nil && k != len(f[3]) {
			return fmt.Sprint("short ", k), nil
		}
		return "", err
	case "fill": // fill SLOT OFF BYTES
		_, err := unix.Pwrite(fd(1), make([]byte, n(3)), n(2))
		return "", err
	case "append": // append SLOT TEXT
		_, err := unix.Write(fd(1), []byte(f[2]))
		return "", err
	case "read": // read SLOT OFF N
		b := make([]byte, n(3))
		k, err := unix.Pread(fd(1), b, n(2))
		if err != nil {
			return "", err
		}
		return strconv.Quote(string(b[:k])), nil
	case "fsync":
		return "", unix.Fsync(fd(1))
	case "fallocate": // fallocate SLOT MODE OFF N
		return "", unix.Fallocate(fd(1), uint32(n(2)), n(3), n(4))
	case "fstat":
		err := unix.Fstat(fd(1), &st)
		return describe(&st), err
	case "stat":
		err := unix.Lstat(path(1), &st)
		return describe(&st), err
	case "owner":
		err := unix.Lstat(path(1), &st)
		return fmt.Sprintf("%d:%d", st.Uid, st.Gid), err
	case "mtime":
		err := unix.Lstat(path(1), &st)
		return fmt.Sprint(int64(st.Mtim.Sec)), err
	case "chmod":
		return "", unix.Chmod(path(1), uint32(n(2)))
	case "chown":
		return "", unix.Lchown(path(1), int(n(2)), int(n(3)))
	case "truncate":
		return "", unix.Truncate(path(1), n(2))
	case "ftruncate":
		return "", unix.Ftruncate(fd(1), n(2))
	case "utimes":
		return "", unix.UtimesNanoAt(unix.AT_FDCWD, path(1), []unix.Timespec{{Sec: 1}, unix.NsecToTimespec(n(2) * 1e9)}, 0)
	case "mkdir":
		return "", unix.Mkdir(path(1), uint32(n(2)))
	case "rmdir":
		return "", unix.Rmdir(path(1))
	case "unlink":
		return "", unix.Unlink(path(1))
	case "rename": // rename FROM TO FLAGS
		return "", unix.Renameat2(unix.AT_FDCWD, path(1), unix.AT_FDCWD, path(2), uint(n(3)))
	case "link":
		return "", unix.Link(path(1), path(2))
	case "symlink":
		return "", unix.Symlink(f[1], path(2))
	case "mknod":
		return "", unix.Mknod(path(1), uint32(n(2)), 0)
	case "list":
		return c.list(path(1))
	case "ioctl":
		_, err := unix.IoctlGetInt(fd(1), 0x8008f50c) // F2FS_IOC_GET_FEATURES has this shape
		return "", err
	case "seek": // seek SLOT OFF WHENCE
		k, err := unix.Seek(fd(1), n(2), int(n(3)))
		return fmt.Sprint(k), err
	case "copy": // copy FROM TO N
		k, err := unix.CopyFileRange(fd(1), nil, fd(2), nil, int(n(3)), 0)
		return fmt.Sprint(k), err
	case "getxattr":
		_, err := unix.Getxattr(path(1), "user.x", nil)
		return "", err
	case "access":
		return "", unix.Access(path(1), uint32(n(2)))
	case "statfs":
		var fs unix.Statfs_t
		err := unix.Statfs(path(1), &fs)
		return fmt.Sprint(uint64(fs.Bsize)*fs.Blocks, " ", fs.Namelen), err
	case "lock": // lock SLOT r|w|u OFF N
		kind := map[string]int16{"r": unix.F_RDLCK, "w": unix.F_WRLCK, "u": unix.F_UNLCK}[f[2]]
		return "", unix.FcntlFlock(uintptr(fd(1)), unix.F_SETLK, &unix.Flock_t{Type: kind, Start: n(3), Len: n(4)})
	case "map": // map SLOT N
		b, err := unix.Mmap(fd(1), 0, int(n(2)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		c.maps[f[1]] = b
		return "", err
	case "poke": // poke SLOT OFF TEXT
		copy(c.maps[f[1]][n(2):], f[3])
		return "", nil
	case "peek": // peek SLOT OFF N
		return strconv.Quote(string(c.maps[f[1]][n(2) : n(2)+n(3)])), nil
	case "chdir":
		return "", unix.Chdir(path(1))
	}
	return "", fmt.Errorf("unknown call %q", f)
}

func (c *caller) list(path string) (string, error) {
	d, err := os.Open(path)
	if err != nil {
		return "", err.(*os.PathError).Err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return "", err
	}
	slices.Sort(names)
	if len(names) > 20 {
		return fmt.Sprint(len(names), len(slices.Compact(names))), nil
	}
	return strings.Join(names, " "), nil
}
