package control_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/control"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// fakeService holds app.db at position 3, acked 2, and broken.db, whose streams
// fail in the middle.
type fakeService struct {
	waiting chan struct{} // gets a value when Wait begins to wait; may be nil
}

var errDisk = errors.New("disk: ouch\n100% wörse")

func (f *fakeService) find(db string) error {
	if db != "app.db" && db != "broken.db" {
		return fmt.Errorf("%s: %w", db, control.ErrNoDatabase)
	}
	return nil
}

func (f *fakeService) Status(context.Context) any {
	return control.StatusNode{Role: "node", ID: "n1", Healthy: true, Databases: []control.StatusDatabase{}}
}

func (f *fakeService) Wait(ctx context.Context, db string, txid ltx.TXID, acked bool) error {
	if err := f.find(db); err != nil {
		return err
	}
	reached := ltx.TXID(3)
	if txid == 0 {
		txid = reached
	}
	if acked {
		reached = 2
	}
	if txid <= reached {
		return nil
	}
	if f.waiting != nil {
		f.waiting <- struct{}{}
	}
	<-ctx.Done()
	return ctx.Err()
}

func (f *fakeService) Events(ctx context.Context, db string, report func(control.Event) error) error {
	if err := report(control.Event{Event: control.EventCommit, DB: &db}); err != nil {
		return err
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

func (f *fakeService) Export(_ context.Context, db string, w io.Writer) error {
	if err := f.find(db); err != nil {
		return err
	}
	for i := range 100 {
		if db == "broken.db" && i == 50 {
			return errDisk
		}
		if _, err := w.Write(bytes.Repeat([]byte{byte(i)}, 4096)); err != nil {
			return err
		}
	}
	return nil
}

func (f *fakeService) Verify(_ context.Context, db string, report func(control.Check)) error {
	if db != "" {
		if err := f.find(db); err != nil {
			return err
		}
	}
	problem := "page 7 differs"
	report(control.Check{DB: "app.db", Object: "database", Done: 1, Total: 2, OK: true})
	report(control.Check{DB: "app.db", Object: "database", Done: 2, Total: 2, OK: true})
	if db == "broken.db" {
		return errDisk
	}
	report(control.Check{DB: "app.db", Object: "records", Done: 1, Total: 2, Problem: &problem})
	return nil
}

func (f *fakeService) Import(_ context.Context, db string, r io.Reader) error {
	if err := f.find(db); err != nil {
		return err
	}
	n, err := io.Copy(io.Discard, r)
	if err == nil && n != 1000 {
		err = errDisk
	}
	return err
}

func (f *fakeService) ExportLTX(_ context.Context, db string, create control.CreateFunc) error {
	if err := f.find(db); err != nil {
		return err
	}
	for i := range ltx.TXID(3) {
		if db == "broken.db" && i == 2 {
			return errDisk
		}
		w, err := create(ltx.FormatFilename(i+1, i+1), int64(i))
		if err != nil {
			return err
		}
		if _, err := w.Write(make([]byte, i)); err != nil {
			return err
		}
	}
	return nil
}

// serve runs service at a socket of its own until the test ends, or stop.
func serve(t *testing.T, service control.Service) (path string, stop func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "run", "s.sock")
	server, err := control.Listen(service, control.Options{Path: path, GID: -1})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is still there: %v", err)
		}
	}
	t.Cleanup(stop)
	return path, stop
}

func TestStatus(t *testing.T) {
	path, _ := serve(t, &fakeService{})
	raw, err := control.NewClient(path).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got control.StatusNode
	if err := json.Unmarshal(raw, &got); err != nil || got.ID != "n1" {
		t.Errorf("got %s, %v", raw, err)
	}
	info, err := os.Lstat(path)
	if err != nil || info.Mode() != os.ModeSocket|0o660 {
		t.Errorf("got mode %v, %v, want a socket with 0660", info.Mode(), err)
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("got %v, %v, want the socket alone", entries, err)
	}
}

