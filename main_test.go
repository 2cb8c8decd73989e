package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/control"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// runCommand runs the program as main does.
func runCommand(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	status = run(t.Context(), args, &out, &err)
	return status, out.String(), err.String()
}

func TestExitStatus(t *testing.T) {
	dir := t.TempDir()
	good, bad, hubFile := filepath.Join(dir, "good.toml"), filepath.Join(dir, "bad.toml"), filepath.Join(dir, "h.toml")
	for name, text := range map[string]string{
		good:    "[node]\nid = \"n1\"\n",
		bad:     "[node]\nid = \"n 1\"\n[sync]\nflush = 1\nx = 2\n",
		hubFile: "[hub]\nid = \"h1\"\n[http]\nlisten = \"127.0.0.1:1\"\n",
	} {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	none := filepath.Join(dir, "none.sock")
	tests := []struct {
		name           string
		args           []string
		status         int
		stdout, stderr string // a part of it; empty: nothing at all
	}{
		{"nothing", nil, 2, "", "Usage:"},
		{"help", []string{"--help"}, 0, "Available Commands", ""},
		{"help of a command", []string{"mount", "--help"}, 0, "litefs-agent mount", ""},
		{"unknown command", []string{"sing"}, 2, "", `unknown command "sing"`},
		{"unknown flag", []string{"status", "--loud"}, 2, "", "unknown flag: --loud"},
		{"unknown subcommand", []string{"ltx", "sing"}, 2, "", `unknown command "sing"`},
		{"group alone", []string{"config"}, 2, "", "which config command?"},
		{"unexpected argument", []string{"status", "me"}, 2, "", `unknown command "me"`},
		{"missing flag", []string{"export", "-o", "x"}, 2, "", `"db" not set`},
		{"bad flag value", []string{"wait", "--db", "a", "--timeout", "soon"}, 2, "", "invalid argument"},
		{"bad txid", []string{"wait", "--db", "a", "--txid", "10"}, 2, "", "16 lower-case hex digits"},
		{"bad check", []string{"status", "--check", "max-fun=3"}, 2, "", "max-lag=TIME"},
		{"mount without dashes", []string{"mount", "sh"}, 2, "", "comes after --"},
		{"mount of nothing", []string{"mount", "--"}, 2, "", "must follow --"},
		{"bad site", []string{"hub", "--site", "ABC"}, 2, "", "32 lower-case hex digits"},
		{"no service", []string{"--socket", none, "status"}, 1, "", "no service answers at " + none},
		{"version", []string{"version"}, 0, "litefs-agent ", ""},
		{"version in JSON", []string{"version", "--json"}, 0, `"platform": `, ""},
		{"completion", []string{"completion", "bash"}, 0, "litefs-agent", ""},
		{"config of a node", []string{"config", "check", "--config", good}, 0, "good, a node's", ""},
		{"config of a hub", []string{"config", "check", "--config", hubFile}, 0, "good, a hub's", ""},
		{"config of a node as a hub's", []string{"config", "check", "--hub", "--config", good}, 1, "", "node: unknown key"},
		{"bad config", []string{"config", "check", "--config", bad}, 1, "", "bad.toml:2: node.id"},
		{"all faults", []string{"config", "check", "--config", bad}, 1, "", "bad.toml:5: sync.x"},
		{"no config", []string{"config", "check", "--config", dir + "/none"}, 1, "", "no such file"},
		{"show", []string{"config", "show", "--config", good}, 0, `id = "n1"`, ""},
		{"show in JSON", []string{"config", "show", "--config", hubFile, "--json"}, 0, `"id": "h1"`, ""},
		{"mount with a bad config", []string{"mount", "--config", bad}, 1, "", "bad.toml:2: node.id"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			status, stdout, stderr := runCommand(t, tt.args...)
			if status != tt.status {
				t.Errorf("got status %d, want %d", status, tt.status)
			}
			for _, stream := range []struct{ name, got, want string }{{"stdout", stdout, tt.stdout}, {"stderr", stderr, tt.stderr}} {
				if !strings.Contains(stream.got, stream.want) || stream.want == "" && stream.got != "" {
					t.Errorf("got %s %q, want %q in it", stream.name, stream.got, stream.want)
				}
			}
		})
	}
}

