// Package store is the engine: it keeps SQLite databases whose every committed
// transaction is one LTX record in one durable log (ARCHITECTURE.md). Package
// fuse shows them at a mount, a link ships their records and brings those of
// others. Numbers such as "invariant 13" are those of ARCHITECTURE.md.
package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/sparse"
)

// A Store keeps the databases of one node or hub. It is safe for concurrent use.
type Store struct {
	opt      Options
	fs       disk.FS
	log      *slog.Logger
	wlog     *commitlog.Log
	pool     *sparse.Pool
	groups   groupFiles
	inos     *inodes
	root     *dir
	nodeHash uint64

	ringTarget int
	ahead      atomic.Int64  // bytes appended since the log was last looked at to the end
	roomMu     sync.Mutex    // guards room
	room       chan struct{} // closed when it was

	nsMu   sync.RWMutex // guards the names; taken after DB.mu
	files  map[string]*file
	sides  map[string]*sideFile
	dirs   map[string]*dir
	byName map[string]*DB
	byID   map[uint32]*DB
	lastID uint32

	sidesMu sync.Mutex // one file at a time becomes a side file; taken before DB.mu

	computedMu sync.Mutex
	computed   map[string]*computed

	peerPtr atomic.Pointer[Peer]

	opened       time.Time     // by New, then constant
	resolveMu    sync.Mutex    // guards the next three
	resolveAt    time.Duration // when the resolver looks next, since opened; 0: not at all
	resolvePause time.Duration // after that look, if it gives no answer
	resolving    map[*DB]struct{}
	resolveKick  chan struct{}
	quiet        atomic.Bool // Quiet has something to do

	flushListMu  sync.Mutex // guards flushList
	flushList    map[*DB]struct{}
	flushKick    chan struct{}
	flushArm     chan struct{}
	flushArmed   atomic.Bool
	sinceLook    atomic.Int64 // bytes appended to the log since the flusher looked
	checkpointMu sync.Mutex   // one checkpoint at a time

	laterMu   sync.Mutex // guards laterList
	laterList []func(Peer)
	laterKick chan struct{}

	onEvent  atomic.Pointer[func(Event)]
	watchMu  sync.Mutex // guards watchers
	watchers []func(*DB)

	recent recent // records that a link is about to ask for

	txN      atomic.Int64          // transactions confirmed since Open
	freeLeft atomic.Int64          // bytes of the data folder that may be promised without asking again
	freeAt   atomic.Int64          // when that was asked, unix nanoseconds
	shortOf  atomic.Int64          // free bytes that the last refused write wanted; 0: none was refused
	waiting  atomic.Pointer[error] // why committed pages cannot be written to their files

	closeOnce sync.Once
	closeErr  error
	done      chan struct{}
	wg        sync.WaitGroup
}

const logDir = "log"

// flags of log records.
const flagTentative uint8 = 1

var errNameTooLong = syscall.ENAMETOOLONG

// Open recovers the store in the data folder. When it returns every database is
// at its last committed transaction, and no journal, WAL or wal-index of an
// earlier life exists (invariant 24).
func Open(opt Options) (*Store, error) {
	opt = opt.withDefaults()
	st := &Store{
		opt: opt, fs: opt.FS, log: opt.Logger, opened: time.Now(),
		files: make(map[string]*file), sides: make(map[string]*sideFile), dirs: make(map[string]*dir),
		byName: make(map[string]*DB), byID: make(map[uint32]*DB),
		computed:    make(map[string]*computed),
		resolveKick: make(chan struct{}, 1), flushKick: make(chan struct{}, 1),
		flushArm: make(chan struct{}, 1), laterKick: make(chan struct{}, 1),
		room: make(chan struct{}), flushList: make(map[*DB]struct{}), done: make(chan struct{}),
	}
	h := fnv.New64a()
	_, _ = io.WriteString(h, opt.Node)
	st.nodeHash = h.Sum64()
	st.pool = sparse.NewPool(opt.Memory, func() (disk.File, error) { return st.fs.CreateTemp(".") })
	st.ringTarget = int(max(4, min(16, opt.Budget/4/opt.SegmentSize)))
	for _, d := range []string{dbsDir, filesDir} {
		if err := disk.MkdirAll(st.fs, d, 0o700); err != nil {
			return nil, fmt.Errorf("make %s in the data folder: %w", d, err)
		}
	}
	var err error
	if st.inos, err = openInodes(st.fs); err != nil {
		return nil, err
	}
	st.root = st.dirLocked("")
	if err := st.recover(); err != nil {
		if st.wlog != nil {
			_ = st.wlog.Close()
		}
		return nil, err
	}
	if opt.inline {
		return st, nil
	}
	st.wg.Add(3)
	go st.resolveLoop()
	go st.flushLoop()
	go st.laterLoop()
	// Each start begins a segment: a node that lives for seconds at a time must
	// not wait until it has written one before it gives old ones up.
	if len(st.wlog.Segments()) > st.ringTarget {
		st.kickFlush()
	}
	if slices.ContainsFunc(st.all(), func(db *DB) bool { return db.held.Load() != nil }) {
		st.after(heldAgain, st.finishHeld)
	}
	return st, nil
}

