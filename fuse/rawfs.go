package fuse

import (
	"errors"
	"log/slog"
	"strings"
	"syscall"
	"time"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/store"
)

// rawFS answers the kernel's requests from a store. Locks never come here: the
// kernel keeps them (DESIGN.md section 7).
//
// Its methods may run in parallel. The cancel channels are nil and unused: no
// request is ever interrupted, since the store cannot stop half-way.
type rawFS struct {
	gofuse.RawFileSystem // ENOSYS for what is not named here

	store    store.FS     // set by newRawFS, then constant
	opt      Options      // set by newRawFS, then constant
	log      *slog.Logger // set by newRawFS, then constant
	uid, gid uint32       // owner of everything; set by newRawFS, then constant
	nodes    *nodes
	handles  handles
	peer     *peer // set by newRawFS, then constant
	faults   limiter

	noOpenDir bool // the kernel takes ENOSYS for OPENDIR; set at INIT
}

var _ gofuse.RawFileSystem = (*rawFS)(nil)

func newRawFS(fs store.FS, opt Options, log *slog.Logger, uid, gid uint32) *rawFS {
	m := &rawFS{
		RawFileSystem: gofuse.NewDefaultRawFileSystem(),
		store:         fs,
		opt:           opt,
		log:           log,
		uid:           uid,
		gid:           gid,
		nodes:         newNodes(fs.Root()),
		handles:       handles{byFh: map[uint64]*handle{}},
	}
	m.peer = newPeer(m)
	return m
}

// String is what mount(8) shows after "fuse.".
func (m *rawFS) String() string { return fsName }

// sidecar reports whether name is that of a journal, WAL or wal-index, whose
// requests never wait for a disk.
func sidecar(name string) bool {
	return strings.HasSuffix(name, "-journal") || strings.HasSuffix(name, "-wal") || strings.HasSuffix(name, "-shm")
}

// computed reports whether a file of this name may appear without a program
// making it. The absence of such a name is not remembered, so that nothing
// depends on InvalidateEntry being called in time.
func computed(name string) bool {
	return strings.HasSuffix(name, "-pos") || strings.HasSuffix(name, "-acked") || strings.HasSuffix(name, "-writer") ||
		name == ".primary" || name == ".lag"
}

// entryTTL is how long the kernel may remember a name.
func (m *rawFS) entryTTL(kind store.Kind) time.Duration {
	if kind == store.KindComputed {
		return 0
	}
	return m.opt.EntryTTL
}

// attrTTL is how long the kernel may remember attributes. Those of a database
// live one second: a program that outlives a crash of the agent must notice. An
// ordinary file may be a database before its first commit.
func (m *rawFS) attrTTL(kind store.Kind) time.Duration {
	switch kind {
	case store.KindComputed:
		return 0
	case store.KindDatabase, store.KindOrdinary:
		return m.opt.DatabaseAttrTTL
	}
	return m.opt.AttrTTL
}

// openFlags returns the FOPEN flags of a node.
func (m *rawFS) openFlags(kind store.Kind, own bool) uint32 {
	var flags uint32
	switch kind {
	case store.KindDatabase, store.KindShm:
		flags = gofuse.FOPEN_KEEP_CACHE | gofuse.FOPEN_NOFLUSH
	case store.KindJournal, store.KindSuperJournal:
		flags = gofuse.FOPEN_NOFLUSH
		if !m.opt.CacheJournal {
			flags |= gofuse.FOPEN_DIRECT_IO
		}
	case store.KindWAL:
		flags = gofuse.FOPEN_NOFLUSH
		if !m.opt.CacheWAL {
			flags |= gofuse.FOPEN_DIRECT_IO
		}
	case store.KindComputed:
		flags = gofuse.FOPEN_DIRECT_IO | gofuse.FOPEN_NOFLUSH
	}
	if own {
		// Without NOFLUSH the exit of this process would wait for itself.
		flags |= gofuse.FOPEN_NOFLUSH | gofuse.FOPEN_KEEP_CACHE
	}
	return flags
}

