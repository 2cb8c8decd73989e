package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/sabotage"
)

// inodes gives out st_ino values that never repeat over the life of the data
// folder (invariant 17): SQLite tells by them whether a path still leads to the
// file that it has open. They fit 31 bits; the bit above marks the journals of
// a database. Blocks are reserved in the file "inodes" ahead of use.
type inodes struct {
	fs disk.FS

	mu     sync.Mutex // guards all below; held over the disk once a block
	last   uint32
	limit  uint32 // exclusive; durable
	byName map[string]uint64
}

const (
	inodesName  = "inodes"
	inodesBlock = 1 << 16
	inodesMax   = 1<<31 - 1
)

func openInodes(fs disk.FS) (*inodes, error) {
	n := &inodes{fs: fs, byName: make(map[string]uint64)}
	b, err := disk.ReadFile(fs, inodesName, 64)
	switch {
	case errors.Is(err, os.ErrNotExist):
		n.last = 1
	case err != nil:
		return nil, fmt.Errorf("read %s: %w", inodesName, err)
	case len(b) != 4:
		return nil, fmt.Errorf("%s holds %d bytes, not 4: restore it or remove the data folder", inodesName, len(b))
	default:
		n.last = binary.BigEndian.Uint32(b)
	}
	if sabotage.On(sabotage.InodesKept) {
		n.last = 1
	}
	n.limit = n.last
	if err := n.reserve(); err != nil {
		return nil, err
	}
	return n, nil
}

func (n *inodes) reserve() error {
	if n.limit > inodesMax-2*inodesBlock {
		n.last, n.limit = 1, 1 // after two thousand million files the numbers start again
	}
	limit := n.limit + inodesBlock
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], limit)
	if err := disk.WriteFileAtomic(n.fs, inodesName, b[:]); err != nil {
		return fmt.Errorf("reserve inode numbers: %w", err)
	}
	n.limit = limit
	return nil
}

func (n *inodes) next() uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.last+1 >= n.limit {
		if err := n.reserve(); err != nil {
			// Better a number that may repeat after a crash than no file.
			n.limit += inodesBlock
		}
	}
	n.last++
	return uint64(n.last)
}

// forName returns one number for a path that has no node.
func (n *inodes) forName(name string) uint64 {
	n.mu.Lock()
	ino, ok := n.byName[name]
	n.mu.Unlock()
	if ok {
		return ino
	}
	ino = n.next()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.byName[name] = ino
	return ino
}
