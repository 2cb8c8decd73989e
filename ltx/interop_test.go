package ltx_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/litefs-agent/litefs-agent/ltx"
)

// reference builds the reference's command (`ltx`) and reftool once, from the
// module in internal/reftool, and returns their folder. Tests fail without them.
var reference = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "ltx-reference")
	if err != nil {
		return "", err
	}
	referenceDir = dir
	for _, pkg := range []string{".", "github.com/superfly/ltx/cmd/ltx"} {
		cmd := exec.Command("go", "build", "-C", filepath.Join("internal", "reftool"), "-mod=readonly", "-o", dir+"/", pkg)
		// The tests may be built for another machine; these run here.
		cmd.Env = append(os.Environ(), "GOOS=", "GOARCH=", "GOARM=", "GOFLAGS=", "GOWORK=off", "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("%s: %w\n%s", cmd, err, out)
		}
	}
	return dir, nil
})

var referenceDir string // for TestMain to remove

func TestMain(m *testing.M) {
	code := m.Run()
	if referenceDir != "" {
		_ = os.RemoveAll(referenceDir)
	}
	os.Exit(code)
}

// runReference runs `ltx` or `reftool`.
func runReference(t testing.TB, tool string, args ...string) error {
	t.Helper()
	dir, err := reference()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(filepath.Join(dir, tool), args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", tool, err, out)
	}
	return nil
}

func writeFile(t testing.TB, path string, b []byte) string {
	t.Helper()
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestReferenceVerifies hands the reference all kinds of files that we write.
func TestReferenceVerifies(t *testing.T) {
	dir := t.TempDir()
	paths := []string{"verify"}
	add := func(name string, b []byte) {
		paths = append(paths, writeFile(t, filepath.Join(dir, name+".ltx"), b))
	}
	for name, f := range goldenFiles() {
		add(name, f.encode(t))
	}
	for size := uint32(512); size <= 65536; size *= 2 {
		lock := ltx.LockPgno(size)
		f := tx(5, 0, 1, size, lock+1, 1, 2, lock-1, lock+1)
		copy(f.pages[1].Data, randomBytes(1, int(size))) // incompressible
		f.pages[1].CRC = ltx.PageCRC(f.pages[1].Data)
		clear(f.pages[2].Data)
		f.pages[2].CRC = 0
		add(fmt.Sprint("transaction-", size), f.encode(t))

		s := file{h: ltx.Header{PageSize: size, Commit: 3, MinTXID: 1, MaxTXID: 9}}
		s.pages, s.post = pagesOf(size, 1, 1, 2, 3)
		add(fmt.Sprint("snapshot-", size), s.encode(t))
	}
	empty := file{h: ltx.Header{PageSize: 4096, MinTXID: 1, MaxTXID: 2}, post: ltx.ChecksumFlag}
	add("empty-snapshot", empty.encode(t))

	r := rand.New(rand.NewPCG(1, 2))
	d, raw := newDatabase(512), [][]byte{}
	for range 30 {
		raw = append(raw, d.transaction(r).encode(t))
	}
	for i := 0; i < len(raw); i += 3 {
		b, err := compact(raw[i:min(i+7, len(raw))]...)
		if err != nil {
			t.Fatal(err)
		}
		add(fmt.Sprint("compacted-", i), b)
	}
	if err := runReference(t, "ltx", paths...); err != nil {
		t.Error(err)
	}

	// The command tells a bad file from a good one.
	raw[0][len(raw[0])-1] ^= 1
	if err := runReference(t, "ltx", "verify", writeFile(t, filepath.Join(dir, "bad"), raw[0])); err == nil {
		t.Error("reference verifies a damaged file")
	}
}

// TestReferenceLockPage has the reference verify a snapshot that reaches over the
// lock page: 1 GiB of zeros in pages of 64 KiB.
func TestReferenceLockPage(t *testing.T) {
	const size = 65536
	lock := ltx.LockPgno(size)
	f := file{h: ltx.Header{PageSize: size, Commit: lock + 1, MinTXID: 1, MaxTXID: 1}}
	zeros := make([]byte, size)
	for pgno := uint32(1); pgno <= lock+1; pgno++ {
		if pgno != lock {
			f.pages = append(f.pages, ltx.Page{Pgno: pgno, Data: zeros})
			f.post ^= ltx.PageChecksumFromCRC(pgno, size, 0)
		}
	}
	f.post |= ltx.ChecksumFlag
	b, err := ltx.AppendFile(nil, f.h, f.pages, f.post)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := ltx.Verify(bytes.NewReader(b)); err != nil {
		t.Error(err)
	}
	if err := runReference(t, "ltx", "verify", writeFile(t, filepath.Join(t.TempDir(), "f.ltx"), b)); err != nil {
		t.Error(err)
	}
}

// TestReferenceEncodes reads what the reference makes of a database, and has it
// make the database of what we write.
func TestReferenceEncodes(t *testing.T) {
	for size := 512; size <= 65536; size *= 2 {
		dir := t.TempDir()
		db := randomBytes(byte(size>>9), 5*size)
		copy(db, "SQLite format 3\x00")
		clear(db[size : 3*size])
		binary.BigEndian.PutUint16(db[16:], uint16(size&0xffff|size>>16))
		path, ref := writeFile(t, dir+"/db", db), dir+"/ref.ltx"
		if err := runReference(t, "reftool", "encode", path, ref); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(ref)
		if err != nil {
			t.Fatal(err)
		}
		f, err := decode(b)
		if err != nil {
			t.Fatalf("page size %d: %v", size, err)
		}
		checkIndex(t, b, f)
		ours := writeFile(t, dir+"/ours.ltx", f.encode(t))
		if err := runReference(t, "reftool", "decode", ours, dir+"/back"); err != nil {
			t.Fatalf("page size %d: %v", size, err)
		}
		if back, err := os.ReadFile(dir + "/back"); err != nil || !bytes.Equal(back, db) {
			t.Errorf("page size %d: the database comes back different, %v", size, err)
		}
	}
}

// TestReferenceCompacts compares Compact with the reference, for files that both
// can compact.
func TestReferenceCompacts(t *testing.T) {
	dir := t.TempDir()
	files := []file{tx(5, 0, 1, 512, 9, 1, 2, 3, 9), tx(6, 1, 2, 512, 9, 2, 4), tx(7, 2, 3, 512, 8, 1)}
	args, raw := []string{"compact", dir + "/ref.ltx"}, [][]byte{}
	for i, f := range files {
		raw = append(raw, f.encode(t))
		args = append(args, writeFile(t, fmt.Sprintf("%s/%d.ltx", dir, i), raw[i]))
	}
	if err := runReference(t, "reftool", args...); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(dir + "/ref.ltx")
	if err != nil {
		t.Fatal(err)
	}
	want, err := decode(b)
	if err != nil {
		t.Fatal(err)
	}
	ours, err := compact(raw...)
	if err != nil {
		t.Fatal(err)
	}
	got, err := decode(ours)
	if err != nil {
		t.Fatal(err)
	}
	want.mustEqual(t, got)
}
