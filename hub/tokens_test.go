package hub_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/hub"
)

func TestTokenFile(t *testing.T) {
	f := hub.TokenFile{Path: filepath.Join(t.TempDir(), "sub", "tokens")}
	if list, err := f.List(); err != nil || len(list) != 0 {
		t.Fatalf("without a file: got %v, %v, want none", list, err)
	}
	first, err := f.Add("pi-1")
	if err != nil {
		t.Fatal(err)
	}
	second, err := f.Add("pi-2")
	if err != nil {
		t.Fatal(err)
	}
	if len(first) != 64 || first == second {
		t.Errorf("tokens %q and %q, want 256 random bits each", first, second)
	}
	text, err := os.ReadFile(f.Path)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), first) {
		t.Error("the file holds a token in clear")
	}
	info, err := os.Stat(f.Path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v (%v), want 0600", info.Mode(), err)
	}
	for _, bad := range []string{"", "..", "a/b", "a b", strings.Repeat("x", 65), "a\nb"} {
		if _, err := f.Add(bad); err == nil {
			t.Errorf("Add(%q) succeeded", bad)
		}
	}
	if _, err := f.Revoke("pi-3", false); !errors.Is(err, hub.ErrNoToken) {
		t.Errorf("revoke of a node without token: got %v, want ErrNoToken", err)
	}
	if _, err := f.Add("pi-1"); err != nil {
		t.Fatal(err)
	}
	if n, err := f.Revoke("pi-1", true); n != 1 || err != nil {
		t.Errorf("revoke all but the newest: got %d, %v, want 1", n, err)
	}
	if n, err := f.Revoke("pi-1", false); n != 1 || err != nil {
		t.Errorf("revoke: got %d, %v, want 1", n, err)
	}
	list, err := f.List()
	if err != nil || len(list) != 1 || list[0].Node != "pi-2" || time.Since(list[0].Made) > time.Minute {
		t.Errorf("got %v, %v, want pi-2 made now", list, err)
	}
}

// What another hand broke is never taken for an empty file, nor overwritten.
func TestBrokenTokenFile(t *testing.T) {
	for _, text := range []string{"pi-1", "pi-1 sha256:00 2026-01-01T00:00:00Z", "a/b sha256:" + strings.Repeat("0", 64) + " 2026-01-01T00:00:00Z",
		"pi-1 sha256:" + strings.Repeat("0", 64) + " today", "pi-1 " + strings.Repeat("0", 64) + " 2026-01-01T00:00:00Z"} {
		f := hub.TokenFile{Path: filepath.Join(t.TempDir(), "tokens")}
		if err := os.WriteFile(f.Path, []byte("# comment\n\n"+text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Add("pi-2"); err == nil || !strings.Contains(err.Error(), "line 3") {
			t.Errorf("%q: got %v, want an error of line 3", text, err)
		}
		if now, _ := os.ReadFile(f.Path); !strings.Contains(string(now), text) {
			t.Errorf("%q: the file was overwritten", text)
		}
	}
}

func TestTokensAddedAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens")
	const n = 20
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			if _, err := (hub.TokenFile{Path: path}).Add("pi-1"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	list, err := (hub.TokenFile{Path: path}).List()
	if err != nil || len(list) != n {
		t.Errorf("got %d tokens, %v, want %d", len(list), err, n)
	}
	left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "*"))
	if hidden, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); len(left) != 1 || len(hidden) != 0 {
		t.Errorf("files left behind: %v %v", left, hidden)
	}
}
