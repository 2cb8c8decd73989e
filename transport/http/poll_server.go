package http

import (
	"errors"
	"io"
	nethttp "net/http"
	"strconv"
	"sync"
	"time"

	"github.com/litefs-agent/litefs-agent/transport"
)

// A pollPipe is the server's end of a session over short requests: a byte stream
// each way whose bytes are numbered, so that a request sent again is harmless.
//
//	push?offset=N: the body is the up stream from byte N. What is known is skipped.
//	pull?offset=N: the answer is the down stream from byte N. What is before is dropped.
//
// Of several requests in one direction the newest counts; an older one, which its
// client has given up, can no longer move the stream.
type pollPipe struct {
	opt     ServerOptions
	peer    transport.Peer // who opened the session
	aborted chan struct{}

	upReady, upRoom chan struct{} // 1 token each
	downRoom        chan struct{}

	mu        sync.Mutex // guards what follows
	up        []byte     // received, not yet read by the session
	upOffset  int64      // of the next byte expected
	upTurn    *turn      // the push request in charge
	upEnd     bool       // the client is done
	down      []byte     // not yet confirmed by the client
	downBase  int64      // offset of down[0]
	downTurn  *turn      // the pull request in charge
	downReady chan struct{}
}

// A turn is one request's right to move a stream; over is closed by its successor.
type turn struct{ over chan struct{} }

