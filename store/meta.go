package store

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/sabotage"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// The metadata of a database is what the log would say of it up to LSN, written
// when base moves. The file "meta" has two slots; a write goes to the one that is
// not known to be the newest durable one, so that a torn write leaves that. A
// slot:
//
//	0        8        12       20          20+n
//	+--------+--------+--------+-----------+
//	| magic  | n      | CRC    | JSON (n)  |
//	+--------+--------+--------+-----------+
//
// Integers are big-endian, the CRC is CRC-64/ISO of the JSON.
const (
	metaSlotSize = 8192
	metaMagic    = "LFSMETA1"
)

// dbMeta is the JSON of a slot.
type dbMeta struct {
	Seq        uint64        `json:"seq"` // of the slot's write; the higher one counts
	ID         uint32        `json:"id"`
	Name       string        `json:"name"`
	History    uint64        `json:"history"`
	EpochN     uint64        `json:"epoch"`
	EpochGrant uint64        `json:"grant"`
	TXID       ltx.TXID      `json:"txid"` // base
	Checksum   ltx.Checksum  `json:"checksum"`
	PageSize   uint32        `json:"page_size"`
	Commit     uint32        `json:"commit"`
	AckedTXID  ltx.TXID      `json:"acked_txid"`
	AckedSum   ltx.Checksum  `json:"acked_checksum"`
	Sent       ltx.TXID      `json:"sent"`
	LSN        commitlog.LSN `json:"lsn"`     // log records of this database up to it are reflected here
	Time       int64         `json:"time_ms"` // of the transaction at base

	slot int // where it was read
}

func (m dbMeta) base() position {
	return position{ltx.Pos{TXID: m.TXID, PostApplyChecksum: m.Checksum}, m.PageSize, m.Commit}
}

// metaLocked describes the database with the given base. db.mu is held.
func (db *DB) metaLocked(base position) dbMeta {
	db.metaSeq++
	lsn := max(db.last, db.lastAny)
	if !sabotage.On(sabotage.MetaDurable) {
		lsn = min(lsn, db.st.wlog.Durable()) // the rest may be lost, and its number be another record's
	}
	return dbMeta{
		Seq: db.metaSeq, ID: db.id, Name: db.name, History: db.history,
		EpochN: db.epoch.N, EpochGrant: db.epoch.Grant,
		TXID: base.TXID, Checksum: base.PostApplyChecksum, PageSize: base.PageSize, Commit: base.Commit,
		AckedTXID: db.recs.acked.TXID, AckedSum: db.recs.acked.PostApplyChecksum, Sent: db.recs.mark,
		LSN: lsn, Time: db.lastTime.UnixMilli(),
	}
}

// writeMeta writes one slot; durable on return unless a syncfs for many follows.
func (db *DB) writeMeta(m dbMeta, many bool) error {
	if m.ID == 0 {
		return nil
	}
	body, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(body) > metaSlotSize-20 {
		return fmt.Errorf("%s: metadata of %d bytes does not fit", db.name, len(body))
	}
	b := make([]byte, 20, metaSlotSize)
	copy(b, metaMagic)
	binary.BigEndian.PutUint32(b[8:], uint32(len(body)))
	binary.BigEndian.PutUint64(b[12:], ltx.CRC64(0, body))
	b = append(b, body...)
	if err := db.makeDir(); err != nil {
		return fmt.Errorf("%s: make its folder: %w", db.name, err)
	}
	if db.metaFile == nil {
		name := path.Join(db.dir, "meta")
		f, err := db.st.fs.OpenFile(name, os.O_RDWR, 0o600)
		if errors.Is(err, os.ErrNotExist) {
			f, err = db.st.fs.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
		}
		if err != nil {
			return fmt.Errorf("%s: open its metadata: %w", db.name, err)
		}
		db.metaFile = f
	}
	if _, err := db.metaFile.WriteAt(b, int64(1-db.metaSlot)*metaSlotSize); err != nil {
		return fmt.Errorf("%s: write its metadata: %w", db.name, err)
	}
	if many {
		return nil
	}
	if err := db.metaFile.Datasync(); err != nil {
		return fmt.Errorf("%s: make its metadata durable: %w", db.name, err)
	}
	if db.metaNamed {
		return nil
	}
	err = db.st.fs.SyncDir(db.dir)
	db.metaNamed = err == nil
	return err
}

// readMeta returns the newest valid slot; ok is false if there is none.
func readMeta(fsys disk.FS, dir string) (m dbMeta, ok bool, err error) {
	f, err := fsys.OpenFile(path.Join(dir, "meta"), os.O_RDONLY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return m, false, nil
	}
	if err != nil {
		return m, false, err
	}
	defer f.Close()
	b := make([]byte, 2*metaSlotSize)
	n, err := f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return m, false, err
	}
	b = b[:n]
	for off := 0; off < len(b); off += metaSlotSize {
		c, valid := parseMeta(b[off:min(off+metaSlotSize, len(b))])
		if valid && (!ok || c.Seq > m.Seq) {
			m, ok = c, true
			m.slot = off / metaSlotSize
		}
	}
	return m, ok, nil
}

func parseMeta(b []byte) (m dbMeta, ok bool) {
	if len(b) < 20 || string(b[:8]) != metaMagic {
		return m, false
	}
	n := int64(binary.BigEndian.Uint32(b[8:]))
	if n > int64(len(b)-20) {
		return m, false
	}
	body := b[20 : 20+n]
	if ltx.CRC64(0, body) != binary.BigEndian.Uint64(b[12:]) || json.Unmarshal(body, &m) != nil {
		return dbMeta{}, false
	}
	return m, true
}
