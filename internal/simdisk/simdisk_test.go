package simdisk_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"syscall"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/simdisk"
)

const rwc = os.O_RDWR | os.O_CREATE

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, d *simdisk.Disk, name string, flag int) disk.File {
	t.Helper()
	f, err := d.OpenFile(name, flag, 0o600)
	must(t, err)
	return f
}

func write(t testing.TB, f disk.File, p []byte, off int64) {
	t.Helper()
	n, err := f.WriteAt(p, off)
	if n != len(p) {
		t.Fatalf("WriteAt = %d, %v", n, err)
	}
	must(t, err)
}

func content(t testing.TB, d *simdisk.Disk, name string) []byte {
	t.Helper()
	p, err := disk.ReadFile(d, name, 1<<30)
	must(t, err)
	return p
}

func fill(c byte, n int) []byte { return bytes.Repeat([]byte{c}, n) }

// create makes a file that is durable with the given content.
func create(t testing.TB, d *simdisk.Disk, name string, p []byte) disk.File {
	t.Helper()
	f := open(t, d, name, rwc)
	write(t, f, p, 0)
	must(t, f.Datasync())
	must(t, d.SyncDir("."))
	return f
}

func TestCutKeepsAnyVersionOfASector(t *testing.T) {
	seen := map[byte]int{}
	mixed := 0
	for seed := range uint64(200) {
		d := simdisk.New(simdisk.Options{Seed: seed})
		f := create(t, d, "a", fill('0', 1024))
		write(t, f, fill('1', 1024), 0)
		write(t, f, fill('2', 700), 0)
		after := d.Cut(nil)
		p := content(t, after, "a")
		for s := range 2 {
			sector := p[s*512 : s*512+512]
			want := []byte{sector[0]}
			if s == 1 && sector[0] == '2' { // the second write covers 188 bytes of it
				if !bytes.Equal(sector, append(fill('2', 188), fill('1', 324)...)) {
					t.Fatalf("torn sector: %q", sector)
				}
			} else if !bytes.Equal(sector, bytes.Repeat(want, 512)) {
				t.Fatalf("torn sector: %q", sector)
			}
			seen[sector[0]]++
		}
		if p[0] != p[512] {
			mixed++
		}
		if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, simdisk.ErrStopped) {
			t.Fatalf("write after the cut = %v, want ErrStopped", err)
		}
	}
	if seen['0'] == 0 || seen['1'] == 0 || seen['2'] == 0 || mixed == 0 {
		t.Fatalf("versions seen %v, mixed %d: want all", seen, mixed)
	}
}

func TestDatasyncKeepsDataButNotTheName(t *testing.T) {
	gone := 0
	for seed := range uint64(50) {
		d := simdisk.New(simdisk.Options{Seed: seed})
		f := open(t, d, "a", rwc)
		write(t, f, fill('1', 1000), 0)
		must(t, f.Datasync())
		if d.WasDurable("a", 0, 1000) {
			t.Fatal("durable without its name")
		}
		after := d.Cut(nil)
		if _, err := after.Stat("a"); errors.Is(err, fs.ErrNotExist) {
			gone++
		} else if p := content(t, after, "a"); !bytes.Equal(p, fill('1', 1000)) {
			t.Fatalf("content = %q", p)
		}
	}
	if gone == 0 || gone == 50 {
		t.Fatalf("name lost %d times of 50, want some", gone)
	}
	d := simdisk.New(simdisk.Options{})
	create(t, d, "a", fill('1', 1000))
	if !d.WasDurable("a", 0, 1000) || d.WasDurable("a", 0, 1001) || !bytes.Equal(d.DurableBytes("a"), fill('1', 1000)) {
		t.Fatal("not durable after Datasync and SyncDir")
	}
	after := d.Cut(nil)
	if p := content(t, after, "a"); !bytes.Equal(p, fill('1', 1000)) {
		t.Fatalf("content = %q", p)
	}
}

