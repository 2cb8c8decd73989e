package commitlog

import (
	"os"
	"sync/atomic"
	"testing"
)

const benchPayload = 2400 // a transaction of one or two pages

// BenchmarkPlain is what a program pays that rewrites a written file in place:
// pwrite and fdatasync.
func BenchmarkPlain(b *testing.B) {
	d := osDisk(b)
	f, err := d.OpenFile("a", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	const size = 4 << 20
	if _, err := f.WriteAt(make([]byte, size), 0); err != nil {
		b.Fatal(err)
	}
	if err := f.Datasync(); err != nil {
		b.Fatal(err)
	}
	p := make([]byte, benchPayload)
	off := int64(0)
	for b.Loop() {
		if off+benchPayload > size {
			off = 0
		}
		if _, err := f.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
		if err := f.Datasync(); err != nil {
			b.Fatal(err)
		}
		off += benchPayload
	}
}

func benchLog(b *testing.B, noDirect bool) *Log {
	l, err := Open(Options{FS: osDisk(b), Dir: "log", NoDirect: noDirect}, func(Record) error { return nil })
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	return l
}

func BenchmarkAppendWait(b *testing.B) {
	for _, c := range []struct {
		name     string
		mode     Mode
		noDirect bool
	}{{"staged", Staged, false}, {"written", Written, false}, {"staged-buffered", Staged, true}, {"lazy", Lazy, false}} {
		b.Run(c.name, func(b *testing.B) {
			l := benchLog(b, c.noDirect)
			p := make([]byte, benchPayload)
			before := l.Stats()
			for b.Loop() {
				lsn, _, err := l.Append(Header{Kind: KindLTX}, c.mode, p)
				if err == nil {
					err = l.Wait(lsn)
				}
				if err != nil {
					b.Fatal(err)
				}
				if lsn%256 == 0 {
					l.Release(lsn)
				}
			}
			after := l.Stats()
			n := float64(after.Records - before.Records)
			b.ReportMetric(float64(after.Fdatasyncs-before.Fdatasyncs)/n, "flushes/op")
			b.ReportMetric(float64(after.BytesWritten-before.BytesWritten)/n, "bytes/op")
		})
	}
}

// BenchmarkAppendWaitParallel has 32 writers.
func BenchmarkAppendWaitParallel(b *testing.B) {
	l := benchLog(b, false)
	before := l.Stats()
	b.SetParallelism(16)
	var released atomic.Uint64
	b.RunParallel(func(pb *testing.PB) {
		p := make([]byte, benchPayload)
		for pb.Next() {
			lsn, _, err := l.Append(Header{Kind: KindLTX}, Staged, p)
			if err == nil {
				err = l.Wait(lsn)
			}
			if err != nil {
				b.Error(err)
				return
			}
			if lsn%256 == 0 && released.Swap(uint64(lsn)) < uint64(lsn) {
				l.Release(lsn - 100)
			}
		}
	})
	after := l.Stats()
	b.ReportMetric(float64(after.Fdatasyncs-before.Fdatasyncs)/float64(after.Records-before.Records), "flushes/op")
}

// BenchmarkLazy is Append alone, with the flushes of 256 KiB in the background.
func BenchmarkLazy(b *testing.B) {
	for _, size := range []int{100, benchPayload} {
		b.Run(map[int]string{100: "100", benchPayload: "2400"}[size], func(b *testing.B) {
			l := benchLog(b, false)
			p := make([]byte, size)
			b.ReportAllocs()
			before := l.Stats()
			for b.Loop() {
				lsn, _, err := l.Append(Header{Kind: KindLTX}, Lazy, p)
				if err != nil {
					b.Fatal(err)
				}
				if lsn%1024 == 0 {
					l.Release(l.Durable())
				}
			}
			after := l.Stats()
			b.ReportMetric(float64(after.BytesWritten-before.BytesWritten)/float64(after.Records-before.Records), "bytes/op")
		})
	}
}

// BenchmarkReadAt reads payloads back from the page cache.
func BenchmarkReadAt(b *testing.B) {
	l := benchLog(b, false)
	p := make([]byte, benchPayload)
	lsn, ref, err := l.Append(Header{Kind: KindLTX}, Staged, p)
	if err == nil {
		err = l.Wait(lsn)
	}
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := l.ReadAt(ref, p, 0); err != nil {
			b.Fatal(err)
		}
	}
}
