package http

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	nethttp "net/http"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/tlsfiles"
	"github.com/litefs-agent/litefs-agent/transport"
)

// Mode says how a Dialer uses HTTP.
type Mode uint8

const (
	ModeAuto   Mode = iota // ModeStream, and where that does not get through, ModePoll
	ModeStream             // one HTTP/2 request
	ModePoll               // short requests and a long poll, HTTP/1.1 if need be
)

// DialOptions tune a Dialer. The zero value of a field means its default.
type DialOptions struct {
	transport.Config
	Mode Mode
	// PollWait is how long a long poll may be held by the hub; 20 s by default.
	// Proxies cut requests that are silent for longer than they like.
	PollWait time.Duration
	// Credentials, if set, is asked at the begin of each Dial for what the whole
	// session then shows.
	Credentials func() (Credentials, error)
	// Proxy is as in net/http; nil uses none.
	Proxy func(*nethttp.Request) (*url.URL, error)
}

// Credentials say who dials, and whom it trusts.
type Credentials struct {
	// TLS is for https URLs; nil is Go's default.
	TLS *tls.Config
	// Token is a bearer token, "" for none.
	Token string
}

// A Dialer opens sessions to the hub at one URL. It is safe for concurrent use.
type Dialer struct {
	base *url.URL
	opt  DialOptions
	cred Credentials // of one Dial
	*memory
}

// A memory is what a Dialer learns.
type memory struct {
	mu        sync.Mutex
	pollUntil time.Time // streams do not get through: ModeAuto polls until then
}

// pollAgain is how long ModeAuto remembers that streams do not get through.
const pollAgain = 10 * time.Minute

var _ transport.Dialer = (*Dialer)(nil)

// NewDialer returns a Dialer for a hub's URL, http or https, which may have a path.
func NewDialer(rawURL string, opt DialOptions) (*Dialer, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, err
	}
	if (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("%s: want http(s)://HOST[:PORT][/PATH]", u.Redacted())
	}
	opt.Config = opt.Config.WithDefaults()
	opt.PollWait = orDefault(opt.PollWait, 20*time.Second)
	return &Dialer{base: u, opt: opt, memory: new(memory)}, nil
}

// withCredentials returns a Dialer for one Dial.
func (d *Dialer) withCredentials() (*Dialer, error) {
	one := *d
	if d.opt.Credentials == nil {
		return &one, nil
	}
	var err error
	if one.cred, err = d.opt.Credentials(); err != nil {
		return nil, fmt.Errorf("credentials: %w", err)
	}
	return &one, nil
}

// Dial implements [transport.Dialer].
func (d *Dialer) Dial(ctx context.Context, hello *transport.Hello) (transport.Conn, *transport.Welcome, error) {
	hello = d.opt.Config.Hello(hello)
	frame, err := transport.AppendFrame(nil, hello, transport.MaxHelloFrame)
	if err != nil {
		return nil, nil, err
	}
	d, err = d.withCredentials()
	if err != nil {
		return nil, nil, err
	}
	mode := d.opt.Mode
	d.mu.Lock()
	if mode == ModeAuto && time.Now().Before(d.pollUntil) {
		mode = ModePoll
	}
	d.mu.Unlock()
	if mode == ModePoll {
		c, w, _, err := d.attempt(ctx, d.dialPoll, hello, frame, d.opt.HelloTimeout)
		return c, w, err
	}
	timeout := d.opt.HelloTimeout
	if at, ok := ctx.Deadline(); ok && mode == ModeAuto {
		timeout = min(timeout, time.Until(at)/2)
	}
	c, w, reached, err := d.attempt(ctx, d.dialStream, hello, frame, timeout)
	if err == nil || mode == ModeStream || !reached || ctx.Err() != nil || answered(err) || tlsfiles.CertificateFault(err) {
		return c, w, err
	}
	c, w, _, pollErr := d.attempt(ctx, d.dialPoll, hello, frame, d.opt.HelloTimeout)
	if pollErr != nil {
		if answered(pollErr) {
			return nil, nil, pollErr
		}
		return nil, nil, fmt.Errorf("http/2: %w; polling: %w", err, pollErr)
	}
	d.mu.Lock()
	d.pollUntil = time.Now().Add(pollAgain)
	d.mu.Unlock()
	return c, w, nil
}

// answered reports whether err is an answer of the hub itself.
func answered(err error) bool {
	return errors.Is(err, transport.ErrEnded) || errors.Is(err, transport.ErrVersion)
}

type dialFunc func(ctx context.Context, k *cutter, frame []byte) (pipe transport.Pipe, answer transport.Message, err error)

