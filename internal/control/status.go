package control

import "time"

// The JSON that status prints. Its field names are a contract. A pointer that
// is nil, printed as null, says that the value is not known. Positions are
// TXID/CHECKSUM, sizes bytes.

// StatusNode is the state of a node.
type StatusNode struct {
	Role      string           `json:"role"` // "node"
	ID        string           `json:"id"`
	Site      *string          `json:"site"` // null before the first contact with a hub
	Version   string           `json:"version"`
	Healthy   bool             `json:"healthy"`
	Problems  []string         `json:"problems,omitempty"` // why it is not healthy, with the cure
	Hub       StatusLink       `json:"hub"`
	Mount     StatusMount      `json:"mount"`
	Databases []StatusDatabase `json:"databases"`
	Card      StatusCard       `json:"card"`
	Memory    StatusMemory     `json:"memory"`
}

// StatusHub is the state of a hub.
type StatusHub struct {
	Role    string  `json:"role"` // "hub"
	ID      string  `json:"id"`
	Site    *string `json:"site"`
	Version string  `json:"version"`
	Healthy bool    `json:"healthy"`
	// Problems are why it is not healthy, as of a node, and files of the
	// configuration whose present content is not in force: the older one is. With
	// those alone a hub is healthy.
	Problems  []string          `json:"problems,omitempty"`
	Mount     StatusMount       `json:"mount"`
	Databases []StatusDatabase  `json:"databases"` // those the hub owns
	Nodes     []StatusNodeAtHub `json:"nodes"`
	Card      StatusCard        `json:"card"`
	Memory    StatusMemory      `json:"memory"`
}

// The states of a link.
const (
	LinkConnected  = "connected"
	LinkConnecting = "connecting"
	LinkOff        = "off" // no hub is configured
)

// StatusLink is a node's link to its hub.
type StatusLink struct {
	URL         *string    `json:"url"`
	State       string     `json:"state"`
	Error       *string    `json:"error"`
	RetryAt     *time.Time `json:"retry_at"`
	LastHeardMS *int64     `json:"last_heard_ms"` // ago; null before the first word
}

// The states of a mount.
const (
	MountMounted  = "mounted"
	MountStarting = "starting" // recovering, or restoring from the hub
	MountFailed   = "failed"
	MountOff      = "off" // a hub without mount
)

// StatusMount is the file system.
type StatusMount struct {
	Dir   string `json:"dir"`
	State string `json:"state"`
}

// StatusDatabase is one database.
type StatusDatabase struct {
	Name        string         `json:"name"`
	Owner       string         `json:"owner"`  // "node" or "hub"
	Role        string         `json:"role"`   // "primary" or "replica"
	Writer      *string        `json:"writer"` // id of the node or hub that may write
	History     *string        `json:"history"`
	Epoch       *string        `json:"epoch"`
	Pos         *string        `json:"pos"`
	Acked       *string        `json:"acked"`
	Archived    *string        `json:"archived"`
	Backlog     StatusBacklog  `json:"backlog"`
	LagMS       *int64         `json:"lag_ms"`
	Size        *int64         `json:"size"`
	PageSize    *int64         `json:"page_size"`
	JournalMode *string        `json:"journal_mode"`
	LastCommit  *time.Time     `json:"last_commit"`
	Branches    []StatusBranch `json:"branches"`
}

// StatusBacklog is what the hub lacks of a database.
type StatusBacklog struct {
	Records int64 `json:"records"`
	Bytes   int64 `json:"bytes"`
	AgeMS   int64 `json:"age_ms"` // of the oldest
}

// StatusBranch is a kept history that is not the current one.
type StatusBranch struct {
	History string     `json:"history"`
	Fork    *string    `json:"fork"` // the last position that both histories share
	Pos     *string    `json:"pos"`
	Since   *time.Time `json:"since"`
}

// The states of a node at its hub.
const (
	NodeConnected = "connected"
	NodeLost      = "lost"
	NodeNever     = "never"
)

// StatusNodeAtHub is what the hub knows of a node.
type StatusNodeAtHub struct {
	ID        string           `json:"id"`
	State     string           `json:"state"`
	LastSeen  *time.Time       `json:"last_seen"`
	Version   *string          `json:"version"`
	Databases []StatusDatabase `json:"databases"`
}

// StatusCard is what the service has done to the card since it started.
type StatusCard struct {
	BytesWritten int64 `json:"bytes_written"`
	Fdatasyncs   int64 `json:"fdatasyncs"`
	Transactions int64 `json:"transactions"`
}

// StatusMemory is the service's memory in bytes.
type StatusMemory struct {
	RSS int64 `json:"rss"`
}

// The kinds of events.
const (
	EventCommit = "commit" // a transaction; at a hub, one that arrived
	EventAck    = "ack"    // durable at the hub up to here
	EventLease  = "lease"
	EventLink   = "link"   // State has changed: of the link, or at a hub of Node
	EventBranch = "branch" // a line of transactions, which ended here, was kept
	EventMissed = "missed" // so many events came while the reader was too slow
)

// Event is a line that events prints. DB, TXID and Checksum are null where it is
// of no database; what follows them is left out where it does not belong.
type Event struct {
	Time     time.Time `json:"time"`
	Event    string    `json:"event"`
	DB       *string   `json:"db"`
	TXID     *string   `json:"txid"`
	Checksum *string   `json:"checksum"`
	History  string    `json:"history,omitempty"`
	Epoch    string    `json:"epoch,omitempty"`
	Node     string    `json:"node,omitempty"`
	URL      string    `json:"url,omitempty"`
	State    string    `json:"state,omitempty"`
	Error    string    `json:"error,omitempty"`
	Missed   int       `json:"missed,omitempty"`
}

// NodeInfo is what a hub knows of a node's identity: node list prints it.
type NodeInfo struct {
	ID       string      `json:"id"`
	State    string      `json:"state"` // as in StatusNodeAtHub
	Session  *uint64     `json:"session"`
	Hardware *string     `json:"hardware"` // 16 hex digits of a hash
	Version  *string     `json:"version"`
	LastSeen *time.Time  `json:"last_seen"`
	Addr     *string     `json:"addr"`    // while connected
	Carrier  *string     `json:"carrier"` // likewise
	Clones   []CloneInfo `json:"clones"`
}

// CloneInfo is a card that was refused: it has the node's id and an old session
// number, on other hardware.
type CloneInfo struct {
	Hardware string    `json:"hardware"`
	Session  uint64    `json:"session"`
	Addr     string    `json:"addr"`
	Time     time.Time `json:"time"`     // when it was refused last
	Accepted bool      `json:"accepted"` // by an operator; not heard since
}
