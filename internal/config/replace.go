package config

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
)

// ReplaceFile replaces a file by data, durably and in one step: a reader finds
// the old content or the new one. The file gets mode, and the owner and group of
// owner where that is there and may be given.
func ReplaceFile(path string, data []byte, mode os.FileMode, owner string) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone once renamed
	if err := fill(f, data, mode, owner); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func fill(f *os.File, data []byte, mode os.FileMode, owner string) error {
	if info, err := os.Stat(owner); owner != "" && err == nil {
		sys := info.Sys().(*syscall.Stat_t)
		// Who is not root can give nothing away, and then owns what it may write.
		if err := f.Chown(int(sys.Uid), int(sys.Gid)); err != nil && !errors.Is(err, os.ErrPermission) {
			return err
		}
	}
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.Sync()
}
