package fuse

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/store"
)

// The kernel's operation codes. Source: include/uapi/linux/fuse.h.
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opSetattr     = 4
	opReadlink    = 5
	opSymlink     = 6
	opMknod       = 8
	opMkdir       = 9
	opUnlink      = 10
	opRmdir       = 11
	opRename      = 12
	opLink        = 13
	opOpen        = 14
	opRead        = 15
	opWrite       = 16
	opStatfs      = 17
	opRelease     = 18
	opFsync       = 20
	opFlush       = 25
	opInit        = 26
	opOpendir     = 27
	opReaddir     = 28
	opReleasedir  = 29
	opFsyncdir    = 30
	opCreate      = 35
	opInterrupt   = 36
	opDestroy     = 38
	opIoctl       = 39
	opBatchForget = 42
	opFallocate   = 43
	opRename2     = 45
	opN           = 64 // more than any code
)

var opNames = [opN]string{
	opLookup: "LOOKUP", opForget: "FORGET", opGetattr: "GETATTR", opSetattr: "SETATTR", opReadlink: "READLINK",
	opSymlink: "SYMLINK", opMknod: "MKNOD", opMkdir: "MKDIR", opUnlink: "UNLINK", opRmdir: "RMDIR", opRename: "RENAME",
	opLink: "LINK", opOpen: "OPEN", opRead: "READ", opWrite: "WRITE", opStatfs: "STATFS", opRelease: "RELEASE",
	opFsync: "FSYNC", 21: "SETXATTR", 22: "GETXATTR", 23: "LISTXATTR", 24: "REMOVEXATTR", opFlush: "FLUSH",
	opInit: "INIT", opOpendir: "OPENDIR", opReaddir: "READDIR", opReleasedir: "RELEASEDIR", opFsyncdir: "FSYNCDIR",
	31: "GETLK", 32: "SETLK", 33: "SETLKW", 34: "ACCESS", opCreate: "CREATE", opInterrupt: "INTERRUPT", 37: "BMAP",
	opDestroy: "DESTROY", opIoctl: "IOCTL", 40: "POLL", 41: "NOTIFY_REPLY", opBatchForget: "BATCH_FORGET",
	opFallocate: "FALLOCATE", 44: "READDIRPLUS", opRename2: "RENAME2", 46: "LSEEK", 47: "COPY_FILE_RANGE",
	50: "SYNCFS", 51: "TMPFILE", 52: "STATX", 53: "COPY_FILE_RANGE_64",
}

func opName(op int) string {
	if name := opNames[op]; name != "" {
		return name
	}
	return fmt.Sprintf("OP%d", op)
}

const (
	maxWrite   = 128 << 10
	inSize     = maxWrite + 4096 // a WRITE with its header, or any other request
	outHeader  = int(unsafe.Sizeof(gofuse.OutHeader{}))
	smallReply = outHeader + int(unsafe.Sizeof(gofuse.CreateOut{})) + 64 // any reply but READ and READDIR
)

// A call is one request and the memory of its reply. It belongs to the reader
// that handles it.
type call struct {
	in  []byte // the request, 8-byte aligned
	out []byte // the reply, header first; cap is at least smallReply

	reader  bool      // whoever handles it has become the reader again before it replied
	yielded time.Time // see yield
}

// A connection serves one /dev/fuse descriptor.
type connection struct {
	fd  int          // set by newConnection, closed by run under closing
	fs  *rawFS       // set by newConnection, then constant
	log *slog.Logger // set by newConnection, then constant

	readers readers
	drain   atomic.Bool   // answer everything with an error
	done    chan struct{} // closed when nothing is served any more and fd is closed
	closing sync.RWMutex  // held for reading by notify, so that fd is not closed under it
	closed  bool          // fd is closed; guarded by closing

	counts [opN]atomic.Uint64 // requests since the start, by operation
	bufs   sync.Pool          // of *call, for readers
}

