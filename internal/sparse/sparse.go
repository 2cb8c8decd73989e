// Package sparse keeps bytes that live no longer than the agent: overlays,
// journals, WALs and wal-indexes. They are in memory while one budget lasts,
// beyond it in files without a name in the data folder.
package sparse

import (
	"slices"
	"sync"
	"sync/atomic"

	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/sabotage"
)

// BlockSize is the unit of memory, SectorSize that of coverage, in bytes.
const (
	BlockSize  = 4096
	SectorSize = 512
)

// A Pool is the memory budget that all Files of a store share.
type Pool struct {
	budget int64                     // bytes; set by NewPool, then constant
	spill  func() (disk.File, error) // makes a file without a name
	used   atomic.Int64              // bytes in memory
	mu     sync.Mutex                // guards free
	free   []*[BlockSize]byte        // blocks for reuse
}

// maxFree bounds the blocks that are kept for reuse: 1 MiB.
const maxFree = 256

// NewPool makes a pool of budget bytes; spill makes the file for what is beyond.
func NewPool(budget int64, spill func() (disk.File, error)) *Pool {
	return &Pool{budget: budget, spill: spill}
}

// Used returns the bytes held in memory.
func (p *Pool) Used() int64 { return p.used.Load() }

func (p *Pool) get() *[BlockSize]byte {
	if p.used.Add(BlockSize) > p.budget && !sabotage.On(sabotage.Budget) {
		p.used.Add(-BlockSize)
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.free); n > 0 {
		b := p.free[n-1]
		p.free = p.free[:n-1]
		clear(b[:])
		return b
	}
	return new([BlockSize]byte)
}

// Tidy lets the blocks go that are kept for reuse.
func (p *Pool) Tidy() {
	p.mu.Lock()
	p.free = nil
	p.mu.Unlock()
}

func (p *Pool) put(b *[BlockSize]byte) {
	p.used.Add(-BlockSize)
	p.mu.Lock()
	if len(p.free) < maxFree {
		p.free = append(p.free, b)
	}
	p.mu.Unlock()
}

// A File is a sparse file. What was never written is a hole, and File knows
// which sectors are. It is safe for concurrent use; no read waits for a disk
// with the lock held.
type File struct {
	pool *Pool

	mu     sync.RWMutex // guards all below; not held over reads of spilled blocks
	blocks blocks
	size   int64
	gen    uint64 // counts removals of blocks, for reads without the lock
	disk   disk.File
}

// NewFile makes an empty file.
func (p *Pool) NewFile() *File { return &File{pool: p, blocks: blocks{near: make(map[int64]*block)}} }

// Size returns the size in bytes.
func (f *File) Size() int64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.size
}

// Len returns the bytes of blocks held, in memory or spilled.
func (f *File) Len() int64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return int64(f.blocks.len()) * BlockSize
}

