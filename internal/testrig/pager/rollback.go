package pager

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"maps"
	"path"
	"slices"
)

const (
	journalMagic  = "\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"
	journalSector = 512
)

// A txn is a rollback-mode transaction on its way.
type txn struct {
	db      *DB
	ch      Change
	old     Version
	v       Version
	seg     int64 // where the present segment's header is
	off     int64 // end of the journal
	n       uint32
	nonce   uint32
	logged  map[int]bool // pages in the journal
	touched bool         // the database was written
}

// Commit does a whole transaction in the database's mode. After an error the
// transaction was rolled back, or hangs as a hot journal if that failed too.
func (db *DB) Commit(ch Change) error {
	if db.Mode == WAL && db.Exists() && ch.PageSize == db.Head().PageSize {
		return db.commitWAL(ch)
	}
	if db.Mode == WAL {
		if err := db.attachIfThere(); err != nil {
			return err
		}
		if err := db.CloseWAL(); err != nil {
			return err
		}
		db.Mode = Delete // VACUUM cannot change the page size in WAL mode, a new database begins in DELETE
		defer func() { db.Mode = WAL }()
	}
	t, err := db.beginRollback(ch)
	if err != nil {
		return err
	}
	defer func() { db.reserved = false }()
	if err = t.phaseOne(""); err == nil {
		if ch.Rollback {
			return t.undo()
		}
		err = db.finishJournal()
	}
	if err != nil {
		db.w.logf("%s: commit failed: %v", db.Name, err)
		return errors.Join(err, t.undo())
	}
	db.accept(true, db.Sync > Off)
	return t.late()
}

// late is what SQLite does after the commit: errors are not its caller's.
func (t *txn) late() error {
	if t.v.size() < t.old.size() && (t.ch.Late || t.ch.PageSize == t.old.PageSize) {
		if err := t.db.truncate(t.db.db, t.v.size()); err != nil {
			t.db.w.logf("%s: late truncate: %v", t.db.Name, err)
		}
	}
	return nil
}

func (v Version) size() int64 { return int64(len(v.Pages)) * int64(v.PageSize) }

func (db *DB) beginRollback(ch Change) (*txn, error) {
	if err := db.openFile(&db.db, "", true); err != nil {
		return nil, err
	}
	if err := db.hot(); err != nil {
		return nil, err
	}
	if !db.Exists() && db.db.Size() > 0 {
		// A copy that broke off: somebody removes it.
		db.db.Close()
		db.db = nil
		if err := db.remove(""); err != nil {
			return nil, err
		}
		if err := db.openFile(&db.db, "", true); err != nil {
			return nil, err
		}
	}
	db.reserved = true
	t := &txn{db: db, ch: ch, old: db.Head(), logged: map[int]bool{}}
	t.v = db.next(ch)
	if err := db.openFile(&db.journal, "-journal", true); err != nil {
		db.reserved = false
		return nil, err
	}
	return t, nil
}

// oldPages returns the numbers of the pages, of the old size, that the
// transaction writes: what happens in a change of the page size is in old pages.
func (t *txn) writes() (size int, list []int) {
	if t.old.Pages != nil && t.ch.PageSize != t.old.PageSize {
		size = t.old.PageSize
		for i := 1; int64(i-1)*int64(size) < t.v.size(); i++ {
			list = append(list, i)
		}
		return size, list
	}
	list = append(slices.Sorted(maps.Keys(t.ch.Pages)), 1)
	slices.Sort(list)
	return t.ch.PageSize, list
}

func (t *txn) header(n uint32) []byte {
	h := make([]byte, journalSector)
	copy(h, journalMagic)
	binary.BigEndian.PutUint32(h[8:], n)
	binary.BigEndian.PutUint32(h[12:], t.nonce)
	binary.BigEndian.PutUint32(h[16:], uint32(len(t.old.Pages)))
	binary.BigEndian.PutUint32(h[20:], journalSector)
	binary.BigEndian.PutUint32(h[24:], uint32(max(t.old.PageSize, t.ch.PageSize*min(1, 1-len(t.old.Pages)))))
	return h
}

// segment begins the journal or a further segment of it.
func (t *txn) segment() error {
	t.nonce = t.db.w.Rand.Uint32()
	t.seg = (t.off + journalSector - 1) / journalSector * journalSector
	n := uint32(0)
	if t.db.Sync == Off {
		n = 0xffffffff
	}
	t.n, t.off = 0, t.seg+journalSector
	return t.db.write(t.db.journal, t.header(n), t.seg)
}

