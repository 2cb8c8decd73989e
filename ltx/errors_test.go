package ltx_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/litefs-agent/litefs-agent/ltx"
)

func TestText(t *testing.T) {
	pos := ltx.Pos{TXID: 0x65, PostApplyChecksum: 0x8b73bc1d07d84988}
	const text = "0000000000000065/8b73bc1d07d84988"
	if got := pos.String(); got != text {
		t.Errorf("Pos.String: got %s, want %s", got, text)
	}
	if got, err := ltx.ParsePos(text); err != nil || got != pos {
		t.Errorf("ParsePos: got %s, %v, want %s", got, err, pos)
	}
	if pos.IsZero() || !(ltx.Pos{}).IsZero() {
		t.Error("IsZero")
	}
	b, err := json.Marshal(pos)
	if err != nil || string(b) != `"`+text+`"` {
		t.Errorf("JSON: got %s, %v", b, err)
	}
	var back struct {
		Pos      ltx.Pos
		TXID     ltx.TXID
		Checksum ltx.Checksum
	}
	in := `{"Pos":"` + text + `","TXID":"0000000000000065","Checksum":"8b73bc1d07d84988"}`
	if err := json.Unmarshal([]byte(in), &back); err != nil || back.Pos != pos || back.TXID != pos.TXID || back.Checksum != pos.PostApplyChecksum {
		t.Errorf("from JSON: got %+v, %v", back, err)
	}
	for _, s := range []string{"", "/", text + "0", text[1:], strings.ToUpper(text), strings.Replace(text, "/", "-", 1), text[:16], "+00000000000065a/8b73bc1d07d84988", "0000000000000065/8b73bc1d07d8498g"} {
		if _, err := ltx.ParsePos(s); !errors.Is(err, ltx.ErrInvalid) {
			t.Errorf("ParsePos %q: got %v, want ErrInvalid", s, err)
		}
	}
}

func TestFilename(t *testing.T) {
	const name = "00000000000000ff-000000000000abcd.ltx"
	if got := ltx.FormatFilename(0xff, 0xabcd); got != name {
		t.Errorf("got %s, want %s", got, name)
	}
	if lo, hi, err := ltx.ParseFilename(name); err != nil || lo != 0xff || hi != 0xabcd {
		t.Errorf("got %s, %s, %v", lo, hi, err)
	}
	for _, s := range []string{"", ".ltx", name + "x", "x" + name, strings.ToUpper(name), "a/" + name,
		"0000000000000000-0000000000000001.ltx", "0000000000000002-0000000000000001.ltx", "00000000000000ff_000000000000abcd.ltx", "00000000000000ff-000000000000abcd.ltx.tmp"} {
		if _, _, err := ltx.ParseFilename(s); !errors.Is(err, ltx.ErrInvalid) {
			t.Errorf("ParseFilename %q: got %v, want ErrInvalid", s, err)
		}
	}
}

