package hub_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path"
	"sync"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/agent"
	"github.com/litefs-agent/litefs-agent/hub"
	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
	"github.com/litefs-agent/litefs-agent/store"
	"github.com/litefs-agent/litefs-agent/transport"
	httptransport "github.com/litefs-agent/litefs-agent/transport/http"
)

// This file runs a node's and a hub's engine in one process, joined by the real
// link over loopback, on disks that can be cut. A stand-in for SQLite writes at
// the node.

const patience = 30 * time.Second

// A rig is a node, a hub, and a relay between them.
type rig struct {
	tb     testing.TB
	rng    *rand.Rand
	log    *slog.Logger
	site   transport.Site
	relay  *relay
	direct bool                   // the node dials the hub without the relay
	tap    chan<- *transport.Push // if not nil: gets what the node sends

	auth      *hub.Auth // nil: everybody is who it says it is
	token     string    // of the node
	ingestOpt hub.IngestOptions

	nodeFS, hubFS disk.FS
	nodeOpt       store.Options
	linkOpt       agent.LinkOptions
	hubOpt        store.Options

	world    *pager.World
	node     *store.Store
	link     *agent.Link
	stopLink func()

	acked map[string]store.Info // what the node knew to be at the hub when that lost its power

	hub     *store.Store
	ingest  *hub.Ingest
	stopHub func()
}

func newRig(tb testing.TB, seed uint64) *rig {
	r := &rig{
		tb: tb, rng: rand.New(rand.NewPCG(seed, 7)), log: slog.New(slog.DiscardHandler),
		site: transport.Site{1, 2, 3}, relay: newRelay(tb),
	}
	if testing.Verbose() {
		r.log = slog.New(slog.NewTextHandler(testWriter{tb}, nil))
	}
	r.nodeFS = simdisk.New(simdisk.Options{Seed: seed, BlockSize: 4096})
	r.hubFS = simdisk.New(simdisk.Options{Seed: seed + 1, BlockSize: 4096})
	r.nodeOpt = store.Options{Node: "n1", Shipping: true, SegmentSize: 64 << 10, Large: 16 << 10, Flush: 20 * time.Millisecond}
	r.hubOpt = store.Options{
		Node: "hub", SegmentSize: 64 << 10, Large: 16 << 10, Flush: 20 * time.Millisecond,
		Writable: func(string) bool { return false },
	}
	r.linkOpt = agent.LinkOptions{ID: "n1", Hardware: 1, CompactFrom: 8, MinBackoff: time.Millisecond, MaxBackoff: 20 * time.Millisecond}
	r.world = pager.New(nil, r.rng)
	tb.Cleanup(r.stop)
	return r
}

// stop ends everything. It may be called twice.
func (r *rig) stop() {
	r.closeLink()
	r.closeHub(false)
	if r.node != nil {
		r.world.Kill()
		_ = r.node.Close()
	}
	r.relay.close()
}

type testWriter struct{ tb testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.tb.Logf("%s", bytes.TrimSpace(p))
	return len(p), nil
}

func (r *rig) startHub() {
	r.tb.Helper()
	opt := r.hubOpt
	opt.FS, opt.Logger = r.hubFS, r.log.With("at", "hub")
	st, err := store.Open(opt)
	if err != nil {
		r.tb.Fatalf("open the hub: %v", err)
	}
	for name, info := range r.acked {
		there := st.DB("nodes/n1/" + name)
		if !info.Acked.IsZero() && (there == nil || there.Place().History == info.History && there.Place().Pos.TXID < info.Acked.TXID) {
			r.tb.Errorf("invariant 5: %s was acknowledged at %s, and the hub has lost that", name, info.Acked)
		}
	}
	r.acked = nil
	iopt := r.ingestOpt
	iopt.ID, iopt.Site, iopt.Store, iopt.FS, iopt.Auth, iopt.Log = "hub", r.site, st, r.hubFS, r.auth, r.log.With("at", "hub")
	ingest, err := hub.NewIngest(iopt)
	if err != nil {
		r.tb.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		r.tb.Fatal(err)
	}
	srv := httptransport.NewServer(ingest, httptransport.ServerOptions{Config: linkConfig})
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = srv.Serve(ln) // ends at Close
	}()
	r.hub, r.ingest = st, ingest
	r.stopHub = func() {
		srv.Close()
		<-served
	}
	r.relay.aim(ln.Addr().String())
}

