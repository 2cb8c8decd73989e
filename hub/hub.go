// Package hub is a hub: it takes the records of its nodes, makes them durable,
// and keeps every database with its history.
package hub

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/config"
	"github.com/litefs-agent/litefs-agent/internal/control"
	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/ltx"
	"github.com/litefs-agent/litefs-agent/store"
	"github.com/litefs-agent/litefs-agent/transport"
)

// NodesDir is the folder of the hub's mount that holds what nodes own.
const NodesDir = "nodes"

// IngestOptions configure an Ingest.
type IngestOptions struct {
	ID    string // of the hub
	Site  transport.Site
	Store *store.Store
	FS    disk.FS // data folder: what is known of nodes, streams under way
	// Hold refuses the line of a device that the hub does not know, for an
	// operator to decide; else it becomes current and the other one is kept.
	Hold bool
	// MaxDatabases bounds those of one node; 0 is transport.MaxDatabases.
	MaxDatabases int
	// StreamStall is how long a record that is sent in parts may stand still; 0 is
	// ten minutes.
	StreamStall time.Duration
	Auth        *Auth        // nil: everybody is who it says it is
	Told        Listener     // of acks, and of nodes that come and go; nil: nobody
	Log         *slog.Logger // nil discards
}

// A Listener is told what happens. Its methods must not block.
type Listener interface {
	Emit(e control.Event)
	EmitDatabase(e store.Event)
}

// An Ingest takes the records of nodes. It is the hub's side of the link.
type Ingest struct {
	opt   IngestOptions
	log   *slog.Logger
	nodes *registry

	refusals throttle

	mu       sync.Mutex // guards what follows
	reserved int64      // bytes of the disk that streams have reserved
	sessions map[string]*session
	hellos   map[string]*meter // of each node
}

var (
	_ transport.Handler = (*Ingest)(nil)
	_ transport.Gate    = (*Ingest)(nil)
)

// NewIngest reads what is known of the nodes.
func NewIngest(opt IngestOptions) (*Ingest, error) {
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	if opt.MaxDatabases == 0 {
		opt.MaxDatabases = transport.MaxDatabases
	}
	if opt.StreamStall == 0 {
		opt.StreamStall = streamStall
	}
	nodes, err := openRegistry(opt.FS)
	if err != nil {
		return nil, err
	}
	return &Ingest{opt: opt, log: opt.Log, nodes: nodes, sessions: make(map[string]*session), hellos: make(map[string]*meter)}, nil
}

// nameAt is the name at the hub of a node's database.
func nameAt(node, name string) string { return NodesDir + "/" + node + "/" + name }

// replaceWait bounds how long a new session waits for the end of the one that it
// replaces.
const replaceWait = 5 * time.Second

// Admit implements transport.Gate.
func (h *Ingest) Admit(_ context.Context, peer transport.Peer) (*transport.Identity, error) {
	id, err := h.opt.Auth.who(peer)
	if err != nil {
		h.turnedAway(peer, "", err)
		return nil, err
	}
	out := &transport.Identity{Site: h.opt.Site, Hub: h.opt.ID}
	if !id.anybody {
		out.Node = id.names[0]
	}
	return out, nil
}

// turnedAway logs a peer without good credentials, a few a minute at most.
func (h *Ingest) turnedAway(peer transport.Peer, node string, err error) {
	if n, ok := h.refusals.allow(time.Now()); ok {
		h.log.Warn("a peer was turned away", "peer", node, "addr", peer.Addr, "carrier", peer.Carrier, "unlogged", n, "err", err)
	}
}

// Recheck ends the sessions whose credentials are not good any more: a token was
// revoked, or the client CA replaced.
func (h *Ingest) Recheck() {
	h.mu.Lock()
	list := slices.Collect(maps.Values(h.sessions))
	h.mu.Unlock()
	for _, s := range list {
		if err := h.opt.Auth.check(s.peer, s.node); err != nil {
			s.cancel(err)
		}
	}
}

// Accept implements transport.Handler.
func (h *Ingest) Accept(ctx context.Context, peer transport.Peer, hello *transport.Hello) (*transport.Welcome, error) {
	if err := h.opt.Auth.check(peer, hello.Node); err != nil {
		h.turnedAway(peer, hello.Node, err)
		return nil, err
	}
	switch {
	case !config.ValidID(hello.Node):
		return nil, transport.Refuse(transport.CodeNodeID, "%q is no node id: 1 to 64 of A-Z a-z 0-9 _ -", hello.Node)
	case hello.Node == h.opt.ID:
		return nil, transport.Refuse(transport.CodeNodeID, "%q is the id of this hub: set another [node] id", hello.Node)
	case hello.Site != transport.Site{} && hello.Site != h.opt.Site:
		return nil, transport.Refuse(transport.CodeSite, "this hub is of site %s, the node belongs to site %s and gets nothing here: "+
			"start the hub with --site %s if it has lost its data, or the node with an empty data folder", h.opt.Site, hello.Site, hello.Site)
	}
	if !h.helloAllowed(hello.Node) {
		return nil, &transport.ByeError{Code: transport.CodeBusy, Text: "too many hellos of this node", RetryAfter: 10 * time.Second}
	}
	// What the older session still has on its way would move the positions.
	if err := h.end(ctx, hello.Node); err != nil {
		return nil, err
	}
	number, err := h.nodes.welcome(hello, peer.Addr, h.log)
	if err != nil {
		if _, refused := errors.AsType[*transport.ByeError](err); !refused {
			h.log.Error("session not opened", "peer", hello.Node, "err", err)
		}
		return nil, err
	}
	w := &transport.Welcome{Site: h.opt.Site, Hub: h.opt.ID, Session: number}
	for _, db := range h.databases(hello.Node) {
		if err := db.Sync(); err != nil {
			return nil, fmt.Errorf("%s: %w", db.Name(), err)
		}
		w.Databases = append(w.Databases, h.state(hello.Node, db))
	}
	h.log.Debug("hello", "peer", hello.Node, "addr", peer.Addr, "carrier", peer.Carrier)
	return w, nil
}

