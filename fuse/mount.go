// Package fuse mounts a store. It is the only importer of go-fuse, of which it
// uses the wire types; mounting and the loop that reads requests are its own.
package fuse

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/store"
)

// fsName is the source of the mount and the subtype after "fuse.".
const fsName = "litefs-agent"

// Methods of mounting.
const (
	MethodAuto       = "auto"       // the first that works
	MethodDirect     = "direct"     // mount(2), as root
	MethodFusermount = "fusermount" // fusermount3, as anybody
)

// Options say how and where to mount. The zero value of each field but Dir is
// its default.
type Options struct {
	Dir    string // the mount point; made if missing
	Method string // default MethodAuto
	// Group owns all files, by name or number. Default: the process's own.
	Group string
	// FileMode and DirMode are the permissions of new files and folders, DirMode
	// also those of the root. Default: what the program asked for.
	FileMode, DirMode uint32
	// AllowOther admits other users, root among them. With fusermount it needs
	// user_allow_other in /etc/fuse.conf.
	AllowOther bool
	Logger     *slog.Logger // default: none

	EntryTTL        time.Duration // of names, also absent ones; default 1 h
	AttrTTL         time.Duration // of attributes; default 1 h
	DatabaseAttrTTL time.Duration // of databases and ordinary files; default 1 s

	// CacheJournal and CacheWAL put journals and WALs into the page cache. Then a
	// WAL is read without requests, but each frame written costs one more.
	CacheJournal, CacheWAL bool

	// Watcher is the command that runs [Watch] with the arguments added to it; it
	// takes programs off the mount if this process is killed. WatcherLock is kept
	// open by it until it has done so: a flock on it keeps the next agent waiting.
	// Empty: no watcher.
	Watcher     []string
	WatcherLock *os.File

	// OnReveal is told each node before the reply that reveals it to the kernel,
	// and again when it is revealed as another kind; OnForget when the kernel has
	// forgotten it. OnPanic is told the node whose request panicked. All may be
	// called in parallel, by requests, and must not wait.
	OnReveal func(id uint64, kind store.Kind)
	OnForget func(id uint64)
	OnPanic  func(node store.Node)
}

