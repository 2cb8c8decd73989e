package ltx_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/litefs-agent/litefs-agent/ltx"
)

// A database is the model that files are applied to.
type database struct {
	pageSize uint32
	commit   uint32
	pos      ltx.Pos
	pages    map[uint32][]byte
}

func newDatabase(pageSize uint32) *database {
	return &database{pageSize: pageSize, pages: map[uint32][]byte{}}
}

func (d *database) clone() *database {
	c := *d
	c.pages = map[uint32][]byte{}
	for k, v := range d.pages {
		c.pages[k] = v
	}
	return &c
}

func (d *database) checksum() ltx.Checksum {
	var sum ltx.Checksum
	for pgno, data := range d.pages {
		sum ^= ltx.PageChecksum(pgno, data)
	}
	return sum | ltx.ChecksumFlag
}

// apply applies f and returns whether the result is what f promises.
func (d *database) apply(f file) bool {
	if f.h.PageSize != d.pageSize {
		d.pages, d.pageSize = map[uint32][]byte{}, f.h.PageSize
	}
	for _, p := range f.pages {
		d.pages[p.Pgno] = p.Data
	}
	for pgno := range d.pages {
		if pgno > f.h.Commit {
			delete(d.pages, pgno)
		}
	}
	d.commit = f.h.Commit
	want := d.commit
	if lock := ltx.LockPgno(d.pageSize); want >= lock {
		want--
	}
	d.pos = ltx.Pos{TXID: f.h.MaxTXID, PostApplyChecksum: f.post}
	return f.post == d.checksum() && len(d.pages) == int(want)
}

// transaction changes d at random and returns what it did.
func (d *database) transaction(r *rand.Rand) file {
	f := file{h: ltx.Header{MinTXID: d.pos.TXID + 1, MaxTXID: d.pos.TXID + 1, PreApplyChecksum: d.pos.PostApplyChecksum, Timestamp: int64(r.IntN(1000)), NodeID: r.Uint64()}}
	size, commit := d.pageSize, d.commit
	switch n := r.IntN(20); {
	case d.commit == 0 || n == 0: // created, or another page size
		size, commit = 512<<r.IntN(3), uint32(1+r.IntN(20))
	case n == 1: // drop
		commit = 0
	case n < 5:
		commit = uint32(1 + r.IntN(20))
	}
	f.h.PageSize, f.h.Commit = size, commit
	for pgno := uint32(1); pgno <= commit; pgno++ {
		if size != d.pageSize || pgno > d.commit || r.IntN(5) == 0 {
			f.pages = append(f.pages, page(pgno, size, r.Uint64()))
		}
	}
	after := d.clone()
	f.post = ltx.ChecksumFlag // so that the first apply has one
	after.apply(f)
	f.post = after.checksum()
	*d = *after
	d.pos.PostApplyChecksum = f.post
	return f
}

func compact(files ...[]byte) ([]byte, error) {
	var in []io.Reader
	for _, b := range files {
		in = append(in, bytes.NewReader(b))
	}
	var out bytes.Buffer
	_, _, err := ltx.Compact(&out, in...)
	return out.Bytes(), err
}

// TestCompactModel checks that a compacted file does what its files did, for
// every range of random histories with drops and page-size changes, and that
// compacting in two steps gives the same bytes.
func TestCompactModel(t *testing.T) {
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 1))
		d := newDatabase(512)
		states, raw := []*database{d.clone()}, [][]byte{}
		for range 12 {
			f := d.transaction(r)
			raw = append(raw, f.encode(t))
			states = append(states, d.clone())
		}
		for i := range raw {
			for j := i + 1; j <= len(raw); j++ {
				out, err := compact(raw[i:j]...)
				if err != nil {
					t.Fatalf("seed %d, files %d to %d: %v", seed, i, j, err)
				}
				f, err := decode(out)
				if err != nil {
					t.Fatalf("seed %d, files %d to %d: %v", seed, i, j, err)
				}
				got := states[i].clone()
				if !got.apply(f) || got.pos != states[j].pos {
					t.Fatalf("seed %d, files %d to %d: got %s, want %s", seed, i, j, got.pos, states[j].pos)
				}
				if mid := i + (j-i)/2; mid > i {
					a, err1 := compact(raw[i:mid]...)
					b, err2 := compact(raw[mid:j]...)
					two, err3 := compact(a, b)
					if err := errors.Join(err1, err2, err3); err != nil || !bytes.Equal(two, out) {
						t.Fatalf("seed %d, files %d to %d by way of %d differ: %v", seed, i, j, mid, err)
					}
				}
			}
		}
	}
}

// tx makes a transaction of one TXID; sums are numbers under the flag.
func tx(txid ltx.TXID, pre, post ltx.Checksum, size, commit uint32, pgnos ...uint32) file {
	f := file{h: ltx.Header{PageSize: size, Commit: commit, MinTXID: txid, MaxTXID: txid, PreApplyChecksum: pre | ltx.ChecksumFlag}, post: post | ltx.ChecksumFlag}
	f.pages, _ = pagesOf(size, uint64(txid), pgnos...)
	return f
}

