package hub

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/config"
	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/transport"
)

// A registry is what the hub knows of its nodes, a file each in the folder
// "sessions" of the data folder. A number is durable before a node gets it.
type registry struct {
	fs disk.FS

	mu    sync.Mutex // guards nodes; held while a file is written
	nodes map[string]*node
}

// A node is the JSON of its file. What is not in it is known since the start.
type node struct {
	Session  uint64    `json:"session"`  // the number issued last
	Before   uint64    `json:"before"`   // the one before, good until the node is heard: a Welcome may be lost; else 0
	Hardware uint64    `json:"hardware"` // hash of the board's serial number
	Version  string    `json:"version"`
	Seen     time.Time `json:"seen"`
	Clones   []clone   `json:"clones,omitempty"` // refused, oldest first, each hardware once

	connected bool
}

// A clone presented an old session number on other hardware.
type clone struct {
	Hardware uint64    `json:"hardware"`
	Session  uint64    `json:"session"`
	Addr     string    `json:"addr"`
	At       time.Time `json:"at"`
	Accepted bool      `json:"accepted,omitempty"` // by an operator: its next hello is taken
}

// maxClones bounds what is remembered of one node's clones.
const maxClones = 8

const sessionsDir = "sessions"

func openRegistry(fsys disk.FS) (*registry, error) {
	r := &registry{fs: fsys, nodes: make(map[string]*node)}
	if err := disk.MkdirAll(fsys, sessionsDir, 0o700); err != nil {
		return nil, fmt.Errorf("make %s in the data folder: %w", sessionsDir, err)
	}
	list, err := fsys.ReadDir(sessionsDir)
	if err != nil {
		return nil, err
	}
	for _, entry := range list {
		id, ok := strings.CutSuffix(entry.Name(), ".json")
		if !ok || !config.ValidID(id) {
			continue
		}
		b, err := disk.ReadFile(fsys, path.Join(sessionsDir, entry.Name()), 64<<10)
		n := new(node)
		if err == nil {
			err = json.Unmarshal(b, n)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("read %s of node %s: %w", sessionsDir, id, err)
		}
		r.nodes[id] = n
	}
	return r, nil
}

// welcome checks the number and hardware that a node presents, and issues the
// next number. A stale number from other hardware is a clone's; from the same, a
// restored card's; the right number from other hardware is a moved card's.
func (r *registry) welcome(hello *transport.Hello, addr string, log *slog.Logger) (uint64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.nodes[hello.Node]
	if n == nil {
		n = new(node)
	}
	current := n.Session == 0 || hello.Session == n.Session || hello.Session == n.Before && n.Before != 0 || hello.Session > n.Session
	other := n.Session != 0 && n.Hardware != hello.Hardware
	at := slices.IndexFunc(n.Clones, func(c clone) bool { return c.Hardware == hello.Hardware })
	clones := slices.Clone(n.Clones)
	switch {
	case !current && other && (at < 0 || !n.Clones[at].Accepted):
		return 0, r.refuseClone(hello, n, addr, log)
	case !current && other:
		log.Warn("a clone goes on as the node, as an operator has decided; what was the node is now the clone",
			"peer", hello.Node, "addr", addr)
	case other:
		log.Warn("node is on other hardware than before: a moved card", "peer", hello.Node, "addr", addr)
	case !current:
		log.Warn("node has an old session number: a restored or new card", "peer", hello.Node, "addr", addr)
	}
	if at >= 0 {
		clones = slices.Delete(clones, at, at+1)
	}
	next := node{
		Session: max(n.Session, hello.Session) + 1, Before: hello.Session, Hardware: hello.Hardware,
		Version: hello.AgentVersion, Seen: time.Now().UTC(), Clones: clones,
	}
	if err := r.write(hello.Node, next); err != nil {
		return 0, err
	}
	r.nodes[hello.Node] = &next
	return next.Session, nil
}

