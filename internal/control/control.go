// Package control is how the commands talk to a running service, a node's or a
// hub's: HTTP/1.1 over a unix socket that only the mount's group may open.
//
//	GET  /status                          one JSON object: StatusNode or StatusHub
//	GET  /wait?db=&txid=&acked=1&timeout= returns when the position is reached
//	GET  /export?db=                      the SQLite file
//	POST /import?db=                      body: an SQLite file; 204 once it is durable
//	POST /verify?db=                      JSON lines, each a Check; without db: all
//	GET  /ltx?db=                         a tar of MIN-MAX.ltx files
//	GET  /events?db=                      JSON lines, each an Event, until somebody ends it; without db: of all
//	GET  /nodes                           at a hub: a JSON list of NodeInfo
//	POST /nodes/accept?node=&hardware=    at a hub: the NodeInfo of the accepted one
//
// txid is 16 hex digits (without: the position when the request arrives), timeout
// a Go duration (without: none). Refusals are a status code and {"error":"..."}.
// Those that stream end with the trailer Litefs-Result: "ok", or else what
// went wrong; a stream without it was cut.
package control

import (
	"context"
	"errors"
	"io"

	"github.com/litefs-agent/litefs-agent/ltx"
)

// Sockets of the services where neither flag nor configuration names another.
const (
	NodeSocket = "/run/litefs-agent/agent.sock"
	HubSocket  = "/run/litefs-hub/hub.sock"
)

// A Service answers the commands. Its methods may be called in parallel; ctx
// ends when the client has gone, its time is over, or the service stops.
type Service interface {
	// Status returns a StatusNode or a StatusHub.
	Status(ctx context.Context) any
	// Wait returns when db has reached txid here, or, with acked, when txid is
	// acked. txid 0 is the position at the call. Errors: ErrNoDatabase.
	Wait(ctx context.Context, db string, txid ltx.TXID, acked bool) error
	// Export writes db as one consistent SQLite file. Errors: ErrNoDatabase.
	Export(ctx context.Context, db string, w io.Writer) error
	// Import makes the SQLite file in r the content of db, as one durable
	// transaction.
	Import(ctx context.Context, db string, r io.Reader) error
	// Verify recomputes the checksums of db, or with "" of everything, and calls
	// report for each thing it has looked at, good or bad, from one goroutine.
	// What does not hold is a Check that says so, not an error: an error says
	// that the work itself could not be done. Errors: ErrNoDatabase.
	Verify(ctx context.Context, db string, report func(Check)) error
	// ExportLTX writes what is held of the history of db: for each file it calls
	// create with its name (MIN-MAX.ltx) and size, then writes exactly so many
	// bytes. Errors: ErrNoDatabase.
	ExportLTX(ctx context.Context, db string, create CreateFunc) error
	// Events calls report for what happens to db, or with "" for everything that
	// happens, until ctx ends (its cause) or report fails (its error). A report that
	// takes long delays nobody else: what it misses is an Event of its own.
	Events(ctx context.Context, db string, report func(Event) error) error
}

// A NodeKeeper is a Service that knows nodes: a hub's.
type NodeKeeper interface {
	// Nodes returns all nodes by id.
	Nodes(ctx context.Context) ([]NodeInfo, error)
	// AcceptNode lets a refused clone go on as the node id: that on hardware, 16 hex
	// digits, or with "" the only one.
	AcceptNode(ctx context.Context, id, hardware string) (NodeInfo, error)
}

// A CreateFunc begins the next file of size bytes. The writer is good until the
// next call.
type CreateFunc func(name string, size int64) (io.Writer, error)

// A Check is one thing that verify has looked at, or its progress.
type Check struct {
	DB      string  `json:"db"`
	Object  string  `json:"object"` // "database", "records", "archive", or a file's name
	Pos     *string `json:"pos"`    // the position that was verified, null if none was
	Done    int64   `json:"done"`   // bytes read of it
	Total   int64   `json:"total"`  // bytes there are
	OK      bool    `json:"ok"`     // nothing wrong so far
	Problem *string `json:"problem"`
}

// InProgress reports whether the work on c goes on: a later Check follows.
func (c Check) InProgress() bool { return c.OK && c.Done < c.Total }

// A Result counts Checks. It is the last of the lines that verify prints.
type Result struct {
	Result   string `json:"result"`  // "ok" or "failed"
	Checked  int    `json:"checked"` // things looked at
	Problems int    `json:"problems"`
}

// Add counts c unless it is mere progress.
func (r *Result) Add(c Check) {
	if c.InProgress() {
		return
	}
	r.Checked++
	if !c.OK {
		r.Problems++
	}
}

// Final returns r with its verdict.
func (r Result) Final() Result {
	r.Result = "ok"
	if r.Problems > 0 {
		r.Result = "failed"
	}
	return r
}

var (
	// ErrNoDatabase reports a database that the service does not hold.
	ErrNoDatabase = errors.New("no such database")
	// ErrTimeout reports that the time the client gave was over.
	ErrTimeout = errors.New("timed out")
	// ErrNoService reports that nobody answers at the socket.
	ErrNoService = errors.New("no service answers")
	// ErrCut reports that a stream ended early, with the service or its socket.
	ErrCut = errors.New("the service ended before its answer did")
)

// The trailer that ends a stream, and its value where all is well.
const (
	resultTrailer = "Litefs-Result"
	resultOK      = "ok"
)
