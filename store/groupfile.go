package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// A group file holds one group record that the log is about to lose while one
// of its databases still needs its part: so that the parts stay bound to each
// other (invariant 12). It is named for the record's LSN and holds its payload
// and then, as 8 big-endian bytes, the payload's CRC-64/ISO. It goes with the
// last part that anybody needs.
const (
	groupsDir = "groups"
	extGroup  = ".group"
)

// groupFiles counts how many entries need each group file.
type groupFiles struct {
	mu   sync.Mutex
	uses map[uint64]int // by number
}

func groupPath(number uint64) string {
	return path.Join(groupsDir, fmt.Sprintf("%016x", number)+extGroup)
}

// groupNumber returns the number of the group whose file has that path in the
// data folder.
func groupNumber(name string) (uint64, bool) {
	base, ok := strings.CutPrefix(name, groupsDir+"/")
	if ok {
		base, ok = strings.CutSuffix(base, extGroup)
	}
	if !ok || len(base) != 16 {
		return 0, false
	}
	n, err := strconv.ParseUint(base, 16, 64)
	return n, err == nil
}

// keepGroup makes a durable file of the group record that holds e, unless there
// is one, and has e refer to that instead of the log.
func (st *Store) keepGroup(e *entry) error {
	g := &st.groups
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.uses[e.group] == 0 {
		payload := make([]byte, e.ref.Len)
		if err := st.wlog.ReadAt(e.ref, payload, 0); err != nil {
			return fmt.Errorf("read group record %d: %w", e.group, err)
		}
		if err := disk.MkdirAll(st.fs, groupsDir, 0o700); err != nil {
			return fmt.Errorf("make %s: %w", groupsDir, err)
		}
		if err := disk.WriteFileAtomic(st.fs, groupPath(e.group), withCRC(payload)); err != nil {
			return fmt.Errorf("keep group record %d: %w", e.group, err)
		}
	}
	g.uses[e.group]++
	if e.path == "" {
		e.path = groupPath(e.group)
	}
	e.lsn, e.ref = 0, commitlog.Ref{}
	return nil
}

func withCRC(payload []byte) []byte {
	return binary.BigEndian.AppendUint64(payload, ltx.CRC64(0, payload))
}

// removeKept removes a file that no entry of one database needs any more.
func (st *Store) removeKept(name string) {
	if number, ok := groupNumber(name); ok {
		st.groups.mu.Lock()
		defer st.groups.mu.Unlock()
		if st.groups.uses[number]--; st.groups.uses[number] > 0 {
			return
		}
		delete(st.groups.uses, number)
	}
	_ = st.fs.Remove(name)
}

// readGroupFile returns the payload of a group file.
func (st *Store) readGroupFile(number uint64) ([]byte, error) {
	b, err := disk.ReadFile(st.fs, groupPath(number), st.opt.SegmentSize+8)
	if err != nil {
		return nil, err
	}
	n := len(b) - 8
	if n < 0 || ltx.CRC64(0, b[:n]) != binary.BigEndian.Uint64(b[n:]) {
		return nil, fmt.Errorf("%s: %w", groupPath(number), errBadRecord)
	}
	return b[:n], nil
}

// A GroupPart names one record of a transaction over several databases.
type GroupPart struct {
	Name    string
	History uint64
	TXID    ltx.TXID // the first, if it stands for several
}

// groupParts reads which databases the group record that holds e changes.
// Databases that have gone since, or begun another history, are left out: their
// part is void.
func (st *Store) groupParts(e entry) ([]GroupPart, error) {
	payload, err := st.groupPayload(e)
	if err != nil {
		return nil, fmt.Errorf("read group record %d: %w", e.group, err)
	}
	var list []GroupPart
	err = splitGroup(payload, func(h commitlog.Header, _ int64, body []byte) error {
		header, err := ltx.ReadHeader(bytes.NewReader(body))
		if err != nil {
			return err
		}
		st.nsMu.RLock()
		db := st.byID[h.DB]
		st.nsMu.RUnlock()
		if db == nil || db.Place().History != h.History {
			return nil
		}
		list = append(list, GroupPart{db.name, h.History, header.MinTXID})
		return nil
	})
	return list, err
}

func (st *Store) groupPayload(e entry) ([]byte, error) {
	if e.lsn != 0 {
		payload := make([]byte, e.ref.Len)
		if err := st.wlog.ReadAt(e.ref, payload, 0); err == nil {
			return payload, nil
		} // else the log has given it up meanwhile
	}
	return st.readGroupFile(e.group)
}

// readGroups gives every database its parts of the group files. A file that does
// not decode is of no use: if a database needs it, that shows as a gap.
func (r *recovery) readGroups() error {
	r.st.groups.uses = make(map[uint64]int)
	files, err := r.st.fs.ReadDir(groupsDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read %s in the data folder: %w", groupsDir, err)
	}
	for _, f := range files {
		number, ok := groupNumber(path.Join(groupsDir, f.Name()))
		if !ok {
			continue // unfinished: collectGroups removes it
		}
		payload, err := r.st.readGroupFile(number)
		if err == nil {
			err = splitGroup(payload, func(h commitlog.Header, off int64, body []byte) error {
				return r.keptPart(number, h, off, body)
			})
		}
		if err != nil {
			r.st.log.Error("a record of several databases is damaged", "file", groupPath(number), "err", err)
		}
	}
	return nil
}

func (r *recovery) keptPart(number uint64, h commitlog.Header, off int64, body []byte) error {
	x := r.byID[h.DB]
	if x == nil || x.db.history != h.History {
		return nil
	}
	e, err := x.db.parseEntry(commitlog.Record{Header: h}, off, body)
	if err != nil {
		return err
	}
	e.group = number
	if e.path == "" {
		e.path = groupPath(number)
	} else {
		// A side file keeps its name until the log gives the reference up.
		e.path, _ = strings.CutSuffix(e.path, extSide)
		e.path += extLevel
		if _, err := r.st.fs.Stat(e.path); errors.Is(err, os.ErrNotExist) {
			return nil
		}
	}
	x.grouped = append(x.grouped, e)
	return nil
}

// collectGroups counts who needs which group file after recovery, and removes
// those that nobody needs.
func (st *Store) collectGroups() error {
	uses := st.groups.uses
	for _, db := range st.all() {
		for _, e := range db.recs.list {
			if e.group != 0 && e.lsn == 0 {
				uses[e.group]++
			}
		}
		for _, name := range db.side {
			if number, ok := groupNumber(name); ok {
				uses[number]++
			}
		}
	}
	files, err := st.fs.ReadDir(groupsDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, f := range files {
		name := path.Join(groupsDir, f.Name())
		if number, ok := groupNumber(name); !ok || uses[number] == 0 {
			if err := st.fs.Remove(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// inGroupFile reports whether the bytes of the record are a part of a group file.
func (e *entry) inGroupFile() bool { return e.group != 0 && e.path == groupPath(e.group) }