// refuseClone keeps what is known of a clone and returns its refusal. r.mu is
// held.
func (r *registry) refuseClone(hello *transport.Hello, n *node, addr string, log *slog.Logger) error {
	log.Error("a node with an old session number on other hardware is refused: a clone or a replacement; 'litefs-agent node list' shows it",
		"peer", hello.Node, "addr", addr)
	next := *n
	next.Clones = slices.DeleteFunc(slices.Clone(n.Clones), func(c clone) bool { return c.Hardware == hello.Hardware })
	next.Clones = append(next.Clones, clone{Hardware: hello.Hardware, Session: hello.Session, Addr: addr, At: time.Now().UTC()})
	next.Clones = next.Clones[max(0, len(next.Clones)-maxClones):]
	if err := r.write(hello.Node, next); err != nil {
		return err
	}
	r.nodes[hello.Node] = &next
	if hello.Session == 0 {
		return transport.Refuse(transport.CodeClone,
			"node %s is known on other hardware: if this board replaces it, run 'litefs-agent node accept %s' at the hub; else give this one another [node] id",
			hello.Node, hello.Node)
	}
	return transport.Refuse(transport.CodeClone,
		"this card is a clone, node %s has gone on elsewhere: give this one another [node] id and an empty data folder, or, if it is to go on as %s, run 'litefs-agent node accept %s' at the hub",
		hello.Node, hello.Node, hello.Node)
}

// accept lets a refused clone go on as the node: the one with that hardware, or
// with nil the only one.
func (r *registry) accept(id string, hardware *uint64) (node, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.nodes[id]
	if n == nil || len(n.Clones) == 0 {
		return node{}, fmt.Errorf("%s: no clone of it was refused: let the board that is to go on dial the hub first", id)
	}
	if hardware == nil && len(n.Clones) > 1 {
		return node{}, fmt.Errorf("%s: %d clones were refused: name one of them with --hardware, as 'litefs-agent node list' shows them", id, len(n.Clones))
	}
	next := *n
	next.Clones = slices.Clone(n.Clones)
	found := false
	for i := range next.Clones {
		c := &next.Clones[i]
		c.Accepted = hardware == nil || c.Hardware == *hardware // one at a time
		found = found || c.Accepted
	}
	if !found {
		return node{}, fmt.Errorf("%s: no clone on hardware %016x was refused", id, *hardware)
	}
	if err := r.write(id, next); err != nil {
		return node{}, err
	}
	r.nodes[id] = &next
	return next, nil
}

// heard notes that the node has its new number: the one before is a clone's from
// now on.
func (r *registry) heard(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.nodes[id]; n != nil {
		n.Before = 0 // written at the latest when the session ends
	}
}

func (r *registry) write(id string, n node) error {
	b, err := json.Marshal(n)
	if err == nil {
		err = disk.WriteFileAtomic(r.fs, path.Join(sessionsDir, id+".json"), b)
	}
	if err != nil {
		return fmt.Errorf("keep the session number of %s: %w", id, err)
	}
	return nil
}

// connected notes that the session of a node has begun.
func (r *registry) connected(hello *transport.Hello) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.nodes[hello.Node]; n != nil {
		n.connected = true
	}
}

// seen notes when the node was last heard, at the end of its session, and whether
// it was.
func (r *registry) seen(id string, at time.Time, heard bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.nodes[id]; n != nil {
		if heard {
			n.Before = 0
		}
		n.connected, n.Seen = false, at.UTC()
		_ = r.write(id, *n) // the next welcome writes it anyway
	}
}

// list returns the ids of all nodes, ascending, and copies of what is known.
func (r *registry) list() (ids []string, nodes map[string]node) {
	r.mu.Lock()
	defer r.mu.Unlock()
	nodes = make(map[string]node, len(r.nodes))
	for id, n := range r.nodes {
		ids = append(ids, id)
		nodes[id] = *n
	}
	slices.Sort(ids)
	return ids, nodes
}

// siteFile holds the site, 32 hex digits.
const siteFile = "site"

// keptSite returns the site of the data folder. Where there is none it keeps
// asked, or else one that it makes.
func keptSite(fsys disk.FS, asked string, make func() transport.Site) (transport.Site, error) {
	b, err := disk.ReadFile(fsys, siteFile, 1024)
	kept := strings.TrimSpace(string(b))
	switch {
	case err == nil && asked != "" && asked != kept:
		return transport.Site{}, fmt.Errorf("the data folder is of site %s, --site says %s: leave --site away, or start with an empty data folder", kept, asked)
	case err == nil:
		return parseSite(kept)
	case !errors.Is(err, os.ErrNotExist):
		return transport.Site{}, err
	}
	site := make()
	if asked != "" {
		if site, err = parseSite(asked); err != nil {
			return site, err
		}
	}
	return site, disk.WriteFileAtomic(fsys, siteFile, []byte(site.String()+"\n"))
}
