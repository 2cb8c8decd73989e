package pager

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"maps"
	"slices"
)

const (
	walHeaderSize   = 32
	frameHeaderSize = 24
)

// A walIndex is what programs share in the "-shm" file: its header is really
// there, the rest is kept here.
type walIndex struct {
	attached bool // a living program has it
	torn     bool // the copies of its header differ: whoever looks recovers it from the WAL
	change   uint32
	mx       int // last published frame
	pages    int
	salt     [8]byte
	sum      [2]uint32 // behind frame mx
	frames   []int     // page of frame i+1
	backfill int
	version  map[int]int // Cur when frame n was published
	readers  map[int]int // mark of each reader
	header   bool        // the WAL's header with this salt was written
	ckpt     uint32
}

func walSum(s [2]uint32, p []byte) [2]uint32 {
	for ; len(p) >= 8; p = p[8:] {
		s[0] += binary.BigEndian.Uint32(p) + s[1]
		s[1] += binary.BigEndian.Uint32(p[4:]) + s[0]
	}
	return s
}

func (db *DB) frameOff(n, size int) int64 {
	return walHeaderSize + int64(n-1)*int64(frameHeaderSize+size)
}

// attach opens the WAL and the wal-index; the first program recovers it.
func (db *DB) attach() error {
	if err := db.openFile(&db.db, "", false); err != nil {
		return err
	}
	if err := db.hot(); err != nil {
		return err
	}
	if err := db.openFile(&db.wal, "-wal", true); err != nil {
		return err
	}
	if !db.Exclusive {
		if err := db.openFile(&db.shm, "-shm", true); err != nil {
			return err
		}
	}
	if db.index == nil || !db.index.attached || db.index.torn {
		return db.recoverWAL()
	}
	return nil
}

// recoverWAL builds the wal-index from what is in the WAL.
func (db *DB) recoverWAL() error {
	x := &walIndex{attached: true, readers: map[int]int{}, version: map[int]int{}, pages: len(db.Head().Pages)}
	if db.index != nil {
		x.change = db.index.change
	}
	db.index = x
	ps := db.Head().PageSize
	var h [walHeaderSize]byte
	n, err := db.wal.ReadAt(h[:], 0)
	if err != nil {
		return err
	}
	committed := 0
	if n == walHeaderSize && binary.BigEndian.Uint32(h[:]) == 0x377f0683 && int(binary.BigEndian.Uint32(h[8:])) == ps {
		copy(x.salt[:], h[16:24])
		sum := walSum([2]uint32{}, h[:24])
		x.header = sum == [2]uint32{binary.BigEndian.Uint32(h[24:]), binary.BigEndian.Uint32(h[28:])}
		x.sum = sum
		var frames []int
		buf := make([]byte, frameHeaderSize+ps)
		for k := 1; x.header && db.frameOff(k+1, ps) <= db.wal.Size(); k++ {
			if err := readFull(db.wal, buf, db.frameOff(k, ps)); err != nil {
				return err
			}
			sum = walSum(walSum(sum, buf[:8]), buf[frameHeaderSize:])
			if string(buf[8:16]) != string(x.salt[:]) || sum != [2]uint32{binary.BigEndian.Uint32(buf[16:]), binary.BigEndian.Uint32(buf[20:])} {
				break
			}
			frames = append(frames, int(binary.BigEndian.Uint32(buf)))
			if c := binary.BigEndian.Uint32(buf[4:]); c != 0 {
				committed, x.pages, x.sum = k, int(c), sum
				x.frames = slices.Clone(frames)
			}
		}
	}
	x.mx = committed
	// What a killed writer left is committed if its last frame is.
	if db.maybe {
		db.decideWAL()
	}
	return db.publish()
}

