package agent

import "log/slog"

// Options are what Run takes besides the configuration.
type Options struct {
	Version    string       // of the program, for status and hello
	UnsafeData bool         // accept a data folder on a file system that may lose data
	SkipSync   bool         // do not wait for a first copy of hub-owned databases
	Ready      func()       // called once: mounted, restored, and unless SkipSync synced; may be nil
	Watcher    []string     // command that runs fuse.Watch with arguments added; empty: no watcher of the mount
	Log        *slog.Logger // nil discards
}