func newPollPipe(opt ServerOptions, peer transport.Peer) *pollPipe {
	one := func() chan struct{} { return make(chan struct{}, 1) }
	return &pollPipe{opt: opt, peer: peer, aborted: make(chan struct{}),
		upReady: one(), upRoom: one(), downRoom: one(), downReady: one()}
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// takeLocked makes a new turn the one in charge.
func takeLocked(current **turn) *turn {
	if *current != nil {
		close((*current).over)
	}
	*current = &turn{over: make(chan struct{})}
	return *current
}

var errAborted = errors.New("session is over")

func (p *pollPipe) Read(b []byte) (int, error) {
	for {
		select {
		case <-p.aborted:
			return 0, errAborted
		default:
		}
		p.mu.Lock()
		n := copy(b, p.up)
		p.up = p.up[n:]
		if len(p.up) == 0 {
			p.up = nil
		}
		end := p.upEnd
		p.mu.Unlock()
		if n > 0 {
			wake(p.upRoom)
			return n, nil
		}
		if end {
			return 0, io.EOF
		}
		select {
		case <-p.upReady:
		case <-p.aborted:
		}
	}
}

func (p *pollPipe) Write(b []byte) (int, error) {
	for {
		p.mu.Lock()
		if len(p.down) == 0 || len(p.down)+len(b) <= p.opt.SendQueue {
			p.down = append(p.down, b...)
			p.mu.Unlock()
			wake(p.downReady)
			return len(b), nil
		}
		p.mu.Unlock()
		select {
		case <-p.downRoom:
		case <-p.aborted:
			return 0, errAborted
		}
	}
}

// CloseWrite does nothing: the client learns of the end by the Bye.
func (p *pollPipe) CloseWrite() error { return nil }

func (p *pollPipe) Abort() { close(p.aborted) }

func offset(w nethttp.ResponseWriter, r *nethttp.Request) (int64, bool) {
	n, err := strconv.ParseInt(r.URL.Query().Get("offset"), 10, 64)
	if err != nil || n < 0 {
		nethttp.Error(w, "offset: want a number", nethttp.StatusBadRequest)
		return 0, false
	}
	return n, true
}

func gone(w nethttp.ResponseWriter) {
	nethttp.Error(w, errAborted.Error(), nethttp.StatusGone)
}

func conflict(w nethttp.ResponseWriter, why string, at int64) {
	w.Header().Set(headerOffset, strconv.FormatInt(at, 10))
	nethttp.Error(w, why, nethttp.StatusConflict)
}

// servePush answers with the offset reached, which is short of the body's end when
// the session did not take it within PollWait.
func (p *pollPipe) servePush(w nethttp.ResponseWriter, r *nethttp.Request) {
	at, ok := offset(w, r)
	if !ok {
		return
	}
	p.mu.Lock()
	if reached := p.upOffset; at > reached || p.upEnd {
		p.mu.Unlock()
		conflict(w, "bytes are missing before this offset", reached)
		return
	}
	mine := takeLocked(&p.upTurn)
	p.mu.Unlock()

	rc := nethttp.NewResponseController(w)
	_ = rc.SetWriteDeadline(time.Time{})
	_ = rc.SetReadDeadline(time.Now().Add(p.opt.PollWait + p.opt.DeadAfter))
	wait := time.NewTimer(p.opt.PollWait)
	defer wait.Stop()
	buf := make([]byte, 16<<10)
	r.Body = nethttp.MaxBytesReader(w, r.Body, maxPushBody)
	for {
		n, err := r.Body.Read(buf)
		if n > 0 {
			taken, reason := p.take(buf[:n], at, mine, r, wait.C)
			at += int64(n)
			if !taken {
				switch reason {
				case errAborted:
					gone(w)
					return
				case errTurn:
					conflict(w, "a newer request is in charge", 0)
					return
				}
				break // no room in time
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return // the client is gone; what was taken is taken
		}
	}
	p.mu.Lock()
	reached := p.upOffset
	p.mu.Unlock()
	w.Header().Set(headerOffset, strconv.FormatInt(reached, 10))
	w.WriteHeader(nethttp.StatusNoContent)
}

var (
	errTurn = errors.New("a newer request is in charge")
	errWait = errors.New("no room")
)

// take moves b, the up stream from offset at, into up, without what is there.
func (p *pollPipe) take(b []byte, at int64, mine *turn, r *nethttp.Request, timeout <-chan time.Time) (bool, error) {
	for {
		p.mu.Lock()
		if p.upTurn != mine {
			p.mu.Unlock()
			wake(p.upRoom) // the token may have been the successor's
			return false, errTurn
		}
		known := min(max(p.upOffset-at, 0), int64(len(b)))
		if b, at = b[known:], at+known; len(b) == 0 {
			p.mu.Unlock()
			return true, nil
		}
		if len(p.up) < pollChunk {
			p.up = append(p.up, b...)
			p.upOffset += int64(len(b))
			p.mu.Unlock()
			wake(p.upReady)
			return true, nil
		}
		p.mu.Unlock()
		select {
		case <-p.upRoom:
		case <-mine.over:
		case <-timeout:
			return false, errWait
		case <-r.Context().Done():
			return false, errWait
		case <-p.aborted:
			return false, errAborted
		}
	}
}

func (p *pollPipe) servePull(w nethttp.ResponseWriter, r *nethttp.Request) {
	at, ok := offset(w, r)
	if !ok {
		return
	}
	wait := p.opt.PollWait
	if ms, err := strconv.ParseInt(r.URL.Query().Get("wait"), 10, 32); err == nil && ms >= 0 {
		wait = min(wait, time.Duration(ms)*time.Millisecond)
	}
	p.mu.Lock()
	if base, end := p.downBase, p.downBase+int64(len(p.down)); at < base || at > end {
		p.mu.Unlock()
		conflict(w, "these bytes are not held", base)
		return
	}
	mine := takeLocked(&p.downTurn)
	if p.down = p.down[at-p.downBase:]; len(p.down) == 0 {
		p.down = nil
	}
	p.downBase = at
	p.mu.Unlock()
	wake(p.downRoom)

	rc := nethttp.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Time{})
	_ = rc.SetWriteDeadline(time.Time{})
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		p.mu.Lock()
		var b []byte
		if p.downTurn == mine {
			b = append(b, p.down...)
		}
		p.mu.Unlock()
		if len(b) > 0 {
			_ = rc.SetWriteDeadline(time.Now().Add(p.opt.PollWait + p.opt.DeadAfter))
			w.Header().Set("Content-Type", contentType)
			w.Header().Set("Content-Length", strconv.Itoa(len(b)))
			_, _ = w.Write(b) // the client asks again for what it lacks
			return
		}
		select {
		case <-p.downReady:
			continue
		case <-mine.over:
			wake(p.downReady) // the token may have been the successor's
			conflict(w, errTurn.Error(), 0)
		case <-p.aborted:
			gone(w)
		case <-timer.C:
			w.WriteHeader(nethttp.StatusNoContent)
		case <-r.Context().Done():
		}
		return
	}
}

// serveDelete ends the up stream: nothing follows what was pushed.
func (p *pollPipe) serveDelete(w nethttp.ResponseWriter, _ *nethttp.Request) {
	p.mu.Lock()
	p.upEnd = true
	p.mu.Unlock()
	wake(p.upReady)
	w.WriteHeader(nethttp.StatusNoContent)
}