// fill translates attributes.
func (m *rawFS) fill(out *gofuse.Attr, id uint64, a *store.Attr) {
	out.Ino = a.Ino
	out.Size = uint64(a.Size)
	out.Blocks = (uint64(a.Size) + 511) / 512
	sec, nsec := uint64(a.Mtime.Unix()), uint32(a.Mtime.Nanosecond())
	out.Atime, out.Mtime, out.Ctime = sec, sec, sec
	out.Atimensec, out.Mtimensec, out.Ctimensec = nsec, nsec, nsec
	out.Mode = a.Mode & 07777
	if a.Kind == store.KindDir {
		out.Mode |= syscall.S_IFDIR | m.opt.DirMode&07000 // the group of a folder is that of what is made in it
	} else {
		out.Mode |= syscall.S_IFREG
	}
	if id == rootID && m.opt.DirMode != 0 {
		out.Mode = m.opt.DirMode&07777 | syscall.S_IFDIR
	}
	out.Nlink = a.Nlink
	out.Owner = gofuse.Owner{Uid: m.uid, Gid: m.gid}
	out.Blksize = 4096
}

func (m *rawFS) fillAttr(out *gofuse.AttrOut, ino *inode) {
	a := ino.node.Attr()
	m.fill(&out.Attr, ino.id, &a)
	out.SetTimeout(m.attrTTL(a.Kind))
}

// reveal makes node known to the kernel under the given name.
func (m *rawFS) reveal(node store.Node, parent uint64, name string, out *gofuse.EntryOut) *inode {
	a := node.Attr()
	ino, news := m.nodes.reveal(node, a.Kind, parent, name)
	if news && m.opt.OnReveal != nil {
		m.opt.OnReveal(ino.id, a.Kind)
	}
	out.NodeId = ino.id
	out.SetEntryTimeout(m.entryTTL(a.Kind))
	out.SetAttrTimeout(m.attrTTL(a.Kind))
	m.fill(&out.Attr, ino.id, &a)
	return ino
}

// Lookup answers LOOKUP. An absent name is an entry without node id, which the
// kernel remembers.
func (m *rawFS) Lookup(_ <-chan struct{}, in *gofuse.InHeader, name string, out *gofuse.EntryOut) gofuse.Status {
	path, err := m.newPath(in.NodeId, name)
	if err != nil {
		return m.status("lookup", nil, err)
	}
	node, err := m.store.Lookup(path)
	if errors.Is(err, store.ErrNotExist) {
		if computed(name) {
			return gofuse.ENOENT
		}
		out.SetEntryTimeout(m.opt.EntryTTL)
		return gofuse.OK
	}
	if err != nil {
		return m.status("lookup", nil, err)
	}
	m.reveal(node, in.NodeId, name, out)
	return gofuse.OK
}

// newPath is nodes.path for a name that came with a request.
func (m *rawFS) newPath(parent uint64, name string) (string, error) {
	if len(name) > 255 {
		return "", syscall.ENAMETOOLONG
	}
	return m.nodes.path(parent, name)
}

// Forget answers FORGET and BATCH_FORGET.
func (m *rawFS) Forget(id, n uint64) {
	if m.nodes.forget(id, n) && m.opt.OnForget != nil {
		m.opt.OnForget(id)
	}
}

// GetAttr answers GETATTR from memory.
func (m *rawFS) GetAttr(_ <-chan struct{}, in *gofuse.GetAttrIn, out *gofuse.AttrOut) gofuse.Status {
	ino := m.nodes.get(in.NodeId)
	if ino == nil {
		return gofuse.Status(syscall.ESTALE)
	}
	m.fillAttr(out, ino)
	return gofuse.OK
}

// SetAttr answers SETATTR: chmod, chown, truncate, utimes, and O_TRUNC.
func (m *rawFS) SetAttr(_ <-chan struct{}, in *gofuse.SetAttrIn, out *gofuse.AttrOut) gofuse.Status {
	ino := m.nodes.get(in.NodeId)
	if ino == nil {
		return gofuse.Status(syscall.ESTALE)
	}
	// SQLite under root gives each new journal the owner of its database.
	if uid, ok := in.GetUID(); ok && uid != m.uid {
		return gofuse.EPERM
	}
	if gid, ok := in.GetGID(); ok && gid != m.gid {
		return gofuse.EPERM
	}
	if mode, ok := in.GetMode(); ok {
		if err := ino.node.SetMode(mode); err != nil {
			return m.status("chmod", ino, err)
		}
	}
	if size, ok := in.GetSize(); ok {
		var file store.Handle
		if fh, ok := in.GetFh(); ok {
			if h := m.handles.get(fh); h != nil {
				file = h.file
			}
		}
		if int64(size) < 0 {
			return gofuse.Status(syscall.EFBIG)
		}
		if err := ino.node.SetSize(file, int64(size)); err != nil {
			return m.status("truncate", ino, err)
		}
	}
	if t, ok := in.GetMTime(); ok {
		if err := ino.node.SetTime(t); err != nil {
			return m.status("utimes", ino, err)
		}
	}
	m.fillAttr(out, ino)
	return gofuse.OK
}

