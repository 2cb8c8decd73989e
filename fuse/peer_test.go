package fuse_test

import (
	"fmt"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/fuse"
	"github.com/litefs-agent/litefs-agent/store"
)

func (fs *memFS) mustLookup(t testing.TB, path string) store.Node {
	t.Helper()
	n, err := fs.Lookup(path)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

func TestReserved(t *testing.T) {
	fs := newMemFS()
	_, dir := mountFS(t, fs, fuse.Options{})
	p := newProgram(t, dir, 0)
	p.want("open a x.db rw,create = ok")
	peer, db := *fs.peer.Load(), fs.mustLookup(t, "x.db")
	for _, tc := range []struct {
		lock string
		want bool
	}{
		{"lock a r 0x40000002 510 = ok", false}, // SHARED
		{"lock a w 0x40000001 1 = ok", true},    // RESERVED
		{"lock a u 0x40000001 1 = ok", false},
		{"lock a w 0x40000000 1 = ok", true}, // PENDING
		{"lock a u 0x40000000 1 = ok", false},
		{"lock a w 0x40000002 510 = ok", true}, // EXCLUSIVE
		{"lock a u 0 0 = ok", false},
	} {
		p.want(tc.lock)
		if got, err := peer.Reserved(db); err != nil || got != tc.want {
			t.Errorf("after %s: got %v %v, want %v", tc.lock, got, err, tc.want)
		}
	}
	if ok, err := peer.LockDatabase(db, 0x40000000, 512); !ok || err != nil {
		t.Errorf("lock: got %v %v", ok, err)
	}
	if got, err := peer.Reserved(db); err != nil || got {
		t.Errorf("under our own lock: got %v %v, want false", got, err)
	}
	p.want("lock a r 0x40000002 1 = EAGAIN")
	if err := peer.UnlockDatabase(db, 0x40000000, 512); err != nil {
		t.Error(err)
	}
	p.want("lock a r 0x40000002 1 = ok")
	if ok, err := peer.LockDatabase(db, 0x40000002, 510); ok || err != nil {
		t.Errorf("lock against a reader: got %v %v, want false", ok, err)
	}
}

// TestReservedInWrite asks for locks inside each WRITE, under a lock that other
// requests of the file need: the opening must not wait for them.
func TestReservedInWrite(t *testing.T) {
	fs := newMemFS()
	var mu sync.Mutex
	reserved := map[bool]int{}
	fs.onWrite = func(n *memNode, _ int64, _ []byte) error {
		if n.kind != store.KindDatabase && n.kind != store.KindOrdinary {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		held, err := (*fs.peer.Load()).Reserved(n)
		reserved[held]++
		return err
	}
	_, dir := mountFS(t, fs, fuse.Options{})
	var wg sync.WaitGroup
	for _, name := range []string{"a.db", "b.db", "sub.db", "plain"} {
		wg.Go(func() {
			for range 5 {
				out, err := try("create table if not exists t(x); insert into t values(1); insert into t values(2);", "sqlite3", filepath.Join(dir, name))
				if err != nil {
					t.Errorf("%s: %v %s", name, err, out)
				}
			}
		})
	}
	wg.Wait()
	mu.Lock()
	defer mu.Unlock()
	if reserved[false] > 0 || reserved[true] == 0 {
		t.Errorf("got %v, want every WRITE under a lock", reserved)
	}
}

// TestOwnDescriptors checks that the mount's own opening comes and goes with
// those of programs, and that deadlock-prone orders end.
func TestOwnDescriptors(t *testing.T) {
	fs := newMemFS()
	s, dir := mountFS(t, fs, fuse.Options{})
	for i := range 20 {
		p := newProgram(t, dir, 0)
		p.want("open a x.db rw,create = ok", "open s x.db-shm rw,create = ok", "open j x.db-journal rw,create = ok")
		if i%2 == 0 {
			p.want("unlink x.db-journal = ok", "unlink x.db-shm = ok", "unlink x.db = ok")
		}
		p.end()
	}
	eventually(t, "every OPEN has its RELEASE", func() bool {
		r := s.Requests()
		return r["OPEN"]+r["CREATE"] == r["RELEASE"]
	})
	if s.Requests()["FLUSH"] > 0 {
		t.Errorf("got FLUSH: %v", s.Requests())
	}
}

func TestShm(t *testing.T) {
	fs := newMemFS()
	_, dir := mountFS(t, fs, fuse.Options{})
	p := newProgram(t, dir, 0)
	p.want("open s x.db-shm rw,create = ok", "ftruncate s 32768 = ok", "map s 32768 = ok", "poke s 16 mapped = ok")
	peer, shm := *fs.peer.Load(), fs.mustLookup(t, "x.db-shm")
	b := make([]byte, 6)
	var last error
	eventually(t, "the wal-index can be read", func() bool {
		n, err := peer.ReadShm(shm, b, 16)
		if fmt.Sprint(err) != fmt.Sprint(last) {
			last = err
			t.Logf("reading the wal-index: %v", err)
		}
		return n == 6 && err == nil
	})
	if string(b) != "mapped" {
		t.Errorf("got %q, want what the program wrote into its mapping", b)
	}
	if n, err := peer.WriteShm(shm, []byte("back"), 100); n != 4 || err != nil {
		t.Errorf("got %d %v", n, err)
	}
	p.want("peek s 100 4 = ok \"back\"")
	if ok, err := peer.LockShm(shm, 120, 1); !ok || err != nil {
		t.Errorf("got %v %v", ok, err)
	}
	p.want("lock s w 120 1 = EAGAIN")
	if err := peer.UnlockShm(shm, 120, 1); err != nil {
		t.Error(err)
	}
	p.want("lock s w 120 1 = ok")
	if ok, err := peer.LockShm(shm, 120, 1); ok || err != nil {
		t.Errorf("got %v %v, want false", ok, err)
	}
	p.end()
	eventually(t, "nobody has it open", func() bool {
		n, err := peer.ReadShm(shm, b, 16)
		return n == 0 && err == nil
	})
}

// TestLockUnopened locks a database that nobody has open and that the kernel
// has never heard of; who opens it meanwhile finds it locked.
func TestLockUnopened(t *testing.T) {
	fs := newMemFS()
	if _, _, err := fs.Create("quiet.db", 0o644, true); err != nil {
		t.Fatal(err)
	}
	_, dir := mountFS(t, fs, fuse.Options{})
	peer, db := *fs.peer.Load(), fs.mustLookup(t, "quiet.db")
	if ok, err := peer.LockDatabase(db, 0x40000000, 512); !ok || err != nil {
		t.Fatalf("got %v %v", ok, err)
	}
	p := newProgram(t, dir, 0)
	p.want("open a quiet.db rw = ok", "lock a r 0x40000002 1 = EAGAIN", "close a = ok")
	p.want("open a quiet.db rw = ok", "lock a r 0x40000002 1 = EAGAIN")
	if err := peer.UnlockDatabase(db, 0x40000000, 512); err != nil {
		t.Fatal(err)
	}
	p.want("lock a r 0x40000002 1 = ok")
}

func TestInvalidate(t *testing.T) {
	fs := newMemFS()
	_, dir := mountFS(t, fs, fuse.Options{DatabaseAttrTTL: time.Hour})
	p := newProgram(t, dir, 0)
	p.want("mkdir d 0755 = ok", "open a d/x.db rw,create = ok", "fill a 0 12288 = ok", "write a 0 first = ok", "write a 5000 second = ok",
		"read a 5000 6 = ok \"second\"", "stat d/y = ENOENT", "list d = ok x.db")
	peer := *fs.peer.Load()
	node := fs.mustLookup(t, "d/x.db").(*memNode)
	node.mu.Lock()
	copy(node.data, "FIRST")
	copy(node.data[5000:], "SECOND")
	node.mu.Unlock()
	p.want("read a 0 5 = ok \"first\"")
	peer.InvalidateData(node, 4096, 4096)
	p.want("read a 0 5 = ok \"first\"", "read a 5000 6 = ok \"SECOND\"")
	peer.InvalidateData(node, 0, -1)
	p.want("read a 0 5 = ok \"FIRST\"", "stat d/x.db = ok 100644 12288 links=1")
	node.SetSize(nil, 4096)
	p.want("stat d/x.db = ok 100644 12288 links=1")
	peer.InvalidateData(node, -1, 0)
	p.want("stat d/x.db = ok 100644 4096 links=1")

	if _, _, err := fs.Create("d/y", 0o600, true); err != nil {
		t.Fatal(err)
	}
	p.want("stat d/y = ENOENT")
	peer.InvalidateEntry("d/y")
	p.want("stat d/y = ok 100600 0 links=1", "list d = ok x.db y")
	if err := fs.Unlink("d/y"); err != nil {
		t.Fatal(err)
	}
	peer.InvalidateEntry("d/y")
	p.want("stat d/y = ENOENT", "list d = ok x.db")
	peer.InvalidateEntry("none/at/all")
}

// TestSyncBlocksNobody holds several FSYNCs while others work, again and again:
// readers relieve each other, and those that are too many end.
func TestSyncBlocksNobody(t *testing.T) {
	fs := newMemFS()
	held := make(chan chan struct{}, 3)
	fs.onSync = func(n *memNode) error {
		if n.kind == store.KindDatabase {
			free := make(chan struct{})
			held <- free
			<-free
		}
		return nil
	}
	_, dir := mountFS(t, fs, fuse.Options{})
	slow := []*program{newProgram(t, dir, 0), newProgram(t, dir, 0), newProgram(t, dir, 0)}
	p := newProgram(t, dir, 0)
	p.want("open b y rw,create = ok")
	for i, one := range slow {
		one.want(fmt.Sprintf("open a x%d.db rw,create = ok", i), "write a 0 x = ok")
	}
	goroutines := 0
	for round := range 20 {
		var free []chan struct{}
		for _, one := range slow {
			one.start("fsync a")
			free = append(free, <-held)
			p.want("write b 0 y = ok", "fsync b = ok", "open a x0.db ro = ok", "read a 0 1 = ok \"x\"", "close a = ok")
		}
		for i := range slow {
			i = (i + round) % len(slow) // the first in may be the first out, or not
			close(free[i])
			if got := slow[i].result(); got != "ok" {
				t.Errorf("got %s, want ok", got)
			}
			p.want("write b 0 y = ok")
		}
		if n := runtime.NumGoroutine(); round == 1 {
			goroutines = n
		} else if n > goroutines+2 && round > 1 {
			t.Fatalf("%d goroutines after round %d, %d after the first", n, round, goroutines)
		}
	}
}

// TestQuiet wants to be told of the quiet after an FSYNC, and is told once.
func TestQuiet(t *testing.T) {
	fs := newMemFS()
	fs.onSync = func(*memNode) error {
		fs.wantsQuiet.Store(true)
		return nil
	}
	_, dir := mountFS(t, fs, fuse.Options{})
	p := newProgram(t, dir, 0)
	p.want("open a x.db-wal rw,create = ok", "write a 0 x = ok")
	if n := fs.quietN.Load(); n != 0 {
		t.Errorf("told %d times before it was wanted", n)
	}
	for round := range int32(3) {
		p.want("fsync a = ok")
		eventually(t, "the word of the quiet", func() bool { return fs.quietN.Load() > round })
		p.want("write a 0 x = ok")
		if n := fs.quietN.Load(); n != round+1 {
			t.Errorf("told %d times, want %d", n, round+1)
		}
	}
}