// decideWAL finds out whether the version in flight is in the recovered WAL.
func (db *DB) decideWAL() {
	x, v := db.index, db.Versions[db.last()]
	if x.mx > 0 && x.pages == len(v.Pages) {
		p := make([]byte, v.PageSize)
		if db.readPage(1, x.mx, p) == nil && string(p) == string(v.Pages[0]) {
			db.accept(false, false)
			return
		}
	}
	db.void(false)
}

// publish writes the header of the wal-index: second copy, then first.
func (db *DB) publish() error {
	if db.shm == nil {
		return nil
	}
	x := db.index
	x.change++
	b := make([]byte, 48)
	o := binary.NativeEndian
	o.PutUint32(b, 3007000)
	o.PutUint32(b[8:], x.change)
	b[12], b[13] = 1, 1
	ps := db.Head().PageSize
	o.PutUint16(b[14:], uint16(ps&0xff00|ps>>16))
	o.PutUint32(b[16:], uint32(x.mx))
	o.PutUint32(b[20:], uint32(x.pages))
	o.PutUint32(b[24:], x.sum[0])
	o.PutUint32(b[28:], x.sum[1])
	copy(b[32:40], x.salt[:])
	var s [2]uint32
	for q := b[:40]; len(q) >= 8; q = q[8:] {
		s[0] += o.Uint32(q) + s[1]
		s[1] += o.Uint32(q[4:]) + s[0]
	}
	o.PutUint32(b[40:], s[0])
	o.PutUint32(b[44:], s[1])
	// A program writes into its mapping: no call, no error, but it may die between.
	_, err := db.shm.WriteAt(b, 48)
	x.torn = true
	db.w.step()
	x.torn = false
	if err == nil {
		_, err = db.shm.WriteAt(b, 0)
	}
	return err
}

// commitWAL is one write transaction in WAL mode.
func (db *DB) commitWAL(ch Change) error {
	if err := db.attach(); err != nil {
		return err
	}
	x, r := db.index, db.w.Rand
	db.walLock = true
	defer func() { db.walLock = false }()
	if db.maybe {
		db.void(false) // a killed writer's frames were not published: they are overwritten
	}
	if x.mx > 0 && x.backfill == x.mx && len(x.readers) == 0 {
		db.restart()
	}
	v := db.next(ch)
	for pgno := len(db.Head().Pages) + 1; pgno <= ch.Count; pgno++ {
		if _, ok := ch.Pages[pgno]; ok || pgno == 1 {
			continue
		}
		// A new page that is not written is what the file holds there.
		if end := int64(pgno) * int64(v.PageSize); db.db.Size() < end || slices.Contains(x.frames, pgno) {
			ch.Pages[pgno] = v.Pages[pgno-1]
		} else if err := readFull(db.db, v.Pages[pgno-1], end-int64(v.PageSize)); err != nil {
			return err
		}
	}
	list := append(slices.Sorted(maps.Keys(ch.Pages)), 1)
	slices.Sort(list)
	if !x.header || x.mx == 0 {
		if err := db.writeWALHeader(); err != nil {
			return err
		}
	}
	frames, sum := slices.Clone(x.frames), x.sum
	spilled := map[int]int{} // frame of a page written before the commit
	for _, pgno := range list[:min(ch.Spill, len(list)-1)] {
		frames = append(frames, pgno)
		spilled[pgno] = len(frames)
		p := v.Pages[pgno-1]
		if r.IntN(2) == 0 {
			p = db.randomPage(v.PageSize)
		}
		var err error
		if sum, err = db.writeFrame(len(frames), pgno, 0, p, sum); err != nil {
			return err
		}
	}
	if ch.Rollback {
		return nil // the frames stay, unpublished
	}
	first := 0 // first frame whose checksum must be computed again (iReCksum)
	for _, pgno := range slices.Clone(list) {
		if n := spilled[pgno]; n > 0 {
			if err := db.write(db.wal, v.Pages[pgno-1], db.frameOff(n, v.PageSize)+frameHeaderSize); err != nil {
				return err
			}
			if first == 0 || n < first {
				first = n
			}
		}
	}
	list = slices.DeleteFunc(list, func(pgno int) bool { return spilled[pgno] > 0 })
	if r.IntN(2) == 0 { // the commit frame is not always that of the highest page
		slices.Reverse(list)
	}
	db.begin(v)
	db.inWAL = true
	for i, pgno := range list {
		frames = append(frames, pgno)
		commit := 0
		if i == len(list)-1 {
			commit = ch.Count
		}
		var err error
		if commit != 0 && first > 0 {
			// Its page first, then all headers again in order.
			if err = db.write(db.wal, v.Pages[pgno-1], db.frameOff(len(frames), v.PageSize)+frameHeaderSize); err == nil {
				sum, err = db.rewriteSums(first, len(frames), ch.Count, frames, v.PageSize)
			}
		} else {
			sum, err = db.writeFrame(len(frames), pgno, commit, v.Pages[pgno-1], sum)
		}
		if err != nil {
			return db.failWAL(err)
		}
	}
	if db.Sync == Full {
		if r.IntN(3) == 0 { // psow=0: the commit frame again up to the end of the sector
			pgno := frames[len(frames)-1]
			for range 1 + r.IntN(3) {
				frames = append(frames, pgno)
				var err error
				if sum, err = db.writeFrame(len(frames), pgno, ch.Count, v.Pages[pgno-1], sum); err != nil {
					return db.failWAL(err)
				}
			}
		}
		if err := db.sync(db.wal); err != nil {
			return db.failWAL(err)
		}
	}
	db.w.step()
	x.frames, x.sum, x.mx, x.pages = frames, sum, len(frames), ch.Count
	if err := db.publish(); err != nil {
		return err
	}
	db.accept(true, db.Sync == Full)
	x.version[x.mx] = db.Cur
	return nil
}