func TestHeaderValidate(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*ltx.Header)
		ok     bool
	}{
		{"good", func(h *ltx.Header) {}, true},
		{"negative time", func(h *ltx.Header) { h.Timestamp = -1 }, true},
		{"snapshot", func(h *ltx.Header) { h.MinTXID, h.PreApplyChecksum = 1, 0 }, true},
		{"snapshot with checksum", func(h *ltx.Header) { h.MinTXID = 1 }, false},
		{"no checksum flag", func(h *ltx.Header) { h.Flags, h.PreApplyChecksum = ltx.FlagNoChecksum, 0 }, true},
		{"no checksum flag, with one", func(h *ltx.Header) { h.Flags = ltx.FlagNoChecksum }, false},
		{"no checksum", func(h *ltx.Header) { h.PreApplyChecksum = 0 }, false},
		{"checksum without top bit", func(h *ltx.Header) { h.PreApplyChecksum = 7 }, false},
		{"flag 1", func(h *ltx.Header) { h.Flags = 1 }, false},
		{"page size 0", func(h *ltx.Header) { h.PageSize = 0 }, false},
		{"page size 256", func(h *ltx.Header) { h.PageSize = 256 }, false},
		{"page size 1000", func(h *ltx.Header) { h.PageSize = 1000 }, false},
		{"page size 131072", func(h *ltx.Header) { h.PageSize = 131072 }, false},
		{"min 0", func(h *ltx.Header) { h.MinTXID = 0 }, false},
		{"max below min", func(h *ltx.Header) { h.MaxTXID = 4 }, false},
		{"wal", func(h *ltx.Header) { h.WALOffset, h.WALSize, h.WALSalt1 = 32, 536, 1 }, true},
		{"wal size alone", func(h *ltx.Header) { h.WALSize = 1 }, false},
		{"salt alone", func(h *ltx.Header) { h.WALSalt2 = 1 }, false},
		{"negative wal offset", func(h *ltx.Header) { h.WALOffset = -1 }, false},
		{"negative wal size", func(h *ltx.Header) { h.WALOffset, h.WALSize = 32, -1 }, false},
	} {
		h := tx(5, 0, 1, 512, 9).h
		tc.change(&h)
		if err := h.Validate(); (err == nil) != tc.ok || !tc.ok && !errors.Is(err, ltx.ErrInvalid) {
			t.Errorf("%s: got %v", tc.name, err)
		}
		b, _ := h.MarshalBinary()
		var back ltx.Header
		if err := back.UnmarshalBinary(b); (err == nil) != tc.ok || !tc.ok && !errors.Is(err, ltx.ErrCorrupt) {
			t.Errorf("%s: UnmarshalBinary: got %v", tc.name, err)
		}
		if tc.ok && back != h {
			t.Errorf("%s: got %+v, want %+v", tc.name, back, h)
		}
	}
}

func TestEncoderErrors(t *testing.T) {
	lock := ltx.LockPgno(512)
	snapshot := func(commit uint32, pgnos ...uint32) file {
		f := file{h: ltx.Header{PageSize: 512, Commit: commit, MinTXID: 1, MaxTXID: 1}}
		f.pages, f.post = pagesOf(512, 1, pgnos...)
		return f
	}
	with := func(f file, change func(*file)) file { change(&f); return f }
	for _, tc := range []struct {
		name string
		f    file
		want error
	}{
		{"good", tx(5, 0, 1, 512, 9, 1, 2), nil},
		{"good snapshot", snapshot(2, 1, 2), nil},
		{"header", with(tx(5, 0, 1, 512, 9, 1), func(f *file) { f.h.MaxTXID = 1 }), ltx.ErrInvalid},
		{"page 0", tx(5, 0, 1, 512, 9, 0), ltx.ErrOrder},
		{"same page", tx(5, 0, 1, 512, 9, 2, 2), ltx.ErrOrder},
		{"descending", tx(5, 0, 1, 512, 9, 2, 1), ltx.ErrOrder},
		{"beyond commit", tx(5, 0, 1, 512, 9, 10), ltx.ErrOrder},
		{"page in a drop", tx(5, 0, 0, 512, 0, 1), ltx.ErrOrder},
		{"lock page", tx(5, 0, 1, 512, lock+1, lock), ltx.ErrOrder},
		{"snapshot gap", snapshot(3, 1, 3), ltx.ErrOrder},
		{"snapshot start", snapshot(3, 2, 3), ltx.ErrOrder},
		{"snapshot end", snapshot(3, 1, 2), ltx.ErrInvalid},
		{"snapshot without pages", snapshot(1), ltx.ErrInvalid},
		{"snapshot checksum", with(snapshot(2, 1, 2), func(f *file) { f.post ^= 1 }), ltx.ErrInvalid},
		{"short page", with(tx(5, 0, 1, 512, 9, 1), func(f *file) { f.pages[0].Data = f.pages[0].Data[1:] }), ltx.ErrInvalid},
		{"no page", with(tx(5, 0, 1, 512, 9, 1), func(f *file) { f.pages[0].Data = nil }), ltx.ErrInvalid},
		{"post", with(tx(5, 0, 1, 512, 9, 1), func(f *file) { f.post = 1 }), ltx.ErrInvalid},
		{"post of a drop", tx(5, 0, 1, 512, 0), ltx.ErrInvalid},
		{"post without tracking", with(tx(5, 0, 1, 512, 9, 1), func(f *file) { f.h.Flags, f.h.PreApplyChecksum = ltx.FlagNoChecksum, 0 }), ltx.ErrInvalid},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dst := []byte("before")
			b, err := ltx.AppendFile(dst, tc.f.h, tc.f.pages, tc.f.post)
			if !errors.Is(err, tc.want) || err != nil && string(b) != "before" {
				t.Errorf("AppendFile: got %v and %d bytes, want %v", err, len(b), tc.want)
			}
			enc := ltx.NewEncoder(io.Discard)
			first := enc.EncodeHeader(tc.f.h)
			for _, p := range tc.f.pages {
				if first == nil {
					first = enc.EncodePage(p.Pgno, p.Data)
				}
			}
			if _, err := enc.Close(tc.f.post); first == nil {
				first = err
			} else if err != first {
				t.Errorf("Close: got %v, want the first error %v", err, first)
			}
			if !errors.Is(first, tc.want) {
				t.Errorf("Encoder: got %v, want %v", first, tc.want)
			}
		})
	}
}

