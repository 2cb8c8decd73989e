package transport

import (
	"fmt"
	"math"
	"time"

	"github.com/litefs-agent/litefs-agent/ltx"
)

// The tags of each message, as drawn in docs/protocol.md. A number is never used
// for something else, not even after its field is gone. Tag 15 is the list.

func (m *Hello) encode(e *encoder) {
	e.uint(1, uint64(m.MinVersion))
	e.uint(2, uint64(m.MaxVersion))
	e.uint(3, uint64(m.Features))
	e.uint(4, uint64(m.Required))
	encodeLimits(e, 5, &m.Limits)
	if m.Site != (Site{}) {
		e.bytes(6, m.Site[:])
	}
	e.string(7, m.Node, MaxID)
	e.fix64(8, m.Hardware)
	e.uint(9, m.Session)
	e.text(10, m.AgentVersion)
	e.bool(11, m.Restore)
	encodeStates(e, m.Databases)
}

func (m *Hello) decode(d *decoder) {
	for d.next() {
		switch d.tag {
		case 1:
			m.MinVersion = d.uint16()
		case 2:
			m.MaxVersion = d.uint16()
		case 3:
			m.Features = Features(d.uint())
		case 4:
			m.Required = Features(d.uint())
		case 5:
			d.nested(m.Limits.decode)
		case 6:
			m.Site = decodeSite(d)
		case 7:
			m.Node = d.string(MaxID)
		case 8:
			m.Hardware = d.fix64()
		case 9:
			m.Session = d.uint()
		case 10:
			m.AgentVersion = d.string(MaxText)
		case 11:
			m.Restore = d.bool()
		case tagList:
			m.Databases = decodeState(d, m.Databases)
		default:
			d.unknown()
		}
	}
}

func (m *Welcome) encode(e *encoder) {
	e.uint(1, uint64(m.Version))
	e.uint(2, uint64(m.Features))
	encodeLimits(e, 3, &m.Limits)
	if m.Site != (Site{}) {
		e.bytes(4, m.Site[:])
	}
	e.string(5, m.Hub, MaxID)
	e.uint(6, m.Session)
	e.string(7, m.MovedURL, MaxText)
	encodeStates(e, m.Databases)
}

func (m *Welcome) decode(d *decoder) {
	for d.next() {
		switch d.tag {
		case 1:
			m.Version = d.uint16()
		case 2:
			m.Features = Features(d.uint())
		case 3:
			d.nested(m.Limits.decode)
		case 4:
			m.Site = decodeSite(d)
		case 5:
			m.Hub = d.string(MaxID)
		case 6:
			m.Session = d.uint()
		case 7:
			m.MovedURL = d.string(MaxText)
		case tagList:
			m.Databases = decodeState(d, m.Databases)
		default:
			d.unknown()
		}
	}
}

func decodeSite(d *decoder) (s Site) {
	if len(d.val) != len(s) {
		d.fail("%d bytes, want %d", len(d.val), len(s))
		return Site{}
	}
	copy(s[:], d.val)
	return s
}

func encodeLimits(e *encoder, tag byte, l *Limits) {
	if *l != (Limits{}) {
		e.nested(tag, l.encode)
	}
}

func (l *Limits) encode(e *encoder) {
	e.uint(1, uint64(l.MaxFrame))
	e.uint(2, l.Window)
	e.uint(3, uint64(l.MaxStreams))
	e.millis(4, l.Heartbeat)
}

func (l *Limits) decode(d *decoder) {
	for d.next() {
		switch d.tag {
		case 1:
			l.MaxFrame = d.uint32()
		case 2:
			l.Window = d.uint()
		case 3:
			l.MaxStreams = d.uint32()
		case 4:
			l.Heartbeat = d.millis()
		default:
			d.unknown()
		}
	}
}

func encodeStates(e *encoder, list []DatabaseState) {
	if len(list) > MaxDatabases && e.err == nil {
		e.err = fmt.Errorf("%d databases, at most %d: %w", len(list), MaxDatabases, ErrTooLarge)
	}
	for i := range list {
		e.nested(tagList, list[i].encode)
	}
}

func decodeState(d *decoder, list []DatabaseState) []DatabaseState {
	if len(list) == MaxDatabases {
		d.fail("more than %d databases", MaxDatabases)
		return list
	}
	list = append(list, DatabaseState{})
	d.nested(list[len(list)-1].decode)
	return list
}

func (s *DatabaseState) encode(e *encoder) {
	e.check(s.fault())
	e.string(1, s.Name, MaxName)
	e.fix64(2, uint64(s.History))
	e.epoch(3, s.Epoch)
	e.uint(4, uint64(s.Owner))
	e.pos(5, s.Pos)
	e.pos(6, s.Archived)
	e.uint(7, uint64(s.Oldest))
	e.uint(8, uint64(s.Forked))
	e.uint(9, uint64(s.PageSize))
	e.bool(10, s.Hold)
}

