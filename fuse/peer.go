package fuse

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/store"
)

// SQLite's lock bytes: PENDING, RESERVED and the SHARED range of 510.
// Source: SQLite's os.h.
const (
	pendingByte = 0x40000000
	lockBytesN  = 512
)

// openWait bounds how long anybody waits for the opening of one of our own
// descriptors. It takes microseconds; the bound is for a folder that somebody
// else keeps locked.
const openWait = 5 * time.Second

// An ownFile is the mount's own descriptor of a file on itself, by which the
// agent takes part in the programs' locks and reads what they map. Rules that
// keep a process from waiting for itself:
//
//   - opened and closed by one goroutine, never by a handler
//
//   - raw system calls only: no os.File, no poller, no mapping
//
//   - NOFLUSH, so that closing (also by exit) waits for nobody
//
//   - O_CLOEXEC; closed before unmounting
//
//     none ──want──► opening ──► open ──last user gone──► closing ──► none
//     └─────failed──► none (err, until the next want)
type ownFile struct {
	fd      int           // -1 unless open
	opening chan struct{} // closed when the opening ends; nil if none is in progress
	err     error         // of the last opening
	foreign int           // open files of others
	users   int           // calls in progress, and locks held, on fd
	queued  bool          // in peer.queue
}

// peer is what the store asks of its mount. It implements [store.Peer].
type peer struct {
	m    *rawFS
	conn *connection // set by Mount before the first request, then constant

	tid    atomic.Int32          // the thread that opens, 0 before it runs
	target atomic.Pointer[inode] // what it opens now
	dir    string                // the mount point; set by start, then constant
	dev    uint64                // st_dev of the mount; set by start, then constant

	mu    sync.Mutex // guards every inode's own, and all below; held across no system call but fcntl
	wake  *sync.Cond
	queue []*inode      // own to be opened or closed
	stop  bool          // no more openings
	done  chan struct{} // closed when the opener has returned; nil if it never ran
}

func newPeer(m *rawFS) *peer {
	p := &peer{m: m}
	p.wake = sync.NewCond(&p.mu)
	return p
}

var _ store.Peer = (*peer)(nil)

// start runs the opener on the mount at dir, which must be served already.
func (p *peer) start(dir string) error {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dir, err)
	}
	defer unix.Close(root) // kept, it would keep others from unmounting
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return fmt.Errorf("stat %s: %w", dir, err)
	}
	p.dir, p.dev = dir, uint64(st.Dev)
	p.done = make(chan struct{})
	go p.opener()
	return nil
}

// close closes every descriptor; the mount can be unmounted then.
func (p *peer) close() {
	p.mu.Lock()
	p.stop = true
	p.wake.Signal()
	p.mu.Unlock()
	if p.done != nil {
		<-p.done
	}
}

// isOwn reports whether the thread tid, which opens ino, is our opener. The
// kernel names threads, not processes.
func (p *peer) isOwn(tid uint32, ino *inode) bool {
	return tid != 0 && int32(tid) == p.tid.Load() && p.target.Load() != nil
}

// opened counts an open file of somebody else; released takes it back.
func (p *peer) opened(ino *inode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ino.own.foreign++
}

func (p *peer) released(ino *inode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ino.own.foreign--
	p.reviewLocked(ino)
}

// replied starts the opening of a database or wal-index that somebody has just
// opened; out is the reply he got.
func (p *peer) replied(out []byte, op uint32) {
	if p.conn == nil {
		return
	}
	open := (*gofuse.OpenOut)(unsafe.Pointer(&out[outHeader]))
	if op == opCreate {
		open = &(*gofuse.CreateOut)(unsafe.Pointer(&out[outHeader])).OpenOut
	}
	h := p.m.handles.get(open.Fh)
	if h == nil || h.own {
		return
	}
	if kind := h.ino.node.Kind(); kind == store.KindDatabase || kind == store.KindShm {
		p.mu.Lock()
		p.wantLocked(h.ino)
		p.mu.Unlock()
	}
}

// wantLocked has ino opened unless it is.
func (p *peer) wantLocked(ino *inode) {
	o := &ino.own
	if o.fd >= 0 || o.opening != nil || p.stop {
		return
	}
	o.opening = make(chan struct{})
	p.pushLocked(ino)
}

// reviewLocked has ino's descriptor closed if nobody needs it any more.
func (p *peer) reviewLocked(ino *inode) {
	if o := &ino.own; o.fd >= 0 && o.foreign <= 0 && o.users == 0 {
		p.pushLocked(ino)
	}
}

