package fuse

import (
	"errors"
	"log/slog"
	"sync"
	"syscall"
	"time"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"

	"github.com/litefs-agent/litefs-agent/store"
)

// errnos says which errno a store error becomes. The first row that matches wins.
var errnos = []struct {
	err error
	no  syscall.Errno
}{
	{store.ErrNotExist, syscall.ENOENT},
	{store.ErrExist, syscall.EEXIST},
	{store.ErrNotDir, syscall.ENOTDIR},
	{store.ErrIsDir, syscall.EISDIR},
	{store.ErrNotEmpty, syscall.ENOTEMPTY},
	// EACCES at CREATE of a journal makes SQLite say SQLITE_READONLY; EROFS and
	// EPERM would make it SQLITE_CANTOPEN.
	{store.ErrReplica, syscall.EACCES},
	{store.ErrRefused, syscall.EACCES},
	{store.ErrOverwrite, syscall.EACCES},
	{store.ErrReserved, syscall.EACCES},
	{store.ErrBusy, syscall.EBUSY},
	{store.ErrFenced, syscall.EIO},
	{store.ErrStale, syscall.ESTALE},
	{store.ErrCrossing, syscall.EPERM},
}

// errno returns what err is to the caller of a system call; known is false for
// an error that nobody gave a meaning, which is EIO.
//
// ENOSYS never leaves here: to the kernel it says that the whole mount lacks the
// operation, for good.
func errno(err error) (no syscall.Errno, known bool) {
	if err == nil {
		return 0, true
	}
	for _, row := range errnos {
		if errors.Is(err, row.err) {
			return row.no, true
		}
	}
	if errors.As(err, &no) && no != 0 && no != syscall.ENOSYS {
		return no, true
	}
	return syscall.EIO, false
}

// status is errno for a reply; an unknown error is logged.
func (m *rawFS) status(op string, ino *inode, err error) gofuse.Status {
	if err == nil {
		return gofuse.OK
	}
	no, known := errno(err)
	if !known {
		name := ""
		if ino != nil {
			name, _ = m.nodes.pathOf(ino)
		}
		m.faults.log(m.log, "request failed", "op", op, "path", name, "err", err)
	}
	return gofuse.Status(no)
}

// A limiter logs a repeating fault at once, then at most every 30 s with the
// number of those it kept quiet.
type limiter struct {
	mu    sync.Mutex // guards last and quiet
	last  time.Time
	quiet int
}

func (l *limiter) log(log *slog.Logger, msg string, args ...any) {
	l.mu.Lock()
	if !l.last.IsZero() && time.Since(l.last) < 30*time.Second {
		l.quiet++
		l.mu.Unlock()
		return
	}
	if l.quiet > 0 {
		args = append(args, "n", l.quiet+1)
	}
	l.last, l.quiet = time.Now(), 0
	l.mu.Unlock()
	log.Error(msg, args...)
}
