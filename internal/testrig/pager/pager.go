// Package pager stands in for SQLite in tests: it drives the files of databases
// byte for byte as SQLite's pager does, in every journal mode, can be killed
// before any single call, and knows what SQLite would take as committed. It
// needs no C and no mount, so that a test can crash it millions of times.
//
// Source of every sequence of calls: pager.c, wal.c and vdbeaux.c of SQLite
// 3.40.1. What is left out: the page cache and the b-tree; the content of pages
// is random, but for the header on page 1.
package pager

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
)

// FS is the part of a mount that SQLite uses.
type FS interface {
	// Open opens a file, made if it is missing and create says so.
	Open(name string, create bool) (File, error)
	Exists(name string) bool
	IsDatabase(name string) bool
	Remove(name string) error
	Rename(from, to string) error
}

// File is one open file.
type File interface {
	ReadAt(p []byte, off int64) (int, error) // short only at the end, then without error
	WriteAt(p []byte, off int64) (int, error)
	Truncate(size int64) error
	Sync() error
	Size() int64
	Close()
}

// Killed is what a World panics with when its Step said so.
type Killed struct{}

// Sync is PRAGMA synchronous.
type Sync int

// The values of PRAGMA synchronous that differ in what they call.
const (
	Off Sync = iota
	Normal
	Full
)

// Mode is PRAGMA journal_mode.
type Mode int

// The journal modes that have a commit point.
const (
	Delete Mode = iota
	Truncate
	Persist
	WAL
)

func (m Mode) String() string { return [...]string{"delete", "truncate", "persist", "wal"}[m] }

// A World is every program that uses the databases of one mount.
type World struct {
	FS    FS
	Rand  *rand.Rand
	Step  func()                           // called before every call of FS; panics with Killed{} to end the program
	Down  func() bool                      // the machine has stopped: no answer reaches anybody
	Logf  func(format string, args ...any) // nil: silent
	Trace bool                             // with Logf: say every write
	DBs   map[string]*DB

	groups int
	supers int
}

// New makes a World without databases.
func New(fs FS, rng *rand.Rand) *World {
	return &World{FS: fs, Rand: rng, Step: func() {}, Down: func() bool { return false }, DBs: map[string]*DB{}}
}

func (w *World) logf(format string, args ...any) {
	if w.Logf != nil {
		w.Logf(format, args...)
	}
}

// A Version is the content of a database after one transaction.
type Version struct {
	PageSize int
	Pages    [][]byte // nil: the database does not exist
	Acked    bool     // the call that commits has returned
	Durable  bool     // and it must survive a power cut
	Void     bool     // SQLite took it back: it may only come back by a power cut, never with what follows
	Group    int      // number of the transaction over several databases, 0 if none
}

// Bytes is the whole file.
func (v Version) Bytes() []byte { return bytes.Join(v.Pages, nil) }

// DB is one database and the programs that have it open.
type DB struct {
	w    *World
	Name string
	Mode Mode
	Sync Sync
	// Exclusive is PRAGMA locking_mode=EXCLUSIVE, which in WAL mode makes no
	// wal-index.
	Exclusive bool

	// Versions ends with the transaction in flight, if there is one beyond Cur.
	Versions []Version
	Cur      int

	reserved bool // somebody holds RESERVED or more
	walLock  bool // somebody holds WAL_WRITE_LOCK
	open     bool
	db       File
	journal  File
	wal      File
	shm      File
	index    *walIndex
	maybe    bool // the newest version is in flight, or a killed program left it undecided
	undone   bool // with maybe: its rollback only had to end the journal
	inWAL    bool // with maybe: its frames are in the WAL
}

// DB returns the database of a name, new if there is none.
func (w *World) DB(name string) *DB {
	if db := w.DBs[name]; db != nil {
		return db
	}
	db := &DB{w: w, Name: name, Versions: []Version{{Acked: true, Durable: true}}}
	w.DBs[name] = db
	return db
}

// Names lists the databases, sorted.
func (w *World) Names() []string { return slices.Sorted(maps.Keys(w.DBs)) }

// Reserved reports whether a program holds RESERVED or more on a database.
func (w *World) Reserved(name string) bool {
	db := w.DBs[name]
	return db != nil && db.reserved
}

// WALLocked reports whether a program holds WAL_WRITE_LOCK.
func (w *World) WALLocked(name string) bool {
	db := w.DBs[name]
	return db != nil && db.walLock
}

// Head is the content that SQLite takes as committed.
func (db *DB) Head() Version { return db.Versions[db.Cur] }

// Exists reports whether there is a database, as SQLite sees it.
func (db *DB) Exists() bool { return db.Head().Pages != nil }

func (w *World) step() { w.Step() }

// Kill ends every program: its locks and handles are gone, the files stay.
func (w *World) Kill() {
	for _, name := range w.Names() {
		w.DBs[name].closeAll()
	}
}

