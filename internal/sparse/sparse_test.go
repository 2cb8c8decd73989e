package sparse_test

import (
	"bytes"
	"flag"
	"math/rand/v2"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/internal/sparse"
)

var seeds = flag.Uint64("sparse.n", 200, "number of random stories of TestModel")

const space = 12 * sparse.BlockSize

// model is what a File must hold: bytes, and which sectors were written.
type model struct {
	data    [space]byte
	covered [space / sparse.SectorSize]bool
	size    int64
}

func (m *model) drop(off int64) {
	clear(m.data[off:])
	clear(m.covered[(off+sparse.SectorSize-1)/sparse.SectorSize:])
}

// lies is what is under the file.
func lies(p []byte, off int64) error {
	for i := range p {
		p[i] = byte((off + int64(i)) % 251)
	}
	return nil
}

func (m *model) write(p []byte, off int64, under bool) {
	for _, edge := range []int64{off, off + int64(len(p)) - 1} {
		s := edge / sparse.SectorSize
		if !m.covered[s] {
			sector := m.data[s*sparse.SectorSize:][:sparse.SectorSize]
			clear(sector)
			if under {
				_ = lies(sector, s*sparse.SectorSize)
			}
		}
	}
	copy(m.data[off:], p)
	for s := off / sparse.SectorSize; s*sparse.SectorSize < off+int64(len(p)); s++ {
		m.covered[s] = true
	}
	m.size = max(m.size, off+int64(len(p)))
}

func TestModel(t *testing.T) {
	for seed := range *seeds {
		story(t, seed)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// story does random calls on two files of one pool, one of which mostly spills.
func story(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 5))
	d := simdisk.New(simdisk.Options{Seed: seed})
	budget := int64(r.IntN(16)) * sparse.BlockSize
	pool := sparse.NewPool(budget, func() (disk.File, error) { return d.CreateTemp(".") })
	files := []*sparse.File{pool.NewFile(), pool.NewFile()}
	models := []*model{{}, {}}
	for range 120 {
		i := r.IntN(2)
		f, m := files[i], models[i]
		off := int64(r.IntN(space - 5000))
		if r.IntN(2) == 0 {
			off &^= sparse.SectorSize - 1
		}
		switch r.IntN(10) {
		case 0:
			if err := f.Truncate(off); err != nil {
				t.Fatal(err)
			}
			if off < m.size || off == 0 {
				m.drop(off)
			}
			m.size = off
		case 1:
			f.DropFrom(off)
			m.drop(off)
		case 2:
			f.Reset()
			*m = model{}
		default:
			p := make([]byte, 1+r.IntN(4999))
			for k := range p {
				p[k] = byte(r.Uint32())
			}
			under := r.IntN(2) == 0
			fn := lies
			if !under {
				fn = nil
			}
			if err := f.WriteAt(p, off, fn); err != nil {
				t.Fatal(err)
			}
			m.write(p, off, under)
		}
		if r.IntN(8) == 0 {
			compare(t, f, m)
		}
		if pool.Used() > budget {
			t.Fatalf("seed %d: %d bytes used of %d (invariant 22)", seed, pool.Used(), budget)
		}
	}
	for i, f := range files {
		compare(t, f, models[i])
		f.Reset()
	}
	if pool.Used() != 0 {
		t.Fatalf("seed %d: %d bytes used by empty files", seed, pool.Used())
	}
}

func compare(t *testing.T, f *sparse.File, m *model) {
	t.Helper()
	if f.Size() != m.size {
		t.Fatalf("size %d, want %d", f.Size(), m.size)
	}
	got, want := make([]byte, space), make([]byte, space)
	if err := f.Read(got, 0, lies); err != nil {
		t.Fatal(err)
	}
	_ = lies(want, 0)
	for s, c := range m.covered {
		at := int64(s) * sparse.SectorSize
		if c {
			copy(want[at:], m.data[at:at+sparse.SectorSize])
		}
		if f.Covered(at, sparse.SectorSize) != c || f.Touches(at, sparse.SectorSize) != c {
			t.Fatalf("sector %d covered %v, want %v", s, !c, c)
		}
	}
	if !bytes.Equal(got, want) {
		t.Fatal("content differs")
	}
	clear(want)
	err := f.Runs(func(p []byte, off int64) error {
		copy(want[off:], p)
		for at := off; at < off+int64(len(p)); at += sparse.SectorSize {
			if !m.covered[at/sparse.SectorSize] {
				t.Fatalf("a run covers sector %d, which was never written", at/sparse.SectorSize)
			}
		}
		if !bytes.Equal(p, m.data[off:off+int64(len(p))]) {
			t.Fatalf("run at %d differs", off)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []uint32{512, 4096, 16384} {
		have := map[uint32]bool{}
		for _, pgno := range f.Pages(size) {
			have[pgno] = true
		}
		for s, c := range m.covered {
			if pgno := uint32(int64(s)*sparse.SectorSize/int64(size)) + 1; c && !have[pgno] {
				t.Fatalf("page %d of %d bytes is missing", pgno, size)
			}
		}
	}
}

// A full disk under the spill file is an error, and what was there stays.
func TestSpillFull(t *testing.T) {
	d := simdisk.New(simdisk.Options{Capacity: 2 * sparse.BlockSize})
	pool := sparse.NewPool(0, func() (disk.File, error) { return d.CreateTemp(".") })
	f := pool.NewFile()
	page := bytes.Repeat([]byte{7}, sparse.BlockSize)
	for i := range int64(2) {
		if err := f.WriteAt(page, i*sparse.BlockSize, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.WriteAt(page, 5*sparse.BlockSize, nil); err == nil {
		t.Fatal("a write beyond the disk succeeded")
	}
	got := make([]byte, sparse.BlockSize)
	if _, err := f.ReadAt(got, sparse.BlockSize); err != nil || !bytes.Equal(got, page) {
		t.Fatalf("what was written before differs, %v", err)
	}
	if f.Size() != 2*sparse.BlockSize || f.Touches(5*sparse.BlockSize, sparse.BlockSize) {
		t.Fatalf("size %d after a failed write", f.Size())
	}
}