func newConnection(fd int, fs *rawFS, log *slog.Logger) (*connection, error) {
	c := &connection{fd: fd, fs: fs, log: log, done: make(chan struct{})}
	c.bufs.New = func() any {
		return &call{in: make([]byte, inSize), out: make([]byte, outHeader, smallReply)}
	}
	return c, c.readers.init(c)
}

// run serves until the mount is gone or quit is set, then closes the descriptor.
func (c *connection) run() {
	c.readers.run()
	c.closing.Lock()
	c.closed = true
	unix.Close(c.fd)
	c.closing.Unlock()
	close(c.done)
}

// take handles the n bytes in k.
func (c *connection) take(k *call, n int) {
	if n < int(unsafe.Sizeof(gofuse.InHeader{})) {
		c.log.Error("short request from the kernel", "bytes", n)
		return
	}
	h := (*gofuse.InHeader)(unsafe.Pointer(&k.in[0]))
	c.counts[min(h.Opcode, opN-1)].Add(1)
	if c.readers.waiting.Load() > 0 || c.waits(h, k.in[:n]) {
		c.readers.relieve()
	}
	in := k.in
	k.in = in[:n]
	c.serve(k)
	k.in = in
}

// waits reports whether a request may wait for a disk, or for what needs
// requests to be served. A WRITE to an ordinary file is bracketed by beginWait.
func (c *connection) waits(h *gofuse.InHeader, in []byte) bool {
	switch h.Opcode {
	case opWrite:
		return c.fs.store.LogAhead()
	case opFsync:
		// A journal is in memory, and what was committed before it is durable: the
		// two FSYNCs of a journal in each transaction wait for nothing.
		ino := c.fs.nodes.get(h.NodeId)
		return ino != nil && ino.node.Kind() != store.KindJournal
	case opReaddir, opStatfs, opRename, opRename2, opMkdir, opRmdir, opMknod, opFallocate:
		return true
	case opRead, opSetattr, opOpen, opRelease:
		ino := c.fs.nodes.get(h.NodeId)
		return ino != nil && !inMemory(ino.node.Kind())
	case opLookup:
		return !sidecar(name(in, 0))
	case opUnlink:
		return !sidecar(name(in, 0))
	case opCreate:
		return !sidecar(name(in, int(unsafe.Sizeof(gofuse.CreateIn{})-unsafe.Sizeof(gofuse.InHeader{}))))
	}
	return false
}

// inMemory reports whether files of this kind live in memory.
func inMemory(kind store.Kind) bool {
	return kind == store.KindJournal || kind == store.KindWAL || kind == store.KindShm
}

// serve answers one request.
func (c *connection) serve(k *call) {
	h := (*gofuse.InHeader)(unsafe.Pointer(&k.in[0]))
	k.out = k.out[:outHeader]
	status, reply := c.dispatch(k, h)
	if !reply {
		return
	}
	if status != gofuse.OK {
		k.out = k.out[:outHeader]
	}
	c.readers.resume(k) // before the program can make its next request
	o := (*gofuse.OutHeader)(unsafe.Pointer(&k.out[0]))
	o.Length, o.Status, o.Unique = uint32(len(k.out)), -int32(status), h.Unique
	if err := c.write(k.out); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
		// ENOENT and ENODEV: nobody waits for it any more.
		c.fs.faults.log(c.log, "replying to the kernel failed", "op", opName(int(min(h.Opcode, opN-1))), "err", err)
	}
	if status == gofuse.OK && (h.Opcode == opOpen || h.Opcode == opCreate) {
		c.fs.peer.replied(k.out, h.Opcode)
	}
}

