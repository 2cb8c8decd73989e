package e2e

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// freeAddr returns an address on loopback that nobody listens on.
func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// A cutter is a link that breaks: each connection carries a random number of
// bytes, then it is reset.
type cutter struct {
	net.Listener
	target string

	mu   sync.Mutex
	rand *rand.Rand
	most int // bytes of a connection; 0: no limit
	open map[net.Conn]bool
	cuts int
}

func newCutter(t testing.TB, target string, seed uint64) *cutter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{Listener: l, target: target, rand: rand.New(rand.NewPCG(seed, 4)), open: map[net.Conn]bool{}}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { c.carry(conn) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		c.cut()
		wg.Wait()
	})
	return c
}

// limit sets how much a connection carries at most, and cuts those that are.
func (c *cutter) limit(most int) {
	c.mu.Lock()
	c.most = most
	c.mu.Unlock()
	c.cut()
}

func (c *cutter) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for conn := range c.open {
		conn.Close()
	}
}

func (c *cutter) carry(conn net.Conn) {
	hub, err := net.Dial("tcp", c.target)
	if err != nil {
		conn.Close()
		return
	}
	c.mu.Lock()
	limits := [2]int64{1 << 60, 1 << 60}
	if c.most > 0 {
		limits[c.rand.IntN(2)] = c.rand.Int64N(int64(c.most))
	}
	c.open[conn], c.open[hub] = true, true
	c.mu.Unlock()
	var wg sync.WaitGroup
	pump := func(to, from net.Conn, limit int64) {
		if n, _ := io.CopyN(to, from, limit); n == limit {
			c.mu.Lock()
			c.cuts++
			c.mu.Unlock()
		}
		to.Close()
		from.Close()
	}
	wg.Go(func() { pump(hub, conn, limits[0]) })
	wg.Go(func() { pump(conn, hub, limits[1]) })
	wg.Wait()
	c.mu.Lock()
	delete(c.open, conn)
	delete(c.open, hub)
	c.mu.Unlock()
}

// withHub is the configuration of a node whose hub is at addr.
func withHub(addr string) testrig.Options {
	return testrig.Options{Config: fmt.Sprintf("[hub]\nurl = \"http://%s\"\n", addr)}
}

// sameAtHub waits until the database is acked and compares it at the node, at
// the hub's mount, and in the exports of both.
func sameAtHub(env *testrig.Env, node, hub *testrig.Service, base string) {
	env.Helper()
	env.Must(node.Client("wait", "--db", base, "--acked", "--timeout", "60s"), "")
	path, there := node.Path(base), hub.Path("nodes/"+node.ID+"/"+base)
	pos := env.Pos(path)
	env.Wait(20*time.Second, base+"-acked reaches -pos", func() bool {
		acked, err := readPos(path + "-acked")
		return err == nil && acked == pos
	})
	env.Wait(20*time.Second, "the hub's mount is at the node's position", func() bool {
		got, err := readPos(there + "-pos")
		return err == nil && got == pos
	})
	// It was acked, so it is durable there.
	if got, err := readPos(there + "-acked"); err != nil || got != pos {
		env.Errorf("%s-acked at the hub's mount: got %v (%v), want %v", there, got, err, pos)
	}
	out := env.Folder("export")
	mine, theirs := filepath.Join(out, base+"-node"), filepath.Join(out, base+"-hub")
	env.Must(node.Client("export", "--force", "--db", base, "-o", mine), "")
	env.Must(hub.Client("export", "--force", "--db", "nodes/"+node.ID+"/"+base, "-o", theirs), "")
	sameFile(env, theirs, mine)
	sameFile(env, there, theirs)
	checkDB(env, theirs)
	if got, want := env.SQL(there, ".dump"), env.SQL(path, ".dump"); got != want {
		env.Errorf("%s: the dump at the hub's mount differs from the node's", base)
	}
}

func readPos(path string) (testrig.Pos, error) {
	b, err := readFile(path)
	if err != nil {
		return testrig.Pos{}, err
	}
	return testrig.ParsePos(b)
}