func TestMetadataSurvivesAsAPrefix(t *testing.T) {
	seen := map[string]int{}
	for seed := range uint64(200) {
		d := simdisk.New(simdisk.Options{Seed: seed})
		create(t, d, "a", fill('1', 10))
		must(t, d.Rename("a", "b"))
		must(t, d.Mkdir("dir", 0o700))
		must(t, d.Rename("b", "dir/c"))
		must(t, d.Remove("dir/c"))
		after := d.Cut(nil)
		state := ""
		for _, dir := range []string{".", "dir"} {
			list, err := after.ReadDir(dir)
			if err != nil {
				continue
			}
			for _, e := range list {
				state += e.Name() + " "
			}
		}
		seen[state]++
	}
	for _, want := range []string{"a ", "b ", "b dir ", "dir c ", "dir "} {
		if seen[want] == 0 {
			t.Errorf("never found %q", want)
		}
		delete(seen, want)
	}
	if len(seen) != 0 {
		t.Errorf("not a prefix: %v", seen)
	}
}

func TestTruncate(t *testing.T) {
	lengths := map[int]int{}
	for seed := range uint64(100) {
		d := simdisk.New(simdisk.Options{Seed: seed})
		f := create(t, d, "a", fill('1', 2000))
		must(t, f.Truncate(600))
		write(t, f, fill('2', 100), 1500)
		if p := content(t, d, "a"); len(p) != 1600 || !bytes.Equal(p[600:1500], make([]byte, 900)) {
			t.Fatalf("after truncate and write: %d bytes", len(p))
		}
		synced := seed%2 == 0
		if synced {
			must(t, f.Datasync())
		}
		p := content(t, d.Cut(nil), "a")
		if synced && (len(p) != 1600 || !bytes.Equal(p[600:1500], make([]byte, 900))) {
			t.Fatalf("synced truncate did not survive: %d bytes", len(p))
		}
		if !synced {
			lengths[len(p)]++
		}
	}
	for _, n := range []int{2000, 600, 1600} {
		if lengths[n] == 0 {
			t.Errorf("size %d never survived: %v", n, lengths)
		}
	}
}

func TestKillKeepsWhatWasWritten(t *testing.T) {
	d := simdisk.New(simdisk.Options{Seed: 1})
	f := create(t, d, "a", fill('1', 1000))
	write(t, f, fill('2', 1000), 0)
	temp, err := d.CreateTemp(".")
	must(t, err)
	write(t, temp, fill('3', 5000), 0)
	killed := d.Kill()
	if p := content(t, killed, "a"); !bytes.Equal(p, fill('2', 1000)) {
		t.Fatalf("content = %q", p)
	}
	if _, err := f.ReadAt(make([]byte, 1), 0); !errors.Is(err, simdisk.ErrStopped) {
		t.Fatalf("read through an old file = %v, want ErrStopped", err)
	}
	// It is still not durable.
	if killed.WasDurable("a", 0, 512) {
		t.Fatal("kill made it durable")
	}
	seen := map[byte]bool{}
	for seed := range uint64(20) {
		d := simdisk.New(simdisk.Options{Seed: seed})
		f := create(t, d, "a", fill('1', 512))
		write(t, f, fill('2', 512), 0)
		seen[content(t, d.Kill().Cut(nil), "a")[0]] = true
	}
	if !seen['1'] || !seen['2'] {
		t.Fatalf("a cut after the kill left %v, want both versions", seen)
	}
}

func TestFailedDatasyncForgetsLikeLinux(t *testing.T) {
	lost := 0
	for seed := range uint64(40) {
		d := simdisk.New(simdisk.Options{Seed: seed})
		f := create(t, d, "a", fill('1', 4096))
		write(t, f, fill('2', 4096), 0)
		fail := true
		d.SetHook(func(op simdisk.Op) error {
			if op.Kind == simdisk.OpDatasync && fail {
				fail = false
				return syscall.EIO
			}
			return nil
		})
		if err := f.Datasync(); !errors.Is(err, syscall.EIO) {
			t.Fatalf("Datasync = %v, want EIO", err)
		}
		must(t, f.Datasync())
		if p := content(t, d, "a"); !bytes.Equal(p, fill('2', 4096)) {
			t.Fatal("the cache forgot")
		}
		if d.WasDurable("a", 0, 512) {
			t.Fatal("durable after a failed sync")
		}
		direct := open(t, d, "a", os.O_RDWR|disk.Direct)
		onMedium := disk.AlignedBuffer(4096, 4096)
		_, err := direct.ReadAt(onMedium, 0)
		must(t, err)
		p := content(t, d.Cut(nil), "a")
		if !bytes.Equal(p, onMedium) {
			t.Fatal("a direct read and the disk after the cut differ")
		}
		if !bytes.Equal(p, fill('2', 4096)) {
			lost++
		}
	}
	if lost == 0 {
		t.Fatal("nothing was ever lost")
	}
}