// Close waits for nothing that programs may still do: the mount is gone. It
// applies what is committed and moves every base, so that the next start has
// nothing to do.
func (st *Store) Close() error {
	st.closeOnce.Do(func() {
		close(st.done)
		st.wg.Wait()
		var list []*DB
		for _, db := range st.all() {
			db.mu.Lock()
			if p := db.pend; p != nil && p.wal && db.wal != nil {
				db.confirmWAL(db.wal, p) // as recovery would decide
			}
			if w := db.wal; w != nil && len(w.pages) > 0 {
				if err := db.resetWAL(w, true); err != nil {
					st.closeErr = errors.Join(st.closeErr, err)
				}
			}
			if db.dirty != 0 {
				list = append(list, db)
			}
			db.mu.Unlock()
		}
		err := st.moveBases(list, 0)
		st.closeErr = errors.Join(st.closeErr, err, st.wlog.Close())
		for _, db := range st.all() {
			db.mu.Lock()
			db.closeFiles()
			db.mu.Unlock()
		}
	})
	return st.closeErr
}

// closing reports whether Close was called.
func (st *Store) closing() bool {
	select {
	case <-st.done:
		return true
	default:
		return false
	}
}

// all returns every database that has an id, by id.
func (st *Store) all() []*DB {
	st.nsMu.RLock()
	defer st.nsMu.RUnlock()
	list := make([]*DB, 0, len(st.byID))
	for _, id := range slices.Sorted(maps.Keys(st.byID)) { // db.id is guarded by db.mu
		list = append(list, st.byID[id])
	}
	return list
}

// named returns every database, also those without a transaction yet, by name.
func (st *Store) named() []*DB {
	st.nsMu.RLock()
	defer st.nsMu.RUnlock()
	list := slices.Collect(maps.Values(st.byName))
	slices.SortFunc(list, func(a, b *DB) int { return strings.Compare(a.name, b.name) })
	return list
}

// DBs returns every database that has a history here, dropped ones included,
// by name.
func (st *Store) DBs() []*DB {
	st.nsMu.RLock()
	var look []*file
	for _, f := range st.files {
		f.mu.Lock()
		if f.candidate {
			look = append(look, f)
		}
		f.mu.Unlock()
	}
	st.nsMu.RUnlock()
	for _, f := range look {
		st.adoptIfCandidate(f)
	}
	list := st.all()
	list = slices.DeleteFunc(list, func(db *DB) bool { return db.Place().Pos.IsZero() })
	slices.SortFunc(list, func(a, b *DB) int { return strings.Compare(a.name, b.name) })
	return list
}

// DB returns the database of a name, nil if there is none with a history.
func (st *Store) DB(name string) *DB {
	st.nsMu.RLock()
	f := st.files[name]
	st.nsMu.RUnlock()
	if f != nil {
		st.adoptIfCandidate(f)
	}
	st.nsMu.RLock()
	db := st.byName[name]
	st.nsMu.RUnlock()
	if db == nil || db.Place().Pos.IsZero() {
		return nil
	}
	return db
}

// Exists reports whether the database is there, not dropped.
func (db *DB) Exists() bool {
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.exists
}

func (st *Store) newID(db *DB) uint32 {
	st.nsMu.Lock()
	defer st.nsMu.Unlock()
	st.lastID++
	st.byID[st.lastID] = db
	st.byName[db.name] = db
	return st.lastID
}

