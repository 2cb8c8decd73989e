// Package commitlog is the one durable log of a node or hub: a ring of segment
// files, the only thing that a commit waits for.
//
// A record is appended in one of three modes. Lazy goes through the page cache,
// packed behind earlier lazy records; Staged stays in memory until somebody
// waits, and is then written directly, in logical blocks, by the one who leads
// the group commit; Written is written directly at once. One fdatasync serves
// all that wait.
//
// Kept here (the numbers are those of ARCHITECTURE.md):
//
//	invariant 1:  when a Lazy or Written Append returns, it and all records
//	              before it are in the file: killing the process loses nothing.
//	invariant 14: after a failed write or fdatasync the undurable tail goes to
//	              a new segment from memory; the old file gets no more bytes.
//	invariant 15: recovery accepts a record by salt, next LSN and chained CRC.
//	invariant 16: no block with durable records is rewritten: a flush seals
//	              the page or block it ends in. Direct and buffered writes never
//	              share a 4 KiB page.
//	invariant 23: Reserve meets the full disk, not the append that follows.
package commitlog

import (
	"errors"
	"io"
	"log/slog"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/disk"
)

// An LSN is the number of a record, from 1, without gaps.
type LSN uint64

// Kind says what a record means to the store. The log keeps kinds it does not
// know.
type Kind uint8

// The kinds of records. They are part of the format.
const (
	KindLTX       Kind = 1 + iota // one transaction as LTX bytes
	KindGroup                     // several transactions, all or nothing
	KindReference                 // names an LTX side file
	KindConfirm
	KindAbort
	KindLease
	KindSession
	KindSent
	KindAcked
	KindCreate
	KindDrop
	KindRename
	KindBase
)

// Mode says how Append brings a record to the disk.
type Mode uint8

// The modes of Append.
const (
	// Lazy: in the page cache when Append returns.
	Lazy Mode = iota
	// Staged: maybe only in memory when Append returns. The caller calls Wait
	// next and tells nobody of the record before that.
	Staged
	// Written: in the file when Append returns, written directly on a fresh
	// block, as a Wait is expected soon.
	Written
)

// Header is what the log knows of a record besides its payload.
type Header struct {
	Kind       Kind
	Flags      uint8 // the store's
	DB         uint32
	History    uint64
	EpochN     uint64
	EpochGrant uint64
}

// Ref says where a payload lies. It stays good until the segment is reused.
type Ref struct {
	Slot uint32 // number in the segment's file name
	Seq  uint64 // of the segment
	Off  int64  // of the payload in the file
	Len  int32  // of the payload
}

// Record is what replay sees.
type Record struct {
	Header
	LSN LSN
	Ref Ref
	// Payload is valid only during the callback.
	Payload []byte
	// AfterDamage says that records before this one were lost to damage (see
	// Damage): databases that they may have concerned must be fenced.
	AfterDamage bool
}

// Options are the parameters of Open.
type Options struct {
	FS  disk.FS
	Dir string // folder of the segments; made if missing
	// SegmentSize in bytes, a multiple of 4096 from 16 KiB to 1 GiB; 0 is 4 MiB.
	// Segments of another size are read, and deleted when they are released.
	SegmentSize int64
	// Target is how many segments Release keeps as files, if it can; 0 is 4.
	Target int
	// FlushAfter is how long a Lazy or Written record may stay undurable if nobody
	// waits; 0 leaves that to the caller.
	FlushAfter time.Duration
	// FlushBytes of undurable records start a flush in the background; at four
	// times that Append waits for it. 0 is 256 KiB, below 0 means never.
	FlushBytes int64
	NoDirect   bool         // write through the page cache only
	Logger     *slog.Logger // nil discards
	Rand       io.Reader    // source of the salts; nil is crypto/rand

	inline bool // tests: no goroutines, so that the order of operations repeats
}

// Errors of a Log.
var (
	// ErrFailed: the disk failed and the undurable records could not be brought to
	// another file. Nothing can be appended any more; reads go on.
	ErrFailed = errors.New("log failed")
	// ErrReleased: the segment of a Ref has been reused or deleted.
	ErrReleased = errors.New("log segment released")
	// ErrTooLarge: the payload does not fit a segment.
	ErrTooLarge = errors.New("record too large for a log segment")
	// ErrClosed: the log is closed.
	ErrClosed = errors.New("log closed")
)

// SegmentInfo describes a segment in use. Last is First-1 if it is empty.
type SegmentInfo struct {
	Seq         uint64
	First, Last LSN
	Bytes       int64 // of records and gaps
}

// DamageInfo is a hole in the log that no torn write explains: records after it
// prove that what is missing had been durable (invariant 15). The file is set
// aside and kept.
type DamageInfo struct {
	File     string // name in Options.Dir
	Seq      uint64
	Off, End int64 // the unreadable bytes; End 0: to the end of the file
	From, To LSN   // records lost; From 0: unknown, To 0: unknown
	Reason   string
}

// Stats are counters since Open.
type Stats struct {
	Fdatasyncs   uint64 // of segments, for headers and new files too
	Flushes      uint64 // group commits
	BytesWritten uint64 // to segments, padding and headers included, zeros of new files not
	Records      uint64
	Segments     int // in use
	Spare        int // ready to be used
	Rescues      uint64
}
