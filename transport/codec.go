package transport

import (
	"encoding/binary"
	"fmt"
	"math"
	"time"

	"github.com/litefs-agent/litefs-agent/ltx"
)

// A frame carries one message. Integers are big-endian.
//
//	0          4      5
//	+----------+------+----------------+
//	| Length   | Kind | fields         |
//	+----------+------+----------------+
//
// Length counts the bytes after itself: 1 plus those of the fields. A field is
//
//	+-----+---------------+-------+
//	| Tag | Size, uvarint | value |
//	+-----+---------------+-------+
//
// Tags ascend; only a list repeats its tag. A field that is zero is left out. A
// tag with bit 7 set may be skipped by who does not know it; any other unknown tag
// is an error, as the message means something else with it.
//
// Values: a uint is a uvarint in its shortest form; a fix64 is 8 bytes; a bool is
// present, with the value 1, or absent; strings and bytes are as they are; a pos is
// a fix64 checksum and a uvarint TXID; a struct is its fields.

// frameHeader is the size of Length and Kind.
const frameHeader = 5

// tagOptional marks a field that may be skipped.
const tagOptional = 0x80

// AppendFrame appends the frame of m to b. It returns [ErrTooLarge], and b, if the
// frame would be longer than limit bytes or a string in it than allowed, and
// [ErrCorrupt] if the message breaks a rule of its own that the peer would reject.
func AppendFrame(b []byte, m Message, limit uint32) ([]byte, error) {
	start := len(b)
	e := encoder{b: append(b, 0, 0, 0, 0, byte(m.Kind()))}
	m.encode(&e)
	n := len(e.b) - start
	if e.err != nil {
		return e.b[:start], fmt.Errorf("%s: %w", m.Kind(), e.err)
	}
	if int64(n) > int64(limit) {
		return e.b[:start], fmt.Errorf("%s of %d bytes, at most %d: %w", m.Kind(), n, limit, ErrTooLarge)
	}
	binary.BigEndian.PutUint32(e.b[start:], uint32(n-4))
	return e.b, nil
}

// frameSize checks a frame's first bytes and returns the length of the rest.
func frameSize(header [frameHeader]byte, limit uint32) (Kind, int, error) {
	n := binary.BigEndian.Uint32(header[:])
	kind := Kind(header[4])
	switch {
	case n < 1:
		return kind, 0, fmt.Errorf("frame without a kind: %w", ErrCorrupt)
	case uint64(n)+4 > uint64(limit):
		return kind, 0, fmt.Errorf("%s frame of %d bytes, at most %d: %w", kind, uint64(n)+4, limit, ErrTooLarge)
	}
	return kind, int(n - 1), nil
}

// DecodeBody decodes the fields of a message. The payload of a Push or Data is a
// part of body, which the message then owns. Errors: [ErrUnknown], [ErrCorrupt].
func DecodeBody(kind Kind, body []byte) (Message, error) {
	var m Message
	switch kind {
	case KindHello:
		m = new(Hello)
	case KindWelcome:
		m = new(Welcome)
	case KindBye:
		m = new(Bye)
	case KindPing:
		m = new(Ping)
	case KindPong:
		m = new(Pong)
	case KindPush:
		m = new(Push)
	case KindData:
		m = new(Data)
	case KindCancel:
		m = new(Cancel)
	case KindAck:
		m = new(Ack)
	case KindNak:
		m = new(Nak)
	case KindSubscribe:
		m = new(Subscribe)
	case KindUnsubscribe:
		m = new(Unsubscribe)
	case KindPosition:
		m = new(Position)
	default:
		return nil, fmt.Errorf("%s: %w", kind, ErrUnknown)
	}
	d := decoder{b: body}
	m.decode(&d)
	if d.err != nil {
		return nil, fmt.Errorf("%s: %w", kind, d.err)
	}
	return m, nil
}

