package store

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"sort"
	"strings"
	"sync/atomic"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/sabotage"
	"github.com/litefs-agent/litefs-agent/internal/sqlitefile"
)

var _ FS = (*Store)(nil)

// A dir is a folder of the mount: a folder of the same path below filesDir.
type dir struct {
	st   *Store
	ino  uint64
	path string // guarded by Store.nsMu

	mode  atomic.Uint32 // kept here, since the kernel asks after each CREATE and UNLINK
	mtime atomic.Int64  // unix nanoseconds
}

// touch notes that a name was made or removed in the folder of p.
func (st *Store) touchDir(p string) {
	parent := path.Dir(p)
	if parent == "." {
		parent = ""
	}
	st.nsMu.RLock()
	d := st.dirs[parent]
	st.nsMu.RUnlock()
	if d != nil {
		d.mtime.Store(st.opt.Now().UnixNano())
	}
}

var errIsDir = fmt.Errorf("open: %w", ErrIsDir)

// Kind implements Node.
func (d *dir) Kind() Kind { return KindDir }

// Attr implements Node.
func (d *dir) Attr() Attr {
	return Attr{
		Kind: KindDir, Ino: d.ino, Mode: d.mode.Load(), Mtime: time.Unix(0, d.mtime.Load()),
		Nlink: 1, // not counted: with 2, fts(3) would take it that there is no folder in this one
	}
}

// Open implements Node.
func (d *dir) Open(bool) (Handle, error) { return nil, errIsDir }

// SetSize implements Node.
func (d *dir) SetSize(Handle, int64) error { return errIsDir }

// SetMode implements Node.
func (d *dir) SetMode(mode uint32) error {
	d.mode.Store(mode & 0o7777)
	if c, ok := d.st.fs.(chmoder); ok {
		return c.Chmod(path.Join(filesDir, d.path), os.FileMode(mode&0o777))
	}
	return nil
}

// SetTime implements Node.
func (d *dir) SetTime(t time.Time) error {
	d.mtime.Store(t.UnixNano())
	if c, ok := d.st.fs.(chmoder); ok {
		return c.Chtimes(path.Join(filesDir, d.path), t)
	}
	return nil
}

// Root implements FS.
func (st *Store) Root() Node { return st.root }

// Attach implements FS.
func (st *Store) Attach(p Peer) {
	if p == nil {
		st.peerPtr.Store(nil)
		return
	}
	st.peerPtr.Store(&p)
}

func (st *Store) peer() Peer {
	if p := st.peerPtr.Load(); p != nil {
		return *p
	}
	return nil
}

// reserved asks the mount whether somebody holds RESERVED or more.
func (st *Store) reserved(f *file) (bool, error) {
	p := st.peer()
	if p == nil {
		return false, nil
	}
	return p.Reserved(f)
}

// sideName splits NAME-journal, NAME-wal and NAME-shm.
func sideName(p string) (base string, k Kind, ok bool) {
	for _, s := range [...]struct {
		suffix string
		kind   Kind
	}{{"-journal", KindJournal}, {"-wal", KindWAL}, {"-shm", KindShm}} {
		if b, found := strings.CutSuffix(p, s.suffix); found && b != "" && !strings.HasSuffix(b, "/") {
			return b, s.kind, true
		}
	}
	return "", 0, false
}

// Lookup implements FS.
func (st *Store) Lookup(p string) (Node, error) {
	if p == "" {
		return st.root, nil
	}
	st.nsMu.RLock()
	f, s := st.files[p], st.sides[p]
	st.nsMu.RUnlock()
	if f != nil {
		st.adoptIfCandidate(f)
		if !f.moved.Load() {
			return f, nil
		}
		st.nsMu.RLock()
		s = st.sides[p]
		st.nsMu.RUnlock()
	}
	if s != nil {
		return s, nil
	}
	if n := st.computedAt(p); n != nil {
		return n, nil
	}
	if base, _, ok := sideName(p); ok {
		st.nsMu.RLock()
		f := st.files[base]
		st.nsMu.RUnlock()
		if f != nil {
			st.adoptIfCandidate(f)
			if s := st.replicaSide(p, base, f); s != nil {
				return s, nil
			}
			if f.isDB.Load() {
				return nil, ErrNotExist // journals of a database are never on the disk
			}
		}
	}
	return st.lookupDisk(p)
}

