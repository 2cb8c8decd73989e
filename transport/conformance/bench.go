package conformance

import (
	"context"
	"io"
	"testing"

	"github.com/litefs-agent/litefs-agent/transport"
)

// Bench measures a carrier.
func Bench(b *testing.B, c Carrier) {
	b.Run("round-trip", func(b *testing.B) {
		node, hub := connect(b, c, transport.Config{}, nil)
		ctx := context.Background()
		ack := &transport.Ack{Name: "a/b.db", History: 5, Level: transport.AckDurable}
		go func() { // ends with the session
			for {
				m, err := hub.Recv(ctx)
				if err != nil {
					return
				}
				ack.Pos = m.(*transport.Push).Pos()
				if hub.Send(ctx, ack) != nil {
					return
				}
			}
		}()
		p := record(1, 600)
		b.ReportAllocs()
		for b.Loop() {
			if err := node.Send(ctx, p); err != nil {
				b.Fatal(err)
			}
			if _, err := node.Recv(ctx); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("small", func(b *testing.B) {
		node, hub := connect(b, c, transport.Config{}, nil)
		ctx := context.Background()
		p := record(1, 600)
		done := make(chan error, 1)
		n := b.N
		go func() {
			for range n {
				if _, err := hub.Recv(ctx); err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
		b.ReportAllocs()
		b.SetBytes(600)
		b.ResetTimer()
		for range n {
			if err := node.Send(ctx, p); err != nil {
				b.Fatal(err)
			}
		}
		if err := <-done; err != nil {
			b.Fatal(err)
		}
	})
	b.Run("stream-1MiB", func(b *testing.B) {
		node, hub := connect(b, c, transport.Config{}, nil)
		ctx := context.Background()
		const size = 1 << 20
		done := make(chan error, 1)
		n := b.N
		go func() {
			for last := 0; last < n; {
				m, err := hub.Recv(ctx)
				if err != nil {
					done <- err
					return
				}
				if d, ok := m.(*transport.Data); ok && d.Last {
					last++
				}
			}
			done <- nil
		}()
		b.ReportAllocs()
		b.SetBytes(size)
		b.ResetTimer()
		p := record(1, 0)
		p.Size = size
		for i := range n {
			p.Stream = uint64(i + 1)
			if err := transport.SendPush(ctx, node, p, io.LimitReader(zeros{}, size)); err != nil {
				b.Fatal(err)
			}
		}
		if err := <-done; err != nil {
			b.Fatal(err)
		}
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
