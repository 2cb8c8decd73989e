// Package simdisk is a disk in memory for crash tests. It behaves like Linux
// with a journaling file system, but loses everything that it may lose.
//
// Data: a write changes the page cache at once. Each of its 512-byte sectors is
// remembered as a version; when the power fails (Cut), every sector by itself
// keeps one of its versions since the last sync, or the content from before. So
// writes are dropped, reordered and torn between sectors; a sector is never torn.
// Datasync makes the versions, and the size, of one file final.
//
// Names: create, mkdir, remove, rename and truncate are journaled in order. After
// a cut a prefix of the operations since the last SyncDir or SyncFS is there.
// Datasync makes the truncates of its file final, but not its name.
//
// A failed Datasync (by a hook) leaves the file as Linux does: its unsynced
// sectors count as clean, some of them reached the medium and some did not, reads
// show all, and a later Datasync returns nil without writing them. A direct read
// shows what the medium has.
//
// All chance comes from the seed and the order of operations.
package simdisk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"github.com/litefs-agent/litefs-agent/internal/disk"
)

// ErrStopped is the error of every operation after Cut, Kill or StopAt.
var ErrStopped = errors.New("simulated disk stopped")

const (
	sector = 512
	page   = 4096
)

// Kind is a kind of operation.
type Kind string

// The kinds of operations that are numbered and shown to the hook. Close, Size,
// Stat and Free are not.
const (
	OpOpen       Kind = "open" // also creates
	OpCreateTemp Kind = "createtemp"
	OpMkdir      Kind = "mkdir"
	OpRemove     Kind = "remove"
	OpRename     Kind = "rename"
	OpReadDir    Kind = "readdir"
	OpSyncDir    Kind = "syncdir"
	OpSyncFS     Kind = "syncfs"
	OpRead       Kind = "read"
	OpWrite      Kind = "write"
	OpTruncate   Kind = "truncate"
	OpDatasync   Kind = "datasync"
	OpAllocate   Kind = "allocate"
)

// Op is one operation, before it is done.
type Op struct {
	N      int64 // ordinal, from 1
	Kind   Kind
	Name   string // of the file when it was opened; the old name of a rename
	Off    int64
	Len    int64
	Direct bool
	Data   []byte // of a write; valid only during the hook
}

// Options are the parameters of New.
type Options struct {
	Seed      uint64
	BlockSize int   // of direct I/O; 0 is 512
	NoDirect  bool  // opening with disk.Direct fails with EINVAL
	NoAlloc   bool  // Allocate is not supported
	Capacity  int64 // bytes of 4 KiB pages that files may hold; 0 is unlimited
}

// Counts are numbers of operations that succeeded.
type Counts struct {
	Reads, Writes, Datasyncs, SyncDirs, SyncFSs int64
	WrittenBytes                                int64
}

// Disk is a simulated disk; it implements disk.FS.
type Disk struct {
	opts Options // set by New, then constant

	mu         sync.Mutex // guards all below
	rng        *rand.Rand
	stopped    bool
	names      map[string]*inode // the root is "."
	durable    map[string]*inode // names on the medium
	journal    []metaOp          // since durable
	seq        uint64            // of the last metadata operation
	hook       func(Op) error
	ordinal    int64
	stopAt     int64
	used       int64 // bytes
	counts     Counts
	violations []string
}

var _ disk.FS = (*Disk)(nil)

// metaOp is a journaled metadata operation. apply is nil for a truncate, which
// is recorded in the inode.
type metaOp struct {
	seq   uint64
	apply func(map[string]*inode)
}

// inode is a file or folder.
type inode struct {
	dir   bool
	perm  fs.FileMode
	opens int
	links int
	data  []byte // as the programs see it
	media []byte // on the medium for sure
	pend  map[int64][]version
	sizes []sizeVersion
	trunc uint64         // seq of the last truncate
	lost  map[int64]bool // sectors that a failed sync left clean but not on the medium
	pages map[int64]bool // allocated
	how   map[int64]int  // pages written since the last sync: 1 buffered, 2 directly, 3 both
}

// version is what a sector held for a while. It can only be on the medium if
// the truncate numbered seq is.
type version struct {
	seq   uint64
	trunc bool   // made by that truncate
	data  []byte // nil is zeros
}

type sizeVersion struct {
	seq   uint64
	trunc bool
	size  int64
}

