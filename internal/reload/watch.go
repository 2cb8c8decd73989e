package reload

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// lookEvery is how often Watch looks where the kernel cannot tell it of changes.
const lookEvery = 5 * time.Second

// Watch calls fn after something has changed in the folders of the files, until
// ctx ends. While nothing changes it does not wake up.
func Watch(ctx context.Context, log *slog.Logger, fn func(), paths ...string) {
	err := watch(ctx, fn, paths)
	if ctx.Err() != nil {
		return
	}
	log.Warn("changes of files are looked for every few seconds, as the kernel does not tell of them", "err", err)
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			fn()
		case <-ctx.Done():
			return
		}
	}
}

func watch(ctx context.Context, fn func(), paths []string) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return os.NewSyscallError("inotify_init", err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer f.Close()
	const events = unix.IN_CLOSE_WRITE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE | unix.IN_CREATE | unix.IN_ATTRIB
	n := 0
	for _, path := range paths {
		if path == "" {
			continue
		}
		if _, err := unix.InotifyAddWatch(fd, filepath.Dir(path), events); err != nil {
			return &os.PathError{Op: "watch", Path: filepath.Dir(path), Err: err}
		}
		n++
	}
	if n == 0 {
		<-ctx.Done()
		return nil
	}
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	fn() // what changed before the watch began
	buf := make([]byte, 4096)
	for {
		if _, err := f.Read(buf); err != nil {
			if errors.Is(err, os.ErrClosed) {
				return nil
			}
			return err
		}
		fn()
	}
}
