package control

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/litefs-agent/litefs-agent/ltx"
)

// A Client talks to the service behind one socket. Its methods make one request
// each and may be called in parallel. Errors: ErrNoService, ErrNoDatabase,
// ErrTimeout, ErrCut, else what the service said.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient returns a client for the socket at path. It does not connect yet.
func NewClient(path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
	return &Client{socket: path, http: &http.Client{Transport: &http.Transport{DialContext: dial, DisableCompression: true}}}
}

// Nodes returns what a hub knows of its nodes.
func (c *Client) Nodes(ctx context.Context) (list []NodeInfo, err error) {
	return list, c.ask(ctx, http.MethodGet, "/nodes", nil, &list)
}

// AcceptNode lets a refused clone go on as node id: that on hardware, or with ""
// the only one.
func (c *Client) AcceptNode(ctx context.Context, id, hardware string) (info NodeInfo, err error) {
	return info, c.ask(ctx, http.MethodPost, "/nodes/accept", url.Values{"node": {id}, "hardware": {hardware}}, &info)
}

func (c *Client) ask(ctx context.Context, method, path string, query url.Values, into any) error {
	resp, err := c.do(ctx, method, path, query)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// Status returns the JSON of GET /status.
func (c *Client) Status(ctx context.Context) (json.RawMessage, error) {
	resp, err := c.do(ctx, http.MethodGet, "/status", nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var status json.RawMessage
	if err := json.NewDecoder(resp.Body).Decode(&status); err != nil {
		return nil, fmt.Errorf("status: %w", err)
	}
	return status, nil
}

// Wait returns when db has reached txid, or with acked when txid is acked. txid
// 0 is the position now; timeout 0 waits for ever.
func (c *Client) Wait(ctx context.Context, db string, txid ltx.TXID, acked bool, timeout time.Duration) error {
	query := url.Values{"db": {db}}
	if txid != 0 {
		query.Set("txid", txid.String())
	}
	if acked {
		query.Set("acked", "1")
	}
	if timeout > 0 {
		query.Set("timeout", timeout.String())
	}
	resp, err := c.do(ctx, http.MethodGet, "/wait", query)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// Export writes db to w as one SQLite file. After an error w holds a part of it.
func (c *Client) Export(ctx context.Context, db string, w io.Writer) error {
	return c.stream(ctx, http.MethodGet, "/export", db, func(body io.Reader) error {
		_, err := io.Copy(w, body)
		return err
	})
}

// Import makes the SQLite file in r the content of db. When it returns nil that is
// durable.
func (c *Client) Import(ctx context.Context, db string, r io.Reader) error {
	resp, err := c.send(ctx, http.MethodPost, "/import", url.Values{"db": {db}}, r)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// Verify has db verified, or with "" everything, and calls report for each
// thing looked at.
func (c *Client) Verify(ctx context.Context, db string, report func(Check)) error {
	return c.stream(ctx, http.MethodPost, "/verify", db, func(body io.Reader) error {
		lines := json.NewDecoder(body)
		for {
			var check Check
			if err := lines.Decode(&check); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
			report(check)
		}
	})
}

// Events calls report for what happens to db, or with "" for everything that
// happens, until ctx ends or the service does. begun, if not nil, is called once
// nothing is missed any more.
func (c *Client) Events(ctx context.Context, db string, begun func(), report func(json.RawMessage) error) error {
	return c.stream(ctx, http.MethodGet, "/events", db, func(body io.Reader) error {
		if begun != nil {
			begun()
		}
		lines := json.NewDecoder(body)
		for {
			var line json.RawMessage
			if err := lines.Decode(&line); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
			if err := report(line); err != nil {
				return &receiveError{err}
			}
		}
	})
}

// ExportLTX calls receive for each file of the history of db, in the service's
// order. file ends after size bytes.
func (c *Client) ExportLTX(ctx context.Context, db string, receive func(name string, size int64, file io.Reader) error) error {
	return c.stream(ctx, http.MethodGet, "/ltx", db, func(body io.Reader) error {
		files := tar.NewReader(body)
		for {
			header, err := files.Next()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			if err := receive(header.Name, header.Size, files); err != nil {
				return &receiveError{err}
			}
		}
	})
}

// A receiveError is an error of the receiver: the stream itself was good.
type receiveError struct{ err error }

func (e *receiveError) Error() string { return e.err.Error() }
func (e *receiveError) Unwrap() error { return e.err }

// stream makes a request and hands its body to consume. The trailer decides:
// what the service says went wrong is told before how consume saw the stream end.
func (c *Client) stream(ctx context.Context, method, path, db string, consume func(io.Reader) error) error {
	query := url.Values{}
	if db != "" {
		query.Set("db", db)
	}
	resp, err := c.do(ctx, method, path, query)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	consumeErr := consume(resp.Body)
	var receive *receiveError
	if errors.As(consumeErr, &receive) {
		return receive.err
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil { // the trailer comes at EOF
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("%w (%v)", ErrCut, err)
	}
	switch result := resp.Trailer.Get(resultTrailer); result {
	case resultOK:
		return consumeErr
	case "":
		return ErrCut
	default:
		text, err := url.PathUnescape(strings.TrimPrefix(result, "error: "))
		if err != nil {
			text = result
		}
		return errors.New(text)
	}
}

// do makes a request and turns a refusal into its error.
func (c *Client) do(ctx context.Context, method, path string, query url.Values) (*http.Response, error) {
	return c.send(ctx, method, path, query, nil)
}

// send is do with a body.
func (c *Client) send(ctx context.Context, method, path string, query url.Values, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://service"+path+"?"+query.Encode(), body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.connectError(ctx, err)
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	return nil, refused(resp)
}

func (c *Client) connectError(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w at %s", ErrNoService, c.socket)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%s: permission denied: run this as root or as a member of the mount's group", c.socket)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET):
		return ErrCut
	}
	return err
}

// refused reads the error of a refused request.
func refused(resp *http.Response) error {
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10)) // the status code is what matters
	var body refusal
	if json.Unmarshal(text, &body) != nil || body.Error == "" {
		body.Error = resp.Status
	}
	for _, known := range []error{ErrNoDatabase, ErrTimeout} {
		if statusOf(known) == resp.StatusCode {
			return &serviceError{body.Error, known}
		}
	}
	return errors.New(body.Error)
}

// A serviceError is a refusal in the service's words.
type serviceError struct {
	text string
	kind error
}

func (e *serviceError) Error() string { return e.text }
func (e *serviceError) Unwrap() error { return e.kind }
