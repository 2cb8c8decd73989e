// Package e2e tests the built program from outside: real mounts, real sqlite3
// processes, real kills, file systems whose disk fails. Run it as root; -soak N makes the random tests N times
// as long, -seed S repeats one of them.
package e2e

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

var (
	soak     = flag.Int("soak", 1, "repeat random tests `N` times as often")
	seedFlag = flag.Uint64("seed", 0, "`SEED` of random tests; 0: a new one each run")
)

func TestMain(m *testing.M) {
	flag.Parse()
	testrig.Main(m, map[string]testrig.Helper{"posix": runPosix, deviceRole: serveDevice})
}

// random returns the source of a random test, and says on failure how to repeat
// it. Kills fall where they fall: a seed repeats the decisions, not the moments.
func random(t *testing.T) *rand.Rand {
	t.Helper()
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("run again: go test ./e2e -run '^%s$' -seed %d", t.Name(), seed)
	return rand.New(rand.NewPCG(seed, 1))
}

var modes = []string{"delete", "truncate", "persist", "wal"}

var syncs = []string{"off", "normal", "full", "extra"}

// sameFile fails where two files differ.
func sameFile(t testing.TB, got, want string) bool {
	t.Helper()
	a, err := os.ReadFile(got)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(want)
	if err != nil {
		t.Fatal(err)
	}
	if string(a) == string(b) {
		return true
	}
	at := 0
	for at < min(len(a), len(b)) && a[at] == b[at] {
		at++
	}
	t.Errorf("%s differs from %s at byte %d: got %d bytes, want %d", got, want, at, len(a), len(b))
	return false
}

// checkDB fails where the database at path is damaged.
func checkDB(env *testrig.Env, path string) {
	env.Helper()
	if got := env.SQL(path, "PRAGMA integrity_check;"); got != "ok" {
		env.Errorf("integrity_check of %s: got %s, want ok", path, got)
	}
}

func name(format string, args ...any) string { return fmt.Sprintf(format, args...) }

func readFile(path string) (string, error) {
	b, err := os.ReadFile(path)
	return string(b), err
}
