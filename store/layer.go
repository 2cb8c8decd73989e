package store

import (
	"math"
	"sync/atomic"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
	"github.com/litefs-agent/litefs-agent/internal/sparse"
)

// A layer holds bytes of a database that are not in its file yet: those of the
// running rollback transaction, or committed ones on their way to the file.
// What it does not hold shows through from what lies under it, below the offset
// in under; at and beyond that offset it is zeros, because a truncation was
// part of what the layer stands for.
type layer struct {
	*sparse.File
	under atomic.Int64

	// Of a committed layer, guarded by DB.mu until the layer is frozen.
	lsn  commitlog.LSN // log position that must be durable before any byte is applied
	pos  position      // position of the database once the layer is applied
	sums sums

	fresh   bool // the files under it are those of a dropped database: remove them first
	takes   bool // the first layer of a database that was an ordinary file
	adopted bool // with takes: that file's content lies under the layer; set before the layer is shown
}

func newLayer(p *sparse.Pool) *layer {
	l := &layer{File: p.NewFile(), sums: sums{few: make(map[uint32]uint64)}}
	l.under.Store(math.MaxInt64)
	return l
}

func (l *layer) empty() bool {
	return l.Len() == 0 && l.under.Load() == math.MaxInt64 && l.sums.empty() && !l.fresh && !l.takes
}

// cut forgets everything from size on, in the layer and under it.
func (l *layer) cut(size int64) {
	l.DropFrom(size)
	l.under.Store(min(l.under.Load(), size))
}

// retire gives the layer's memory back once its bytes are in the place below. A
// read that still goes through it finds holes, and must find what is below at
// every offset: the truncation that the layer stood for was carried out there.
func (l *layer) retire() {
	l.under.Store(math.MaxInt64)
	l.Reset()
}

// layers is the stack that a read looks through, replaced as a whole so that
// reads take no lock of the database (invariants 19, 20). A byte moves down the
// stack only after it is in the place below, and reads go from the top down, so
// a read never misses it.
type layers struct {
	txn       *layer   // the running rollback transaction, nil if none
	committed []*layer // newest first; all but the first are frozen and being applied
}

// read fills p from off through the given layers; under reads the file.
func readThrough(list []*layer, p []byte, off int64, under func(p []byte, off int64) error) error {
	if len(list) == 0 {
		return under(p, off)
	}
	l := list[0]
	return l.Read(p, off, func(q []byte, o int64) error {
		limit := l.under.Load()
		if o >= limit {
			clear(q)
			return nil
		}
		if o+int64(len(q)) > limit {
			clear(q[limit-o:])
			q = q[:limit-o]
		}
		return readThrough(list[1:], q, o, under)
	})
}
