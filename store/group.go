package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"path"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
)

// A group record holds the parts of one transaction over several databases:
//
//	u16 count, then per part:
//	u32 database, u64 history, u64 epoch, u64 grant, u8 kind, u8 flags,
//	u32 length; bytes
//
// kind is KindLTX or KindReference, for what the bytes are, flags are as in the
// header of such a record. All integers are
// big-endian. The record is all or nothing (invariant 12).
const groupPartHeader = 4 + 8 + 8 + 8 + 1 + 1 + 4

type groupPart struct {
	db      *DB
	p       *pending
	payload []byte
}

// commitGroup is the UNLINK of a super-journal: the commit of every database
// whose armed journal names it. The record is durable before it returns.
func (st *Store) commitGroup(name string) error {
	members := st.groupMembers(path.Base(name))
	if len(members) == 0 {
		return nil
	}
	for _, db := range members {
		db.mu.Lock()
		defer db.mu.Unlock()
	}
	held := false
	for _, db := range members {
		h, err := st.reserved(db.file)
		if err != nil {
			return err
		}
		held = held || h
		if err := db.fenced(); err != nil {
			return err
		}
	}
	if !held {
		return fmt.Errorf("%s: journals still name this super-journal and nobody holds their locks: %w", name, ErrBusy)
	}
	parts, err := groupParts(members)
	if err != nil {
		return err
	}
	if err := st.appendGroup(parts); err != nil {
		return err
	}
	for i, db := range members {
		db.commitTxn(parts[i].p)
		db.unreserve(db.journal)
		*db.journal = journalState{node: db.journal.node, armed: true, committed: true}
	}
	return nil
}

// groupMembers returns, in a fixed order, the databases whose armed journal
// names the super-journal.
func (st *Store) groupMembers(base string) []*DB {
	var list []*DB
	for _, db := range st.named() {
		db.mu.Lock()
		if j := db.journal; j != nil && j.armed && !j.committed && j.open {
			if name, err := j.superJournal(); err == nil && name == base {
				list = append(list, db)
			}
		}
		db.mu.Unlock()
	}
	return list
}

func groupParts(members []*DB) ([]groupPart, error) {
	parts := make([]groupPart, len(members))
	for i, db := range members {
		if err := db.supersede(); err != nil {
			return nil, err
		}
		c, ok, err := db.rollbackChange()
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, fmt.Errorf("%s: no SQLite header in a transaction over several databases: %w", db.name, ErrRefused)
		}
		p, payload, sc, err := db.build(c)
		if err != nil {
			return nil, noSpace(err)
		}
		parts[i] = groupPart{db: db, p: p}
		if p != nil {
			parts[i].payload = append([]byte(nil), payload...)
			if err := db.register(); err != nil {
				return nil, err
			}
		}
		if sc != nil {
			scratches.Put(sc)
		}
	}
	return parts, nil
}

func (st *Store) appendGroup(parts []groupPart) error {
	var payload []byte
	n := 0
	payload = append(payload, 0, 0)
	for i := range parts {
		part := &parts[i]
		if part.p == nil {
			continue
		}
		n++
		db := part.db
		kind := commitlog.KindLTX
		if part.p.entry.path != "" {
			kind = commitlog.KindReference
		}
		payload = binary.BigEndian.AppendUint32(payload, db.id)
		payload = binary.BigEndian.AppendUint64(payload, db.history)
		payload = binary.BigEndian.AppendUint64(payload, db.epoch.N)
		payload = binary.BigEndian.AppendUint64(payload, db.epoch.Grant)
		payload = append(payload, uint8(kind), part.p.entry.flags())
		payload = binary.BigEndian.AppendUint32(payload, uint32(len(part.payload)))
		part.p.entry.off = int64(len(payload))
		payload = append(payload, part.payload...)
	}
	if n == 0 {
		return nil
	}
	binary.BigEndian.PutUint16(payload, uint16(n))
	lsn, ref, err := st.wlog.Append(commitlog.Header{Kind: commitlog.KindGroup}, commitlog.Staged, payload)
	if err == nil {
		err = st.wlog.Wait(lsn)
	}
	if err != nil {
		for _, part := range parts {
			if !errors.Is(err, commitlog.ErrTooLarge) {
				part.db.fenceWith(err)
			}
		}
		return noSpace(fmt.Errorf("append group record: %w", err))
	}
	for _, part := range parts {
		if part.p == nil {
			continue
		}
		part.p.lsn, part.p.entry.lsn, part.p.entry.ref = lsn, lsn, ref
		part.p.entry.group = uint64(lsn)
		part.db.last = lsn
		part.db.markDirty(lsn)
	}
	return nil
}

// splitGroup calls fn for each part of a group payload.
func splitGroup(payload []byte, fn func(h commitlog.Header, off int64, body []byte) error) error {
	if len(payload) < 2 {
		return errBadRecord
	}
	n := int(binary.BigEndian.Uint16(payload))
	off := 2
	for range n {
		if len(payload)-off < groupPartHeader {
			return errBadRecord
		}
		b := payload[off:]
		h := commitlog.Header{
			DB: binary.BigEndian.Uint32(b), History: binary.BigEndian.Uint64(b[4:]),
			EpochN: binary.BigEndian.Uint64(b[12:]), EpochGrant: binary.BigEndian.Uint64(b[20:]),
			Kind: commitlog.Kind(b[28]), Flags: b[29],
		}
		size := int64(binary.BigEndian.Uint32(b[30:]))
		off += groupPartHeader
		if size > int64(len(payload)-off) {
			return errBadRecord
		}
		if err := fn(h, int64(off), payload[off:int64(off)+size]); err != nil {
			return err
		}
		off += int(size)
	}
	return nil
}

var errBadRecord = errors.New("record of the log does not decode")
