package main

import (
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// Set by the linker in 'make build'.
var version, commit string

// buildInfo is what 'version --json' prints.
type buildInfo struct {
	Version  string  `json:"version"`
	Commit   *string `json:"commit"` // null if the build did not know
	Platform string  `json:"platform"`
	Go       string  `json:"go"`
}

// readBuildInfo takes what the linker was not told from the Go tool's stamp.
func readBuildInfo() buildInfo {
	info := buildInfo{Version: version, Platform: runtime.GOOS + "/" + runtime.GOARCH, Go: runtime.Version()}
	revision := commit
	if build, ok := debug.ReadBuildInfo(); ok {
		if info.Version == "" {
			info.Version = build.Main.Version
		}
		for _, setting := range build.Settings {
			switch {
			case setting.Key == "vcs.revision" && revision == "":
				revision = setting.Value
			case setting.Key == "GOARM":
				info.Platform += "/v" + setting.Value
			}
		}
	}
	if info.Version == "" {
		info.Version = "unknown"
	}
	if revision != "" {
		info.Commit = &revision
	}
	return info
}

func newVersion(a *app) *cobra.Command {
	return a.jsonFlag(&cobra.Command{
		Use:   "version",
		Short: "print version, commit and platform",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			info := readBuildInfo()
			if a.json {
				return printJSON(a.stdout, info)
			}
			text := "litefs-agent " + info.Version
			if info.Commit != nil {
				text += " commit " + *info.Commit
			}
			_, err := fmt.Fprintf(a.stdout, "%s %s %s\n", text, info.Platform, info.Go)
			return err
		},
	})
}

// printJSON writes value for programs that read --json, and people.
func printJSON(w io.Writer, value any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(value)
}