// keep journals an old page before it is written.
func (t *txn) keep(pgno int) error {
	size := t.old.PageSize
	if t.logged[pgno] || pgno > len(t.old.Pages) {
		return nil
	}
	t.logged[pgno] = true
	rec := make([]byte, 4, 8+size)
	binary.BigEndian.PutUint32(rec, uint32(pgno))
	rec = append(rec, make([]byte, size)...)
	t.db.w.step()
	if err := readFull(t.db.db, rec[4:], int64(pgno-1)*int64(size)); err != nil {
		return err
	}
	if err := same(rec[4:], t.old.Pages[pgno-1], "%s page %d before its change", t.db.Name, pgno); err != nil {
		return err
	}
	rec = binary.BigEndian.AppendUint32(rec, uint32(pgno)*2654435761+t.nonce)
	off := t.off
	t.off += int64(len(rec))
	t.n++
	if t.db.w.Rand.IntN(2) == 0 { // SQLite writes number, page and checksum by themselves
		if err := t.db.write(t.db.journal, rec[:4], off); err != nil {
			return err
		}
		if err := t.db.write(t.db.journal, rec[4:4+size], off+4); err != nil {
			return err
		}
		return t.db.write(t.db.journal, rec[4+size:], off+4+int64(size))
	}
	return t.db.write(t.db.journal, rec, off)
}

// syncJournal makes the records so far count.
func (t *txn) syncJournal() error {
	if t.db.Sync == Off {
		return nil
	}
	if t.db.Sync == Full {
		if err := t.db.sync(t.db.journal); err != nil {
			return err
		}
	}
	// Where the next header would be, an older transaction's must not stand.
	var next [8]byte
	at := (t.off + journalSector - 1) / journalSector * journalSector
	if n, err := t.db.journal.ReadAt(next[:], at); err != nil {
		return err
	} else if n == 8 && string(next[:]) == journalMagic {
		if err := t.db.write(t.db.journal, []byte{0}, at); err != nil {
			return err
		}
	}
	b := append([]byte(journalMagic), 0, 0, 0, 0)
	binary.BigEndian.PutUint32(b[8:], t.n)
	if err := t.db.write(t.db.journal, b, t.seg); err != nil {
		return err
	}
	return t.db.sync(t.db.journal)
}

// content is page pgno of the given size in the new version; a page that
// reaches beyond the end is filled with zeros.
func (t *txn) content(size, pgno int) []byte {
	if size == t.v.PageSize {
		return t.v.Pages[pgno-1]
	}
	p := make([]byte, size)
	all := t.v.Bytes()
	copy(p, all[min(len(all), (pgno-1)*size):])
	return p
}

// phaseOne writes journal and database, up to the FSYNC that makes ready for the
// commit. super is the super-journal's path.
func (t *txn) phaseOne(super string) error {
	db := t.db
	size, list := t.writes()
	if err := t.segment(); err != nil {
		return err
	}
	spill := min(t.ch.Spill, len(list))
	if spill > 0 {
		for _, pgno := range list[:spill] {
			if err := t.keep(pgno); err != nil {
				return err
			}
		}
		if err := t.syncJournal(); err != nil {
			return err
		}
		for _, pgno := range list[:spill] {
			p := t.content(size, pgno)
			if db.w.Rand.IntN(2) == 0 {
				p = db.randomPage(size) // changed again before the commit
			}
			t.touched = true
			if err := db.write(db.db, p, int64(pgno-1)*int64(size)); err != nil {
				return err
			}
		}
		if db.Sync != Off {
			if err := t.segment(); err != nil {
				return err
			}
		}
	}
	for _, pgno := range list {
		if err := t.keep(pgno); err != nil {
			return err
		}
	}
	if t.v.size() < t.old.size() { // the pages that go
		for pgno := int(t.v.size()/int64(max(t.old.PageSize, 1))) + 1; pgno <= len(t.old.Pages); pgno++ {
			if err := t.keep(pgno); err != nil {
				return err
			}
		}
	}
	if super != "" {
		if err := t.writeSuper(super); err != nil {
			return err
		}
	}
	if err := t.syncJournal(); err != nil {
		return err
	}
	for _, pgno := range list {
		t.touched = true
		if err := db.write(db.db, t.content(size, pgno), int64(pgno-1)*int64(size)); err != nil {
			return err
		}
	}
	last := list[len(list)-1]
	switch {
	case size == t.v.PageSize && last < t.ch.Count && t.v.size() > t.old.size():
		if err := db.truncate(db.db, t.v.size()); err != nil {
			return err
		}
	case size != t.v.PageSize && !t.ch.Late && t.v.size() != int64(last)*int64(size) || size != t.v.PageSize && t.v.size() < t.old.size() && !t.ch.Late:
		if err := db.truncate(db.db, t.v.size()); err != nil {
			return err
		}
	}
	db.begin(t.v)
	if db.Sync != Off {
		return db.sync(db.db)
	}
	return nil
}

