package ltx

import (
	"encoding/binary"
	"hash/crc64"
	"math/rand/v2"
	"testing"
)

var isoTable = crc64.MakeTable(crc64.ISO)

func randomBytes(seed uint64, n int) []byte {
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	b := make([]byte, n)
	_, _ = r.Read(b)
	return b
}

func TestCRC64(t *testing.T) {
	data := randomBytes(1, 70_000)
	for _, off := range []int{0, 1, 2, 3, 5} {
		for n := 0; n < 1400; n++ {
			start := uint64(n) * 0x9e3779b97f4a7c15
			got, want := CRC64(start, data[off:off+n]), crc64.Update(start, isoTable, data[off:off+n])
			if got != want {
				t.Fatalf("off %d, %d bytes: got %016x, want %016x", off, n, got, want)
			}
		}
	}
	for n := 1400; n < len(data)-8; n = n*5/4 + 3 {
		if got, want := CRC64(0, data[:n]), crc64.Checksum(data[:n], isoTable); got != want {
			t.Fatalf("%d bytes: got %016x, want %016x", n, got, want)
		}
	}
	// The check value of CRC-64/GO-ISO in the RevEng catalogue.
	if got, want := CRC64(0, []byte("123456789")), uint64(0xb90956c775a41001); got != want {
		t.Errorf("check value: got %016x, want %016x", got, want)
	}
}

func TestPageChecksum(t *testing.T) {
	for size := uint32(512); size <= 65536; size *= 2 {
		data := randomBytes(uint64(size), int(size))
		for _, pgno := range []uint32{1, 2, 0x12345678, 0xffffffff} {
			want := ChecksumFlag | Checksum(crc64.Checksum(append(binary.BigEndian.AppendUint32(nil, pgno), data...), isoTable))
			if got := PageChecksum(pgno, data); got != want {
				t.Errorf("page %d of %d bytes: got %s, want %s", pgno, size, got, want)
			}
		}
		if got := PageCRC(make([]byte, size)); got != 0 {
			t.Errorf("PageCRC of %d zeros: got %x, want 0", size, got)
		}
	}
}
