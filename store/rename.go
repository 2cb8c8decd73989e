package store

import (
	"errors"
	"fmt"
	"path"
	"strings"
	"time"
)

// Rename implements FS. Ordinary files and folders are renamed. A database under
// a new name is a drop and a new database; a database or a file that holds one,
// renamed over a database, is one transaction that replaces it.
func (st *Store) Rename(oldPath, newPath string, noReplace bool) error {
	n, err := st.lookupUnseen(oldPath)
	if err != nil {
		return err
	}
	target, err := st.lookupUnseen(newPath)
	if err != nil && !errors.Is(err, ErrNotExist) {
		return err
	}
	if err == nil && noReplace {
		return fmt.Errorf("%s: %w", newPath, ErrExist)
	}
	if err != nil {
		target = nil
		if err := st.checkNew(newPath); err != nil {
			return err
		}
	}
	defer st.touchDir(oldPath)
	defer st.touchDir(newPath)
	switch n := n.(type) {
	case *dir:
		return st.renameDir(oldPath, newPath, target)
	case *file:
		return st.renameFile(n, oldPath, newPath, target)
	}
	return fmt.Errorf("%s: %w", oldPath, ErrCrossing)
}

// lookupUnseen is Lookup without looking at a file that may hold a database: a rename
// of a temporary file to its real name comes right after its close.
func (st *Store) lookupUnseen(p string) (Node, error) {
	st.nsMu.RLock()
	f := st.files[p]
	st.nsMu.RUnlock()
	if f != nil {
		return f, nil
	}
	return st.Lookup(p)
}

func (st *Store) renameDir(oldPath, newPath string, target Node) error {
	if target != nil && target.Kind() != KindDir {
		return fmt.Errorf("%s: %w", newPath, ErrNotDir)
	}
	st.nsMu.Lock()
	defer st.nsMu.Unlock()
	prefix := oldPath + "/"
	for name, f := range st.files {
		if strings.HasPrefix(name, prefix) && (f.db.Load() != nil || f.isDB.Load()) {
			return fmt.Errorf("%s: holds database %s: %w", oldPath, name, ErrBusy)
		}
	}
	if target != nil && st.populatedLocked(newPath) {
		return fmt.Errorf("%s: %w", newPath, ErrNotEmpty)
	}
	if err := st.fs.Rename(path.Join(filesDir, oldPath), path.Join(filesDir, newPath)); err != nil {
		return fmt.Errorf("%s: %w", oldPath, err)
	}
	moved := func(name string) (string, bool) {
		if name == oldPath {
			return newPath, true
		}
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			return newPath + "/" + rest, true
		}
		return "", false
	}
	files, dirs := make(map[string]*file), make(map[string]*dir)
	delete(st.dirs, newPath)
	for name, f := range st.files {
		if to, ok := moved(name); ok {
			f.setPath(to)
			name = to
		}
		files[name] = f
	}
	for name, x := range st.dirs {
		if to, ok := moved(name); ok {
			x.path = to
			name = to
		}
		dirs[name] = x
	}
	st.files, st.dirs = files, dirs
	return nil
}

func (f *file) setPath(p string) {
	f.mu.Lock()
	f.path = p
	f.named = false
	f.mu.Unlock()
}

func (st *Store) renameFile(f *file, oldPath, newPath string, target Node) error {
	if !st.opt.Writable(oldPath) || !st.opt.Writable(newPath) {
		return fmt.Errorf("%s: %w", newPath, ErrReplica)
	}
	tf, _ := target.(*file)
	if target != nil && tf == nil {
		if target.Kind() != KindDir {
			return fmt.Errorf("%s: %w", newPath, ErrReserved)
		}
		return fmt.Errorf("%s: %w", newPath, ErrIsDir)
	}
	if tf == f {
		return nil
	}
	f.mu.Lock()
	sides := f.sides
	f.mu.Unlock()
	fromDB := f.db.Load() != nil && f.isDB.Load()
	toDB := tf != nil && tf.db.Load() != nil && tf.isDB.Load()
	switch {
	case sides > 0:
		return fmt.Errorf("%s: has a journal or a WAL: %w", oldPath, ErrBusy)
	case toDB:
		return st.renameOver(f, fromDB, oldPath, newPath, tf)
	case fromDB:
		return st.renameDatabase(f, newPath, tf)
	}
	if err := st.fs.Rename(path.Join(filesDir, oldPath), path.Join(filesDir, newPath)); err != nil {
		return fmt.Errorf("%s: %w", oldPath, err)
	}
	f.db.Store(nil)
	st.nsMu.Lock()
	if tf != nil {
		tf.gone.Store(true)
	}
	delete(st.files, oldPath)
	db := st.byName[oldPath]
	if db != nil && db.id == 0 {
		delete(st.byName, oldPath) // a journal was beside it and is gone: a file again
	}
	st.nsMu.Unlock()
	if db != nil && db.id != 0 && db.file == f { // dropped before: its history stays with the name
		st.rebind(db, st.newFile(oldPath, f.mode.Load()))
	}
	st.nsMu.Lock()
	st.files[newPath] = f
	f.setPath(newPath)
	st.nsMu.Unlock()
	return nil
}

