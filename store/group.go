package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

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
	members, err := st.groupMembers(path.Base(name))
	if len(members) == 0 || err != nil {
		return err
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
	parts, err := partsOf(members)
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
// names the super-journal. A journal that cannot be read may be one of them:
// were it left out, SQLite would take its part for committed.
func (st *Store) groupMembers(base string) ([]*DB, error) {
	var list []*DB
	for _, db := range st.named() {
		db.mu.Lock()
		name, err := "", error(nil)
		if j := db.journal; j != nil && j.armed && !j.committed && j.open {
			name, err = j.superJournal()
		}
		db.mu.Unlock()
		if err != nil {
			return nil, fmt.Errorf("%s: read the end of its journal: %w", db.name, err)
		}
		if name == base {
			list = append(list, db)
		}
	}
	return list, nil
}

func partsOf(members []*DB) ([]groupPart, error) {
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
		// All parts together fit one log record.
		c.large = min(db.st.opt.Large, db.st.wlog.MaxPayload()/int64(2*len(members)))
		p, payload, sc, err := db.build(c)
		if err != nil {
			return nil, db.st.noSpace(err)
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
		return st.noSpace(fmt.Errorf("append group record: %w", err))
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

// ApplyGroup takes the records of one transaction over several databases: all
// become the positions of their databases, in one record of the log, or none.
// Those that are there already are left out. When it returns nil they are
// durable.
func (st *Store) ApplyGroup(list []Incoming) error {
	type member struct {
		in Incoming
		db *DB
	}
	var members []member
	for _, in := range list {
		if err := st.checkIncoming(in.Name); err != nil {
			return err
		}
		if in.Replace {
			return fmt.Errorf("%s: part of a group replaces the database: %w", in.Name, ErrCorrupt)
		}
		db, err := st.incomingDB(in)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(members, func(m member) bool { return m.db == db }) {
			return fmt.Errorf("%s: twice in one group: %w", in.Name, ErrCorrupt)
		}
		members = append(members, member{in, db})
	}
	// Names order the locks, since new databases have no ids yet.
	slices.SortFunc(members, func(a, b member) int { return strings.Compare(a.in.Name, b.in.Name) })
	for _, m := range members {
		unlock, err := m.db.lockReaders()
		if err != nil {
			return err
		}
		defer unlock()
	}
	for _, m := range members {
		m.db.mu.Lock()
		defer m.db.mu.Unlock()
		if err := m.db.fenced(); err != nil {
			return err
		}
	}
	var parts []groupPart
	var layers []*layer
	undo := func(err error) error {
		for _, l := range layers {
			l.Reset()
		}
		return err
	}
	// All parts together fit one log record.
	large := min(st.opt.Large, st.wlog.MaxPayload()/int64(2*max(1, len(members))))
	for _, m := range members {
		p, l, payload, err := m.db.groupIncoming(m.in, large)
		if err != nil {
			return undo(err)
		}
		if p != nil {
			parts, layers = append(parts, groupPart{m.db, p, payload}), append(layers, l)
		}
	}
	if len(parts) == 0 {
		return nil
	}
	if err := st.appendGroup(parts); err != nil {
		return undo(err)
	}
	for i, part := range parts {
		part.db.show(part.p, layers[i])
	}
	return nil
}

// groupIncoming checks one part of a group; beyond large bytes it goes to a file of
// its own. All are nil if it is here already.
// db.mu is held.
func (db *DB) groupIncoming(in Incoming, large int64) (*pending, *layer, []byte, error) {
	dec, h, err := db.checkPosition(in)
	if dec == nil || err != nil {
		return nil, nil, nil, err
	}
	in.Replace = h.MinTXID == 1
	p, l, err := db.decodeIncoming(in, dec, h)
	if err != nil {
		return nil, nil, nil, err
	}
	err = db.register()
	var payload []byte
	if err == nil {
		payload, err = db.incomingPayload(in, p, h, large)
	}
	if err != nil {
		l.Reset()
		return nil, nil, nil, db.st.noSpace(err)
	}
	return p, l, payload, nil
}