// Orphan is the end of the program that was at work: its locks are gone. Others
// that have the files open live on.
func (w *World) Orphan() {
	for _, db := range w.DBs {
		db.reserved, db.walLock = false, false
		if db.Exclusive {
			db.closeAll() // there are no others
		}
	}
}

func (db *DB) closeAll() {
	db.reserved, db.walLock, db.open = false, false, false
	for _, f := range []*File{&db.db, &db.journal, &db.wal, &db.shm} {
		if *f != nil {
			(*f).Close()
			*f = nil
		}
	}
	if db.Exclusive {
		db.index = nil // it was in the program's memory
	}
	if db.index != nil {
		db.index.attached = false
		clear(db.index.readers)
	}
}

// Forget is what is left of the programs after a restart of the mount: nothing.
// The database holds version v.
func (db *DB) Forget(v Version) {
	v.Acked, v.Durable, v.Void, v.Group = true, true, false, 0
	w, name, mode, sync := db.w, db.Name, db.Mode, db.Sync
	excl := db.Exclusive
	*db = DB{w: w, Name: name, Mode: mode, Sync: sync, Exclusive: excl, Versions: []Version{v}}
}

// Change is what a transaction does.
type Change struct {
	PageSize int            // of the result
	Count    int            // pages of the result
	Pages    map[int][]byte // number, from 1, to new content; page 1 is made by the pager
	Holes    map[int]bool   // new pages that are never written
	Spill    int            // pages that are written before the commit, in rollback modes after a sync of the journal
	Rollback bool           // ROLLBACK after all was written
	Late     bool           // of a smaller page size: truncate after the commit
	Same     bool           // every page is written as it is already, page 1 too
}

// RandomChange makes up a transaction.
func (db *DB) RandomChange(maxPages int) Change {
	r, head := db.w.Rand, db.Head()
	ch := Change{PageSize: head.PageSize, Pages: map[int][]byte{}, Holes: map[int]bool{}}
	if ch.PageSize == 0 {
		ch.PageSize = 512 << r.IntN(4)
	}
	n := len(head.Pages)
	ch.Count = max(n, 1)
	switch r.IntN(6) {
	case 0:
		ch.Count = 1 + r.IntN(maxPages)
	case 1, 2:
		ch.Count = min(maxPages, ch.Count+1+r.IntN(4))
	}
	for range r.IntN(6) {
		ch.Pages[1+r.IntN(ch.Count)] = nil
	}
	if r.IntN(12) == 0 { // a large one
		for range maxPages {
			ch.Pages[1+r.IntN(ch.Count)] = nil
		}
	}
	for pgno := n + 1; pgno <= ch.Count; pgno++ {
		if pgno > 1 && ch.Pages[pgno] == nil && r.IntN(4) == 0 {
			ch.Holes[pgno] = true
			continue
		}
		ch.Pages[pgno] = nil
	}
	delete(ch.Pages, 1)
	for _, pgno := range slices.Sorted(maps.Keys(ch.Pages)) {
		if ch.Holes[pgno] {
			delete(ch.Pages, pgno)
			continue
		}
		ch.Pages[pgno] = db.randomPage(ch.PageSize)
		if pgno <= n && r.IntN(10) == 0 {
			ch.Pages[pgno] = bytes.Clone(head.Pages[pgno-1]) // no change
		}
	}
	if r.IntN(3) == 0 {
		ch.Spill = r.IntN(len(ch.Pages) + 1)
	}
	ch.Rollback = r.IntN(10) == 0
	return ch
}

// NoChange makes up a transaction that writes some pages as they are. The
// database exists.
func (db *DB) NoChange() Change {
	r, head := db.w.Rand, db.Head()
	ch := Change{PageSize: head.PageSize, Count: len(head.Pages), Pages: map[int][]byte{}, Same: true}
	for range r.IntN(4) {
		if pgno := 1 + r.IntN(ch.Count); pgno > 1 {
			ch.Pages[pgno] = head.Pages[pgno-1]
		}
	}
	return ch
}

func (db *DB) randomPage(size int) []byte {
	p := make([]byte, size)
	x := db.w.Rand.Uint64()
	for i := 0; i+8 <= size; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], x)
		if i%64 == 0 {
			x = x*6364136223846793005 + 1442695040888963407
		}
	}
	return p
}

// RandomVacuum makes up a VACUUM that changes the page size.
func (db *DB) RandomVacuum(maxPages int) Change {
	r := db.w.Rand
	ch := Change{PageSize: 512 << r.IntN(4), Count: 1 + r.IntN(maxPages), Pages: map[int][]byte{}, Late: r.IntN(2) == 0}
	for pgno := 2; pgno <= ch.Count; pgno++ {
		ch.Pages[pgno] = db.randomPage(ch.PageSize)
	}
	return ch
}

