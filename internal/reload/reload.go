// Package reload keeps what was made of files in force, and makes it anew when
// they have changed, without a restart and without a timer.
package reload

import (
	"log/slog"
	"os"
	"sync"
	"syscall"
	"time"
)

// A Source is a value made of files. What cannot be made of a new content leaves
// the old value in force.
type Source[T any] struct {
	what  string
	paths []string
	load  func() (T, error)
	log   *slog.Logger

	mu     sync.Mutex // guards what follows
	value  T
	stamps []stamp // of what value, or err, was made of
	tried  time.Time
	err    error // why the present content is not in force
}

// retry is the pause before a content that was bad is tried again although it
// looks unchanged: a file may be written in place.
const retry = time.Second

// New makes the value for the first time; an error is that of load. what names it
// in the log. A path that is empty counts as no file.
func New[T any](what string, log *slog.Logger, load func() (T, error), paths ...string) (*Source[T], error) {
	s := &Source[T]{what: what, paths: paths, load: load, log: log}
	s.stamps = stampsOf(paths) // before the content: a change in between is noticed
	var err error
	s.value, err = load()
	s.tried = time.Now()
	return s, err
}

// Get returns the value for the files as they are now: it costs a stat of each.
func (s *Source[T]) Get() T {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lookLocked()
	return s.value
}

// Err says why the files as they are now are not in force, nil if they are.
func (s *Source[T]) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lookLocked()
	return s.err
}

func (s *Source[T]) lookLocked() {
	now := stampsOf(s.paths)
	if equal(now, s.stamps) && (s.err == nil || time.Since(s.tried) < retry) {
		return
	}
	s.stamps, s.tried = now, time.Now()
	value, err := s.load()
	before := s.err
	s.err = err
	switch {
	case err == nil:
		s.value = value
		s.log.Info(s.what + " read again")
	case before == nil || before.Error() != err.Error():
		s.log.Error(s.what+" cannot be read again: the old content stays in force", "err", err)
	}
}

// A stamp tells a content of a file from another one.
type stamp struct {
	there         bool
	ino           uint64
	size          int64
	mtime, change syscall.Timespec
}

func stampsOf(paths []string) []stamp {
	list := make([]stamp, len(paths))
	for i, path := range paths {
		if path == "" {
			continue
		}
		info, err := os.Stat(path)
		if err != nil {
			continue
		}
		sys := info.Sys().(*syscall.Stat_t)
		list[i] = stamp{there: true, ino: sys.Ino, size: info.Size(), mtime: sys.Mtim, change: sys.Ctim}
	}
	return list
}

func equal(a, b []stamp) bool {
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}