// failWAL is a commit that got an error: not published.
func (db *DB) failWAL(err error) error {
	db.w.logf("%s: wal commit failed: %v", db.Name, err)
	db.void(false)
	return err
}

func (db *DB) restart() {
	x := db.index
	x.mx, x.backfill, x.frames, x.header = 0, 0, nil, false
	clear(x.version)
	binary.BigEndian.PutUint32(x.salt[:], binary.BigEndian.Uint32(x.salt[:])+1)
	binary.BigEndian.PutUint32(x.salt[4:], db.w.Rand.Uint32())
	_ = db.publish()
}

func (db *DB) writeWALHeader() error {
	x := db.index
	if x.salt == [8]byte{} {
		binary.BigEndian.PutUint32(x.salt[:], db.w.Rand.Uint32())
		binary.BigEndian.PutUint32(x.salt[4:], db.w.Rand.Uint32())
	}
	var h [walHeaderSize]byte
	binary.BigEndian.PutUint32(h[:], 0x377f0683)
	binary.BigEndian.PutUint32(h[4:], 3007000)
	binary.BigEndian.PutUint32(h[8:], uint32(db.Head().PageSize))
	binary.BigEndian.PutUint32(h[12:], x.ckpt)
	copy(h[16:], x.salt[:])
	sum := walSum([2]uint32{}, h[:24])
	binary.BigEndian.PutUint32(h[24:], sum[0])
	binary.BigEndian.PutUint32(h[28:], sum[1])
	if err := db.write(db.wal, h[:], 0); err != nil {
		return err
	}
	x.header, x.sum = true, sum
	if db.Sync == Full {
		return db.sync(db.wal)
	}
	return nil
}

func (db *DB) frameHeader(pgno, commit int, data []byte, sum [2]uint32) ([]byte, [2]uint32) {
	h := make([]byte, frameHeaderSize)
	binary.BigEndian.PutUint32(h, uint32(pgno))
	binary.BigEndian.PutUint32(h[4:], uint32(commit))
	copy(h[8:], db.index.salt[:])
	sum = walSum(walSum(sum, h[:8]), data)
	binary.BigEndian.PutUint32(h[16:], sum[0])
	binary.BigEndian.PutUint32(h[20:], sum[1])
	return h, sum
}

