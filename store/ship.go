package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/sabotage"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// Errors of Next.
var (
	// ErrNothing: there is no durable, confirmed record after that position.
	ErrNothing = errors.New("nothing to ship")
	// ErrUndurable is the ErrNothing of a record that is not durable yet.
	ErrUndurable = fmt.Errorf("%w: not durable yet", ErrNothing)
	// ErrGap: the records after that position are not kept any more, or the
	// position is not one of this history: a snapshot is needed.
	ErrGap = errors.New("records after that position are gone")
	// ErrPages: only which pages changed after that position is known; ask
	// PagesShipment.
	ErrPages = errors.New("only the set of changed pages is kept")
)

// A Shipment is a record to be sent: one transaction, or a compacted run.
type Shipment struct {
	Name      string
	History   uint64
	Epoch     Epoch
	Min, Max  ltx.TXID
	Pre, Post ltx.Checksum
	Time      time.Time
	Commit    uint32
	PageSize  uint32
	Full      bool // holds every page
	Records   int  // how many were compacted into it
	// Group, if not 0, is shared by the records of one transaction over several
	// databases: they take effect together. Parts are all of them.
	Group uint64
	Parts []GroupPart
	Size  int64
	Body  io.ReadCloser // the LTX bytes
}

// Pos is the position after the shipment.
func (s *Shipment) Pos() ltx.Pos { return ltx.Pos{TXID: s.Max, PostApplyChecksum: s.Post} }

// sentStep is how far the durable sent mark runs ahead of what is sent, so that
// it does not cost a flush a record.
const sentStep = 256

// Next returns what follows position after: a single transaction, or, if at least
// compactFrom records wait, those up to limit bytes as one. Only what is durable
// here and confirmed is shipped (invariant 5).
func (db *DB) Next(after ltx.Pos, compactFrom int, limit int64) (*Shipment, error) {
	db.mu.Lock()
	list, err := db.shippable(after)
	n := 1
	if err == nil && list[0].set {
		err = ErrPages
	}
	if err == nil && compactFrom > 0 && len(list) >= compactFrom && list[0].group == 0 {
		size := list[0].size
		for n < len(list) && size+list[n].size <= limit && list[n].group == 0 && !list[n].set {
			size += list[n].size
			n++
		}
	}
	list = slices.Clone(list[:min(n, len(list))])
	history, epoch := db.history, db.epoch
	db.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if err := db.markSent(list[n-1].max); err != nil {
		return nil, err
	}
	s := &Shipment{
		Name: db.name, History: history, Epoch: epoch,
		Min: list[0].min, Max: list[n-1].max, Pre: list[0].pre, Post: list[n-1].post,
		Time: time.UnixMilli(list[n-1].time), Commit: list[n-1].commit, PageSize: list[n-1].pageSize,
		Records: n, Size: list[0].size,
	}
	for _, e := range list[:n] {
		s.Full = s.Full || e.full
	}
	if n == 1 {
		if s.Group = list[0].group; s.Group != 0 {
			if s.Parts, err = db.st.groupParts(list[0]); err != nil {
				return nil, err
			}
		}
		if e := list[0]; e.path == "" && e.off == 0 {
			if b := db.st.recent.get(e.ref); b != nil {
				s.Body = io.NopCloser(bytes.NewReader(b))
				return s, nil
			}
		}
		s.Body, err = db.st.openRecord(list[0])
		return s, err
	}
	return s, db.compactBody(s, list[:n])
}

// shippable returns the durable records after a position, in place. db.mu is held.
func (db *DB) shippable(after ltx.Pos) ([]entry, error) {
	list := db.recs.list
	if after.TXID >= db.at.TXID {
		if after.TXID > db.at.TXID || after != db.at.Pos {
			return nil, ErrGap
		}
		return nil, ErrNothing
	}
	i := db.recs.after(after.TXID)
	if i == len(list) {
		return nil, ErrGap
	}
	if e := list[i]; e.min != after.TXID+1 || e.pre != after.PostApplyChecksum && e.min != 1 {
		return nil, ErrGap
	}
	durable := db.st.wlog.Durable()
	n := len(list)
	for n > i && list[n-1].lsn > durable && !sabotage.On(sabotage.ShipDurable) {
		n--
	}
	if n == i {
		return nil, ErrUndurable
	}
	return list[i:n], nil
}

// compactBody makes the shipment of several records, in memory while it is
// small, else in a temporary file.
func (db *DB) compactBody(s *Shipment, list []entry) error {
	var total int64
	for _, e := range list {
		total += e.size
	}
	if total <= db.st.opt.Large {
		var b bytes.Buffer
		if _, err := db.compact(&b, list); err != nil {
			return fmt.Errorf("%s: compact %s-%s: %w", db.name, s.Min, s.Max, err)
		}
		s.Size, s.Body = int64(b.Len()), io.NopCloser(&b)
		return nil
	}
	f, err := db.st.fs.CreateTemp(".")
	if err != nil {
		return err
	}
	size, err := writeBuffered(f, func(w io.Writer) error {
		_, err := db.compact(w, list)
		return err
	})
	if err != nil {
		_ = f.Close()
		return fmt.Errorf("%s: compact %s-%s: %w", db.name, s.Min, s.Max, err)
	}
	s.Size, s.Body = size, fileBody(f, size)
	return nil
}

func fileBody(f disk.File, size int64) io.ReadCloser { return section(f, 0, size) }

// section reads size bytes of r from off; closing it closes r.
func section(r readerAtCloser, off, size int64) io.ReadCloser {
	return struct {
		io.Reader
		io.Closer
	}{io.NewSectionReader(r, off, size), r}
}

