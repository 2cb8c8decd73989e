package transport_test

import (
	"encoding/hex"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/litefs-agent/litefs-agent/transport"
)

// TestDocExample: the bytes shown in docs/protocol.md are right.
func TestDocExample(t *testing.T) {
	doc, err := os.ReadFile("../docs/protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(doc), `text "full" and 30 s:`)
	if !ok {
		t.Fatal("no example")
	}
	line, _, _ := strings.Cut(strings.TrimLeft(rest, "\n"), "\n")
	b, err := hex.DecodeString(strings.ReplaceAll(line, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	got, _, err := transport.DecodeFrame(b, 1024)
	want := &transport.Bye{Code: transport.CodeBusy, Text: "full", RetryAfter: 30 * time.Second}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
}