func (o *Options) setDefaults() {
	if o.Method == "" {
		o.Method = MethodAuto
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.EntryTTL == 0 {
		o.EntryTTL = time.Hour
	}
	if o.AttrTTL == 0 {
		o.AttrTTL = time.Hour
	}
	if o.DatabaseAttrTTL == 0 {
		o.DatabaseAttrTTL = time.Second
	}
}

// ErrMounted reports that something is mounted at the mount point and alive.
var ErrMounted = errors.New("already mounted")

// ErrUnmounted reports that somebody else took the mount away.
var ErrUnmounted = errors.New("unmounted by somebody else")

// A Server is a mounted store.
type Server struct {
	dir    string       // absolute; set by Mount, then constant
	method string       // set by Mount, then constant
	fs     store.FS     // set by Mount, then constant
	raw    *rawFS       // set by Mount, then constant
	conn   *connection  // set by Mount, then constant
	watch  *watched     // set by Mount, then constant; nil without a watcher
	log    *slog.Logger // set by Mount, then constant

	closing  atomic.Bool
	close    sync.Once
	closeErr error // set by close
}

// Mount mounts fs and serves it. When it returns, programs can use the mount.
// The mount point is made if missing, a dead mount there is cleared away, and a
// live one is [ErrMounted]. ctx bounds the mounting, not the mount. Errors are
// explained as by [Diagnose].
func Mount(ctx context.Context, fs store.FS, opt Options) (*Server, error) {
	opt.setDefaults()
	s, err := mount(ctx, fs, opt)
	if err != nil {
		return nil, Diagnose(err, opt)
	}
	return s, nil
}

func mount(ctx context.Context, fs store.FS, opt Options) (*Server, error) {
	if opt.Dir == "" {
		return nil, errors.New("mount: no mount point")
	}
	dir, err := filepath.Abs(opt.Dir)
	if err != nil {
		return nil, fmt.Errorf("mount: %w", err)
	}
	gid, err := groupID(opt.Group)
	if err != nil {
		return nil, fmt.Errorf("mount: %w", err)
	}
	if err := clearStale(ctx, dir, opt.Logger); err != nil {
		return nil, err
	}
	if err := makeMountPoint(dir); err != nil {
		return nil, err
	}
	fd, method, err := attach(ctx, dir, opt)
	if err != nil {
		return nil, err
	}
	var watch *watched
	if len(opt.Watcher) > 0 {
		if watch, err = newWatched(opt.Watcher, opt.WatcherLock, opt.Logger); err != nil {
			unix.Close(fd)
			return nil, errors.Join(err, detach(dir, method, true))
		}
		opt.OnReveal, opt.OnForget = watch.reveal, watch.forget
	}
	raw := newRawFS(fs, opt, opt.Logger, uint32(os.Geteuid()), gid)
	conn, err := newConnection(fd, raw, opt.Logger)
	if err == nil {
		if err = conn.handshake(); err != nil {
			conn.readers.close()
		}
	}
	if err != nil {
		unix.Close(fd)
		return nil, errors.Join(fmt.Errorf("mount %s: %w", dir, err), detach(dir, method, true))
	}
	s := &Server{dir: dir, method: method, fs: fs, raw: raw, conn: conn, watch: watch, log: opt.Logger}
	raw.peer.conn = conn
	fs.Attach(raw.peer) // before the first request
	go conn.run()
	if err := raw.peer.start(dir); err != nil {
		return nil, errors.Join(fmt.Errorf("mount: %w", err), s.Close())
	}
	if watch != nil {
		if err := watch.start(fd, dir, method); err != nil {
			return nil, errors.Join(fmt.Errorf("mount: %w", err), s.Close())
		}
	}
	return s, nil
}

// Method is how it was mounted.
func (s *Server) Method() string { return s.method }

// Requests counts the kernel's requests since the start, by FUSE operation.
func (s *Server) Requests() map[string]uint64 { return s.conn.requests() }

// Wait returns when the mount is gone: nil after Close, else [ErrUnmounted].
func (s *Server) Wait() error {
	<-s.conn.done
	if s.closing.Load() {
		return nil
	}
	return fmt.Errorf("%s: %w", s.dir, ErrUnmounted)
}

// Close unmounts. Programs that still have files open get a moment to close
// them, then errors; what they have cached is spoiled, so that they do not go on
// reading it. It returns when no request is served any more.
func (s *Server) Close() error {
	s.close.Do(func() {
		s.closing.Store(true)
		s.closeErr = s.unmount()
		if s.watch != nil {
			s.watch.stop()
		}
		s.fs.Attach(nil)
	})
	return s.closeErr
}

const (
	closeWait  = 300 * time.Millisecond // for programs to close their files
	closeSteps = 15
)

func (s *Server) unmount() error {
	for i := 0; i < closeSteps && s.raw.handles.foreign(); i++ {
		time.Sleep(closeWait / closeSteps)
	}
	busy := s.raw.handles.foreign()
	if busy {
		// From here on requests fail, so that none is half done without locks.
		s.conn.drain.Store(true)
	}
	s.raw.peer.close()
	if !busy {
		var st unix.Stat_t
		statErr := unix.Stat(s.dir, &st)
		err := s.politely()
		if err == nil || !errors.Is(err, unix.EBUSY) {
			return s.gone(err, func() error { return abortByNumber(&st, statErr) })
		}
	}
	return s.forcibly()
}

// politely unmounts a mount that nobody uses. A closed file may keep it busy for
// a moment.
func (s *Server) politely() (err error) {
	for wait := time.Millisecond; wait < 100*time.Millisecond; wait *= 2 {
		if err = detach(s.dir, s.method, false); err == nil || !errors.Is(err, unix.EBUSY) {
			return err
		}
		time.Sleep(wait)
	}
	return err
}

// copyWait is how long a connection may outlive its unmount before it is aborted.
const copyWait = 300 * time.Millisecond

// gone waits for the end of the connection after an unmount with the given
// result; where it did not work for another reason than being busy, the mount may
// be gone already. Where another mount namespace has a copy of the mount, as
// containers and sandboxes do, the connection is aborted: it would live as long as
// that. Without fusectl in /sys it serves errors until the process ends.
func (s *Server) gone(err error, abort func() error) error {
	select {
	case <-s.conn.done:
		return nil
	case <-time.After(copyWait):
	}
	if err != nil {
		return errors.Join(err, s.forcibly())
	}
	s.conn.drain.Store(true)
	s.spoil()
	if err := abort(); err != nil {
		// It answers ENOTCONN from here on, and ends with the process.
		s.log.Warn("another mount namespace has a copy of the mount: it ends with this process", "path", s.dir, "err", err)
		return nil
	}
	<-s.conn.done
	s.log.Warn("a copy of the mount in another mount namespace was ended", "path", s.dir)
	return nil
}

// forcibly takes the mount away from programs that use it: they get errors from
// here on, also for what they have cached.
func (s *Server) forcibly() error {
	select {
	case <-s.conn.done:
		return nil
	default:
	}
	s.log.Warn("unmounting although files are open", "path", s.dir)
	root, rootErr := unix.Open(s.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	s.conn.drain.Store(true)
	s.spoil()
	err := detach(s.dir, s.method, true)
	s.conn.readers.quit.Store(true)
	if rootErr != nil {
		return errors.Join(err, rootErr)
	}
	defer unix.Close(root)
	// A reader that sits in read(2) sees quit only after a request: make one.
	go func() {
		var st unix.Statfs_t
		unix.Fstatfs(root, &st)
	}()
	select {
	case <-s.conn.done:
		return err
	case <-time.After(10 * time.Second):
		return errors.Join(err, fmt.Errorf("%s: requests are still being served", s.dir))
	}
}

// spoil makes programs that stay behind notice. Databases: the header reads as
// zeros, and attributes are asked for again, which fails; pages stay, since
// dropping them would kill programs that map the file. Wal-index: its header
// reads as zeros. Journals and WALs are dropped.
//
// Requests must be refused already, else a program could repair what it sees.
func (s *Server) spoil() {
	for _, ino := range s.raw.nodes.all() {
		s.conn.spoilNode(ino.id, ino.node.Kind())
	}
}

// foreign reports whether anybody but the mount itself has a file open.
func (t *handles) foreign() bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, h := range t.byFh {
		if !h.own {
			return true
		}
	}
	return false
}

// groupID returns the number of a group given by name or number, or the
// process's own.
func groupID(group string) (uint32, error) {
	if group == "" {
		return uint32(os.Getegid()), nil
	}
	if n, err := strconv.ParseUint(group, 10, 32); err == nil {
		return uint32(n), nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(g.Gid, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("group %s: %w", group, err)
	}
	return uint32(n), nil
}