func newInode(dir bool, perm fs.FileMode) *inode {
	return &inode{
		dir: dir, perm: perm, pend: map[int64][]version{}, lost: map[int64]bool{}, pages: map[int64]bool{}, how: map[int64]int{},
	}
}

// New returns an empty disk.
func New(o Options) *Disk {
	if o.BlockSize == 0 {
		o.BlockSize = sector
	}
	root := newInode(true, 0o700)
	root.links = 1
	return &Disk{
		opts: o, rng: rand.New(rand.NewPCG(o.Seed, 0x5ca1ab1e)),
		names: map[string]*inode{".": root}, durable: map[string]*inode{".": root},
	}
}

// SetHook sets a function that sees every numbered operation before it is done,
// and makes it fail by returning an error. It is called without locks and may
// use the methods that are not part of disk.FS.
func (d *Disk) SetHook(hook func(Op) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hook = hook
}

// StopAt makes operation n and all after it fail with ErrStopped. If operation n
// is a write, some sectors from its beginning are written.
func (d *Disk) StopAt(n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopAt = n
}

// SetCapacity changes Options.Capacity and returns the former one.
func (d *Disk) SetCapacity(n int64) (former int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	former, d.opts.Capacity = d.opts.Capacity, n
	return former
}

// Ordinal is the number of the last operation.
func (d *Disk) Ordinal() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ordinal
}

// Counts returns the counters.
func (d *Disk) Counts() Counts {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.counts
}

// Violations lists breaches of disk.Direct's rule: one page written directly and
// through the cache between two syncs.
func (d *Disk) Violations() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.violations)
}

// WasDurable says that the bytes [off, off+n) of file name, as programs see them
// now, and its name are on the medium for sure.
func (d *Disk) WasDurable(name string, off, n int64) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	ino := d.durable[clean(name)]
	if ino == nil || ino != d.names[clean(name)] || ino.dir || off+n > int64(len(ino.media)) || off+n > int64(len(ino.data)) {
		return false
	}
	for _, s := range ino.sizes {
		if s.size < off+n {
			return false
		}
	}
	for s := off / sector; s*sector < off+n; s++ {
		if len(ino.pend[s]) > 0 || ino.lost[s] {
			return false
		}
	}
	return true
}

// DurableBytes returns what is on the medium for sure under name, nil if there
// is no such name for sure.
func (d *Disk) DurableBytes(name string) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	ino := d.durable[clean(name)]
	if ino == nil || ino.dir {
		return nil
	}
	return append([]byte{}, ino.media...)
}

// Names lists all files and folders, sorted, without the root.
func (d *Disk) Names() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := slices.Sorted(maps.Keys(d.names))
	return slices.DeleteFunc(list, func(name string) bool { return name == "." })
}

// Image returns what a direct read of the whole file shows, nil if there is no
// such file. On a disk that Cut returned it is what the medium has.
func (d *Disk) Image(name string) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	ino := d.names[clean(name)]
	if ino == nil || ino.dir {
		return nil
	}
	p := append([]byte{}, ino.data...)
	for s := range ino.lost {
		if from, to := s*sector, min((s+1)*sector, int64(len(p))); from < to {
			clear(p[from:to])
			if from < int64(len(ino.media)) {
				copy(p[from:to], ino.media[from:])
			}
		}
	}
	return p
}

// Used is the number of bytes of the 4 KiB pages that files hold.
func (d *Disk) Used() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.used
}

// Corrupt inverts the bits of mask in one byte of a file, in cache and on the
// medium.
func (d *Disk) Corrupt(name string, off int64, mask byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ino := d.names[clean(name)]
	ino.data[off] ^= mask
	if off < int64(len(ino.media)) {
		ino.media[off] ^= mask
	}
}

// Cut is a power failure: it returns the disk as it is after the next boot. rng
// may be nil. The old disk is stopped.
func (d *Disk) Cut(rng *rand.Rand) *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopped = true
	if rng == nil {
		rng = d.rng
	}
	names := maps.Clone(d.durable)
	n, seq := rng.IntN(len(d.journal)+1), uint64(0)
	if rng.IntN(3) == 0 {
		n = len(d.journal)
	}
	for _, op := range d.journal[:n] {
		if op.apply != nil {
			op.apply(names)
		}
	}
	if n < len(d.journal) {
		seq = d.journal[n].seq - 1
	} else {
		seq = d.seq
	}
	after := New(d.opts)
	after.rng = rand.New(rand.NewPCG(rng.Uint64(), rng.Uint64()))
	after.seq = d.seq
	after.names = map[string]*inode{}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		ino := names[name].afterCut(rng, seq)
		ino.links = 1
		after.names[name] = ino
		after.used += int64(len(ino.pages)) * page
	}
	after.durable = maps.Clone(after.names)
	return after
}

