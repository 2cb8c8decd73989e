package hub

import (
	"slices"
	"strings"

	"github.com/litefs-agent/litefs-agent/internal/control"
	"github.com/litefs-agent/litefs-agent/service"
)

// splitName returns whose a database is, and its name at that node.
func splitName(full string) (node, name string) {
	rest, ok := strings.CutPrefix(full, NodesDir+"/")
	if !ok {
		return "", full
	}
	node, name, _ = strings.Cut(rest, "/")
	return node, name
}

// status describes every node that was ever heard or has databases here.
func (h *Ingest) status() []control.StatusNodeAtHub {
	ids, known := h.nodes.list()
	databases := make(map[string][]control.StatusDatabase)
	for _, db := range h.opt.Store.DBs() {
		if !db.Exists() {
			continue
		}
		id, name := splitName(db.Name())
		d := service.Database(db, id, "replica")
		d.Name = name // as its node calls it; at the hub's mount it is below nodes/ID/
		// Age is the node's to know.
		if known[id].connected {
			d.LagMS = new(int64)
		}
		databases[id] = append(databases[id], d)
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	list := []control.StatusNodeAtHub{}
	for _, id := range ids {
		n := control.StatusNodeAtHub{ID: id, State: control.NodeNever, Databases: databases[id]}
		if n.Databases == nil {
			n.Databases = []control.StatusDatabase{}
		}
		if k, ok := known[id]; ok {
			n.State = control.NodeLost
			if k.connected {
				n.State = control.NodeConnected
			}
			seen := k.Seen
			if s := h.session(id); s != nil {
				seen = s.heard().UTC()
			}
			n.LastSeen = &seen
			n.Version = &k.Version
		}
		list = append(list, n)
	}
	return list
}