// fileMode is the mode of a new file. With FileMode all files have it: then a
// journal, which SQLite makes with the mode of its database, has exactly the
// mode it was asked for, else SQLite would add an fchmod to each journal.
func (m *rawFS) fileMode(asked uint32) uint32 {
	if m.opt.FileMode != 0 {
		return m.opt.FileMode & 07777
	}
	return asked & 07777
}

// Create answers CREATE.
func (m *rawFS) Create(_ <-chan struct{}, in *gofuse.CreateIn, name string, out *gofuse.CreateOut) gofuse.Status {
	path, err := m.newPath(in.NodeId, name)
	if err != nil {
		return m.status("create", nil, err)
	}
	node, file, err := m.store.Create(path, m.fileMode(in.Mode), in.Flags&syscall.O_EXCL != 0)
	if err != nil {
		return m.status("create", nil, err)
	}
	if in.Flags&syscall.O_TRUNC != 0 && node.Attr().Size > 0 {
		if err := node.SetSize(file, 0); err != nil {
			file.Release()
			return m.status("create", nil, err)
		}
	}
	ino := m.reveal(node, in.NodeId, name, &out.EntryOut)
	m.peer.opened(ino)
	out.Fh = m.handles.add(&handle{ino: ino, file: file})
	out.OpenFlags = m.openFlags(node.Kind(), false)
	return gofuse.OK
}

// Mknod makes ordinary files only.
func (m *rawFS) Mknod(_ <-chan struct{}, in *gofuse.MknodIn, name string, out *gofuse.EntryOut) gofuse.Status {
	if in.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return gofuse.EPERM
	}
	path, err := m.newPath(in.NodeId, name)
	if err != nil {
		return m.status("mknod", nil, err)
	}
	node, file, err := m.store.Create(path, m.fileMode(in.Mode), true)
	if err != nil {
		return m.status("mknod", nil, err)
	}
	file.Release()
	m.reveal(node, in.NodeId, name, out)
	return gofuse.OK
}

func (m *rawFS) Mkdir(_ <-chan struct{}, in *gofuse.MkdirIn, name string, out *gofuse.EntryOut) gofuse.Status {
	path, err := m.newPath(in.NodeId, name)
	if err != nil {
		return m.status("mkdir", nil, err)
	}
	mode := in.Mode & 07777
	if m.opt.DirMode != 0 {
		mode = m.opt.DirMode & 07777
	}
	node, err := m.store.Mkdir(path, mode)
	if err != nil {
		return m.status("mkdir", nil, err)
	}
	m.reveal(node, in.NodeId, name, out)
	return gofuse.OK
}

func (m *rawFS) Unlink(_ <-chan struct{}, in *gofuse.InHeader, name string) gofuse.Status {
	return m.remove("unlink", in, name, m.store.Unlink)
}

func (m *rawFS) Rmdir(_ <-chan struct{}, in *gofuse.InHeader, name string) gofuse.Status {
	return m.remove("rmdir", in, name, m.store.Rmdir)
}

func (m *rawFS) remove(op string, in *gofuse.InHeader, name string, remove func(string) error) gofuse.Status {
	path, err := m.nodes.path(in.NodeId, name)
	if err == nil {
		err = remove(path)
	}
	if err != nil {
		return m.status(op, nil, err)
	}
	m.nodes.unlink(in.NodeId, name)
	return gofuse.OK
}