// DecodeFrame decodes the first frame of b and returns what follows it.
func DecodeFrame(b []byte, limit uint32) (Message, []byte, error) {
	if len(b) < frameHeader {
		return nil, b, fmt.Errorf("frame of %d bytes: %w", len(b), ErrCorrupt)
	}
	kind, n, err := frameSize([frameHeader]byte(b), limit)
	if err != nil {
		return nil, b, err
	}
	rest := b[frameHeader:]
	if n > len(rest) {
		return nil, b, fmt.Errorf("%s frame cut off: %w", kind, ErrCorrupt)
	}
	m, err := DecodeBody(kind, rest[:n:n])
	return m, rest[n:], err
}

// An encoder appends fields. The first error sticks.
type encoder struct {
	b   []byte
	err error
}

// check is for the rules of a message that its receiver will check too.
func (e *encoder) check(fault string) {
	if fault != "" && e.err == nil {
		e.err = fmt.Errorf("%s: %w", fault, ErrCorrupt)
	}
}

func (e *encoder) uint(tag byte, v uint64) {
	if v != 0 {
		e.b = append(e.b, tag, byte(uvarintLen(v)))
		e.b = binary.AppendUvarint(e.b, v)
	}
}

func (e *encoder) fix64(tag byte, v uint64) {
	if v != 0 {
		e.b = binary.BigEndian.AppendUint64(append(e.b, tag, 8), v)
	}
}

func (e *encoder) bool(tag byte, v bool) {
	if v {
		e.b = append(e.b, tag, 1, 1)
	}
}

func (e *encoder) bytes(tag byte, v []byte) {
	if len(v) != 0 {
		e.b = binary.AppendUvarint(append(e.b, tag), uint64(len(v)))
		e.b = append(e.b, v...)
	}
}

func (e *encoder) string(tag byte, v string, limit int) {
	if len(v) > limit && e.err == nil {
		e.err = fmt.Errorf("field %d of %d bytes, at most %d: %w", tag, len(v), limit, ErrTooLarge)
	}
	if v != "" {
		e.b = binary.AppendUvarint(append(e.b, tag), uint64(len(v)))
		e.b = append(e.b, v...)
	}
}

// text is string, cut to the size that is allowed for words to people.
func (e *encoder) text(tag byte, v string) { e.string(tag, v[:min(len(v), MaxText)], MaxText) }

// millis rounds up to milliseconds, at most maxDuration.
func (e *encoder) millis(tag byte, v time.Duration) {
	e.uint(tag, uint64((min(max(v, 0), maxDuration)+time.Millisecond-1)/time.Millisecond))
}

// maxDuration bounds every duration on the wire.
const maxDuration = 365 * 24 * time.Hour

func (e *encoder) pos(tag byte, v ltx.Pos) {
	if v == (ltx.Pos{}) {
		return
	}
	e.b = append(e.b, tag, byte(8+uvarintLen(uint64(v.TXID))))
	e.b = binary.BigEndian.AppendUint64(e.b, uint64(v.PostApplyChecksum))
	e.b = binary.AppendUvarint(e.b, uint64(v.TXID))
}

func (e *encoder) epoch(tag byte, v Epoch) {
	if v.IsZero() {
		return
	}
	e.b = append(e.b, tag, byte(8+uvarintLen(v.N)))
	e.b = binary.BigEndian.AppendUint64(e.b, v.Grant)
	e.b = binary.AppendUvarint(e.b, v.N)
}

// nested writes a struct, also an empty one.
func (e *encoder) nested(tag byte, f func(*encoder)) {
	var in encoder
	f(&in)
	if e.err == nil {
		e.err = in.err
	}
	e.b = binary.AppendUvarint(append(e.b, tag), uint64(len(in.b)))
	e.b = append(e.b, in.b...)
}

func uvarintLen(v uint64) int {
	n := 1
	for ; v >= 0x80; v >>= 7 {
		n++
	}
	return n
}

// A decoder walks the fields of a message. The first error sticks.
type decoder struct {
	b   []byte
	tag byte
	val []byte
	err error
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("field %d: %s: %w", d.tag, fmt.Sprintf(format, args...), ErrCorrupt)
	}
}

