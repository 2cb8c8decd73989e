package store

import (
	"fmt"
	"sync/atomic"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/sparse"
	"github.com/litefs-agent/litefs-agent/internal/sqlitefile"
)

// A sideFile is a journal, WAL, wal-index or super-journal. It lives in memory
// (invariant 24: none survives the agent).
type sideFile struct {
	st    *Store
	kind  Kind
	owner *file // nil for a super-journal
	path  string
	ino   uint64
	data  *sparse.File

	replica bool // of a database that is only read here

	mode  atomic.Uint32
	mtime atomic.Int64
	opens atomic.Int32
	gone  atomic.Bool // unlinked: writes to it mean nothing any more
}

var _ Node = (*sideFile)(nil)

func (s *sideFile) touch(st *Store) { s.mtime.Store(st.opt.Now().UnixNano()) }

// Path is where the file is at the mount.
func (s *sideFile) Path() string { return s.path }

// Kind implements Node.
func (s *sideFile) Kind() Kind { return s.kind }

// Attr implements Node.
func (s *sideFile) Attr() Attr {
	a := Attr{Kind: s.kind, Ino: s.ino, Mode: s.mode.Load(), Size: s.data.Size(), Mtime: time.Unix(0, s.mtime.Load()), Nlink: 1}
	if s.gone.Load() {
		a.Nlink = 0
	}
	return a
}

// Open implements Node.
func (s *sideFile) Open(write bool) (Handle, error) {
	if write && s.owner != nil && s.kind != KindShm && !s.st.opt.Writable(s.owner.name()) {
		return nil, fmt.Errorf("%s: %w", s.path, ErrReplica)
	}
	if s.gone.Load() {
		return nil, ErrStale // went with its database: the kernel looks the name up again
	}
	s.opens.Add(1)
	return &sideHandle{s: s}, nil
}

// SetMode implements Node.
func (s *sideFile) SetMode(mode uint32) error {
	s.mode.Store(mode & 0o7777)
	return nil
}

// SetTime implements Node.
func (s *sideFile) SetTime(t time.Time) error {
	s.mtime.Store(t.UnixNano())
	return nil
}

// live returns the database that events on this file concern, nil if none.
func (s *sideFile) live() *DB {
	if s.owner == nil || s.gone.Load() {
		return nil
	}
	return s.owner.db.Load()
}

// SetSize implements Node. Truncating a journal to nothing is a commit event.
func (s *sideFile) SetSize(_ Handle, size int64) error {
	db := s.live()
	if db == nil || s.kind == KindShm {
		return s.data.Truncate(size)
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.dropped {
		return s.data.Truncate(size)
	}
	switch {
	case s.kind == KindJournal && size == 0 && db.journal != nil && db.journal.node == s && db.journal.armed:
		if err := db.endTransaction(); err != nil {
			return err
		}
	case s.kind == KindWAL && size == 0 && db.wal != nil && db.wal.node == s:
		if err := db.endWAL(db.wal); err != nil {
			return err
		}
	}
	s.touch(s.st)
	return s.data.Truncate(size)
}

// endWAL is resetWAL at a truncation to nothing or an unlink. Where nothing
// depends on who does it nobody is asked: an UNLINK that waits for the opening of
// the database keeps that opening from its folder (invariant 20).
func (db *DB) endWAL(w *walState) error {
	if len(w.pages) == 0 && (db.pend == nil || !db.pend.wal) {
		return db.resetWAL(w, true)
	}
	held, err := db.st.reserved(db.file)
	if err != nil {
		return err
	}
	return db.resetWAL(w, held)
}

// A sideHandle is one open sideFile.
type sideHandle struct{ s *sideFile }

var _ Handle = (*sideHandle)(nil)

// ReadAt implements Handle.
func (h *sideHandle) ReadAt(p []byte, off int64) (int, error) {
	size := h.s.data.Size()
	if off >= size {
		return 0, nil
	}
	p = p[:min(int64(len(p)), size-off)]
	return h.s.data.ReadAt(p, off)
}

// WriteAt implements Handle.
func (h *sideHandle) WriteAt(p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := h.s.writeAt(p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (s *sideFile) writeAt(p []byte, off int64) error {
	if o := s.owner; o != nil && s.kind != KindShm && o.isDB.Load() && o.gone.Load() {
		return ErrStale // a commit to a dropped database would be accepted and lost
	}
	db := s.live()
	if db == nil || s.kind == KindShm || s.kind == KindSuperJournal {
		s.touch(s.st)
		return s.st.noSpace(s.data.WriteAt(p, off, nil))
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	if err := db.mayWrite(); err != nil {
		return err
	}
	if s.kind == KindWAL {
		if db.wal == nil || db.wal.node != s {
			return s.st.noSpace(s.data.WriteAt(p, off, nil))
		}
		return db.writeWAL(db.wal, p, off)
	}
	return db.writeJournal(s, p, off)
}

// writeJournal is a WRITE of the rollback journal: it arms it, or ends the
// transaction by making the first byte of its header zero. db.mu is held.
func (db *DB) writeJournal(s *sideFile, p []byte, off int64) error {
	j := db.journal
	if j == nil || j.node != s {
		return s.st.noSpace(s.data.WriteAt(p, off, nil))
	}
	if j.armed && off == 0 && p[0] == 0 {
		if err := db.endTransaction(); err != nil {
			return err
		}
	}
	if err := s.data.WriteAt(p, off, nil); err != nil {
		return db.st.noSpace(err)
	}
	s.touch(s.st)
	if off < int64(len(sqlitefile.JournalMagic)) && !j.armed {
		var b [len(sqlitefile.JournalMagic)]byte
		if _, err := s.data.ReadAt(b[:], 0); err != nil {
			return err
		}
		j.armed = string(b[:]) == sqlitefile.JournalMagic
	}
	return nil
}

// Sync implements Handle.
func (h *sideHandle) Sync() error {
	db := h.s.live()
	if db == nil {
		return nil
	}
	switch h.s.kind {
	case KindWAL:
		db.mu.Lock()
		w := db.wal
		db.mu.Unlock()
		if w != nil {
			return db.syncWAL(w)
		}
	case KindJournal:
		db.mu.Lock()
		if j := db.journal; j != nil && j.armed {
			j.asked = true
		}
		lsn := db.last
		db.mu.Unlock()
		return db.st.waitAsked(lsn)
	}
	return nil
}

// Allocate implements Handle.
func (h *sideHandle) Allocate(off, n int64) error {
	if h.s.data.Size() >= off+n {
		return nil
	}
	return h.s.SetSize(h, off+n)
}

// Release implements Handle.
func (h *sideHandle) Release() {
	if h.s.opens.Add(-1) == 0 && h.s.gone.Load() {
		h.s.data.Reset()
	}
}