// writeSuper appends the name of the super-journal to the journal.
func (t *txn) writeSuper(super string) error {
	var sum uint32
	for _, c := range []byte(super) {
		sum += uint32(int32(int8(c)))
	}
	b := binary.BigEndian.AppendUint32(nil, 0x40000000/uint32(max(t.old.PageSize, 512))+1)
	b = append(b, super...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(super)))
	b = binary.BigEndian.AppendUint32(b, sum)
	b = append(b, journalMagic...)
	if t.db.Sync == Full {
		t.off = (t.off + journalSector - 1) / journalSector * journalSector
	}
	off := t.off
	t.off += int64(len(b))
	if err := t.db.write(t.db.journal, b, off); err != nil {
		return err
	}
	if t.db.journal.Size() > t.off {
		return t.db.truncate(t.db.journal, t.off) // PERSIST: what an older one left
	}
	return nil
}

// finishJournal ends the journal in the way of the mode: the commit.
func (db *DB) finishJournal() error {
	switch db.Mode {
	case Truncate:
		return db.truncate(db.journal, 0)
	case Persist:
		if super, err := db.superOf(); super != "" || err != nil {
			return errors.Join(err, db.truncate(db.journal, 0))
		}
		if err := db.write(db.journal, make([]byte, 28), 0); err != nil {
			return err
		}
		if db.Sync == Full {
			// The commit has happened: SQLite reports this error, but the data is there.
			_ = db.sync(db.journal)
		}
		return nil
	}
	return db.removeJournal()
}

func (db *DB) removeJournal() error {
	if db.journal != nil {
		db.w.step()
		db.journal.Close()
		db.journal = nil
	}
	db.w.step()
	err := db.w.FS.Remove(db.Name + "-journal")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		// As SQLite, which has the journal open until it is gone.
		if f, oerr := db.w.FS.Open(db.Name+"-journal", false); oerr == nil {
			db.journal = f
		}
		return err
	}
	return nil
}

// undo rolls the transaction back by playback.
func (t *txn) undo() error {
	db := t.db
	if err := db.playback(); err != nil {
		db.w.logf("%s: rollback failed: %v", db.Name, err)
		return err
	}
	db.void(true)
	return nil
}

// hot looks for a journal that a killed program left, and plays it back.
func (db *DB) hot() error {
	if db.journal == nil {
		if !db.w.FS.Exists(db.Name + "-journal") {
			db.decide(true)
			return nil
		}
		if err := db.openFile(&db.journal, "-journal", false); err != nil {
			return err
		}
	}
	var b [1]byte
	if n, err := db.journal.ReadAt(b[:], 0); err != nil {
		return err
	} else if n == 0 || b[0] == 0 {
		db.decide(true)
		return nil
	}
	db.w.step()
	db.reserved = true
	defer func() { db.reserved = false }()
	super, err := db.superOf()
	if err != nil {
		return err
	}
	if super != "" && !db.w.FS.Exists(super) {
		db.decide(true) // the super-journal is gone: committed
		return db.removeJournal()
	}
	if db.db.Size() == 0 {
		// Nothing was there: SQLite deletes the journal without playback.
		db.decide(false)
		return db.removeJournal()
	}
	if err := db.playback(); err != nil {
		return err
	}
	db.decide(false)
	return nil
}

// decide says what became of the version that a killed program left.
func (db *DB) decide(committed bool) {
	if !db.maybe || db.inWAL {
		return
	}
	db.w.logf("%s: what was in flight is found committed=%v undone=%v", db.Name, committed, db.undone)
	if committed && !db.undone {
		db.accept(false, false)
		return
	}
	db.void(true)
}

func (db *DB) superOf() (string, error) {
	size := db.journal.Size()
	var tail [16]byte
	if size < 16 {
		return "", nil
	}
	if err := readFull(db.journal, tail[:], size-16); err != nil {
		return "", err
	}
	n := int64(binary.BigEndian.Uint32(tail[:]))
	if string(tail[8:]) != journalMagic || n == 0 || n > size-16 {
		return "", nil
	}
	name := make([]byte, n)
	if err := readFull(db.journal, name, size-16-n); err != nil {
		return "", err
	}
	return path.Clean(string(name)), nil
}

