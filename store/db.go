package store

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path"
	"sync"
	"sync/atomic"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// Epoch names one grant of the right to write: a counter and a random id. A
// node-owned database's is zero.
type Epoch struct{ N, Grant uint64 }

// String formats an epoch as N-GRANT, the zero epoch as 0.
func (e Epoch) String() string {
	if e == (Epoch{}) {
		return "0"
	}
	return fmt.Sprintf("%d-%016x", e.N, e.Grant)
}

// position is where a database is, with what is needed to read it there.
type position struct {
	ltx.Pos
	PageSize uint32 // bytes; 0 before the first transaction
	Commit   uint32 // pages
}

func (p position) size() int64 { return int64(p.Commit) * int64(p.PageSize) }

// A DB is one database. The files at the mount that belong to it are nodes that
// lead here (db_node.go, side.go).
//
// Locks: flushMu, then mu, then Store.mu. mu is not held over a disk wait, but
// for abort records, which are rare; reads take neither.
type DB struct {
	st   *Store
	id   uint32 // in the log; 0 until the first record
	name string // path at the mount; set when made, then constant
	dir  string // folder in the data folder: dbs/ and the escaped name; constant
	file *file  // the node at the mount; constant
	log  *slog.Logger

	stack atomic.Pointer[layers]
	size  atomic.Int64 // visible size in bytes, what stat(2) says
	mtime atomic.Int64 // unix nanoseconds
	fence atomic.Pointer[error]

	fencing chan struct{} // closed when fence is set

	held   atomic.Pointer[heldBack] // not nil: reads are refused too
	queued atomic.Bool              // in Store.flushList

	flushMu sync.Mutex // held by whoever applies layers to the files or moves base

	mu       sync.Mutex // guards all below
	exists   bool       // a transaction committed and no drop followed
	dropped  bool       // removed: this object only serves open handles
	history  uint64
	epoch    Epoch
	at       position      // last confirmed
	last     commitlog.LSN // newest transaction, abort or creation in the log
	lastAny  commitlog.LSN // newest record of any kind, if above last
	lastTime time.Time     // of the last confirmed transaction
	pend     *pending      // the one unresolved tentative or prepared record (invariant 8)
	resolved chan struct{}

	damage  error    // what recovery found missing or wrong; Mend lifts it
	base    position // every page up to it is in the fsynced file (invariant 5)
	applied position // every page up to it is in the file, not fsynced
	metaSeq uint64
	dirty   commitlog.LSN // first log record that the files and meta do not hold; 0 if none
	side    []string      // side files that no longer count, removed at the next checkpoint

	journal *journalState
	wal     *walState
	recs    records

	ackWritten ltx.TXID // of the last ack record in the log
	ackTime    time.Time

	files     atomic.Pointer[dbFiles]
	onDisk    atomic.Bool // the database file was made
	filesMu   sync.Mutex  // held while opening and closing files
	metaFile  disk.File   // guarded by flushMu
	metaSlot  int         // of the newest durable metadata; guarded by flushMu
	metaNamed bool        // its name is durable; guarded by flushMu
}

const dbsDir = "dbs"

// dbDir returns the folder of a database in the data folder: its name, escaped
// so that it is one folder. A name that is too long for one is cut and gets a
// checksum; "%~" is no escape, so no other name is escaped to that.
func dbDir(name string) string {
	esc := url.PathEscape(name)
	if len(esc) > 200 {
		esc = fmt.Sprintf("%s%%~%016x", esc[:180], uint64(ltx.PageChecksum(1, []byte(name))))
	}
	return path.Join(dbsDir, esc)
}

func (st *Store) newDB(f *file, name string) *DB {
	db := &DB{
		st: st, name: name, dir: dbDir(name), file: f,
		log:      st.opt.Logger.With("db", name),
		resolved: make(chan struct{}),
		fencing:  make(chan struct{}),
	}
	db.stack.Store(&layers{committed: []*layer{newLayer(st.pool)}})
	return db
}

// Name returns the path below the mount.
func (db *DB) Name() string { return db.name }

// fenceWith stops all writes to the database after an error that leaves its state in
// doubt; reads go on. Only a restart of the agent, which recovers from the log,
// lifts it.
func (db *DB) fenceWith(err error) {
	e := fmt.Errorf("%s: %w: %w; restart the agent to recover it from the log", db.name, ErrFenced, err)
	if db.fence.CompareAndSwap(nil, &e) {
		close(db.fencing)
		db.log.Error("database fenced: writes fail until the agent is restarted", "err", err)
	}
}

func (db *DB) fenced() error {
	if e := db.fence.Load(); e != nil {
		return *e
	}
	return nil
}

// Fence is fenceWith for the mount: a panic in a request leaves the state of its
// database in doubt.
func (db *DB) Fence(err error) { db.fenceWith(err) }

// isDropped reports whether another object has the name, or nobody.
func (db *DB) isDropped() bool {
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.dropped
}

// readAt reads what programs see: running transaction, committed layers, file.
func (db *DB) readAt(p []byte, off int64) error {
	list, txn := db.visible()
	if txn == nil {
		return readThrough(list, p, off, db.readFile)
	}
	return txn.through(p, off, func(q []byte, o int64) error {
		return readThrough(list, q, o, db.readFile)
	})
}

// visible returns the overlay and the committed layers that lie over what readFile
// reads. Those of a dropped database, still on their way to its files, do not lie
// over the ordinary file that took its name.
func (db *DB) visible() (committed []*layer, txn *layer) {
	ordinary := db.file.backed() && !db.file.isDB.Load() // before the stack: see takeOver
	s := db.stack.Load()
	if ordinary {
		return nil, s.txn
	}
	for i, l := range s.committed {
		if l.adopted {
			return s.committed[:i+1], s.txn
		}
	}
	return s.committed, s.txn
}