// fakeService is a node with app.db, of which the hub lacks 2 KiB.
type fakeService struct{}

func (fakeService) Status(context.Context) any {
	text := func(s string) *string { return &s }
	number := func(n int64) *int64 { return &n }
	heard, commit := int64(90_000), time.Now().Add(-time.Hour)
	return control.StatusNode{
		Role: "node", ID: "pi-1", Version: "v1", Healthy: true,
		Hub:   control.StatusLink{URL: text("https://hub.example"), State: control.LinkConnecting, Error: text("refused"), LastHeardMS: &heard},
		Mount: control.StatusMount{Dir: "/var/lib/litefs", State: control.MountMounted},
		Databases: []control.StatusDatabase{{
			Name: "app.db", Owner: "node", Role: "primary", Writer: text("pi-1"), Pos: text("0000000000000065/8b73bc1d07d84988"),
			Acked: text("0000000000000064/8000000000000001"), Backlog: control.StatusBacklog{Records: 1, Bytes: 2048, AgeMS: 45_000},
			LagMS: number(45_000), Size: number(1 << 20), JournalMode: text("wal"), LastCommit: &commit, Branches: []control.StatusBranch{},
		}},
		Card: control.StatusCard{BytesWritten: 3 << 19, Fdatasyncs: 7, Transactions: 101},
	}
}

func (fakeService) Wait(ctx context.Context, _ string, txid ltx.TXID, _ bool) error {
	if txid <= 0x65 {
		return nil
	}
	<-ctx.Done()
	return ctx.Err()
}

func (fakeService) Events(_ context.Context, db string, report func(control.Event) error) error {
	return report(control.Event{Event: control.EventCommit, DB: &db})
}

func (fakeService) Export(_ context.Context, db string, w io.Writer) error {
	if _, err := fmt.Fprint(w, "content of "+db); err != nil {
		return err
	}
	if db != "app.db" {
		return errors.New("a page does not match")
	}
	return nil
}

func (fakeService) Import(_ context.Context, db string, r io.Reader) error {
	b, err := io.ReadAll(r)
	if err == nil && string(b) != "content of "+db {
		err = errors.New("what is to be " + db + " is no whole SQLite database")
	}
	return err
}

func (fakeService) Verify(_ context.Context, db string, report func(control.Check)) error {
	report(control.Check{DB: "app.db", Object: "database", Done: 1, Total: 2, OK: true})
	problem := "page 7 differs"
	check := control.Check{DB: "app.db", Object: "database", Done: 2, Total: 2, OK: db == "app.db"}
	if !check.OK {
		check.Problem = &problem
	}
	report(check)
	return nil
}

func (fakeService) ExportLTX(_ context.Context, db string, create control.CreateFunc) error {
	name := ltx.FormatFilename(1, 2)
	if db == "evil.db" {
		name = "../evil"
	}
	w, err := create(name, 3)
	if err == nil {
		_, err = io.WriteString(w, "ltx")
	}
	return err
}

// startFake returns the socket of a fakeService.
func startFake(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	server, err := control.Listen(fakeService{}, control.Options{Path: path, GID: -1})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return path
}

func TestStatusText(t *testing.T) {
	socket := startFake(t)
	status, stdout, stderr := runCommand(t, "status", "--socket", socket)
	want := `node     pi-1, healthy
site     -
hub      https://hub.example connecting, heard 1m30s ago: refused
mount    /var/lib/litefs mounted
card     101 transactions, 7 flushes, 1.5MiB written
program  v1, 0B of memory

DATABASE  ROLE     WRITER  TXID  ACKED  BACKLOG     LAG  SIZE    MODE  LAST COMMIT  BRANCHES
app.db    primary  pi-1    65    64     1 (2.0KiB)  45s  1.0MiB  wal   1h ago       0
`
	if status != 0 || stdout != want || stderr != "" {
		t.Errorf("got %d, %q and\n%s\nwant\n%s", status, stderr, stdout, want)
	}
}