func TestStates(t *testing.T) {
	f := tx(5, 0, 1, 512, 9, 1)
	var out bytes.Buffer
	enc := ltx.NewEncoder(io.Discard)
	state := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, ltx.ErrState) {
			t.Errorf("%s: got %v, want ErrState", what, err)
		}
	}
	for range 2 { // Reset gives a new start
		enc.Reset(&out)
		_, err := enc.Close(f.post)
		state("close first", err)
		state("page first", enc.EncodePage(1, f.pages[0].Data))
		if err := enc.EncodeHeader(f.h); err != nil {
			t.Fatal(err)
		}
		state("header twice", enc.EncodeHeader(f.h))
		if err := enc.EncodePage(1, f.pages[0].Data); err != nil {
			t.Fatal(err)
		}
		if _, err := enc.Close(f.post); err != nil {
			t.Fatal(err)
		}
		state("page after close", enc.EncodePage(2, f.pages[0].Data))
		_, err = enc.Close(f.post)
		state("close twice", err)
	}
	if b := f.encode(t); out.String() != string(b)+string(b) {
		t.Error("Reset: got another file")
	}

	// Two files in one stream: a reader with ReadByte is not read ahead of.
	data, dec := make([]byte, 512), ltx.NewDecoder(nil)
	for range 2 {
		dec.Reset(&out)
		_, err := dec.DecodePage(data)
		state("decode page first", err)
		state("decoder close first", dec.Close())
		if _, err := dec.DecodeHeader(); err != nil {
			t.Fatal(err)
		}
		state("close before pages", dec.Close())
		_, err = dec.DecodeHeader()
		state("decode header twice", err)
		if _, err := dec.DecodePage(data); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := dec.DecodePage(data); err != io.EOF {
				t.Fatalf("got %v, want io.EOF", err)
			}
		}
		for range 2 {
			if err := dec.Close(); err != nil {
				t.Fatal(err)
			}
		}
		_, err = dec.DecodePage(data)
		state("page after close", err)
		if dec.N() != int64(len(f.encode(t))) {
			t.Errorf("N: got %d", dec.N())
		}
	}
	if out.Len() != 0 {
		t.Errorf("%d bytes left", out.Len())
	}

	dec = ltx.NewDecoder(bytes.NewReader(f.encode(t)))
	if _, err := dec.DecodeHeader(); err != nil {
		t.Fatal(err)
	}
	if _, err := dec.DecodePage(data[1:]); !errors.Is(err, ltx.ErrInvalid) {
		t.Errorf("short buffer: got %v, want ErrInvalid", err)
	}
}

type failingWriter struct{ n int }

