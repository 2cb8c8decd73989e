package store

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// What a crash left on a disk is read here by what the documents say of the
// formats, not by the engine's own recovery, and before that runs.

// An imageSegment is a file of the log.
type imageSegment struct {
	name                     string
	data                     []byte
	seq, salt, first, oldest uint64
	formerSeq, formerCRC     uint64
	formerEnd                int64
}

func parseImageSegment(name string, data []byte) (s imageSegment, ok bool) {
	le := binary.LittleEndian
	for _, at := range []int{0, 2048} { // two copies, the newer one counts
		if len(data) < imagePage {
			return s, false
		}
		p := data[at : at+80]
		if le.Uint64(p) != 0x474f4c2d41465401 || le.Uint64(p[72:]) != ltx.CRC64(0, p[:72]) {
			continue
		}
		c := imageSegment{
			name: name, data: data[:min(int64(len(data)), int64(le.Uint32(p[12:])))],
			seq: le.Uint64(p[16:]), salt: le.Uint64(p[24:]), first: le.Uint64(p[32:]), oldest: le.Uint64(p[40:]),
			formerSeq: le.Uint64(p[48:]), formerEnd: int64(le.Uint64(p[56:])), formerCRC: le.Uint64(p[64:]),
		}
		if !ok || c.seq > s.seq {
			s, ok = c, true
		}
	}
	return s, ok
}

// readLog returns the valid records of the log on a disk, in order.
func readLog(d *simdisk.Disk) (list []*logged, end commitlog.LSN) {
	var segs []imageSegment
	for _, name := range d.Names() {
		if ext := path.Ext(name); strings.HasPrefix(name, logDir+"/") && (ext == ".seg" || ext == ".damaged") {
			if s, ok := parseImageSegment(name, d.Image(name)); ok {
				segs = append(segs, s)
			}
		}
	}
	if len(segs) == 0 {
		return nil, 0
	}
	slices.SortFunc(segs, func(a, b imageSegment) int { return cmp.Compare(b.seq, a.seq) })
	chain := segs[:1:1]
	oldest := segs[0].oldest
	for _, s := range segs[1:] {
		if last := chain[len(chain)-1]; s.seq == last.formerSeq && s.seq >= oldest {
			chain = append(chain, s)
		}
	}
	slices.Reverse(chain)
	next := chain[0].first
	for i, s := range chain {
		limit := int64(len(s.data))
		if i+1 < len(chain) {
			limit = chain[i+1].formerEnd
		}
		crc := s.formerCRC
		next = s.first
		for pos := int64(imagePage); ; {
			r, at, size, sum := s.find(pos, limit, next, crc)
			if r == nil {
				break
			}
			list = append(list, r)
			next, crc, pos = next+1, sum, at+size
		}
	}
	return list, commitlog.LSN(next - 1)
}

// find looks for record next behind one that ended at pos: there, or at a sector
// up to the end of that page.
func (s imageSegment) find(pos, limit int64, next, crc uint64) (r *logged, at, size int64, sum uint64) {
	le := binary.LittleEndian
	end := (pos + imagePage - 1) / imagePage * imagePage
	for at = pos; at <= end && at < limit; at = (at + imageSector) / imageSector * imageSector {
		p := s.data[at:limit]
		r, size, ok := parseLogged(p)
		if !ok || uint64(r.lsn) != next || le.Uint64(p[24:]) != crc {
			continue
		}
		sum := ltx.CRC64(ltx.CRC64(s.salt, p[:64]), r.payload)
		if sum == le.Uint64(p[64:]) {
			return r, at, int64(size), sum
		}
	}
	return nil, 0, 0, 0
}