// writeFrame writes header and page, sometimes the page in two pieces, as at the
// end of a sector that is synced.
func (db *DB) writeFrame(n, pgno, commit int, data []byte, sum [2]uint32) ([2]uint32, error) {
	h, sum := db.frameHeader(pgno, commit, data, sum)
	off := db.frameOff(n, len(data))
	if err := db.write(db.wal, h, off); err != nil {
		return sum, err
	}
	if db.w.Rand.IntN(4) == 0 {
		k := db.w.Rand.IntN(len(data)-1) + 1
		if err := db.write(db.wal, data[:k], off+frameHeaderSize); err != nil {
			return sum, err
		}
		return sum, db.write(db.wal, data[k:], off+frameHeaderSize+int64(k))
	}
	return sum, db.write(db.wal, data, off+frameHeaderSize)
}

// rewriteSums writes the headers of frames [first, last] again. Source: wal.c,
// walRewriteChecksums.
func (db *DB) rewriteSums(first, last, commit int, frames []int, ps int) (sum [2]uint32, err error) {
	if first == 1 {
		var h [walHeaderSize]byte
		err = readFull(db.wal, h[:], 0)
		sum = [2]uint32{binary.BigEndian.Uint32(h[24:]), binary.BigEndian.Uint32(h[28:])}
	} else {
		var h [frameHeaderSize]byte
		err = readFull(db.wal, h[:], db.frameOff(first-1, ps))
		sum = [2]uint32{binary.BigEndian.Uint32(h[16:]), binary.BigEndian.Uint32(h[20:])}
	}
	data := make([]byte, ps)
	for n := first; n <= last && err == nil; n++ {
		if err = readFull(db.wal, data, db.frameOff(n, ps)+frameHeaderSize); err != nil {
			break
		}
		c := 0
		if n == last {
			c = commit
		}
		var h []byte
		h, sum = db.frameHeader(frames[n-1], c, data, sum)
		err = db.write(db.wal, h, db.frameOff(n, ps))
	}
	return sum, err
}

// readPage reads a page as of frame mark.
func (db *DB) readPage(pgno, mark int, p []byte) error {
	if x := db.index; x != nil && db.Mode == WAL {
		for n := min(mark, len(x.frames)); n > 0; n-- {
			if x.frames[n-1] == pgno {
				return readFull(db.wal, p, db.frameOff(n, len(p))+frameHeaderSize)
			}
		}
	}
	n, err := db.db.ReadAt(p, int64(pgno-1)*int64(len(p)))
	clear(p[n:])
	return err
}

// Check reads the whole database as a program does and compares it with what was
// committed.
func (db *DB) Check() error {
	v := db.Head()
	if v.Pages == nil {
		return nil
	}
	if db.Mode == WAL {
		if err := db.attach(); err != nil {
			return err
		}
		if err := db.checkAt(db.index.mx, db.Head()); err != nil {
			return err
		}
		for _, id := range slices.Sorted(maps.Keys(db.index.readers)) {
			mark := db.index.readers[id]
			if at, ok := db.index.version[mark]; ok {
				if err := db.checkAt(mark, db.Versions[at]); err != nil {
					return err
				}
			}
		}
		return nil
	}
	if err := db.openFile(&db.db, "", false); err != nil {
		return err
	}
	if err := db.hot(); err != nil {
		return err
	}
	return db.checkAt(0, db.Head())
}

func (db *DB) checkAt(mark int, v Version) error {
	p := make([]byte, v.PageSize)
	for i, want := range v.Pages {
		if err := db.readPage(i+1, mark, p); err != nil {
			return err
		}
		if err := same(p, want, "%s (%s) page %d of %d at frame %d", db.Name, db.Mode, i+1, len(v.Pages), mark); err != nil {
			return err
		}
	}
	if db.Mode != WAL && db.db.Size() < v.size() {
		return same(nil, make([]byte, v.size()), "%s size %d", db.Name, db.db.Size())
	}
	return nil
}

