package ltx

import (
	"errors"
	"fmt"
	"io"
)

// Compact writes to w one file that does what the files do one after the other.
// They are given in TXID order, and each begins at the position where the one
// before ends; if not, or if only some track checksums, the error is
// [ErrNotContiguous].
//
// The result has the first file's MinTXID and pre-apply checksum, and the last
// one's MaxTXID, page size, commit, timestamp and post-apply checksum. WAL
// fields and node id are 0. Of each page it has the newest copy that counts. A
// copy of page n counts if no later file
//
//   - has another page size, which replaces all pages;
//   - has a commit below n, which drops the page, even if a still later file
//     grows the database again. Commit 0 drops all.
//
// Whatever the database grew by, or was replaced by, since its smallest commit
// must therefore be in the files. If a page is missing the error is
// [ErrCorrupt].
//
// All files are read to their end and verified, also those of which no page
// counts. On error what was written is void. LZ4 blocks are copied as they are.
// Memory is that of one Encoder, three pages, and for each file 1 KiB, or 5 KiB
// if it is no io.ByteReader; all files are read at once.
func Compact(w io.Writer, files ...io.Reader) (Header, Trailer, error) {
	if len(files) == 0 {
		return Header{}, Trailer{}, fmt.Errorf("%w: no file to compact", ErrInvalid)
	}
	c := compactor{in: make([]*compactInput, len(files))}
	for i, r := range files {
		in := &compactInput{dec: NewDecoder(r)}
		c.in[i] = in
		var err error
		if in.h, err = in.dec.DecodeHeader(); err != nil {
			return Header{}, Trailer{}, c.fileError(i, err)
		}
	}
	if err := c.plan(); err != nil {
		return Header{}, Trailer{}, err
	}
	t, err := c.run(NewEncoder(w))
	if err != nil {
		return Header{}, Trailer{}, err
	}
	return c.out, t, nil
}

type compactor struct {
	in    []*compactInput
	out   Header
	first int    // the first file of which pages may count
	floor uint32 // pages above it, up to out.Commit, must all be there
	heap  []int  // files with a page due, by number of that page, then of the file
}

type compactInput struct {
	dec   *Decoder
	h     Header
	pgno  uint32 // the page whose frame has begun
	limit uint32 // highest page that no later file drops
}

// plan decides from the headers what counts.
func (c *compactor) plan() error {
	n := len(c.in)
	for i := 1; i < n; i++ {
		a, b := c.in[i-1].h, c.in[i].h
		if b.MinTXID-1 != a.MaxTXID {
			return fmt.Errorf("%w: file %d ends with txid %s, file %d begins with %s", ErrNotContiguous, i-1, a.MaxTXID, i, b.MinTXID)
		}
		if a.Flags != b.Flags {
			return fmt.Errorf("%w: file %d has flags %#x, file %d has %#x", ErrNotContiguous, i-1, a.Flags, i, b.Flags)
		}
	}
	first, last := c.in[0].h, c.in[n-1].h
	c.out = Header{
		Flags:            last.Flags,
		PageSize:         last.PageSize,
		Commit:           last.Commit,
		MinTXID:          first.MinTXID,
		MaxTXID:          last.MaxTXID,
		Timestamp:        last.Timestamp,
		PreApplyChecksum: first.PreApplyChecksum,
	}
	c.first, c.floor = n, last.Commit
	for i := n - 1; i >= 0 && c.in[i].h.PageSize == last.PageSize; i-- {
		c.first = i
		c.floor = min(c.floor, c.in[i].h.Commit)
		c.in[i].limit = c.floor
	}
	if c.first > 0 {
		c.floor = 0
	}
	return nil
}

