package main

import (
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/litefs-agent/litefs-agent/internal/tools/mandoc"
)

var manDir = flag.String("man", "", "folder to write the man pages to ('make man')")

// Every command has its man page, with its flags.
func TestManPages(t *testing.T) {
	dir := *manDir
	if dir == "" {
		dir = t.TempDir()
	}
	root := newRoot(&app{stdout: io.Discard, stderr: io.Discard})
	// A date of the build would make two builds differ.
	if err := mandoc.Write(root, dir, time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)); err != nil {
		t.Fatal(err)
	}
	var check func(cmd *cobra.Command)
	check = func(cmd *cobra.Command) {
		if !cmd.IsAvailableCommand() && cmd.HasParent() {
			return
		}
		name := strings.ReplaceAll(cmd.CommandPath(), " ", "-") + ".1"
		page, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !strings.Contains(string(page), strings.ReplaceAll(cmd.Short, "-", `\-`)) && !strings.Contains(string(page), cmd.Short) {
			t.Errorf("%s: %v, or lacks %q", name, err, cmd.Short)
		}
		if cmd.Short == "" {
			t.Errorf("%s has no short description", cmd.CommandPath())
		}
		for _, sub := range cmd.Commands() {
			check(sub)
		}
	}
	check(root)
}