// attempt dials once. reached tells whether a connection was made at all.
func (d *Dialer) attempt(ctx context.Context, dial dialFunc, hello *transport.Hello, frame []byte, timeout time.Duration) (
	c transport.Conn, w *transport.Welcome, reached bool, err error) {
	dialCtx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	k := new(cutter)
	pipe, answer, err := dial(dialCtx, k, frame)
	if err != nil {
		reached = k.connected()
		k.close()
		if dialCtx.Err() != nil && ctx.Err() == nil {
			err = fmt.Errorf("no welcome within %s: %w", timeout, err)
		}
		return nil, nil, reached, fmt.Errorf("dial %s: %w", d.base.Redacted(), err)
	}
	w, limits, err := d.opt.Welcomed(hello, answer)
	if err != nil || w.MovedURL != "" {
		pipe.Abort()
		if err != nil {
			return nil, nil, true, fmt.Errorf("dial %s: %w", d.base.Redacted(), err)
		}
		return nil, w, true, nil
	}
	return transport.NewSession(pipe, d.opt.Config, limits), w, true, nil
}

// transport returns a client whose connections are k's: one session, one client.
func (d *Dialer) transport(k *cutter, p *nethttp.Protocols) *nethttp.Transport {
	dialer := &net.Dialer{Timeout: d.opt.HelloTimeout, Control: func(_, _ string, c syscall.RawConn) error {
		limitUnsent(c)
		return nil
	}}
	var tlsConfig *tls.Config
	if d.cred.TLS != nil {
		tlsConfig = d.cred.TLS.Clone()
	}
	return &nethttp.Transport{
		Protocols:              p,
		HTTP2:                  http2Config(d.opt.Config),
		Proxy:                  d.opt.Proxy,
		TLSClientConfig:        tlsConfig,
		TLSHandshakeTimeout:    d.opt.HelloTimeout,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeaderBytes,
		MaxIdleConnsPerHost:    2,
		IdleConnTimeout:        2 * d.opt.PollWait,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, addr)
			if err == nil {
				k.add(conn)
			}
			return conn, err
		},
	}
}

func (d *Dialer) request(ctx context.Context, method, path string, body io.Reader) (*nethttp.Request, error) {
	u := *d.base
	path, u.RawQuery, _ = strings.Cut(path, "?")
	u.Path = strings.TrimSuffix(u.Path, "/") + path
	r, err := nethttp.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, err
	}
	if body != nil {
		r.Header.Set("Content-Type", contentType)
	}
	if d.cred.Token != "" {
		r.Header.Set("Authorization", "Bearer "+d.cred.Token)
	}
	return r, nil
}

// A statusError is an HTTP answer that is not the protocol's own.
type statusError struct {
	code int
	text string
}

func (e *statusError) Error() string {
	return fmt.Sprintf("http status %d %s: %s", e.code, nethttp.StatusText(e.code), e.text)
}

// checkFrames returns an error if the answer does not carry frames.
func checkFrames(r *nethttp.Response) error {
	if r.StatusCode == nethttp.StatusOK && r.Header.Get("Content-Type") == contentType {
		return nil
	}
	text, _ := io.ReadAll(io.LimitReader(r.Body, 200)) // as much as there is, for the message
	return &statusError{r.StatusCode, strings.TrimSpace(string(text))}
}

// dialStream opens one HTTP/2 request whose two bodies are the session.
func (d *Dialer) dialStream(dialCtx context.Context, k *cutter, frame []byte) (_ transport.Pipe, _ transport.Message, err error) {
	p := new(nethttp.Protocols)
	p.SetHTTP2(true)
	p.SetUnencryptedHTTP2(true)
	pr, pw := io.Pipe()
	ctx, cancel := context.WithCancel(context.Background()) // of the session; dialCtx ends with Dial
	pipe := &clientPipe{pw: pw, pr: pr, cut: k, cancel: cancel, rt: d.transport(k, p)}
	defer func() {
		if err != nil {
			pipe.Abort()
		}
	}()
	stop := context.AfterFunc(dialCtx, cancel)
	defer func() {
		if !stop() && err == nil {
			err = dialCtx.Err()
		}
	}()
	body := struct {
		io.Reader
		io.Closer
	}{io.MultiReader(newReader(frame), pr), pr}
	req, err := d.request(ctx, nethttp.MethodPost, pathSession, body)
	if err != nil {
		return nil, nil, err
	}
	req.ContentLength = -1
	resp, err := pipe.rt.RoundTrip(req)
	if err != nil {
		return nil, nil, err
	}
	pipe.body = resp.Body
	if err := checkFrames(resp); err != nil {
		return nil, nil, err
	}
	answer, _, err := transport.ReadFrame(resp.Body, transport.MaxHelloFrame)
	if err != nil {
		return nil, nil, fmt.Errorf("read welcome: %w", err)
	}
	return pipe, answer, nil
}

// A clientPipe is the two bodies of one HTTP/2 request, at the client.
type clientPipe struct {
	pr     *io.PipeReader // the end that net/http reads
	pw     *io.PipeWriter
	body   io.ReadCloser
	cancel context.CancelFunc
	cut    *cutter
	rt     *nethttp.Transport
}

func (p *clientPipe) Read(b []byte) (int, error)  { return p.body.Read(b) }
func (p *clientPipe) Write(b []byte) (int, error) { return p.pw.Write(b) }
func (p *clientPipe) CloseWrite() error           { return p.pw.Close() }

func (p *clientPipe) Abort() {
	p.cancel()
	p.pr.Close()
	p.cut.close()
	if p.body != nil {
		p.body.Close()
	}
	p.rt.CloseIdleConnections()
}