func TestStopAt(t *testing.T) {
	torn := 0
	for seed := range uint64(40) {
		d := simdisk.New(simdisk.Options{Seed: seed})
		f := create(t, d, "a", fill('1', 4096))
		d.StopAt(d.Ordinal() + 2)
		write(t, f, fill('2', 512), 0)
		if n, err := f.WriteAt(fill('3', 4096), 0); n != 0 || !errors.Is(err, simdisk.ErrStopped) {
			t.Fatalf("write = %d, %v, want ErrStopped", n, err)
		}
		if err := f.Datasync(); !errors.Is(err, simdisk.ErrStopped) {
			t.Fatalf("Datasync = %v, want ErrStopped", err)
		}
		p := content(t, d.Kill(), "a")
		n := bytes.LastIndexByte(p, '3') + 1
		if n%512 != 0 {
			t.Fatalf("torn within a sector, at %d", n)
		}
		if n > 0 && n < 4096 {
			torn++
		}
	}
	if torn == 0 {
		t.Fatal("never torn")
	}
}

func TestCapacity(t *testing.T) {
	d := simdisk.New(simdisk.Options{Capacity: 16 << 10})
	f := open(t, d, "a", rwc)
	must(t, f.Allocate(0, 8<<10))
	if err := f.Allocate(0, 20<<10); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("Allocate = %v, want ENOSPC", err)
	}
	g := open(t, d, "b", rwc)
	write(t, g, fill('1', 8<<10), 0)
	if _, err := g.WriteAt(fill('1', 1), 8<<10); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("write = %v, want ENOSPC", err)
	}
	write(t, f, fill('1', 8<<10), 0) // into the reservation
	if free, err := d.Free(); free != 0 || err != nil {
		t.Fatalf("Free = %d, %v, want 0", free, err)
	}
	must(t, d.Remove("b"))
	if free, _ := d.Free(); free != 0 {
		t.Fatalf("Free = %d while b is open, want 0", free)
	}
	must(t, g.Close())
	if free, _ := d.Free(); free != 8<<10 {
		t.Fatalf("Free = %d, want 8192", free)
	}
}

func TestDirect(t *testing.T) {
	d := simdisk.New(simdisk.Options{})
	f := open(t, d, "a", rwc|disk.Direct)
	buf := disk.AlignedBuffer(1024, 512)
	write(t, f, buf, 512)
	for name, bad := range map[string]func() (int, error){
		"offset": func() (int, error) { return f.WriteAt(buf, 1) },
		"length": func() (int, error) { return f.WriteAt(buf[:100], 0) },
		"buffer": func() (int, error) { return f.WriteAt(buf[1:513], 0) },
	} {
		if _, err := bad(); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("wrong %s: %v, want EINVAL", name, err)
		}
	}
	g := open(t, d, "a", os.O_RDWR)
	write(t, g, []byte("x"), 4096)
	if v := d.Violations(); len(v) != 0 {
		t.Fatalf("violations %q", v)
	}
	write(t, g, []byte("x"), 0)
	if v := d.Violations(); len(v) != 1 {
		t.Fatalf("violations %q, want one", v)
	}
	n, err := g.ReadAt(make([]byte, 10), 4090)
	if n != 7 || err != io.EOF {
		t.Fatalf("ReadAt = %d, %v, want 7, EOF", n, err)
	}
	none := simdisk.New(simdisk.Options{NoDirect: true})
	if _, err := none.OpenFile("a", rwc|disk.Direct, 0o600); !errors.Is(err, syscall.EINVAL) {
		t.Fatalf("open = %v, want EINVAL", err)
	}
}

func TestSameSeedSameDisk(t *testing.T) {
	run := func() []byte {
		d := simdisk.New(simdisk.Options{Seed: 42})
		f := create(t, d, "a", fill('0', 8192))
		for i := range 20 {
			write(t, f, fill(byte('a'+i), 700), int64(i*390))
		}
		return content(t, d.Cut(nil), "a")
	}
	if !bytes.Equal(run(), run()) {
		t.Fatal("two runs with one seed differ")
	}
}
