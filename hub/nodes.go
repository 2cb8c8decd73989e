package hub

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/litefs-agent/litefs-agent/internal/control"
)

// Nodes implements control.NodeKeeper.
func (a *answers) Nodes(context.Context) ([]control.NodeInfo, error) {
	ingest := a.ingest.Load()
	if ingest == nil {
		return nil, errStarting
	}
	return ingest.nodeInfos(), nil
}

// AcceptNode implements control.NodeKeeper.
func (a *answers) AcceptNode(_ context.Context, id, hardware string) (control.NodeInfo, error) {
	ingest := a.ingest.Load()
	if ingest == nil {
		return control.NodeInfo{}, errStarting
	}
	return ingest.AcceptNode(id, hardware)
}

var errStarting = errors.New("the hub is starting")

// AcceptNode lets a refused clone go on as the node: that on hardware, 16 hex
// digits, or with "" the only one.
func (h *Ingest) AcceptNode(id, hardware string) (control.NodeInfo, error) {
	var want *uint64
	if hardware != "" {
		n, err := strconv.ParseUint(hardware, 16, 64)
		if err != nil || len(hardware) != 16 {
			return control.NodeInfo{}, fmt.Errorf("hardware %q: must be 16 hex digits, as 'litefs-agent node list' shows them", hardware)
		}
		want = &n
	}
	n, err := h.nodes.accept(id, want)
	if err != nil {
		return control.NodeInfo{}, err
	}
	h.log.Warn("an operator accepts a clone: its next hello is taken", "peer", id)
	return h.nodeInfo(id, n), nil
}

// nodeInfos describes all nodes that were heard or have a token, by id.
func (h *Ingest) nodeInfos() []control.NodeInfo {
	ids, known := h.nodes.list()
	if h.opt.Auth != nil {
		tokens, _ := h.opt.Auth.list()
		for _, t := range tokens.tokens {
			if !slices.Contains(ids, t.Node) {
				ids = append(ids, t.Node)
			}
		}
	}
	slices.Sort(ids)
	list := []control.NodeInfo{}
	for _, id := range ids {
		list = append(list, h.nodeInfo(id, known[id]))
	}
	return list
}

func (h *Ingest) nodeInfo(id string, n node) control.NodeInfo {
	info := control.NodeInfo{ID: id, State: control.NodeNever, Clones: []control.CloneInfo{}}
	if n.Session > 0 {
		info.State = control.NodeLost
		hardware := fmt.Sprintf("%016x", n.Hardware)
		info.Session, info.Hardware, info.Version, info.LastSeen = &n.Session, &hardware, &n.Version, &n.Seen
	}
	if s := h.session(id); s != nil {
		info.State = control.NodeConnected
		seen := s.heard().UTC()
		info.LastSeen, info.Addr, info.Carrier = &seen, &s.peer.Addr, &s.peer.Carrier
	}
	for _, c := range n.Clones {
		info.Clones = append(info.Clones, control.CloneInfo{
			Hardware: fmt.Sprintf("%016x", c.Hardware), Session: c.Session, Addr: c.Addr, Time: c.At, Accepted: c.Accepted,
		})
	}
	return info
}