func (c *compactor) run(enc *Encoder) (Trailer, error) {
	if err := enc.EncodeHeader(c.out); err != nil {
		return Trailer{}, err
	}
	if err := c.drain(); err != nil {
		return Trailer{}, err
	}
	if err := c.merge(enc); err != nil {
		return Trailer{}, err
	}
	for i, in := range c.in {
		if err := in.dec.Close(); err != nil {
			return Trailer{}, c.fileError(i, err)
		}
		if i == 0 {
			continue
		}
		post := c.in[i-1].dec.Trailer().PostApplyChecksum
		if post != in.h.PreApplyChecksum {
			return Trailer{}, fmt.Errorf("%w: file %d ends with checksum %s, file %d begins with %s", ErrNotContiguous, i-1, post, i, in.h.PreApplyChecksum)
		}
	}
	return enc.Close(c.in[len(c.in)-1].dec.Trailer().PostApplyChecksum)
}

// drain reads the files of which no page counts.
func (c *compactor) drain() error {
	var buf, block []byte
	for i, in := range c.in[:c.first] {
		in.dec.block = block
		size := int(in.h.PageSize)
		buf = grow(buf[:0], size)
		for {
			if _, err := in.dec.DecodePage(buf[:size]); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return c.fileError(i, err)
			}
		}
		block, in.dec.block = in.dec.block, nil
	}
	return nil
}

// merge writes the pages of the other files.
func (c *compactor) merge(enc *Encoder) error {
	for i := c.first; i < len(c.in); i++ {
		if err := c.advance(i); err != nil {
			return err
		}
	}
	data := make([]byte, c.out.PageSize)
	var block []byte
	due := pageSequence{lock: LockPgno(c.out.PageSize), last: c.floor}
	for len(c.heap) > 0 {
		// Copies of a page come oldest first. What the newest leaves in data and
		// block is written.
		in := c.in[c.heap[0]]
		pgno := in.pgno
		for len(c.heap) > 0 && c.in[c.heap[0]].pgno == pgno {
			i := c.pop()
			in = c.in[i]
			in.dec.block = block
			if err := in.dec.frameBody(data); err != nil {
				return c.fileError(i, err)
			}
			block = in.dec.block
			if err := c.advance(i); err != nil {
				return err
			}
		}
		if pgno > in.limit {
			continue
		}
		if pgno > c.floor {
			if pgno != due.successor() {
				return c.missing(due.successor())
			}
			due.last = pgno
		}
		if err := enc.encodePage(pgno, data, in.dec.PageCRC(), block); err != nil {
			return err
		}
	}
	if due.last < c.out.Commit && due.successor() <= c.out.Commit {
		return c.missing(due.successor())
	}
	return nil
}

func (c *compactor) missing(pgno uint32) error {
	return fmt.Errorf("%w: no file has page %d, by which the database grew after it had %d pages", ErrCorrupt, pgno, c.floor)
}

func (c *compactor) fileError(i int, err error) error {
	return fmt.Errorf("compact: file %d: %w", i, err)
}

// advance begins the next frame of file i and puts the file on the heap, unless
// it has none.
func (c *compactor) advance(i int) (err error) {
	in := c.in[i]
	if in.pgno, err = in.dec.nextFrame(); errors.Is(err, io.EOF) {
		return nil
	} else if err != nil {
		return c.fileError(i, err)
	}
	c.heap = append(c.heap, i)
	for n := len(c.heap) - 1; n > 0 && c.less(n, (n-1)/2); n = (n - 1) / 2 {
		c.heap[n], c.heap[(n-1)/2] = c.heap[(n-1)/2], c.heap[n]
	}
	return nil
}

// pop takes the first file off the heap.
func (c *compactor) pop() int {
	first, last := c.heap[0], len(c.heap)-1
	c.heap[0] = c.heap[last]
	c.heap = c.heap[:last]
	for n := 0; ; {
		child := 2*n + 1
		if child >= last {
			return first
		}
		if child+1 < last && c.less(child+1, child) {
			child++
		}
		if !c.less(child, n) {
			return first
		}
		c.heap[n], c.heap[child] = c.heap[child], c.heap[n]
		n = child
	}
}

func (c *compactor) less(a, b int) bool {
	a, b = c.heap[a], c.heap[b]
	if c.in[a].pgno != c.in[b].pgno {
		return c.in[a].pgno < c.in[b].pgno
	}
	return a < b
}