func (s *DatabaseState) decode(d *decoder) {
	for d.next() {
		switch d.tag {
		case 1:
			s.Name = d.string(MaxName)
		case 2:
			s.History = History(d.fix64())
		case 3:
			s.Epoch = d.epoch()
		case 4:
			s.Owner = Owner(d.uint8())
		case 5:
			s.Pos = d.pos()
		case 6:
			s.Archived = d.pos()
		case 7:
			s.Oldest = ltx.TXID(d.uint())
		case 8:
			s.Forked = ltx.TXID(d.uint())
		case 9:
			s.PageSize = d.uint32()
		case 10:
			s.Hold = d.bool()
		default:
			d.unknown()
		}
	}
	d.check(s.fault())
}

func (m *Bye) encode(e *encoder) {
	e.uint(1, uint64(m.Code))
	e.text(2, m.Text)
	e.millis(3, m.RetryAfter)
}

func (m *Bye) decode(d *decoder) {
	for d.next() {
		switch d.tag {
		case 1:
			m.Code = Code(d.uint16())
		case 2:
			m.Text = d.string(MaxText)
		case 3:
			m.RetryAfter = d.millis()
		default:
			d.unknown()
		}
	}
}

func (m *Ping) encode(e *encoder) { e.fix64(1, m.Clock) }

func (m *Ping) decode(d *decoder) {
	for d.next() {
		switch d.tag {
		case 1:
			m.Clock = d.fix64()
		default:
			d.unknown()
		}
	}
}

func (m *Pong) encode(e *encoder) { e.fix64(1, m.Echo) }

func (m *Pong) decode(d *decoder) {
	for d.next() {
		switch d.tag {
		case 1:
			m.Echo = d.fix64()
		default:
			d.unknown()
		}
	}
}

func (m *Push) encode(e *encoder) {
	e.check(m.fault())
	e.uint(1, m.Stream)
	e.string(2, m.Name, MaxName)
	e.fix64(3, uint64(m.History))
	e.epoch(4, m.Epoch)
	e.uint(5, uint64(m.Flags))
	e.uint(6, uint64(m.MinTXID))
	e.uint(7, uint64(m.MaxTXID))
	e.fix64(8, uint64(m.PreApply))
	e.fix64(9, uint64(m.PostApply))
	if !m.CommitTime.IsZero() {
		e.fix64(10, uint64(m.CommitTime.UnixMilli()))
	}
	e.uint(11, uint64(m.PageSize))
	e.fix64(12, m.Group)
	e.uint(13, uint64(m.Parts))
	e.uint(14, uint64(m.Size+1)) // absent: not known
	e.bool(16, m.Last)
	e.bytes(17, m.Payload)
}

func (m *Push) decode(d *decoder) {
	m.Size = -1
	for d.next() {
		switch d.tag {
		case 1:
			m.Stream = d.uint()
		case 2:
			m.Name = d.string(MaxName)
		case 3:
			m.History = History(d.fix64())
		case 4:
			m.Epoch = d.epoch()
		case 5:
			m.Flags = PushFlags(d.uint16())
		case 6:
			m.MinTXID = ltx.TXID(d.uint())
		case 7:
			m.MaxTXID = ltx.TXID(d.uint())
		case 8:
			m.PreApply = ltx.Checksum(d.fix64())
		case 9:
			m.PostApply = ltx.Checksum(d.fix64())
		case 10:
			m.CommitTime = time.UnixMilli(int64(d.fix64())).UTC()
		case 11:
			m.PageSize = d.uint32()
		case 12:
			m.Group = d.fix64()
		case 13:
			m.Parts = d.uint32()
		case 14:
			m.Size = int64(d.uintMax(math.MaxInt64)) - 1
		case 16:
			m.Last = d.bool()
		case 17:
			m.Payload = d.bytes()
		default:
			d.unknown()
		}
	}
	d.check(m.fault())
}

func (m *Data) encode(e *encoder) {
	e.check(m.fault())
	e.uint(1, m.Stream)
	e.uint(2, uint64(m.Offset))
	e.bool(3, m.Last)
	e.bytes(4, m.Payload)
}

func (m *Data) decode(d *decoder) {
	for d.next() {
		switch d.tag {
		case 1:
			m.Stream = d.uint()
		case 2:
			m.Offset = int64(d.uintMax(math.MaxInt64))
		case 3:
			m.Last = d.bool()
		case 4:
			m.Payload = d.bytes()
		default:
			d.unknown()
		}
	}
	d.check(m.fault())
}

func (m *Cancel) encode(e *encoder) {
	e.uint(1, m.Stream)
	e.text(2, m.Text)
}

func (m *Cancel) decode(d *decoder) {
	for d.next() {
		switch d.tag {
		case 1:
			m.Stream = d.uint()
		case 2:
			m.Text = d.string(MaxText)
		default:
			d.unknown()
		}
	}
}

