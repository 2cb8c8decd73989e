package transport_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/ltx"
	"github.com/litefs-agent/litefs-agent/transport"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// pos is a position for tests.
func pos(txid, sum uint64) ltx.Pos {
	return ltx.Pos{TXID: ltx.TXID(txid), PostApplyChecksum: ltx.Checksum(sum)}
}

// messages holds one of each kind, with every field set.
var messages = []transport.Message{
	&transport.Hello{
		MinVersion: 1, MaxVersion: 2, Features: 5, Required: 1,
		Limits: transport.Limits{MaxFrame: 65536, Window: 4 << 20, MaxStreams: 16, Heartbeat: 10 * time.Second},
		Site:   transport.Site{1, 2, 15: 16}, Node: "pi-3fa2c1", Hardware: 0x1122334455667788, Session: 300,
		AgentVersion: "1.0", Restore: true,
		Databases: []transport.DatabaseState{
			{Name: "app.db", History: 0xfeed, Pos: pos(101, 1<<63|7), Oldest: 90, Forked: 99, PageSize: 4096},
			{Name: "config/x.db", History: 2, Epoch: transport.Epoch{N: 3, Grant: 0xabcdef}, Owner: transport.OwnerHub,
				Pos: pos(1, 1<<63), Archived: pos(1, 1<<63), PageSize: 512, Hold: true},
		},
	},
	&transport.Welcome{
		Version: 1, Features: 1, Limits: transport.Limits{MaxFrame: 1024, Heartbeat: time.Second},
		Site: transport.Site{9}, Hub: "hub", Session: 301, MovedURL: "https://other:20202",
		Databases: []transport.DatabaseState{{Name: "app.db", History: 0xfeed, Pos: pos(100, 1<<63|6), Archived: pos(50, 1<<63|5)}},
	},
	&transport.Bye{Code: transport.CodeBusy, Text: "too many sessions", RetryAfter: 30 * time.Second},
	&transport.Ping{Clock: 123456789},
	&transport.Pong{Echo: 123456789},
	&transport.Push{
		Stream: 7, Name: "app.db", History: 0xfeed, Epoch: transport.Epoch{N: 1, Grant: 2}, Flags: transport.PushSnapshot | transport.PushBranch,
		MinTXID: 1, MaxTXID: 300, PreApply: 1 << 63, PostApply: 1<<63 | 9, CommitTime: time.UnixMilli(1700000000123).UTC(),
		PageSize: 4096, Group: 0xdeadbeef, Parts: 2, Size: 5, Payload: []byte("LTX1!"), Last: true,
	},
	&transport.Data{Stream: 7, Offset: 70000, Payload: []byte{0, 1, 2, 255}, Last: true},
	&transport.Cancel{Stream: 7, Text: "gone"},
	&transport.Ack{Name: "app.db", History: 0xfeed, Epoch: transport.Epoch{N: 1, Grant: 2}, Pos: pos(300, 1<<63|9), Level: transport.AckArchived},
	&transport.Nak{
		Name: "app.db", Code: transport.NakPosMismatch, MinTXID: 5, MaxTXID: 6, Stream: 8, History: 0xfeed,
		Epoch: transport.Epoch{N: 1, Grant: 2}, Pos: pos(3, 1<<63|1), Text: "hub is at 3", RetryAfter: time.Minute,
	},
	&transport.Subscribe{Name: "config/x.db", History: 2, Pos: pos(4, 1<<63), Snapshot: true},
	&transport.Unsubscribe{Name: "config/x.db"},
	&transport.Position{Databases: []transport.DatabaseState{{Name: "app.db", History: 1}}},
}