func TestStatusJSON(t *testing.T) {
	status, stdout, _ := runCommand(t, "status", "--json", "--socket", startFake(t))
	var got control.StatusNode
	if err := json.Unmarshal([]byte(stdout), &got); status != 0 || err != nil || got.Databases[0].Name != "app.db" {
		t.Errorf("got %d, %v, %s", status, err, stdout)
	}
}

func TestStatusCheck(t *testing.T) {
	socket := startFake(t)
	tests := []struct {
		check  string
		status int
		want   string
	}{
		{"max-lag=2m", 0, "pi-1, healthy"},
		{"max-lag=60s", 1, "the hub was last heard 1m30s ago, above max-lag 1m"},
		{"max-lag=30s", 1, "app.db: lag 45s, above max-lag 30s"},
		{"max-backlog=2KiB", 0, "pi-1, healthy"},
		{"max-lag=2m,max-backlog=1KiB", 1, "backlog 2.0KiB, above max-backlog 1KiB"},
	}
	for _, tt := range tests {
		t.Run(tt.check, func(t *testing.T) {
			status, stdout, _ := runCommand(t, "status", "--socket", socket, "--check", tt.check)
			if status != tt.status || !strings.Contains(stdout, tt.want) {
				t.Errorf("got %d, want %d and %q in\n%s", status, tt.status, tt.want, stdout)
			}
		})
	}
}

func TestWaitCommand(t *testing.T) {
	socket := startFake(t)
	if status, _, stderr := runCommand(t, "wait", "--socket", socket, "--db", "app.db", "--acked"); status != 0 {
		t.Errorf("got %d, %s", status, stderr)
	}
	status, _, stderr := runCommand(t, "wait", "--socket", socket, "--db", "app.db", "--txid", "0000000000000066", "--timeout", "10ms")
	if status != 1 || !strings.Contains(stderr, "timed out") {
		t.Errorf("got %d, %s", status, stderr)
	}
}

