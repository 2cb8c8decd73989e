package store

import (
	"slices"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// An entry says where one confirmed record lies: in the log, in a part of a
// group record there, or in a file of its own.
type entry struct {
	min, max  ltx.TXID
	pre, post ltx.Checksum
	commit    uint32
	pageSize  uint32
	time      int64  // ms
	size      int64  // bytes of the LTX
	full      bool   // holds every page: needs nothing before it
	set       bool   // only which pages changed is known: a set of pages (pageset.go)
	group     uint64 // not 0: number (LSN) of the group record that holds it

	lsn  commitlog.LSN // 0 if only in a file
	ref  commitlog.Ref
	off  int64  // of the LTX bytes in the payload, in the log or in a group file
	path string // file in the data folder, "" if in the log
}

// records is the index of what a database's log and level files hold of its
// history, ascending and without gaps. Guarded by DB.mu.
type records struct {
	list  []entry
	acked ltx.Pos  // as the hub confirmed
	sent  ltx.TXID // handed to a link in this life of the agent
	mark  ltx.TXID // durable upper bound of what was ever handed to a link
	heard bool     // the hub said in this life where it stands: sent is exact
}

// boundary returns the TXID beyond which the hub cannot stand.
func (r *records) boundary() ltx.TXID {
	if r.heard {
		return r.sent
	}
	return max(r.sent, r.mark)
}

func (r *records) add(e entry) { r.list = append(r.list, e) }

// after returns the index of the first entry above txid.
func (r *records) after(txid ltx.TXID) int {
	i, _ := slices.BinarySearchFunc(r.list, txid+1, func(e entry, t ltx.TXID) int {
		switch {
		case e.max < t:
			return -1
		case e.min > t:
			return 1
		}
		return 0
	})
	return i
}

func (r *records) backlog() (b Backlog) {
	for _, e := range r.list[r.after(r.acked.TXID):] {
		b.Records++
		b.Bytes += e.size
		if b.Oldest.IsZero() {
			b.Oldest = time.UnixMilli(e.time)
		}
	}
	return b
}

// lastTime returns the commit time of the newest record, else ms.
func (r *records) lastTime(ms int64) time.Time {
	if n := len(r.list); n > 0 {
		ms = r.list[n-1].time
	}
	return time.UnixMilli(ms)
}