// TestGolden: the bytes never change. Made by: go test ./transport -run Golden -update
func TestGolden(t *testing.T) {
	for _, m := range messages {
		got, err := transport.AppendFrame(nil, m, transport.MaxHelloFrame)
		if err != nil {
			t.Fatalf("%s: %v", m.Kind(), err)
		}
		file := filepath.Join("testdata", m.Kind().String()+".hex")
		if *update {
			if err := os.WriteFile(file, []byte(hex.EncodeToString(got)+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		want, err := hex.DecodeString(strings.TrimSpace(string(text)))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: got\n%x\nwant\n%x", m.Kind(), got, want)
		}
		back, rest, err := transport.DecodeFrame(want, transport.MaxHelloFrame)
		if err != nil || len(rest) != 0 || !reflect.DeepEqual(back, m) {
			t.Errorf("%s: decoded %+v, %d left, %v; want %+v", m.Kind(), back, len(rest), err, m)
		}
		for n := range want { // no beginning of a frame is a frame
			if _, _, err := transport.DecodeFrame(want[:n], transport.MaxHelloFrame); !errors.Is(err, transport.ErrCorrupt) {
				t.Errorf("%s cut at %d: %v, want corrupt", m.Kind(), n, err)
			}
		}
	}
}

func TestZero(t *testing.T) {
	for _, m := range []transport.Message{&transport.Hello{}, &transport.Welcome{}, &transport.Bye{}, &transport.Ping{},
		&transport.Pong{}, &transport.Cancel{}, &transport.Position{}} {
		b, err := transport.AppendFrame(nil, m, 64)
		if err != nil {
			t.Fatal(err)
		}
		if back, _, err := transport.DecodeFrame(b, 64); err != nil || !reflect.DeepEqual(back, m) {
			t.Errorf("%s: got %+v, %v", m.Kind(), back, err)
		}
	}
}

func TestDecode(t *testing.T) {
	for _, test := range []struct {
		name string
		hex  string
		want error
	}{
		{"bye", "00000004" + "03" + "010101", nil},
		{"optional field is skipped", "00000008" + "03" + "010101" + "9002aabb", nil},
		{"optional list is skipped", "00000007" + "03" + "900155" + "900166", nil},
		{"mandatory field is not", "00000008" + "03" + "010101" + "4002aabb", transport.ErrUnknown},
		{"unknown message", "00000001" + "63", transport.ErrUnknown},
		{"no kind", "00000000" + "03", transport.ErrCorrupt},
		{"too large", "00100000" + "03", transport.ErrTooLarge},
		{"longest length", "ffffffff" + "03", transport.ErrTooLarge},
		{"twice", "00000007" + "03" + "010101" + "010101", transport.ErrCorrupt},
		{"descending", "00000007" + "03" + "020161" + "010101", transport.ErrCorrupt},
		{"tag 0", "00000004" + "03" + "000101", transport.ErrCorrupt},
		{"zero is left out", "00000004" + "03" + "010100", transport.ErrCorrupt},
		{"long form", "00000005" + "03" + "01028100", transport.ErrCorrupt},
		{"field beyond the end", "00000004" + "03" + "017f01", transport.ErrCorrupt},
		{"size beyond 64 bits", "0000000d" + "03" + "01ffffffffffffffffffff7f", transport.ErrCorrupt},
		{"number out of range", "00000006" + "03" + "0103" + "ffff0f", transport.ErrCorrupt},
		{"push of nothing", "00000001" + "10", transport.ErrCorrupt},
		{"ack without name", "00000004" + "13" + "050101", transport.ErrCorrupt},
	} {
		b, err := hex.DecodeString(test.hex)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := transport.DecodeFrame(b, 64<<10); !errors.Is(err, test.want) {
			t.Errorf("%s: got %v, want %v", test.name, err, test.want)
		}
	}
}

// TestRefuseToEncode: what the receiver would reject is rejected by the sender.
func TestRefuseToEncode(t *testing.T) {
	long := strings.Repeat("x", transport.MaxName+1)
	good := transport.Push{Stream: 1, Name: "a", MinTXID: 1, MaxTXID: 1, Size: -1}
	for name, test := range map[string]struct {
		change func(*transport.Push)
		want   error
	}{
		"name":  {func(p *transport.Push) { p.Name = long }, transport.ErrTooLarge},
		"empty": {func(p *transport.Push) { p.Name = "" }, transport.ErrCorrupt},
		"range": {func(p *transport.Push) { p.MinTXID = 2 }, transport.ErrCorrupt},
		"group": {func(p *transport.Push) { p.Parts = 2 }, transport.ErrCorrupt},
		"size":  {func(p *transport.Push) { p.Size, p.Payload = 2, []byte("abc") }, transport.ErrCorrupt},
		"short": {func(p *transport.Push) { p.Size, p.Last = 2, true }, transport.ErrCorrupt},
		"frame": {func(p *transport.Push) { p.Payload = make([]byte, 2000) }, transport.ErrTooLarge},
		"none":  {func(*transport.Push) {}, nil},
	} {
		p := good
		test.change(&p)
		if _, err := transport.AppendFrame(nil, &p, 1024); !errors.Is(err, test.want) {
			t.Errorf("%s: got %v, want %v", name, err, test.want)
		}
	}
	b, err := transport.AppendFrame(nil, &transport.Bye{Text: strings.Repeat("long ", 1000), RetryAfter: 1 << 62}, 1024)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := transport.DecodeFrame(b, 1024); err != nil {
		t.Errorf("a long text is cut: %v", err)
	}
}

// TestMaxDatabases: a list that is too long is refused at both ends.
func TestMaxDatabases(t *testing.T) {
	p := &transport.Position{}
	for range transport.MaxDatabases {
		p.Databases = append(p.Databases, transport.DatabaseState{Name: "a"})
	}
	b, err := transport.AppendFrame(nil, p, transport.MaxHelloFrame)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := transport.DecodeFrame(b, transport.MaxHelloFrame); err != nil {
		t.Error(err)
	}
	b = append(b, b[5:10]...) // one more
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	if _, _, err := transport.DecodeFrame(b, transport.MaxHelloFrame); !errors.Is(err, transport.ErrCorrupt) {
		t.Errorf("got %v, want corrupt", err)
	}
	p.Databases = append(p.Databases, transport.DatabaseState{Name: "a"})
	if _, err := transport.AppendFrame(nil, p, transport.MaxHelloFrame); !errors.Is(err, transport.ErrTooLarge) {
		t.Errorf("got %v, want too large", err)
	}
}

func FuzzDecodeFrame(f *testing.F) {
	files, err := filepath.Glob("testdata/*.hex")
	if err != nil || len(files) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		b, err := hex.DecodeString(strings.TrimSpace(string(text)))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, rest, err := transport.DecodeFrame(b, transport.MaxHelloFrame)
		if err != nil {
			return
		}
		again, err := transport.AppendFrame(nil, m, transport.MaxHelloFrame)
		if err != nil {
			t.Fatalf("%+v decodes but does not encode: %v", m, err)
		}
		if len(again) > len(b)-len(rest) {
			t.Fatalf("%x decodes to %+v, which takes more: %x", b, m, again)
		}
		back, _, err := transport.DecodeFrame(again, transport.MaxHelloFrame)
		if err != nil || !reflect.DeepEqual(back, m) {
			t.Fatalf("%x decodes to %+v, encoded to %+v: %v", b, m, back, err)
		}
	})
}

func TestEpoch(t *testing.T) {
	for _, test := range []struct {
		text string
		want transport.Epoch
		ok   bool
	}{
		{"0", transport.Epoch{}, true},
		{"12-00000000deadbeef", transport.Epoch{N: 12, Grant: 0xdeadbeef}, true},
		{"0-0000000000000001", transport.Epoch{Grant: 1}, true},
		{"0-0000000000000000", transport.Epoch{}, false},
		{"012-00000000deadbeef", transport.Epoch{}, false},
		{"12-00000000DEADBEEF", transport.Epoch{}, false},
		{"12-deadbeef", transport.Epoch{}, false},
		{"", transport.Epoch{}, false},
		{"-1-00000000deadbeef", transport.Epoch{}, false},
	} {
		got, err := transport.ParseEpoch(test.text)
		if got != test.want || (err == nil) != test.ok {
			t.Errorf("%q: got %v, %v", test.text, got, err)
		}
		if test.ok && got.String() != test.text {
			t.Errorf("got %s, want %s", got, test.text)
		}
	}
}
