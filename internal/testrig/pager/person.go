package pager

import (
	"bytes"
	"errors"
	"slices"
)

// What people do to the files of databases, without SQLite.

// quiet ends every program that has the database open, properly: no journal and
// no WAL is left.
func (db *DB) quiet() error {
	if db.Mode == WAL && db.Exists() {
		if err := db.attach(); err != nil {
			return err
		}
		if err := db.CloseWAL(); err != nil {
			return err
		}
	}
	if db.w.FS.Exists(db.Name + "-journal") {
		if err := db.openFile(&db.db, "", false); err != nil {
			return err
		}
		if err := db.hot(); err != nil {
			return err
		}
		if db.w.FS.Exists(db.Name + "-journal") {
			db.reserved = true // SQLite takes RESERVED or more to delete it
			err := db.removeJournal()
			db.reserved = false
			if err != nil {
				return err
			}
		}
	}
	db.decide(true)
	db.w.step()
	db.closeAll()
	db.index = nil
	return nil
}

// Rename is mv of a database to another name, where there may be one. Both are
// closed first.
func (db *DB) Rename(to *DB) error {
	for _, x := range []*DB{db, to} {
		if !x.w.FS.Exists(x.Name) {
			continue
		}
		if !x.Exists() {
			return nil // what a broken copy left
		}
		if err := x.quiet(); err != nil {
			return err
		}
	}
	if !db.Exists() {
		return nil
	}
	v := db.Head()
	db.w.step()
	to.begin(Version{PageSize: v.PageSize, Pages: slices.Clone(v.Pages)})
	db.begin(Version{})
	if err := db.w.FS.Rename(db.Name, to.Name); err != nil {
		db.void(false)
		to.void(false)
		return err
	}
	to.accept(true, true) // a transaction of its own, and durable
	db.accept(true, false)
	to.Mode, db.Mode = db.Mode, Delete
	return nil
}

// Remains reports whether killed programs left a journal or a WAL, and nobody
// has the database open.
func (db *DB) Remains() bool {
	return db.db == nil && db.Exists() && (db.w.FS.Exists(db.Name+"-journal") || db.w.FS.Exists(db.Name+"-wal"))
}

// RemoveRemains is rm of the journal and the WAL that killed programs left.
// Nothing committed is lost, and nothing half committed.
func (db *DB) RemoveRemains() error {
	db.w.step() // and then all of it: what it finds decides what there was
	for _, suffix := range []string{"-journal", "-wal", "-shm"} {
		if !db.w.FS.Exists(db.Name + suffix) {
			continue
		}
		if err := db.w.FS.Remove(db.Name + suffix); err != nil {
			return err
		}
	}
	db.closeAll()
	db.index = nil
	return db.find()
}

// find reads which version the database holds: the committed one, or what was in
// flight when its program was killed.
func (db *DB) find() error {
	if err := db.openFile(&db.db, "", false); err != nil {
		return err
	}
	got := make([]byte, db.db.Size())
	if err := readFull(db.db, got, 0); err != nil {
		return err
	}
	if db.maybe && bytes.HasPrefix(got, db.Versions[db.last()].Bytes()) {
		db.accept(false, false)
		return nil
	}
	want := db.Head().Bytes()
	got = got[:min(len(got), len(want))] // SQLite cuts a file that shrank after the commit, or never
	if err := same(got, want, "%s without its journal and WAL", db.Name); err != nil {
		return err
	}
	if db.maybe {
		db.void(false)
	}
	return nil
}

// ErrAccepted is a write that the mount had to refuse.
var ErrAccepted = errors.New("a write without SQLite's locks was accepted")

// Scribble writes over a database without SQLite's locks, or cuts it, which must
// fail. It reports whether there was something to try it on.
func (db *DB) Scribble() (tried bool, err error) {
	if db.db == nil || db.reserved || db.maybe || !db.Exists() || db.w.FS.Exists(db.Name+"-journal") {
		return false, nil
	}
	ps := db.Head().PageSize
	page := db.w.Rand.IntN(len(db.Head().Pages))
	if page > 0 && db.Mode != WAL && db.w.Rand.IntN(4) == 0 {
		if db.db.Truncate(int64(page)*int64(ps)) == nil {
			return true, ErrAccepted
		}
		return true, nil
	}
	if _, err := db.db.WriteAt(db.randomPage(ps), int64(page)*int64(ps)); err == nil {
		return true, ErrAccepted
	}
	return true, nil
}
