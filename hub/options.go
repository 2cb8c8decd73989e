package hub

import "log/slog"

// Options are what Run takes besides the configuration.
type Options struct {
	Version    string       // of the program, for status
	Site       string       // 32 hex digits; empty: what the data folder says, else made new
	UnsafeData bool         // accept a data folder on a file system that may lose data
	HTTP       Carrier      // serves [http] listen
	Ready      func()       // called once the hub listens; may be nil
	Watcher    []string     // command that runs fuse.Watch with arguments added; empty: no watcher of the mount
	Log        *slog.Logger // nil discards
}
