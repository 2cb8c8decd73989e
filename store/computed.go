package store

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/litefs-agent/litefs-agent/ltx"
)

// The computed files: NAME-pos, NAME-acked and NAME-writer beside every
// database, .primary and .lag at the root (ARCHITECTURE.md, "At the mount").
var (
	computedSuffixes = [...]string{"-pos", "-acked", "-writer"}
	computedRoot     = [...]string{".primary", ".lag"}
)

// A computed node's content is made at each read.
type computed struct {
	st   *Store
	ino  uint64
	read func() string
	at   func() time.Time
	size int64 // of every content, 0 if it varies
}

// computedAt returns the computed file at a path, nil if there is none.
func (st *Store) computedAt(p string) Node {
	switch p {
	case ".primary":
		if st.opt.Primary() == "" {
			return nil
		}
		return st.computedNode(p, computed{read: func() string { return st.opt.Primary() + "\n" }})
	case ".lag":
		return st.computedNode(p, computed{read: st.lag})
	}
	for _, suffix := range computedSuffixes {
		base, ok := strings.CutSuffix(p, suffix)
		if !ok {
			continue
		}
		st.nsMu.RLock()
		f := st.files[base]
		st.nsMu.RUnlock()
		if f == nil {
			return nil
		}
		st.adoptIfCandidate(f)
		db := f.db.Load()
		if db == nil || !f.isDB.Load() {
			return nil
		}
		return st.computedOf(p, suffix, db)
	}
	return nil
}

// computedOf makes the node once for a name: it follows the name to whatever
// database has it, also after a drop.
func (st *Store) computedOf(p, suffix string, db *DB) Node {
	now := func() *DB {
		st.nsMu.RLock()
		defer st.nsMu.RUnlock()
		if cur := st.byName[db.name]; cur != nil {
			return cur
		}
		return db
	}
	c := computed{size: 34, at: func() time.Time { return time.Unix(0, now().mtime.Load()) }}
	switch suffix {
	case "-pos":
		c.read = func() string { return formatPos(now().Pos()) }
	case "-acked":
		c.read = func() string { return formatPos(now().Acked()) }
	case "-writer":
		c.size = 0
		c.read = func() string { return st.opt.Writer(db.name) + "\n" }
	}
	return st.computedNode(p, c)
}

func (st *Store) computedNode(p string, c computed) Node {
	st.computedMu.Lock()
	defer st.computedMu.Unlock()
	if n := st.computed[p]; n != nil {
		return n
	}
	c.st, c.ino = st, st.inos.forName(p)
	st.computed[p] = &c
	return &c
}

func formatPos(p ltx.Pos) string { return p.String() + "\n" }

func (st *Store) lag() string {
	ms := int64(math.MaxInt32)
	if d, ok := st.opt.Lag(); ok {
		ms = min(ms, d.Milliseconds())
	}
	return fmt.Sprintf("%+010d\n", ms)
}

// Kind implements Node.
func (c *computed) Kind() Kind { return KindComputed }

// Attr implements Node.
func (c *computed) Attr() Attr {
	a := Attr{Kind: KindComputed, Ino: c.ino, Mode: 0o444, Size: c.size, Mtime: c.st.opt.Now(), Nlink: 1}
	if c.size == 0 {
		a.Size = int64(len(c.read()))
	}
	if c.at != nil {
		a.Mtime = c.at()
	}
	return a
}

// Open implements Node.
func (c *computed) Open(write bool) (Handle, error) {
	if write {
		return nil, ErrReserved
	}
	return &computedHandle{c: c}, nil
}

// SetSize implements Node.
func (c *computed) SetSize(Handle, int64) error { return ErrReserved }

// SetMode implements Node.
func (c *computed) SetMode(uint32) error { return ErrReserved }

// SetTime implements Node.
func (c *computed) SetTime(time.Time) error { return ErrReserved }

// A computedHandle keeps the content of its first read, so that one open sees
// one value.
type computedHandle struct {
	c    *computed
	text string
}

// ReadAt implements Handle.
func (h *computedHandle) ReadAt(p []byte, off int64) (int, error) {
	if off == 0 || h.text == "" {
		h.text = h.c.read()
	}
	if off >= int64(len(h.text)) {
		return 0, nil
	}
	return copy(p, h.text[off:]), nil
}

// WriteAt implements Handle.
func (h *computedHandle) WriteAt([]byte, int64) (int, error) { return 0, ErrReserved }

// Sync implements Handle.
func (h *computedHandle) Sync() error { return nil }

// Allocate implements Handle.
func (h *computedHandle) Allocate(int64, int64) error { return ErrReserved }

// Release implements Handle.
func (h *computedHandle) Release() {}