// The field names are a contract, and what is not known is null, not absent.
func TestStatusFields(t *testing.T) {
	tests := []struct {
		name  string
		value any
		want  string
	}{
		{"node", control.StatusNode{Databases: []control.StatusDatabase{}},
			`{"role":"","id":"","site":null,"version":"","healthy":false,` +
				`"hub":{"url":null,"state":"","error":null,"retry_at":null,"last_heard_ms":null},` +
				`"mount":{"dir":"","state":""},"databases":[],` +
				`"card":{"bytes_written":0,"fdatasyncs":0,"transactions":0},"memory":{"rss":0}}`},
		{"hub", control.StatusHub{Databases: []control.StatusDatabase{}, Nodes: []control.StatusNodeAtHub{}},
			`{"role":"","id":"","site":null,"version":"","healthy":false,"mount":{"dir":"","state":""},` +
				`"databases":[],"nodes":[],"card":{"bytes_written":0,"fdatasyncs":0,"transactions":0},"memory":{"rss":0}}`},
		{"database", control.StatusDatabase{Branches: []control.StatusBranch{{}}},
			`{"name":"","owner":"","role":"","writer":null,"history":null,"epoch":null,"pos":null,"acked":null,"archived":null,` +
				`"backlog":{"records":0,"bytes":0,"age_ms":0},"lag_ms":null,"size":null,"page_size":null,"journal_mode":null,` +
				`"last_commit":null,"branches":[{"history":"","fork":null,"pos":null,"since":null}]}`},
		{"node at the hub", control.StatusNodeAtHub{Databases: []control.StatusDatabase{}},
			`{"id":"","state":"","last_seen":null,"version":null,"databases":[]}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got, err := json.Marshal(tt.value); err != nil || string(got) != tt.want {
				t.Errorf("got  %s, %v\nwant %s", got, err, tt.want)
			}
		})
	}
}

func TestWait(t *testing.T) {
	path, _ := serve(t, &fakeService{})
	client := control.NewClient(path)
	tests := []struct {
		name    string
		db      string
		txid    ltx.TXID
		acked   bool
		timeout time.Duration
		want    error
	}{
		{"now", "app.db", 0, false, 0, nil},
		{"reached", "app.db", 3, false, time.Hour, nil},
		{"acked", "app.db", 2, true, time.Hour, nil},
		{"not reached", "app.db", 4, false, 10 * time.Millisecond, control.ErrTimeout},
		{"not acked", "app.db", 0, true, 10 * time.Millisecond, control.ErrTimeout},
		{"unknown", "other.db", 0, false, 0, control.ErrNoDatabase},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := client.Wait(t.Context(), tt.db, tt.txid, tt.acked, tt.timeout); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

// A service that stops lets those who wait go, with an error.
func TestStopEndsWait(t *testing.T) {
	service := &fakeService{waiting: make(chan struct{})}
	path, stop := serve(t, service)
	result := make(chan error, 1)
	go func() { result <- control.NewClient(path).Wait(context.Background(), "app.db", 9, false, 0) }()
	<-service.waiting
	stop()
	if err := <-result; err == nil || errors.Is(err, control.ErrTimeout) {
		t.Errorf("got %v, want that the service ended", err)
	}
}

func TestExport(t *testing.T) {
	path, _ := serve(t, &fakeService{})
	client := control.NewClient(path)
	var got bytes.Buffer
	if err := client.Export(t.Context(), "app.db", &got); err != nil || got.Len() != 100*4096 || got.Bytes()[4096*99] != 99 {
		t.Errorf("got %d bytes, %v", got.Len(), err)
	}
	if err := client.Export(t.Context(), "broken.db", io.Discard); err == nil || err.Error() != errDisk.Error() {
		t.Errorf("got %v, want %v", err, errDisk)
	}
	if err := client.Export(t.Context(), "other.db", io.Discard); !errors.Is(err, control.ErrNoDatabase) {
		t.Errorf("got %v, want %v", err, control.ErrNoDatabase)
	}
}

func TestVerify(t *testing.T) {
	path, _ := serve(t, &fakeService{})
	client := control.NewClient(path)
	for _, db := range []string{"", "app.db"} {
		var result control.Result
		if err := client.Verify(t.Context(), db, result.Add); err != nil {
			t.Fatal(err)
		}
		if want := (control.Result{Result: "failed", Checked: 2, Problems: 1}); result.Final() != want {
			t.Errorf("got %+v, want %+v", result.Final(), want)
		}
	}
	if err := client.Verify(t.Context(), "broken.db", func(control.Check) {}); err == nil || err.Error() != errDisk.Error() {
		t.Errorf("got %v, want %v", err, errDisk)
	}
}

func TestExportLTX(t *testing.T) {
	path, _ := serve(t, &fakeService{})
	client := control.NewClient(path)
	var got []string
	receive := func(name string, size int64, r io.Reader) error {
		data, err := io.ReadAll(r)
		if int64(len(data)) != size {
			t.Errorf("%s: got %d bytes, want %d", name, len(data), size)
		}
		got = append(got, name)
		return err
	}
	if err := client.ExportLTX(t.Context(), "app.db", receive); err != nil {
		t.Fatal(err)
	}
	want := []string{ltx.FormatFilename(1, 1), ltx.FormatFilename(2, 2), ltx.FormatFilename(3, 3)}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if err := client.ExportLTX(t.Context(), "broken.db", receive); err == nil || err.Error() != errDisk.Error() {
		t.Errorf("got %v, want %v", err, errDisk)
	}
	full := errors.New("no room")
	if err := client.ExportLTX(t.Context(), "app.db", func(string, int64, io.Reader) error { return full }); !errors.Is(err, full) {
		t.Errorf("got %v, want %v", err, full)
	}
}

// A service that dies in the middle of its answer is an error of its own.
func TestCut(t *testing.T) {
	answers := map[string]string{
		"in the middle":       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Litefs-Result\r\n\r\n5\r\nhello\r\n5\r\nwo",
		"without its trailer": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
		"before it begins":    "",
	}
	for name, answer := range answers {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			listener, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
				conn.Read(make([]byte, 4096))
				io.WriteString(conn, answer)
			}()
			err = control.NewClient(path).Export(t.Context(), "app.db", io.Discard)
			listener.Close()
			<-done
			if !errors.Is(err, control.ErrCut) {
				t.Errorf("got %v, want %v", err, control.ErrCut)
			}
		})
	}
}

func TestNoService(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "s")
	if _, err := control.NewClient(missing).Status(t.Context()); !errors.Is(err, control.ErrNoService) {
		t.Errorf("got %v, want %v", err, control.ErrNoService)
	}
}

// A socket that a killed service left is replaced, one in use is not.
func TestListenAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	stale, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	stale.Close()
	if _, err := control.NewClient(path).Status(t.Context()); !errors.Is(err, control.ErrNoService) {
		t.Errorf("stale: got %v, want %v", err, control.ErrNoService)
	}
	first, err := control.Listen(&fakeService{}, control.Options{Path: path, GID: os.Getgid()})
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if _, err := control.Listen(&fakeService{}, control.Options{Path: path, GID: -1}); err == nil || !strings.Contains(err.Error(), "another service") {
		t.Errorf("in use: got %v", err)
	}
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	if again, err := os.Lstat(path); err == nil {
		t.Errorf("after Close: %v is still there, was %v", again.Mode(), info.Mode())
	}
}

func TestListenWhereAFileIs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	server, err := control.Listen(&fakeService{}, control.Options{Path: path, GID: -1})
	if err == nil {
		server.Close()
		t.Error("a file that is no socket was replaced")
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "mine" {
		t.Errorf("the file became %q, %v", text, err)
	}
}

func TestBadRequests(t *testing.T) {
	path, _ := serve(t, &fakeService{})
	for request, want := range map[string]string{
		"GET /wait":                           "400",
		"GET /wait?db=app.db&txid=3":          "400",
		"GET /wait?db=app.db&timeout=-1s":     "400",
		"GET /export":                         "400",
		"GET /ltx":                            "400",
		"GET /verify":                         "405",
		"POST /status":                        "405",
		"GET /":                               "404",
		"GET /export?db=../../etc/shadow":     "404",
		"GET /wait?db=app.db&txid=zz&acked=1": "400",
	} {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", request)
		answer, err := io.ReadAll(conn)
		conn.Close()
		if got, _, _ := strings.Cut(strings.TrimPrefix(string(answer), "HTTP/1.1 "), " "); err != nil || got != want {
			t.Errorf("%s: got %s, %v, want %s", request, got, err, want)
		}
	}
}

// What the client decodes of a status is what was encoded.
func TestStatusRoundTrip(t *testing.T) {
	text, now, n := "x", time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), int64(7)
	want := control.StatusHub{Role: "hub", Site: &text, Databases: []control.StatusDatabase{},
		Nodes: []control.StatusNodeAtHub{{ID: "a", State: control.NodeLost, LastSeen: &now,
			Databases: []control.StatusDatabase{{Name: "d", Size: &n, LastCommit: &now, Branches: []control.StatusBranch{{Since: &now}}}}}}}
	raw, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got control.StatusHub
	if err := json.Unmarshal(raw, &got); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
}