func (p *peer) pushLocked(ino *inode) {
	if ino.own.queued {
		return
	}
	ino.own.queued = true
	p.queue = append(p.queue, ino)
	p.wake.Signal()
}

// opener opens and closes, one after the other, on one thread, until close.
func (p *peer) opener() {
	runtime.LockOSThread() // and never unlocked: the thread ends with it
	p.tid.Store(int32(unix.Gettid()))
	p.mu.Lock()
	for !p.stop {
		if len(p.queue) == 0 {
			p.wake.Wait()
			continue
		}
		ino := p.queue[0]
		p.queue = p.queue[1:]
		ino.own.queued = false
		p.serveLocked(ino)
	}
	p.endLocked()
	p.mu.Unlock()
	close(p.done)
}

// serveLocked opens or closes ino's descriptor, without p.mu meanwhile.
func (p *peer) serveLocked(ino *inode) {
	o := &ino.own
	if o.opening != nil {
		p.mu.Unlock()
		fd, err := p.open(ino)
		p.mu.Lock()
		o.fd, o.err = fd, err
		close(o.opening)
		o.opening = nil
		p.reviewLocked(ino)
		return
	}
	if o.fd >= 0 && o.foreign <= 0 && o.users == 0 {
		fd := o.fd
		o.fd = -1
		p.mu.Unlock()
		unix.Close(fd)
		p.mu.Lock()
	}
}

// endLocked gives up what is queued and closes all.
func (p *peer) endLocked() {
	for _, ino := range p.m.nodes.all() {
		o := &ino.own
		if o.opening != nil {
			o.err = unix.ENODEV
			close(o.opening)
			o.opening = nil
		}
		if o.fd >= 0 {
			unix.Close(o.fd)
			o.fd = -1
		}
	}
}

// open opens ino by its path. Called by the opener alone.
func (p *peer) open(ino *inode) (int, error) {
	p.target.Store(ino)
	defer p.target.Store(nil)
	wait := 50 * time.Microsecond
	for {
		path, err := p.m.nodes.pathOf(ino)
		if err != nil {
			return -1, err
		}
		fd, err := unix.Open(p.dir+"/"+path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.ENOENT) && wait < time.Second {
			// Who created it has our reply, but may not have put the name where we
			// look yet: there it is still remembered as absent.
			time.Sleep(wait)
			wait *= 2
			continue
		}
		if err != nil {
			return -1, fmt.Errorf("open %s through the mount: %w", path, err)
		}
		// The name may have become another file's, or the mount be gone.
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil || uint64(st.Dev) != p.dev || st.Ino != ino.node.Attr().Ino {
			unix.Close(fd)
			return -1, store.ErrNotExist
		}
		return fd, nil
	}
}

// use calls f with ino's descriptor, which stays open meanwhile. It waits for an
// opening in progress, and starts one if start is set. ok is false if there is no
// descriptor; with start that is an error.
func (p *peer) use(ino *inode, start bool, f func(fd int) error) (ok bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	o := &ino.own
	o.users++ // so that what is opened stays
	defer func() {
		o.users--
		p.reviewLocked(ino)
	}()
	if start {
		p.wantLocked(ino)
	}
	if wait := o.opening; wait != nil {
		p.mu.Unlock()
		err := p.await(wait)
		p.mu.Lock()
		if err != nil {
			return false, err
		}
	}
	if o.fd < 0 {
		err := o.err
		if start && err == nil {
			err = unix.ENODEV // closing
		}
		return false, err
	}
	fd := o.fd
	p.mu.Unlock()
	err = f(fd)
	p.mu.Lock()
	return true, err
}

// await waits for an opening. It may be called by a handler: another reader
// serves the opening meanwhile.
func (p *peer) await(opening <-chan struct{}) error {
	select {
	case <-opening:
		return nil
	default:
	}
	p.conn.readers.beginWait()
	defer p.conn.readers.endWait()
	t := time.NewTimer(openWait)
	defer t.Stop()
	select {
	case <-opening:
		return nil
	case <-t.C:
		return fmt.Errorf("opening a file through the mount took more than %s", openWait)
	}
}

