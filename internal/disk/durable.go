package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
)

// MkdirAll makes folder name and those above it. All are durable when it
// returns nil, also those that an earlier, killed process had just made.
func MkdirAll(d FS, name string, perm os.FileMode) error {
	name = path.Clean(name)
	if name == "." {
		return nil
	}
	parent := path.Dir(name)
	if err := MkdirAll(d, parent, perm); err != nil {
		return err
	}
	if err := d.Mkdir(name, perm); err != nil {
		if !errors.Is(err, fs.ErrExist) {
			return err
		}
		st, serr := d.Stat(name)
		if serr != nil {
			return serr
		}
		if !st.IsDir() {
			return fmt.Errorf("mkdir %s: a file of that name exists: %w", name, err)
		}
	}
	return d.SyncDir(parent)
}

// WriteFileAtomic replaces file name by data. When it returns nil that is
// durable; after an error or a crash the file holds the old or the new content,
// never a mix. It uses the name with ".new" added; two calls for one name must
// not run at once.
func WriteFileAtomic(d FS, name string, data []byte) error {
	temp := name + ".new"
	err := writeFile(d, temp, data)
	if err == nil {
		err = d.Rename(temp, name)
	}
	if err != nil {
		d.Remove(temp) // best effort: the next call truncates what is left
		return fmt.Errorf("replace %s: %w", name, err)
	}
	if err := d.SyncDir(path.Dir(name)); err != nil {
		return fmt.Errorf("replace %s: %w", name, err)
	}
	return nil
}

func writeFile(d FS, name string, data []byte) error {
	f, err := d.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, 0)
	if err == nil {
		err = f.Datasync()
	}
	return errors.Join(err, f.Close())
}

// ReadFile returns the content of file name, which must not exceed limit bytes.
func ReadFile(d FS, name string, limit int64) ([]byte, error) {
	f, err := d.OpenFile(name, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > limit {
		return nil, fmt.Errorf("read %s: %d bytes, more than %d", name, size, limit)
	}
	data := make([]byte, size)
	n, err := f.ReadAt(data, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	return data[:n], nil
}