// linkConfig notices a cut link soon.
var linkConfig = transport.Config{DeadAfter: 2 * time.Second, HelloTimeout: 2 * time.Second, CloseGrace: 10 * time.Millisecond}

// closeHub stops the hub; with cut its disk loses what was not synced.
func (r *rig) closeHub(cut bool) {
	if r.hub == nil {
		return
	}
	r.relay.aim("")
	if cut {
		r.acked = map[string]store.Info{}
		if r.node != nil {
			for _, db := range r.node.DBs() {
				r.acked[db.Name()] = db.Info()
			}
		}
		r.hubFS = r.hubFS.(*simdisk.Disk).Cut(r.rng) // first: everything after fails
	}
	r.stopHub()
	if err := r.hub.Close(); err != nil && !cut {
		r.tb.Errorf("close the hub: %v", err)
	}
	r.hub = nil
}

func (r *rig) startNode() {
	r.tb.Helper()
	opt := r.nodeOpt
	opt.FS, opt.Logger = r.nodeFS, r.log.With("at", "node")
	st, err := store.Open(opt)
	if err != nil {
		r.tb.Fatalf("open the node: %v", err)
	}
	r.node = st
	r.world.FS = nodeFS{st}
	st.Attach(peer{w: r.world})
	r.startLink()
}

func (r *rig) startLink() {
	r.tb.Helper()
	r.newLink()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.link.Run(ctx)
	}()
	r.stopLink = func() {
		cancel()
		<-done
	}
}

func (r *rig) newLink() {
	r.tb.Helper()
	addr := r.relay.addr
	if r.direct {
		addr = r.relay.aimed()
	}
	d, err := httptransport.NewDialer("http://"+addr, httptransport.DialOptions{
		Config: linkConfig, Mode: httptransport.ModeStream, Credentials: bearer(r.token),
	})
	if err != nil {
		r.tb.Fatal(err)
	}
	var dialer transport.Dialer = d
	if r.tap != nil {
		dialer = tapped{d, r.tap}
	}
	opt := r.linkOpt
	opt.FS, opt.Log = r.nodeFS, r.log.With("at", "node")
	opt.Endpoints = []agent.Endpoint{{URL: "http://" + addr, Dialer: dialer}}
	if r.link, err = agent.NewLink(opt); err != nil {
		r.tb.Fatal(err)
	}
	r.link.Attach(r.node)
}

func bearer(token string) func() (httptransport.Credentials, error) {
	return func() (httptransport.Credentials, error) { return httptransport.Credentials{Token: token}, nil }
}

func (r *rig) closeLink() {
	if r.stopLink != nil {
		r.stopLink()
		r.stopLink = nil
	}
}

// restartNode ends the node, cleanly or by a power cut, and starts it again.
func (r *rig) restartNode(cut bool) {
	r.tb.Helper()
	if cut {
		r.nodeFS = r.nodeFS.(*simdisk.Disk).Cut(r.rng)
	}
	r.closeLink()
	r.world.Kill()
	if err := r.node.Close(); err != nil && !cut {
		r.tb.Fatalf("close the node: %v", err)
	}
	r.startNode()
	for _, name := range r.world.Names() {
		db := r.world.DBs[name]
		db.Forget(db.Head())
	}
}

// commit makes a random transaction in a database.
func (r *rig) commit(name string, pages int) {
	r.tb.Helper()
	db := r.world.DB(name)
	db.Sync = pager.Full
	ch := db.RandomChange(pages)
	ch.Rollback = false
	if err := db.Commit(ch); err != nil {
		r.tb.Fatalf("commit in %s: %v", name, err)
	}
}

// settle waits until the hub has acknowledged everything, and compares.
func (r *rig) settle() {
	r.tb.Helper()
	r.acknowledged()
	r.compare()
}

