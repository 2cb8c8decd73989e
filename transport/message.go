package transport

import (
	"fmt"
	"time"

	"github.com/litefs-agent/litefs-agent/ltx"
)

// Protocol versions this package speaks.
const (
	MinVersion uint16 = 1
	MaxVersion uint16 = 1
)

// Sizes in bytes, of whole frames.
const (
	DefaultMaxFrame = 64 << 10
	MinMaxFrame     = 1 << 10 // every end takes frames of this size
	MaxHelloFrame   = 1 << 20 // Hello and Welcome
)

// MaxDatabases is the length of a list of databases; a longer one is corrupt. It
// bounds what a small frame can make its receiver allocate.
const MaxDatabases = 8192

// Lengths in bytes of names on the wire; a longer one is corrupt.
const (
	MaxName = 512 // a database
	MaxID   = 64  // a node, a hub
	MaxText = 512 // a reason, a URL
)

// Features are optional parts of the protocol, negotiated in hello: what both ends
// announce may be used.
type Features uint64

const (
	FeatureGroup  Features = 1 << iota // Push.Group: a transaction over several databases
	FeatureLease                       // messages 32 to 39; not specified yet
	FeatureResume                      // a broken-off snapshot can be continued; not specified yet
)

// SupportedFeatures are those that this package can carry.
const SupportedFeatures = FeatureGroup

// A Kind is the type byte of a frame.
type Kind uint8

const (
	KindHello       Kind = 1
	KindWelcome     Kind = 2
	KindBye         Kind = 3
	KindPing        Kind = 4
	KindPong        Kind = 5
	KindPush        Kind = 16
	KindData        Kind = 17
	KindCancel      Kind = 18
	KindAck         Kind = 19
	KindNak         Kind = 20
	KindSubscribe   Kind = 21
	KindUnsubscribe Kind = 22
	KindPosition    Kind = 23
	// 32 to 39 are for leases, 40 to 47 for reading a hub's history.
)

func (k Kind) String() string {
	if s := kindText[k]; s != "" {
		return s
	}
	return fmt.Sprintf("message %d", uint8(k))
}

var kindText = map[Kind]string{KindHello: "hello", KindWelcome: "welcome", KindBye: "bye", KindPing: "ping",
	KindPong: "pong", KindPush: "push", KindData: "data", KindCancel: "cancel", KindAck: "ack", KindNak: "nak",
	KindSubscribe: "subscribe", KindUnsubscribe: "unsubscribe", KindPosition: "position"}

// A Message is a pointer to one of the structs of this file.
type Message interface {
	Kind() Kind
	encode(*encoder)
	decode(*decoder)
}

// A Site is the 128 random bits that name a hub (or several that share the work)
// and its nodes; zero is unknown.
type Site [16]byte

// String returns 32 lower-case hex digits.
func (s Site) String() string { return fmt.Sprintf("%x", s[:]) }

// Limits are what one end wants of the other. Once agreed ([Conn].Limits) they are
// what this end must observe: the peer's, and the smaller MaxFrame of both.
type Limits struct {
	MaxFrame   uint32        // bytes of the largest frame the announcer accepts
	Window     uint64        // bytes of pushes that the other end may have unacknowledged
	MaxStreams uint32        // streams (pushes with Data to come) the other end may have open
	Heartbeat  time.Duration // the announcer wants to hear something this often; ms on the wire
}

// Hello opens a session. The node sends it first.
type Hello struct {
	MinVersion, MaxVersion uint16   // filled in by the carrier if both are 0
	Features               Features // what the node can do
	Required               Features // what it cannot do without: a subset of Features
	Limits                 Limits   // filled in by the carrier if zero

	Site         Site   // pinned at first contact; zero before it
	Node         string // the node's id
	Hardware     uint64 // hash of the board's serial number, for clones and moved cards
	Session      uint64 // the number issued by the hub at the last hello; 0 at the first
	AgentVersion string
	Databases    []DatabaseState
	Restore      bool // the node's data folder is empty: it asks for what the hub has
}

// A DatabaseState is where one end stands in one database.
type DatabaseState struct {
	Name     string // path below the mount, as the node sees it
	History  History
	Epoch    Epoch
	Owner    Owner
	Pos      ltx.Pos  // a node: durable and confirmed; a hub: received and durable
	Archived ltx.Pos  // hub only: in the archive; equal to Pos without one
	Oldest   ltx.TXID // single transactions from here up to Pos.TXID are still held; 0: none
	Forked   ltx.TXID // node only: own transactions above this one are not acked; 0: none or unknown
	PageSize uint32   // bytes; 0 before the first transaction
	Hold     bool     // the database waits for an operator
}

// Owner says who decides over a database (the configuration's owner).
type Owner uint8

const (
	OwnerNode Owner = iota // the node's for good
	OwnerHub               // the hub's, lent on request
)

func (o Owner) String() string {
	switch o {
	case OwnerNode:
		return "node"
	case OwnerHub:
		return "hub"
	}
	return fmt.Sprintf("owner %d", uint8(o))
}

// Welcome answers Hello.
type Welcome struct {
	Version  uint16   // the one both will speak; filled in by the carrier if 0
	Features Features // those both have; filled in by the carrier if 0
	Limits   Limits   // the hub's own; filled in by the carrier if zero

	Site    Site
	Hub     string // the hub's id
	Session uint64 // the node's new session number, for its next hello
	// MovedURL, if set, sends the node elsewhere: nothing else but Site counts, and
	// there is no session.
	MovedURL  string
	Databases []DatabaseState // the node's databases at the hub, also such as the node did not name
}

