package fuse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const deviceFile = "/dev/fuse"

// attach mounts at dir and returns the descriptor of the connection.
func attach(ctx context.Context, dir string, opt Options) (fd int, method string, err error) {
	var methods []string
	switch {
	case opt.Method == MethodDirect || opt.Method == MethodFusermount:
		methods = []string{opt.Method}
	case opt.Method != MethodAuto:
		return -1, "", fmt.Errorf("mount: unknown method %q", opt.Method)
	case os.Geteuid() == 0:
		methods = []string{MethodDirect, MethodFusermount}
	default:
		methods = []string{MethodFusermount, MethodDirect}
	}
	var errs []error
	for _, method := range methods {
		if method == MethodDirect {
			fd, err = attachDirect(dir, opt)
		} else {
			fd, err = attachFusermount(ctx, dir, opt)
		}
		if err == nil {
			return fd, method, nil
		}
		errs = append(errs, err)
	}
	return -1, "", errors.Join(errs...)
}

func attachDirect(dir string, opt Options) (int, error) {
	fd, err := unix.Open(deviceFile, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &AttachError{Method: MethodDirect, Op: "open " + deviceFile, Err: err}
	}
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d,max_read=%d,default_permissions",
		fd, os.Geteuid(), os.Getegid(), maxWrite)
	if opt.AllowOther {
		data += ",allow_other"
	}
	if err := unix.Mount(fsName, dir, "fuse."+fsName, unix.MS_NOSUID|unix.MS_NODEV, data); err != nil {
		unix.Close(fd)
		return -1, &AttachError{Method: MethodDirect, Op: "mount " + dir, Err: err}
	}
	return fd, nil
}

// AttachError is a failed attempt to mount, before [Diagnose] has looked at it.
type AttachError struct {
	Method string
	Op     string
	Err    error
	Stderr string // what fusermount3 said
}

func (e *AttachError) Error() string {
	if e.Stderr != "" {
		return fmt.Sprintf("%s: %s: %v", e.Op, e.Stderr, e.Err)
	}
	return fmt.Sprintf("%s: %v", e.Op, e.Err)
}

func (e *AttachError) Unwrap() error { return e.Err }

// fusermount returns the path of fusermount3.
func fusermount() (string, error) {
	if path, err := exec.LookPath("fusermount3"); err == nil {
		return path, nil
	}
	for _, path := range []string{"/usr/bin/fusermount3", "/bin/fusermount3"} {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return exec.LookPath("fusermount3")
}

// attachFusermount lets the setuid program mount. It sends the descriptor over
// the socket that _FUSE_COMMFD names.
func attachFusermount(ctx context.Context, dir string, opt Options) (int, error) {
	fail := func(err error, stderr []byte) (int, error) {
		return -1, &AttachError{
			Method: MethodFusermount, Op: "fusermount3 " + dir, Err: err,
			Stderr: strings.TrimSpace(string(stderr)),
		}
	}
	bin, err := fusermount()
	if err != nil {
		return fail(err, nil)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fail(err, nil)
	}
	defer unix.Close(pair[0])
	theirs := os.NewFile(uintptr(pair[1]), "fusermount3")
	defer theirs.Close()

	options := fmt.Sprintf("fsname=%s,subtype=%s,max_read=%d,default_permissions", fsName, fsName, maxWrite)
	if opt.AllowOther {
		options += ",allow_other"
	}
	cmd := exec.CommandContext(ctx, bin, "-o", options, "--", dir)
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	cmd.ExtraFiles = []*os.File{theirs}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fail(err, stderr.Bytes())
	}
	fd, err := receiveFd(pair[0])
	if err != nil {
		return fail(err, stderr.Bytes())
	}
	return fd, nil
}

