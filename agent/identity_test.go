package agent_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/litefs-agent/litefs-agent/agent"
	"github.com/litefs-agent/litefs-agent/internal/config"
)

func TestHardwareID(t *testing.T) {
	const serial, machine = "proc/device-tree/serial-number", "etc/machine-id"
	tests := []struct {
		name  string
		files map[string]string
		want  string // empty: an error
	}{
		{"a board", map[string]string{serial: "10000000abcdef01\x00", machine: "m\n"}, "10000000abcdef01"},
		{"a PC", map[string]string{machine: "0123456789abcdef0123456789abcdef\n"}, "0123456789abcdef0123456789abcdef"},
		{"a board without serial", map[string]string{serial: "0000000000000000\x00", machine: "m\n"}, "m"},
		{"an image never started", map[string]string{machine: "uninitialized\n"}, ""},
		{"nothing", nil, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			for name, text := range tt.files {
				file := filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got, err := agent.HardwareID(root)
			if string(got) != tt.want || (err != nil) != (tt.want == "") {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
		})
	}
}

func TestNodeID(t *testing.T) {
	tests := []struct{ host, want string }{
		{"raspberrypi", "raspberrypi-8076ce"},
		{"pi.example.org", "pi-8076ce"},
		{"Küche", "K-che-8076ce"},
		{"", "node-8076ce"},
		{"a123456789b123456789c123456789d123456789e123456789f123456789g123", "a123456789b123456789c123456789d123456789e123456789f123456-8076ce"},
	}
	for _, tt := range tests {
		t.Run(tt.host, func(t *testing.T) {
			got := agent.NodeID(tt.host, []byte("10000000abcdef01"))
			if got != tt.want || !config.ValidID(got) {
				t.Errorf("got %q (valid: %v), want %q", got, config.ValidID(got), tt.want)
			}
		})
	}
}