// Bye is the last message of a direction. It reaches the receiver as a [*ByeError].
type Bye struct {
	Code       Code
	Text       string
	RetryAfter time.Duration // ms on the wire; 0: as you like
}

// Ping asks for a Pong. Conns send and answer it by themselves.
type Ping struct {
	Clock uint64 // the sender's monotonic clock, which nobody else interprets
}

// Pong answers the last Ping.
type Pong struct {
	Echo uint64 // Ping.Clock
}

// PushFlags describe a record.
type PushFlags uint16

const (
	PushSnapshot PushFlags = 1 << iota // holds every page: replaces what the receiver has of this history
	PushDrop                           // the transaction drops the database (commit 0)
	PushBranch                         // belongs to a branch, not to the current history
	PushReplace                        // import, change of page size, first record after a drop: all pages
)

// Push is one record: a transaction or a compacted range as an LTX file. The
// file is Payload, followed, unless Last is set, by [Data] messages with the same
// stream number. Streams of one direction interleave freely; a record counts as
// arrived when its last byte has.
type Push struct {
	// Stream numbers the record within this direction of the session: not 0,
	// ascending. It ends with the chunk marked Last, a Cancel of the sender, or a
	// Nak of the receiver that names it.
	Stream  uint64
	Name    string
	History History
	Epoch   Epoch
	Flags   PushFlags

	MinTXID, MaxTXID ltx.TXID
	PreApply         ltx.Checksum // of the whole database before MinTXID; 0 for a snapshot
	PostApply        ltx.Checksum // and after MaxTXID
	CommitTime       time.Time    // of MaxTXID by the writer's clock, which may be wrong; ms; informative
	PageSize         uint32       // bytes

	// Group and Parts bind the records of one transaction over several
	// databases: all Parts pushes with this Group take effect or none. 0: alone.
	Group uint64
	Parts uint32

	Size    int64  // of the whole file in bytes; -1 if not known yet
	Payload []byte // its first bytes, or all
	Last    bool   // Payload is all: no Data follows
}

// Pos returns where the database stands after the record.
func (m *Push) Pos() ltx.Pos {
	return ltx.Pos{TXID: m.MaxTXID, PostApplyChecksum: m.PostApply}
}

// Data carries the next bytes of a stream. For a stream that the receiver has
// given up, or that was canceled, it is dropped silently.
type Data struct {
	Stream  uint64
	Offset  int64 // of Payload in the LTX file
	Payload []byte
	Last    bool // nothing follows on this stream
}

// Cancel gives up a stream of one's own: the receiver discards what it has of it.
type Cancel struct {
	Stream uint64
	Text   string
}

// Ack says that everything of a history up to Pos is safe. It is the only truth
// about delivery. It covers all records up to Pos, and can go back in a later
// session with a hub that lost state.
type Ack struct {
	Name    string
	History History
	Epoch   Epoch
	Pos     ltx.Pos
	Level   AckLevel
}

// AckLevel says how safe.
type AckLevel uint8

const (
	AckDurable  AckLevel = 1 // on the hub's disk
	AckArchived AckLevel = 2 // in the archive too
)

func (l AckLevel) String() string {
	switch l {
	case AckDurable:
		return "durable"
	case AckArchived:
		return "archived"
	}
	return fmt.Sprintf("level %d", uint8(l))
}

// Nak says that a push or a subscription was not accepted, and where its sender
// stands. All later pushes of the same database in flight are to be expected to
// fail with NakPosMismatch.
type Nak struct {
	Name             string
	Code             NakCode
	MinTXID, MaxTXID ltx.TXID // the record; 0 for a subscription
	Stream           uint64   // its stream: send no more of it; 0 for a subscription
	// History, Epoch and Pos are where the sender of the Nak stands; zero if it
	// does not have the database.
	History    History
	Epoch      Epoch
	Pos        ltx.Pos
	Text       string
	RetryAfter time.Duration // ms on the wire; 0: as you like
}

// Subscribe asks for the records of a database after Pos, and for all to come. It
// is answered by pushes, or by a Nak. A second one replaces the first.
type Subscribe struct {
	Name    string
	History History // 0: whichever is current
	Pos     ltx.Pos // where the subscriber stands; zero: from the beginning
	// Snapshot asks for a snapshot whatever Pos is.
	Snapshot bool
}

// Unsubscribe ends a subscription; pushes under way may still arrive.
type Unsubscribe struct {
	Name string
}

// Position tells, unasked, that the sender stands elsewhere than the peer may
// think: after an operator's decision, an epoch closed, a branch adopted.
type Position struct {
	Databases []DatabaseState
}

func (*Hello) Kind() Kind       { return KindHello }
func (*Welcome) Kind() Kind     { return KindWelcome }
func (*Bye) Kind() Kind         { return KindBye }
func (*Ping) Kind() Kind        { return KindPing }
func (*Pong) Kind() Kind        { return KindPong }
func (*Push) Kind() Kind        { return KindPush }
func (*Data) Kind() Kind        { return KindData }
func (*Cancel) Kind() Kind      { return KindCancel }
func (*Ack) Kind() Kind         { return KindAck }
func (*Nak) Kind() Kind         { return KindNak }
func (*Subscribe) Kind() Kind   { return KindSubscribe }
func (*Unsubscribe) Kind() Kind { return KindUnsubscribe }
func (*Position) Kind() Kind    { return KindPosition }
