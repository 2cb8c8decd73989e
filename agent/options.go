package agent

import (
	"log/slog"

	"github.com/litefs-agent/litefs-agent/transport"
)

// Options are what Run takes besides the configuration.
type Options struct {
	Version    string       // of the program, for status and hello
	UnsafeData bool         // accept a data folder on a file system that may lose data
	SkipSync   bool         // do not wait for a first copy of hub-owned databases
	Ready      func()       // called once: mounted, restored, and unless SkipSync synced; may be nil
	Watcher    []string     // command that runs fuse.Watch with arguments added; empty: no watcher of the mount
	Log        *slog.Logger // nil discards
	// Dial makes the way to the hub at a URL of [hub] url. Main provides it, so that
	// the node does not know what carries the link.
	Dial func(url string) (transport.Dialer, error)
}