func (st *Store) random() uint64 {
	var b [8]byte
	for {
		if _, err := io.ReadFull(st.opt.Rand, b[:]); err != nil {
			panic("store: no random bytes: " + err.Error())
		}
		if n := binary.BigEndian.Uint64(b[:]); n != 0 {
			return n
		}
	}
}

// Watch calls fn after each confirmed transaction and whenever more of the log
// became durable (then with nil). fn must not block and must not call the store.
func (st *Store) Watch(fn func(*DB)) {
	st.watchMu.Lock()
	defer st.watchMu.Unlock()
	st.watchers = append(slices.Clone(st.watchers), fn)
}

func (st *Store) notify(db *DB) {
	st.watchMu.Lock()
	list := st.watchers
	st.watchMu.Unlock()
	for _, fn := range list {
		fn(db)
	}
}

func (st *Store) committed(db *DB) {
	st.txN.Add(1)
	st.notify(db)
}

// later runs fn with the mount, outside of requests and without locks.
func (st *Store) later(fn func(Peer)) {
	if st.peer() == nil || st.opt.inline {
		return
	}
	st.laterMu.Lock()
	st.laterList = append(st.laterList, fn)
	st.laterMu.Unlock()
	select {
	case st.laterKick <- struct{}{}:
	default:
	}
}

func (st *Store) laterLoop() {
	defer st.wg.Done()
	for {
		select {
		case <-st.done:
			st.tellLater()
			return
		case <-st.laterKick:
			st.tellLater()
		}
	}
}

func (st *Store) tellLater() {
	st.laterMu.Lock()
	list := st.laterList
	st.laterList = nil
	st.laterMu.Unlock()
	for _, fn := range list {
		if p := st.peer(); p != nil {
			fn(p)
		}
	}
}

// after runs fn once after d, unless the store is closed before.
func (st *Store) after(d time.Duration, fn func()) {
	if st.opt.inline {
		return
	}
	time.AfterFunc(d, func() {
		select {
		case <-st.done:
		default:
			fn()
		}
	})
}

// waitAsked waits for what an FSYNC asked for, unless the configuration lets it
// become durable later.
func (st *Store) waitAsked(lsn commitlog.LSN) error {
	if st.opt.Durability.After > 0 {
		return nil
	}
	return st.wlog.Wait(lsn)
}

// spaceMargin is what is kept free in the data folder for what nobody reserved.
const spaceMargin = 1 << 20

// needFree fails with ENOSPC unless n bytes, and a margin for the log, are free.
func (st *Store) needFree(n int64) error {
	if n <= 0 {
		return nil
	}
	now := time.Now().UnixNano()
	if st.freeLeft.Add(-n) > 0 && now-st.freeAt.Load() < int64(time.Second) {
		return nil
	}
	free, err := st.fs.Free()
	if err != nil {
		return err
	}
	st.freeAt.Store(now)
	st.freeLeft.Store((free - spaceMargin - n) / 2)
	if free < n+spaceMargin {
		st.shortOf.Store(n + spaceMargin)
		return fmt.Errorf("%w: %d bytes free in the data folder, %d needed", syscall.ENOSPC, free, n+spaceMargin)
	}
	return nil
}

// reserveLog reserves room for n bytes in the log.
func (st *Store) reserveLog(n int64) error {
	err := st.wlog.Reserve(n)
	if errors.Is(err, syscall.ENOSPC) {
		st.shortOf.Store(st.opt.SegmentSize + spaceMargin) // it wanted another segment
	}
	return err
}

// Stats are counters since Open.
type Stats struct {
	Transactions int64
	Fdatasyncs   uint64 // of the log
	LogBytes     uint64
	Memory       int64 // bytes of overlays, journals, WALs
}

// Stats returns the counters.
func (st *Store) Stats() Stats {
	l := st.wlog.Stats()
	return Stats{Transactions: st.txN.Load(), Fdatasyncs: l.Fdatasyncs, LogBytes: l.BytesWritten, Memory: st.pool.Used()}
}

// Sync returns when everything up to the present position of db is durable.
func (db *DB) Sync() error {
	db.mu.Lock()
	lsn := db.last
	db.mu.Unlock()
	return db.st.wlog.Wait(lsn)
}