// StartReader begins a read transaction at the present frame, EndReader ends it.
func (db *DB) StartReader(id int) {
	if x := db.index; db.Mode == WAL && x != nil && x.attached && x.mx > 0 {
		x.readers[id] = x.mx
	}
}

// EndReader ends what StartReader began.
func (db *DB) EndReader(id int) {
	if db.index != nil {
		delete(db.index.readers, id)
	}
}

// Checkpoint is a passive one, or with truncate one that ends with an empty WAL
// where no reader is in the way.
func (db *DB) Checkpoint(truncate bool) error {
	if db.Mode != WAL || !db.Exists() {
		return nil
	}
	if err := db.attach(); err != nil {
		return err
	}
	x, ps := db.index, db.Head().PageSize
	safe := x.mx
	for _, mark := range x.readers {
		safe = min(safe, mark)
	}
	if safe > x.backfill {
		if err := db.backfill(safe, ps); err != nil {
			return err
		}
	}
	if truncate && x.mx > 0 && x.backfill == x.mx && len(x.readers) == 0 {
		if db.maybe {
			db.void(false)
		}
		db.walLock = true
		defer func() { db.walLock = false }()
		db.restart()
		db.w.step()
		db.reserved = true // TRUNCATE holds all the read locks; the engine asks for the database's
		defer func() { db.reserved = false }()
		return db.truncate(db.wal, 0)
	}
	return nil
}

// backfill brings the frames up to safe to the database.
func (db *DB) backfill(safe, ps int) error {
	x := db.index
	if db.Sync != Off {
		if err := db.sync(db.wal); err != nil {
			return err
		}
	}
	newest := map[int]int{}
	for n := x.backfill + 1; n <= safe; n++ {
		newest[x.frames[n-1]] = n
	}
	if db.w.Rand.IntN(3) == 0 { // SIZE_HINT
		if size := int64(x.pages) * int64(ps); db.db.Size() < size {
			if err := db.truncate(db.db, size); err != nil {
				return err
			}
		}
	}
	p := make([]byte, ps)
	for _, pgno := range slices.Sorted(maps.Keys(newest)) {
		if pgno > x.pages {
			continue
		}
		if err := readFull(db.wal, p, db.frameOff(newest[pgno], ps)+frameHeaderSize); err != nil {
			return err
		}
		if err := db.write(db.db, p, int64(pgno-1)*int64(ps)); err != nil {
			return err
		}
	}
	if safe == x.mx {
		if err := db.truncate(db.db, int64(x.pages)*int64(ps)); err != nil {
			return err
		}
		if db.Sync != Off {
			if err := db.sync(db.db); err != nil {
				return err
			}
		}
	}
	x.backfill = safe
	return nil
}

// CloseWAL is the close of the last connection: a checkpoint, and the WAL goes.
func (db *DB) CloseWAL() error {
	if db.Mode != WAL || db.wal == nil || db.index == nil {
		return nil
	}
	clear(db.index.readers)
	if err := db.Checkpoint(false); err != nil {
		return err
	}
	if db.maybe {
		db.void(false)
	}
	db.reserved = true // EXCLUSIVE
	defer func() { db.reserved = false }()
	db.w.step()
	db.wal.Close()
	db.wal = nil
	if err := db.remove("-wal"); err != nil {
		return err
	}
	db.index = nil
	if db.shm != nil {
		db.shm.Close()
		db.shm = nil
		return db.remove("-shm")
	}
	return nil
}

