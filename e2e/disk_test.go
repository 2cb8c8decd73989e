package e2e

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// A volume is a real file system on a loop device over a [device], for the data
// folder of services: the power can be cut, requests fail, room run out.
type volume struct {
	env   *testrig.Env
	fs    string // ext4, xfs, ...
	dir   string // where it is mounted
	front string // where the device's file is

	dev      *exec.Cmd
	in       io.WriteCloser
	out      *bufio.Reader
	mounted  bool
	services []*testrig.Service
}

// makers are the mkfs commands, the smallest size that each takes, and the
// Debian package of the command.
var makers = map[string]struct {
	mb   int
	args []string
}{
	"ext4":  {16, []string{"mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"}},
	"xfs":   {320, []string{"mkfs.xfs", "-q", "-f", "-K"}},
	"btrfs": {160, []string{"mkfs.btrfs", "-q", "-f", "-K"}},
	"f2fs":  {64, []string{"mkfs.f2fs", "-q", "-f", "-t", "0"}},
}

// newVolume makes a volume of mb MiB, or of the least that the file system takes.
func newVolume(env *testrig.Env, fs string, mb int) *volume {
	env.Helper()
	maker := makers[fs]
	v := &volume{env: env, fs: fs, dir: env.Folder("volume"), front: env.Folder("device")}
	v.dev = env.HelperCommand(deviceRole, v.front, strconv.Itoa(max(mb, maker.mb)<<20))
	v.dev.Stderr = os.Stderr
	in, err := v.dev.StdinPipe()
	if err != nil {
		env.Fatal(err)
	}
	out, err := v.dev.StdoutPipe()
	if err != nil {
		env.Fatal(err)
	}
	v.in, v.out = in, bufio.NewReader(out)
	if err := v.dev.Start(); err != nil {
		env.Fatal(err)
	}
	env.Cleanup(v.close)
	img := filepath.Join(v.front, deviceName)
	env.Wait(10*time.Second, "the device", func() bool { return testrig.Exists(img) })
	env.Run(maker.args[0], append(maker.args[1:], img)...)
	v.mount()
	return v
}

// node starts a node whose data folder is on the volume.
func (v *volume) node(opts testrig.Options) *testrig.Service {
	v.env.Helper()
	opts.Data = filepath.Join(v.dir, "data"+opts.ID)
	s := v.env.Node(opts)
	v.services = append(v.services, s)
	return s
}

// forTest is the volume for a subtest.
func (v *volume) forTest(env *testrig.Env) *volume {
	c := *v
	c.env = env
	return &c
}

// mount mounts what is on the device now; the file system's own recovery runs.
func (v *volume) mount() {
	v.env.Helper()
	v.env.Run("mount", "-t", v.fs, "-o", "loop", filepath.Join(v.front, deviceName), v.dir)
	v.mounted = true
}

// unmount waits for the watcher of a killed agent, which keeps the data folder
// locked for a moment. Then the loop device is gone, too.
func (v *volume) unmount() {
	v.env.Helper()
	if !v.mounted {
		return
	}
	var err error
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if err = unix.Unmount(v.dir, 0); err == nil {
			v.mounted = false
			return
		}
	}
	v.env.Errorf("unmount %s: %v", v.dir, err)
	unix.Unmount(v.dir, unix.MNT_DETACH)
	v.mounted = false
}

// tell gives the device a command and returns how many requests it refused since
// the one before.
func (v *volume) tell(command string) int {
	v.env.Helper()
	fmt.Fprintln(v.in, command)
	line, err := v.out.ReadString('\n')
	if err != nil {
		v.env.Fatalf("the device: %v", err)
	}
	n, err := strconv.Atoi(strings.TrimPrefix(strings.TrimSpace(line), "ok "))
	if err != nil {
		v.env.Fatalf("the device says %q", line)
	}
	return n
}

// The ways in which the power goes.
const (
	cutDevice = iota // the device loses its cache, at any moment
	shutDown         // the file system stops where it is and loses its own (ext4, xfs)
)

