// Package service is what a node and a hub have in common: the data folder, the
// engine over it, the mount, and the answers to the commands.
package service

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/internal/config"
	"github.com/litefs-agent/litefs-agent/internal/disk"
)

// A Data is an open data folder: private, on a file system that keeps its
// promises, and locked against a second service.
type Data struct {
	Dir  string
	FS   disk.FS
	lock *os.File
}

// OpenData makes the folder where it is missing, checks the file system, and
// locks it. unsafe accepts a file system that may lose what was synced.
func OpenData(dir string, unsafe bool, log *slog.Logger) (*Data, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	report, err := disk.Check(dir)
	switch {
	case errors.Is(err, disk.ErrUnfit) && unsafe:
		log.Warn("data folder is on a file system that may lose what was synced", "dir", dir, "fs", report.Name)
	case errors.Is(err, disk.ErrUnfit):
		return nil, fmt.Errorf("data folder %s: %w", dir, err)
	case err != nil:
		return nil, fmt.Errorf("data folder %s: %w", dir, err)
	case report.Warning != "":
		log.Warn("data folder: "+report.Warning, "dir", dir, "cure", report.Cure)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	if err := lockFor(lock, lockWait); err != nil {
		lock.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("data folder %s: another service has it open: stop that first, or set another data folder", dir)
		}
		return nil, fmt.Errorf("lock data folder %s: %w", dir, err)
	}
	fs, err := disk.NewOS(dir)
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("data folder %s: %w", dir, err)
	}
	return &Data{Dir: dir, FS: fs, lock: lock}, nil
}

// lockWait is how long the watcher of an agent that was killed may need to take
// programs off the dead mount; it holds the lock as long.
const lockWait = 3 * time.Second

func lockFor(f *os.File, wait time.Duration) error {
	deadline := time.Now().Add(wait)
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || !errors.Is(err, syscall.EWOULDBLOCK) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// LockFile is the locked file: who holds a copy of its descriptor keeps the data
// folder locked.
func (d *Data) LockFile() *os.File { return d.lock }

// Close gives the lock back.
func (d *Data) Close() error { return d.lock.Close() }

// ID returns the id kept in the folder. Where there is none it keeps configured,
// or else what fallback makes. A configured id that differs from the kept one
// is an error: the hub knows this folder by the old one.
func (d *Data) ID(configured string, fallback func() (string, error)) (string, error) {
	const name = "id"
	b, err := disk.ReadFile(d.FS, name, 1024)
	kept := strings.TrimSpace(string(b))
	switch {
	case err == nil && configured != "" && configured != kept:
		return "", fmt.Errorf("the data folder is of node %q, the configuration says %q: set id = %q, or start with an empty data folder", kept, configured, kept)
	case err == nil && config.ValidID(kept):
		return kept, nil
	case err == nil:
		return "", fmt.Errorf("%s holds no id: write the node's id into it", filepath.Join(d.Dir, name))
	case !errors.Is(err, os.ErrNotExist):
		return "", err
	}
	id := configured
	if id == "" {
		if id, err = fallback(); err != nil {
			return "", err
		}
	}
	return id, disk.WriteFileAtomic(d.FS, name, []byte(id+"\n"))
}