// afterCut returns what is left when the truncates up to seq survive.
func (ino *inode) afterCut(rng *rand.Rand, seq uint64) *inode {
	left := newInode(ino.dir, ino.perm)
	if ino.dir {
		return left
	}
	size := ino.cutSize(rng, seq)
	data := make([]byte, size)
	copy(data, ino.media)
	for _, s := range slices.Sorted(maps.Keys(ino.pend)) {
		v, ok := pick(rng, ino.pend[s], seq)
		if ok && s*sector < size {
			to := data[s*sector : min((s+1)*sector, size)]
			clear(to)
			copy(to, v.data)
		}
	}
	left.data = data
	left.media = slices.Clone(data)
	for p := range ino.pages {
		left.pages[p] = true
	}
	return left
}

// pick chooses the version that is on the medium; false is the old content.
func pick(rng *rand.Rand, all []version, seq uint64) (version, bool) {
	n, floor := 0, -1
	for n < len(all) && all[n].seq <= seq {
		if all[n].trunc {
			floor = n
		}
		n++
	}
	low := max(floor, -1) // -1 stands for the old content
	i := low
	switch rng.IntN(3) {
	case 0:
		i = n - 1
	case 1:
		i = low + rng.IntN(n-low)
	}
	if i < 0 {
		return version{}, false
	}
	return all[i], true
}

func (ino *inode) cutSize(rng *rand.Rand, seq uint64) int64 {
	choice := []int64{int64(len(ino.media))}
	for _, s := range ino.sizes {
		if s.seq > seq {
			break
		}
		if s.trunc {
			choice = choice[:0]
		}
		choice = append(choice, s.size)
	}
	return choice[rng.IntN(len(choice))]
}

// Kill is the end of the process: what was written stays in the page cache, and
// can still be lost by a later Cut. Unnamed files are gone. The old disk and its
// files are stopped.
func (d *Disk) Kill() *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopped = true
	after := New(d.opts)
	after.rng = rand.New(rand.NewPCG(d.rng.Uint64(), d.rng.Uint64()))
	after.names, after.durable = d.names, d.durable
	after.journal, after.seq = d.journal, d.seq
	d.names, d.durable, d.journal = nil, nil, nil
	for _, ino := range after.names {
		ino.opens = 0
		after.used += int64(len(ino.pages)) * page
	}
	return after
}

// begin numbers an operation and asks the hook. torn says that the operation is
// the one that StopAt named; err is ErrStopped then.
func (d *Disk) begin(op Op) (torn bool, err error) {
	d.mu.Lock()
	if d.stopped {
		d.mu.Unlock()
		return false, ErrStopped
	}
	d.ordinal++
	op.N = d.ordinal
	if d.stopAt > 0 && op.N >= d.stopAt {
		d.stopped = true
		d.mu.Unlock()
		return true, ErrStopped
	}
	hook := d.hook
	d.mu.Unlock()
	if hook != nil {
		return false, hook(op)
	}
	return false, nil
}

func clean(name string) string {
	if name == "" {
		return "."
	}
	return name
}

func pathError(op, name string, err error) error { return &fs.PathError{Op: op, Path: name, Err: err} }

// meta does a metadata operation and journals it.
func (d *Disk) meta(apply func(map[string]*inode)) {
	d.seq++
	if apply != nil {
		apply(d.names)
	}
	d.journal = append(d.journal, metaOp{d.seq, apply})
}

func (d *Disk) unlink(ino *inode) {
	ino.links--
	d.forget(ino)
}

func (d *Disk) forget(ino *inode) {
	if ino.links <= 0 && ino.opens <= 0 {
		d.used -= int64(len(ino.pages)) * page
		ino.pages = map[int64]bool{}
	}
}

// parentOK says whether the folder of name exists.
func (d *Disk) parentOK(name string) bool {
	parent := d.names[path.Dir(name)]
	return parent != nil && parent.dir
}