// SnapshotShipment returns the whole database as one shipment that replaces
// whatever the receiver has.
func (db *DB) SnapshotShipment() (*Shipment, error) {
	if !db.Exists() {
		return db.dropShipment()
	}
	img, err := db.Snapshot()
	if err != nil {
		return nil, err
	}
	defer img.Close()
	info := db.Info()
	f, err := db.st.fs.CreateTemp(".")
	if err != nil {
		return nil, err
	}
	size, err := writeBuffered(f, func(w io.Writer) error {
		return img.WriteLTX(w, info.Last.UnixMilli(), db.st.nodeHash)
	})
	if err == nil {
		err = db.Sync()
	}
	if err == nil {
		err = db.markSent(img.Pos.TXID)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%s: snapshot: %w", db.name, err)
	}
	return &Shipment{
		Name: db.name, History: img.History, Epoch: img.Epoch,
		Min: 1, Max: img.Pos.TXID, Post: img.Pos.PostApplyChecksum, Time: info.Last,
		Commit: img.Commit, PageSize: img.PageSize, Full: true, Records: 1, Size: size, Body: fileBody(f, size),
	}, nil
}

// dropShipment is the snapshot of a database that was dropped: nothing.
func (db *DB) dropShipment() (*Shipment, error) {
	info := db.Info()
	h := ltx.Header{
		PageSize: max(info.PageSize, 512), MinTXID: 1, MaxTXID: info.Pos.TXID,
		Timestamp: info.Last.UnixMilli(), NodeID: db.st.nodeHash,
	}
	b, err := ltx.AppendFile(nil, h, nil, info.Pos.PostApplyChecksum)
	if err != nil {
		return nil, err
	}
	if err := db.Sync(); err != nil {
		return nil, err
	}
	if err := db.markSent(info.Pos.TXID); err != nil {
		return nil, err
	}
	return &Shipment{
		Name: db.name, History: info.History, Epoch: info.Epoch, Min: 1, Max: info.Pos.TXID,
		Post: info.Pos.PostApplyChecksum, Time: info.Last, PageSize: h.PageSize, Full: true,
		Records: 1, Size: int64(len(b)), Body: io.NopCloser(bytes.NewReader(b)),
	}, nil
}

// markSent makes the sent mark durable before anything beyond it is handed to a
// link: what lies up to the mark is never compacted across.
func (db *DB) markSent(txid ltx.TXID) error {
	db.mu.Lock()
	db.recs.sent = max(db.recs.sent, txid)
	if txid <= db.recs.mark || db.st.opt.Home || sabotage.On(sabotage.SentMark) {
		db.mu.Unlock()
		return nil
	}
	var b [8]byte
	mark := txid + sentStep
	binary.BigEndian.PutUint64(b[:], uint64(mark))
	lsn, _, err := db.st.wlog.Append(db.header(commitlog.KindSent, 0), commitlog.Staged, b[:])
	if err == nil {
		db.lastAny = lsn
		db.markDirty(lsn)
	}
	db.mu.Unlock()
	if err == nil {
		err = db.st.wlog.Wait(lsn)
	}
	if err != nil {
		return fmt.Errorf("%s: make the sent mark durable: %w", db.name, err)
	}
	db.mu.Lock()
	db.recs.mark = max(db.recs.mark, mark)
	db.mu.Unlock()
	return nil
}

// LinkDown says that nothing is on its way to the hub any more: the sent marks
// come back to what was really handed to a link, so that what follows can be
// compacted. They become durable with the next base; after a crash before it a higher
// one counts, which is on the safe side.
func (st *Store) LinkDown() {
	for _, db := range st.all() {
		db.mu.Lock()
		db.recs.mark = min(db.recs.mark, db.recs.boundary())
		db.mu.Unlock()
	}
}

// SetAcked notes what the hub confirmed to be durable there. It may go back.
func (db *DB) SetAcked(pos ltx.Pos) error {
	db.mu.Lock()
	// It stood there in this life, whatever it says later.
	db.recs.sent = max(db.recs.sent, min(pos.TXID, db.at.TXID))
	db.recs.heard = db.recs.heard || !pos.IsZero()
	if db.recs.acked == pos || db.id == 0 {
		db.mu.Unlock()
		return nil
	}
	db.recs.acked = pos
	var b [16]byte
	binary.BigEndian.PutUint64(b[:], uint64(pos.TXID))
	binary.BigEndian.PutUint64(b[8:], uint64(pos.PostApplyChecksum))
	due := db.ackWritten+ackEvery <= pos.TXID || pos == db.at.Pos && db.st.opt.Now().Sub(db.ackTime) > time.Second
	var err error
	if due {
		db.ackWritten, db.ackTime = pos.TXID, db.st.opt.Now()
		var lsn commitlog.LSN
		lsn, _, err = db.st.wlog.Append(db.header(commitlog.KindAcked, 0), commitlog.Lazy, b[:])
		if err == nil {
			db.lastAny = lsn
			db.markDirty(lsn)
		}
	}
	if !pos.IsZero() {
		db.tell(EventAck, pos, time.Time{})
	}
	db.mu.Unlock()
	db.st.notify(db)
	return err
}

// ackEvery is how many transactions an ack record in the log stands for at most:
// after a crash the hub is asked anyway.
const ackEvery = 1024

// Owed reports whether position pos of history is one that this database was at,
// as far as its records say.
func (db *DB) Owed(history uint64, pos ltx.Pos) bool {
	db.mu.Lock()
	defer db.mu.Unlock()
	if history != db.history {
		return false
	}
	if pos == db.at.Pos || pos.TXID == 0 {
		return true
	}
	i := db.recs.after(pos.TXID)
	return i < len(db.recs.list) && db.recs.list[i].min == pos.TXID+1 && db.recs.list[i].pre == pos.PostApplyChecksum
}
