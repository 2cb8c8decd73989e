package fuse

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// yieldAfter must be less than the 10 ms after which the Go scheduler preempts.
const yieldAfter = 8 * time.Millisecond

// quietAfter is how long no request must come until the engine is told: longer
// than SQLite takes from the answer to its FSYNC to the publication of a commit.
const quietAfter = 100 * time.Microsecond

// The readers are the goroutines that read requests and handle them.
//
// At most one, the reader, sits in read(2) or is about to. It handles requests by
// itself, so that none waits for a switch between threads. Others stand by in
// epoll_wait(2), where they see requests only while the watch is set:
//
//	           is going to wait            the wait is over
//	reader ────► sets the watch ─────────────► takes it back: reader again
//	                   │                            │ it was taken:
//	                   │ a request comes            └─► stands by, or ends
//	stands by ─────────┴────► takes the watch: it is the reader now
//
// So while nobody else wants anything, a wait for the disk costs two cheap system
// calls and no switch. A handler that finds only half-way that it has to wait
// brackets that with beginWait and endWait; until endWait each reader sets the
// watch before it handles anything, since what it handles may in turn wait for
// the first.
type readers struct {
	c    *connection // set by init, then constant
	ep   int         // where they stand by; set by init, closed by run
	stop int         // eventfd in ep: nothing more will come; set by init, closed by run

	mu      sync.Mutex  // guards reading, standN, ended and changes of watched; held over epoll_ctl
	reading bool        // somebody is in read(2) or about to be; then watched is not set
	watched atomic.Bool // ep reports requests
	standN  int         // goroutines in epoll_wait or about to be
	ended   bool        // nothing more will be read

	waiting atomic.Int32   // handlers between beginWait and endWait
	quit    atomic.Bool    // the reader ends after the request it got
	wg      sync.WaitGroup // all
}

func (r *readers) init(c *connection) (err error) {
	r.c, r.ep, r.stop = c, -1, -1
	if r.ep, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	if r.stop, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err == nil {
		err = unix.EpollCtl(r.ep, unix.EPOLL_CTL_ADD, r.stop, &unix.EpollEvent{Events: unix.EPOLLIN})
	}
	if err != nil {
		r.close()
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

func (r *readers) close() {
	unix.Close(r.ep)
	if r.stop >= 0 {
		unix.Close(r.stop)
	}
}

// run reads until nothing more comes and everything is answered.
func (r *readers) run() {
	r.reading = true
	r.wg.Add(1)
	go r.loop(true)
	r.wg.Wait()
	r.close()
}

// loop is one of the readers. Who started it has counted it, as the reader or as
// standing by.
func (r *readers) loop(reading bool) {
	defer r.wg.Done()
	var k *call
	for {
		if !reading {
			if k != nil {
				r.c.bufs.Put(k)
				k = nil
			}
			if !r.standBy() {
				return
			}
		}
		if k == nil {
			k = r.c.bufs.Get().(*call)
		}
		n := r.next(k)
		k.reader = false
		if end := r.began(n); n > 0 {
			r.c.take(k, n)
			if end {
				return
			}
		} else if end {
			return
		}
		var stand bool
		if reading, stand = r.goOn(k); !reading && !stand {
			r.c.bufs.Put(k)
			return
		}
		k.yield()
	}
}

// next reads a request, and returns 0 if nothing more comes.
func (r *readers) next(k *call) int {
	for {
		if store := r.c.fs.store; store.WantsQuiet() && !ready(r.c.fd, quietAfter) {
			store.Quiet()
		}
		n, err := unix.Read(r.c.fd, k.in[:inSize])
		switch {
		case err == nil:
			return n
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOENT):
			continue // ENOENT: the request was given up before we got it
		case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ECONNABORTED): // unmounted or aborted
		default:
			r.c.log.Error("reading /dev/fuse failed", "err", err)
		}
		return 0
	}
}

// ready reports whether fd can be read from, within d.
func ready(fd int, d time.Duration) bool {
	ts := unix.NsecToTimespec(d.Nanoseconds())
	n, err := unix.Ppoll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, &ts, nil)
	return n != 0 || err != nil
}

// began says that the reader has got n bytes and is going to handle them, or, if
// n is 0, that there is nothing to read any more. It reports whether the caller is to
// end.
func (r *readers) began(n int) (end bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reading = false
	if n > 0 && !r.quit.Load() {
		return false
	}
	r.ended = true
	_, _ = unix.Write(r.stop, []byte{1, 0, 0, 0, 0, 0, 0, 1})
	return true
}

// goOn makes the caller, who has handled a request, the reader again, or has it
// stand by, or neither.
func (r *readers) goOn(k *call) (reading, stand bool) {
	if k.reader {
		return true, false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.becomeReaderLocked() {
		return true, false
	}
	if r.ended || r.standN > 0 {
		return false, false
	}
	r.standN++
	return false, true
}

func (r *readers) becomeReaderLocked() bool {
	if r.reading || r.ended {
		return false
	}
	if r.watched.Load() {
		r.watchLocked(false)
	}
	r.reading = true
	return true
}

// standBy returns true when the caller has become the reader, false when nothing
// more comes.
func (r *readers) standBy() bool {
	var events [2]unix.EpollEvent
	for {
		_, _ = unix.EpollWait(r.ep, events[:], -1) // fails by EINTR
		r.mu.Lock()
		took, ended := r.watched.Load() && r.becomeReaderLocked(), r.ended
		if took || ended {
			r.standN--
			r.mu.Unlock()
			return took
		}
		r.mu.Unlock()
	}
}

// watchLocked has ep report requests, or not.
func (r *readers) watchLocked(on bool) {
	op := unix.EPOLL_CTL_DEL // to ask for no events would still wake who stands by
	if on {
		op = unix.EPOLL_CTL_ADD
	}
	if err := unix.EpollCtl(r.ep, op, r.c.fd, &unix.EpollEvent{Events: unix.EPOLLIN}); err != nil {
		panic(fmt.Sprint("epoll: ", err)) // of no known cause
	}
	r.watched.Store(on)
}

// relieve sees to it that requests are read while the caller waits.
func (r *readers) relieve() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reading || r.ended || r.watched.Load() {
		return
	}
	if r.standN == 0 {
		r.standN++
		r.wg.Add(1)
		go r.loop(false)
	}
	r.watchLocked(true)
}

// resume makes the caller the reader again if nobody took that over while it
// waited.
func (r *readers) resume(k *call) {
	if !r.watched.Load() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	k.reader = r.becomeReaderLocked()
}

// beginWait says that the caller is about to wait for something that may need
// other requests to be served. endWait says that it no longer does.
func (r *readers) beginWait() {
	r.waiting.Add(1)
	r.relieve()
}

func (r *readers) endWait() { r.waiting.Add(-1) }

// yield gives way to other goroutines now and then. The Go scheduler suspects a
// goroutine that has run for 10 ms: from then on it looks after it every 20 µs,
// and takes its processor away whenever it is in a system call, as a reader is most
// of the time. Source: retake in the Go runtime's proc.go.
func (k *call) yield() {
	if now := time.Now(); now.Sub(k.yielded) > yieldAfter {
		k.yielded = now
		runtime.Gosched()
	}
}
