//go:build !nohub

package main

import (
	"context"
	"errors"
	"strings"

	"github.com/spf13/cobra"

	"github.com/litefs-agent/litefs-agent/hub"
	"github.com/litefs-agent/litefs-agent/internal/config"
)

// runHub is the hub's service.
func runHub(context.Context, hub.Config, hub.Options) error {
	return errors.New("hub: this build does not have the service")
}

// addHub adds what only a hub needs; a build with tag nohub leaves it out.
func addHub(a *app, root *cobra.Command) { root.AddCommand(newHub(a)) }

func newHub(a *app) *cobra.Command {
	var file, site string
	cmd := &cobra.Command{
		Use:   "hub",
		Short: "run the hub's service in the foreground",
		Long: `hub takes the records of the nodes, makes them durable, and keeps every database
with its history. It runs until SIGTERM or SIGINT.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if site != "" && !isHex(site, 32) {
				return usagef("--site %q: must be 32 lower-case hex digits", site)
			}
			cfg, err := hub.LoadConfig(file, a.env)
			if err != nil {
				return err
			}
			ctx, stop := stopContext(cmd.Context())
			defer stop()
			return runHub(ctx, cfg, hub.Options{Version: readBuildInfo().Version, Site: site, Watcher: watcher(), Log: newLogger(a, cfg.Log)})
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration `FILE` (default "+hub.ConfigFile+")")
	cmd.Flags().StringVar(&site, "site", "", "`ID` of the site, for a hub that has lost everything")
	return cmd
}

// hubConfigKind is the hub's configuration, for the config commands.
func hubConfigKind() *configKind {
	return &configKind{
		name: "hub", file: hub.ConfigFile,
		load: func(file string, env config.LookupEnv) (loadedConfig, error) { return hub.LoadConfig(file, env) },
	}
}

// isHex reports whether text is n lower-case hex digits.
func isHex(text string, n int) bool {
	return len(text) == n && strings.Trim(text, "0123456789abcdef") == ""
}