// playback restores the database from the journal and ends that.
func (db *DB) playback() error {
	j := db.journal
	if j == nil {
		return nil
	}
	old := -1
	size := j.Size()
	for off := int64(0); off+journalSector <= size; {
		var h [28]byte
		if err := readFull(j, h[:], off); err != nil {
			return err
		}
		if string(h[:8]) != journalMagic {
			break
		}
		n := int64(binary.BigEndian.Uint32(h[8:]))
		ps := int64(binary.BigEndian.Uint32(h[24:]))
		if old < 0 {
			old = int(binary.BigEndian.Uint32(h[16:]))
			db.w.step()
			if int64(old)*ps != db.db.Size() {
				if err := db.truncate(db.db, int64(old)*ps); err != nil {
					return err
				}
			}
		}
		off += journalSector
		all := n == 0xffffffff || n == 0 // 0: the own journal, not synced yet
		for i := int64(0); (all || i < n) && off+8+ps <= size; i++ {
			rec := make([]byte, 8+ps)
			if err := readFull(j, rec, off); err != nil {
				return err
			}
			pgno := binary.BigEndian.Uint32(rec)
			if pgno == 0 || binary.BigEndian.Uint32(rec[4+ps:]) != pgno*2654435761+binary.BigEndian.Uint32(h[12:]) {
				off = size // what an older transaction left
				break
			}
			if int(pgno) <= old {
				if err := db.write(db.db, rec[4:4+ps], int64(pgno-1)*ps); err != nil {
					return err
				}
			}
			off += 8 + ps
		}
		off = (off + journalSector - 1) / journalSector * journalSector
	}
	if old >= 0 && db.Sync != Off {
		if err := db.sync(db.db); err != nil {
			return err
		}
	}
	db.undone = true // whoever finds no journal finds the old content
	if db.Mode == WAL {
		return db.removeJournal()
	}
	return db.finishJournal()
}

// Group commits one transaction over several databases in rollback modes.
func (w *World) Group(dbs []*DB, changes []Change) error {
	w.groups++
	w.supers++
	super := dbs[0].Name + "-mj" + superSuffix(w.supers)
	txns := make([]*txn, 0, len(dbs))
	var superFile File
	fail := func(err error) error {
		w.logf("group %s failed: %v", super, err)
		errs := []error{err}
		// SQLite removes the super-journal when no journal names it any more.
		left := false
		for _, t := range txns {
			uerr := t.undo()
			left = left || uerr != nil
			errs = append(errs, uerr)
			t.db.reserved = false
		}
		if superFile != nil {
			superFile.Close()
		}
		if superFile != nil && !left {
			w.step()
			errs = append(errs, w.FS.Remove(super))
		}
		return errors.Join(errs...)
	}
	for i, db := range dbs {
		t, err := db.beginRollback(changes[i])
		if err != nil {
			return fail(err)
		}
		txns = append(txns, t)
	}
	w.step()
	f, err := w.FS.Open(super, true)
	if err != nil {
		return fail(err)
	}
	superFile = f
	var names []byte
	for _, db := range dbs {
		names = append(append(names, db.Name...), "-journal\x00"...)
	}
	w.step()
	if _, err := f.WriteAt(names, 0); err != nil {
		return fail(err)
	}
	w.step()
	if err := f.Sync(); err != nil {
		return fail(err)
	}
	for _, t := range txns {
		t.v.Group = w.groups
		if err := t.phaseOne(super); err != nil {
			return fail(err)
		}
	}
	w.step()
	f.Close()
	superFile = nil
	if err := w.FS.Remove(super); err != nil {
		if g, oerr := w.FS.Open(super, false); oerr == nil {
			superFile = g
		}
		return fail(err)
	}
	for _, t := range txns {
		t.db.accept(true, true)
	}
	for _, t := range txns {
		if err := t.db.finishJournal(); err != nil {
			w.logf("%s: journal of a group: %v", t.db.Name, err)
		}
		_ = t.late()
		t.db.reserved = false
	}
	return nil
}

func superSuffix(n int) string {
	const hex = "0123456789ABCDEF"
	b := []byte("0000009AB")
	for i := 5; i >= 0; i-- {
		b[i] = hex[n&15]
		n >>= 4
	}
	return string(b)
}