// lookupDisk finds a folder or an ordinary file that nobody asked for before.
func (st *Store) lookupDisk(p string) (Node, error) {
	fi, err := st.fs.Stat(path.Join(filesDir, p))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			err = ErrNotExist
		}
		return nil, fmt.Errorf("%s: %w", p, err)
	}
	st.nsMu.Lock()
	defer st.nsMu.Unlock()
	switch {
	case fi.IsDir():
		return st.dirLocked(p), nil
	case !fi.Mode().IsRegular():
		return nil, fmt.Errorf("%s: %w", p, ErrNotExist)
	}
	if f := st.files[p]; f != nil {
		return f, nil
	}
	f := st.newFile(p, uint32(fi.Mode().Perm()))
	f.size.Store(fi.Size())
	f.mtime.Store(fi.ModTime().UnixNano())
	f.onDisk.Store(true)
	st.files[p] = f
	return f, nil
}

func (st *Store) dirLocked(p string) *dir {
	d := st.dirs[p]
	if d == nil {
		d = &dir{st: st, ino: st.inos.next(), path: p}
		if fi, err := st.fs.Stat(path.Join(filesDir, p)); err == nil {
			d.mode.Store(uint32(fi.Mode().Perm()))
			d.mtime.Store(fi.ModTime().UnixNano())
		}
		st.dirs[p] = d
	}
	return d
}

// checkNew refuses names that nobody may make here.
func (st *Store) checkNew(p string) error {
	if st.computedAt(p) != nil || st.opt.Reserved(p) {
		return fmt.Errorf("%s: %w", p, ErrReserved)
	}
	if len(path.Base(p)) > 255 {
		return fmt.Errorf("%s: %w", p, errNameTooLong)
	}
	return nil
}

// Create implements FS.
func (st *Store) Create(p string, mode uint32, exclusive bool) (Node, Handle, error) {
	if n, err := st.Lookup(p); err == nil {
		if exclusive {
			return nil, nil, fmt.Errorf("%s: %w", p, ErrExist)
		}
		h, err := n.Open(true)
		return n, h, err
	} else if !errors.Is(err, ErrNotExist) {
		return nil, nil, err
	}
	if err := st.checkNew(p); err != nil {
		return nil, nil, err
	}
	defer st.touchDir(p)
	if base, kind, ok := sideName(p); ok {
		st.nsMu.RLock()
		f := st.files[base]
		st.nsMu.RUnlock()
		if f != nil {
			return st.createSide(p, base, f, kind, mode)
		}
	}
	if _, ok := sqlitefile.IsSuperJournalName(path.Base(p)); ok {
		s := st.newSide(p, nil, KindSuperJournal, mode)
		st.nsMu.Lock()
		st.sides[p] = s
		st.nsMu.Unlock()
		h, err := s.Open(true)
		return s, h, err
	}
	return st.createFile(p, mode)
}

func (st *Store) newSide(p string, owner *file, kind Kind, mode uint32) *sideFile {
	s := &sideFile{st: st, kind: kind, owner: owner, path: p, data: st.pool.NewFile()}
	if kind == KindJournal {
		s.ino = owner.ino | 1<<31 // one for all journals of a database
	} else {
		s.ino = st.inos.next()
	}
	s.mode.Store(mode & 0o7777)
	s.touch(st)
	return s
}

// createSide makes the journal, WAL or wal-index of a file: from now on it may
// become a database.
func (st *Store) createSide(p, base string, f *file, kind Kind, mode uint32) (Node, Handle, error) {
	if !st.opt.Writable(base) && kind != KindShm {
		return nil, nil, fmt.Errorf("%s: %w", p, ErrReplica)
	}
	db := st.databaseFor(f, base)
	s := st.newSide(p, f, kind, mode)
	db.mu.Lock()
	switch kind {
	case KindJournal:
		db.journal = &journalState{node: s}
	case KindWAL:
		db.wal = &walState{node: s, data: s.data}
	}
	db.mu.Unlock()
	f.mu.Lock()
	f.sides++
	if kind == KindShm {
		f.shm = s
	}
	f.mu.Unlock()
	st.nsMu.Lock()
	st.sides[p] = s
	st.nsMu.Unlock()
	h, err := s.Open(true)
	return s, h, err
}

