package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"path"
	"strings"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// A watch sees every operation of one disk. It knows the records of the log by
// the bytes that were written, without asking the engine.
type watch struct {
	records map[commitlog.LSN]*logged    // not yet known to be there for good
	durable commitlog.LSN                // where the log ended after the last crash
	dirs    map[uint32]string            // folder of each database in the data folder
	allowed map[string]map[uint64]bool   // by folder: sectors and checksums of committed records that are there for good
	lines   map[uint32]line              // by database: where those records end
	blocks  map[string][]blockState      // of each segment, a sector
	current string                       // segment with the newest header
	seq     uint64                       // in that
	failed  map[string]bool              // segments of which an fdatasync failed
	settled commitlog.LSN                // records up to it are there for good
	parsed  map[commitlog.LSN][]loggedTx // cache of records
	spans   map[commitlog.LSN][]span     // what each record holds, kept
}

// A span names what a record or a level file holds.
type span struct {
	db       uint32
	history  uint64
	min, max ltx.TXID
	full     bool
}

// A logged record is what the log holds.
type logged struct {
	commitlog.Header
	lsn     commitlog.LSN
	payload []byte
}

// A line is where the records of one database end.
type line struct {
	history          uint64
	txid             ltx.TXID
	post             ltx.Checksum
	pageSize, commit uint32
	before           uint64 // history that this one began with the content of
}

type blockState uint8

const (
	untouched blockState = iota
	written
	holdsDurable
)

func newWatch() *watch {
	return &watch{
		records: map[commitlog.LSN]*logged{}, dirs: map[uint32]string{}, allowed: map[string]map[uint64]bool{},
		lines: map[uint32]line{}, blocks: map[string][]blockState{}, failed: map[string]bool{},
		parsed: map[commitlog.LSN][]loggedTx{}, spans: map[commitlog.LSN][]span{},
	}
}

const (
	imageHeader = 72 // of a record: internal/commitlog/format.go
	imagePage   = 4096
	imageSector = 512
)

// see takes note of one operation, of which err is what is going to be returned.
func (w *watch) see(m *machine, op simdisk.Op, err error) error {
	if !strings.HasPrefix(op.Name, logDir+"/") {
		return nil
	}
	switch op.Kind {
	case simdisk.OpDatasync:
		if err != nil {
			w.failed[op.Name] = true
			return nil
		}
		for i, b := range w.blocks[op.Name] {
			if b == written {
				w.blocks[op.Name][i] = holdsDurable
			}
		}
	case simdisk.OpRemove:
		delete(w.blocks, op.Name)
		delete(w.failed, op.Name)
	case simdisk.OpWrite:
		if werr := w.write(m, op, err); werr != nil {
			return werr
		}
	}
	return nil
}

// write asserts invariants 14 and 16 of a write to a segment.
func (w *watch) write(m *machine, op simdisk.Op, err error) error {
	if w.failed[op.Name] && op.Off > 0 {
		return fmt.Errorf("invariant 14: write at %d of %s, of which an fdatasync failed", op.Off, op.Name)
	}
	if op.Off == 0 && err == nil && len(op.Data) >= 24 && op.Data[0] != 0 {
		if seq := binary.LittleEndian.Uint64(op.Data[16:]); seq > w.seq {
			w.current, w.seq = op.Name, seq
		}
	}
	if op.Off == imagePage && op.Name != w.current { // a rescue writes the header last
		delete(w.blocks, op.Name)
	}
	if op.Off == 0 { // zeros of a new file, or another header: the segment is used for something else
		delete(w.blocks, op.Name)
		delete(w.failed, op.Name)
	}
	unit := int64(imagePage)
	if op.Direct {
		unit = int64(m.d.BlockSize())
	}
	state := w.blocks[op.Name]
	if need := m.o.SegmentSize / imageSector; int64(len(state)) < need {
		state = append(state, make([]blockState, need-int64(len(state)))...)
		w.blocks[op.Name] = state
	}
	end := (op.Off + op.Len + unit - 1) / unit * unit
	for s := op.Off / unit * unit / imageSector; s*imageSector < end && s < int64(len(state)); s++ {
		if state[s] == holdsDurable && op.Off != 0 {
			return fmt.Errorf("invariant 16: write at %d of %s goes over a block that holds durable records", s*imageSector, op.Name)
		}
		from := max(0, s*imageSector-op.Off)
		if to := min(op.Len, (s+1)*imageSector-op.Off); from < to && err == nil && !zeroes(op.Data[from:to]) {
			state[s] = written
		}
	}
	if op.Off < imagePage {
		return nil
	}
	for p := op.Data; len(p) >= imageHeader; {
		r, size, ok := parseLogged(p)
		if !ok {
			break
		}
		w.note(m.d, r)
		p = p[min(len(p), size):]
	}
	return nil
}

func zeroes(p []byte) bool { return len(bytes.TrimLeft(p, "\x00")) == 0 }

