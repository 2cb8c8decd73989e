package e2e

import (
	"os"
	"strings"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// A hub that lost everything and was started anew is another site, to which no
// node gives anything, until it is told which site it is.
func TestHubThatLostEverything(t *testing.T) {
	env := testrig.New(t)
	addr := freeAddr(t)
	hub := env.NewHub(addr, testrig.Options{Mount: true})
	hub.Start()
	node := env.Node(withHub(addr))
	env.SQL(node.Path("a.db"), "CREATE TABLE t(v,n);"+fill("t", 100, 100))
	sameAtHub(env, node, hub, "a.db")
	site, _ := hub.Status()["site"].(string)

	hub.Stop()
	if err := os.RemoveAll(hub.Data); err != nil {
		t.Fatal(err)
	}
	hub.Start()
	env.SQL(node.Path("a.db"), fill("t", 10, 100))
	linkError(env, node, "start the hub with --site "+site)
	if testrig.Exists(hub.Path("nodes/n1/a.db")) {
		t.Error("a hub of another site has the database")
	}

	hub.Stop()
	if err := os.RemoveAll(hub.Data); err != nil {
		t.Fatal(err)
	}
	hub.Args = []string{"--site", site}
	hub.Start()
	node.Restart() // or it waits for its next try
	sameAtHub(env, node, hub, "a.db")
	hub.Stop()
	if out, err := testrig.Output(env.Command(env.Program, "hub", "--config", hub.Config(), "--site", strings.Repeat("0", 32)), ""); err == nil || !strings.Contains(out, "leave --site away") {
		t.Errorf("another --site: got %v, %s", err, out)
	}
}

// A node with its hub's id is refused with the cure; node list shows who is there.
func TestNodeList(t *testing.T) {
	env := testrig.New(t)
	addr := freeAddr(t)
	hub := env.NewHub(addr, testrig.Options{ID: "site-hub", Mount: true})
	hub.Start()
	node := env.Node(withHub(addr))
	env.SQL(node.Path("a.db"), "CREATE TABLE t(v,n);"+fill("t", 10, 100))
	sameAtHub(env, node, hub, "a.db")
	list := env.Must(hub.Client("node", "list"), "")
	if !strings.Contains(list, "n1") || !strings.Contains(list, "connected") || !strings.Contains(list, "127.0.0.1:") {
		t.Errorf("node list:\n%s", list)
	}
	if out, err := testrig.Output(node.Client("node", "list"), ""); err == nil || !strings.Contains(out, "ask the hub") {
		t.Errorf("node list at a node: got %v, %s", err, out)
	}
	if out, err := testrig.Output(hub.Client("node", "accept", "n1"), ""); err == nil || !strings.Contains(out, "no clone of it was refused") {
		t.Errorf("accept without a clone: got %v, %s", err, out)
	}
	twin := env.Node(testrig.Options{ID: "twin", NoID: true, Node: alone + "id = \"site-hub\"\n", Config: withHub(addr).Config})
	linkError(env, twin, "set another [node] id")
}