// databaseFor returns the database of a file, made when there was none. It
// continues the history of a dropped database of that name.
func (st *Store) databaseFor(f *file, name string) *DB {
	if db := f.db.Load(); db != nil {
		return db
	}
	st.nsMu.RLock()
	old := st.byName[name]
	st.nsMu.RUnlock()
	if old != nil && old.id != 0 && old.file != f {
		st.rebind(old, f)
	}
	st.nsMu.Lock()
	db := st.byName[name]
	if db == nil || db.file != f {
		db = st.newDB(f, name)
		st.byName[name] = db
	}
	st.nsMu.Unlock()
	db.size.Store(f.size.Load())
	f.db.Store(db)
	return db
}

func (st *Store) createFile(p string, mode uint32) (Node, Handle, error) {
	if !st.opt.Writable(p) {
		return nil, nil, fmt.Errorf("%s: %w", p, ErrReplica)
	}
	name := path.Join(filesDir, p)
	b, err := st.fs.OpenFile(name, os.O_RDWR|os.O_CREATE, os.FileMode(mode&0o777))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			err = ErrNotExist
		}
		return nil, nil, st.noSpace(fmt.Errorf("%s: %w", p, err))
	}
	st.nsMu.Lock()
	f := st.files[p]
	if f == nil {
		if old := st.byName[p]; old != nil { // dropped before: the history goes on
			f = old.file
			f.mode.Store(mode & 0o7777)
			f.ino = st.inos.next()
		} else {
			f = st.newFile(p, mode)
		}
		st.files[p] = f
	}
	st.nsMu.Unlock()
	if c, ok := st.fs.(chmoder); ok {
		_ = c.Chmod(name, os.FileMode(mode&0o777)) // not cut by our umask
	}
	f.mu.Lock()
	f.back = b
	f.opens++
	f.writers++
	f.named, f.copied = false, false
	f.size.Store(0)
	f.mtime.Store(st.opt.Now().UnixNano())
	f.gone.Store(false)
	f.onDisk.Store(true)
	f.mu.Unlock()
	return f, &dbHandle{f: f, write: true}, nil
}

// Mkdir implements FS.
func (st *Store) Mkdir(p string, mode uint32) (Node, error) {
	if _, err := st.Lookup(p); err == nil {
		return nil, fmt.Errorf("%s: %w", p, ErrExist)
	}
	if err := st.checkNew(p); err != nil {
		return nil, err
	}
	if err := st.mkdirs(p, mode); err != nil {
		return nil, err
	}
	st.touchDir(p)
	st.nsMu.Lock()
	defer st.nsMu.Unlock()
	return st.dirLocked(p), nil
}

func (st *Store) mkdirs(p string, mode uint32) error {
	name := path.Join(filesDir, p)
	if err := st.fs.Mkdir(name, os.FileMode(mode&0o777)); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			err = ErrNotExist
		}
		return st.noSpace(fmt.Errorf("%s: %w", p, err))
	}
	if c, ok := st.fs.(chmoder); ok {
		_ = c.Chmod(name, os.FileMode(mode&0o777))
	}
	return nil
}

// Rmdir implements FS.
func (st *Store) Rmdir(p string) error {
	n, err := st.Lookup(p)
	if err != nil {
		return err
	}
	if n.Kind() != KindDir {
		return fmt.Errorf("%s: %w", p, ErrNotDir)
	}
	defer st.touchDir(p)
	st.nsMu.Lock()
	defer st.nsMu.Unlock()
	if st.populatedLocked(p) {
		return fmt.Errorf("%s: %w", p, ErrNotEmpty)
	}
	if err := st.fs.Remove(path.Join(filesDir, p)); err != nil {
		return fmt.Errorf("%s: %w", p, err)
	}
	delete(st.dirs, p)
	return nil
}

