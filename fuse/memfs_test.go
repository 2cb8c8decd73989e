package fuse_test

import (
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/litefs-agent/litefs-agent/store"
)

// memFS is a store that keeps files in memory and knows nothing of SQLite but
// the names of its files.
type memFS struct {
	mu   sync.RWMutex // guards names and links of all nodes
	root *memNode
	ino  atomic.Uint64
	peer atomic.Pointer[store.Peer]

	wantsQuiet atomic.Bool
	quietN     atomic.Int32 // calls of Quiet

	// Hooks of tests, set before mounting.
	lookup  func(path string) error
	onWrite func(n *memNode, off int64, p []byte) error
	onSync  func(n *memNode) error
	onRead  func(n *memNode)
}

type memNode struct {
	fs    *memFS
	kind  store.Kind
	ino   uint64
	name  string
	up    *memNode            // guarded by memFS.mu
	child map[string]*memNode // guarded by memFS.mu

	mu    sync.RWMutex // guards all below
	data  []byte
	mode  uint32
	mtime time.Time
	gone  bool
}

func newMemFS() *memFS {
	fs := &memFS{}
	fs.ino.Store(100)
	fs.root = fs.node("", store.KindDir, 0o755, nil)
	return fs
}

func (fs *memFS) node(name string, kind store.Kind, mode uint32, up *memNode) *memNode {
	n := &memNode{fs: fs, kind: kind, ino: fs.ino.Add(1), name: name, up: up, mode: mode, mtime: time.Now()}
	if kind == store.KindDir {
		n.child = map[string]*memNode{}
	}
	return n
}

var superJournal = regexp.MustCompile(`-mj[0-9A-F]+$`)

func kindOf(name string) store.Kind {
	switch {
	case strings.HasSuffix(name, "-journal"):
		return store.KindJournal
	case strings.HasSuffix(name, "-wal"):
		return store.KindWAL
	case strings.HasSuffix(name, "-shm"):
		return store.KindShm
	case superJournal.MatchString(name):
		return store.KindSuperJournal
	case strings.HasSuffix(name, "-pos"):
		return store.KindComputed
	case strings.HasSuffix(name, ".db"):
		return store.KindDatabase
	}
	return store.KindOrdinary
}

func (fs *memFS) Attach(p store.Peer) {
	if p == nil {
		fs.peer.Store(nil)
		return
	}
	fs.peer.Store(&p)
}

func (fs *memFS) Root() store.Node { return fs.root }

func (fs *memFS) findLocked(p string) *memNode {
	n := fs.root
	if p == "" {
		return n
	}
	for part := range strings.SplitSeq(p, "/") {
		if n = n.child[part]; n == nil {
			return nil
		}
	}
	return n
}

// dirLocked returns the folder that holds p.
func (fs *memFS) dirLocked(p string) (*memNode, string, error) {
	dir, name := path.Split(p)
	n := fs.findLocked(strings.TrimSuffix(dir, "/"))
	if n == nil {
		return nil, "", store.ErrNotExist
	}
	if n.child == nil {
		return nil, "", store.ErrNotDir
	}
	return n, name, nil
}

func (fs *memFS) Lookup(p string) (store.Node, error) {
	if fs.lookup != nil {
		if err := fs.lookup(p); err != nil {
			return nil, err
		}
	}
	fs.mu.RLock()
	defer fs.mu.RUnlock()
	n := fs.findLocked(p)
	if n == nil {
		return nil, store.ErrNotExist
	}
	return n, nil
}

func (fs *memFS) Create(p string, mode uint32, exclusive bool) (store.Node, store.Handle, error) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	dir, name, err := fs.dirLocked(p)
	if err != nil {
		return nil, nil, err
	}
	if n := dir.child[name]; n != nil {
		if exclusive {
			return nil, nil, store.ErrExist
		}
		h, err := n.Open(true)
		return n, h, err
	}
	n := fs.node(name, kindOf(name), mode, dir)
	dir.child[name] = n
	return n, &memHandle{n}, nil
}

func (fs *memFS) Mkdir(p string, mode uint32) (store.Node, error) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	dir, name, err := fs.dirLocked(p)
	if err != nil {
		return nil, err
	}
	if dir.child[name] != nil {
		return nil, store.ErrExist
	}
	n := fs.node(name, store.KindDir, mode, dir)
	dir.child[name] = n
	return n, nil
}

func (fs *memFS) Rmdir(p string) error {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	dir, name, err := fs.dirLocked(p)
	if err != nil {
		return err
	}
	n := dir.child[name]
	switch {
	case n == nil:
		return store.ErrNotExist
	case n.child == nil:
		return store.ErrNotDir
	case len(n.child) > 0:
		return store.ErrNotEmpty
	}
	delete(dir.child, name)
	return nil
}

