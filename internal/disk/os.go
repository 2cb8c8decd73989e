package disk

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// osFS is a folder of the real operating system.
type osFS struct {
	root  string // set by NewOS, then constant
	block int    // of direct I/O; set by NewOS, then constant

	dirF *os.File // the open root, for syncfs and statfs; set by NewOS, then constant
}

// NewOS returns the folder root of the real file system, which must exist. It
// makes and removes an unnamed file there to find the block size.
func NewOS(root string) (FS, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("open disk %s: %w", root, err)
	}
	dir, err := os.OpenFile(root, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("open disk: %w", err)
	}
	d := &osFS{root: root, dirF: dir, block: maxBlock}
	if d.block, err = d.findBlockSize(); err != nil {
		dir.Close()
		return nil, fmt.Errorf("open disk %s: %w", root, err)
	}
	return d, nil
}

func (d *osFS) path(name string) (string, error) {
	if name == "" {
		name = "."
	}
	if !fs.ValidPath(name) {
		return "", &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
	}
	return filepath.Join(d.root, filepath.FromSlash(name)), nil
}

// retry calls op again as long as a signal interrupts it.
func retry(op func() error) error {
	for {
		if err := op(); err != unix.EINTR {
			return err
		}
	}
}

func (d *osFS) OpenFile(name string, flag int, perm os.FileMode) (File, error) {
	path, err := d.path(name)
	if err != nil {
		return nil, err
	}
	direct := flag&Direct != 0
	flag &^= Direct
	if direct {
		flag |= unix.O_DIRECT
	}
	fd := -1
	err = retry(func() (err error) {
		fd, err = unix.Open(path, flag|unix.O_CLOEXEC|unix.O_NOFOLLOW, uint32(perm.Perm()))
		return err
	})
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	f, err := newOSFile(fd, name)
	if err != nil {
		return nil, err
	}
	if direct {
		f.block = d.block
	}
	return f, nil
}

func (d *osFS) CreateTemp(dir string) (File, error) {
	path, err := d.path(dir)
	if err != nil {
		return nil, err
	}
	fd := -1
	err = retry(func() (err error) {
		fd, err = unix.Open(path, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err == nil {
		return newOSFile(fd, dir+"/(unnamed)")
	}
	// EOPNOTSUPP: the file system cannot; EISDIR: the kernel is older than 3.11.
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return nil, &fs.PathError{Op: "create unnamed file in", Path: dir, Err: err}
	}
	var random [8]byte
	rand.Read(random[:])
	path = filepath.Join(path, ".tmp-"+hex.EncodeToString(random[:]))
	err = retry(func() (err error) {
		fd, err = unix.Open(path, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return nil, &fs.PathError{Op: "create unnamed file in", Path: dir, Err: err}
	}
	f, err := newOSFile(fd, dir+"/(unnamed)")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (d *osFS) Mkdir(name string, perm os.FileMode) error {
	path, err := d.path(name)
	if err != nil {
		return err
	}
	return os.Mkdir(path, perm)
}

func (d *osFS) Remove(name string) error {
	path, err := d.path(name)
	if err != nil {
		return err
	}
	return os.Remove(path)
}

// Chmod sets the permission bits of a file or folder, whatever the umask.
func (d *osFS) Chmod(name string, mode os.FileMode) error {
	path, err := d.path(name)
	if err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

// Chtimes sets the time of the last change.
func (d *osFS) Chtimes(name string, mtime time.Time) error {
	path, err := d.path(name)
	if err != nil {
		return err
	}
	return os.Chtimes(path, time.Time{}, mtime)
}

func (d *osFS) Rename(oldname, newname string) error {
	from, err := d.path(oldname)
	if err != nil {
		return err
	}
	to, err := d.path(newname)
	if err != nil {
		return err
	}
	if err := syscall.Rename(from, to); err != nil { // os.Rename does not replace an empty folder
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

func (d *osFS) ReadDir(name string) ([]fs.DirEntry, error) {
	path, err := d.path(name)
	if err != nil {
		return nil, err
	}
	return os.ReadDir(path)
}

func (d *osFS) Stat(name string) (fs.FileInfo, error) {
	path, err := d.path(name)
	if err != nil {
		return nil, err
	}
	return os.Lstat(path)
}

func (d *osFS) SyncDir(name string) error {
	path, err := d.path(name)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	err = f.Sync()
	return errors.Join(err, f.Close())
}

func (d *osFS) SyncFS() error {
	if err := retry(func() error { return unix.Syncfs(int(d.dirF.Fd())) }); err != nil {
		return &fs.PathError{Op: "syncfs", Path: d.root, Err: err}
	}
	return nil
}

func (d *osFS) Free() (int64, error) {
	var st unix.Statfs_t
	if err := retry(func() error { return unix.Fstatfs(int(d.dirF.Fd()), &st) }); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: d.root, Err: err}
	}
	size := int64(st.Frsize)
	if size == 0 {
		size = int64(st.Bsize)
	}
	return int64(st.Bavail) * size, nil
}

func (d *osFS) BlockSize() int { return d.block }

// osFile is an open file. os.File keeps a closed descriptor from being used.
type osFile struct {
	f     *os.File
	raw   syscall.RawConn
	block int // of direct I/O; 0 for a buffered file
}

func newOSFile(fd int, name string) (*osFile, error) {
	f := os.NewFile(uintptr(fd), name)
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &osFile{f: f, raw: raw}, nil
}

// control runs op on the descriptor, again if a signal interrupts it.
func (f *osFile) control(name string, op func(fd int) error) error {
	var err error
	if cerr := f.raw.Control(func(fd uintptr) {
		err = retry(func() error { return op(int(fd)) })
	}); cerr != nil {
		return cerr
	}
	if err != nil {
		return &fs.PathError{Op: name, Path: f.f.Name(), Err: err}
	}
	return nil
}

func (f *osFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.f.ReadAt(p, off)
	if f.block != 0 && n%f.block != 0 && errors.Is(err, unix.EINVAL) {
		// os.File reads on after a short read, at an offset that direct I/O
		// refuses. Short and unaligned means that the file ends there.
		err = io.EOF
	}
	return n, err
}

func (f *osFile) WriteAt(p []byte, off int64) (int, error) { return f.f.WriteAt(p, off) }

func (f *osFile) Close() error { return f.f.Close() }

func (f *osFile) Size() (int64, error) {
	st, err := f.f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

func (f *osFile) Truncate(size int64) error { return f.f.Truncate(size) }

// Datasync calls fdatasync(2) again only when a signal came in between (EINTR):
// any other error is final for the file, as the kernel forgets it.
func (f *osFile) Datasync() error {
	return f.control("fdatasync", unix.Fdatasync)
}

func (f *osFile) Allocate(off, n int64) error {
	err := f.control("fallocate", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("%w: %w", err, errors.ErrUnsupported)
	}
	return err
}
