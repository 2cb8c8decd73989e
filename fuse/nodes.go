package fuse

import (
	"cmp"
	"crypto/rand"
	"encoding/binary"
	"slices"
	"sync"

	"github.com/litefs-agent/litefs-agent/store"
)

// rootID is the kernel's node id of the mount's root folder.
const rootID = 1

// An inode is one thing the kernel knows by node id: revealed by LOOKUP, CREATE,
// MKDIR or MKNOD, gone when the kernel has forgotten it as often as it was told.
// An open file keeps the kernel from forgetting.
type inode struct {
	id   uint64     // set by nodes.reveal, then constant
	node store.Node // set by nodes.reveal, then constant
	own  ownFile    // guarded by peer.mu

	// Guarded by nodes.mu.
	parent  uint64
	name    string
	linked  bool // parent and name are true; false once unlinked or replaced
	lookups uint64
	shown   store.Kind // what OnReveal was told last

	listing listing
}

// A listing gives each name of one folder a small number, so that READDIR can
// go on where it stopped while names come and go. Numbers stay below 2^31 for
// programs whose off_t has 32 bits.
type listing struct {
	mu      sync.Mutex // not held across calls of the store
	cookies map[string]uint64
	next    uint64
}

// firstCookie leaves 1 and 2 to "." and "..".
const firstCookie = 3

// numbered is one name of a listing.
type numbered struct {
	store.DirEntry
	cookie uint64
}

// number returns entries in the order of their numbers and forgets names that
// are gone.
func (l *listing) number(entries []store.DirEntry) []numbered {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.cookies) == 0 {
		l.next = firstCookie
	}
	cookies := make(map[string]uint64, len(entries))
	list := make([]numbered, 0, len(entries))
	for _, e := range entries {
		c, ok := l.cookies[e.Name]
		if !ok {
			c = l.next
			l.next++
		}
		cookies[e.Name] = c
		list = append(list, numbered{e, c})
	}
	l.cookies = cookies
	slices.SortFunc(list, func(a, b numbered) int { return cmp.Compare(a.cookie, b.cookie) })
	return list
}

// childKey names one entry of one folder.
type childKey struct {
	parent uint64
	name   string
}

// nodes is the table of what the kernel knows. Paths are kept as parent and
// name, so that renaming a folder moves all below it.
type nodes struct {
	mu     sync.RWMutex // guards all below; not held across calls of the store
	byID   map[uint64]*inode
	byNode map[store.Node]*inode
	byName map[childKey]*inode
	nextID uint64
}

// newNodes starts the ids at a random number of 61 bits, so that they repeat
// neither here nor over restarts (invariant 17).
func newNodes(root store.Node) *nodes {
	var b [8]byte
	rand.Read(b[:])
	first := binary.NativeEndian.Uint64(b[:])>>3 | 1<<20
	r := &inode{id: rootID, node: root, linked: true, lookups: 1, shown: store.KindDir}
	r.own.fd = -1
	return &nodes{
		byID:   map[uint64]*inode{rootID: r},
		byNode: map[store.Node]*inode{root: r},
		byName: map[childKey]*inode{},
		nextID: first,
	}
}

func (t *nodes) get(id uint64) *inode {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byID[id]
}

func (t *nodes) of(node store.Node) *inode {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byNode[node]
}