// next steps to the next field.
func (d *decoder) next() bool {
	if d.err != nil || len(d.b) == 0 {
		return false
	}
	last := d.tag
	d.tag = d.b[0]
	n, w := uvarint(d.b[1:])
	if w <= 0 || n > uint64(len(d.b)-1-w) {
		d.fail("longer than the message")
		return false
	}
	if d.tag == 0 || d.tag < last || d.tag == last && !d.lists() {
		d.fail("after field %d", last)
		return false
	}
	d.val, d.b = d.b[1+w:1+w+int(n)], d.b[1+w+int(n):]
	return true
}

// lists reports whether the tag may repeat: 15 is a list in every message, and
// what is not known may be one.
func (d *decoder) lists() bool { return d.tag == tagList || d.tag >= tagOptional }

// tagList is the tag of the one list a message may have.
const tagList = 15

// unknown deals with a tag that the message does not have.
func (d *decoder) unknown() {
	if d.tag < tagOptional && d.err == nil {
		d.err = fmt.Errorf("field %d: %w", d.tag, ErrUnknown)
	}
}

// uvarint is binary.Uvarint that takes only the shortest form.
func uvarint(b []byte) (uint64, int) {
	v, w := binary.Uvarint(b)
	if w > 1 && b[w-1] == 0 {
		return 0, -1
	}
	return v, w
}

func (d *decoder) uint() uint64 { return d.uintMax(math.MaxUint64) }

func (d *decoder) uintMax(limit uint64) uint64 {
	v, w := uvarint(d.val)
	if w != len(d.val) || w <= 0 || v > limit || v == 0 {
		d.fail("not a number from 1 to %d", limit)
		return 0
	}
	return v
}

func (d *decoder) uint32() uint32 { return uint32(d.uintMax(math.MaxUint32)) }
func (d *decoder) uint16() uint16 { return uint16(d.uintMax(math.MaxUint16)) }
func (d *decoder) uint8() uint8   { return uint8(d.uintMax(math.MaxUint8)) }

func (d *decoder) fix64() uint64 {
	if len(d.val) != 8 {
		d.fail("%d bytes, want 8", len(d.val))
		return 0
	}
	v := binary.BigEndian.Uint64(d.val)
	if v == 0 {
		d.fail("zero, which is left out")
	}
	return v
}

func (d *decoder) bool() bool {
	if len(d.val) != 1 || d.val[0] != 1 {
		d.fail("not a flag")
	}
	return d.err == nil
}

func (d *decoder) string(limit int) string {
	if len(d.val) > limit || len(d.val) == 0 {
		d.fail("%d bytes, want 1 to %d", len(d.val), limit)
		return ""
	}
	return string(d.val)
}

func (d *decoder) millis() time.Duration {
	return time.Duration(d.uintMax(uint64(maxDuration/time.Millisecond))) * time.Millisecond
}

// bytes returns a part of the frame.
func (d *decoder) bytes() []byte {
	if len(d.val) == 0 {
		d.fail("empty, which is left out")
	}
	return d.val
}

// check is for the rules of a message beyond its fields.
func (d *decoder) check(fault string) {
	if fault != "" && d.err == nil {
		d.err = fmt.Errorf("%s: %w", fault, ErrCorrupt)
	}
}

func (d *decoder) pair() (fix, num uint64) {
	if len(d.val) > 8 {
		v, w := uvarint(d.val[8:])
		if w == len(d.val)-8 {
			return binary.BigEndian.Uint64(d.val), v
		}
	}
	d.fail("not a pair of numbers")
	return 0, 0
}

func (d *decoder) pos() ltx.Pos {
	sum, txid := d.pair()
	return ltx.Pos{TXID: ltx.TXID(txid), PostApplyChecksum: ltx.Checksum(sum)}
}

func (d *decoder) epoch() Epoch {
	grant, n := d.pair()
	return Epoch{N: n, Grant: grant}
}

func (d *decoder) nested(f func(*decoder)) {
	in := decoder{b: d.val}
	f(&in)
	if d.err == nil && in.err != nil {
		d.err = fmt.Errorf("field %d: %w", d.tag, in.err)
	}
}