// Hellos of one node: so many at once, then so many a second. Each costs the hub
// a write to its disk.
const (
	helloBurst = 100
	helloRate  = 10
)

func (h *Ingest) helloAllowed(node string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.hellos[node]
	if m == nil {
		m = new(meter)
		h.hellos[node] = m
	}
	return m.allow(time.Now(), helloBurst, helloRate)
}

// databases returns what the hub has of a node.
func (h *Ingest) databases(node string) (list []*store.DB) {
	prefix := nameAt(node, "")
	for _, db := range h.opt.Store.DBs() {
		if strings.HasPrefix(db.Name(), prefix) {
			list = append(list, db)
		}
	}
	return list
}

// state says where the hub stands in a database of a node.
func (h *Ingest) state(node string, db *store.DB) transport.DatabaseState {
	info := db.Info()
	return transport.DatabaseState{
		Name: strings.TrimPrefix(info.Name, nameAt(node, "")), History: transport.History(info.History),
		Epoch: transport.Epoch(info.Epoch), Pos: info.Pos, Archived: info.Pos, PageSize: info.PageSize,
	}
}

// end ends the session of a node, if there is one, and waits until nothing of it
// is under way.
func (h *Ingest) end(ctx context.Context, node string) error {
	h.mu.Lock()
	s := h.sessions[node]
	h.mu.Unlock()
	if s == nil {
		return nil
	}
	s.cancel(transport.Refuse(transport.CodeReplaced, "the node opened a newer session"))
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
	case <-time.After(replaceWait):
	}
	return transport.Refuse(transport.CodeBusy, "the older session of this node is still ending")
}

// Serve implements transport.Handler.
func (h *Ingest) Serve(ctx context.Context, c transport.Conn, hello *transport.Hello, w *transport.Welcome) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s := newSession(h, hello.Node, c, cancel)
	s.peer = transport.PeerOf(ctx)
	for {
		if err := h.end(ctx, hello.Node); err != nil {
			return err
		}
		h.mu.Lock()
		if h.sessions[hello.Node] == nil {
			h.sessions[hello.Node] = s
			h.mu.Unlock()
			break
		}
		h.mu.Unlock()
	}
	if err := h.opt.Auth.check(s.peer, s.node); err != nil {
		cancel(err) // revoked since Accept: Recheck did not know this session yet
	}
	h.nodes.connected(hello)
	h.log.Info("node connected", "peer", hello.Node, "version", hello.AgentVersion)
	h.emitLink(hello.Node, control.NodeConnected, nil)
	err := s.run(ctx)
	h.mu.Lock()
	delete(h.sessions, hello.Node)
	h.mu.Unlock()
	stats := c.Stats()
	h.nodes.seen(hello.Node, time.Now().Add(-stats.LastHeard), stats.RecvBytes > 0)
	close(s.done)
	if cause, ok := errors.AsType[*transport.ByeError](context.Cause(ctx)); ok {
		err = cause
	}
	h.log.Info("node disconnected", "peer", hello.Node, "err", err)
	h.emitLink(hello.Node, control.NodeLost, err)
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return err
}

func (h *Ingest) emitLink(node, state string, err error) {
	if h.opt.Told == nil {
		return
	}
	e := control.Event{Time: time.Now().UTC(), Event: control.EventLink, Node: node, State: state}
	if err != nil {
		e.Error = err.Error()
	}
	h.opt.Told.Emit(e)
}

// emitAck tells that everything of a database up to a place is durable here.
func (h *Ingest) emitAck(name string, at store.Place) {
	if h.opt.Told != nil {
		h.opt.Told.EmitDatabase(store.Event{Kind: store.EventAck, Name: name, History: at.History, Epoch: at.Epoch, Pos: at.Pos})
	}
}

// apply takes one record of a node.
func (h *Ingest) incoming(node string, r *record) (store.Incoming, error) {
	p := r.push
	in := store.Incoming{
		Name: nameAt(node, p.Name), History: uint64(p.History), Epoch: store.Epoch(p.Epoch),
		LTX: r.body, Size: r.size,
	}
	header, err := ltx.ReadHeader(r.body)
	if err != nil {
		return in, fmt.Errorf("%w: %w", store.ErrCorrupt, err)
	}
	if header.MinTXID != p.MinTXID || header.MaxTXID != p.MaxTXID || header.PreApplyChecksum != p.PreApply && p.Flags&transport.PushSnapshot == 0 {
		return in, fmt.Errorf("announced %s to %s, holds %s to %s: %w", p.MinTXID, p.MaxTXID, header.MinTXID, header.MaxTXID, store.ErrCorrupt)
	}
	db := h.opt.Store.DB(in.Name)
	if db == nil && len(h.databases(node)) >= h.opt.MaxDatabases {
		return in, errTooMany
	}
	if db != nil {
		if db.Place().History != in.History {
			if h.opt.Hold {
				return in, errHold
			}
			in.Replace = header.MinTXID == 1
		}
	}
	return in, nil
}

// errTooMany is the refusal of one more database.
var errTooMany = errors.New("the node has as many databases at the hub as it may have")

// errHold is the refusal of a line that an operator has to decide about.
var errHold = errors.New("the hub has another line of this database, and [hub] divergence = \"hold\"")

// session returns the session of a node, nil if it has none.
func (h *Ingest) session(node string) *session {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.sessions[node]
}
