package ltx_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/litefs-agent/litefs-agent/ltx"
)

// A file is an LTX file taken apart.
type file struct {
	h     ltx.Header
	pages []ltx.Page
	post  ltx.Checksum
}

// encode makes f with an Encoder and checks that AppendFile makes the same.
func (f file) encode(t testing.TB) []byte {
	t.Helper()
	var buf bytes.Buffer
	enc := ltx.NewEncoder(&buf)
	if err := enc.EncodeHeader(f.h); err != nil {
		t.Fatal(err)
	}
	for _, p := range f.pages {
		if err := enc.EncodePage(p.Pgno, p.Data); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := enc.Close(f.post); err != nil {
		t.Fatal(err)
	}
	if enc.N() != int64(buf.Len()) {
		t.Fatalf("N: got %d, want %d", enc.N(), buf.Len())
	}
	b, err := ltx.AppendFile([]byte("before"), f.h, f.pages, f.post)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b[len("before"):], buf.Bytes()) {
		t.Fatal("AppendFile and Encoder differ")
	}
	if limit := ltx.MaxFileSize(f.h.PageSize, len(f.pages)); int64(buf.Len()) > limit {
		t.Fatalf("file has %d bytes, MaxFileSize says %d", buf.Len(), limit)
	}
	return buf.Bytes()
}

// decode takes b apart, by stream and by index, which must agree.
func decode(b []byte) (f file, err error) {
	dec := ltx.NewDecoder(bytes.NewReader(b))
	if f.h, err = dec.DecodeHeader(); err != nil {
		return f, err
	}
	for {
		data := make([]byte, f.h.PageSize)
		pgno, err := dec.DecodePage(data)
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return f, err
		}
		f.pages = append(f.pages, ltx.Page{Pgno: pgno, Data: data, CRC: dec.PageCRC()})
	}
	if err := dec.Close(); err != nil {
		return f, err
	}
	f.post = dec.Trailer().PostApplyChecksum
	return f, nil
}

// page makes a page of which half compresses.
func page(pgno, size uint32, seed uint64) ltx.Page {
	data := make([]byte, size)
	r := rand.NewPCG(seed, uint64(pgno))
	for i := range data[:size/2] {
		data[i] = byte(r.Uint64())
	}
	return ltx.Page{Pgno: pgno, Data: data, CRC: ltx.PageCRC(data)}
}

// mustEqual fails unless got is f.
func (f file) mustEqual(t testing.TB, got file) {
	t.Helper()
	if got.h != f.h || got.post != f.post || len(got.pages) != len(f.pages) {
		t.Fatalf("got %+v, %s, %d pages; want %+v, %s, %d pages", got.h, got.post, len(got.pages), f.h, f.post, len(f.pages))
	}
	for i, p := range f.pages {
		if q := got.pages[i]; q.Pgno != p.Pgno || q.CRC != p.CRC || !bytes.Equal(q.Data, p.Data) {
			t.Fatalf("page %d: got page %d, or other content", p.Pgno, q.Pgno)
		}
	}
}

// checkIndex checks that the index of b finds the pages of f.
func checkIndex(t testing.TB, b []byte, f file) {
	t.Helper()
	h, err := ltx.ReadHeader(bytes.NewReader(b))
	if err != nil || h != f.h {
		t.Fatalf("ReadHeader: got %+v, %v; want %+v", h, err, f.h)
	}
	entries, trailer, err := ltx.ReadIndex(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	if _, want, err := ltx.Verify(bytes.NewReader(b)); err != nil || trailer != want {
		t.Fatalf("ReadIndex: trailer %v; Verify: %v, %v", trailer, want, err)
	}
	if len(entries) != len(f.pages) {
		t.Fatalf("got %d entries, want %d", len(entries), len(f.pages))
	}
	data := make([]byte, h.PageSize)
	for i, e := range entries {
		if err := ltx.ReadPage(bytes.NewReader(b), e, h.PageSize, data); err != nil {
			t.Fatal(err)
		}
		if p := f.pages[i]; e.Pgno != p.Pgno || !bytes.Equal(data, p.Data) {
			t.Fatalf("entry %d: got page %d, or other content than page %d", i, e.Pgno, p.Pgno)
		}
	}
}

func TestRoundTrip(t *testing.T) {
	for size := uint32(512); size <= 65536; size *= 2 {
		lock := ltx.LockPgno(size)
		f := file{
			h:    ltx.Header{PageSize: size, Commit: lock + 2, MinTXID: 7, MaxTXID: 8, Timestamp: -1, PreApplyChecksum: ltx.ChecksumFlag | 5},
			post: ltx.ChecksumFlag | 6,
		}
		f.pages, _ = pagesOf(size, 1, 1, 2, 9, lock-1, lock+1, lock+2)
		copy(f.pages[1].Data, randomBytes(2, int(size))) // incompressible
		f.pages[1].CRC = ltx.PageCRC(f.pages[1].Data)
		b := f.encode(t)
		got, err := decode(b)
		if err != nil {
			t.Fatalf("page size %d: %v", size, err)
		}
		f.mustEqual(t, got)
		checkIndex(t, b, f)
		// A reader that gives a byte at a time, and no ReadByte.
		if _, _, err := ltx.Verify(iotest.OneByteReader(bytes.NewReader(b))); err != nil {
			t.Errorf("page size %d, byte by byte: %v", size, err)
		}
	}
}

// TestAppendFileParallel is for the race detector.
func TestAppendFileParallel(t *testing.T) {
	var wg sync.WaitGroup
	for i := range ltx.TXID(4) {
		f := tx(5+i, 0, 1, 4096, 9, 1, 2, 3)
		want := f.encode(t)
		wg.Go(func() {
			var b []byte
			for range 50 {
				var err error
				if b, err = ltx.AppendFile(b[:0], f.h, f.pages, f.post); err != nil || !bytes.Equal(b, want) {
					t.Errorf("txid %s: got another file, %v", f.h.MinTXID, err)
				}
			}
		})
	}
	wg.Wait()
}

func randomBytes(seed byte, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}
