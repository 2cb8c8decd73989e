package sparse

import "slices"

// chunkBlocks is how many neighbouring spilled blocks share an entry: a file of
// 1 GB beyond the budget costs half a megabyte.
const chunkBlocks = 64

// blocks are the aligned pieces of a File that were written: those in memory,
// and those in the spill file, at their own offset there, of which only the masks
// are kept. A mask has a bit for each sector that was written, bit 0 the first;
// no block's is 0.
type blocks struct {
	near map[int64]*block
	far  map[int64]*chunk // by key / chunkBlocks; nil until a block is spilled
	farN int              // blocks in far
}

type block struct {
	mem  *[BlockSize]byte
	mask uint8
}

type chunk struct {
	mask [chunkBlocks]uint8
	n    int // that are not 0
}

func (b *blocks) len() int { return len(b.near) + b.farN }

// get returns the memory, nil if it is spilled, and the mask, 0 if there is no
// such block.
func (b *blocks) get(key int64) (mem *[BlockSize]byte, mask uint8) {
	if x := b.near[key]; x != nil {
		return x.mem, x.mask
	}
	if c := b.far[key/chunkBlocks]; c != nil {
		return nil, c.mask[key%chunkBlocks]
	}
	return nil, 0
}

// set makes or changes a block. mask is not 0; a block that is there keeps its
// place.
func (b *blocks) set(key int64, mem *[BlockSize]byte, mask uint8) {
	if mem != nil {
		if x := b.near[key]; x != nil {
			x.mask = mask
		} else {
			b.near[key] = &block{mem, mask}
		}
		return
	}
	if b.far == nil {
		b.far = make(map[int64]*chunk)
	}
	c := b.far[key/chunkBlocks]
	if c == nil {
		c = new(chunk)
		b.far[key/chunkBlocks] = c
	}
	if c.mask[key%chunkBlocks] == 0 {
		c.n++
		b.farN++
	}
	c.mask[key%chunkBlocks] = mask
}

// drop forgets a block; its memory is the caller's.
func (b *blocks) drop(key int64) {
	if b.near[key] != nil {
		delete(b.near, key)
		return
	}
	c := b.far[key/chunkBlocks]
	if c == nil || c.mask[key%chunkBlocks] == 0 {
		return
	}
	c.mask[key%chunkBlocks] = 0
	b.farN--
	if c.n--; c.n == 0 {
		delete(b.far, key/chunkBlocks)
	}
}

// dropFrom forgets the blocks from key on and hands their memory to put.
func (b *blocks) dropFrom(key int64, put func(*[BlockSize]byte)) {
	for k, x := range b.near {
		if k >= key {
			put(x.mem)
			delete(b.near, k)
		}
	}
	for i, c := range b.far {
		switch {
		case i*chunkBlocks >= key:
			b.farN -= c.n
			delete(b.far, i)
		case (i+1)*chunkBlocks > key:
			for k := key; k < (i+1)*chunkBlocks; k++ {
				b.drop(k)
			}
		}
	}
}

// each calls fn for every block, in no order.
func (b *blocks) each(fn func(key int64, mask uint8)) {
	for key, x := range b.near {
		fn(key, x.mask)
	}
	for i, c := range b.far {
		for k, mask := range c.mask {
			if mask != 0 {
				fn(i*chunkBlocks+int64(k), mask)
			}
		}
	}
}

// chunks returns, ascending, the numbers of the chunks that have blocks.
func (b *blocks) chunks() []int64 {
	list := make([]int64, 0, len(b.far)+len(b.near))
	for key := range b.near {
		list = append(list, key/chunkBlocks)
	}
	for i := range b.far {
		list = append(list, i)
	}
	slices.Sort(list)
	return slices.Compact(list)
}