// checkImage asserts the invariants that must hold on the disk after a crash.
func (m *machine) checkImage(kill bool) error {
	w, d := m.watch, m.d
	list, end := readLog(d)
	for _, r := range list {
		w.note(d, r) // also the last write, which the crash tore
	}
	maps.DeleteFunc(w.records, func(lsn commitlog.LSN, _ *logged) bool { return lsn > end })
	w.durable = end
	metas, err := w.readMetas(d, end)
	if err != nil {
		return err
	}
	present, lines, err := w.checkRecords(d, end)
	if err != nil {
		return err
	}
	var onDisk []commitlog.LSN
	gone := w.aborted(end)
	for _, r := range list {
		if !gone[r.lsn] {
			onDisk = append(onDisk, r.lsn)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(w.dirs)) {
		x := imageDB{w: w, d: d, id: id, dir: w.dirs[id], txs: present[id], line: lines[id], meta: metas[id], onDisk: onDisk}
		if err := x.check(); err != nil {
			return fmt.Errorf("%s: %w", x.dir, err)
		}
	}
	if !kill {
		w.settle(present, lines, gone, end)
	}
	return nil
}

// readMetas reads what each database folder says of its base.
func (w *watch) readMetas(d *simdisk.Disk, end commitlog.LSN) (map[uint32]dbMeta, error) {
	metas := map[uint32]dbMeta{}
	for _, name := range d.Names() {
		if !strings.HasPrefix(name, dbsDir+"/") || path.Base(name) != "meta" {
			continue
		}
		b := d.Image(name)
		var meta dbMeta
		for off := 0; off < len(b); off += metaSlotSize {
			if c, ok := parseMeta(b[off:min(off+metaSlotSize, len(b))]); ok && c.Seq > meta.Seq {
				meta = c
			}
		}
		if meta.Seq == 0 {
			continue
		}
		if meta.LSN > end {
			return nil, fmt.Errorf("invariant 5: %s reflects log record %d, the log ends at %d", name, meta.LSN, end)
		}
		metas[meta.ID] = meta
		w.dirs[meta.ID] = path.Dir(name)
	}
	return metas, nil
}

// checkRecords returns the transactions that the log holds up to its end and that
// no abort took back, of each database in order.
func (w *watch) checkRecords(d *simdisk.Disk, end commitlog.LSN) (present map[uint32][]loggedTx, lines map[uint32]line, err error) {
	gone := w.aborted(end)
	present, lines = map[uint32][]loggedTx{}, maps.Clone(w.lines)
	for _, lsn := range slices.Sorted(maps.Keys(w.records)) {
		if lsn > end || gone[lsn] {
			continue
		}
		r := w.records[lsn]
		if l := lines[r.DB]; r.Kind == commitlog.KindBase {
			l.before, l.history = l.history, r.History // another history begins with what is there
			lines[r.DB] = l
		}
		list, err := w.transactions(d, r)
		if err != nil {
			return nil, nil, err
		}
		for _, tx := range list {
			l, err := lines[tx.db].follow(tx)
			if err != nil {
				return nil, nil, fmt.Errorf("%s, log record %d: %w", w.dirs[tx.db], lsn, err)
			}
			lines[tx.db] = l
			present[tx.db] = append(present[tx.db], tx)
		}
	}
	return present, lines, nil
}

// follow asserts invariants 10 and 11 of a transaction that follows line l.
func (l line) follow(tx loggedTx) (line, error) {
	h := tx.header
	next := line{history: tx.history, txid: h.MaxTXID, post: tx.post, pageSize: h.PageSize, commit: h.Commit}
	if l.history == tx.history {
		next.before = l.before
	}
	if !tx.full && l.txid != 0 && (l.history != tx.history || h.MinTXID != l.txid+1 || h.PreApplyChecksum != l.post) {
		return l, fmt.Errorf("invariant 10: %d-%d after checksum %s follows %d with %s", h.MinTXID, h.MaxTXID, h.PreApplyChecksum, l.txid, l.post)
	}
	from := l.commit
	if tx.full || l.txid == 0 || l.pageSize != h.PageSize {
		from = 0
	}
	if l.txid == 0 && !tx.full {
		from = h.Commit // what it grew from is not known
	}
	want := from + 1
	for i, pgno := range tx.pages {
		if pgno > h.Commit || i > 0 && pgno <= tx.pages[i-1] || pgno == ltx.LockPgno(h.PageSize) {
			return l, fmt.Errorf("invariant 11: transaction %d names page %d of %d", h.MaxTXID, pgno, h.Commit)
		}
		if pgno == want {
			want++
		}
	}
	if want <= h.Commit {
		return l, fmt.Errorf("invariant 11: transaction %d grows from %d to %d pages without page %d", h.MaxTXID, from, h.Commit, want)
	}
	return next, nil
}

// settle takes the transactions that survived a power cut as there for good.
func (w *watch) settle(present map[uint32][]loggedTx, lines map[uint32]line, gone map[commitlog.LSN]bool, end commitlog.LSN) {
	for lsn := range gone {
		delete(w.spans, lsn)
	}
	for id, list := range present {
		for _, tx := range list {
			w.allow(w.dirs[id], tx.contents)
		}
	}
	w.lines, w.settled = lines, end
	clear(w.records)
	clear(w.parsed)
}

func (w *watch) allow(dir string, contents []uint64) {
	if w.allowed[dir] == nil {
		w.allowed[dir] = map[uint64]bool{}
	}
	for _, key := range contents {
		w.allowed[dir][key] = true
	}
}

// An imageDB is one database as a crash left it.
type imageDB struct {
	w    *watch
	d    *simdisk.Disk
	id   uint32
	dir  string
	txs  []loggedTx // of the log, not known before
	line line       // where they end
	meta dbMeta

	onDisk []commitlog.LSN // what the log holds
}

// check asserts invariants 3, 4 and 7.
func (x imageDB) check() error {
	limit, pages := x.meta.base().size(), x.meta.Commit
	now := map[uint64]bool{}
	for _, tx := range x.txs {
		limit = max(limit, int64(tx.header.Commit)*int64(tx.header.PageSize))
		pages = max(pages, tx.header.Commit)
		for _, key := range tx.contents {
			now[key] = true
		}
	}
	before := x.w.allowed[x.dir]
	data := x.d.Image(path.Join(x.dir, "data"))
	for off := int64(0); off+imageSector <= min(limit, int64(len(data))); off += imageSector {
		p := data[off : off+imageSector]
		if key := sectorKey(off, p); !now[key] && !before[key] && !zeroes(p) {
			return fmt.Errorf("invariants 3, 4: the database file holds %x... at %d, which no committed record of the log brought", p[:8], off)
		}
	}
	sums := x.d.Image(path.Join(x.dir, "sums"))
	for pgno := uint32(1); pgno <= pages && int64(pgno)*sumSize <= int64(len(sums)); pgno++ {
		sum := binary.BigEndian.Uint64(sums[int64(pgno-1)*sumSize:])
		if key := sumKey(pgno, sum); sum != 0 && !now[key] && !before[key] {
			return fmt.Errorf("invariant 3: the checksum of page %d is %016x, which no committed record of the log brought", pgno, sum)
		}
	}
	return x.complete()
}

// complete asserts that base, level files and log together hold everything up to
// the end of the log (invariant 7).
func (x imageDB) complete() error {
	last := x.line
	if last.txid == 0 {
		return nil
	}
	var have []span
	for _, lsn := range x.onDisk {
		for _, s := range x.w.spans[lsn] {
			if s.db == x.id && s.history == last.history {
				have = append(have, s)
			}
		}
	}
	prefix := path.Join(x.dir, fmt.Sprintf("%016x", last.history)) + "/"
	for _, name := range x.d.Names() {
		if !strings.HasPrefix(name, prefix) || !strings.HasSuffix(name, extLevel) || strings.HasPrefix(name, prefix+branchLevel+"/") {
			continue
		}
		h, _, err := ltx.Verify(bytes.NewReader(x.d.Image(name)))
		if err != nil {
			continue // not finished
		}
		have = append(have, span{x.id, last.history, h.MinTXID, h.MaxTXID, h.MinTXID == 1 || h.Commit == 0})
	}
	for _, name := range x.d.Names() {
		if strings.HasPrefix(name, groupsDir+"/") && strings.HasSuffix(name, extGroup) {
			have = append(have, x.partsOf(name)...)
		}
	}
	at := ltx.TXID(0)
	if x.meta.History == last.history || last.before != 0 && x.meta.History == last.before {
		at = x.meta.TXID
	}
	for at < last.txid {
		best := at
		for _, s := range have {
			if s.max > best && (s.min <= at+1 || s.full) {
				best = s.max
			}
		}
		if best == at {
			return fmt.Errorf("invariant 7: base is %d, and neither the log nor a level file holds %d of %d", x.meta.TXID, at+1, last.txid)
		}
		at = best
	}
	return nil
}

// partsOf returns what a group file holds of the database.
func (x imageDB) partsOf(name string) (list []span) {
	b := x.d.Image(name)
	n := len(b) - 8
	if n < 0 || ltx.CRC64(0, b[:n]) != binary.BigEndian.Uint64(b[n:]) {
		return nil
	}
	_ = splitGroup(b[:n], func(h commitlog.Header, _ int64, body []byte) error {
		header, err := ltx.ReadHeader(bytes.NewReader(body))
		if err == nil && h.DB == x.id && h.History == x.line.history && h.Kind == commitlog.KindLTX {
			list = append(list, span{x.id, h.History, header.MinTXID, header.MaxTXID, h.Flags&flagFull != 0})
		}
		return err
	})
	return list
}