func (w *failingWriter) Write(p []byte) (int, error) {
	if w.n--; w.n < 0 {
		return 0, io.ErrClosedPipe
	}
	return len(p), nil
}

// TestIOErrors checks that errors of reader and writer arrive as they are, and
// are not taken for corruption.
func TestIOErrors(t *testing.T) {
	f := tx(5, 0, 1, 512, 9, 1)
	b := f.encode(t)
	for n := range 3 {
		enc := ltx.NewEncoder(&failingWriter{n})
		_ = enc.EncodeHeader(f.h)
		_ = enc.EncodePage(1, f.pages[0].Data)
		if _, err := enc.Close(f.post); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("write %d fails: got %v", n, err)
		}
		if _, _, err := ltx.Compact(&failingWriter{n}, bytes.NewReader(b)); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("compact, write %d fails: got %v", n, err)
		}
	}
	for n := range len(b) + 1 {
		r := func() io.Reader { return io.MultiReader(bytes.NewReader(b[:n]), iotest.ErrReader(io.ErrNoProgress)) }
		if _, _, err := ltx.Verify(r()); !errors.Is(err, io.ErrNoProgress) || errors.Is(err, ltx.ErrCorrupt) {
			t.Errorf("read fails after %d bytes: got %v", n, err)
		}
	}
}

// TestDamage changes and cuts files of every kind at each byte. What verifies
// all the same must be the same file: only the LZ4 blocks leave a choice.
func TestDamage(t *testing.T) {
	names := []string{"reference-v0.5.1.ltx", "reference-v0.5.2.ltx"}
	for name := range goldenFiles() {
		names = append(names, name)
	}
	for _, name := range names {
		good := golden(t, name)
		want, err := decode(good)
		if err != nil {
			t.Fatal(err)
		}
		for i := range good {
			for _, flip := range []byte{1, 0x80, 0xff} {
				b := bytes.Clone(good)
				b[i] ^= flip
				got, err := decode(b)
				if err == nil {
					want.mustEqual(t, got)
				} else if !errors.Is(err, ltx.ErrCorrupt) {
					t.Fatalf("%s, byte %d: got %v, want ErrCorrupt", name, i, err)
				}
				checkDamagedIndex(t, b)
			}
			cut := good[:i]
			if _, err := decode(cut); !errors.Is(err, ltx.ErrCorrupt) || !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("%s cut to %d bytes: got %v", name, i, err)
			}
			if _, _, err := ltx.ReadIndex(bytes.NewReader(cut), int64(i)); !errors.Is(err, ltx.ErrCorrupt) {
				t.Fatalf("%s cut to %d bytes: index: got %v", name, i, err)
			}
		}
		if _, _, err := ltx.Verify(bytes.NewReader(append(good, 0))); !errors.Is(err, ltx.ErrCorrupt) {
			t.Errorf("%s and a byte: got %v, want ErrCorrupt", name, err)
		}
	}
}

// checkDamagedIndex reads all pages of b by its index. Errors must be ErrCorrupt.
func checkDamagedIndex(t testing.TB, b []byte) {
	t.Helper()
	r := bytes.NewReader(b)
	entries, _, err := ltx.ReadIndex(r, int64(len(b)))
	if err != nil {
		if !errors.Is(err, ltx.ErrCorrupt) {
			t.Fatalf("ReadIndex: got %v, want ErrCorrupt", err)
		}
		return
	}
	h, err := ltx.ReadHeader(r)
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, h.PageSize)
	for _, e := range entries {
		if err := ltx.ReadPage(r, e, h.PageSize, data); err != nil && !errors.Is(err, ltx.ErrCorrupt) {
			t.Fatalf("ReadPage: got %v, want ErrCorrupt", err)
		}
	}
}

func TestErrorText(t *testing.T) {
	b := golden(t, "transaction.ltx")
	b[len(b)-1] ^= 1
	_, _, err := ltx.Verify(bytes.NewReader(b))
	want := fmt.Sprintf("corrupt ltx file: byte %d: file checksum ", len(b)-8)
	if err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("got %v, want %s...", err, want)
	}
}