func TestCompactCounts(t *testing.T) {
	lock := ltx.LockPgno(512)
	for _, tc := range []struct {
		name  string
		files []file
		want  map[uint32]ltx.TXID // who wrote each page of the result
		err   error
	}{
		{name: "newest copy", files: []file{tx(5, 0, 1, 512, 9, 1, 2, 3), tx(6, 1, 2, 512, 9, 2, 4), tx(7, 2, 3, 512, 9, 1)}, want: map[uint32]ltx.TXID{1: 7, 2: 6, 3: 5, 4: 6}},
		{name: "shrunk", files: []file{tx(5, 0, 1, 512, 9, 1, 8), tx(6, 1, 2, 512, 7, 2)}, want: map[uint32]ltx.TXID{1: 5, 2: 6}},
		{name: "shrunk and grown", files: []file{tx(5, 0, 1, 512, 9, 1, 8), tx(6, 1, 2, 512, 7, 2), tx(7, 2, 3, 512, 8, 8)}, want: map[uint32]ltx.TXID{1: 5, 2: 6, 8: 7}},
		{name: "grown without its page", files: []file{tx(5, 0, 1, 512, 9, 1, 8, 9), tx(6, 1, 2, 512, 7, 2), tx(7, 2, 3, 512, 9, 8)}, err: ltx.ErrCorrupt},
		{name: "grown over the lock page", files: []file{tx(5, 0, 1, 512, lock-2, 1), tx(6, 1, 2, 512, lock+1, lock-1, lock+1)}, want: map[uint32]ltx.TXID{1: 5, lock - 1: 6, lock + 1: 6}},
		{name: "grown to the lock page", files: []file{tx(5, 0, 1, 512, lock-1, 1), tx(6, 1, 2, 512, lock, 2)}, want: map[uint32]ltx.TXID{1: 5, 2: 6}},
		{name: "drop", files: []file{tx(5, 0, 1, 512, 9, 1, 8), tx(6, 1, 0, 512, 0)}, want: map[uint32]ltx.TXID{}},
		{name: "drop and again", files: []file{tx(5, 0, 1, 512, 9, 1, 8), tx(6, 1, 0, 512, 0), tx(7, 0, 1, 512, 2, 1, 2)}, want: map[uint32]ltx.TXID{1: 7, 2: 7}},
		{name: "drop and half of it again", files: []file{tx(5, 0, 1, 512, 9, 1, 2), tx(6, 1, 0, 512, 0), tx(7, 0, 1, 512, 2, 1)}, err: ltx.ErrCorrupt},
		{name: "page size", files: []file{tx(5, 0, 1, 512, 9, 1, 8), tx(6, 1, 2, 1024, 2, 1, 2), tx(7, 2, 3, 1024, 2, 2)}, want: map[uint32]ltx.TXID{1: 6, 2: 7}},
		{name: "page size there and back", files: []file{tx(5, 0, 1, 512, 2, 1, 2), tx(6, 1, 2, 1024, 2, 1, 2), tx(7, 2, 3, 512, 1, 1)}, want: map[uint32]ltx.TXID{1: 7}},
		{name: "page size without all pages", files: []file{tx(5, 0, 1, 512, 9, 1, 8), tx(6, 1, 2, 1024, 2, 2)}, err: ltx.ErrCorrupt},
		{name: "gap", files: []file{tx(5, 0, 1, 512, 9, 1), tx(7, 1, 2, 512, 9, 2)}, err: ltx.ErrNotContiguous},
		{name: "same again", files: []file{tx(5, 0, 1, 512, 9, 1), tx(5, 0, 1, 512, 9, 1)}, err: ltx.ErrNotContiguous},
		{name: "other history", files: []file{tx(5, 0, 1, 512, 9, 1), tx(6, 2, 3, 512, 9, 2)}, err: ltx.ErrNotContiguous},
		{name: "none", err: ltx.ErrInvalid},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var raw [][]byte
			for _, f := range tc.files {
				raw = append(raw, f.encode(t))
			}
			b, err := compact(raw...)
			if tc.err != nil {
				if !errors.Is(err, tc.err) {
					t.Fatalf("got %v, want %v", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := decode(b)
			if err != nil {
				t.Fatal(err)
			}
			checkIndex(t, b, got)
			last := tc.files[len(tc.files)-1]
			want := file{h: last.h, post: last.post}
			want.h.MinTXID, want.h.PreApplyChecksum = tc.files[0].h.MinTXID, tc.files[0].h.PreApplyChecksum
			if got.h != want.h || got.post != want.post || len(got.pages) != len(tc.want) {
				t.Errorf("got %+v, %d pages; want %+v, %d pages", got.h, len(got.pages), want.h, len(tc.want))
			}
			for _, p := range got.pages {
				if w := page(p.Pgno, last.h.PageSize, uint64(tc.want[p.Pgno])); !bytes.Equal(p.Data, w.Data) {
					t.Errorf("page %d is not that of txid %d", p.Pgno, tc.want[p.Pgno])
				}
			}
		})
	}
}

func TestCompactMixedFlags(t *testing.T) {
	a, b := tx(5, 0, 1, 512, 9, 1), tx(6, 0, 0, 512, 9, 1)
	b.h.Flags, b.h.PreApplyChecksum, b.post = ltx.FlagNoChecksum, 0, 0
	if _, err := compact(a.encode(t), b.encode(t)); !errors.Is(err, ltx.ErrNotContiguous) {
		t.Errorf("got %v, want ErrNotContiguous", err)
	}
}

// TestCompactVerifiesAll damages a file of which no page counts.
func TestCompactVerifiesAll(t *testing.T) {
	for i := range 3 {
		raw := [][]byte{tx(5, 0, 1, 512, 9, 1).encode(t), tx(6, 1, 2, 1024, 2, 1, 2).encode(t), tx(7, 2, 3, 1024, 2, 2).encode(t)}
		raw[i][len(raw[i])-1] ^= 1
		if _, err := compact(raw...); !errors.Is(err, ltx.ErrCorrupt) {
			t.Errorf("file %d damaged: got %v, want ErrCorrupt", i, err)
		}
	}
}