func (c *connection) write(b []byte) error {
	for {
		_, err := unix.Write(c.fd, b)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// arg is the request of k as a T.
func arg[T any](k *call) *T {
	if len(k.in) < int(unsafe.Sizeof(*new(T))) {
		panic(fmt.Sprintf("request of %d bytes is too short", len(k.in)))
	}
	return (*T)(unsafe.Pointer(&k.in[0]))
}

// result makes room for a T in the reply of k.
func result[T any](k *call) *T {
	n := outHeader + int(unsafe.Sizeof(*new(T)))
	k.out = k.out[:n]
	clear(k.out[outHeader:])
	return (*T)(unsafe.Pointer(&k.out[outHeader]))
}

// payload makes room for n bytes in the reply of k.
func (k *call) payload(n uint32) []byte {
	n = min(n, maxWrite)
	if size := outHeader + int(n); cap(k.out) < size {
		k.out = make([]byte, size)
	} else {
		k.out = k.out[:size]
	}
	return k.out[outHeader:]
}

// name returns the name that begins skip bytes after the header.
func name(in []byte, skip int) string {
	first, _ := names(in, int(unsafe.Sizeof(gofuse.InHeader{}))+skip)
	return first
}

// names returns the NUL-terminated names from off.
func names(in []byte, off int) (first, second string) {
	if off > len(in) {
		return "", ""
	}
	b, rest, _ := bytes.Cut(in[off:], []byte{0})
	b2, _, _ := bytes.Cut(rest, []byte{0})
	return string(b), string(b2)
}

func nameAfter[T any](k *call) string {
	first, _ := names(k.in, int(unsafe.Sizeof(*new(T))))
	return first
}

// dispatch calls the method for a request. A panic there is EIO for that
// request and no more.
func (c *connection) dispatch(k *call, h *gofuse.InHeader) (status gofuse.Status, reply bool) {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		status, reply = gofuse.EIO, h.Opcode != opForget && h.Opcode != opBatchForget
		c.panicked(h, p)
	}()
	m := c.fs
	if c.drain.Load() && h.Opcode != opForget && h.Opcode != opBatchForget && h.Opcode != opRelease {
		return gofuse.Status(syscall.ENOTCONN), true
	}
	switch h.Opcode {
	case opLookup:
		return m.Lookup(nil, h, nameAfter[gofuse.InHeader](k), result[gofuse.EntryOut](k)), true
	case opForget:
		m.Forget(h.NodeId, arg[gofuse.ForgetIn](k).Nlookup)
		return 0, false
	case opBatchForget:
		c.batchForget(k)
		return 0, false
	case opGetattr:
		return m.GetAttr(nil, arg[gofuse.GetAttrIn](k), result[gofuse.AttrOut](k)), true
	case opSetattr:
		return m.SetAttr(nil, arg[gofuse.SetAttrIn](k), result[gofuse.AttrOut](k)), true
	case opOpen:
		return m.Open(nil, arg[gofuse.OpenIn](k), result[gofuse.OpenOut](k)), true
	case opCreate:
		return m.Create(nil, arg[gofuse.CreateIn](k), nameAfter[gofuse.CreateIn](k), result[gofuse.CreateOut](k)), true
	case opRead:
		in := arg[gofuse.ReadIn](k)
		n, status := m.read(in, k.payload(in.Size))
		k.out = k.out[:outHeader+n]
		return status, true
	case opWrite:
		m.store.AwaitLog()
		return c.writeData(k), true
	case opRelease:
		m.Release(nil, arg[gofuse.ReleaseIn](k))
		return gofuse.OK, true
	case opFsync:
		return m.Fsync(nil, arg[gofuse.FsyncIn](k)), true
	case opFlush:
		return m.Flush(nil, arg[gofuse.FlushIn](k)), true
	case opUnlink:
		return m.Unlink(nil, h, nameAfter[gofuse.InHeader](k)), true
	case opRmdir:
		return m.Rmdir(nil, h, nameAfter[gofuse.InHeader](k)), true
	case opMkdir:
		return m.Mkdir(nil, arg[gofuse.MkdirIn](k), nameAfter[gofuse.MkdirIn](k), result[gofuse.EntryOut](k)), true
	case opMknod:
		return m.Mknod(nil, arg[gofuse.MknodIn](k), nameAfter[gofuse.MknodIn](k), result[gofuse.EntryOut](k)), true
	case opRename:
		in := arg[gofuse.Rename1In](k)
		from, to := names(k.in, int(unsafe.Sizeof(*in)))
		return m.Rename(nil, &gofuse.RenameIn{InHeader: *h, Newdir: in.Newdir}, from, to), true
	case opRename2:
		in := arg[gofuse.RenameIn](k)
		from, to := names(k.in, int(unsafe.Sizeof(*in)))
		return m.Rename(nil, in, from, to), true
	case opLink:
		return m.Link(nil, nil, "", nil), true
	case opSymlink:
		return m.Symlink(nil, nil, "", "", nil), true
	case opReadlink:
		_, status := m.Readlink(nil, h)
		return status, true
	case opFallocate:
		return m.Fallocate(nil, arg[gofuse.FallocateIn](k)), true
	case opIoctl:
		return m.Ioctl(nil, nil, nil, nil, nil), true
	case opOpendir:
		return m.OpenDir(nil, arg[gofuse.OpenIn](k), result[gofuse.OpenOut](k)), true
	case opReaddir:
		in := arg[gofuse.ReadIn](k)
		buf := k.payload(in.Size)
		list := gofuse.NewDirEntryList(buf, in.Offset)
		status := m.ReadDir(nil, in, list)
		k.out = k.out[:outHeader+dirListSize(buf, list, in.Offset)]
		return status, true
	case opReleasedir, opDestroy:
		return gofuse.OK, true
	case opStatfs:
		return m.StatFs(nil, h, result[gofuse.StatfsOut](k)), true
	}
	return gofuse.ENOSYS, true
}

// dirListSize returns how many bytes of buf the list fills; go-fuse keeps that
// to itself. An entry is 24 bytes and its name, padded to 8.
func dirListSize(buf []byte, list *gofuse.DirEntryList, from uint64) (n int) {
	type dirent struct {
		Ino, Off     uint64
		NameLen, Typ uint32
	}
	if list.Offset == from {
		return 0
	}
	for {
		d := (*dirent)(unsafe.Pointer(&buf[n]))
		n += (int(unsafe.Sizeof(*d)) + int(d.NameLen) + 7) &^ 7
		if d.Off == list.Offset {
			return n
		}
	}
}

func (c *connection) writeData(k *call) gofuse.Status {
	in := arg[gofuse.WriteIn](k)
	data := k.in[unsafe.Sizeof(*in):]
	if uint32(len(data)) < in.Size {
		return gofuse.EIO
	}
	if h := c.fs.handles.get(in.Fh); h != nil && h.ino.node.Kind() == store.KindOrdinary {
		c.readers.beginWait()
		defer c.readers.endWait()
	}
	n, status := c.fs.Write(nil, in, data[:in.Size])
	result[gofuse.WriteOut](k).Size = n
	return status
}

func (c *connection) batchForget(k *call) {
	const head = int(unsafe.Sizeof(gofuse.InHeader{})) + 8
	if len(k.in) < head {
		return
	}
	type one struct{ id, n uint64 }
	n := *(*uint32)(unsafe.Pointer(&k.in[head-8]))
	rest := k.in[head:]
	for ; n > 0 && len(rest) >= 16; n-- {
		o := (*one)(unsafe.Pointer(&rest[0]))
		c.fs.Forget(o.id, o.n)
		rest = rest[16:]
	}
}

// panicked reports a panic in a handler.
func (c *connection) panicked(h *gofuse.InHeader, p any) {
	c.log.Error("panic in a request", "op", opName(int(min(h.Opcode, opN-1))), "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	ino := c.fs.nodes.get(h.NodeId)
	if ino == nil || c.fs.opt.OnPanic == nil {
		return
	}
	defer func() {
		if p := recover(); p != nil {
			c.log.Error("panic in OnPanic", "panic", fmt.Sprint(p))
		}
	}()
	c.fs.opt.OnPanic(ino.node)
}

// Requests returns how many requests of each kind the kernel has made.
func (c *connection) requests() map[string]uint64 {
	counts := map[string]uint64{}
	for op := range c.counts {
		if n := c.counts[op].Load(); n > 0 {
			counts[opName(op)] = n
		}
	}
	return counts
}

// handshake answers INIT, which is the first request.
func (c *connection) handshake() error {
	buf := make([]byte, inSize)
	n, err := unix.Read(c.fd, buf)
	if err != nil {
		return fmt.Errorf("read INIT: %w", err)
	}
	in := (*gofuse.InitIn)(unsafe.Pointer(&buf[0]))
	if n < int(unsafe.Sizeof(gofuse.InHeader{}))+16 || in.Opcode != opInit {
		return fmt.Errorf("the kernel's first request is %s of %d bytes, not INIT", opName(int(min(in.Opcode, opN-1))), n)
	}
	reply := make([]byte, outHeader+int(unsafe.Sizeof(gofuse.InitOut{})))
	head := (*gofuse.OutHeader)(unsafe.Pointer(&reply[0]))
	head.Length, head.Unique = uint32(len(reply)), in.Unique
	if in.Major != 7 || in.Minor < 28 { // MAX_PAGES and others: Linux 4.20
		head.Length, head.Status = uint32(outHeader), -int32(syscall.EPROTO)
		c.write(reply[:outHeader])
		return fmt.Errorf("the kernel speaks FUSE %d.%d; 7.28 (Linux 4.20) or later is needed", in.Major, in.Minor)
	}
	const want = gofuse.CAP_ASYNC_READ | gofuse.CAP_BIG_WRITES | gofuse.CAP_PARALLEL_DIROPS | gofuse.CAP_MAX_PAGES |
		gofuse.CAP_NO_OPENDIR_SUPPORT | gofuse.CAP_EXPLICIT_INVAL_DATA
	out := (*gofuse.InitOut)(unsafe.Pointer(&reply[outHeader]))
	*out = gofuse.InitOut{
		Major: 7, Minor: min(in.Minor, 31),
		MaxReadAhead:  min(in.MaxReadAhead, maxWrite),
		Flags:         in.Flags & want,
		MaxBackground: 12, CongestionThreshold: 9,
		MaxWrite: maxWrite, TimeGran: 1,
		MaxPages: uint16((maxWrite-1)/syscall.Getpagesize() + 1),
	}
	c.fs.noOpenDir = out.Flags&gofuse.CAP_NO_OPENDIR_SUPPORT != 0
	if err := c.write(reply); err != nil {
		return fmt.Errorf("answer INIT: %w", err)
	}
	return nil
}

// notify tells the kernel something; code is one of FUSE_NOTIFY_*. It may block
// until requests have been served.
func (c *connection) notify(code int32, body unsafe.Pointer, size uintptr, data []byte) error {
	b := make([]byte, outHeader, outHeader+int(size)+len(data))
	b = append(b, unsafe.Slice((*byte)(body), size)...)
	b = append(b, data...)
	o := (*gofuse.OutHeader)(unsafe.Pointer(&b[0]))
	o.Length, o.Status = uint32(len(b)), code
	c.closing.RLock()
	defer c.closing.RUnlock()
	if c.closed {
		return unix.ENODEV
	}
	err := c.write(b)
	if errors.Is(err, unix.ENOENT) { // the kernel has nothing of it
		return nil
	}
	return err
}

func (c *connection) invalidateInode(id uint64, off, n int64) error {
	body := gofuse.NotifyInvalInodeOut{Ino: id, Off: off, Length: n}
	return c.notify(-gofuse.NOTIFY_INVAL_INODE, unsafe.Pointer(&body), unsafe.Sizeof(body), nil)
}

func (c *connection) invalidateEntry(parent uint64, name string) error {
	body := gofuse.NotifyInvalEntryOut{Parent: parent, NameLen: uint32(len(name))}
	return c.notify(-gofuse.NOTIFY_INVAL_ENTRY, unsafe.Pointer(&body), unsafe.Sizeof(body), append([]byte(name), 0))
}

func (c *connection) storeData(id uint64, off int64, data []byte) error {
	body := gofuse.NotifyStoreOut{Nodeid: id, Offset: uint64(off), Size: uint32(len(data))}
	return c.notify(-gofuse.NOTIFY_STORE_CACHE, unsafe.Pointer(&body), unsafe.Sizeof(body), data)
}
