package service_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/control"
	"github.com/litefs-agent/litefs-agent/ltx"
	"github.com/litefs-agent/litefs-agent/service"
	"github.com/litefs-agent/litefs-agent/store"
)

// A reader that takes nothing delays nobody and costs no memory beyond its
// events; it is told what it missed, where it missed it.
func TestSlowReaderOfEvents(t *testing.T) {
	c := new(service.Core)
	ctx, cancel := context.WithCancelCause(t.Context())
	var got []control.Event
	begun, open, told, ended := make(chan struct{}), make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- c.Events(ctx, "a.db", func(e control.Event) error {
			if len(got) == 0 {
				close(begun)
				<-open
			}
			got = append(got, e)
			if e.Event == control.EventMissed {
				close(told)
			}
			return nil
		})
	}()
	other := "b.db"
	emit := func(n uint64) {
		c.Emit(control.Event{Event: control.EventCommit, DB: &other})
		c.EmitDatabase(store.Event{Kind: store.EventCommit, Name: "a.db", Pos: ltx.Pos{TXID: ltx.TXID(n), PostApplyChecksum: 5}})
	}
	for waiting := true; waiting; { // until it listens
		emit(1)
		select {
		case <-begun:
			waiting = false
		case <-time.After(time.Millisecond):
		}
	}
	const n = 100_000
	began := time.Now()
	for i := range uint64(n) {
		emit(i + 2)
	}
	t.Logf("%d events for a reader that takes nothing took %s", n, time.Since(began))
	close(open)
	stop := errors.New("stop")
	select {
	case <-told:
		cancel(stop)
	case <-time.After(10 * time.Second):
		t.Fatal("the reader is not told what it missed")
	}
	if err := <-ended; !errors.Is(err, stop) {
		t.Errorf("got %v, want the cause", err)
	}
	missed, commits := 0, 0
	last := ltx.TXID(0)
	for i, e := range got {
		switch e.Event {
		case control.EventMissed:
			missed += e.Missed
			if i != len(got)-1 {
				t.Errorf("missed is event %d of %d, want it after all that came before", i, len(got))
			}
		case control.EventCommit:
			commits++
			txid, err := ltx.ParseTXID(*e.TXID)
			if err != nil || *e.DB != "a.db" || *e.Checksum != "0000000000000005" || txid < last {
				t.Fatalf("event %d: %+v after %s", i, e, last)
			}
			last = txid
		}
	}
	if commits > 1100 || commits+missed < n {
		t.Errorf("%d events were kept for one reader, %d missed, want at most 1100 and all %d", commits, missed, n)
	}
}
