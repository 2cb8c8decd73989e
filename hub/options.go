package hub

import "log/slog"

// Options are what Run takes besides the configuration.
type Options struct {
	Version string       // of the program, for status and hello
	Site    string       // 32 hex digits; empty: what the data folder says, else made new
	Ready   func()       // called once the hub listens; may be nil
	Watcher []string     // command that runs fuse.Watch with arguments added; empty: no watcher of the mount
	Log     *slog.Logger // nil discards
}