// Every mode reaches the hub byte for byte, drops too.
func TestShip(t *testing.T) {
	env := testrig.New(t)
	addr := freeAddr(t)
	hub := env.NewHub(addr, testrig.Options{Mount: true})
	hub.Start()
	node := env.Node(withHub(addr))
	for _, mode := range modes {
		path := node.Path(mode + ".db")
		env.SQL(path, "PRAGMA journal_mode="+mode+"; CREATE TABLE t(v,n);"+fill("t", 300, 100)+"PRAGMA page_size=1024; VACUUM; DELETE FROM t WHERE n%3=0; BEGIN; DELETE FROM t; ROLLBACK;")
		sameAtHub(env, node, hub, mode+".db")
	}
	// One transaction over three databases, and connections open at the hub.
	readers := map[string]*testrig.Session{}
	for _, mode := range modes {
		readers[mode] = env.Session(hub.Path("nodes/n1/" + mode + ".db"))
		readers[mode].Do(".timeout 20000\nSELECT count(*) FROM t;")
	}
	for round := range 20 {
		env.SQL(node.Path("delete.db"), name("ATTACH '%s' AS b; ATTACH '%s' AS c; ATTACH '%s' AS w; BEGIN;", node.Path("truncate.db"), node.Path("persist.db"), node.Path("wal.db"))+
			strings.ReplaceAll("INSERT INTO main.t VALUES('g',$);INSERT INTO b.t VALUES('g',$);INSERT INTO c.t VALUES('g',$);INSERT INTO w.t VALUES('g',$); COMMIT;", "$", fmt.Sprint(1000+round)))
	}
	for _, mode := range modes {
		sameAtHub(env, node, hub, mode+".db")
		if got := readers[mode].Do("SELECT max(n) FROM t; PRAGMA integrity_check;"); got != "1019\nok" {
			t.Errorf("%s: a connection at the hub: got %s, want 1019 and ok", mode, got)
		}
		readers[mode].Close()
	}
	one := makeDB(env, "one", 400)
	env.Run("cp", one, node.Path("copied.db"))
	sameAtHub(env, node, hub, "copied.db")
	env.SQL(node.Path("copied.db"), "DELETE FROM t WHERE n%2=0; VACUUM;")
	sameAtHub(env, node, hub, "copied.db")

	there := hub.Path("nodes/n1/wal.db")
	if out, err := env.TrySQL(there, "INSERT INTO t VALUES('x',1);"); err == nil || !strings.Contains(out, "readonly") {
		t.Errorf("a write at the hub: got %v, %s; want readonly", err, out)
	}
	env.Run("rm", node.Path("copied.db"))
	env.Wait(20*time.Second, "the drop reaches the hub", func() bool { return !testrig.Exists(hub.Path("nodes/n1/copied.db")) })
	env.Run("cp", one, node.Path("copied.db"))
	sameAtHub(env, node, hub, "copied.db")
	hub.Restart()
	for _, mode := range modes {
		sameAtHub(env, node, hub, mode+".db")
	}
}

// Programs that open a database at the hub while records arrive see whole
// transactions, and never fewer than before.
func TestReadAtHub(t *testing.T) {
	env := testrig.New(t)
	addr := freeAddr(t)
	hub := env.NewHub(addr, testrig.Options{Mount: true})
	hub.Start()
	node := env.Node(withHub(addr))
	for _, mode := range []string{"delete", "wal"} {
		t.Run(mode, func(t *testing.T) {
			env := env.For(t)
			path, there := node.Path(mode+".db"), hub.Path("nodes/n1/"+mode+".db")
			env.SQL(path, "PRAGMA journal_mode="+mode+";"+numbererSchema)
			sameAtHub(env, node, hub, mode+".db")
			w := startNumberer(env, path, "PRAGMA synchronous=OFF;", 0, 1, 1)
			stays := env.Session(there)
			stays.Do(".timeout 20000")
			const look = "SELECT count(*), ifnull(max(n),0) FROM t; PRAGMA integrity_check;"
			last := 0
			for started := time.Now(); time.Since(started) < 5*time.Second; {
				for _, out := range []string{env.SQL(there, look), stays.Do(look)} {
					var count, most int
					var ok string
					if _, err := fmt.Sscanf(strings.Replace(out, "|", " ", 1), "%d %d\n%s", &count, &most, &ok); err != nil || ok != "ok" || count != most || most < last {
						t.Fatalf("at the hub: got %q after %d rows", out, last)
					}
					last = most
				}
			}
			stays.Close()
			checkRows(env, path, 0, w.kill())
			sameAtHub(env, node, hub, mode+".db")
			if last < 10 {
				t.Errorf("only %d rows arrived: this tests nothing", last)
			}
		})
	}
}

