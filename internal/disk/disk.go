// Package disk is the one way in which the engine touches its data folder. FS
// is the real operating system in a running agent and package simdisk's
// simulated disk in the crash tests, which keeps, drops, reorders and tears
// what was not synced.
//
// Names are slash-separated paths relative to the root that the FS was made
// for. Nothing is durable until one of the calls that say so has returned nil.
package disk

import (
	"io"
	"io/fs"
	"os"
)

// Flags for FS.OpenFile besides os.O_RDONLY, os.O_RDWR, os.O_CREATE, os.O_EXCL
// and os.O_TRUNC.
const (
	// Direct asks for I/O that bypasses the page cache (O_DIRECT). Offsets,
	// lengths and buffers must then be multiples of FS.BlockSize (buffers come
	// from AlignedBuffer). Where the file system refuses it, OpenFile fails with
	// an error that is syscall.EINVAL. Direct and buffered writes of one file
	// must not touch the same 4 KiB page between two syncs.
	Direct = 1 << 30
)

// FS is a folder of files. It is safe for concurrent use.
type FS interface {
	// OpenFile opens or creates a file. A created name is durable after SyncDir
	// of its folder.
	OpenFile(name string, flag int, perm os.FileMode) (File, error)
	// CreateTemp makes a file without a name in folder dir, for spilled memory:
	// it is gone when closed or when the process ends, and is never synced.
	CreateTemp(dir string) (File, error)
	// Mkdir makes one folder; durable after SyncDir of its parent.
	Mkdir(name string, perm os.FileMode) error
	// Remove removes a file or an empty folder; durable after SyncDir.
	Remove(name string) error
	// Rename replaces atomically; durable after SyncDir of both folders.
	Rename(oldname, newname string) error
	// ReadDir lists a folder, sorted by name.
	ReadDir(name string) ([]fs.DirEntry, error)
	// Stat follows no symbolic link.
	Stat(name string) (fs.FileInfo, error)
	// SyncDir makes the entries of folder name durable.
	SyncDir(name string) error
	// SyncFS makes everything written before durable (syncfs).
	SyncFS() error
	// Free returns the bytes that can still be written.
	Free() (int64, error)
	// BlockSize is the unit of Direct I/O in bytes: a power of two, 512 to 4096.
	BlockSize() int
}

// File is an open file. ReadAt and WriteAt may be called in parallel.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Size returns the present size in bytes.
	Size() (int64, error)
	// Truncate sets the size; what is added reads as zeros.
	Truncate(size int64) error
	// Datasync makes data and size durable (fdatasync). After an error nothing
	// that was unsynced may be trusted, whatever a later Datasync says.
	Datasync() error
	// Allocate reserves room for [off, off+n) without changing the size, so that
	// later writes there do not meet a full disk. The error is
	// errors.ErrUnsupported where the file system cannot, and syscall.ENOSPC
	// where there is no room.
	Allocate(off, n int64) error
}