// OpenFile implements disk.FS.
func (d *Disk) OpenFile(name string, flag int, perm os.FileMode) (disk.File, error) {
	direct := flag&disk.Direct != 0
	if _, err := d.begin(Op{Kind: OpOpen, Name: name, Direct: direct}); err != nil {
		return nil, pathError("open", name, err)
	}
	if !fs.ValidPath(clean(name)) {
		return nil, pathError("open", name, fs.ErrInvalid)
	}
	if direct && d.opts.NoDirect {
		return nil, pathError("open", name, syscall.EINVAL)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopped {
		return nil, pathError("open", name, ErrStopped)
	}
	ino := d.names[name]
	switch {
	case ino == nil && flag&os.O_CREATE == 0, ino == nil && !d.parentOK(name):
		return nil, pathError("open", name, syscall.ENOENT)
	case ino == nil:
		ino = newInode(false, perm.Perm())
		ino.links = 1
		d.meta(func(names map[string]*inode) { names[name] = ino })
	case flag&os.O_EXCL != 0 && flag&os.O_CREATE != 0:
		return nil, pathError("open", name, syscall.EEXIST)
	case ino.dir:
		return nil, pathError("open", name, syscall.EISDIR)
	case flag&os.O_TRUNC != 0 && len(ino.data) > 0:
		d.truncate(ino, 0)
	}
	ino.opens++
	return &file{d: d, ino: ino, name: name, direct: direct, write: flag&(os.O_RDWR|os.O_WRONLY) != 0}, nil
}

// CreateTemp implements disk.FS.
func (d *Disk) CreateTemp(dir string) (disk.File, error) {
	if _, err := d.begin(Op{Kind: OpCreateTemp, Name: dir}); err != nil {
		return nil, pathError("createtemp", dir, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if ino := d.names[clean(dir)]; ino == nil || !ino.dir {
		return nil, pathError("createtemp", dir, syscall.ENOENT)
	}
	ino := newInode(false, 0o600)
	ino.opens = 1
	return &file{d: d, ino: ino, name: dir + "/(unnamed)", write: true}, nil
}

// Mkdir implements disk.FS.
func (d *Disk) Mkdir(name string, perm os.FileMode) error {
	if _, err := d.begin(Op{Kind: OpMkdir, Name: name}); err != nil {
		return pathError("mkdir", name, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.names[clean(name)] != nil {
		return pathError("mkdir", name, syscall.EEXIST)
	}
	if !d.parentOK(name) {
		return pathError("mkdir", name, syscall.ENOENT)
	}
	ino := newInode(true, perm.Perm())
	ino.links = 1
	d.meta(func(names map[string]*inode) { names[name] = ino })
	return nil
}

// Remove implements disk.FS.
func (d *Disk) Remove(name string) error {
	if _, err := d.begin(Op{Kind: OpRemove, Name: name}); err != nil {
		return pathError("remove", name, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	ino := d.names[name]
	if ino == nil {
		return pathError("remove", name, syscall.ENOENT)
	}
	if ino.dir && d.populated(name) {
		return pathError("remove", name, syscall.ENOTEMPTY)
	}
	d.meta(func(names map[string]*inode) { delete(names, name) })
	d.unlink(ino)
	return nil
}

// populated reports whether the folder holds anything. The caller holds d.mu.
func (d *Disk) populated(name string) bool {
	for other := range d.names {
		if name == "." || strings.HasPrefix(other, name+"/") {
			return true
		}
	}
	return false
}

// Rename implements disk.FS.
func (d *Disk) Rename(oldname, newname string) error {
	if _, err := d.begin(Op{Kind: OpRename, Name: oldname}); err != nil {
		return pathError("rename", oldname, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	ino := d.names[oldname]
	if ino == nil || !d.parentOK(newname) {
		return pathError("rename", oldname, syscall.ENOENT)
	}
	over := d.names[newname]
	switch {
	case over == ino:
		return nil
	case over != nil && over.dir && !ino.dir:
		return pathError("rename", oldname, syscall.EISDIR)
	case over != nil && !over.dir && ino.dir:
		return pathError("rename", oldname, syscall.ENOTDIR)
	case strings.HasPrefix(newname, oldname+"/"):
		return pathError("rename", oldname, syscall.EINVAL)
	case over != nil && over.dir && d.populated(newname):
		return pathError("rename", oldname, syscall.ENOTEMPTY)
	}
	d.meta(func(names map[string]*inode) {
		for name, moved := range maps.Clone(names) {
			if name == oldname || strings.HasPrefix(name, oldname+"/") {
				delete(names, name)
				names[newname+name[len(oldname):]] = moved
			}
		}
	})
	if over != nil {
		d.unlink(over)
	}
	return nil
}

// info describes an inode as fs.FileInfo and fs.DirEntry.
type info struct {
	fakeTime
	name string
	size int64
	mode fs.FileMode
}

func (i info) Name() string               { return path.Base(i.name) }
func (i info) Size() int64                { return i.size }
func (i info) Mode() fs.FileMode          { return i.mode }
func (i info) Type() fs.FileMode          { return i.mode.Type() }
func (i info) IsDir() bool                { return i.mode.IsDir() }
func (i info) Sys() any                   { return nil }
func (i info) Info() (fs.FileInfo, error) { return i, nil }

func newInfo(name string, ino *inode) info {
	mode := ino.perm
	if ino.dir {
		mode |= fs.ModeDir
	}
	return info{name: name, size: int64(len(ino.data)), mode: mode}
}

// ReadDir implements disk.FS.
func (d *Disk) ReadDir(name string) ([]fs.DirEntry, error) {
	if _, err := d.begin(Op{Kind: OpReadDir, Name: name}); err != nil {
		return nil, pathError("readdir", name, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	name = clean(name)
	if ino := d.names[name]; ino == nil || !ino.dir {
		return nil, pathError("readdir", name, syscall.ENOENT)
	}
	var list []fs.DirEntry
	for _, other := range slices.Sorted(maps.Keys(d.names)) {
		if other != "." && path.Dir(other) == name {
			list = append(list, newInfo(other, d.names[other]))
		}
	}
	return list, nil
}

// Stat implements disk.FS.
func (d *Disk) Stat(name string) (fs.FileInfo, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopped {
		return nil, pathError("stat", name, ErrStopped)
	}
	ino := d.names[clean(name)]
	if ino == nil {
		return nil, pathError("stat", name, syscall.ENOENT)
	}
	return newInfo(clean(name), ino), nil
}

// commitJournal makes all metadata operations so far final.
func (d *Disk) commitJournal() {
	for _, op := range d.journal {
		if op.apply != nil {
			op.apply(d.durable)
		}
	}
	d.journal = nil
	for _, ino := range d.names {
		ino.commitTruncates()
	}
}

// SyncDir implements disk.FS.
func (d *Disk) SyncDir(name string) error {
	if _, err := d.begin(Op{Kind: OpSyncDir, Name: name}); err != nil {
		return pathError("syncdir", name, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if ino := d.names[clean(name)]; ino == nil || !ino.dir {
		return pathError("syncdir", name, syscall.ENOENT)
	}
	d.commitJournal()
	d.counts.SyncDirs++
	return nil
}

// SyncFS implements disk.FS.
func (d *Disk) SyncFS() error {
	if _, err := d.begin(Op{Kind: OpSyncFS}); err != nil {
		return pathError("syncfs", ".", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.commitJournal()
	for _, ino := range d.names {
		ino.sync()
	}
	d.counts.SyncFSs++
	return nil
}

// Free implements disk.FS. An unlimited disk has 1 TiB free.
func (d *Disk) Free() (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopped {
		return 0, ErrStopped
	}
	if d.opts.Capacity == 0 {
		return 1 << 40, nil
	}
	return max(d.opts.Capacity-d.used, 0), nil
}

// BlockSize implements disk.FS.
func (d *Disk) BlockSize() int { return d.opts.BlockSize }

// grow allocates the pages of [off, off+n), or fails with ENOSPC.
func (d *Disk) grow(ino *inode, off, n int64) error {
	var more []int64
	for p := off / page; p*page < off+n; p++ {
		if !ino.pages[p] {
			more = append(more, p)
		}
	}
	if d.opts.Capacity > 0 && len(more) > 0 && d.used+int64(len(more))*page > d.opts.Capacity {
		return syscall.ENOSPC
	}
	for _, p := range more {
		ino.pages[p] = true
	}
	d.used += int64(len(more)) * page
	return nil
}

func (d *Disk) truncate(ino *inode, size int64) {
	d.meta(nil)
	old := int64(len(ino.data))
	ino.trunc = d.seq
	ino.sizes = append(ino.sizes, sizeVersion{d.seq, true, size})
	if size < old {
		clear(ino.data[size:])
		for s := size / sector; s*sector < old; s++ {
			v := version{seq: d.seq, trunc: true}
			if s*sector < size {
				v.data = slices.Clone(ino.data[s*sector : size])
			}
			ino.pend[s] = append(ino.pend[s], v)
			delete(ino.lost, s)
		}
		for p := range ino.pages {
			if p*page >= size {
				delete(ino.pages, p)
				d.used -= page
			}
		}
	}
	ino.resize(size)
}

func (ino *inode) resize(size int64) { ino.data = resized(ino.data, size) }

func resized(p []byte, size int64) []byte {
	if size <= int64(len(p)) {
		return p[:size]
	}
	if size <= int64(cap(p)) {
		n := len(p)
		p = p[:size]
		clear(p[n:])
		return p
	}
	grown := make([]byte, size, max(size, 2*int64(len(p))))
	copy(grown, p)
	return grown
}

// sync makes data and size final.
func (ino *inode) sync() {
	ino.media = resized(ino.media, int64(len(ino.data)))
	for s := range ino.pend {
		if from := s * sector; from < int64(len(ino.data)) {
			copy(ino.media[from:], ino.data[from:min(from+sector, int64(len(ino.data)))])
		}
	}
	clear(ino.pend)
	clear(ino.how)
	ino.sizes = nil
	ino.trunc = 0
}

// commitTruncates makes the truncates final: what was before them cannot come
// back.
func (ino *inode) commitTruncates() {
	for i := len(ino.sizes) - 1; i >= 0; i-- {
		if ino.sizes[i].trunc {
			ino.media = resized(ino.media, ino.sizes[i].size)
			ino.sizes = slices.Clone(ino.sizes[i+1:])
			break
		}
	}
	for s, all := range ino.pend {
		for i := len(all) - 1; i >= 0; i-- {
			if all[i].trunc {
				if from := s * sector; from < int64(len(ino.media)) {
					to := ino.media[from:min(from+sector, int64(len(ino.media)))]
					clear(to)
					copy(to, all[i].data)
				}
				if i+1 == len(all) {
					delete(ino.pend, s)
				} else {
					ino.pend[s] = slices.Clone(all[i+1:])
				}
				break
			}
		}
	}
}

// failSync is what is left of a Datasync that failed.
func (ino *inode) failSync(rng *rand.Rand) {
	some := rng.IntN(2) == 0
	for _, s := range slices.Sorted(maps.Keys(ino.pend)) {
		all := ino.pend[s]
		if v, ok := pick(rng, all, ino.trunc); some && ok {
			from := s * sector
			ino.media = resized(ino.media, max(int64(len(ino.media)), from+sector))
			clear(ino.media[from : from+sector])
			copy(ino.media[from:from+sector], v.data)
		}
		ino.lost[s] = true
	}
	clear(ino.pend)
	clear(ino.how)
}

// file is an open file.
type file struct {
	d      *Disk
	ino    *inode
	name   string
	direct bool
	write  bool
	closed bool // guarded by d.mu
}

func (f *file) lock(op string) error {
	f.d.mu.Lock()
	switch {
	case f.closed:
		f.d.mu.Unlock()
		return pathError(op, f.name, fs.ErrClosed)
	case f.d.stopped:
		f.d.mu.Unlock()
		return pathError(op, f.name, ErrStopped)
	}
	return nil
}

func (f *file) aligned(p []byte, off int64) bool {
	block := int64(f.d.opts.BlockSize)
	return !f.direct || len(p) == 0 || off%block == 0 && int64(len(p))%block == 0 &&
		int64(uintptr(unsafe.Pointer(&p[0])))%block == 0
}

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	if _, err := f.d.begin(Op{Kind: OpRead, Name: f.name, Off: off, Len: int64(len(p)), Direct: f.direct}); err != nil {
		return 0, pathError("read", f.name, err)
	}
	if err := f.lock("read"); err != nil {
		return 0, err
	}
	defer f.d.mu.Unlock()
	if off < 0 || !f.aligned(p, off) {
		return 0, pathError("read", f.name, syscall.EINVAL)
	}
	f.d.counts.Reads++
	if off >= int64(len(f.ino.data)) {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	n := copy(p, f.ino.data[off:])
	if f.direct {
		for s := range f.ino.lost {
			from, to := max(s*sector, off), min((s+1)*sector, off+int64(n))
			if from < to {
				clear(p[from-off : to-off])
				if from < int64(len(f.ino.media)) {
					copy(p[from-off:to-off], f.ino.media[from:])
				}
			}
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	torn, err := f.d.begin(Op{Kind: OpWrite, Name: f.name, Off: off, Len: int64(len(p)), Direct: f.direct, Data: p})
	if torn {
		f.d.mu.Lock()
		defer f.d.mu.Unlock()
		if n := int64(len(p)); n > 0 && f.write && !f.closed && f.aligned(p, off) {
			cut := min(f.d.rng.Int64N(n/sector+2)*sector, n)
			if f.d.grow(f.ino, off, cut) == nil {
				f.put(p[:cut], off)
			}
		}
	}
	if err != nil {
		return 0, pathError("write", f.name, err)
	}
	if err := f.lock("write"); err != nil {
		return 0, err
	}
	defer f.d.mu.Unlock()
	switch {
	case !f.write:
		return 0, pathError("write", f.name, syscall.EBADF)
	case off < 0 || !f.aligned(p, off):
		return 0, pathError("write", f.name, syscall.EINVAL)
	}
	if err := f.d.grow(f.ino, off, int64(len(p))); err != nil {
		return 0, pathError("write", f.name, err)
	}
	f.put(p, off)
	f.d.counts.Writes++
	f.d.counts.WrittenBytes += int64(len(p))
	return len(p), nil
}

// put changes the page cache and remembers the versions.
func (f *file) put(p []byte, off int64) {
	if len(p) == 0 {
		return
	}
	ino, end := f.ino, off+int64(len(p))
	if end > int64(len(ino.data)) {
		ino.resize(end)
		ino.sizes = append(ino.sizes, sizeVersion{ino.trunc, false, end})
	}
	copy(ino.data[off:], p)
	first := off / sector * sector
	last := min((end+sector-1)/sector*sector, int64(len(ino.data)))
	kept := slices.Clone(ino.data[first:last])
	for at := first; at < last; at += sector {
		s := at / sector
		ino.pend[s] = append(ino.pend[s], version{seq: ino.trunc, data: kept[at-first : min(at-first+sector, last-first)]})
		delete(ino.lost, s)
	}
	how := 1
	if f.direct {
		how = 2
	}
	for pg := off / page; pg*page < end; pg++ {
		if ino.how[pg] |= how; ino.how[pg] == 3 {
			f.d.violations = append(f.d.violations, fmt.Sprintf("%s: page at %d written directly and through the cache", f.name, pg*page))
		}
	}
}

func (f *file) Close() error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if f.closed {
		return pathError("close", f.name, fs.ErrClosed)
	}
	f.closed = true
	if !f.d.stopped {
		f.ino.opens--
		f.d.forget(f.ino)
	}
	return nil
}

func (f *file) Size() (int64, error) {
	if err := f.lock("size"); err != nil {
		return 0, err
	}
	defer f.d.mu.Unlock()
	return int64(len(f.ino.data)), nil
}

func (f *file) Truncate(size int64) error {
	if _, err := f.d.begin(Op{Kind: OpTruncate, Name: f.name, Len: size}); err != nil {
		return pathError("truncate", f.name, err)
	}
	if err := f.lock("truncate"); err != nil {
		return err
	}
	defer f.d.mu.Unlock()
	if size < 0 || !f.write {
		return pathError("truncate", f.name, syscall.EINVAL)
	}
	f.d.truncate(f.ino, size)
	return nil
}

func (f *file) Datasync() error {
	_, err := f.d.begin(Op{Kind: OpDatasync, Name: f.name})
	if errors.Is(err, ErrStopped) {
		return pathError("fdatasync", f.name, err)
	}
	if lerr := f.lock("fdatasync"); lerr != nil {
		return lerr
	}
	defer f.d.mu.Unlock()
	if err != nil {
		f.ino.failSync(f.d.rng)
		return pathError("fdatasync", f.name, err)
	}
	f.ino.sync()
	f.d.counts.Datasyncs++
	return nil
}

func (f *file) Allocate(off, n int64) error {
	if _, err := f.d.begin(Op{Kind: OpAllocate, Name: f.name, Off: off, Len: n}); err != nil {
		return pathError("fallocate", f.name, err)
	}
	if err := f.lock("fallocate"); err != nil {
		return err
	}
	defer f.d.mu.Unlock()
	if f.d.opts.NoAlloc {
		return pathError("fallocate", f.name, errors.ErrUnsupported)
	}
	if err := f.d.grow(f.ino, off, n); err != nil {
		return pathError("fallocate", f.name, err)
	}
	return nil
}
