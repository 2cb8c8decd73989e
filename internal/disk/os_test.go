package disk_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"unsafe"

	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/simdisk"
)

func newOS(t testing.TB) (disk.FS, string) {
	t.Helper()
	dir := t.TempDir()
	d, err := disk.NewOS(dir)
	if err != nil {
		t.Fatal(err)
	}
	return d, dir
}

func open(t testing.TB, d disk.FS, name string, flag int) disk.File {
	t.Helper()
	f, err := d.OpenFile(name, flag, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestOSFile(t *testing.T) {
	d, _ := newOS(t)
	f := open(t, d, "a", os.O_RDWR|os.O_CREATE)
	if _, err := f.WriteAt([]byte("hello"), 3); err != nil {
		t.Fatal(err)
	}
	if err := f.Datasync(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 10)
	n, err := f.ReadAt(buf, 0)
	if n != 8 || err != io.EOF || string(buf[:n]) != "\x00\x00\x00hello" {
		t.Fatalf("ReadAt = %d, %v, %q", n, err, buf[:n])
	}
	if err := f.Truncate(4); err != nil {
		t.Fatal(err)
	}
	if size, err := f.Size(); size != 4 || err != nil {
		t.Fatalf("Size = %d, %v, want 4", size, err)
	}
	if err := f.Allocate(0, 1<<16); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		t.Fatal(err)
	}
	if size, _ := f.Size(); size != 4 {
		t.Fatalf("size after Allocate = %d, want 4", size)
	}
	if _, err := d.OpenFile("../x", os.O_RDONLY, 0); !errors.Is(err, fs.ErrInvalid) {
		t.Fatalf("open ../x = %v, want ErrInvalid", err)
	}
	if err := d.SyncFS(); err != nil {
		t.Fatal(err)
	}
	if free, err := d.Free(); free <= 0 || err != nil {
		t.Fatalf("Free = %d, %v", free, err)
	}
}

// A folder replaces an empty folder, as rename(2) has it, on both disks.
func TestRenameFolder(t *testing.T) {
	d, _ := newOS(t)
	t.Run("os", func(t *testing.T) { renameFolder(t, d) })
	t.Run("simulated", func(t *testing.T) { renameFolder(t, simdisk.New(simdisk.Options{})) })
}

func renameFolder(t *testing.T, d disk.FS) {
	for _, name := range []string{"from", "from/f", "empty", "full", "full/f"} {
		if err := d.Mkdir(name, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		to   string
		want error
	}{{"full", syscall.ENOTEMPTY}, {"from/f/g", syscall.EINVAL}, {"empty", nil}} {
		if err := d.Rename("from", tc.to); !errors.Is(err, tc.want) {
			t.Errorf("rename to %s: got %v, want %v", tc.to, err, tc.want)
		}
	}
	if list, err := d.ReadDir("empty"); err != nil || len(list) != 1 || list[0].Name() != "f" {
		t.Errorf("the replaced folder holds %v (%v), want f", list, err)
	}
	if _, err := d.ReadDir("from"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the old name: got %v, want ErrNotExist", err)
	}
}

func TestOSTempFileHasNoName(t *testing.T) {
	d, dir := newOS(t)
	f, err := d.CreateTemp(".")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("x"), 1<<20); err != nil {
		t.Fatal(err)
	}
	if list, _ := os.ReadDir(dir); len(list) != 0 {
		t.Fatalf("folder holds %v, want nothing", list)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestOSDirect(t *testing.T) {
	d, _ := newOS(t)
	block := d.BlockSize()
	if block < 512 || block > 4096 || block&(block-1) != 0 {
		t.Fatalf("BlockSize = %d", block)
	}
	f, err := d.OpenFile("a", os.O_RDWR|os.O_CREATE|disk.Direct, 0o600)
	if errors.Is(err, syscall.EINVAL) {
		t.Log("no direct I/O here")
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := disk.AlignedBuffer(2*block, block)
	copy(buf, bytes.Repeat([]byte("ab"), block))
	if _, err := f.WriteAt(buf[:block], int64(block)); err != nil {
		t.Fatalf("direct write of one block: %v", err)
	}
	// A file that ends within a block still reads, and ends with EOF.
	if err := f.Truncate(int64(block) + 7); err != nil {
		t.Fatal(err)
	}
	n, err := f.ReadAt(buf, 0)
	if n != block+7 || err != io.EOF {
		t.Fatalf("ReadAt = %d, %v, want %d, EOF", n, err, block+7)
	}
}

func TestAlignedBuffer(t *testing.T) {
	for _, align := range []int{1, 512, 4096} {
		for range 20 {
			b := disk.AlignedBuffer(1000, align)
			if got := uintptr(unsafe.Pointer(&b[0])) % uintptr(align); got != 0 || len(b) != 1000 || cap(b) != 1000 {
				t.Fatalf("align %d: rest %d, len %d, cap %d", align, got, len(b), cap(b))
			}
		}
	}
}

func TestMkdirAllAndWriteFileAtomic(t *testing.T) {
	d, dir := newOS(t)
	for range 2 {
		if err := disk.MkdirAll(d, "a/b/c", 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, text := range []string{"one", "two"} {
		if err := disk.WriteFileAtomic(d, "a/b/c/f", []byte(text)); err != nil {
			t.Fatal(err)
		}
		got, err := disk.ReadFile(d, "a/b/c/f", 10)
		if string(got) != text || err != nil {
			t.Fatalf("ReadFile = %q, %v, want %q", got, err, text)
		}
	}
	if list, _ := os.ReadDir(filepath.Join(dir, "a/b/c")); len(list) != 1 {
		t.Fatalf("folder holds %v, want one file", list)
	}
	if err := disk.MkdirAll(d, "a/b/c/f/g", 0o700); err == nil {
		t.Fatal("MkdirAll through a file succeeded")
	}
	if _, err := disk.ReadFile(d, "a/b/c/f", 2); err == nil {
		t.Fatal("ReadFile beyond its limit succeeded")
	}
}

func TestCheck(t *testing.T) {
	rep, err := disk.Check(t.TempDir())
	if rep.Fit != (err == nil) || rep.Name == "" {
		t.Fatalf("Check = %+v, %v", rep, err)
	}
	rep, err = disk.Check("/proc")
	if !errors.Is(err, disk.ErrUnfit) || rep.Fit || rep.Cure == "" {
		t.Fatalf("Check(/proc) = %+v, %v, want ErrUnfit with a cure", rep, err)
	}
	if _, err := disk.Check("/nowhere"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("Check(/nowhere) = %v", err)
	}
	if rep, err := disk.Check("/dev/shm"); err == nil || rep.Name != "tmpfs" {
		t.Logf("Check(/dev/shm) = %+v, %v", rep, err)
	}
}
