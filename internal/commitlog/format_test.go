package commitlog

import (
	"bytes"
	"flag"
	"fmt"
	"hash/crc64"
	"os"
	"path/filepath"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/simdisk"
)

var updateSeeds = flag.Bool("update", false, "write the golden segment and the fuzz seeds again")

func TestChecksum(t *testing.T) {
	p := payloadOf(77, 1000)
	table := crc64.MakeTable(crc64.ISO)
	want := crc64.Update(crc64.Update(12345, table, p[:333]), table, p[333:])
	if got := checksum(checksum(12345, p[:333]), p[333:]); got != want {
		t.Fatalf("checksum = %x, want %x", got, want)
	}
}

func TestSegHeader(t *testing.T) {
	h := segHeader{size: 1 << 20, seq: 5, salt: 6, first: 7, oldest: 3, formerSeq: 4, formerEnd: 8192, formerCRC: 9}
	page := make([]byte, pageSize)
	h.encode(page)
	for _, bad := range []int{0, 20, 75} { // either copy will do
		p := bytes.Clone(page)
		p[bad] ^= 1
		if got, err := decodeSegHeader(p); err != nil || got != h {
			t.Errorf("byte %d of the first copy: %+v, %v", bad, got, err)
		}
		p[copyAt+bad] ^= 1
		if got, err := decodeSegHeader(p); err == nil {
			t.Errorf("byte %d of both copies: %+v, want an error", bad, got)
		}
	}
	next := h
	next.seq = 6
	other := make([]byte, pageSize)
	next.encode(other)
	copy(other[copyAt:], page[:segHdrSize]) // torn: the old copy is left
	if got, err := decodeSegHeader(other); err != nil || got != next {
		t.Errorf("torn header = %+v, %v, want %+v", got, err, next)
	}
}

func TestRecordCodec(t *testing.T) {
	for _, n := range []int{0, 1, 7, 8, 9, 5000} {
		buf := make([]byte, recordSize(int64(n)))
		copy(buf[headerSize:], payloadOf(n, n))
		h := Header{Kind: 200, Flags: 3, DB: 4, History: 5, EpochN: 6, EpochGrant: 7}
		crc := encodeRecord(buf, n, h, 10, 9, 8, 1)
		got, err := decodeRecord(buf, 1)
		if err != nil || got.Header != h || got.lsn != 10 || got.durable != 9 || got.prev != 8 || got.crc != crc ||
			!bytes.Equal(got.payload, payloadOf(n, n)) || got.size != int64(len(buf)) {
			t.Errorf("%d bytes: %+v, %v", n, got, err)
		}
		if _, err := decodeRecord(buf, 2); err == nil {
			t.Errorf("%d bytes: accepted with another salt", n)
		}
		for i := range headerSize + n {
			buf[i] ^= 0x20
			if _, err := decodeRecord(buf, 1); err == nil {
				t.Errorf("%d bytes: byte %d does not matter", n, i)
			}
			buf[i] ^= 0x20
		}
	}
}

const goldenSegment = "testdata/segment.bin"

// goldenLog writes the same 16 KiB segment each time.
func goldenLog(t testing.TB) []byte {
	d := simdisk.New(simdisk.Options{})
	l, _ := openLog(t, Options{FS: d, Dir: "log", SegmentSize: minSegment, inline: true, Rand: bytes.NewReader([]byte("saltsalt"))})
	for i := range 4 {
		lsn, _ := mustAppend(t, l, Mode(i%3), payloadOf(i, 100*i))
		if i%2 == 0 {
			if err := l.Wait(lsn); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := l.Wait(4); err != nil {
		t.Fatal(err)
	}
	return d.DurableBytes("log/" + slotName(0, extSegment))
}

// TestGolden pins the format. Rewrite with: go test ./internal/commitlog -run Golden -update
func TestGolden(t *testing.T) {
	got := goldenLog(t)
	if *updateSeeds {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(goldenSegment, got, 0o644); err != nil {
			t.Fatal(err)
		}
		for fuzz, seeds := range map[string][][]byte{
			"FuzzSegment": {got, got[:8192], append(bytes.Clone(got[:6000]), make([]byte, 3000)...), got[:pageSize], flipped(got, 4200), flipped(got, 4100)},
			"FuzzRecord":  {got[4096:4300], got[8192:8600], flipped(got, 4100)[4096:4400]},
		} {
			dir := filepath.Join("testdata", "fuzz", fuzz)
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			for i, seed := range seeds {
				text := fmt.Sprintf("go test fuzz v1\n[]byte(%q)\n", seed)
				if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("seed%d", i)), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	want, err := os.ReadFile(goldenSegment)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("the format has changed: see goldenSegment")
	}
	for _, fuzz := range []string{"FuzzSegment", "FuzzRecord"} {
		if list, err := os.ReadDir(filepath.Join("testdata", "fuzz", fuzz)); err != nil || len(list) == 0 {
			t.Fatalf("no seeds for %s: %v", fuzz, err)
		}
	}
}

func flipped(p []byte, i int) []byte {
	p = bytes.Clone(p)
	p[i] ^= 4
	return p
}

// FuzzRecord: no panic, and what decodes is what encodes to the same bytes.
func FuzzRecord(f *testing.F) {
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) >= headerSize { // give the fuzzer the right CRC now and then
			if n := payloadLen(p); n >= 0 && n <= len(p)-headerSize && len(p)%2 == 0 {
				sealRecord(p, n, LSN(p[16]), uint64(p[24]), 7)
			}
		}
		r, err := decodeRecord(p, 7)
		if err != nil {
			return
		}
		again := make([]byte, r.size)
		copy(again[headerSize:], r.payload)
		encodeRecord(again, len(r.payload), r.Header, r.lsn, r.durable, r.prev, 7)
		if !bytes.Equal(again[:headerSize+len(r.payload)], p[:headerSize+len(r.payload)]) {
			t.Fatal("encodes to other bytes")
		}
	})
}

// FuzzSegment opens a log whose one file is the input: no panic, records in
// order, and the log works afterwards.
func FuzzSegment(f *testing.F) {
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > 1<<20 {
			return
		}
		d := simdisk.New(simdisk.Options{})
		if err := d.Mkdir("log", 0o700); err != nil {
			t.Fatal(err)
		}
		file, err := d.OpenFile("log/"+slotName(3, extSegment), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if len(p) > 0 {
			if _, err := file.WriteAt(p, 0); err != nil {
				t.Fatal(err)
			}
		}
		file.Close()
		o := Options{FS: d, Dir: "log", SegmentSize: minSegment, inline: true}
		var last LSN
		l, err := Open(o, func(r Record) error {
			if r.LSN <= last {
				t.Fatalf("record %d after %d", r.LSN, last)
			}
			last = r.LSN
			return nil
		})
		if err != nil {
			return
		}
		lsn, _, err := l.Append(Header{}, Staged, []byte("x"))
		if err == nil {
			err = l.Wait(lsn)
		}
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		l, err = Open(o, func(r Record) error { last = r.LSN; return nil })
		if err != nil || last != lsn {
			t.Fatalf("opened again: last record %d, want %d: %v", last, lsn, err)
		}
		l.Close()
	})
}
