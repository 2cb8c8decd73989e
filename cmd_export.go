package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
)

func newExport(a *app) *cobra.Command {
	var db, output string
	var force bool
	cmd := dbFlag(&cobra.Command{
		Use:   "export --db NAME -o FILE",
		Short: "write a database as one consistent SQLite file",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return writeFile(output, force, func(w io.Writer) error {
				return a.client().Export(cmd.Context(), db, w)
			})
		},
	}, &db, true)
	outputFlags(cmd, &output, "`FILE` to write", &force)
	return cmd
}

// outputFlags gives cmd the flags -o and --force.
func outputFlags(cmd *cobra.Command, output *string, usage string, force *bool) {
	cmd.Flags().StringVarP(output, "output", "o", "", usage)
	must(cmd.MarkFlagRequired("output"))
	cmd.Flags().BoolVar(force, "force", false, "replace what exists")
}

// writeFile writes name by rename: it appears whole and synced, or not at all.
// One that exists is refused unless force.
func writeFile(name string, force bool, write func(io.Writer) error) (err error) {
	if !force && exists(name) {
		return fmt.Errorf("%s exists: choose another name, or replace it with --force", name)
	}
	temp := filepath.Join(filepath.Dir(name), fmt.Sprintf(".%s.%d.tmp", filepath.Base(name), os.Getpid()))
	file, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			file.Close()
			os.Remove(temp)
		}
	}()
	if err := write(file); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return err
	}
	return os.Rename(temp, name)
}
