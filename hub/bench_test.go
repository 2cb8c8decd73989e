package hub_test

import (
	"os"
	"slices"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
	"github.com/litefs-agent/litefs-agent/store"
)

// onDisk puts both data folders on the real disk.
func (r *rig) onDisk() {
	r.tb.Helper()
	for _, fs := range []*disk.FS{&r.nodeFS, &r.hubFS} {
		d, err := disk.NewOS(r.tb.TempDir())
		if err != nil {
			r.tb.Fatal(err)
		}
		*fs = d
	}
	r.tb.Cleanup(r.stop) // before the folders go
	r.nodeOpt.SegmentSize, r.nodeOpt.Large, r.nodeOpt.Memory, r.nodeOpt.Flush = 0, 0, 16<<20, time.Second
	r.hubOpt.SegmentSize, r.hubOpt.Large, r.hubOpt.Memory, r.hubOpt.Flush = 0, 0, 64<<20, time.Second
}

func newPage(r *rig) []byte {
	b := make([]byte, 4096)
	for i := range 200 { // a row or two
		b[i] = byte(r.rng.Uint32())
	}
	return b
}

// small changes one page and the header of a database.
func (r *rig) small(db *pager.DB) {
	r.tb.Helper()
	n := max(2, len(db.Head().Pages))
	ch := pager.Change{PageSize: 4096, Count: n, Pages: map[int][]byte{2: newPage(r)}}
	if err := db.Commit(ch); err != nil {
		r.tb.Fatal(err)
	}
	db.Versions, db.Cur = db.Versions[len(db.Versions)-1:], 0
}

func percentile(list []time.Duration, p int) float64 {
	slices.Sort(list)
	return float64(list[(len(list)-1)*p/100]) / 1e6
}

// From the return of a commit to the hub's ack of it, over loopback.
func BenchmarkAck(b *testing.B) {
	r := newRig(b, 1)
	r.onDisk()
	r.direct = true
	r.startHub()
	r.startNode()
	db := r.world.DB("a.db")
	db.Sync = pager.Full
	acked := make(chan struct{}, 1)
	var acks, commits []time.Duration
	r.small(db)
	r.settle()
	r.node.Watch(watcher(acked))
	for b.Loop() {
		began := time.Now()
		r.small(db)
		returned := time.Now()
		commits = append(commits, returned.Sub(began))
		n := r.node.DB("a.db")
		for n.Acked() != n.Pos() {
			<-acked
		}
		acks = append(acks, time.Since(returned))
	}
	b.ReportMetric(percentile(acks, 50), "p50-ack-ms")
	b.ReportMetric(percentile(acks, 99), "p99-ack-ms")
	b.ReportMetric(percentile(commits, 50), "p50-commit-ms")
	b.ReportMetric(fdatasync(b), "p50-fdatasync-ms")
}

// fdatasync is the median of a 4 KiB append and its fdatasync, as the log does.
func fdatasync(tb testing.TB) float64 {
	d, err := disk.NewOS(tb.TempDir())
	if err != nil {
		tb.Fatal(err)
	}
	f, err := d.OpenFile("f", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 4096)
	if _, err := f.WriteAt(make([]byte, 4<<20), 0); err != nil {
		tb.Fatal(err)
	}
	if err := f.Datasync(); err != nil {
		tb.Fatal(err)
	}
	var list []time.Duration
	for i := range int64(500) {
		began := time.Now()
		if _, err := f.WriteAt(buf, i*4096); err != nil {
			tb.Fatal(err)
		}
		if err := f.Datasync(); err != nil {
			tb.Fatal(err)
		}
		list = append(list, time.Since(began))
	}
	return percentile(list, 50)
}

// Ten thousand transactions that wait are sent one by one.
func BenchmarkBacklogSingle(b *testing.B) { benchmarkBacklog(b, -1) }

// The same, compacted.
func BenchmarkBacklogCompacted(b *testing.B) { benchmarkBacklog(b, 64) }

func benchmarkBacklog(b *testing.B, compactFrom int) {
	const n = 10_000
	for b.Loop() {
		b.StopTimer()
		r := newRig(b, 1)
		r.onDisk()
		r.linkOpt.CompactFrom = compactFrom
		r.startNode()
		db := r.world.DB("a.db")
		db.Sync = pager.Off
		for range n {
			r.small(db)
		}
		r.startHub()
		b.StartTimer()
		began := time.Now()
		r.settle()
		b.StopTimer()
		b.ReportMetric(n/time.Since(began).Seconds(), "txn/s")
		b.ReportMetric(float64(r.hub.Stats().Transactions), "records")
		b.ReportMetric(float64(r.hub.Stats().Fdatasyncs), "hub-fdatasyncs")
		r.closeLink()
		r.closeHub(false)
		b.StartTimer()
	}
}

// A database of 100 MB whose records are gone goes as a snapshot.
func BenchmarkSnapshot(b *testing.B) {
	const pages = 25_600
	for b.Loop() {
		b.StopTimer()
		r := newRig(b, 1)
		r.onDisk()
		r.startNode()
		db := r.world.DB("a.db")
		db.Sync = pager.Full
		for from := 1; from < pages; from += 2560 {
			ch := pager.Change{PageSize: 4096, Count: from + 2559, Pages: map[int][]byte{}}
			for i := from; i <= ch.Count; i++ {
				if i > 1 {
					p := make([]byte, 4096)
					for k := 0; k < 2048; k++ { // half of it compresses
						p[k] = byte(r.rng.Uint32())
					}
					ch.Pages[i] = p
				}
			}
			if err := db.Commit(ch); err != nil {
				b.Fatal(err)
			}
		}
		if err := r.node.DB("a.db").NewHistory(); err != nil { // its records are of the old one
			b.Fatal(err)
		}
		r.startHub()
		b.StartTimer()
		began := time.Now()
		n := r.node.DB("a.db")
		acked := make(chan struct{}, 1)
		r.node.Watch(watcher(acked))
		for n.Acked() != n.Pos() {
			<-acked
		}
		b.StopTimer()
		b.ReportMetric(pages*4096/1e6/time.Since(began).Seconds(), "MB/s")
		r.settle()
		r.closeLink()
		r.closeHub(false)
		b.StartTimer()
	}
}

// watcher returns a function for Store.Watch that leaves a token in c.
func watcher(c chan struct{}) func(*store.DB) {
	return func(*store.DB) {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}
