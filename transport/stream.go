package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// dataOverhead is more than a Data frame holds beside its payload.
const dataOverhead = 48

// SendPush sends the record p whose LTX file is read from r: in one message if it
// fits, else as Push and Data chunks between which other Sends go first. p.Size is
// that of the file, or -1 if unknown; p.Payload and p.Last are set here. Several
// may run at once, with different stream numbers, each higher than that of every
// Push sent before it.
//
// When r or ctx fails after the Push has left, the stream is canceled.
func SendPush(ctx context.Context, c Conn, p *Push, r io.Reader) error {
	limit := c.Limits().MaxFrame
	head := *p
	head.Payload, head.Last = nil, false
	b, err := AppendFrame(nil, &head, limit)
	if err != nil {
		return err
	}
	if room := int64(limit) - int64(len(b)) - dataOverhead; p.Size >= 0 && p.Size <= room {
		head.Payload, head.Last = make([]byte, p.Size), true
		if _, err := io.ReadFull(r, head.Payload); err != nil {
			return fmt.Errorf("read record %s of %s: %w", head.Pos(), p.Name, err)
		}
		return c.Send(ctx, &head)
	}
	if err := c.Send(ctx, &head); err != nil {
		return err
	}
	if err := sendData(ctx, c, p, r, make([]byte, limit-dataOverhead)); err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = c.Send(ctx, &Cancel{Stream: p.Stream, Text: err.Error()}) // or the session is gone
		return err
	}
	return nil
}

func sendData(ctx context.Context, c Conn, p *Push, r io.Reader, buf []byte) error {
	d := Data{Stream: p.Stream}
	for !d.Last {
		n, err := io.ReadFull(r, buf)
		d.Last = errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !d.Last {
			return fmt.Errorf("read record %s of %s: %w", p.Pos(), p.Name, err)
		}
		d.Payload = buf[:n]
		end := d.Offset + int64(n)
		if p.Size >= 0 && (end > p.Size || d.Last && end < p.Size) {
			return fmt.Errorf("record %s of %s has %d bytes, %d announced: %w", p.Pos(), p.Name, end, p.Size, ErrCorrupt)
		}
		d.Last = d.Last || end == p.Size
		if err := c.Send(ctx, &d); err != nil {
			return err
		}
		d.Offset = end
	}
	return nil
}

// Inbound checks the streams of the incoming direction of a session. It holds no
// payload. It is not safe for concurrent use: the goroutine that receives owns it.
type Inbound struct {
	// Max is how many streams may be open; it is what Limits.MaxStreams announced.
	Max     int
	last    uint64
	streams map[uint64]*inStream
}

type inStream struct {
	push *Push
	next int64
}

// Push notes a new stream. Errors end the session: [ErrCorrupt], [ErrTooLarge].
func (in *Inbound) Push(p *Push) error {
	if p.Stream <= in.last {
		return fmt.Errorf("push: stream %d after %d: %w", p.Stream, in.last, ErrCorrupt)
	}
	in.last = p.Stream
	if p.Last {
		return nil
	}
	if len(in.streams) >= in.Max {
		return fmt.Errorf("push: more than %d streams: %w", in.Max, ErrTooLarge)
	}
	if in.streams == nil {
		in.streams = make(map[uint64]*inStream)
	}
	head := *p
	head.Payload = nil
	in.streams[p.Stream] = &inStream{push: &head, next: int64(len(p.Payload))}
	return nil
}

// Data returns the push that d continues, without payload, or nil if d is to be
// dropped. With d.Last the stream is forgotten. Errors end the session: [ErrCorrupt].
func (in *Inbound) Data(d *Data) (*Push, error) {
	s := in.streams[d.Stream]
	if s == nil {
		if d.Stream > in.last {
			return nil, fmt.Errorf("data: stream %d was never opened: %w", d.Stream, ErrCorrupt)
		}
		return nil, nil
	}
	end := d.Offset + int64(len(d.Payload))
	if size := s.push.Size; d.Offset != s.next || size >= 0 && (end > size || d.Last != (end == size)) {
		return nil, fmt.Errorf("data: stream %d: bytes %d to %d of %d after %d: %w", d.Stream, d.Offset, end, size, s.next, ErrCorrupt)
	}
	s.next = end
	if d.Last {
		delete(in.streams, d.Stream)
	}
	return s.push, nil
}

// Drop forgets a stream: after the peer's Cancel or one's own Nak. It returns its
// push, or nil.
func (in *Inbound) Drop(stream uint64) *Push {
	s := in.streams[stream]
	if s == nil {
		return nil
	}
	delete(in.streams, stream)
	return s.push
}