// An export appears whole or not at all.
func TestExportCommand(t *testing.T) {
	socket, dir := startFake(t), t.TempDir()
	file := filepath.Join(dir, "out.db")
	export := func(args ...string) (int, string) {
		status, _, stderr := runCommand(t, append([]string{"export", "--socket", socket, "-o", file}, args...)...)
		return status, stderr
	}
	content := func() string {
		text, err := os.ReadFile(file)
		if err != nil {
			return err.Error()
		}
		return string(text)
	}
	if status, stderr := export("--db", "bad.db"); status != 1 || !strings.Contains(stderr, "a page does not match") || exists(file) {
		t.Errorf("bad: got %d, %s", status, stderr)
	}
	if status, stderr := export("--db", "app.db"); status != 0 || content() != "content of app.db" {
		t.Errorf("good: got %d, %s, %q", status, stderr, content())
	}
	if status, stderr := export("--db", "app.db"); status != 1 || !strings.Contains(stderr, "--force") {
		t.Errorf("again: got %d, %s", status, stderr)
	}
	if status, _ := export("--db", "bad.db", "--force"); status != 1 || content() != "content of app.db" {
		t.Errorf("bad over good: got %d, %q", status, content())
	}
	if status, stderr := export("--db", "app.db", "--force"); status != 0 {
		t.Errorf("force: got %d, %s", status, stderr)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestVerifyCommand(t *testing.T) {
	socket := startFake(t)
	status, stdout, _ := runCommand(t, "verify", "--socket", socket, "--db", "app.db")
	if want := "ok      app.db database -\n1 checked, 0 problems\n"; status != 0 || stdout != want {
		t.Errorf("got %d, %q, want %q", status, stdout, want)
	}
	status, stdout, _ = runCommand(t, "verify", "--socket", socket)
	if want := "PROBLEM app.db database -: page 7 differs\n1 checked, 1 problems\n"; status != 1 || stdout != want {
		t.Errorf("got %d, %q, want %q", status, stdout, want)
	}
	status, stdout, _ = runCommand(t, "verify", "--socket", socket, "--json")
	lines := strings.Split(strings.TrimSpace(stdout), "\n")
	if want := `{"result":"failed","checked":1,"problems":1}`; status != 1 || len(lines) != 3 || lines[2] != want {
		t.Errorf("got %d, %q, want 3 lines and at last %s", status, lines, want)
	}
}

func TestLTXExportCommand(t *testing.T) {
	socket, dir := startFake(t), filepath.Join(t.TempDir(), "new")
	path := filepath.Join(dir, ltx.FormatFilename(1, 2))
	for _, step := range []struct {
		name   string
		args   []string
		status int
	}{
		{"into a new folder", []string{"--db", "app.db"}, 0},
		{"again", []string{"--db", "app.db"}, 1},
		{"with force", []string{"--db", "app.db", "--force"}, 0},
		{"a name that leads elsewhere", []string{"--db", "evil.db"}, 1},
	} {
		status, stdout, stderr := runCommand(t, append([]string{"ltx", "export", "--socket", socket, "-o", dir}, step.args...)...)
		if status != step.status || status == 0 && stdout != path+"\n" {
			t.Errorf("%s: got %d, %q, %q", step.name, status, stdout, stderr)
		}
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "ltx" {
		t.Errorf("got %q, %v", text, err)
	}
	if exists(filepath.Join(filepath.Dir(dir), "evil")) {
		t.Error("wrote outside of its folder")
	}
}

func TestLTXFiles(t *testing.T) {
	dir := t.TempDir()
	file, bad := filepath.Join(dir, ltx.FormatFilename(1, 1)), filepath.Join(dir, "bad.ltx")
	page := bytes.Repeat([]byte{7}, 512)
	post := ltx.ChecksumFlag | ltx.PageChecksum(1, page)
	text, err := ltx.AppendFile(nil, ltx.Header{PageSize: 512, Commit: 1, MinTXID: 1, MaxTXID: 1, Timestamp: 1000}, []ltx.Page{{Pgno: 1, Data: page, CRC: ltx.PageCRC(page)}}, post)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, text, 0o644); err != nil {
		t.Fatal(err)
	}
	text[ltx.HeaderSize+12] ^= 1
	if err := os.WriteFile(bad, text, 0o644); err != nil {
		t.Fatal(err)
	}
	pos := ltx.Pos{TXID: 1, PostApplyChecksum: post}.String()
	tests := []struct {
		name   string
		args   []string
		status int
		want   string
	}{
		{"list", []string{"list", file}, 0, "1970-01-01T00:00:01Z"},
		{"list in JSON", []string{"list", "--json", file}, 0, `"post_apply_checksum": "` + post.String() + `"`},
		{"dump", []string{"dump", file}, 0, "PGNO  OFFSET  SIZE"},
		{"dump in JSON", []string{"dump", "--json", file}, 0, `"pgno": 1`},
		{"verify", []string{"verify", file}, 0, "ok       " + pos},
		{"verify in JSON", []string{"verify", "--json", file, bad}, 1, `"ok": false`},
		{"verify a bad one", []string{"verify", bad, file}, 1, "ok       " + pos},
		{"list what is not there", []string{"list", dir + "/none", file}, 1, file},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			status, stdout, stderr := runCommand(t, append([]string{"ltx"}, tt.args...)...)
			if status != tt.status || !strings.Contains(stdout, tt.want) || (stderr == "") != (status == 0) {
				t.Errorf("got %d, %q, want %d and %q in\n%s", status, stderr, tt.status, tt.want, stdout)
			}
		})
	}
}
