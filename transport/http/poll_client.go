package http

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	nethttp "net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/litefs-agent/litefs-agent/transport"
)

func newReader(b []byte) io.Reader { return bytes.NewReader(b) }

// dialPoll opens a session over short requests.
func (d *Dialer) dialPoll(dialCtx context.Context, k *cutter, frame []byte) (_ transport.Pipe, _ transport.Message, err error) {
	p := new(nethttp.Protocols)
	p.SetHTTP1(true)
	p.SetHTTP2(true) // by ALPN: some proxies have nothing else
	rt := d.transport(k, p)
	defer func() {
		if err != nil {
			rt.CloseIdleConnections()
		}
	}()
	req, err := d.request(dialCtx, nethttp.MethodPost, pathOpen, bytes.NewReader(frame))
	if err != nil {
		return nil, nil, err
	}
	resp, err := rt.RoundTrip(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	if err := checkFrames(resp); err != nil {
		return nil, nil, err
	}
	answer, _, err := transport.ReadFrame(resp.Body, transport.MaxHelloFrame)
	if err != nil {
		return nil, nil, fmt.Errorf("read welcome: %w", err)
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 1)) // so that the connection is used again
	id := resp.Header.Get(headerSession)
	pipe := &pollClient{d: d, cut: k, rt: rt, path: pathSession + "/" + id}
	pipe.deleted.Store(id == "") // refused, or moved: there is no session
	pipe.ctx, pipe.cancel = context.WithCancel(context.Background())
	return pipe, answer, nil
}

// A pollClient is the client's end of a session over short requests; see pollPipe.
type pollClient struct {
	d      *Dialer
	cut    *cutter
	rt     *nethttp.Transport
	path   string
	ctx    context.Context // of the pipe, not of a call: ends at Abort
	cancel context.CancelFunc

	up      int64       // offset of the next byte to push; owned by the writer
	deleted atomic.Bool // the hub knows that nothing follows

	// Owned by the reader.
	down     int64         // offset of the next byte to read
	body     io.ReadCloser // of the pull under way, or nil
	bodyDone context.CancelFunc
}

// A retrier says whether to try again, and waits. A peer is given up when nothing
// succeeded for DeadAfter.
type retrier struct {
	p     *pollClient
	since time.Time // of the first failure in a row
	pause time.Duration
}

func (r *retrier) ok() { *r = retrier{p: r.p} }

// failed returns err if it is final, else nil after a pause.
func (r *retrier) failed(err error) error {
	if s, ok := errors.AsType[*statusError](err); ok && s.code < 500 && s.code != 429 && s.code != 408 {
		return err
	}
	if r.since.IsZero() {
		r.since, r.pause = time.Now(), 25*time.Millisecond
	}
	if time.Since(r.since) > r.p.d.opt.DeadAfter {
		return err
	}
	t := time.NewTimer(r.pause)
	defer t.Stop()
	r.pause = min(2*r.pause, 2*time.Second)
	select {
	case <-t.C:
		return nil
	case <-r.p.ctx.Done():
		return r.p.ctx.Err()
	}
}

// do makes one request. The caller closes the body, then calls done.
func (p *pollClient) do(method, path string, body io.Reader) (resp *nethttp.Response, done context.CancelFunc, err error) {
	ctx, cancel := context.WithTimeout(p.ctx, p.d.opt.PollWait+p.d.opt.DeadAfter)
	defer func() {
		if err != nil {
			cancel()
		}
	}()
	req, err := p.d.request(ctx, method, p.path+path, body)
	if err != nil {
		return nil, nil, err
	}
	if resp, err = p.rt.RoundTrip(req); err != nil {
		return nil, nil, err
	}
	if resp.StatusCode != nethttp.StatusOK && resp.StatusCode != nethttp.StatusNoContent {
		err = checkFrames(resp)
		resp.Body.Close()
		return nil, nil, err
	}
	return resp, cancel, nil
}

func (p *pollClient) Write(b []byte) (int, error) {
	retry := retrier{p: p}
	for written := 0; written < len(b); {
		chunk := b[written:min(len(b), written+pollChunk)]
		reached, err := p.push(chunk)
		if err == nil && (reached < p.up || reached > p.up+int64(len(chunk))) {
			return written, fmt.Errorf("push: hub reached byte %d, sent %d to %d", reached, p.up, p.up+int64(len(chunk)))
		}
		if err != nil {
			if err := retry.failed(err); err != nil {
				return written, fmt.Errorf("push: %w", err)
			}
			continue
		}
		retry.ok()
		written += int(reached - p.up)
		p.up = reached
	}
	return len(b), nil
}

func (p *pollClient) push(chunk []byte) (int64, error) {
	resp, done, err := p.do(nethttp.MethodPost, "/push?offset="+strconv.FormatInt(p.up, 10), bytes.NewReader(chunk))
	if err != nil {
		return 0, err
	}
	defer done()
	resp.Body.Close()
	return strconv.ParseInt(resp.Header.Get(headerOffset), 10, 64)
}

func (p *pollClient) Read(b []byte) (int, error) {
	retry := retrier{p: p}
	for {
		if p.body == nil {
			wait := strconv.FormatInt(p.d.opt.PollWait.Milliseconds(), 10)
			resp, done, err := p.do(nethttp.MethodGet, "/pull?offset="+strconv.FormatInt(p.down, 10)+"&wait="+wait, nil)
			if err != nil {
				if err := retry.failed(err); err != nil {
					return 0, fmt.Errorf("pull: %w", err)
				}
				continue
			}
			retry.ok()
			p.body, p.bodyDone = resp.Body, done
		}
		n, err := p.body.Read(b)
		p.down += int64(n)
		if err != nil {
			p.body.Close()
			p.bodyDone()
			p.body = nil
		}
		if n > 0 {
			return n, nil
		}
		if err != nil && !errors.Is(err, io.EOF) {
			if err := retry.failed(err); err != nil {
				return 0, fmt.Errorf("pull: %w", err)
			}
		}
	}
}

func (p *pollClient) CloseWrite() error { return p.delete(p.ctx) }

func (p *pollClient) delete(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, p.d.opt.CloseGrace)
	defer cancel()
	req, err := p.d.request(ctx, nethttp.MethodDelete, p.path, nil)
	if err != nil {
		return err
	}
	resp, err := p.rt.RoundTrip(req)
	if err != nil {
		return err
	}
	p.deleted.Store(true)
	return resp.Body.Close()
}

// Abort tells the hub, which has no connection to see closed. It takes at most
// CloseGrace.
func (p *pollClient) Abort() {
	p.cancel()
	if !p.deleted.Load() {
		_ = p.delete(context.Background()) // or the hub notices by the silence
	}
	p.cut.close()
	p.rt.CloseIdleConnections()
}