// acknowledged waits until the hub has acknowledged everything.
func (r *rig) acknowledged() {
	r.tb.Helper()
	deadline := time.Now().Add(patience)
	for {
		waiting := ""
		for _, db := range r.node.DBs() {
			if pos := db.Pos(); db.Acked() != pos {
				waiting = fmt.Sprintf("%s is at %s, acked %s", db.Name(), pos, db.Acked())
			}
		}
		if waiting == "" {
			break
		}
		if time.Now().After(deadline) {
			status := r.link.Status()
			r.tb.Fatalf("not acknowledged in %s: %s; link %s, error %v", patience, waiting, status.State, deref(status.Error))
		}
		time.Sleep(time.Millisecond) // polls a condition of two processes
	}
}

func deref(s *string) string {
	if s == nil {
		return "none"
	}
	return *s
}

// compare checks that what was acknowledged at the node is at the hub, byte for
// byte, and that both verify.
func (r *rig) compare() {
	r.tb.Helper()
	for _, db := range r.node.DBs() {
		there := r.hub.DB("nodes/n1/" + db.Name())
		if there == nil {
			r.tb.Fatalf("%s is not at the hub", db.Name())
		}
		if got, want := there.Pos(), db.Pos(); got != want {
			r.tb.Fatalf("%s: the hub is at %s, the node at %s", db.Name(), got, want)
		}
		if got, want := there.Info().History, db.Info().History; got != want {
			r.tb.Fatalf("%s: the hub has history %016x, the node %016x", db.Name(), got, want)
		}
		for _, x := range []*store.DB{db, there} {
			if _, _, err := x.Verify(); err != nil {
				r.tb.Fatalf("verify: %v", err)
			}
		}
		if !db.Exists() {
			if there.Exists() {
				r.tb.Fatalf("%s was dropped, and is at the hub", db.Name())
			}
			continue
		}
		got, want := export(r.tb, there), export(r.tb, db)
		if !bytes.Equal(got, want) {
			r.tb.Fatalf("%s: %d bytes at the hub are not the %d at the node", db.Name(), len(got), len(want))
		}
		if head := r.world.DB(db.Name()).Head(); head.Pages != nil && !bytes.Equal(want, head.Bytes()) {
			r.tb.Fatalf("%s: the node has not what was committed", db.Name())
		}
	}
}

func export(tb testing.TB, db *store.DB) []byte {
	tb.Helper()
	img, err := db.Snapshot()
	if err != nil {
		tb.Fatalf("export %s: %v", db.Name(), err)
	}
	defer img.Close()
	var b bytes.Buffer
	if _, err := img.WriteTo(&b); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

// nodeFS shows a Store to the stand-in for SQLite.
type nodeFS struct{ st *store.Store }

type nodeFile struct {
	st *store.Store
	n  store.Node
	h  store.Handle
}

func (f nodeFile) ReadAt(p []byte, off int64) (int, error) { return f.h.ReadAt(p, off) }
func (f nodeFile) WriteAt(p []byte, off int64) (int, error) {
	f.st.AwaitLog()
	return f.h.WriteAt(p, off)
}
func (f nodeFile) Truncate(size int64) error { return f.n.SetSize(f.h, size) }
func (f nodeFile) Sync() error               { return f.h.Sync() }
func (f nodeFile) Size() int64               { return f.n.Attr().Size }
func (f nodeFile) Close() {
	if h, ok := f.h.(store.Flusher); ok {
		h.Flush()
	}
	f.h.Release()
}

func notExist(err error) error {
	if errors.Is(err, store.ErrNotExist) {
		return fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	return err
}

func (t nodeFS) Open(name string, create bool) (pager.File, error) {
	if create {
		n, h, err := t.st.Create(name, 0o644, false)
		return nodeFile{t.st, n, h}, notExist(err)
	}
	n, err := t.st.Lookup(name)
	if err != nil {
		return nil, notExist(err)
	}
	h, err := n.Open(true)
	return nodeFile{t.st, n, h}, err
}

func (t nodeFS) Exists(name string) bool {
	_, err := t.st.Lookup(name)
	return err == nil
}

func (t nodeFS) IsDatabase(name string) bool {
	n, err := t.st.Lookup(name)
	return err == nil && n.Kind() == store.KindDatabase
}

func (t nodeFS) Remove(name string) error { return notExist(t.st.Unlink(name)) }
func (t nodeFS) Rename(oldName, newName string) error {
	return notExist(t.st.Rename(oldName, newName, false))
}

// peer answers for the kernel from the locks of the stand-in, which is in a
// rollback mode.
type peer struct {
	store.Peer
	w *pager.World
}

func (p peer) Reserved(n store.Node) (bool, error) {
	return p.w.Reserved(n.(interface{ Path() string }).Path()), nil
}
func (p peer) ReadShm(store.Node, []byte, int64) (int, error)      { return 0, nil }
func (p peer) LockDatabase(store.Node, int64, int64) (bool, error) { return true, nil }
func (p peer) UnlockDatabase(store.Node, int64, int64) error       { return nil }
func (p peer) InvalidateData(store.Node, int64, int64)             {}
func (p peer) InvalidateEntry(string)                              {}

// A relay is the network: it can be cut now, or after a number of bytes.
type relay struct {
	tb   testing.TB
	addr string
	ln   net.Listener
	wg   sync.WaitGroup

	mu     sync.Mutex
	target string
	left   int64 // bytes until the connection is cut; below 0: never
	up     bool  // which direction counts
	conns  map[net.Conn]struct{}
	bytes  int64
}

func newRelay(tb testing.TB) *relay {
	tb.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	r := &relay{tb: tb, addr: ln.Addr().String(), ln: ln, left: -1, conns: make(map[net.Conn]struct{})}
	r.wg.Go(func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			r.mu.Lock()
			target := r.target
			r.mu.Unlock()
			out, err := net.Dial("tcp", target)
			if target == "" || err != nil {
				in.Close()
				continue
			}
			r.mu.Lock()
			r.conns[in], r.conns[out] = struct{}{}, struct{}{}
			r.mu.Unlock()
			r.wg.Go(func() { r.pump(in, out, true) })
			r.wg.Go(func() { r.pump(out, in, false) })
		}
	})
	return r
}

