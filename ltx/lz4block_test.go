package ltx

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/pierrec/lz4/v4"
)

// checkBlock checks that a page survives compression, within the bound.
func checkBlock(t testing.TB, c *compressor, page []byte) []byte {
	t.Helper()
	block := c.appendBlock([]byte("before"), page)[len("before"):]
	if len(block) > maxBlockSize(uint32(len(page))) {
		t.Fatalf("%d bytes give a block of %d", len(page), len(block))
	}
	back := make([]byte, len(page))
	if err := inflate(block, back); err != nil || !bytes.Equal(back, page) {
		t.Fatalf("%d bytes come back different: %v", len(page), err)
	}
	return block
}

func TestCompressor(t *testing.T) {
	var c compressor
	for size := 512; size <= MaxPageSize; size *= 2 {
		for seed := range uint64(20) {
			// A page of random pieces of earlier bytes, and random bytes.
			page := randomBytes(seed, size)
			r := randomBytes(seed+100, size)
			for i := 16; i+8 < size; i += 1 + int(r[i%size]) {
				n, from := min(1+int(r[i+1])*int(seed)/4, size-i), int(r[i+2])<<8|int(r[i+3])
				for k := range n {
					page[i+k] = page[from%i+k]
				}
				i += n
			}
			block := checkBlock(t, &c, page)
			if !bytes.Equal(block, new(compressor).appendBlock(nil, page)) {
				t.Fatalf("page size %d: the block depends on earlier pages", size)
			}
		}
		checkBlock(t, &c, make([]byte, size))
		checkBlock(t, &c, bytes.Repeat([]byte{1, 2, 3}, size)[:size])
		// All lengths of literals and matches around the limits of one byte.
		for n := range 600 {
			page := randomBytes(uint64(n), size)
			copy(page[min(n, size):], page)
			checkBlock(t, &c, page)
			copy(page[size/2:], page[:min(n, size/2)])
			checkBlock(t, &c, page)
		}
	}
	if got, limit := len(checkBlock(t, &c, make([]byte, 4096))), 30; got > limit {
		t.Errorf("4096 zeros give a block of %d bytes, want at most %d", got, limit)
	}
}

// FuzzCompressor compresses any page.
func FuzzCompressor(f *testing.F) {
	var c compressor
	f.Fuzz(func(t *testing.T, sizeLog uint8, b []byte) {
		page := make([]byte, 512<<(sizeLog%8))
		copy(page, b)
		checkBlock(t, &c, page)
		for i := 0; len(b) > 0 && i < len(page); i += len(b) {
			copy(page[i:], b)
		}
		checkBlock(t, &c, page)
	})
}

func BenchmarkCompressor(b *testing.B) {
	random := randomBytes(1, 4096)
	text := make([]byte, 0, 4096)
	for i := 0; len(text) < 3600; i++ {
		text = fmt.Appendf(text, "\x05\x17%d sensor-%d 2026-01-02T03:%02d:05Z %x", i, i%7, i%60, random[6*i:6*i+6])
	}
	text = append(text, make([]byte, 4096-len(text))...)
	for _, tc := range []struct {
		name string
		page []byte
	}{{"text", text}, {"random", random}, {"zeros", make([]byte, 4096)}} {
		b.Run("ours/"+tc.name, func(b *testing.B) {
			var c compressor
			dst := make([]byte, 0, 8192)
			b.SetBytes(4096)
			var n int
			for b.Loop() {
				n = len(c.appendBlock(dst, tc.page))
			}
			b.ReportMetric(float64(n), "blockbytes")
		})
		b.Run("lz4/"+tc.name, func(b *testing.B) {
			var c lz4.Compressor
			dst := make([]byte, 8192)
			b.SetBytes(4096)
			var n int
			for b.Loop() {
				n, _ = c.CompressBlock(tc.page, dst)
			}
			b.ReportMetric(float64(n), "blockbytes")
		})
	}
}
