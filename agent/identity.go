package agent

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
)

// DefaultID returns the id of a node whose configuration and data folder name
// none: the host name, "-", and 6 hex digits of a hash of the board's serial,
// because fresh boards are all called raspberrypi.
func DefaultID() (string, error) {
	host, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("node id: %w", err)
	}
	hardware, err := HardwareID("/")
	if err != nil {
		return "", fmt.Errorf("node id: %w", err)
	}
	return NodeID(host, hardware), nil
}

// HardwareID returns what tells this machine from its clones, read below root:
// the board's serial, or where there is none, as on a PC, the machine-id. It is
// not printable and not for others: hash it.
func HardwareID(root string) ([]byte, error) {
	for _, name := range []string{"proc/device-tree/serial-number", "etc/machine-id"} {
		id, err := os.ReadFile(root + "/" + name)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		// The device tree ends its strings with a zero byte. A board without serial
		// has zeros; a machine-id not made yet is "uninitialized".
		id = bytes.Trim(id, "\x00\n ")
		if len(bytes.Trim(id, "0")) > 0 && string(id) != "uninitialized" {
			return id, nil
		}
	}
	return nil, errors.New("this machine has neither a board serial nor an /etc/machine-id: set [node] id, or run systemd-machine-id-setup")
}

// NodeID makes a node id of a host name and a hardware id.
func NodeID(host string, hardware []byte) string {
	host, _, _ = strings.Cut(host, ".")
	host = strings.Map(func(r rune) rune {
		if r == '-' || r == '_' || r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z' {
			return r
		}
		return '-'
	}, host)
	const maxHost = 64 - 7 // "-" and 6 digits follow
	if host = host[:min(len(host), maxHost)]; host == "" {
		host = "node"
	}
	sum := sha256.Sum256(hardware)
	return host + "-" + hex.EncodeToString(sum[:3])
}
