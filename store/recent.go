package store

import (
	"sync"

	"github.com/litefs-agent/litefs-agent/internal/commitlog"
)

const (
	recentN    = 16       // records
	recentSize = 16 << 10 // bytes of each, at most
)

// recent keeps the last small records of all databases: a link sends them right
// after their commit, and the log, which is written around the page cache, would
// have to read them back from the card.
type recent struct {
	mu   sync.Mutex // guards what follows
	next int
	refs [recentN]commitlog.Ref
	data [recentN][]byte
}

func (r *recent) put(ref commitlog.Ref, b []byte) {
	if len(b) > recentSize {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	i := r.next
	r.next = (i + 1) % recentN
	r.refs[i] = ref
	r.data[i] = append(r.data[i][:0], b...)
}

// get returns a copy of the payload of ref, nil if it is not here.
func (r *recent) get(ref commitlog.Ref) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.refs {
		if r.refs[i] == ref && len(r.data[i]) > 0 {
			return append([]byte(nil), r.data[i]...)
		}
	}
	return nil
}
