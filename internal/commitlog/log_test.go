package commitlog

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/disk"
)

func osDisk(t testing.TB) disk.FS {
	t.Helper()
	d, err := disk.NewOS(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// openLog opens a log and returns what it replayed.
func openLog(t testing.TB, o Options) (*Log, []Record) {
	t.Helper()
	var got []Record
	l, err := Open(o, func(r Record) error {
		r.Payload = bytes.Clone(r.Payload)
		got = append(got, r)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, got
}

func payloadOf(i int, size int) []byte {
	p := bytes.Repeat([]byte{byte(i), byte(i >> 8), 0xa5}, size/3+1)[:size]
	return p
}

func mustAppend(t testing.TB, l *Log, mode Mode, p []byte) (LSN, Ref) {
	t.Helper()
	lsn, ref, err := l.Append(Header{Kind: KindLTX, DB: 7, History: 8, EpochN: 9, EpochGrant: 10, Flags: 11}, mode, p[:len(p)/2], p[len(p)/2:])
	if err != nil {
		t.Fatal(err)
	}
	return lsn, ref
}

func TestAppendWaitReplay(t *testing.T) {
	for _, noDirect := range []bool{false, true} {
		t.Run(fmt.Sprintf("noDirect=%v", noDirect), func(t *testing.T) {
			o := Options{FS: osDisk(t), Dir: "log", SegmentSize: 64 << 10, NoDirect: noDirect, FlushAfter: time.Hour}
			total := 0
			for round := range 3 {
				l, got := openLog(t, o)
				if len(got) != total {
					t.Fatalf("round %d: replayed %d records, want %d", round, len(got), total)
				}
				for i, r := range got {
					want := payloadOf(i, i*37%5000)
					if r.LSN != LSN(i+1) || !bytes.Equal(r.Payload, want) || r.AfterDamage || r.Header !=
						(Header{Kind: KindLTX, DB: 7, History: 8, EpochN: 9, EpochGrant: 10, Flags: 11}) {
						t.Fatalf("record %d = %+v", i, r)
					}
					p := make([]byte, len(want))
					if err := l.ReadAt(r.Ref, p, 0); err != nil || !bytes.Equal(p, want) {
						t.Fatalf("ReadAt of record %d: %v", i, err)
					}
				}
				for range 100 {
					mode := Mode(total % 3)
					want := payloadOf(total, total*37%5000)
					lsn, ref := mustAppend(t, l, mode, want)
					p := make([]byte, len(want)/2)
					if err := l.ReadAt(ref, p, int64(len(want)-len(p))); err != nil || !bytes.Equal(p, want[len(want)-len(p):]) {
						t.Fatalf("ReadAt of fresh record %d: %v", lsn, err)
					}
					if mode == Staged {
						if err := l.Wait(lsn); err != nil {
							t.Fatal(err)
						}
						if l.Durable() != lsn {
							t.Fatalf("Durable = %d, want %d", l.Durable(), lsn)
						}
					}
					total++
				}
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				if _, _, err := l.Append(Header{}, Lazy); !errors.Is(err, ErrClosed) {
					t.Fatalf("Append after Close = %v, want ErrClosed", err)
				}
			}
		})
	}
}

func TestRelease(t *testing.T) {
	l, _ := openLog(t, Options{FS: osDisk(t), Dir: "log", SegmentSize: 32 << 10, Target: 3})
	_, first := mustAppend(t, l, Lazy, payloadOf(1, 1000))
	for i := range 300 {
		lsn, _ := mustAppend(t, l, Lazy, payloadOf(i, 1000))
		if i%50 == 49 {
			l.Release(lsn)
		}
	}
	if st := l.Stats(); st.Segments+st.Spare > 8 {
		t.Fatalf("%d segments and %d spare ones, want few", st.Segments, st.Spare)
	}
	if err := l.ReadAt(first, make([]byte, 10), 0); !errors.Is(err, ErrReleased) {
		t.Fatalf("ReadAt of a released record = %v, want ErrReleased", err)
	}
	if _, _, err := l.Append(Header{}, Lazy, make([]byte, l.MaxPayload()+1)); !errors.Is(err, ErrTooLarge) {
		t.Fatalf("Append = %v, want ErrTooLarge", err)
	}
	if _, _, err := l.Append(Header{}, Staged, make([]byte, l.MaxPayload())); err != nil {
		t.Fatal(err)
	}
	segs := l.Segments()
	for i, s := range segs {
		if i > 0 && s.First != segs[i-1].Last+1 {
			t.Fatalf("segments do not join: %+v", segs)
		}
	}
}

func TestFlushAfter(t *testing.T) {
	l, _ := openLog(t, Options{FS: osDisk(t), Dir: "log", SegmentSize: 64 << 10, FlushAfter: 5 * time.Millisecond})
	moved := make(chan LSN, 10)
	l.OnDurable(func(lsn LSN) { moved <- lsn })
	mustAppend(t, l, Lazy, []byte("a"))
	lsn, _ := mustAppend(t, l, Lazy, []byte("b"))
	for {
		select {
		case d := <-moved:
			if d == lsn {
				return
			}
		case <-time.After(10 * time.Second):
			t.Fatal("no background flush")
		}
	}
}

func TestGroupCommit(t *testing.T) {
	l, _ := openLog(t, Options{FS: osDisk(t), Dir: "log", FlushAfter: time.Millisecond, FlushBytes: 16 << 10})
	var wg sync.WaitGroup
	const n, each = 16, 50
	for g := range n {
		wg.Go(func() {
			for i := range each {
				mode := Mode((g + i) % 3)
				want := payloadOf(g*each+i, 100+g*10)
				lsn, ref, err := l.Append(Header{Kind: KindLTX}, mode, want)
				if err != nil {
					t.Error(err)
					return
				}
				if mode != Lazy {
					if err := l.Wait(lsn); err != nil {
						t.Error(err)
						return
					}
				}
				p := make([]byte, len(want))
				if err := l.ReadAt(ref, p, 0); err != nil || !bytes.Equal(p, want) {
					t.Errorf("ReadAt %d: %v", lsn, err)
					return
				}
			}
		})
	}
	wg.Wait()
	st := l.Stats()
	if st.Records != n*each || st.Flushes >= n*each*2/3 {
		t.Fatalf("%d records with %d flushes: no group commit", st.Records, st.Flushes)
	}
	t.Logf("%d records, %d flushes, %d bytes", st.Records, st.Flushes, st.BytesWritten)
}

// TestConcurrentReuse appends, waits, reads, reserves and releases at once over
// small segments.
func TestConcurrentReuse(t *testing.T) {
	l, _ := openLog(t, Options{FS: osDisk(t), Dir: "log", SegmentSize: 32 << 10, FlushAfter: time.Millisecond, FlushBytes: 8 << 10})
	var last LSN // OnDurable's calls do not overlap
	l.OnDurable(func(lsn LSN) {
		if lsn <= last {
			t.Errorf("OnDurable(%d) after %d", lsn, last)
		}
		last = lsn
	})
	var wg sync.WaitGroup
	for g := range 6 {
		wg.Go(func() {
			for i := range 150 {
				want := payloadOf(g*1000+i, 50+i*13%1500)
				if err := l.Reserve(int64(len(want))); err != nil {
					t.Error(err)
					return
				}
				mode := Mode((g + i) % 3)
				lsn, ref, err := l.Append(Header{Kind: KindLTX}, mode, want)
				l.Unreserve(int64(len(want)))
				if err == nil && mode != Lazy {
					err = l.Wait(lsn)
				}
				if err != nil {
					t.Error(err)
					return
				}
				p := make([]byte, len(want))
				if err := l.ReadAt(ref, p, 0); !errors.Is(err, ErrReleased) && (err != nil || !bytes.Equal(p, want)) {
					t.Errorf("ReadAt %d: %v", lsn, err)
					return
				}
				if i%10 == 0 && lsn > 60 {
					l.Release(min(lsn-60, l.Durable()))
				}
				l.Stats()
				l.Segments()
			}
		})
	}
	wg.Wait()
	if err := l.Wait(l.Appended()); err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", l.Stats())
}

// TestAppendAllocatesNothing holds for small payloads once the buffers are there.
func TestAppendAllocatesNothing(t *testing.T) {
	l, _ := openLog(t, Options{FS: osDisk(t), Dir: "log", FlushBytes: -1})
	a, b := make([]byte, 300), make([]byte, 200)
	one := func(mode Mode) func() {
		return func() {
			lsn, _, err := l.Append(Header{Kind: KindLTX}, mode, a, b)
			if err == nil && mode != Lazy {
				err = l.Wait(lsn)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, mode := range []Mode{Lazy, Staged, Written} {
		one(mode)()
		// fdatasync through syscall.RawConn allocates twice a flush; Append itself not.
		want := map[Mode]float64{Lazy: 0, Staged: 3, Written: 3}[mode]
		for range 200 {
			one(mode)()
		}
		if err := l.Wait(l.Appended()); err != nil {
			t.Fatal(err)
		}
		for range 210 { // the buffers at their largest
			one(mode)()
		}
		if err := l.Wait(l.Appended()); err != nil {
			t.Fatal(err)
		}
		if got := testing.AllocsPerRun(200, one(mode)); got > want {
			t.Errorf("mode %d: %v allocations, want at most %v", mode, got, want)
		}
	}
}