// Rename answers RENAME and RENAME2.
func (m *rawFS) Rename(_ <-chan struct{}, in *gofuse.RenameIn, oldName, newName string) gofuse.Status {
	if in.Flags&^unix.RENAME_NOREPLACE != 0 {
		return gofuse.EINVAL // EXCHANGE and WHITEOUT
	}
	oldPath, err := m.nodes.path(in.NodeId, oldName)
	if err != nil {
		return m.status("rename", nil, err)
	}
	newPath, err := m.newPath(in.Newdir, newName)
	if err != nil {
		return m.status("rename", nil, err)
	}
	if err := m.store.Rename(oldPath, newPath, in.Flags&unix.RENAME_NOREPLACE != 0); err != nil {
		return m.status("rename", nil, err)
	}
	if ino := m.nodes.at(in.NodeId, oldName); ino != nil && ino.node.Attr().Nlink == 0 {
		m.nodes.unlink(in.NodeId, oldName) // its content has moved, to another node
		return gofuse.OK
	}
	m.nodes.rename(in.NodeId, oldName, in.Newdir, newName)
	return gofuse.OK
}

// Link and Symlink are EPERM, what a file system without them says.
func (m *rawFS) Link(<-chan struct{}, *gofuse.LinkIn, string, *gofuse.EntryOut) gofuse.Status {
	return gofuse.EPERM
}

func (m *rawFS) Symlink(<-chan struct{}, *gofuse.InHeader, string, string, *gofuse.EntryOut) gofuse.Status {
	return gofuse.EPERM
}

func (m *rawFS) Readlink(<-chan struct{}, *gofuse.InHeader) ([]byte, gofuse.Status) {
	return nil, gofuse.EINVAL
}

// Open answers OPEN. O_TRUNC has come before, as SETATTR.
func (m *rawFS) Open(_ <-chan struct{}, in *gofuse.OpenIn, out *gofuse.OpenOut) gofuse.Status {
	ino := m.nodes.get(in.NodeId)
	if ino == nil {
		return gofuse.Status(syscall.ESTALE)
	}
	kind := ino.node.Kind()
	own := m.peer.isOwn(in.Pid, ino)
	var file store.Handle
	if !own || kind == store.KindShm {
		var err error
		if file, err = ino.node.Open(in.Flags&syscall.O_ACCMODE != syscall.O_RDONLY); err != nil {
			return m.status("open", ino, err)
		}
	}
	if !own {
		m.peer.opened(ino)
	}
	out.Fh = m.handles.add(&handle{ino: ino, file: file, own: own})
	out.OpenFlags = m.openFlags(kind, own)
	return gofuse.OK
}

// Release answers RELEASE, the last close of an open file.
func (m *rawFS) Release(_ <-chan struct{}, in *gofuse.ReleaseIn) {
	h := m.handles.remove(in.Fh)
	if h == nil {
		return
	}
	if h.file != nil {
		h.file.Release()
	}
	if !h.own {
		m.peer.released(h.ino)
	}
}

// Read answers READ into buf.
func (m *rawFS) Read(_ <-chan struct{}, in *gofuse.ReadIn, buf []byte) (gofuse.ReadResult, gofuse.Status) {
	n, status := m.read(in, buf)
	if status != gofuse.OK {
		return nil, status
	}
	return gofuse.ReadResultData(buf[:n]), gofuse.OK
}

func (m *rawFS) read(in *gofuse.ReadIn, buf []byte) (int, gofuse.Status) {
	h := m.handles.get(in.Fh)
	if h == nil || h.file == nil {
		return 0, gofuse.EBADF
	}
	n, err := h.file.ReadAt(buf, int64(in.Offset))
	return n, m.status("read", h.ino, err)
}

// Write answers WRITE. Dirty pages of a mapping may come through any handle on
// the file that was opened for writing, also our own.
func (m *rawFS) Write(_ <-chan struct{}, in *gofuse.WriteIn, data []byte) (uint32, gofuse.Status) {
	h := m.handles.get(in.Fh)
	if h == nil {
		return 0, gofuse.EBADF
	}
	if h.file == nil {
		return 0, gofuse.EACCES // somebody maps a database for writing: not SQLite
	}
	n, err := h.file.WriteAt(data, int64(in.Offset))
	return uint32(n), m.status("write", h.ino, err)
}

// Flush answers FLUSH, which only ordinary files ask for: there close(2) writes
// back what was written to a mapping before anybody looks at the file, and a
// copied database is noticed before close returns.
func (m *rawFS) Flush(_ <-chan struct{}, in *gofuse.FlushIn) gofuse.Status {
	if h := m.handles.get(in.Fh); h != nil {
		if f, ok := h.file.(store.Flusher); ok {
			f.Flush()
		}
	}
	return gofuse.OK
}

