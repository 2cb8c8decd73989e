package store

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"path"
	"strings"

	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// A set of pages stands for records whose bytes the budget had no room for: it
// says which pages they changed, one bit a page. The content is in the database
// file, since all of them are at or below base, and what is sent instead of them is
// read there. The file MIN-MAX.pages in level 8 of the history:
//
//	0        8        12          12+n     ...
//	+--------+--------+-----------+--------+--------+
//	| magic  | n      | JSON (n)  | bits   | CRC    |
//	+--------+--------+-----------+--------+--------+
//
// Bit i of byte k is page 8k+i+1. Integers are big-endian, the CRC is CRC-64/ISO
// of all before it.
const (
	extPages   = ".pages"
	pagesMagic = "LFSPAGE1"
)

// pagesLevel is the level, as in names, of sets of pages.
const pagesLevel = 8

type pagesHeader struct {
	Min      ltx.TXID     `json:"min"`
	Max      ltx.TXID     `json:"max"`
	Pre      ltx.Checksum `json:"pre"`
	Post     ltx.Checksum `json:"post"`
	Commit   uint32       `json:"commit"`
	PageSize uint32       `json:"page_size"`
	Time     int64        `json:"time_ms"`
	Full     bool         `json:"full"`
}

// pageBits is a set of page numbers.
type pageBits []byte

func (b pageBits) has(pgno uint32) bool {
	i := (pgno - 1) / 8
	return uint64(i) < uint64(len(b)) && b[i]&(1<<((pgno-1)%8)) != 0
}

// add returns the set with one page more.
func (b pageBits) add(pgno uint32) pageBits {
	i := int((pgno - 1) / 8)
	if i >= len(b) {
		b = append(b, make([]byte, i+1-len(b))...)
	}
	b[i] |= 1 << ((pgno - 1) % 8)
	return b
}

// union returns the set with those of another.
func (b pageBits) union(c pageBits) pageBits {
	if len(c) > len(b) {
		b = append(b, make([]byte, len(c)-len(b))...)
	}
	for i, x := range c {
		b[i] |= x
	}
	return b
}

// upTo returns the set without the pages beyond the last.
func (b pageBits) upTo(last uint32) pageBits {
	if n := (int(last) + 7) / 8; len(b) > n {
		b = b[:n]
	}
	if n := int(last) / 8; last%8 != 0 && len(b) > n {
		b[n] &= 1<<(last%8) - 1
	}
	return b
}

func (b pageBits) count() (n int64) {
	for _, x := range b {
		n += int64(bits.OnesCount8(x))
	}
	return n
}

// changedPages returns which pages a record changed.
func (db *DB) changedPages(e entry) (pageBits, error) {
	if e.set {
		_, b, err := db.readPages(e.path)
		return b, err
	}
	r, off, err := db.st.recordAt(e)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	index, _, err := ltx.ReadIndex(io.NewSectionReader(r, off, e.size), e.size)
	if err != nil {
		return nil, fmt.Errorf("record %s-%s: %w", e.min, e.max, err)
	}
	var b pageBits
	for _, x := range index {
		b = b.add(x.Pgno)
	}
	return b, nil
}

// writePages makes one set of consecutive records, all of which are at or below
// base.
func (db *DB) writePages(list []entry) (entry, error) {
	first, last := list[0], list[len(list)-1]
	e := entry{
		min: first.min, max: last.max, pre: first.pre, post: last.post,
		commit: last.commit, pageSize: last.pageSize, time: last.time, set: true,
	}
	var b pageBits
	for _, x := range list {
		if x.full {
			e.full, b = true, nil
		}
		c, err := db.changedPages(x)
		if err != nil {
			return e, err
		}
		// A page that is cut off comes back only by a record that holds it.
		b = b.union(c).upTo(x.commit)
	}
	h, err := json.Marshal(pagesHeader{e.min, e.max, e.pre, e.post, e.commit, e.pageSize, e.time, e.full})
	if err != nil {
		return e, err
	}
	buf := append([]byte(nil), pagesMagic...)
	buf = binary.BigEndian.AppendUint32(buf, uint32(len(h)))
	buf = append(append(buf, h...), b...)
	buf = binary.BigEndian.AppendUint64(buf, ltx.CRC64(0, buf))
	dir := db.levelDir(pagesLevel)
	if err := disk.MkdirAll(db.st.fs, dir, 0o700); err != nil {
		return e, fmt.Errorf("%s: make %s: %w", db.name, dir, err)
	}
	e.path = path.Join(dir, strings.TrimSuffix(ltx.FormatFilename(e.min, e.max), extLevel)+extPages)
	e.size = b.count() * int64(e.pageSize)
	return e, disk.WriteFileAtomic(db.st.fs, e.path, buf)
}