// through reads from one layer and calls under for what shows through.
func (l *layer) through(p []byte, off int64, under func(p []byte, off int64) error) error {
	return readThrough([]*layer{l}, p, off, under)
}

// readCommitted reads the committed content of the database file. In WAL mode
// that is without the pages that are only in the WAL.
func (db *DB) readCommitted(p []byte, off int64) error {
	list, _ := db.visible()
	return readThrough(list, p, off, db.readFile)
}

// readFile reads the file itself; beyond its end there are zeros.
func (db *DB) readFile(p []byte, off int64) error {
	for {
		f, err := db.under()
		if f == nil || err != nil {
			clear(p)
			return err
		}
		n, err := f.ReadAt(p, off)
		clear(p[n:])
		if err == io.EOF {
			return nil
		}
		if now, uerr := db.under(); errors.Is(err, os.ErrClosed) && uerr == nil && now != f {
			continue // the ordinary file became the database's meanwhile
		}
		return err
	}
}

// under returns the file that lies under the layers, nil if there is none yet.
func (db *DB) under() (disk.File, error) {
	if held := db.held.Load(); held != nil {
		return nil, held.err
	}
	if of := db.file; of.backed() {
		if f := of.backing(); f != nil || of.backed() {
			return f, nil
		}
	}
	files, err := db.openFiles(false)
	if files == nil || err != nil {
		return nil, err
	}
	return files.data, nil
}

// dbFiles are the open database and checksum files.
type dbFiles struct{ data, sums disk.File }

// openFiles returns the database and checksum files, opened if they are not. With
// create they are made; without it the result is nil where there are none.
func (db *DB) openFiles(create bool) (*dbFiles, error) {
	if f := db.files.Load(); f != nil {
		return f, nil
	}
	if !create && !db.onDisk.Load() {
		return nil, nil
	}
	db.filesMu.Lock()
	defer db.filesMu.Unlock()
	if f := db.files.Load(); f != nil {
		return f, nil
	}
	if !create && !db.onDisk.Load() {
		return nil, nil // it went while this waited
	}
	flag := os.O_RDWR
	if create {
		flag |= os.O_CREATE
		if err := db.makeDir(); err != nil {
			return nil, err
		}
	}
	data, err := db.st.fs.OpenFile(path.Join(db.dir, "data"), flag, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%s: open its file: %w", db.name, err)
	}
	sums, err := db.st.fs.OpenFile(path.Join(db.dir, "sums"), flag, 0o600)
	if err != nil {
		_ = data.Close()
		return nil, fmt.Errorf("%s: open its checksums: %w", db.name, err)
	}
	f := &dbFiles{data, sums}
	db.files.Store(f)
	db.onDisk.Store(true)
	return f, nil
}

func (db *DB) makeDir() error {
	if _, err := db.st.fs.Stat(db.dir); err == nil {
		return nil
	}
	if err := db.st.fs.Mkdir(db.dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return db.st.fs.SyncDir(dbsDir)
}

// closeFiles closes what openFiles opened. No read may be under way: nobody has
// the database open, and db.mu is held.
func (db *DB) closeFiles() {
	db.filesMu.Lock()
	defer db.filesMu.Unlock()
	if f := db.files.Swap(nil); f != nil {
		_ = f.data.Close()
		_ = f.sums.Close()
	}
	if db.metaFile != nil {
		_ = db.metaFile.Close()
		db.metaFile = nil
	}
}

// Info is a snapshot of a database's state for status and links.
type Info struct {
	Name     string
	ID       uint32
	History  uint64
	Epoch    Epoch
	Pos      ltx.Pos // last confirmed transaction
	PageSize uint32
	Commit   uint32
	WAL      bool
	Fenced   error
	Last     time.Time // of the last transaction, zero if unknown
	Acked    ltx.Pos
	Backlog  Backlog
}

// Backlog is what the hub lacks.
type Backlog struct {
	Records int
	Bytes   int64
	Oldest  time.Time // commit time of the oldest, zero if none
}

// Info returns the present state. It does not wait for a tentative record.
func (db *DB) Info() Info {
	db.mu.Lock()
	defer db.mu.Unlock()
	return Info{
		Name: db.name, ID: db.id, History: db.history, Epoch: db.epoch,
		Pos: db.at.Pos, PageSize: db.at.PageSize, Commit: db.at.Commit,
		WAL: db.walHeader(), Fenced: db.fenced(), Last: db.lastTime,
		Acked: db.ackedLocked(), Backlog: db.recs.backlog(),
	}
}

// walHeader reports whether page 1 says WAL mode. db.mu is held.
func (db *DB) walHeader() bool {
	if db.at.Commit == 0 {
		return false
	}
	var b [2]byte
	if err := db.readAt(b[:], 18); err != nil {
		return false
	}
	return b[0] == 2
}

// Pos returns the position of the last confirmed transaction, after waiting for
// a tentative record to be resolved, so that a returned COMMIT always shows.
func (db *DB) Pos() ltx.Pos {
	db.settle()
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.at.Pos
}

// page reads page pgno of the newest confirmed state: from the WAL's newest
// confirmed frame, the committed layers, or the file. db.mu is held.
func (db *DB) page(pgno uint32, p []byte) error {
	if db.wal != nil {
		if off, ok := db.wal.pages[pgno]; ok {
			_, err := db.wal.data.ReadAt(p, off)
			return err
		}
	}
	return db.readCommitted(p, int64(pgno-1)*int64(len(p)))
}
