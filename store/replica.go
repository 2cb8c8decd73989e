package store

// A database that is in WAL mode and only read here always has a WAL and a
// wal-index: without them SQLite cannot even SELECT. The WAL is empty and opens
// for reading alone, so that SQLite refuses writes before it begins; the
// wal-index opens for writing, since readers keep their locks in it.

// databaseMode returns the permission bits of a database at this mount.
func (st *Store) databaseMode(name string) uint32 {
	if st.opt.Writable(name) {
		return st.opt.FileMode
	}
	return st.opt.FileMode & 0o444
}

// replicaSide returns the WAL or wal-index of a replica in WAL mode, nil where
// there is none.
func (st *Store) replicaSide(p, base string, f *file) Node {
	db := f.db.Load()
	_, kind, _ := sideName(p)
	if db == nil || kind == KindJournal || st.opt.Writable(base) {
		return nil
	}
	db.mu.Lock()
	wal := db.exists && db.walHeader()
	db.mu.Unlock()
	if !wal {
		return nil
	}
	st.nsMu.Lock()
	defer st.nsMu.Unlock()
	if s := st.sides[p]; s != nil {
		return s
	}
	mode := st.databaseMode(base)
	if kind == KindShm {
		mode = st.opt.FileMode
	}
	s := st.newSide(p, f, kind, mode)
	s.replica = true
	st.sides[p] = s
	f.mu.Lock()
	f.sides++
	if kind == KindShm {
		f.shm = s
	}
	f.mu.Unlock()
	return s
}

// dropReplicaSides takes the WAL and wal-index away when a record switched the
// database to a rollback mode, unless somebody has them open. db.mu is held.
func (st *Store) dropReplicaSides(db *DB) {
	if st.opt.Writable(db.name) || db.exists && db.walHeader() {
		return
	}
	f := db.file
	for _, suffix := range []string{"-wal", "-shm"} {
		p := db.name + suffix
		st.nsMu.Lock()
		s := st.sides[p]
		if s == nil || s.opens.Load() > 0 {
			st.nsMu.Unlock()
			continue
		}
		delete(st.sides, p)
		st.nsMu.Unlock()
		s.gone.Store(true)
		f.mu.Lock()
		f.sides--
		if f.shm == s {
			f.shm = nil
		}
		f.mu.Unlock()
		st.later(func(peer Peer) { peer.InvalidateEntry(p) })
	}
}
