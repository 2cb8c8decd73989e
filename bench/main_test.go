package main

import (
	"maps"
	"strings"
	"testing"
)

func TestParseTrace(t *testing.T) {
	const text = `7 read(6</dev/fuse>, "\x38\x00\x00\x00\x10\x00\x00\x00"..., 135168) = 4176
7 read(6</dev/fuse>,  <unfinished ...>
8 fdatasync(9</data/log/0001> <unfinished ...>
7 <... read resumed>"\x38\x00\x00\x00\x14\x00\x00\x00"..., 135168) = 56
8 <... fdatasync resumed>)  = 0
9 read(3<\x2f\x64\x65\x76\x2f\x66\x75\x73\x65>, "\x38\x00\x00\x00\x14\x00\x00\x00"..., 135168) = 56
7 read(6</dev/fuse>, 0xc0000, 135168) = -1 ENODEV (No such device)
7 read(4<anon_inode:[eventfd]>, "\x01\x00\x00\x00\x00\x00\x00\x00", 16) = 8
9 --- SIGURG {si_signo=SIGURG} ---
8 fsync(9</data/log/0001>) = -1 EIO (Input/output error)
`
	got, err := parseTrace(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	if want := map[string]int{"WRITE": 1, "FSYNC": 2}; !maps.Equal(got.requests, want) {
		t.Errorf("requests: got %v, want %v", got.requests, want)
	}
	if want := map[string]int{"/data/log/0001": 1}; !maps.Equal(got.flushes, want) {
		t.Errorf("flushes: got %v, want %v", got.flushes, want)
	}
}

func TestMarkdown(t *testing.T) {
	row := func(side string, round, pair int, rate float64) line {
		return line{Part: "speed", Device: "disk", Row: "WAL FULL", Unit: "tx/s", Side: side, Round: round, Pair: pair, Rate: rate}
	}
	got := markdown([]line{
		row(ext4, 1, 1, 100), row(mount, 1, 1, 150), row(mount, 1, 2, 80), row(ext4, 1, 2, 160),
		row(ext4, 2, 1, 100), row(mount, 2, 1, 100),
		{Part: "trace", Row: "WAL FULL", Side: ext4, Ops: 10, Flushes: map[string]int{"a": 15, "b": 5}},
		{Part: "trace", Row: "WAL FULL", Side: mount, Ops: 10, Flushes: map[string]int{"a": 10}, Requests: map[string]int{"WRITE": 21}},
		{Part: "bytes", Row: "WAL FULL", Side: ext4, Ops: 2, Bytes: 16384},
		{Part: "bytes", Row: "WAL FULL", Side: mount, Ops: 2, Bytes: 4096},
	})
	const want = "| WAL FULL | 100 tx/s | 100 tx/s | **1.00** (0.75 to 1.25) | 0.8 | 2.1 | 2, 1 | 8.00, 2.00 (0.25) |  |\n"
	if !strings.HasSuffix(got, want) {
		t.Errorf("got  %s\nwant ...%s", got, want)
	}
}

func TestQuantile(t *testing.T) {
	for _, c := range []struct {
		values []float64
		q      float64
		want   float64
	}{{nil, 0.5, 0}, {[]float64{3}, 0.25, 3}, {[]float64{3, 1, 2}, 0.5, 2}, {[]float64{1, 2}, 0.5, 1.5}, {[]float64{1, 2, 3, 4, 5}, 0.75, 4}} {
		if got := quantile(c.values, c.q); got != c.want {
			t.Errorf("quantile(%v, %v): got %v, want %v", c.values, c.q, got, c.want)
		}
	}
}