func (m *rawFS) Fsync(_ <-chan struct{}, in *gofuse.FsyncIn) gofuse.Status {
	h := m.handles.get(in.Fh)
	if h == nil || h.file == nil {
		return gofuse.EBADF
	}
	return m.status("fsync", h.ino, h.file.Sync())
}

func (m *rawFS) Fallocate(_ <-chan struct{}, in *gofuse.FallocateIn) gofuse.Status {
	if in.Mode != 0 {
		return gofuse.Status(syscall.EOPNOTSUPP)
	}
	h := m.handles.get(in.Fh)
	if h == nil || h.file == nil {
		return gofuse.EBADF
	}
	if int64(in.Offset) < 0 || int64(in.Length) < 0 || int64(in.Offset+in.Length) < 0 {
		return gofuse.Status(syscall.EFBIG)
	}
	return m.status("fallocate", h.ino, h.file.Allocate(int64(in.Offset), int64(in.Length)))
}

// Ioctl is ENOTTY: SQLite asks for F2FS atomic writes.
func (m *rawFS) Ioctl(<-chan struct{}, *gofuse.IoctlIn, []byte, *gofuse.IoctlOut, []byte) gofuse.Status {
	return gofuse.Status(syscall.ENOTTY)
}

// What is ENOSYS, and what the kernel then does by itself, for good:
//
//	OPENDIR          no OPENDIR and RELEASEDIR any more; needs NO_OPENDIR_SUPPORT
//	FSYNCDIR         success; names are durable by the store's log (invariant 20)
//	LSEEK            SEEK_DATA and SEEK_HOLE as if there were no holes
//	COPY_FILE_RANGE  copies by READ and WRITE
//	ACCESS           never comes, by default_permissions
//	xattr            EOPNOTSUPP, without asking for security.capability at each write
//	POLL             always ready
//	INTERRUPT        none any more
//	TMPFILE, STATX, BMAP, SYNCFS: EOPNOTSUPP, GETATTR, EINVAL, success

func (m *rawFS) OpenDir(<-chan struct{}, *gofuse.OpenIn, *gofuse.OpenOut) gofuse.Status {
	if m.noOpenDir {
		return gofuse.ENOSYS
	}
	return gofuse.OK
}

// ReadDir answers READDIR. There is no OPENDIR, so each call lists the folder
// and goes on after the number that in.Offset names.
func (m *rawFS) ReadDir(_ <-chan struct{}, in *gofuse.ReadIn, out *gofuse.DirEntryList) gofuse.Status {
	ino := m.nodes.get(in.NodeId)
	if ino == nil {
		return gofuse.Status(syscall.ESTALE)
	}
	path, err := m.nodes.pathOf(ino)
	if err != nil {
		return gofuse.OK // removed, but still somebody's working folder: empty
	}
	entries, err := m.store.ReadDir(path)
	if err != nil {
		return m.status("readdir", ino, err)
	}
	self := ino.node.Attr().Ino
	if in.Offset < 1 && !out.AddDirEntry(gofuse.DirEntry{Name: ".", Mode: syscall.S_IFDIR, Ino: self, Off: 1}) {
		return gofuse.OK
	}
	if in.Offset < 2 && !out.AddDirEntry(gofuse.DirEntry{Name: "..", Mode: syscall.S_IFDIR, Ino: self, Off: 2}) {
		return gofuse.OK
	}
	for _, e := range ino.listing.number(entries) {
		if e.cookie <= in.Offset {
			continue
		}
		mode := uint32(syscall.S_IFREG)
		if e.Kind == store.KindDir {
			mode = syscall.S_IFDIR
		}
		if !out.AddDirEntry(gofuse.DirEntry{Name: e.Name, Mode: mode, Ino: e.Ino, Off: e.cookie}) {
			break
		}
	}
	return gofuse.OK
}

func (m *rawFS) StatFs(_ <-chan struct{}, _ *gofuse.InHeader, out *gofuse.StatfsOut) gofuse.Status {
	total, free, avail, files, filesFree, err := m.store.StatFS()
	if err != nil {
		return m.status("statfs", nil, err)
	}
	const block = 4096
	*out = gofuse.StatfsOut{
		Blocks: total / block, Bfree: free / block, Bavail: avail / block,
		Files: files, Ffree: filesFree,
		Bsize: block, Frsize: block, NameLen: 255,
	}
	return gofuse.OK
}