// readPages reads a set of pages.
func (db *DB) readPages(name string) (entry, pageBits, error) {
	var e entry
	b, err := disk.ReadFile(db.st.fs, name, 1<<30)
	if err != nil {
		return e, nil, err
	}
	n := len(b) - 8
	if n < 12 || string(b[:8]) != pagesMagic || ltx.CRC64(0, b[:n]) != binary.BigEndian.Uint64(b[n:]) {
		return e, nil, fmt.Errorf("%s: is no set of pages, or damaged", name)
	}
	size := int64(binary.BigEndian.Uint32(b[8:]))
	var h pagesHeader
	if size > int64(n-12) || json.Unmarshal(b[12:12+size], &h) != nil {
		return e, nil, fmt.Errorf("%s: its header does not decode", name)
	}
	set := pageBits(b[12+size : n])
	return entry{
		min: h.Min, max: h.Max, pre: h.Pre, post: h.Post, commit: h.Commit, pageSize: h.PageSize,
		time: h.Time, full: h.Full, set: true, path: name, size: set.count() * int64(h.PageSize),
	}, set, nil
}

// PagesShipment returns what follows position after, where Next fails with
// ErrPages, as one record up to the present: the pages of the set as they are
// read while programs write, and then the records on top.
func (db *DB) PagesShipment(after ltx.Pos) (*Shipment, error) {
	defer db.pin()()
	for range 4 {
		s, err := db.shipPages(after)
		if err != errRetry {
			return s, err
		}
	}
	return nil, fmt.Errorf("%s: changes faster than its changed pages can be copied: %w", db.name, ErrBusy)
}

func (db *DB) shipPages(after ltx.Pos) (*Shipment, error) {
	db.settle()
	f, err := db.st.fs.CreateTemp(".")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	e, set, err := db.copyPages(f, after)
	if err != nil {
		return nil, err
	}
	img, err := db.redoPages(f, e, &set)
	if err != nil {
		return nil, err
	}
	info := db.Info()
	out, err := db.st.fs.CreateTemp(".")
	if err != nil {
		return nil, err
	}
	h := ltx.Header{
		PageSize: img.PageSize, Commit: img.Commit, MinTXID: e.min, MaxTXID: img.Pos.TXID,
		PreApplyChecksum: e.pre, Timestamp: info.Last.UnixMilli(), NodeID: db.st.nodeHash,
	}
	size, err := writeBuffered(out, func(w io.Writer) error { return img.writePages(w, h, set) })
	if err == nil {
		err = db.Sync()
	}
	if err == nil {
		err = db.markSent(img.Pos.TXID)
	}
	if err != nil {
		_ = out.Close()
		return nil, fmt.Errorf("%s: send changed pages: %w", db.name, err)
	}
	return &Shipment{
		Name: db.name, History: img.History, Epoch: img.Epoch, Min: e.min, Max: img.Pos.TXID,
		Pre: e.pre, Post: img.Pos.PostApplyChecksum, Time: info.Last, Commit: img.Commit, PageSize: img.PageSize,
		Full: e.full, Records: 2, Size: size, Body: fileBody(out, size),
	}, nil
}

