package hub_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"path"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/simdisk"
	"github.com/litefs-agent/litefs-agent/ltx"
	"github.com/litefs-agent/litefs-agent/store"
)

// cutNode ends the node by a power cut and leaves its disk to the test.
func (r *rig) cutNode() {
	r.tb.Helper()
	r.nodeFS = r.nodeFS.(*simdisk.Disk).Cut(r.rng)
	r.closeLink()
	r.world.Kill()
	_ = r.node.Close() // its disk has gone
}

// spoil flips a byte in the log's record of one transaction.
func spoil(t *testing.T, fs disk.FS, txid ltx.TXID) {
	t.Helper()
	list, err := fs.ReadDir("log")
	if err != nil {
		t.Fatal(err)
	}
	for _, fi := range list {
		name := path.Join("log", fi.Name())
		b, err := disk.ReadFile(fs, name, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		for off := 0; ; off++ {
			i := bytes.Index(b[off:], []byte("LTX1"))
			if i < 0 {
				break
			}
			off += i
			var h ltx.Header
			if len(b)-off < ltx.HeaderSize || h.UnmarshalBinary(b[off:off+ltx.HeaderSize]) != nil || h.MinTXID != txid {
				continue
			}
			f, err := fs.OpenFile(name, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			at := int64(off + ltx.HeaderSize + 20)
			var x [1]byte
			if _, err := f.ReadAt(x[:], at); err != nil {
				t.Fatal(err)
			}
			x[0] ^= 0x40
			if _, err := f.WriteAt(x[:], at); err != nil {
				t.Fatal(err)
			}
			if err := f.Datasync(); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("transaction %d is not in the log", txid)
}

// damagedRig is a node with 20 transactions, the first acked of which the hub
// has confirmed, after a power cut.
func damagedRig(t *testing.T, seed uint64, acked int) *rig {
	r := newRig(t, seed)
	r.nodeOpt.SegmentSize = 1 << 20
	r.startHub()
	r.startNode()
	addr := r.relay.aimed()
	for i := range 20 {
		if i == acked {
			r.settle()
			r.relay.aim("")
		}
		r.commit("a.db", 3)
		r.commit("b.db", 3)
	}
	if acked == 20 {
		r.settle()
	}
	r.cutNode()
	r.relay.aim(addr)
	return r
}

// What the log lost in its middle is fetched from the hub, and what it still holds
// beyond that is put on top: nothing is lost.
func TestDamagedLogIsMended(t *testing.T) {
	for _, acked := range []int{20, 12} {
		for _, lost := range []ltx.TXID{3, 10, 12} {
			r := damagedRig(t, 100+uint64(lost), acked)
			spoil(t, r.nodeFS, lost)
			r.startNode()
			r.settle()
			for range 2 {
				for _, name := range []string{"a.db", "b.db"} {
					db := r.node.DB(name)
					if err := db.Damaged(); err != nil {
						t.Errorf("%s is still damaged: %v", name, err)
					}
					if n := len(r.hub.DB("nodes/n1/" + name).Branches()); n != 0 {
						t.Errorf("%s: the hub keeps %d branches, want none", name, n)
					}
					head := r.world.DB(name).Head()
					if got := export(t, db); !bytes.Equal(got, head.Bytes()) {
						t.Fatalf("%s: acked %d, lost %d: not what was committed", name, acked, lost)
					}
					r.world.DB(name).Forget(head)
				}
				r.commit("a.db", 3)
				r.commit("b.db", 3)
				r.settle()
				r.restartNode(true)
			}
			r.stop()
		}
	}
}

// A flipped bit in a database file that recovery relies on is found at the start
// and mended from the hub.
func TestDamagedFileIsMended(t *testing.T) {
	r := damagedRig(t, 120, 20)
	r.startNode()
	r.settle()
	r.closeLink()
	r.world.Kill()
	if err := r.node.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := r.nodeFS.OpenFile("dbs/a.db/sums", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	var x [8]byte
	if _, err := f.ReadAt(x[:], 8); err != nil {
		t.Fatal(err)
	}
	binary.BigEndian.PutUint64(x[:], binary.BigEndian.Uint64(x[:])^1<<20)
	if _, err := f.WriteAt(x[:], 8); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	r.startNode()
	deadline := time.Now().Add(patience)
	for r.node.DB("a.db").Damaged() != nil {
		if time.Now().After(deadline) {
			t.Fatal(r.node.DB("a.db").Damaged())
		}
		time.Sleep(time.Millisecond) // polls a condition of two processes
	}
	r.world.DB("a.db").Forget(r.world.DB("a.db").Head())
	r.commit("a.db", 3)
	r.settle()
}

// Where the hub lacks what was lost too, the database stays fenced at its last
// state before the gap, the hub's copy is kept from that, and other databases go
// on.
func TestDamageThatNobodyCanMend(t *testing.T) {
	r := damagedRig(t, 130, 5)
	spoil(t, r.nodeFS, 9) // of a.db: it comes first
	r.startNode()
	db := r.node.DB("a.db")
	if err := db.Damaged(); err == nil {
		t.Fatal("the damage is not noticed")
	}
	if got := db.Place().Pos.TXID; got != 8 {
		t.Errorf("a.db is at %d, want 8", got)
	}
	b := r.node.DB("b.db")
	r.world.DB("b.db").Forget(r.world.DB("b.db").Head())
	r.commit("b.db", 3)
	deadline := time.Now().Add(patience)
	for b.Acked() != b.Pos() {
		if time.Now().After(deadline) {
			t.Fatalf("b.db: acked %s, at %s", b.Acked(), b.Pos())
		}
		time.Sleep(time.Millisecond) // polls a condition of two processes
	}
	if got := r.hub.DB("nodes/n1/a.db").Place().Pos.TXID; got != 5 {
		t.Errorf("the hub has a.db at %d, want 5", got)
	}
	info := db.Info()
	if info.Fenced == nil {
		t.Error("a.db is not fenced")
	}
	if _, err := r.node.Apply(store.Incoming{Name: "a.db"}); err == nil {
		t.Error("a fenced database takes records")
	}
}