// path returns the path of name in the folder with the given id, or
// [store.ErrNotExist] if the folder is gone.
func (t *nodes) path(parent uint64, name string) (string, error) {
	if parent == rootID {
		return name, nil
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.pathLocked(parent, name)
}

func (t *nodes) pathLocked(parent uint64, name string) (string, error) {
	for parent != rootID {
		dir := t.byID[parent]
		if dir == nil || !dir.linked {
			return "", store.ErrNotExist
		}
		name = dir.name + "/" + name
		parent = dir.parent
	}
	return name, nil
}

// pathOf returns where ino is now, "" for the root.
func (t *nodes) pathOf(ino *inode) (string, error) {
	if ino.id == rootID {
		return "", nil
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	if !ino.linked {
		return "", store.ErrNotExist
	}
	return t.pathLocked(ino.parent, ino.name)
}

// reveal counts one look-up of node at name in parent and returns its inode;
// news is true if the kernel did not know it, or as another kind.
func (t *nodes) reveal(node store.Node, kind store.Kind, parent uint64, name string) (ino *inode, news bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	ino = t.byNode[node]
	if ino == nil {
		ino = &inode{id: t.nextID, node: node, shown: kind}
		ino.own.fd = -1
		t.nextID++
		t.byID[ino.id] = ino
		t.byNode[node] = ino
		news = true
	}
	if ino.shown != kind {
		ino.shown = kind
		news = true
	}
	ino.lookups++
	t.placeLocked(ino, parent, name)
	return ino, news
}

func (t *nodes) placeLocked(ino *inode, parent uint64, name string) {
	key := childKey{parent, name}
	if ino.linked {
		if ino.parent == parent && ino.name == name {
			return
		}
		if old := (childKey{ino.parent, ino.name}); t.byName[old] == ino {
			delete(t.byName, old)
		}
	}
	if was := t.byName[key]; was != nil {
		was.linked = false
	}
	ino.parent, ino.name, ino.linked = parent, name, true
	t.byName[key] = ino
}

// at returns the inode that the kernel knows as name in parent, nil if none.
func (t *nodes) at(parent uint64, name string) *inode {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byName[childKey{parent, name}]
}

// unlink notes that name in parent is gone.
func (t *nodes) unlink(parent uint64, name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	key := childKey{parent, name}
	if ino := t.byName[key]; ino != nil {
		ino.linked = false
		delete(t.byName, key)
	}
}

// rename notes that an entry has moved.
func (t *nodes) rename(oldParent uint64, oldName string, newParent uint64, newName string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if ino := t.byName[childKey{oldParent, oldName}]; ino != nil {
		t.placeLocked(ino, newParent, newName)
		return
	}
	// The kernel never looked at the old name, but may know what it replaces.
	if ino := t.byName[childKey{newParent, newName}]; ino != nil {
		ino.linked = false
		delete(t.byName, childKey{newParent, newName})
	}
}

// forget takes n look-ups back; gone is true if those were the last.
func (t *nodes) forget(id, n uint64) (gone bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	ino := t.byID[id]
	if ino == nil || id == rootID {
		return false
	}
	if ino.lookups > n {
		ino.lookups -= n
		return false
	}
	ino.lookups = 0
	delete(t.byID, id)
	if t.byNode[ino.node] == ino {
		delete(t.byNode, ino.node)
	}
	if key := (childKey{ino.parent, ino.name}); t.byName[key] == ino {
		delete(t.byName, key)
	}
	ino.linked = false
	return true
}

// child returns the kernel's id of the folder that holds path and the last
// element of path; ok is false if the kernel does not know that folder, and so
// can have nothing of it in its cache.
func (t *nodes) child(path string) (parent uint64, name string, ok bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	parent = rootID
	for {
		i := 0
		for i < len(path) && path[i] != '/' {
			i++
		}
		if i == len(path) {
			return parent, path, path != ""
		}
		dir := t.byName[childKey{parent, path[:i]}]
		if dir == nil {
			return 0, "", false
		}
		parent, path = dir.id, path[i+1:]
	}
}

// all returns every inode that the kernel knows.
func (t *nodes) all() []*inode {
	t.mu.RLock()
	defer t.mu.RUnlock()
	list := make([]*inode, 0, len(t.byID))
	for _, ino := range t.byID {
		list = append(list, ino)
	}
	return list
}

// A handle is one open file of the kernel's.
type handle struct {
	ino  *inode
	file store.Handle // nil for the mount's own handle on a database
	own  bool         // opened by the mount itself
}

// handles is the table of open files.
type handles struct {
	mu   sync.RWMutex // guards byFh and next
	byFh map[uint64]*handle
	next uint64
}

func (t *handles) get(fh uint64) *handle {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byFh[fh]
}

func (t *handles) add(h *handle) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next++
	t.byFh[t.next] = h
	return t.next
}

func (t *handles) remove(fh uint64) *handle {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.byFh[fh]
	delete(t.byFh, fh)
	return h
}