// Programs write in two modes while hub and node are killed and the link is cut
// at random bytes: in the end the hub has exactly what the node has, and the
// node all that programs saw committed.
func TestHubChaos(t *testing.T) {
	r := random(t)
	env := testrig.New(t)
	addr := freeAddr(t)
	hub := env.NewHub(addr, testrig.Options{Mount: true})
	hub.Start()
	link := newCutter(t, addr, r.Uint64())
	node := env.Node(withHub(link.Addr().String()))
	used := []string{"delete", "wal"}
	next := []int{1, 1}
	ws := make([]*numberer, len(used))
	start := func() {
		for i, mode := range used {
			ws[i] = startNumberer(env, node.Path(mode+".db"), "PRAGMA synchronous=normal;", i, next[i], r.Uint64())
		}
	}
	for _, mode := range used {
		env.SQL(node.Path(mode+".db"), "PRAGMA journal_mode="+mode+";"+numbererSchema)
	}
	start()
	nodeKills := 0
	for end := time.Now().Add(30 * time.Second * time.Duration(*soak)); time.Now().Before(end); {
		time.Sleep(time.Duration(100+r.IntN(1500)) * time.Millisecond)
		switch r.IntN(5) {
		case 0:
			hub.Kill()
			time.Sleep(time.Duration(r.IntN(500)) * time.Millisecond)
			hub.Start()
		case 1:
			node.Kill()
			nodeKills++
			node.Start()
			for i, mode := range used {
				next[i] = checkRows(env, node.Path(mode+".db"), i, ws[i].kill()) + 1
			}
			start()
		case 2, 3:
			link.limit(1 + r.IntN(60000))
		default:
			link.limit(0)
		}
	}
	for i, mode := range used {
		if n := checkRows(env, node.Path(mode+".db"), i, ws[i].kill()); n < 50 {
			t.Errorf("%s: only %d rows were written: this tests nothing", mode, n)
		}
	}
	link.limit(0)
	for _, mode := range used {
		sameAtHub(env, node, hub, mode+".db")
	}
	t.Logf("%d connections cut, node killed %d times", link.cuts, nodeKills)
}

// A node without link writes on; what waits is compacted, and the hub has it all
// soon after the link is back.
func TestBacklog(t *testing.T) {
	env := testrig.New(t)
	addr := freeAddr(t)
	hub := env.NewHub(addr, testrig.Options{Mount: true})
	hub.Start()
	link := newCutter(t, addr, 1)
	node := env.Node(withHub(link.Addr().String()))
	for _, mode := range []string{"delete", "wal"} {
		path := node.Path(mode + ".db")
		env.SQL(path, "PRAGMA journal_mode="+mode+"; CREATE TABLE t(v,n);"+fill("t", 200, 100))
		sameAtHub(env, node, hub, mode+".db")
	}
	hub.Stop()
	for _, mode := range []string{"delete", "wal"} {
		path := node.Path(mode + ".db")
		env.SQL(path, "PRAGMA synchronous=OFF;"+strings.Repeat("UPDATE t SET n=n+1 WHERE rowid=7;\n", 1500))
		if acked, err := readPos(path + "-acked"); err != nil || acked.TXID >= env.Pos(path).TXID {
			t.Errorf("%s: got acked %v (%v) without a hub", mode, acked, err)
		}
	}
	out, err := testrig.Output(node.Client("wait", "--db", "wal.db", "--acked", "--timeout", "300ms"), "")
	if err == nil || err.Error() != "exit status 1" {
		t.Errorf("wait --acked without a hub: got %v, %s; want exit status 1", err, out)
	}
	node.Restart() // the backlog is there in the next life
	for _, db := range databases(t, node.Status()) {
		backlog := db["backlog"].(map[string]any)
		if backlog["records"].(float64) == 0 || backlog["bytes"].(float64) == 0 {
			t.Errorf("%v: got backlog %v while the hub is away", db["name"], backlog)
		}
	}
	hub.Start()
	for _, mode := range []string{"delete", "wal"} {
		sameAtHub(env, node, hub, mode+".db")
	}
	for _, db := range databases(t, node.Status()) {
		if backlog := db["backlog"].(map[string]any); backlog["records"].(float64) != 0 || db["lag_ms"].(float64) != 0 {
			t.Errorf("%v: got backlog %v, lag %v after the ack", db["name"], backlog, db["lag_ms"])
		}
	}
}

func databases(t testing.TB, status map[string]any) (list []map[string]any) {
	t.Helper()
	for _, db := range status["databases"].([]any) {
		list = append(list, db.(map[string]any))
	}
	if len(list) == 0 {
		t.Error("status names no database")
	}
	return list
}

