package hub

import (
	"context"
	"errors"
	"fmt"
	"math"
	"syscall"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/transport"
)

const (
	// memoryStream is the size in bytes up to which a stream is put together in
	// memory.
	memoryStream = 256 << 10
	// streamMargin is what must stay free in the data folder beside all streams.
	streamMargin = 16 << 20
	// streamStep is how much room a stream that does not say its size takes at once.
	streamStep = 4 << 20
	// streamStall is how long a stream may stand still.
	streamStall = 10 * time.Minute
)

// A stream is a record of which more is to come.
type stream struct {
	push *transport.Push
	mem  []byte
	file disk.File // nil while mem is enough
	size int64
	room room
	at   time.Time // of its last byte
}

// close lets go of the file and its room. It may be called twice.
func (st *stream) close() {
	if st.file != nil {
		_ = st.file.Close()
	}
	st.room.give()
}

// A room is what a stream has reserved of the disk, so that those who announce
// much at the same time do not fill it together. A record is kept twice while it
// is applied.
type room struct {
	h     *Ingest
	until int64 // size of the stream for which there is room
	held  int64 // bytes reserved and not written yet
}

// take reserves room for a stream of size bytes.
func (r *room) take(size int64) error {
	if size <= r.until {
		return nil
	}
	more := size - r.until
	free, err := r.h.opt.FS.Free()
	if err != nil {
		return err
	}
	r.h.mu.Lock()
	defer r.h.mu.Unlock()
	if have := free - r.h.reserved - streamMargin; more > max(have, 0)/2 {
		return fmt.Errorf("%w: %d bytes free, of which streams have reserved %d; %d more are wanted, twice", syscall.ENOSPC, free, r.h.reserved, more)
	}
	r.h.reserved += 2 * more
	r.held += 2 * more
	r.until = size
	return nil
}

// wrote notes that n bytes of the room are taken from the disk's.
func (r *room) wrote(n int64) {
	r.h.mu.Lock()
	defer r.h.mu.Unlock()
	r.h.reserved -= n
	r.held -= n
}

// give gives back what is left.
func (r *room) give() {
	r.h.mu.Lock()
	defer r.h.mu.Unlock()
	r.h.reserved -= r.held
	r.held = 0
}

// recv returns the next message, or nil when a stream may have stood still for
// too long.
func (s *session) recv(ctx context.Context) (transport.Message, error) {
	if len(s.streams) == 0 {
		return s.c.Recv(ctx)
	}
	until, cancel := context.WithTimeout(ctx, s.h.opt.StreamStall)
	defer cancel()
	m, err := s.c.Recv(until)
	if err != nil && errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil, nil
	}
	return m, err
}

// sweep gives up the streams that stand still, at most twice in the time that
// they may.
func (s *session) sweep(ctx context.Context) error {
	now := time.Now()
	if len(s.streams) == 0 || now.Sub(s.swept) < s.h.opt.StreamStall/2 {
		return nil
	}
	s.swept = now
	for _, st := range s.streams {
		if now.Sub(st.at) < s.h.opt.StreamStall {
			continue
		}
		if err := s.drop(ctx, st, transport.NakBusy, errors.New("nothing of the record came for too long")); err != nil {
			return err
		}
	}
	return nil
}

// drop gives a stream up.
func (s *session) drop(ctx context.Context, st *stream, code transport.NakCode, err error) error {
	if hidden, ok := s.said.allow(time.Now()); ok {
		s.h.log.Warn("record refused", "peer", s.node, "db", st.push.Name, "unlogged", hidden, "err", err)
	}
	s.in.Drop(st.push.Stream)
	s.forget(st.push.Stream)
	s.giveUp(st.push.Group)
	return s.refuse(ctx, st.push, code, err)
}

// grow adds bytes to a stream; where there is no room for them the node is told
// to try again later.
func (s *session) grow(ctx context.Context, st *stream, b []byte) error {
	if err := s.write(st, b); err != nil {
		return s.drop(ctx, st, transport.NakBusy, fmt.Errorf("no room for it in the data folder: %w", err))
	}
	return nil
}

func (s *session) write(st *stream, b []byte) error {
	if st.file == nil && int64(len(st.mem)+len(b)) <= memoryStream && st.push.Size <= memoryStream {
		st.mem = append(st.mem, b...)
		st.size += int64(len(b))
		return nil
	}
	end := st.size + int64(len(b))
	if end > math.MaxInt64/4 || st.push.Size > math.MaxInt64/4 {
		return syscall.ENOSPC
	}
	want := st.push.Size
	if want < 0 && end > st.room.until {
		want = end + streamStep
	}
	if err := st.room.take(max(want, end)); err != nil {
		return err
	}
	if st.file == nil {
		var err error
		if st.file, err = s.h.opt.FS.CreateTemp("."); err != nil {
			return err
		}
		if _, err := st.file.WriteAt(st.mem, 0); err != nil {
			return err
		}
		st.room.wrote(int64(len(st.mem)))
		st.mem = nil
	}
	if _, err := st.file.WriteAt(b, st.size); err != nil {
		return err
	}
	st.room.wrote(int64(len(b)))
	st.size = end
	return nil
}

// forget removes a stream.
func (s *session) forget(number uint64) {
	if st := s.streams[number]; st != nil {
		st.close()
		delete(s.streams, number)
	}
}
