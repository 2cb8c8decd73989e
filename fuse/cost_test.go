package fuse_test

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/fuse"
)

// A shell is one sqlite3 process that stays.
type shell struct {
	t   testing.TB
	in  io.WriteCloser
	out *bufio.Reader
}

func newShell(t testing.TB, db string) *shell {
	t.Helper()
	cmd := exec.Command("sqlite3", "-bail", db)
	// Not root, who would make SQLite add a chown to each journal.
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ordinaryUser, Gid: ordinaryUser}}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	return &shell{t, in, bufio.NewReader(out)}
}

// do runs SQL and returns what it printed.
func (s *shell) do(sql string) string {
	s.t.Helper()
	if _, err := io.WriteString(s.in, sql+"\n.print done\n"); err != nil {
		s.t.Fatal(err)
	}
	var b strings.Builder
	for {
		line, err := s.out.ReadString('\n')
		if err != nil {
			s.t.Fatalf("sqlite3 ended: %v\n%s", err, b.String())
		}
		if line == "done\n" {
			return strings.TrimSpace(b.String())
		}
		b.WriteString(line)
	}
}

// settled returns the counts once the kernel's late requests have come.
func settled(s *fuse.Server) map[string]uint64 {
	last := s.Requests()
	for {
		time.Sleep(20 * time.Millisecond)
		now := s.Requests()
		if maps.Equal(last, now) {
			return now
		}
		last = now
	}
}

// TestRequestsPerTransaction counts what one INSERT and one point read cost.
func TestRequestsPerTransaction(t *testing.T) {
	const n = 200
	for _, tc := range []struct {
		mode        string
		write, read map[string]float64
	}{
		// Two of the GETATTR are the folder's: changing it makes the kernel ask
		// for its mode again before the next permission check.
		{
			"delete", map[string]float64{"CREATE": 1, "WRITE": 10, "READ": 1, "FSYNC": 3, "UNLINK": 1, "LOOKUP": 1, "RELEASE": 1, "FORGET": 1, "GETATTR": 3},
			nil,
		},
		{"truncate", map[string]float64{"OPEN": 1, "WRITE": 10, "READ": 1, "FSYNC": 4, "SETATTR": 1, "RELEASE": 1, "GETATTR": 1}, nil},
		{
			"persist", map[string]float64{"OPEN": 2, "WRITE": 11, "READ": 2, "FSYNC": 4, "RELEASE": 2, "GETATTR": 3},
			map[string]float64{"OPEN": 1, "READ": 1, "RELEASE": 1, "GETATTR": 1},
		},
		{"wal", map[string]float64{"WRITE": 2, "FSYNC": 1}, nil},
	} {
		t.Run(tc.mode, func(t *testing.T) {
			s, dir := mountFS(t, newMemFS(), fuse.Options{FileMode: 0o666, DirMode: 0o777, AllowOther: true})
			sql := newShell(t, filepath.Join(dir, "app.db"))
			sql.do(fmt.Sprintf("pragma journal_mode=%s; pragma synchronous=full; pragma wal_autocheckpoint=0; create table t(id integer primary key, x);", tc.mode))
			insert := func(from int) string {
				var b strings.Builder
				for i := range n {
					fmt.Fprintf(&b, "insert into t values(%d, hex(randomblob(40)));\n", from+i)
				}
				return b.String()
			}
			read := func() string {
				var b strings.Builder
				for i := range n {
					fmt.Fprintf(&b, "select length(x) from t where id=%d;\n", i)
				}
				return b.String()
			}
			// The first of each writes the schema's pages, the WAL header and so on.
			sql.do(insert(0))
			sql.do(read())

			before := settled(s)
			start := time.Now()
			sql.do(insert(n))
			took := time.Since(start)
			got := difference(before, settled(s))
			t.Logf("insert: %.0f µs, %.2f requests: %v", float64(took.Microseconds())/n, sum(got)/n, got)
			compare(t, "an insert", got, tc.write, n)

			before = settled(s)
			start = time.Now()
			sql.do(read())
			took = time.Since(start)
			got = difference(before, settled(s))
			t.Logf("point read: %.1f µs: %v", float64(took.Microseconds())/n, got)
			compare(t, "a point read", got, tc.read, n)
		})
	}
}

// compare checks counts of n statements against those wanted of one. Pages that
// split add to WRITE and READ. The attributes of the database live one second,
// and the first and last statement may differ by one.
func compare(t *testing.T, what string, got, want map[string]float64, n float64) {
	t.Helper()
	for op := range union(got, want) {
		slack := map[string]float64{"WRITE": 0.2, "READ": 0.02, "GETATTR": 0.03}[op] + 2.5/n
		if len(want) == 0 && op != "GETATTR" && op != "LOOKUP" {
			slack = 0
		}
		if have := got[op] / n; have < want[op]-2.5/n || have > want[op]+slack {
			t.Errorf("%s: got %.3f %s, want %g", op, have, what, want[op])
		}
	}
}

func difference(a, b map[string]uint64) map[string]float64 {
	d := map[string]float64{}
	for op, n := range b {
		if n != a[op] {
			d[op] = float64(n - a[op])
		}
	}
	return d
}

func union[A, B any](a map[string]A, b map[string]B) map[string]bool {
	u := map[string]bool{}
	for k := range a {
		u[k] = true
	}
	for k := range b {
		u[k] = true
	}
	return u
}

func sum(m map[string]float64) (s float64) {
	for _, n := range m {
		s += n
	}
	return s
}

// BenchmarkSQLite compares the one reader with go-fuse's server under the same
// file system.
func BenchmarkSQLite(b *testing.B) {
	for _, mode := range []string{"delete", "wal", "walnormal"} {
		for _, server := range []string{"own", "stock"} {
			b.Run(mode+"/"+server, func(b *testing.B) {
				opt := fuse.Options{FileMode: 0o666, DirMode: 0o777, AllowOther: true}
				var dir string
				if server == "own" {
					_, dir = mountFS(b, newMemFS(), opt)
				} else {
					opt.Dir = folder(b)
					stop, err := fuse.MountStock(newMemFS(), opt)
					if err != nil {
						b.Fatal(err)
					}
					b.Cleanup(stop)
					dir = opt.Dir
				}
				sql := newShell(b, filepath.Join(dir, "app.db"))
				sync := "full"
				if mode == "walnormal" {
					sync = "normal"
				}
				sql.do("pragma journal_mode=" + strings.TrimSuffix(mode, "normal") + "; pragma synchronous=" + sync + "; create table t(x);")
				b.ResetTimer()
				var in strings.Builder
				for range b.N {
					in.WriteString("insert into t values(hex(randomblob(40)));\n")
				}
				sql.do(in.String())
				b.StopTimer()
			})
		}
	}
}
