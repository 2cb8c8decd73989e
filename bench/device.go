package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A device is where one side keeps its files.
type device struct {
	dir  string   // a folder of its own on the device
	loop string   // loop3; "" for a folder on the disk
	undo []func() // in reverse
}

func (d *device) close() {
	for i := len(d.undo) - 1; i >= 0; i-- {
		d.undo[i]()
	}
}

// newDevice makes one of a kind: disk (a folder), loop (an image of mb MB on the
// disk), slow (an image in memory whose flush takes that long).
func newDevice(ctx context.Context, kind, work, name string, mb int, flush time.Duration) (d *device, err error) {
	d = &device{dir: filepath.Join(work, name)}
	defer func() {
		if err != nil {
			d.close()
		}
	}()
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return nil, err
	}
	d.undo = append(d.undo, func() { os.RemoveAll(d.dir) })
	if kind == "disk" {
		return d, nil
	}
	image := d.dir + ".img"
	if kind == "slow" {
		if image, err = d.slowImage(ctx, mb, flush); err != nil {
			return nil, err
		}
	} else {
		d.undo = append(d.undo, func() { os.Remove(image) })
		// Allocated, so that the disk's file system has nothing to do at a write.
		if _, err := command(ctx, "fallocate", "-l", strconv.Itoa(mb<<20), image); err != nil {
			return nil, err
		}
	}
	loop, err := command(ctx, "losetup", "-f", "--show", image)
	if err != nil {
		return nil, err
	}
	d.undo = append(d.undo, func() { report(command(context.Background(), "losetup", "-d", loop)) })
	d.loop = filepath.Base(loop)
	if _, err := command(ctx, "mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0", loop); err != nil {
		return nil, err
	}
	if _, err := command(ctx, "mount", loop, d.dir); err != nil {
		return nil, err
	}
	d.undo = append(d.undo, func() { unmount(d.dir) })
	return d, nil
}

// slowImage is a file in memory behind a file system that takes its time at fsync.
func (d *device) slowImage(ctx context.Context, mb int, flush time.Duration) (string, error) {
	memory, front := d.dir+".memory", d.dir+".front"
	for _, dir := range []string{memory, front} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", err
		}
		d.undo = append(d.undo, func() { os.Remove(dir) })
	}
	if _, err := command(ctx, "mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%dm", mb+16), "bench", memory); err != nil {
		return "", err
	}
	d.undo = append(d.undo, func() { unmount(memory) })
	back := filepath.Join(memory, "img")
	if err := os.WriteFile(back, nil, 0o600); err != nil {
		return "", err
	}
	if err := os.Truncate(back, int64(mb)<<20); err != nil {
		return "", err
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	cmd := exec.Command(self, "slowflush", back, front, flush.String())
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return "", err
	}
	d.undo = append(d.undo, func() {
		_ = cmd.Process.Signal(unix.SIGTERM)
		_ = cmd.Wait()
	})
	image := filepath.Join(front, slowName)
	return image, until(ctx, 10*time.Second, "slow device", func() bool {
		_, err := os.Stat(image)
		return err == nil
	})
}

// written is what the kernel counts of a loop device. Source: the kernel's
// Documentation/block/stat.rst.
type written struct{ bytes, flushes int64 }

func (d *device) written() (w written, err error) {
	b, err := os.ReadFile("/sys/block/" + d.loop + "/stat")
	if err != nil {
		return w, err
	}
	f := strings.Fields(string(b))
	if len(f) < 16 {
		return w, fmt.Errorf("stat of %s has %d fields", d.loop, len(f))
	}
	sectors, err := strconv.ParseInt(f[6], 10, 64)
	if err != nil {
		return w, err
	}
	w.bytes = sectors * 512
	w.flushes, err = strconv.ParseInt(f[15], 10, 64)
	return w, err
}

// sync brings everything of the device's file system to it.
func (d *device) sync() error {
	f, err := os.Open(d.dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// describe says what the folder is on.
func (d *device) describe(ctx context.Context) string {
	var st unix.Statfs_t
	if err := unix.Statfs(d.dir, &st); err != nil {
		return err.Error()
	}
	source, err := command(ctx, "findmnt", "-no", "SOURCE,FSTYPE", "-T", d.dir)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%s, blocks of %d bytes", strings.Join(strings.Fields(source), " "), st.Bsize)
}

// command runs a program and returns what it printed.
func command(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, text)
	}
	return text, nil
}

func report(_ string, err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
}

// unmount waits a moment for programs that are about to leave, then lets go.
func unmount(dir string) {
	for range 50 {
		if err := unix.Unmount(dir, 0); !errors.Is(err, unix.EBUSY) {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	_ = unix.Unmount(dir, unix.MNT_DETACH)
}

// until waits for a condition.
func until(ctx context.Context, limit time.Duration, what string, ok func() bool) error {
	for start := time.Now(); !ok(); time.Sleep(500 * time.Microsecond) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if time.Since(start) > limit {
			return fmt.Errorf("%s: not there after %s", what, limit)
		}
	}
	return nil
}