func (r *relay) pump(from, to net.Conn, up bool) {
	defer r.drop(from, to)
	buf := make([]byte, 8192)
	for {
		n, err := from.Read(buf)
		r.mu.Lock()
		r.bytes += int64(n)
		cut := false
		if r.left >= 0 && r.up == up {
			if r.left -= int64(n); r.left < 0 {
				n += int(r.left)
				cut, r.left = true, -1
			}
		}
		r.mu.Unlock()
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil || cut {
			return
		}
	}
}

func (r *relay) drop(conns ...net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range conns {
		c.Close()
		delete(r.conns, c)
	}
}

// aim sends new connections to target, and cuts the old ones.
func (r *relay) aim(target string) {
	r.mu.Lock()
	r.target = target
	r.mu.Unlock()
	r.cut()
}

func (r *relay) aimed() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.target
}

func (r *relay) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.conns {
		c.Close()
	}
}

// cutAfter cuts the link after n more bytes in one direction.
func (r *relay) cutAfter(n int64, up bool) {
	r.mu.Lock()
	r.left, r.up = n, up
	r.mu.Unlock()
}

func (r *relay) close() {
	r.ln.Close()
	r.cut()
	r.wg.Wait()
}

// clone copies a disk: an image of a card, a backup of a hub.
func clone(tb testing.TB, from disk.FS) disk.FS {
	tb.Helper()
	to := simdisk.New(simdisk.Options{Seed: 5, BlockSize: from.BlockSize()})
	var walk func(dir string)
	walk = func(dir string) {
		list, err := from.ReadDir(dir)
		if err != nil {
			tb.Fatal(err)
		}
		for _, e := range list {
			name := path.Join(dir, e.Name())
			if e.IsDir() {
				if err := to.Mkdir(name, 0o700); err != nil {
					tb.Fatal(err)
				}
				walk(name)
				continue
			}
			b, err := disk.ReadFile(from, name, 1<<30)
			if err != nil {
				tb.Fatal(err)
			}
			f, err := to.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
			if err == nil {
				_, err = f.WriteAt(b, 0)
			}
			if err != nil {
				tb.Fatal(err)
			}
			f.Close()
		}
	}
	walk(".")
	if err := to.SyncFS(); err != nil {
		tb.Fatal(err)
	}
	return to
}
