package http_test

import (
	"net"
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