// powerOff makes the volume lose what was not flushed. From now on every request
// fails.
func (v *volume) powerOff(way int, seed uint64) {
	v.env.Helper()
	if way == cutDevice {
		v.tell(fmt.Sprint("cut ", seed))
		return
	}
	// EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN with NOLOGFLUSH. Source: the
	// kernel's fs/ext4/ext4.h, fs/xfs/xfs_fs.h.
	const goingDown, noLogFlush = 0x8004587d, 2
	dir, err := os.Open(v.dir)
	if err != nil {
		v.env.Fatal(err)
	}
	defer dir.Close()
	if err := unix.IoctlSetPointerInt(int(dir.Fd()), goingDown, noLogFlush); err != nil {
		v.env.Fatalf("shut %s down: %v", v.fs, err)
	}
}

// powerOn follows powerOff, when nobody uses the volume any more.
func (v *volume) powerOn() {
	v.env.Helper()
	v.unmount()
	v.tell("on")
	v.mount()
}

// close stops the services, which the Env would do only after the volume is gone.
func (v *volume) close() {
	v.env.Helper()
	v.tell("on")
	for _, s := range v.services {
		if s.Running() && !v.env.Failed() {
			s.Verify()
		}
		if v.env.Failed() && s.Running() {
			s.Kill() // it may have lost its disk
		} else {
			s.Stop()
		}
	}
	v.unmount()
	v.in.Close()
	if err := v.dev.Wait(); err != nil {
		v.env.Errorf("the device: %v", err)
	}
}

// room leaves so many bytes free, by a file that it makes larger or smaller.
func (v *volume) room(bytes int64) {
	v.env.Helper()
	name := filepath.Join(v.dir, "ballast")
	if err := os.RemoveAll(name); err != nil {
		v.env.Fatal(err)
	}
	// The file system needs some for itself, and services write meanwhile.
	for n := v.free() - max(bytes, 0); n > 0; n -= 64 << 10 {
		out, err := testrig.Output(v.env.Command("fallocate", "-l", strconv.FormatInt(n, 10), name), "")
		if err == nil {
			return
		}
		if !strings.Contains(out, "No space") {
			v.env.Fatalf("fallocate: %v\n%s", err, out)
		}
	}
}

// free returns the bytes that can be written.
func (v *volume) free() int64 {
	v.env.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(v.dir, &st); err != nil {
		v.env.Fatal(err)
	}
	return int64(st.Bavail) * int64(st.Bsize)
}

// The volume does what the tests take for granted: what was flushed survives a
// cut, what was not is lost in some, and a failing device fails its users.
func TestVolume(t *testing.T) {
	env := testrig.New(t)
	v := newVolume(env, "ext4", 32)
	lost, part := 0, 0
	for seed := range uint64(12) {
		path := filepath.Join(v.dir, fmt.Sprint("f", seed))
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		old, fresh := strings.Repeat("o", 64<<10), strings.Repeat("n", 64<<10)
		f.WriteString(old)
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		f.WriteAt([]byte(fresh), 0)
		if seed%3 == 0 {
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
		} else { // in the device's cache, not flushed
			if err := unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER); err != nil {
				t.Fatal(err)
			}
		}
		v.powerOff(cutDevice, seed)
		f.Close()
		v.powerOn()
		got, err := readFile(path)
		switch {
		case err != nil || len(got) != len(fresh) || strings.Trim(got, "on") != "":
			t.Errorf("seed %d: %v, %d bytes: what was flushed is lost", seed, err, len(got))
		case seed%3 == 0 && got != fresh:
			t.Errorf("seed %d: %d old bytes of a file that was flushed", seed, strings.Count(got, "o"))
		case got == old:
			lost++
		case got != fresh:
			part++
		}
	}
	if lost+part < 4 || part == 0 {
		t.Errorf("8 files that were not flushed: got %d lost, %d lost in part; want most of them", lost, part)
	}
	v.tell("fail flush")
	f, err := os.Create(filepath.Join(v.dir, "g"))
	if err != nil {
		t.Fatal(err)
	}
	f.WriteString("x")
	if err := f.Sync(); err == nil {
		t.Error("fsync on a device that cannot flush: got no error")
	}
	f.Close()
	v.unmount()
	if n := v.tell("on"); n == 0 {
		t.Error("the device refused nothing")
	}
	v.mount()
}
