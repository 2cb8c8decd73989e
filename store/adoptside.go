package store

import (
	"errors"
	"fmt"

	"github.com/litefs-agent/litefs-agent/internal/sqlitefile"
)

// A journal, WAL or wal-index that came before its database (tar knows no order),
// or by a rename, is an ordinary file. When the database is copied in, or at the
// next opening, it becomes what its name says: else SQLite would commit into a
// file that the engine does not look at.

// adoptSides does so for all files beside the database name.
func (st *Store) adoptSides(name string) error {
	var errs []error
	for _, suffix := range []string{"-journal", "-wal", "-shm"} {
		errs = append(errs, st.adoptSide(name+suffix))
	}
	return errors.Join(errs...)
}

// adoptSide makes the ordinary file at p a side file, if p is the name of one of
// a database's. ErrBusy: somebody still writes it.
func (st *Store) adoptSide(p string) error {
	base, kind, ok := sideName(p)
	if !ok {
		return nil
	}
	st.sidesMu.Lock()
	defer st.sidesMu.Unlock()
	st.nsMu.RLock()
	owner, there := st.files[base], st.sides[p]
	st.nsMu.RUnlock()
	if owner == nil || there != nil || owner.gone.Load() || !st.opt.Writable(base) || !owner.hasHeader() {
		return nil
	}
	n, err := st.lookupDisk(p)
	if errors.Is(err, ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	f, ok := n.(*file)
	if !ok || f.isDB.Load() {
		return nil
	}
	f.mu.Lock()
	written := f.writers > 0
	f.mu.Unlock()
	if written {
		return fmt.Errorf("%s: was there before its database and is still written: %w", p, ErrBusy)
	}
	if err := st.moveToSide(f, p, base, owner, kind); err != nil {
		return fmt.Errorf("%s: take over what was there before its database: %w", p, err)
	}
	return nil
}

// hasHeader reports whether f is a database or begins like one: a program that
// was killed leaves a hot journal beside a file that is none yet.
func (f *file) hasHeader() bool {
	if f.isDB.Load() {
		return true
	}
	h, err := f.openOrdinary(false)
	if err != nil {
		return false
	}
	defer h.Release()
	var b [len(sqlitefile.DatabaseMagic)]byte
	n, err := h.ReadAt(b[:], 0)
	return err == nil && string(b[:n]) == sqlitefile.DatabaseMagic
}

// moveToSide copies f to a new side file, which replaces it. While it copies, the
// name still shows f.
func (st *Store) moveToSide(f *file, p, base string, owner *file, kind Kind) error {
	from, err := f.openOrdinary(false)
	if err != nil {
		return err
	}
	defer from.Release()
	n, to, err := st.createSide(p, base, owner, kind, f.mode.Load())
	if err != nil {
		return err
	}
	defer to.Release()
	buf := make([]byte, 64<<10)
	for off := int64(0); ; {
		n, err := from.ReadAt(buf, off)
		if n > 0 && err == nil {
			_, err = to.WriteAt(buf[:n], off)
		}
		if err != nil {
			return errors.Join(err, st.unlinkSide(p, to.(*sideHandle).s))
		}
		if n == 0 {
			break
		}
		off += int64(n)
	}
	n.(*sideFile).mtime.Store(f.mtime.Load())
	f.moved.Store(true)
	if err := st.unlinkFile(p, f); err != nil {
		st.log.Warn("file is left behind", "db", base, "err", err)
	}
	st.later(func(peer Peer) { peer.InvalidateEntry(p) })
	return nil
}
