package service

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/control"
	"github.com/litefs-agent/litefs-agent/ltx"
	"github.com/litefs-agent/litefs-agent/store"
)

// MountStatus describes the mount.
func (c *Core) MountStatus() control.StatusMount {
	return control.StatusMount{Dir: c.opt.Mount.Dir, State: *c.mountState.Load()}
}

// Card describes what the service has done to the card: what the kernel counted
// of this process where it says so, else what the log knows of itself.
func (c *Core) Card() control.StatusCard {
	var card control.StatusCard
	if st := c.st.Load(); st != nil {
		s := st.Stats()
		card = control.StatusCard{BytesWritten: int64(s.LogBytes), Fdatasyncs: int64(s.Fdatasyncs), Transactions: s.Transactions}
	}
	if n, ok := writtenBytes(); ok {
		card.BytesWritten = n
	}
	return card
}

func writtenBytes() (int64, bool) {
	b, err := os.ReadFile("/proc/self/io")
	if err != nil {
		return 0, false
	}
	for line := range bytes.Lines(b) {
		if text, ok := strings.CutPrefix(string(line), "write_bytes:"); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}

// Memory describes the process's memory.
func Memory() control.StatusMemory {
	b, _ := os.ReadFile("/proc/self/statm")
	var size, resident int64
	if _, err := fmt.Sscan(string(b), &size, &resident); err != nil {
		return control.StatusMemory{}
	}
	return control.StatusMemory{RSS: resident * int64(os.Getpagesize())}
}

// Problems says why the service cannot do its work, and what to do about it:
// mounted where it is to be, log writable, no database fenced, backlog within
// its budget. It is healthy where there is nothing to say.
func (c *Core) Problems() []string {
	list := []string{}
	switch state := *c.mountState.Load(); state {
	case control.MountMounted, control.MountOff:
	default:
		list = append(list, "mount "+c.opt.Mount.Dir+": "+state)
	}
	st := c.st.Load()
	if st == nil {
		return append(list, ErrStarting.Error())
	}
	for _, err := range st.Problems() {
		list = append(list, err.Error())
	}
	var backlog int64
	for _, db := range st.DBs() {
		info := db.Info()
		if info.Fenced != nil {
			list = append(list, info.Fenced.Error())
		}
		backlog += info.Backlog.Bytes
	}
	if c.opt.Budget > 0 && backlog > c.opt.Budget {
		list = append(list, fmt.Sprintf("the hub lacks %d bytes, above the budget of %d: see why it is out of reach, or raise sync.budget", backlog, c.opt.Budget))
	}
	return list
}

// Database describes a node-owned database of writer. A dropped one has no size.
func Database(db *store.DB, writer, role string) control.StatusDatabase {
	db.Pos() // a returned COMMIT shows
	info := db.Info()
	size, pageSize := int64(info.Commit)*int64(info.PageSize), int64(info.PageSize)
	mode := "delete" // what SQLite says of every rollback mode when it opens the database
	if info.WAL {
		mode = "wal"
	}
	d := control.StatusDatabase{
		Name: info.Name, Owner: "node", Role: role, Writer: &writer,
		History: ptr(fmt.Sprintf("%016x", info.History)), Epoch: ptr(info.Epoch.String()),
		Pos: ptr(info.Pos.String()), Acked: position(info.Acked), Archived: position(info.Acked),
		Size: &size, PageSize: &pageSize, JournalMode: &mode, Branches: []control.StatusBranch{},
	}
	for _, b := range db.Branches() {
		d.Branches = append(d.Branches, control.StatusBranch{
			History: fmt.Sprintf("%016x", b.History), Pos: position(b.Pos), Since: ptr(b.Since.UTC()),
		})
	}
	if !info.Last.IsZero() {
		d.LastCommit = ptr(info.Last.UTC())
	}
	return d
}

// Backlog fills in what the hub lacks of a database and for how long.
func Backlog(d *control.StatusDatabase, db *store.DB) {
	b := db.Info().Backlog
	d.Backlog = control.StatusBacklog{Records: int64(b.Records), Bytes: b.Bytes}
	d.LagMS = ptr(int64(0))
	if !b.Oldest.IsZero() {
		age := max(0, time.Since(b.Oldest).Milliseconds())
		d.Backlog.AgeMS, d.LagMS = age, &age
	}
}

// position is the text of pos, nil for the zero position.
func position(pos ltx.Pos) *string {
	if pos.IsZero() {
		return nil
	}
	return ptr(pos.String())
}

func ptr[T any](v T) *T { return &v }
