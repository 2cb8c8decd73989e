package store

import (
	"time"

	"github.com/litefs-agent/litefs-agent/ltx"
)

// An EventKind says what happened to a database.
type EventKind uint8

const (
	// EventCommit: a transaction was confirmed; Pos is the position after it.
	EventCommit EventKind = iota + 1
	// EventAck: the hub confirmed Pos.
	EventAck
	// EventBranch: the line that ended at Pos was kept when another replaced it.
	EventBranch
)

// An Event is something that happened to a database.
type Event struct {
	Kind    EventKind
	Name    string
	History uint64
	Epoch   Epoch
	Pos     ltx.Pos
	Time    time.Time
}

// OnEvent has fn called for each event from now on, in the order of a database's
// transactions. fn must neither block nor call the store: the transaction waits
// for it.
func (st *Store) OnEvent(fn func(Event)) { st.onEvent.Store(&fn) }

// tell reports an event of a database. db.mu is held.
func (db *DB) tell(kind EventKind, pos ltx.Pos, at time.Time) {
	if fn := db.st.onEvent.Load(); fn != nil {
		(*fn)(Event{Kind: kind, Name: db.name, History: db.history, Epoch: db.epoch, Pos: pos, Time: at})
	}
}
