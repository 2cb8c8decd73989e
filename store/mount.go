package store

import (
	"errors"
	"time"
)

// This file is what the mount (package fuse) and the engine know of each other.
// Paths are relative to the mount, slash-separated, without leading slash; the
// root is "".

// Kind says what a node at the mount is.
type Kind uint8

// The kinds of nodes. A super-journal is the NAME-mjXXXXXXXXX file of a
// transaction over several databases.
const (
	KindDir Kind = iota
	KindOrdinary
	KindDatabase
	KindJournal
	KindWAL
	KindShm
	KindSuperJournal
	KindComputed
)

// Attr is what stat(2) shows of a node. Mode holds the permission bits only;
// owner and group are the mount's business.
type Attr struct {
	Kind  Kind
	Ino   uint64 // st_ino, fits 32 bits
	Mode  uint32 // permission bits
	Size  int64  // bytes
	Mtime time.Time
	Nlink uint32
}

// DirEntry is one name in a folder.
type DirEntry struct {
	Name string
	Kind Kind
	Ino  uint64
}

// A Node is one thing at the mount. Two look-ups of a name return the same Node
// (compare with ==) until the name is removed, replaced, or becomes something
// else. A Node outlives its name: open handles go on using it.
//
// ReadAt and Attr take no lock that is held over a disk wait (invariant 20).
type Node interface {
	Kind() Kind
	Attr() Attr
	// Open begins one open(2). The caller closes the handle at RELEASE. write says
	// whether the file was opened for writing.
	Open(write bool) (Handle, error)
	// SetSize is ftruncate(2) or truncate(2); h is nil for the latter.
	SetSize(h Handle, size int64) error
	// SetMode and SetTime change an ordinary file or folder; elsewhere they do
	// nothing and return nil.
	SetMode(mode uint32) error
	SetTime(mtime time.Time) error
}

// A Handle is one open file. Its methods may be called in parallel.
type Handle interface {
	// ReadAt fills p from off and returns fewer bytes only at the end of the file
	// (then without error).
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt writes all of p or nothing. p is not kept.
	WriteAt(p []byte, off int64) (int, error)
	// Sync is fsync(2) and fdatasync(2).
	Sync() error
	// Allocate is fallocate(2) mode 0: the size becomes at least off+n.
	Allocate(off, n int64) error
	// Release is the last close. It never fails.
	Release()
}

// A Flusher is a Handle that wants to know of each close(2). Flush must not wait.
type Flusher interface{ Flush() }

// Peer is what the engine asks of the mount that serves it. No method is called
// with a lock held that Node, Handle or FS methods need, and none of the
// Invalidate methods is called from inside a request (invariant 20).
type Peer interface {
	// Reserved reports whether any process holds a write lock on any byte of
	// SQLite's PENDING, RESERVED and SHARED range of this database
	// (F_OFD_GETLK on a descriptor that was opened beforehand through the own
	// mount). It may be called inside a WRITE, SETATTR, UNLINK or FSYNC of that
	// database's files; it waits at most for the opening of that descriptor.
	Reserved(db Node) (bool, error)
	// ReadShm reads the wal-index through the own mount, so that it sees what
	// programs wrote into their mapping. It returns 0 where nobody has it open.
	// Never called from a request.
	ReadShm(shm Node, p []byte, off int64) (int, error)
	// WriteShm writes the wal-index through the own mount. Never from a request.
	WriteShm(shm Node, p []byte, off int64) (int, error)
	// A node that has a method Path() string, its path at the mount, can be locked
	// also where the kernel does not know it yet.
	//
	// LockShm and UnlockShm take or drop an OFD write lock on n bytes from off of
	// the wal-index; ok is false if somebody else holds it. Never from a request.
	LockShm(shm Node, off, n int64) (ok bool, err error)
	UnlockShm(shm Node, off, n int64) error
	// LockDatabase takes an OFD write lock on [off, off+n) of the database file,
	// UnlockDatabase drops it. Never from a request.
	LockDatabase(db Node, off, n int64) (ok bool, err error)
	UnlockDatabase(db Node, off, n int64) error
	// InvalidateData drops [off, off+n) of a node from the kernel's page cache;
	// n < 0 means to the end, off < 0 attributes only.
	InvalidateData(node Node, off, n int64)
	// InvalidateEntry drops a name from the kernel's cache, also a remembered
	// absence.
	InvalidateEntry(path string)
}

// Errors that the mount turns into errno values, in one table. An error that
// wraps a syscall.Errno keeps it; any other is EIO and logged.
var (
	ErrNotExist  = errors.New("does not exist")                                                  // ENOENT
	ErrExist     = errors.New("exists already")                                                  // EEXIST
	ErrNotDir    = errors.New("not a folder")                                                    // ENOTDIR
	ErrIsDir     = errors.New("is a folder")                                                     // EISDIR
	ErrNotEmpty  = errors.New("folder is not empty")                                             // ENOTEMPTY
	ErrReplica   = errors.New("this node does not have the right to write")                      // EACCES
	ErrRefused   = errors.New("refused: no commit point")                                        // EACCES: journal_mode MEMORY or OFF, or a program without POSIX locks
	ErrOverwrite = errors.New("writing over a database without SQLite: use litefs-agent import") // EACCES
	ErrReserved  = errors.New("name is reserved")                                                // EACCES
	ErrBusy      = errors.New("in use")                                                          // EBUSY
	ErrFenced    = errors.New("database is fenced after an error")                               // EIO
	ErrStale     = errors.New("database was dropped")                                            // ESTALE
	ErrCrossing  = errors.New("cannot be renamed")                                               // EPERM
)

// FS is the mount's view of a store. Methods may be called in parallel.
type FS interface {
	// Attach tells the engine which mount serves it; before it, and after
	// Attach(nil), the engine acts as if nobody held a lock.
	Attach(p Peer)
	// Root returns the mount's root folder.
	Root() Node
	// Lookup returns what is at path. It fails with ErrNotExist.
	Lookup(path string) (Node, error)
	// Create makes a file, with exclusive = O_EXCL, and opens it for writing.
	// An existing file is opened unless exclusive.
	Create(path string, mode uint32, exclusive bool) (Node, Handle, error)
	Mkdir(path string, mode uint32) (Node, error)
	Rmdir(path string) error
	Unlink(path string) error
	Rename(oldPath, newPath string, noReplace bool) error
	ReadDir(path string) ([]DirEntry, error)
	// StatFS returns sizes in bytes and counts of the data folder's file system.
	StatFS() (total, free, avail, files, filesFree uint64, err error)
	// WantsQuiet reports whether the engine wants to be told, by Quiet, when no
	// request has come for a fraction of a millisecond. Neither waits.
	WantsQuiet() bool
	Quiet()
	// LogAhead reports whether a WRITE is to call AwaitLog first, which waits for a
	// second at most: programs commit faster than the log can be given up.
	LogAhead() bool
	AwaitLog()
}