func (m *Ack) encode(e *encoder) {
	e.check(m.fault())
	e.string(1, m.Name, MaxName)
	e.fix64(2, uint64(m.History))
	e.epoch(3, m.Epoch)
	e.pos(4, m.Pos)
	e.uint(5, uint64(m.Level))
}

func (m *Ack) decode(d *decoder) {
	for d.next() {
		switch d.tag {
		case 1:
			m.Name = d.string(MaxName)
		case 2:
			m.History = History(d.fix64())
		case 3:
			m.Epoch = d.epoch()
		case 4:
			m.Pos = d.pos()
		case 5:
			m.Level = AckLevel(d.uint8())
		default:
			d.unknown()
		}
	}
	d.check(m.fault())
}

func (m *Nak) encode(e *encoder) {
	e.check(m.fault())
	e.string(1, m.Name, MaxName)
	e.uint(2, uint64(m.Code))
	e.uint(3, uint64(m.MinTXID))
	e.uint(4, uint64(m.MaxTXID))
	e.uint(5, m.Stream)
	e.fix64(6, uint64(m.History))
	e.epoch(7, m.Epoch)
	e.pos(8, m.Pos)
	e.text(9, m.Text)
	e.millis(10, m.RetryAfter)
}

func (m *Nak) decode(d *decoder) {
	for d.next() {
		switch d.tag {
		case 1:
			m.Name = d.string(MaxName)
		case 2:
			m.Code = NakCode(d.uint16())
		case 3:
			m.MinTXID = ltx.TXID(d.uint())
		case 4:
			m.MaxTXID = ltx.TXID(d.uint())
		case 5:
			m.Stream = d.uint()
		case 6:
			m.History = History(d.fix64())
		case 7:
			m.Epoch = d.epoch()
		case 8:
			m.Pos = d.pos()
		case 9:
			m.Text = d.string(MaxText)
		case 10:
			m.RetryAfter = d.millis()
		default:
			d.unknown()
		}
	}
	d.check(m.fault())
}

func (m *Subscribe) encode(e *encoder) {
	e.check(m.fault())
	e.string(1, m.Name, MaxName)
	e.fix64(2, uint64(m.History))
	e.pos(3, m.Pos)
	e.bool(4, m.Snapshot)
}

func (m *Subscribe) decode(d *decoder) {
	for d.next() {
		switch d.tag {
		case 1:
			m.Name = d.string(MaxName)
		case 2:
			m.History = History(d.fix64())
		case 3:
			m.Pos = d.pos()
		case 4:
			m.Snapshot = d.bool()
		default:
			d.unknown()
		}
	}
	d.check(m.fault())
}

func (m *Unsubscribe) encode(e *encoder) {
	e.check(m.fault())
	e.string(1, m.Name, MaxName)
}

func (m *Unsubscribe) decode(d *decoder) {
	for d.next() {
		switch d.tag {
		case 1:
			m.Name = d.string(MaxName)
		default:
			d.unknown()
		}
	}
	d.check(m.fault())
}

func (m *Position) encode(e *encoder) { encodeStates(e, m.Databases) }

func (m *Position) decode(d *decoder) {
	for d.next() {
		switch d.tag {
		case tagList:
			m.Databases = decodeState(d, m.Databases)
		default:
			d.unknown()
		}
	}
}

// The rules of a message beyond its fields, checked by sender and receiver.

func nameFault(name string) string {
	if name == "" {
		return "database without a name"
	}
	return ""
}

func (s *DatabaseState) fault() string { return nameFault(s.Name) }
func (m *Subscribe) fault() string     { return nameFault(m.Name) }
func (m *Unsubscribe) fault() string   { return nameFault(m.Name) }

func (m *Push) fault() string {
	switch {
	case m.Stream == 0:
		return "stream 0"
	case m.MinTXID == 0 || m.MaxTXID < m.MinTXID:
		return "not a range of transactions"
	case (m.Group == 0) != (m.Parts == 0):
		return "group without parts, or parts without group"
	case m.Size < -1:
		return "negative size"
	case m.Size >= 0 && (int64(len(m.Payload)) > m.Size || m.Last && int64(len(m.Payload)) != m.Size):
		return "payload and size differ"
	}
	return nameFault(m.Name)
}

func (m *Data) fault() string {
	if m.Stream == 0 || m.Offset < 0 || m.Offset > math.MaxInt64-int64(len(m.Payload)) {
		return "stream 0, or offset out of range"
	}
	return ""
}

func (m *Ack) fault() string {
	if m.Level == 0 {
		return "ack without level"
	}
	return nameFault(m.Name)
}

func (m *Nak) fault() string {
	if m.Code == 0 {
		return "nak without code"
	}
	return nameFault(m.Name)
}