// next is the version after a change, with the header on page 1.
func (db *DB) next(ch Change) Version {
	head := db.Head()
	if ch.Same {
		return Version{PageSize: head.PageSize, Pages: slices.Clone(head.Pages)}
	}
	v := Version{PageSize: ch.PageSize, Pages: make([][]byte, ch.Count)}
	for i := range v.Pages {
		pgno := i + 1
		switch p, ok := ch.Pages[pgno]; {
		case ok:
			v.Pages[i] = p
		case pgno <= len(head.Pages) && head.PageSize == ch.PageSize:
			v.Pages[i] = head.Pages[i]
		default:
			v.Pages[i] = make([]byte, ch.PageSize)
		}
	}
	p := db.randomPage(ch.PageSize)
	counter := uint32(1)
	if len(head.Pages) > 0 {
		counter = binary.BigEndian.Uint32(head.Pages[0][24:]) + 1
	}
	copy(p, "SQLite format 3\x00")
	binary.BigEndian.PutUint16(p[16:], uint16(ch.PageSize))
	if ch.PageSize == 65536 {
		binary.BigEndian.PutUint16(p[16:], 1)
	}
	p[18], p[19] = 1, 1
	if db.Mode == WAL {
		p[18], p[19] = 2, 2
	}
	p[20], p[21], p[22], p[23] = 0, 64, 32, 32
	binary.BigEndian.PutUint32(p[24:], counter)
	binary.BigEndian.PutUint32(p[28:], uint32(ch.Count))
	binary.BigEndian.PutUint32(p[92:], counter)
	p[100] = 13
	v.Pages[0] = p
	return v
}

// Run does fn, and returns false if the program was killed in it.
func (w *World) Run(fn func()) (alive bool) {
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(Killed); !ok {
				panic(r)
			}
			alive = false
		}
	}()
	fn()
	return true
}

// begin appends the version in flight.
func (db *DB) begin(v Version) {
	db.Versions = append(db.Versions[:db.last()+1], v)
	db.maybe, db.inWAL, db.undone = true, false, false
}

// last is the index of the newest version.
func (db *DB) last() int { return len(db.Versions) - 1 }

func (w *World) alive() {
	if w.Down() {
		panic(Killed{})
	}
}

// accept makes the newest version the committed one.
func (db *DB) accept(acked, durable bool) {
	db.w.alive()
	db.Cur = db.last()
	v := &db.Versions[db.Cur]
	v.Acked, v.Durable = v.Acked || acked, v.Durable || durable
	db.maybe = false
}

// void takes the version in flight back. One that the log may hold together
// with its undurable abort stays in the list.
func (db *DB) void(gone bool) {
	if !db.maybe {
		return
	}
	db.maybe = false
	if gone {
		db.Versions = db.Versions[:db.last()]
		return
	}
	db.Versions[db.last()].Void = true
}

// synced notes a successful FSYNC of a file of the database.
func (db *DB) synced() {
	db.w.alive()
	for i := range db.Versions[:db.Cur+1] {
		if !db.Versions[i].Void {
			db.Versions[i].Durable = true
		}
	}
}

// openFile opens one of the files of the database, if it is not open.
func (db *DB) openFile(f *File, suffix string, create bool) error {
	if *f != nil {
		return nil
	}
	db.w.step()
	n, err := db.w.FS.Open(db.Name+suffix, create)
	if err == nil {
		*f = n
	}
	return err
}

func (db *DB) write(f File, p []byte, off int64) error {
	db.w.step()
	_, err := f.WriteAt(p, off)
	if db.w.Trace {
		db.w.logf("  %s: write %d bytes at %d of %s: %x... %v", db.Name, len(p), off, db.which(f), p[:min(8, len(p))], err)
	}
	return err
}

func (db *DB) which(f File) string {
	switch f {
	case db.db:
		return "database"
	case db.journal:
		return "journal"
	case db.wal:
		return "wal"
	}
	return "file"
}

func (db *DB) truncate(f File, size int64) error {
	db.w.step()
	err := f.Truncate(size)
	if db.w.Trace {
		db.w.logf("  %s: truncate %s to %d: %v", db.Name, db.which(f), size, err)
	}
	return err
}

func (db *DB) sync(f File) error {
	db.w.step()
	err := f.Sync()
	if err == nil {
		db.synced()
	}
	return err
}

func readFull(f File, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if err == nil && n < len(p) {
		return fmt.Errorf("%d of %d bytes at %d", n, len(p), off)
	}
	return err
}

// ErrMismatch is a read that shows something else than what was committed.
var ErrMismatch = errors.New("a read shows what was not committed")

func same(got, want []byte, what string, args ...any) error {
	if bytes.Equal(got, want) {
		return nil
	}
	i := 0
	for i < len(got) && i < len(want) && got[i] == want[i] {
		i++
	}
	return fmt.Errorf("%w: %s: differs at byte %d (%d bytes, want %d)", ErrMismatch, fmt.Sprintf(what, args...), i, len(got), len(want))
}