// WriteAt writes p at off and extends the size. The rest of a sector that p
// covers in part and that is a hole is filled by under, which must fill its
// whole argument; a nil under leaves zeros. After an error (a full disk) the
// file may hold a part of p.
func (f *File) WriteAt(p []byte, off int64, under func(p []byte, off int64) error) error {
	if len(p) == 0 {
		return nil
	}
	if under != nil {
		if err := f.fillEdges(off, int64(len(p)), under); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	end := off + int64(len(p))
	for len(p) > 0 {
		n, err := f.writeBlock(p, off)
		if err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	f.size = max(f.size, end)
	return nil
}

// fillEdges makes sure that the sectors which [off, off+n) covers in part hold
// what lies under them.
func (f *File) fillEdges(off, n int64, under func([]byte, int64) error) error {
	edges := [2]int64{-1, -1}
	if off%SectorSize != 0 {
		edges[0] = off &^ (SectorSize - 1)
	}
	if end := off + n; end%SectorSize != 0 {
		edges[1] = end &^ (SectorSize - 1)
	}
	for _, s := range edges {
		if s < 0 || f.Covered(s, SectorSize) {
			continue
		}
		var buf [SectorSize]byte
		if err := under(buf[:], s); err != nil {
			return err
		}
		f.mu.Lock()
		size := f.size
		_, err := f.writeBlock(buf[:], s)
		f.size = size
		f.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

func (f *File) writeBlock(p []byte, off int64) (int, error) {
	key, in := off/BlockSize, off%BlockSize
	n := min(int64(len(p)), BlockSize-in)
	mem, mask := f.blocks.get(key)
	if mask == 0 {
		if mem = f.pool.get(); mem == nil {
			if err := f.openSpill(); err != nil {
				return 0, err
			}
			// The spill file may hold bytes of a block that was dropped.
			var zero [BlockSize]byte
			if _, err := f.disk.WriteAt(zero[:], key*BlockSize); err != nil {
				return 0, err
			}
		}
	}
	if mem != nil {
		copy(mem[in:], p[:n])
	} else if _, err := f.disk.WriteAt(p[:n], off); err != nil {
		return 0, err
	}
	for s := in / SectorSize; s <= (in+n-1)/SectorSize; s++ {
		mask |= 1 << s
	}
	f.blocks.set(key, mem, mask)
	return int(n), nil
}

func (f *File) openSpill() (err error) {
	if f.disk == nil {
		f.disk, err = f.pool.spill()
	}
	return err
}

// ReadAt implements io.ReaderAt: holes are zeros, and io.EOF is never returned:
// the part of p beyond the size is zeroed too.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	err := f.Read(p, off, func(q []byte, _ int64) error {
		clear(q)
		return nil
	})
	return len(p), err
}

// Read fills p from off: what is covered from this file, every run of holes by
// a call of under, made without a lock.
func (f *File) Read(p []byte, off int64, under func(p []byte, off int64) error) error {
	for {
		holes, spilled, gen, d := f.readMemory(p, off)
		ok := true
		for _, r := range spilled {
			if _, err := d.ReadAt(p[r.from-off:r.to-off], r.from); err != nil {
				f.mu.RLock()
				ok = f.gen == gen
				f.mu.RUnlock()
				if ok {
					return err
				}
				break
			}
		}
		if ok && len(spilled) > 0 {
			f.mu.RLock()
			ok = f.gen == gen
			f.mu.RUnlock()
		}
		if !ok {
			continue // a block was dropped meanwhile: look again
		}
		for _, r := range holes {
			if err := under(p[r.from-off:r.to-off], r.from); err != nil {
				return err
			}
		}
		return nil
	}
}

type extent struct{ from, to int64 }

func addExtent(list []extent, from, to int64) []extent {
	if n := len(list); n > 0 && list[n-1].to == from {
		list[n-1].to = to
		return list
	}
	return append(list, extent{from, to})
}

func (f *File) readMemory(p []byte, off int64) (holes, spilled []extent, gen uint64, d disk.File) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	end := off + int64(len(p))
	if f.blocks.len() == 0 {
		return addExtent(nil, off, end), nil, f.gen, nil
	}
	for at := off; at < end; {
		key := at / BlockSize
		blockEnd := min(end, (key+1)*BlockSize)
		mem, mask := f.blocks.get(key)
		if mask == 0 {
			holes = addExtent(holes, at, blockEnd)
			at = blockEnd
			continue
		}
		for at < blockEnd {
			sector := (at % BlockSize) / SectorSize
			to := min(blockEnd, (at/SectorSize+1)*SectorSize)
			switch {
			case mask&(1<<sector) == 0:
				holes = addExtent(holes, at, to)
			case mem == nil:
				spilled = addExtent(spilled, at, to)
			default:
				copy(p[at-off:to-off], mem[at%BlockSize:])
			}
			at = to
		}
	}
	return holes, spilled, f.gen, f.disk
}

// Covered reports whether every sector of [off, off+n) was written.
func (f *File) Covered(off, n int64) bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.each(off, n, func(set bool) bool { return set })
}

// Touches reports whether any sector of [off, off+n) was written.
func (f *File) Touches(off, n int64) bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return !f.each(off, n, func(set bool) bool { return !set })
}