func (fs *memFS) Unlink(p string) error {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	dir, name, err := fs.dirLocked(p)
	if err != nil {
		return err
	}
	n := dir.child[name]
	switch {
	case n == nil:
		return store.ErrNotExist
	case n.child != nil:
		return store.ErrIsDir
	}
	n.mu.Lock()
	n.gone = true
	n.mu.Unlock()
	delete(dir.child, name)
	return nil
}

func (fs *memFS) Rename(oldPath, newPath string, noReplace bool) error {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	from, oldName, err := fs.dirLocked(oldPath)
	if err != nil {
		return err
	}
	to, newName, err := fs.dirLocked(newPath)
	if err != nil {
		return err
	}
	n := from.child[oldName]
	if n == nil {
		return store.ErrNotExist
	}
	if there := to.child[newName]; there != nil {
		if noReplace {
			return store.ErrExist
		}
		if len(there.child) > 0 {
			return store.ErrNotEmpty
		}
		there.mu.Lock()
		there.gone = true
		there.mu.Unlock()
	}
	delete(from.child, oldName)
	n.name, n.up = newName, to
	to.child[newName] = n
	return nil
}

func (fs *memFS) ReadDir(p string) ([]store.DirEntry, error) {
	fs.mu.RLock()
	defer fs.mu.RUnlock()
	n := fs.findLocked(p)
	if n == nil {
		return nil, store.ErrNotExist
	}
	if n.child == nil {
		return nil, store.ErrNotDir
	}
	var list []store.DirEntry
	for name, c := range n.child {
		list = append(list, store.DirEntry{Name: name, Kind: c.kind, Ino: c.ino})
	}
	slices.SortFunc(list, func(a, b store.DirEntry) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

func (fs *memFS) LogAhead() bool   { return false }
func (fs *memFS) AwaitLog()        {}
func (fs *memFS) WantsQuiet() bool { return fs.wantsQuiet.Load() }

func (fs *memFS) Quiet() {
	fs.wantsQuiet.Store(false)
	fs.quietN.Add(1)
}

func (fs *memFS) StatFS() (total, free, avail, files, filesFree uint64, err error) {
	return 1 << 30, 1 << 29, 1 << 28, 1000, 500, nil
}

func (n *memNode) Kind() store.Kind { return n.kind }

// Path says where the node is, so that it can be locked while nobody has it open.
func (n *memNode) Path() string {
	n.fs.mu.RLock()
	defer n.fs.mu.RUnlock()
	p := n.name
	for up := n.up; up != nil && up.up != nil; up = up.up {
		p = up.name + "/" + p
	}
	return p
}

func (n *memNode) Attr() store.Attr {
	n.mu.RLock()
	defer n.mu.RUnlock()
	a := store.Attr{Kind: n.kind, Ino: n.ino, Mode: n.mode, Size: int64(len(n.data)), Mtime: n.mtime, Nlink: 1}
	if n.gone {
		a.Nlink = 0
	}
	return a
}

func (n *memNode) Open(bool) (store.Handle, error) { return &memHandle{n}, nil }

func (n *memNode) SetSize(_ store.Handle, size int64) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.growLocked(size)
	n.data = n.data[:size]
	n.mtime = time.Now()
	return nil
}

func (n *memNode) growLocked(size int64) {
	have := int64(len(n.data))
	if size <= have {
		return
	}
	n.data = slices.Grow(n.data, int(size-have))[:size]
	clear(n.data[have:])
}

func (n *memNode) SetMode(mode uint32) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mode = mode
	return nil
}

func (n *memNode) SetTime(t time.Time) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mtime = t
	return nil
}

type memHandle struct{ n *memNode }

func (h *memHandle) ReadAt(p []byte, off int64) (int, error) {
	if h.n.fs.onRead != nil {
		h.n.fs.onRead(h.n)
	}
	h.n.mu.RLock()
	defer h.n.mu.RUnlock()
	if off >= int64(len(h.n.data)) {
		return 0, nil
	}
	return copy(p, h.n.data[off:]), nil
}

func (h *memHandle) WriteAt(p []byte, off int64) (int, error) {
	if h.n.fs.onWrite != nil {
		if err := h.n.fs.onWrite(h.n, off, p); err != nil {
			return 0, err
		}
	}
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	h.n.growLocked(off + int64(len(p)))
	copy(h.n.data[off:], p)
	h.n.mtime = time.Now()
	return len(p), nil
}

func (h *memHandle) Sync() error {
	if h.n.fs.onSync != nil {
		return h.n.fs.onSync(h.n)
	}
	return nil
}

func (h *memHandle) Allocate(off, size int64) error {
	h.n.mu.Lock()
	defer h.n.mu.Unlock()
	h.n.growLocked(off + size)
	return nil
}

func (h *memHandle) Release() {}
