package ltx_test

import (
	"bytes"
	"fmt"
	"hash/crc64"
	"io"
	"testing"

	"github.com/litefs-agent/litefs-agent/ltx"
)

func BenchmarkCRC64(b *testing.B) {
	table := crc64.MakeTable(crc64.ISO)
	for _, n := range []int{16, 100, 512, 4096, 65536} {
		data := randomBytes(1, n)
		b.Run(fmt.Sprintf("stdlib/%d", n), func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				sink = crc64.Update(0, table, data)
			}
		})
		b.Run(fmt.Sprintf("ours/%d", n), func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				sink = ltx.CRC64(0, data)
			}
		})
	}
}

func BenchmarkPageChecksumFromCRC(b *testing.B) {
	for b.Loop() {
		sink = uint64(ltx.PageChecksumFromCRC(7, 4096, sink))
	}
}

var sink uint64

// likePage makes a page that compresses about as rows of text and numbers do.
func likePage(pgno, size uint32) ltx.Page {
	var buf bytes.Buffer
	for i := 0; buf.Len() < int(size); i++ {
		fmt.Fprintf(&buf, "\x05\x17%d sensor-%d 2026-01-02T03:%02d:05Z %x", i, pgno%7, i%60, randomBytes(byte(i), 6))
	}
	data := buf.Bytes()[:size]
	return ltx.Page{Pgno: pgno, Data: data, CRC: ltx.PageCRC(data)}
}

func likeFile(txid ltx.TXID, pgnos ...uint32) file {
	f := tx(txid, ltx.Checksum(txid), ltx.Checksum(txid+1), 4096, 100_000)
	for _, pgno := range pgnos {
		f.pages = append(f.pages, likePage(pgno, 4096))
	}
	return f
}

func BenchmarkAppendFile(b *testing.B) {
	for _, f := range []file{likeFile(5, 7), likeFile(5, 1, 7)} {
		b.Run(fmt.Sprintf("pages=%d", len(f.pages)), func(b *testing.B) {
			dst := make([]byte, 0, ltx.MaxFileSize(4096, len(f.pages)))
			b.ReportAllocs()
			b.SetBytes(int64(len(f.pages)) * 4096)
			for b.Loop() {
				out, err := ltx.AppendFile(dst, f.h, f.pages, f.post)
				if err != nil {
					b.Fatal(err)
				}
				sink = uint64(len(out))
			}
			b.ReportMetric(float64(sink), "filebytes")
		})
	}
}

func manyPages(from, step, n uint32) (pgnos []uint32) {
	for i := range n {
		pgnos = append(pgnos, from+i*step)
	}
	return pgnos
}

func BenchmarkDecode(b *testing.B) {
	raw := likeFile(5, manyPages(1, 1, 100)...).encode(b)
	data, r := make([]byte, 4096), bytes.NewReader(nil)
	dec := ltx.NewDecoder(r)
	b.ReportAllocs()
	b.SetBytes(100 * 4096)
	for b.Loop() {
		r.Reset(raw)
		dec.Reset(r)
		if _, err := dec.DecodeHeader(); err != nil {
			b.Fatal(err)
		}
		for {
			if _, err := dec.DecodePage(data); err == io.EOF {
				break
			} else if err != nil {
				b.Fatal(err)
			}
		}
		if err := dec.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCompact compacts 16 files of 32 pages each, of which half are
// overwritten by the next.
func BenchmarkCompact(b *testing.B) {
	var raw [][]byte
	for i := range uint32(16) {
		raw = append(raw, likeFile(ltx.TXID(5+i), manyPages(1+16*i, 1, 32)...).encode(b))
	}
	b.ReportAllocs()
	b.SetBytes(16 * 32 * 4096)
	for b.Loop() {
		var in []io.Reader
		for _, f := range raw {
			in = append(in, bytes.NewReader(f))
		}
		if _, _, err := ltx.Compact(io.Discard, in...); err != nil {
			b.Fatal(err)
		}
	}
}

// TestAppendFileAllocates checks that the hot path does not.
func TestAppendFileAllocates(t *testing.T) {
	f := likeFile(5, 1, 7)
	dst := make([]byte, 0, ltx.MaxFileSize(4096, 2))
	n := testing.AllocsPerRun(100, func() {
		if _, err := ltx.AppendFile(dst, f.h, f.pages, f.post); err != nil {
			t.Fatal(err)
		}
	})
	if n >= 1 { // below 1: the pool was emptied by a collection
		t.Errorf("got %v allocations, want 0", n)
	}
}