func (f *File) each(off, n int64, ok func(set bool) bool) bool {
	for at := off &^ (SectorSize - 1); at < off+n; at += SectorSize {
		_, mask := f.blocks.get(at / BlockSize)
		if !ok(mask&(1<<(at%BlockSize/SectorSize)) != 0) {
			return false
		}
	}
	return true
}

// Truncate sets the size and forgets what lies beyond it: holes again.
func (f *File) Truncate(size int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if size < f.size || size == 0 {
		f.dropFrom(size)
	}
	f.size = size
	return nil
}

// DropFrom forgets the sectors from off on, and leaves the size.
func (f *File) DropFrom(off int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dropFrom(off)
}

func (f *File) dropFrom(off int64) {
	f.gen++
	first := off / BlockSize
	in := off % BlockSize
	from := first
	if in != 0 {
		from++
	}
	f.blocks.dropFrom(from, f.pool.put)
	mem, mask := f.blocks.get(first)
	if mask == 0 {
		return
	}
	if mem != nil {
		clear(mem[in:])
	} else if f.disk != nil {
		// Best effort: the mask hides whole sectors, the cut one is zeroed here.
		zero := make([]byte, BlockSize-in)
		_, _ = f.disk.WriteAt(zero, off)
	}
	keep := (in + SectorSize - 1) / SectorSize
	if mask &= 1<<keep - 1; mask == 0 {
		f.blocks.drop(first)
		if mem != nil {
			f.pool.put(mem)
		}
		return
	}
	f.blocks.set(first, mem, mask)
}

// Reset makes the file empty and gives its memory and its spill file back.
func (f *File) Reset() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.gen++
	f.blocks.dropFrom(0, f.pool.put)
	f.size = 0
	if f.disk != nil {
		// A reader may still be inside: the file goes when the last reference does.
		d := f.disk
		f.disk = nil
		_ = d.Truncate(0)
		_ = d.Close()
	}
}

// Pages returns, ascending, the numbers (from 1) of the pages of pageSize bytes
// of which at least one sector was written.
func (f *File) Pages(pageSize uint32) []uint32 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	var list []uint32
	f.blocks.each(func(key int64, mask uint8) {
		at := key * BlockSize
		if pageSize >= BlockSize {
			list = append(list, uint32(at/int64(pageSize))+1)
			return
		}
		per := int64(pageSize / SectorSize)
		for s := int64(0); s < BlockSize/SectorSize; s += per {
			if mask>>s&(1<<per-1) != 0 {
				list = append(list, uint32((at+s*SectorSize)/int64(pageSize))+1)
			}
		}
	})
	slices.Sort(list)
	return slices.Compact(list)
}

// Runs calls fn for each run of written sectors, ascending; fn gets the offset
// and at most one block's bytes, valid during the call.
func (f *File) Runs(fn func(p []byte, off int64) error) error {
	f.mu.RLock()
	chunks := f.blocks.chunks()
	f.mu.RUnlock()
	buf := make([]byte, BlockSize)
	for _, c := range chunks {
		for key := c * chunkBlocks; key < (c+1)*chunkBlocks; key++ {
			if err := f.runsOf(key, buf, fn); err != nil {
				return err
			}
		}
	}
	return nil
}

// runsOf is Runs of one block; buf is one block's room.
func (f *File) runsOf(key int64, buf []byte, fn func(p []byte, off int64) error) error {
	f.mu.RLock()
	_, mask := f.blocks.get(key)
	f.mu.RUnlock()
	if mask == 0 {
		return nil
	}
	if _, err := f.ReadAt(buf, key*BlockSize); err != nil {
		return err
	}
	for s := 0; s < 8; {
		if mask&(1<<s) == 0 {
			s++
			continue
		}
		e := s
		for e < 8 && mask&(1<<e) != 0 {
			e++
		}
		if err := fn(buf[s*SectorSize:e*SectorSize], key*BlockSize+int64(s)*SectorSize); err != nil {
			return err
		}
		s = e
	}
	return nil
}
