package store

import (
	"fmt"
	"os"
	"path"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/sabotage"
	"github.com/litefs-agent/litefs-agent/internal/sqlitefile"
)

// filesDir is where the folders and the ordinary files of the mount lie.
const filesDir = "files"

// A file is a node with bytes that is a database, may become one, or is an
// ordinary file. It is an ordinary file until a transaction commits in it or a
// whole database was copied into it.
type file struct {
	st  *Store
	ino uint64

	db     atomic.Pointer[DB] // set once a journal or WAL was made beside it
	isDB   atomic.Bool        // a transaction committed
	gone   atomic.Bool        // unlinked or dropped
	moved  atomic.Bool        // gone: it became the journal, WAL or wal-index of a database
	onDisk atomic.Bool        // bytes under the layers are those of the ordinary file

	mode  atomic.Uint32
	size  atomic.Int64 // of the ordinary file
	mtime atomic.Int64 // unix nanoseconds, of the ordinary file

	mu        sync.Mutex // guards all below; taken after DB.mu and Store.nsMu
	path      string
	back      disk.File // the ordinary file, while somebody has it open
	opens     int
	writers   int
	copied    bool // written without a journal since the last look at it
	named     bool // its name was made durable
	candidate bool // may hold a whole database: look before anybody uses it
	shm       *sideFile
	sides     int // journals, WALs and wal-indexes that have a name

	adoptMu sync.Mutex // held while the file is looked at; taken before all others
}

var _ Node = (*file)(nil)

func (st *Store) newFile(path string, mode uint32) *file {
	f := &file{st: st, ino: st.inos.next(), path: path}
	f.mode.Store(mode & 0o7777)
	f.mtime.Store(st.opt.Now().UnixNano())
	return f
}

// Kind implements Node. A file beside which a journal was made is a database to
// the mount, since its locks count.
func (f *file) Kind() Kind {
	if f.isDB.Load() || f.db.Load() != nil {
		return KindDatabase
	}
	return KindOrdinary
}

// Attr implements Node.
func (f *file) Attr() Attr {
	a := Attr{Kind: f.Kind(), Ino: f.ino, Mode: f.mode.Load(), Size: f.size.Load(), Mtime: time.Unix(0, f.mtime.Load()), Nlink: 1}
	if f.gone.Load() {
		a.Nlink = 0
	}
	if db := f.db.Load(); db != nil {
		a.Size = db.size.Load()
		if t := db.mtime.Load(); t != 0 {
			a.Mtime = time.Unix(0, t)
		}
	}
	return a
}

// Path is where the file is at the mount, for the mount's own opening of it.
func (f *file) Path() string { return f.name() }

func (f *file) backed() bool        { return f.onDisk.Load() }
func (f *file) ordinarySize() int64 { return f.size.Load() }

func (f *file) backing() disk.File {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.back
}

func (f *file) name() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.path
}

func (f *file) inUse() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.opens > 0
}

func (f *file) shmNode() Node {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.shm == nil {
		return nil
	}
	return f.shm
}

// shmOpen reports whether anybody has the wal-index open: one that a killed
// program left is no sign of a connection that uses it.
func (f *file) shmOpen() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.shm != nil && f.shm.opens.Load() > 0
}

// Open implements Node.
func (f *file) Open(write bool) (Handle, error) {
	f.st.adoptIfCandidate(f)
	if err := f.st.adoptSide(f.name()); err != nil {
		return nil, err
	}
	if f.isDB.Load() && f.gone.Load() || f.moved.Load() {
		return nil, ErrStale // dropped or moved: the kernel looks the name up again
	}
	if db := f.db.Load(); db != nil && f.isDB.Load() && !f.backed() {
		if _, err := db.openFiles(false); err != nil {
			return nil, err
		}
	}
	return f.openOrdinary(write)
}

