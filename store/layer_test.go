package store

import (
	"bytes"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/sparse"
)

// A read may hold the stack of layers from before a layer was applied to the
// file: it must find in the file what it no longer finds in the layer, also
// beyond the truncation that the layer stood for.
func TestReadThroughRetiredLayer(t *testing.T) {
	l := newLayer(sparse.NewPool(1<<20, nil))
	l.cut(4096)
	page := bytes.Repeat([]byte{'n'}, 4096)
	if err := l.WriteAt(page, 8192, nil); err != nil {
		t.Fatal(err)
	}
	held := []*layer{l}
	file := make([]byte, 16384)
	read := func(off int64) byte {
		t.Helper()
		p := make([]byte, 512)
		err := readThrough(held, p, off, func(q []byte, o int64) error {
			copy(q, file[o:])
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return p[0]
	}
	file[12288] = 'o' // what the truncation took away
	if got := []byte{read(8192), read(12288)}; string(got) != "n\x00" {
		t.Errorf("before: got %q, want %q", got, "n\x00")
	}
	copy(file[4096:], make([]byte, len(file)))
	copy(file[8192:], page)
	l.retire()
	if got := []byte{read(8192), read(12288)}; string(got) != "n\x00" {
		t.Errorf("after: got %q, want %q", got, "n\x00")
	}
}
