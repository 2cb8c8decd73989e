package store

import (
	"crypto/rand"
	"io"
	"log/slog"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/disk"
)

// Durability says when a commit waits for the disk beyond what SQLite asked for.
type Durability struct {
	Commit bool          // every commit waits
	After  time.Duration // 0: as SQLite asked; else a commit is durable at the latest so late, and no commit waits
}

// Options configure a Store.
type Options struct {
	FS   disk.FS // the data folder
	Node string  // id of this node or hub
	// Writable says whether programs at this mount may write a database of that
	// name. nil: every name.
	Writable func(name string) bool
	// Reserved says which names programs may not make at this mount. nil: none.
	Reserved func(name string) bool
	// Writer names who may write a database now (NAME-writer). nil: Node.
	Writer func(name string) string
	// Primary returns the content of .primary without newline, "" for none. nil: none.
	Primary func() string
	// Lag returns the time since the hub was last heard; ok is false before the
	// first word. nil: never.
	Lag func() (d time.Duration, ok bool)
	// Shipping says that records are kept until they are acked.
	Shipping bool
	// Home says that this is the hub: what is durable here is acked.
	Home bool

	FileMode uint32 // permission bits of databases after a restart and of replicas; default 0660

	Durability  Durability
	Flush       time.Duration // default 1 s
	History     time.Duration // how long single transactions stay once acked
	Budget      int64         // bytes of log and level files, default 256 MiB
	Memory      int64         // bytes of overlays, journals, WALs, default 4 MiB
	SegmentSize int64         // of the log, default 4 MiB
	BacklogStep time.Duration // distance of the positions that a compacted backlog keeps, default 5 min

	// Large is the bound in bytes beyond which a transaction is written to a file of
	// its own and the log holds a reference. Default 1 MiB.
	Large int64

	// NoDirect is set where the log must go through the page cache.
	NoDirect bool

	Rand   io.Reader        // default crypto/rand
	Now    func() time.Time // default time.Now
	Logger *slog.Logger     // nil discards

	inline bool // tests: no goroutines, so that the order of disk operations repeats
}

func (o Options) withDefaults() Options {
	if o.Writable == nil {
		o.Writable = func(string) bool { return true }
	}
	if o.Reserved == nil {
		o.Reserved = func(string) bool { return false }
	}
	if o.Writer == nil {
		o.Writer = func(string) string { return o.Node }
	}
	if o.Primary == nil {
		o.Primary = func() string { return "" }
	}
	if o.Lag == nil {
		o.Lag = func() (time.Duration, bool) { return 0, false }
	}
	if o.FileMode == 0 {
		o.FileMode = 0o660
	}
	if o.Flush <= 0 {
		o.Flush = time.Second
	}
	if o.Budget <= 0 {
		o.Budget = 256 << 20
	}
	if o.BacklogStep < time.Millisecond {
		o.BacklogStep = 5 * time.Minute
	}
	if o.Memory <= 0 {
		o.Memory = 4 << 20
	}
	if o.SegmentSize <= 0 {
		o.SegmentSize = 4 << 20
	}
	if o.Large <= 0 {
		o.Large = min(1<<20, o.SegmentSize/4)
	}
	if o.Rand == nil {
		o.Rand = rand.Reader
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}
