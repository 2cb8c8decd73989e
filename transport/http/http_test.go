package http_test

import (
	"net"
	"runtime"
	"testing"

	"github.com/litefs-agent/litefs-agent/transport"
	"github.com/litefs-agent/litefs-agent/transport/conformance"
	httptransport "github.com/litefs-agent/litefs-agent/transport/http"
)

func carrier(mode httptransport.Mode) conformance.Carrier {
	return conformance.Carrier{
		Serve: func(tb testing.TB, h transport.Handler, cfg transport.Config) (string, func()) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				tb.Fatal(err)
			}
			s := httptransport.NewServer(h, httptransport.ServerOptions{Config: cfg})
			done := make(chan error, 1)
			go func() { done <- s.Serve(ln) }()
			return ln.Addr().String(), func() {
				s.Close()
				<-done
			}
		},
		Dialer: func(tb testing.TB, addr string, cfg transport.Config) transport.Dialer {
			d, err := httptransport.NewDialer("http://"+addr, httptransport.DialOptions{Config: cfg, Mode: mode})
			if err != nil {
				tb.Fatal(err)
			}
			return d
		},
	}
}

func TestStream(t *testing.T) { conformance.Run(t, carrier(httptransport.ModeStream)) }
func TestPoll(t *testing.T)   { conformance.Run(t, carrier(httptransport.ModePoll)) }

func BenchmarkStream(b *testing.B) { conformance.Bench(b, carrier(httptransport.ModeStream)) }
func BenchmarkPoll(b *testing.B)   { conformance.Bench(b, carrier(httptransport.ModePoll)) }

// BenchmarkIdle reports the memory of one idle session, both ends together.
func BenchmarkIdle(b *testing.B) {
	for name, mode := range map[string]httptransport.Mode{"stream": httptransport.ModeStream, "poll": httptransport.ModePoll} {
		b.Run(name, func(b *testing.B) {
			c := carrier(mode)
			addr, stop := c.Serve(b, &echo{}, transport.Config{})
			defer stop()
			d := c.Dialer(b, addr, transport.Config{})
			const n = 200
			used := func() float64 {
				var m runtime.MemStats
				runtime.GC()
				runtime.ReadMemStats(&m)
				return float64(m.HeapInuse + m.StackInuse)
			}
			for b.Loop() {
				before := used()
				var conns []transport.Conn
				for range n {
					conn, _, err := d.Dial(b.Context(), &transport.Hello{Node: "n"})
					if err != nil {
						b.Fatal(err)
					}
					conns = append(conns, conn)
				}
				b.ReportMetric((used()-before)/n, "B/session")
				for _, conn := range conns {
					conn.Close()
				}
			}
		})
	}
}
