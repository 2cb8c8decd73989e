package store

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"

	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
)

// testFS shows a Store to the stand-in for SQLite.
type testFS struct{ st *Store }

type testFile struct {
	n Node
	h Handle
}

func (f testFile) ReadAt(p []byte, off int64) (int, error)  { return f.h.ReadAt(p, off) }
func (f testFile) WriteAt(p []byte, off int64) (int, error) { return f.h.WriteAt(p, off) }
func (f testFile) Truncate(size int64) error                { return f.n.SetSize(f.h, size) }
func (f testFile) Sync() error                              { return f.h.Sync() }
func (f testFile) Size() int64                              { return f.n.Attr().Size }
func (f testFile) Close() {
	if h, ok := f.h.(Flusher); ok {
		h.Flush()
	}
	f.h.Release()
}

func notExist(err error) error {
	if errors.Is(err, ErrNotExist) {
		return fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	return err
}

func (t testFS) Open(name string, create bool) (pager.File, error) {
	if create {
		n, h, err := t.st.Create(name, 0o644, false)
		return testFile{n, h}, notExist(err)
	}
	n, err := t.st.Lookup(name)
	if err != nil {
		return nil, notExist(err)
	}
	h, err := n.Open(true)
	return testFile{n, h}, err
}

func (t testFS) Exists(name string) bool {
	_, err := t.st.Lookup(name)
	return err == nil
}

func (t testFS) IsDatabase(name string) bool {
	n, err := t.st.Lookup(name)
	f, ok := n.(*file)
	return err == nil && ok && f.isDB.Load()
}

func (t testFS) Remove(name string) error { return notExist(t.st.Unlink(name)) }
func (t testFS) Rename(oldName, newName string) error {
	return notExist(t.st.Rename(oldName, newName, false))
}

// testPeer answers for the kernel from the locks of the stand-in.
type testPeer struct{ w *pager.World }

func (p testPeer) Reserved(n Node) (bool, error) { return p.w.Reserved(n.(*file).name()), nil }
func (p testPeer) ReadShm(n Node, b []byte, off int64) (int, error) {
	if n.(*sideFile).opens.Load() == 0 {
		return 0, nil
	}
	return (&sideHandle{n.(*sideFile)}).ReadAt(b, off)
}
func (p testPeer) WriteShm(n Node, b []byte, off int64) (int, error) {
	return (&sideHandle{n.(*sideFile)}).WriteAt(b, off)
}
func (p testPeer) LockShm(n Node, off, _ int64) (bool, error) {
	return off != walWriteLock || !p.w.WALLocked(n.(*sideFile).owner.name()), nil
}
func (p testPeer) UnlockShm(Node, int64, int64) error            { return nil }
func (p testPeer) LockDatabase(Node, int64, int64) (bool, error) { return true, nil }
func (p testPeer) UnlockDatabase(Node, int64, int64) error       { return nil }
func (p testPeer) InvalidateData(Node, int64, int64)             {}
func (p testPeer) InvalidateEntry(string)                        {}

// watchedFS is testFS, and asserts what must hold at a commit event.
type watchedFS struct {
	testFS
	c *crasher
}

type watchedFile struct {
	testFile
	c    *crasher
	name string
}

func (t watchedFS) Open(name string, create bool) (pager.File, error) {
	f, err := t.testFS.Open(name, create)
	if err != nil {
		return nil, err
	}
	tf := f.(testFile)
	t.c.sawInode(name, tf.n.Attr().Ino)
	return watchedFile{tf, t.c, name}, nil
}

// sawInode asserts that the inode number of a database or WAL is none of an
// earlier life (invariant 17).
func (c *crasher) sawInode(name string, ino uint64) {
	if strings.HasSuffix(name, "-journal") || strings.HasSuffix(name, "-shm") {
		return
	}
	if life, ok := c.inos[ino]; ok && life != c.life {
		c.fatalf("invariant 17: %s has inode %d, which was another's in life %d", name, ino, life)
	}
	c.inos[ino] = c.life
}

func (t watchedFS) Remove(name string) error {
	if !strings.HasSuffix(name, "-journal") && !strings.Contains(name, "-mj") {
		return t.testFS.Remove(name)
	}
	return t.c.commitEvent(name, func() error { return t.testFS.Remove(name) })
}

func (f watchedFile) Truncate(size int64) error {
	if size > 0 || !strings.HasSuffix(f.name, "-journal") {
		return f.testFile.Truncate(size)
	}
	return f.c.commitEvent(f.name, func() error { return f.testFile.Truncate(size) })
}

func (f watchedFile) WriteAt(p []byte, off int64) (n int, err error) {
	if off > 0 || p[0] != 0 || !strings.HasSuffix(f.name, "-journal") {
		return f.testFile.WriteAt(p, off)
	}
	err = f.c.commitEvent(f.name, func() error {
		n, err = f.testFile.WriteAt(p, off)
		return err
	})
	return n, err
}

// commitEvent asserts invariants 13 and 23 of what ends a journal.
func (c *crasher) commitEvent(name string, do func() error) error {
	before, journal := c.positions(), c.bytesOf(name)
	injected := c.errored
	err := do()
	if err == nil || c.stopped() {
		return err
	}
	c.count("failed commit events")
	if now := c.positions(); now != before {
		c.fatalf("invariant 13: %s failed with %v, and moved positions from %s to %s", name, err, before, now)
	}
	if !bytes.Equal(journal, c.bytesOf(name)) {
		c.fatalf("invariant 13: %s failed with %v, and is another", name, err)
	}
	if errors.Is(err, syscall.ENOSPC) && !injected && !c.errored {
		c.fatalf("invariant 23: %s meets a full disk: %v", name, err)
	}
	return err
}

func (c *crasher) positions() string {
	var b strings.Builder
	for _, db := range c.st.all() {
		if pos := db.Place().Pos; !pos.IsZero() {
			fmt.Fprint(&b, db.name, " ", pos, "; ")
		}
	}
	return b.String()
}

func (c *crasher) bytesOf(name string) []byte {
	n, err := c.st.Lookup(name)
	if err != nil {
		return nil
	}
	h, err := n.Open(false)
	if err != nil {
		return nil
	}
	defer h.Release()
	b := make([]byte, n.Attr().Size)
	_, _ = h.ReadAt(b, 0)
	return b
}