// copyPages copies the pages of the set that follows a position, each as it is
// when its turn comes.
func (db *DB) copyPages(f disk.File, after ltx.Pos) (entry, pageBits, error) {
	db.mu.Lock()
	list, err := db.shippable(after)
	db.mu.Unlock()
	if err != nil || !list[0].set {
		return entry{}, nil, errors.Join(err, ErrGap)
	}
	e, set, err := db.readPages(list[0].path)
	if err != nil {
		return e, nil, errRetry // it may have been joined with what follows
	}
	buf := make([]byte, e.pageSize)
	const batch = 64 // pages under one hold of the lock
	for pgno, n := uint32(1), 0; pgno <= e.commit; n = 0 {
		db.mu.Lock()
		for ; pgno <= e.commit && n < batch; pgno++ {
			if !set.has(pgno) || pgno > db.at.Commit {
				continue
			}
			if db.at.PageSize != e.pageSize || db.at.Commit == 0 {
				db.mu.Unlock()
				return e, nil, ErrGap
			}
			n++
			if err = db.readChecked(pgno, buf); err != nil {
				db.mu.Unlock()
				return e, nil, err
			}
			if _, err = f.WriteAt(buf, int64(pgno-1)*int64(e.pageSize)); err != nil {
				db.mu.Unlock()
				return e, nil, db.st.noSpace(err)
			}
		}
		db.mu.Unlock()
	}
	return e, set, nil
}

// readChecked reads a page of the newest confirmed state and compares its
// checksum with the one kept. db.mu is held.
func (db *DB) readChecked(pgno uint32, p []byte) error {
	want, err := db.sum(pgno)
	if err == nil {
		err = db.page(pgno, p)
	}
	if err != nil {
		return fmt.Errorf("%s: read page %d: %w", db.name, pgno, err)
	}
	if got := uint64(ltx.PageChecksum(pgno, p)); got != want {
		return fmt.Errorf("%s: page %d has checksum %s, not %s: the database file is damaged; run verify", db.name, pgno, ltx.Checksum(got), ltx.Checksum(want))
	}
	return nil
}

// redoPages puts the records that follow a set on top of its pages, up to the
// present position.
func (db *DB) redoPages(f disk.File, e entry, set *pageBits) (*Image, error) {
	img := &Image{File: f, PageSize: e.pageSize}
	sums := make([]byte, int64(e.commit)*sumSize)
	start := position{ltx.Pos{TXID: e.max, PostApplyChecksum: e.post}, e.pageSize, e.commit}
	db.mu.Lock()
	list := db.recs.list[db.recs.after(e.max):]
	at := db.at
	if at.TXID > e.max && (len(list) == 0 || list[0].min != e.max+1) {
		db.mu.Unlock()
		return nil, errRetry
	}
	for _, x := range list {
		if x.full {
			db.mu.Unlock()
			return nil, ErrGap // all pages are sent in any case
		}
	}
	list = append([]entry(nil), list...)
	db.mu.Unlock()
	img.Pos, img.Commit = start.Pos, start.Commit
	if err := db.redoInto(img, &sums, start); err != nil {
		return nil, err
	}
	for _, x := range list {
		if x.max > img.Pos.TXID {
			break
		}
		b, err := db.changedPages(x)
		if err != nil {
			return nil, errRetry
		}
		*set = set.union(b).upTo(x.commit)
	}
	if img.Pos.TXID < at.TXID {
		return nil, errRetry
	}
	return img, nil
}

// writePages writes the pages of a set as one record.
func (img *Image) writePages(w io.Writer, h ltx.Header, set pageBits) error {
	if h.MinTXID == 1 {
		h.PreApplyChecksum = 0
	}
	enc := ltx.NewEncoder(w)
	if err := enc.EncodeHeader(h); err != nil {
		return err
	}
	buf := make([]byte, h.PageSize)
	lock := ltx.LockPgno(h.PageSize)
	for pgno := uint32(1); pgno <= h.Commit; pgno++ {
		if !set.has(pgno) || pgno == lock {
			continue
		}
		if _, err := img.ReadAt(buf, int64(pgno-1)*int64(h.PageSize)); err != nil {
			return err
		}
		if err := enc.EncodePage(pgno, buf); err != nil {
			return err
		}
	}
	_, err := enc.Close(img.Pos.PostApplyChecksum)
	return err
}