// The fields of status --json, by type or pattern; "?" before a pattern allows
// null.
var (
	statusNode = map[string]string{
		"role": "^node$", "id": "^n1$", "site": "^[0-9a-f]{32}$", "version": ".", "healthy": "bool",
		"hub.url": "^http://", "hub.state": "^connected$", "hub.error": "?.", "hub.retry_at": "?^20", "hub.last_heard_ms": "number",
		"mount.dir": "/mnt$", "mount.state": "^mounted$",
		"card.bytes_written": "number", "card.fdatasyncs": "number", "card.transactions": "number", "memory.rss": "number",
	}
	statusDatabase = map[string]string{
		"name": "^a.db$", "owner": "^node$", "role": "^primary$", "writer": "^n1$", "history": "^[0-9a-f]{16}$", "epoch": "^0$",
		"pos": "^[0-9a-f]{16}/[0-9a-f]{16}$", "acked": "^[0-9a-f]{16}/[0-9a-f]{16}$", "archived": "^[0-9a-f]{16}/[0-9a-f]{16}$",
		"backlog.records": "number", "backlog.bytes": "number", "backlog.age_ms": "number",
		"lag_ms": "number", "size": "number", "page_size": "number", "journal_mode": "^wal$", "last_commit": "^20..-", "branches": "array",
	}
	statusHub = map[string]string{
		"role": "^hub$", "id": "^hub$", "site": "^[0-9a-f]{32}$", "version": ".", "healthy": "bool",
		"mount.dir": "/mnt$", "mount.state": "^mounted$", "databases": "array", "nodes": "array",
		"card.bytes_written": "number", "card.fdatasyncs": "number", "card.transactions": "number", "memory.rss": "number",
	}
	statusOfNode = map[string]string{"id": "^n1$", "state": "^connected$", "last_seen": "^20..-", "version": ".", "databases": "array"}
)

func checkFields(t testing.TB, what string, got map[string]any, want map[string]string) {
	t.Helper()
	for path, pattern := range want {
		var value any = got
		there := true
		for key := range strings.SplitSeq(path, ".") {
			m, _ := value.(map[string]any)
			value, there = m[key]
		}
		pattern, nullable := strings.CutPrefix(pattern, "?")
		ok := false
		switch v := value.(type) {
		case nil:
			ok = there && nullable
		case bool:
			ok = pattern == "bool"
		case float64:
			ok = pattern == "number"
		case []any:
			ok = pattern == "array"
		case string:
			ok = regexp.MustCompile(pattern).MatchString(v)
		}
		if !ok {
			t.Errorf("status of the %s: %s: got %v, want %s", what, path, value, pattern)
		}
	}
}

func TestStatus(t *testing.T) {
	env := testrig.New(t)
	addr := freeAddr(t)
	hub := env.NewHub(addr, testrig.Options{Mount: true})
	hub.Start()
	node := env.Node(withHub(addr))
	env.SQL(node.Path("a.db"), "PRAGMA journal_mode=wal; CREATE TABLE t(v);")
	sameAtHub(env, node, hub, "a.db")
	status := node.Status()
	checkFields(t, "node", status, statusNode)
	checkFields(t, "node's database", databases(t, status)[0], statusDatabase)
	atHub := hub.Status()
	checkFields(t, "hub", atHub, statusHub)
	if nodes := atHub["nodes"].([]any); len(nodes) != 1 {
		t.Errorf("nodes: got %v, want one", nodes)
	} else {
		n := nodes[0].(map[string]any)
		checkFields(t, "node at the hub", n, statusOfNode)
		pos := databases(t, n)[0]["pos"]
		if want := databases(t, status)[0]["pos"]; pos != want {
			t.Errorf("position at the hub: got %v, want %v", pos, want)
		}
	}
	if status["site"] != atHub["site"] {
		t.Errorf("site: got %v at the node, want the hub's %v", status["site"], atHub["site"])
	}
	if b, err := readFile(node.Path(".lag")); err != nil || !regexp.MustCompile(`^\+[0-9]{9}\n$`).MatchString(b) {
		t.Errorf(".lag with a hub: got %q (%v), want a sign and nine digits", b, err)
	}
	hub.Stop()
	if out, err := testrig.Output(node.Client("status"), ""); err != nil {
		t.Errorf("status with the hub out of reach: got %v, %s; want 0: that is healthy", err, out)
	}
	env.Wait(10*time.Second, "max-lag is exceeded", func() bool {
		_, err := testrig.Output(node.Client("status", "--check", "max-lag=1ms"), "")
		return err != nil && err.Error() == "exit status 1"
	})
}