// releaseTime is how long a rename waits for a program that has closed the
// database: the kernel says so only after close(2) has returned.
const releaseTime = 50 * time.Millisecond

// renameOver replaces the content of the database tf with that of f. A program
// that has tf open would go on with what it has cached.
func (st *Store) renameOver(f *file, fromDB bool, oldPath, newPath string, tf *file) error {
	db := tf.db.Load()
	for started := time.Now(); tf.inUse() && time.Since(started) < releaseTime; {
		time.Sleep(time.Millisecond)
	}
	tf.mu.Lock()
	busy := tf.sides > 0 || tf.opens > 0
	tf.mu.Unlock()
	if busy {
		return fmt.Errorf("%s: %w", db.name, ErrBusy)
	}
	if !fromDB {
		h, err := f.Open(false)
		if err != nil {
			return err
		}
		h.Release()
		if f.isDB.Load() { // Open looked at it
			return st.renameOver(f, true, oldPath, newPath, tf)
		}
		return fmt.Errorf("%s: no SQLite database, cannot replace one: %w", oldPath, ErrOverwrite)
	}
	src := f.db.Load()
	c, unlock, err := src.content()
	if err != nil {
		return err
	}
	db.mu.Lock()
	err = db.mayWrite()
	if err == nil {
		err = db.replace(c)
	}
	db.mu.Unlock()
	unlock()
	if err != nil {
		return err
	}
	return st.dropRenamed(src, newPath)
}

// dropRenamed drops a database whose content has gone to newPath, for good: if
// the drop fails both stay. The kernel thinks that its node has gone there, and must
// ask again.
func (st *Store) dropRenamed(src *DB, newPath string) error {
	if err := st.drop(src); err != nil {
		src.log.Warn("renamed, and could not be removed under its old name", "new", newPath, "err", err)
	}
	st.later(func(p Peer) {
		p.InvalidateEntry(newPath)
		p.InvalidateEntry(src.name)
	})
	return nil
}

// content describes everything in the database, and holds its lock until unlock.
func (db *DB) content() (c change, unlock func(), err error) {
	db.settle()
	db.mu.Lock()
	c.pageSize, c.commit = db.at.PageSize, db.at.Commit
	if err := db.mayWrite(); err != nil {
		db.mu.Unlock()
		return c, nil, err // it could not be dropped afterwards
	}
	if db.journal != nil && db.journal.armed || db.wal != nil && len(db.wal.pages) > 0 {
		db.mu.Unlock()
		return c, nil, fmt.Errorf("%s: %w", db.name, ErrBusy)
	}
	for pgno := uint32(1); pgno <= c.commit; pgno++ {
		c.pages = append(c.pages, pgno)
	}
	c.read = db.page
	return c, db.mu.Unlock, nil
}

// renameDatabase makes a new database of the same content and drops the old one.
// A crash between the two leaves both.
func (st *Store) renameDatabase(f *file, newPath string, tf *file) error {
	src := f.db.Load()
	if tf != nil {
		if err := st.unlinkFile(newPath, tf); err != nil {
			return err
		}
	}
	n, h, err := st.createFile(newPath, f.mode.Load())
	if err != nil {
		return err
	}
	nf := n.(*file)
	defer h.Release()
	c, unlock, err := src.content()
	if err != nil {
		_ = st.unlinkFile(newPath, nf)
		return err
	}
	db := st.databaseFor(nf, newPath)
	db.mu.Lock()
	err = db.replace(c)
	db.mu.Unlock()
	unlock()
	if err != nil {
		_ = st.unlinkFile(newPath, nf)
		return err
	}
	return st.dropRenamed(src, newPath)
}