func (f *file) openOrdinary(write bool) (*dbHandle, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.onDisk.Load() && f.back == nil {
		b, err := f.st.fs.OpenFile(path.Join(filesDir, f.path), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		f.back = b
	}
	f.opens++
	if write {
		f.writers++
	}
	return &dbHandle{f: f, write: write}, nil
}

// SetSize implements Node.
func (f *file) SetSize(h Handle, size int64) error {
	dh, _ := h.(*dbHandle)
	db := f.db.Load()
	if db == nil {
		return f.truncateOrdinary(size)
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	if err := db.mayWrite(); err != nil {
		return err
	}
	switch {
	case db.journal != nil && db.journal.armed && !db.journal.committed:
		return db.truncateTxn(dh, size)
	case !db.exists:
		return f.truncateLocked(db, size)
	case db.wal != nil && db.wal.valid:
		return db.truncateWALMode(size)
	case size >= db.at.size():
		// Late truncation after a shrink, or an extension with zeros.
		db.size.Store(size)
		return nil
	}
	return db.refuse("truncation to %d bytes", size)
}

// truncateWALMode is the truncation at the end of a checkpoint. Where newer
// transactions made the database larger it is only what stat shows.
func (db *DB) truncateWALMode(size int64) error {
	if size < db.size.Load() && size >= db.at.size() {
		top := db.stack.Load().committed[0]
		top.lsn = max(top.lsn, db.last)
		top.cut(size)
		db.st.flushSoon(db)
	}
	db.size.Store(size)
	return nil
}

// refuse answers a change of a database without a commit point: EACCES either
// way, but the message names what it was.
func (db *DB) refuse(format string, args ...any) error {
	what := fmt.Sprintf(format, args...)
	held, err := db.st.reserved(db.file)
	if err != nil {
		return err
	}
	if held {
		db.log.Warn("write refused: journal_mode MEMORY or OFF gives no commit point", "what", what)
		return fmt.Errorf("%s: %s: %w", db.name, what, ErrRefused)
	}
	db.log.Warn("write refused: not through SQLite; use litefs-agent import", "what", what)
	return fmt.Errorf("%s: %s: %w", db.name, what, ErrOverwrite)
}

func (db *DB) mayWrite() error {
	if db.dropped {
		return fmt.Errorf("%s: %w", db.name, ErrStale)
	}
	if !db.st.opt.Writable(db.name) {
		return fmt.Errorf("%s: %w", db.name, ErrReplica)
	}
	return db.fenced()
}

func (f *file) truncateLocked(db *DB, size int64) error {
	if err := f.truncateOrdinary(size); err != nil {
		return err
	}
	db.size.Store(size)
	return nil
}

func (f *file) truncateOrdinary(size int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	b := f.back
	if b == nil {
		var err error
		if b, err = f.st.fs.OpenFile(path.Join(filesDir, f.path), os.O_RDWR, 0); err != nil {
			return err
		}
		defer b.Close()
	}
	if err := b.Truncate(size); err != nil {
		return err
	}
	f.size.Store(size)
	f.mtime.Store(f.st.opt.Now().UnixNano())
	f.copied = true
	return nil
}

// chmoder is what disk.OS can do beyond disk.FS.
type chmoder interface {
	Chmod(name string, mode os.FileMode) error
	Chtimes(name string, mtime time.Time) error
}

// SetMode implements Node.
func (f *file) SetMode(mode uint32) error {
	f.mode.Store(mode & 0o7777)
	if c, ok := f.st.fs.(chmoder); ok && f.onDisk.Load() && !f.gone.Load() {
		return c.Chmod(path.Join(filesDir, f.name()), os.FileMode(mode&0o777))
	}
	return nil
}

// SetTime implements Node.
func (f *file) SetTime(t time.Time) error {
	f.mtime.Store(t.UnixNano())
	if c, ok := f.st.fs.(chmoder); ok && f.onDisk.Load() && !f.gone.Load() {
		return c.Chtimes(path.Join(filesDir, f.name()), t)
	}
	return nil
}

// A dbHandle is one open file of a database or an ordinary file.
type dbHandle struct {
	f     *file
	write bool
}

var _ Handle = (*dbHandle)(nil)

// ReadAt implements Handle.
func (h *dbHandle) ReadAt(p []byte, off int64) (int, error) {
	f := h.f
	db := f.db.Load()
	size := f.size.Load()
	if db != nil {
		size = db.size.Load()
	}
	if off >= size {
		return 0, nil
	}
	p = p[:min(int64(len(p)), size-off)]
	if db != nil {
		if sabotage.On(sabotage.ReadWithoutLock) {
			db.flushMu.Lock()
			defer db.flushMu.Unlock()
		}
		if err := db.readAt(p, off); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	b := f.backing()
	if b == nil {
		return 0, syscall.EBADF
	}
	n, err := b.ReadAt(p, off)
	if n == len(p) || err == nil {
		return n, nil
	}
	if n > 0 || err.Error() == "EOF" {
		return n, nil
	}
	return 0, err
}

// WriteAt implements Handle.
func (h *dbHandle) WriteAt(p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := h.writeAt(p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (h *dbHandle) writeAt(p []byte, off int64) error {
	f := h.f
	db := f.db.Load()
	if db == nil {
		return f.writeOrdinary(p, off)
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	if err := db.mayWrite(); err != nil {
		return err
	}
	switch {
	case db.journal != nil && db.journal.armed && !db.journal.committed:
		return db.writeTxn(h, p, off)
	case !db.exists:
		if err := f.writeOrdinary(p, off); err != nil {
			return err
		}
		db.size.Store(f.size.Load())
		return nil
	case off >= db.at.size() && allZero(p):
		// posix_fallocate, chunk_size and SIZE_HINT extend beyond the last page.
		db.size.Store(max(db.size.Load(), off+int64(len(p))))
		return nil
	case db.wal != nil && db.wal.valid:
		return db.checkpointWrite(db.wal, p, off)
	}
	return db.refuse("write of %d bytes at %d", len(p), off)
}

// writeOrdinary passes a write through. The header of an SQLite database that
// somebody writes under SQLite's locks and without a journal is the first write
// of a transaction without commit point, and refused.
func (f *file) writeOrdinary(p []byte, off int64) error {
	magic := sqlitefile.DatabaseMagic
	if off == 0 && len(p) >= len(magic) && string(p[:len(magic)]) == magic {
		held, err := f.st.reserved(f)
		if err != nil {
			return err
		}
		if held {
			return fmt.Errorf("%s: %w", f.name(), ErrRefused)
		}
	}
	b := f.backing()
	if b == nil {
		return syscall.EBADF
	}
	if _, err := b.WriteAt(p, off); err != nil {
		return f.st.noSpace(err)
	}
	f.mu.Lock()
	f.copied = true
	f.size.Store(max(f.size.Load(), off+int64(len(p))))
	f.mtime.Store(f.st.opt.Now().UnixNano())
	f.mu.Unlock()
	return nil
}

func allZero(p []byte) bool {
	for _, c := range p {
		if c != 0 {
			return false
		}
	}
	return true
}

// Sync implements Handle: a real fsync of an ordinary file (invariant 21), the
// log for a database.
func (h *dbHandle) Sync() error {
	if db := h.f.db.Load(); db != nil {
		if !h.f.backed() || h.f.isDB.Load() || db.armed() {
			return db.syncDatabase(h)
		}
	}
	return h.f.syncOrdinary()
}

func (db *DB) armed() bool {
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.journal != nil && db.journal.armed
}

func (f *file) syncOrdinary() error {
	b := f.backing()
	if b == nil || sabotage.On(sabotage.FileSynced) {
		return nil
	}
	if err := b.Datasync(); err != nil {
		return err
	}
	f.mu.Lock()
	named, p := f.named, f.path
	f.mu.Unlock()
	if named {
		return nil
	}
	// The name, and those of the folders above it.
	for dir := path.Dir(path.Join(filesDir, p)); ; dir = path.Dir(dir) {
		if err := f.st.fs.SyncDir(dir); err != nil {
			return err
		}
		if dir == filesDir {
			break
		}
	}
	f.mu.Lock()
	f.named = true
	f.mu.Unlock()
	return nil
}

// Allocate implements Handle.
func (h *dbHandle) Allocate(off, n int64) error {
	if h.f.Attr().Size >= off+n {
		return nil
	}
	return h.f.SetSize(h, off+n)
}

// Flush is close(2) of one descriptor: if nobody else writes to an ordinary file
// that holds a whole database, it becomes one before close returns.
func (h *dbHandle) Flush() {
	f := h.f
	f.mu.Lock()
	look := h.write && f.writers == 1 && f.copied && !f.gone.Load()
	f.mu.Unlock()
	if look {
		f.st.mayBeDatabase(f)
	}
}

// Release implements Handle.
func (h *dbHandle) Release() {
	f := h.f
	f.mu.Lock()
	f.opens--
	if h.write {
		f.writers--
	}
	last, copied := f.opens == 0, h.write && f.writers == 0 && f.copied && !f.gone.Load()
	if last && f.back != nil && !f.db0() {
		_ = f.back.Close()
		f.back = nil
	}
	f.mu.Unlock()
	if copied {
		f.st.mayBeDatabase(f)
	}
	if db := f.db.Load(); last && db != nil {
		db.lastClose()
	}
}

// db0 reports whether a database still reads through the ordinary file.
func (f *file) db0() bool { return f.db.Load() != nil && f.onDisk.Load() }

// lastClose gives back what only open files need.
func (db *DB) lastClose() {
	db.mu.Lock()
	defer db.mu.Unlock()
	if !db.dropped || db.file.inUse() {
		return
	}
	db.closeFiles()
	for _, l := range db.stack.Load().committed {
		l.Reset()
	}
}

// unback ends the time of the ordinary file under the layers.
func (f *file) unback() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.onDisk.Store(false)
	if f.back != nil {
		// A READ may still be inside; os.File waits for it before it closes.
		_ = f.back.Close()
		f.back = nil
	}
}