// Reserved asks for what would keep a reader out: a write lock.
func (p *peer) Reserved(db store.Node) (bool, error) {
	ino := p.m.nodes.of(db)
	if ino == nil || p.conn == nil {
		return false, nil // never opened, so nobody has a lock
	}
	p.mu.Lock()
	inUse := ino.own.foreign > 0
	p.mu.Unlock()
	if !inUse {
		return false, nil
	}
	var held bool
	_, err := p.use(ino, true, func(fd int) error {
		l := unix.Flock_t{Type: unix.F_RDLCK, Start: pendingByte, Len: lockBytesN}
		if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l); err != nil {
			return err
		}
		held = l.Type != unix.F_UNLCK
		return nil
	})
	return held, err
}

func (p *peer) ReadShm(shm store.Node, b []byte, off int64) (n int, err error) {
	return p.transfer(shm, func(fd int) (int, error) { return unix.Pread(fd, b, off) })
}

func (p *peer) WriteShm(shm store.Node, b []byte, off int64) (n int, err error) {
	return p.transfer(shm, func(fd int) (int, error) { return unix.Pwrite(fd, b, off) })
}

// transfer moves bytes through shm's descriptor, if somebody has the file open.
func (p *peer) transfer(shm store.Node, move func(fd int) (int, error)) (n int, err error) {
	ino := p.m.nodes.of(shm)
	if ino == nil || p.conn == nil {
		return 0, nil
	}
	_, err = p.use(ino, false, func(fd int) error {
		for {
			n, err = move(fd)
			if !errors.Is(err, unix.EINTR) {
				n = max(n, 0)
				return err
			}
		}
	})
	return n, err
}

func (p *peer) LockShm(shm store.Node, off, n int64) (bool, error)     { return p.lock(shm, off, n) }
func (p *peer) UnlockShm(shm store.Node, off, n int64) error           { return p.unlock(shm, off, n) }
func (p *peer) LockDatabase(db store.Node, off, n int64) (bool, error) { return p.lock(db, off, n) }
func (p *peer) UnlockDatabase(db store.Node, off, n int64) error       { return p.unlock(db, off, n) }

// lock takes an OFD write lock; the descriptor stays until unlock.
func (p *peer) lock(node store.Node, off, n int64) (ok bool, err error) {
	ino := p.known(node)
	if ino == nil {
		return false, fmt.Errorf("lock: %w", store.ErrNotExist)
	}
	_, err = p.use(ino, true, func(fd int) error {
		l := unix.Flock_t{Type: unix.F_WRLCK, Start: off, Len: n}
		err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return nil
		}
		if ok = err == nil; ok {
			p.mu.Lock()
			ino.own.users++
			p.mu.Unlock()
		}
		return err
	})
	return ok, err
}

func (p *peer) unlock(node store.Node, off, n int64) error {
	ino := p.m.nodes.of(node)
	if ino == nil {
		return nil
	}
	_, err := p.use(ino, false, func(fd int) error {
		l := unix.Flock_t{Type: unix.F_UNLCK, Start: off, Len: n}
		err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l)
		if err == nil {
			p.mu.Lock()
			ino.own.users--
			p.mu.Unlock()
		}
		return err
	})
	return err
}

// known returns the inode of node, which it looks up through the mount if the
// kernel does not know it and the node can say where it is.
func (p *peer) known(node store.Node) *inode {
	if p.conn == nil {
		return nil
	}
	if ino := p.m.nodes.of(node); ino != nil {
		return ino
	}
	where, ok := node.(interface{ Path() string })
	if !ok {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Lstat(p.dir+"/"+where.Path(), &st); err != nil {
		return nil
	}
	return p.m.nodes.of(node)
}

// InvalidateData drops what the kernel remembers of node's content.
func (p *peer) InvalidateData(node store.Node, off, n int64) {
	ino := p.m.nodes.of(node)
	if ino == nil || p.conn == nil {
		return
	}
	if n < 0 {
		n = 0 // to the end, in the kernel's words
	} else if n == 0 && off >= 0 {
		off = -1
	}
	p.check("invalidate data", p.conn.invalidateInode(ino.id, off, n))
}

// InvalidateEntry drops a name, and the kernel's listing of its folder.
func (p *peer) InvalidateEntry(path string) {
	parent, name, ok := p.m.nodes.child(path)
	if !ok || p.conn == nil {
		return
	}
	p.check("invalidate entry", p.conn.invalidateEntry(parent, name))
	p.check("invalidate folder", p.conn.invalidateInode(parent, 0, 0))
}

func (p *peer) check(what string, err error) {
	if err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EBADF) {
		p.m.faults.log(p.m.log, "notifying the kernel failed", "op", what, "err", err)
	}
}