// parseLogged decodes a record without looking at its checksum.
func parseLogged(p []byte) (r *logged, size int, ok bool) {
	le := binary.LittleEndian
	if len(p) < imageHeader || string(p[:4]) != "LREC" {
		return nil, 0, false
	}
	n := int(le.Uint32(p[4:]))
	if n > len(p)-imageHeader {
		return nil, 0, false
	}
	r = &logged{
		lsn: commitlog.LSN(le.Uint64(p[8:])),
		Header: commitlog.Header{
			Kind: commitlog.Kind(p[32]), Flags: p[33], DB: le.Uint32(p[36:]), History: le.Uint64(p[40:]),
			EpochN: le.Uint64(p[48:]), EpochGrant: le.Uint64(p[56:]),
		},
		payload: bytes.Clone(p[imageHeader : imageHeader+n]),
	}
	return r, (imageHeader + n + 7) &^ 7, true
}

// note remembers a record, with the file that it refers to: that may be gone
// before anybody looks.
func (w *watch) note(d *simdisk.Disk, r *logged) {
	old := w.records[r.lsn]
	if r.lsn <= w.settled || old != nil && old.Header == r.Header && bytes.Equal(old.payload, r.payload) {
		return
	}
	if r.Kind == commitlog.KindCreate {
		w.dirs[r.DB] = dbDir(string(r.payload))
	}
	w.records[r.lsn] = r
	delete(w.parsed, r.lsn)
	delete(w.spans, r.lsn)
	if r.Kind == commitlog.KindReference || r.Kind == commitlog.KindGroup {
		_, _ = w.transactions(d, r) // the files that they refer to may be gone when somebody looks
	}
}

// sideFile returns the content of the file that a reference names.
func (w *watch) sideFile(d *simdisk.Disk, h commitlog.Header, payload []byte) []byte {
	header, err := ltx.ReadHeader(bytes.NewReader(payload))
	if err != nil {
		return nil
	}
	name := path.Join(w.dirs[h.DB], fmt.Sprintf("%016x", h.History), "0", sideFilename(header.MinTXID, header.MaxTXID))
	if b := d.Image(name); b != nil {
		return b
	}
	return d.Image(strings.TrimSuffix(name, extSide) + extLevel)
}

// A loggedTx is one transaction that a record holds.
type loggedTx struct {
	db       uint32
	history  uint64
	header   ltx.Header
	post     ltx.Checksum
	pages    []uint32
	contents []uint64 // keys of sectors and checksums
	full     bool
}

var sectorSeed = maphash.MakeSeed()

// sectorKey names the content of one sector of a file at one place.
func sectorKey(off int64, p []byte) uint64 {
	return maphash.Bytes(sectorSeed, p) ^ uint64(off+1)*0x9e3779b97f4a7c15
}

// sumKey names the checksum of one page.
func sumKey(pgno uint32, sum uint64) uint64 { return sum ^ uint64(pgno)*0xc2b2ae3d27d4eb4f }

// transactions decodes a record; none if it holds no transaction.
func (w *watch) transactions(d *simdisk.Disk, r *logged) ([]loggedTx, error) {
	if list, ok := w.parsed[r.lsn]; ok {
		return list, nil
	}
	var list []loggedTx
	add := func(h commitlog.Header, body []byte) error {
		if h.Kind == commitlog.KindReference {
			body = w.sideFile(d, h, body)
		} else if h.Kind != commitlog.KindLTX {
			return nil
		}
		if body == nil {
			return nil // applied, and removed since
		}
		tx, err := parseTx(body)
		tx.db, tx.history, tx.full = h.DB, h.History, tx.full || h.Flags&flagFull != 0
		list = append(list, tx)
		return err
	}
	var err error
	if r.Kind == commitlog.KindGroup {
		err = splitGroup(r.payload, func(h commitlog.Header, _ int64, body []byte) error { return add(h, body) })
	} else {
		err = add(r.Header, r.payload)
	}
	if err != nil {
		return nil, fmt.Errorf("log record %d: %w", r.lsn, err)
	}
	w.parsed[r.lsn] = list
	var spans []span
	for _, tx := range list {
		spans = append(spans, span{tx.db, tx.history, tx.header.MinTXID, tx.header.MaxTXID, tx.full})
	}
	w.spans[r.lsn] = spans
	return list, nil
}

func parseTx(body []byte) (tx loggedTx, err error) {
	dec := ltx.NewDecoder(bytes.NewReader(body))
	if tx.header, err = dec.DecodeHeader(); err != nil {
		return tx, err
	}
	ps := int64(tx.header.PageSize)
	buf := make([]byte, ps)
	for {
		pgno, err := dec.DecodePage(buf)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return tx, err
		}
		tx.pages = append(tx.pages, pgno)
		for i := int64(0); i < ps; i += imageSector {
			off := int64(pgno-1)*ps + i
			tx.contents = append(tx.contents, sectorKey(off, buf[i:i+imageSector]))
		}
		tx.contents = append(tx.contents, sumKey(pgno, uint64(ltx.PageChecksum(pgno, buf))))
	}
	if err := dec.Close(); err != nil {
		return tx, err
	}
	tx.post = dec.Trailer().PostApplyChecksum
	tx.full = tx.header.MinTXID == 1 || tx.header.Commit == 0
	return tx, nil
}

// aborted lists the records up to the end of the log that an abort record took
// back.
func (w *watch) aborted(end commitlog.LSN) map[commitlog.LSN]bool {
	list := map[commitlog.LSN]bool{}
	for lsn, r := range w.records {
		if lsn <= end && r.Kind == commitlog.KindAbort && len(r.payload) == 8 {
			list[commitlog.LSN(binary.BigEndian.Uint64(r.payload))] = true
		}
	}
	return list
}