// receiveFd takes the one descriptor that was sent to a socket.
func receiveFd(socket int) (int, error) {
	var b [8]byte
	oob := make([]byte, unix.CmsgSpace(4))
	_, oobN, _, _, err := unix.Recvmsg(socket, b[:], oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
	if err != nil {
		return -1, fmt.Errorf("receive the descriptor: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobN])
	if err != nil {
		return -1, fmt.Errorf("receive the descriptor: %w", err)
	}
	if len(messages) != 1 {
		return -1, errors.New("receive the descriptor: none came")
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1, errors.Join(errors.New("receive the descriptor: not one descriptor"), err)
	}
	return fds[0], nil
}

// detach unmounts dir; lazily, also while it is in use, which is EBUSY
// otherwise.
func detach(dir, method string, lazily bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazily {
		flags |= unix.MNT_DETACH
	}
	if method == MethodDirect {
		if err := unix.Unmount(dir, flags); err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		return nil
	}
	bin, err := fusermount()
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	args := []string{"-u"}
	if lazily {
		args = append(args, "-z")
	}
	out, err := exec.Command(bin, append(args, "--", dir)...).CombinedOutput()
	if err == nil {
		return nil
	}
	text := strings.TrimSpace(string(out))
	if strings.Contains(text, unix.EBUSY.Error()) || strings.Contains(text, "Device or resource busy") {
		err = unix.EBUSY
	}
	return fmt.Errorf("unmount %s: %s: %w", dir, text, err)
}

// statWait bounds how long a live mount may take to answer.
const statWait = 5 * time.Second

// clearStale takes away mounts at dir whose process is gone. A mount that lives
// is ErrMounted.
func clearStale(ctx context.Context, dir string, log *slog.Logger) error {
	for range 16 { // one may lie on another
		answer := make(chan error, 1)
		go func() {
			// Not stat, which the kernel answers for a dead mount, too.
			var st unix.Statfs_t
			answer <- unix.Statfs(dir, &st)
		}()
		var err error
		select {
		case err = <-answer:
		case <-time.After(statWait):
			return fmt.Errorf("mount %s: %w, and does not answer", dir, ErrMounted)
		case <-ctx.Done():
			return fmt.Errorf("mount %s: %w", dir, ctx.Err())
		}
		if !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED) {
			kind := mountedAt(dir)
			if strings.HasPrefix(kind, "fuse") {
				return fmt.Errorf("mount %s: %w (%s)", dir, ErrMounted, kind)
			}
			return nil
		}
		log.Warn("clearing a dead mount away", "path", dir)
		if err := detach(dir, MethodDirect, true); err != nil {
			if err := detach(dir, MethodFusermount, true); err != nil {
				return fmt.Errorf("clear the dead mount: %w", err)
			}
		}
	}
	return fmt.Errorf("mount %s: too many dead mounts there", dir)
}

// mountedAt returns the file system type of the topmost mount whose mount point
// is dir, "" if there is none.
func mountedAt(dir string) (kind string) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	for line := range strings.Lines(string(b)) {
		left, right, ok := strings.Cut(line, " - ")
		fields := strings.Fields(left)
		if !ok || len(fields) < 5 || unescape(fields[4]) != dir {
			continue
		}
		kind, _, _ = strings.Cut(right, " ")
	}
	return kind
}

// unescape decodes the \ooo of mountinfo.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// makeMountPoint makes dir. The bare folder is closed to everybody, so that no
// program makes a database there while nothing is mounted; fusermount3 needs it
// to be writable by an ordinary user.
func makeMountPoint(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return fmt.Errorf("make mount point: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make mount point: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return fmt.Errorf("mount point %s: %w", dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return fmt.Errorf("mount point %s: %w", dir, unix.ENOTDIR)
	}
	mode := uint32(0o700)
	if os.Geteuid() == 0 {
		mode = 0
	}
	if int(st.Uid) != os.Geteuid() {
		return nil // not ours to change; mounting tells whether it works
	}
	if err := unix.Chmod(dir, mode); err != nil {
		return fmt.Errorf("mount point: %w", err)
	}
	return nil
}
