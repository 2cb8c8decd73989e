package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/litefs-agent/litefs-agent/fuse"
)

// watchCommand is what the services start beside themselves: see fuse.Watch.
const watchCommand = "watch-mount"

func newWatch(*app) *cobra.Command {
	return &cobra.Command{
		Use:    watchCommand + " HOW DIR",
		Short:  "take programs off the mount if the agent is killed; started by the agent itself",
		Hidden: true,
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usagef("%s is started by the agent alone", watchCommand)
			}
			return fuse.Watch(args)
		},
	}
}

// watcher is the command line of the mount's watcher, nil where this program
// cannot find itself.
func watcher() []string {
	exe, err := os.Executable()
	if err != nil {
		return nil
	}
	return []string{exe, watchCommand}
}