func (db *DB) remove(suffix string) error {
	db.w.step()
	if err := db.w.FS.Remove(db.Name + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// SetMode is PRAGMA journal_mode: a transaction that changes page 1 where it
// goes from or to WAL.
func (db *DB) SetMode(m Mode) error {
	if m == db.Mode {
		return nil
	}
	if db.Mode == WAL {
		if err := db.attachIfThere(); err != nil {
			return err
		}
		if err := db.CloseWAL(); err != nil {
			return err
		}
		db.Mode = m
		return db.touch()
	}
	if db.w.FS.Exists(db.Name) {
		if err := db.openFile(&db.db, "", false); err != nil {
			return err
		}
		if err := db.hot(); err != nil {
			return err
		}
	}
	if db.journal != nil || db.w.FS.Exists(db.Name+"-journal") {
		if err := db.openFile(&db.journal, "-journal", false); err != nil {
			return err
		}
		db.reserved = true // SQLite takes RESERVED or more to delete it
		err := db.removeJournal()
		db.reserved = false
		if err != nil {
			return err
		}
	}
	if m != WAL || !db.Exists() {
		db.Mode = m
		return nil
	}
	// The header is written by a rollback transaction, in DELETE mode.
	db.Mode = Delete
	head := db.Head()
	t, err := db.beginRollback(Change{PageSize: head.PageSize, Count: len(head.Pages), Pages: map[int][]byte{}})
	if err != nil {
		return err
	}
	defer func() { db.reserved = false }()
	t.v.Pages[0][18], t.v.Pages[0][19] = 2, 2
	if err = t.phaseOne(""); err == nil {
		err = db.finishJournal()
	}
	if err != nil {
		return errors.Join(err, t.undo())
	}
	db.accept(true, db.Sync > Off)
	db.Mode = WAL
	return nil
}

func (db *DB) attachIfThere() error {
	if !db.Exists() {
		return nil
	}
	return db.attach()
}

// touch is a transaction that changes page 1 alone.
func (db *DB) touch() error {
	head := db.Head()
	if head.Pages == nil {
		return nil
	}
	return db.Commit(Change{PageSize: head.PageSize, Count: len(head.Pages), Pages: map[int][]byte{}})
}

// Drop is rm of the database, when no program has it open.
func (db *DB) Drop() error {
	if db.Mode == WAL && db.Exists() {
		if err := db.attach(); err != nil {
			return err
		}
		if err := db.CloseWAL(); err != nil {
			return err
		}
	}
	db.w.step()
	db.closeAll()
	db.index = nil
	if db.w.FS.Exists(db.Name + "-journal") {
		if err := db.openFile(&db.db, "", false); err != nil {
			return err
		}
		if err := db.hot(); err != nil {
			return err
		}
		db.closeAll()
	}
	db.w.step()
	db.begin(Version{})
	if err := db.w.FS.Remove(db.Name); err != nil {
		db.void(false)
		return err
	}
	db.accept(true, false)
	return nil
}

// ErrUncopied: a whole database was copied, and stays a file.
var ErrUncopied = errors.New("a whole database was copied and stays a file")

// Copy is cp of a database file to a name where there is none.
func (db *DB) Copy(maxPages int) error {
	mode := db.Mode
	db.Mode = Delete
	defer func() { db.Mode = mode }()
	v := db.next(db.RandomVacuum(maxPages))
	if db.Exists() || db.w.FS.Exists(db.Name+"-journal") {
		return nil
	}
	db.closeAll()
	db.w.step()
	f, err := db.w.FS.Open(db.Name, true)
	if err != nil {
		return err
	}
	defer func() {
		if f != nil {
			f.Close()
		}
	}()
	if err := f.Truncate(0); err != nil { // of a copy that broke off
		return err
	}
	all := v.Bytes()
	for off := 0; off < len(all); off += 4096 {
		if err := db.write(f, all[off:min(off+4096, len(all))], int64(off)); err != nil {
			return err
		}
	}
	db.begin(v)
	f.Close()
	f = nil
	if !db.w.FS.IsDatabase(db.Name) { // a look-up waits for it
		db.w.alive()
		db.void(false)
		return ErrUncopied
	}
	db.accept(true, true)
	return nil
}