// populatedLocked reports whether a database or side file lies below p.
func (st *Store) populatedLocked(p string) bool {
	prefix := p + "/"
	for name := range st.files {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	for name := range st.sides {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// Unlink implements FS.
func (st *Store) Unlink(p string) error {
	n, err := st.Lookup(p)
	if err != nil {
		return err
	}
	defer st.touchDir(p)
	switch n := n.(type) {
	case *sideFile:
		return st.unlinkSide(p, n)
	case *file:
		if db := n.db.Load(); db != nil && n.isDB.Load() {
			return st.drop(db)
		}
		return st.unlinkFile(p, n)
	case *dir:
		return fmt.Errorf("%s: %w", p, ErrIsDir)
	}
	return fmt.Errorf("%s: %w", p, ErrReserved)
}

func (st *Store) unlinkFile(p string, f *file) error {
	if err := st.fs.Remove(path.Join(filesDir, p)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s: %w", p, err)
	}
	st.nsMu.Lock()
	delete(st.files, p)
	if db := st.byName[p]; db != nil && db.file == f && db.id == 0 {
		delete(st.byName, p)
	}
	st.nsMu.Unlock()
	f.gone.Store(true)
	return nil
}

// unlinkSide removes a side file. That of an armed journal is the commit; that
// of a super-journal commits all databases that name it.
func (st *Store) unlinkSide(p string, s *sideFile) error {
	if s.replica {
		return fmt.Errorf("%s: %w", p, ErrReplica)
	}
	if s.kind == KindSuperJournal {
		if err := st.commitGroup(p); err != nil {
			return err
		}
	}
	if db := s.live(); db != nil {
		if err := st.unlinkLive(db, s); err != nil {
			return err
		}
	}
	st.nsMu.Lock()
	delete(st.sides, p)
	st.nsMu.Unlock()
	s.gone.Store(true)
	if s.opens.Load() == 0 {
		s.data.Reset()
	}
	return nil
}

func (st *Store) unlinkLive(db *DB, s *sideFile) error {
	db.mu.Lock()
	defer db.mu.Unlock()
	switch {
	case s.kind == KindJournal && db.journal != nil && db.journal.node == s:
		if db.journal.armed {
			if err := db.endTransaction(); err != nil && !sabotage.On(sabotage.ErrorHonoured) {
				return err
			}
		}
		db.journal = nil
	case s.kind == KindWAL && db.wal != nil && db.wal.node == s:
		if err := db.endWAL(db.wal); err != nil {
			return err
		}
		db.unreserveWAL(db.wal)
		db.wal = nil
	}
	f := s.owner
	f.mu.Lock()
	f.sides--
	if f.shm == s {
		f.shm = nil
	}
	f.mu.Unlock()
	return nil
}

// ReadDir implements FS.
func (st *Store) ReadDir(p string) ([]DirEntry, error) {
	infos, err := st.fs.ReadDir(path.Join(filesDir, p))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p, err)
	}
	seen := make(map[string]DirEntry)
	st.nsMu.Lock()
	for _, fi := range infos {
		full := path.Join(p, fi.Name())
		switch {
		case fi.IsDir():
			seen[fi.Name()] = DirEntry{fi.Name(), KindDir, st.dirLocked(full).ino}
		case fi.Type().IsRegular() && st.files[full] == nil:
			seen[fi.Name()] = DirEntry{fi.Name(), KindOrdinary, 0}
		}
	}
	in := func(name string) bool {
		d := path.Dir(name)
		return d == p || d == "." && p == ""
	}
	var dbs []string
	for name, f := range st.files {
		if in(name) {
			seen[path.Base(name)] = DirEntry{path.Base(name), f.Kind(), f.ino}
			if f.isDB.Load() {
				dbs = append(dbs, name)
			}
		}
	}
	for name, s := range st.sides {
		if in(name) {
			seen[path.Base(name)] = DirEntry{path.Base(name), s.kind, s.ino}
		}
	}
	st.nsMu.Unlock()
	for _, name := range dbs {
		for _, suffix := range computedSuffixes {
			b := path.Base(name) + suffix
			seen[b] = DirEntry{b, KindComputed, 0}
		}
	}
	if p == "" {
		for _, name := range computedRoot {
			if st.computedAt(name) != nil {
				seen[name] = DirEntry{name, KindComputed, 0}
			}
		}
	}
	list := make([]DirEntry, 0, len(seen))
	for _, e := range seen {
		if e.Ino == 0 {
			e.Ino = st.inos.forName(path.Join(p, e.Name))
		}
		list = append(list, e)
	}
	sort.Slice(list, func(i, k int) bool { return list[i].Name < list[k].Name })
	return slices.Clip(list), nil
}

// StatFS implements FS.
func (st *Store) StatFS() (total, free, avail, files, filesFree uint64, err error) {
	n, err := st.fs.Free()
	if err != nil {
		return 0, 0, 0, 0, 0, err
	}
	if s, ok := st.fs.(interface {
		StatFS() (total, free, avail, files, filesFree uint64, err error)
	}); ok {
		return s.StatFS()
	}
	return uint64(n), uint64(n), uint64(n), 1 << 20, 1 << 20, nil
}
