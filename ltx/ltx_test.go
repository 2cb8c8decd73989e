package ltx_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

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

func TestRoundTrip(t *testing.T) {
	for size := uint32(512); size <= 65536; size *= 2 {
		f := file{h: ltx.Header{PageSize: size, Commit: 9, MinTXID: 7, MaxTXID: 8, PreApplyChecksum: ltx.ChecksumFlag | 5}, post: ltx.ChecksumFlag | 6}
		for _, pgno := range []uint32{1, 2, 5, 9} {
			f.pages = append(f.pages, page(pgno, size, 1))
		}
		b := f.encode(t)
		got, err := decode(b)
		if err != nil {
			t.Fatal(err)
		}
		if got.h != f.h || got.post != f.post || len(got.pages) != len(f.pages) {
			t.Fatalf("got %+v, want %+v", got, f)
		}
		entries, trailer, err := ltx.ReadIndex(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		if _, want, err := ltx.Verify(bytes.NewReader(b)); err != nil || trailer != want {
			t.Fatalf("trailer %v, verify says %v, %v", trailer, want, err)
		}
		data := make([]byte, size)
		for i, e := range entries {
			if err := ltx.ReadPage(bytes.NewReader(b), e, size, data); err != nil {
				t.Fatal(err)
			}
			p := got.pages[i]
			if p.Pgno != f.pages[i].Pgno || p.CRC != f.pages[i].CRC || !bytes.Equal(p.Data, f.pages[i].Data) || e.Pgno != p.Pgno || !bytes.Equal(data, p.Data) {
				t.Fatalf("page %d differs", p.Pgno)
			}
		}
	}
}
