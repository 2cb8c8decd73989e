package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// mountError returns what the kernel says to a file system: nil if it can mount
// it. Nothing is mounted.
func mountError(t *testing.T, fs string) error {
	t.Helper()
	list, err := readFile("/proc/filesystems")
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(strings.Fields(list), fs) {
		return nil
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, fs, 0, ""); err != unix.ENODEV { // the kernel loads the module, if there is one
		return nil
	}
	return unix.ENODEV
}

// Each file system that is fit for the data folder, and that this kernel has,
// under load with the power cut: the same rules hold. What the kernel lacks is
// named with the kernel's own error; ext4, which every kernel here has, is tested
// in any case.
func TestFileSystems(t *testing.T) {
	ran := 0
	for _, fs := range []string{"ext4", "xfs", "btrfs", "f2fs"} {
		if err := mountError(t, fs); err != nil {
			t.Logf("%s is not tested: mount: %v", fs, err)
			continue
		}
		ran++
		t.Run(fs, func(t *testing.T) {
			r := random(t)
			env := testrig.New(t)
			v := newVolume(env, fs, 256)
			node := v.node(testrig.Options{Config: "[sync]\nbudget = \"8MiB\"\nflush = \"20ms\""})
			var loads []*load
			for _, mode := range modes {
				l := &load{name: mode + ".db", mode: mode, setup: []string{"PRAGMA synchronous=FULL;"}, bulk: 50000}
				l.create(env, node)
				loads = append(loads, l)
			}
			for range 2 * *soak {
				for i, l := range loads {
					l.start(env, node, i, r)
				}
				time.Sleep(time.Duration(200+r.IntN(400)) * time.Millisecond)
				v.powerOff(cutDevice, r.Uint64())
				node.Kill()
				for _, l := range loads {
					l.prog.kill()
				}
				v.powerOn()
				node.Start()
				for i, l := range loads {
					l.check(env, node, i)
				}
				node.Verify()
				if t.Failed() {
					return
				}
			}
			if warned, err := readFile(filepath.Join(node.Dir, "log")); err != nil || (fs == "btrfs") != strings.Contains(warned, "copy-on-write") {
				t.Errorf("a warning of btrfs and of no other: got %v\n%s", err, warned)
			}
		})
	}
	if ran == 0 {
		t.Error("no file system was tested")
	}
}

// A data folder on what may lose synced data is refused, with the reason and the
// cure, before anything is made there; --unsafe-data overrides.
func TestUnfitFileSystems(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{}) // whose mount is one more unfit file system
	disk := env.Folder("disk")
	mounts := []struct {
		fs, options string
		image       []string // mkfs, of a file on the disk
		reason      string
	}{
		{"tmpfs", "size=16m", nil, "gone after a power cut"},
		{"ramfs", "", nil, "gone after a power cut"},
		{"overlay", "lowerdir=" + disk + "/lower,upperdir=" + disk + "/upper,workdir=" + disk + "/work", nil, "upper layer"},
		{"vfat", "", []string{"mkfs.vfat", "-C"}, "no journal"},
		{"fuse", "", nil, "the program behind it"},
	}
	for _, d := range []string{"lower", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(disk, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range mounts {
		if m.fs != "fuse" {
			if err := mountError(t, m.fs); err != nil {
				t.Logf("%s is not tested: mount: %v", m.fs, err)
				continue
			}
		}
		t.Run(m.fs, func(t *testing.T) {
			env := env.For(t)
			dir := env.Folder("unfit-" + m.fs)
			switch {
			case m.fs == "fuse":
				dir = node.Path("data")
				if err := os.Mkdir(dir, 0o755); err != nil {
					t.Fatal(err)
				}
			case m.image != nil:
				img := filepath.Join(disk, m.fs)
				env.Run(m.image[0], append(m.image[1:], img, "16384")...)
				env.Run("mount", "-t", m.fs, "-o", "loop", img, dir)
			default:
				env.Run("mount", "-t", m.fs, "-o", "rw,"+m.options, "none", dir)
			}
			if m.fs != "fuse" {
				defer unix.Unmount(dir, unix.MNT_DETACH)
			}
			mnt := env.Folder("mnt-" + m.fs)
			config := filepath.Join(env.Dir, m.fs+".toml")
			text := name("[node]\nid = \"u\"\ndata = %q\n[mount]\ndir = %q\n[status]\nsocket = %q\n", dir+"/data", mnt, filepath.Join(env.Dir, m.fs+".sock"))
			if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			out, err := testrig.Output(env.Command(env.Program, "mount", "--config", config), "")
			if err == nil || !strings.Contains(out, m.reason) || !strings.Contains(out, "ext4") || !strings.Contains(out, dir) {
				t.Errorf("data folder on %s: got %v, %s; want the folder, the reason (%s) and the cure (ext4)", m.fs, err, out, m.reason)
			}
			if left, _ := filepath.Glob(dir + "/data/*"); len(left) > 0 {
				t.Errorf("left there: %v", left)
			}
			if m.fs == "fuse" || m.fs == "ramfs" { // which never has room, it says
				return
			}
			cmd := env.Command(env.Program, "mount", "--unsafe-data", "--config", config, "--", "sqlite3", mnt+"/a.db", "CREATE TABLE t(v); INSERT INTO t VALUES(7); SELECT v FROM t;")
			if out, err := testrig.Output(cmd, ""); err != nil || !strings.Contains(out, "may lose what was synced") || !slices.Contains(strings.Split(out, "\n"), "7") {
				t.Errorf("--unsafe-data on %s: got %v, %s; want a warning and 7", m.fs, err, out)
			}
		})
	}
}
