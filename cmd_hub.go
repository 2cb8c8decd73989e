//go:build !nohub

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"

	"github.com/spf13/cobra"

	"github.com/litefs-agent/litefs-agent/hub"
	"github.com/litefs-agent/litefs-agent/internal/config"
	"github.com/litefs-agent/litefs-agent/transport"
	httptransport "github.com/litefs-agent/litefs-agent/transport/http"
)

// runHub is the hub's service.
func runHub(ctx context.Context, cfg hub.Config, opts hub.Options) error {
	tuneMemory(int64(cfg.Sync.Memory))
	opts.HTTP = func(ctx context.Context, ln net.Listener, h transport.Handler, tlsConfig *tls.Config) error {
		srv := httptransport.NewServer(h, httptransport.ServerOptions{TLS: tlsConfig, Log: opts.Log})
		stop := context.AfterFunc(ctx, func() { srv.Close() })
		err := srv.Serve(ln)
		stop()
		err = errors.Join(srv.Close(), err)
		if ctx.Err() != nil && errors.Is(err, transport.ErrClosed) {
			return nil
		}
		return err
	}
	return hub.Run(ctx, cfg, opts)
}

// addHub adds what only a hub needs; a build with tag nohub leaves it out.
func addHub(a *app, root *cobra.Command) { root.AddCommand(newHub(a), newNode(a), newDemo(a)) }

func newHub(a *app) *cobra.Command {
	var file, site string
	var unsafeData bool
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
			return runHub(ctx, cfg, hub.Options{
				Version: readBuildInfo().Version, Site: site, UnsafeData: unsafeData, Watcher: watcher(), Log: newLogger(a, cfg.Log),
			})
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration `FILE` (default "+hub.ConfigFile+")")
	cmd.Flags().BoolVar(&unsafeData, "unsafe-data", false, "accept a data folder on a file system that may lose what was synced")
	cmd.Flags().StringVar(&site, "site", "", "`ID` of the site, for a hub that has lost everything")
	cmd.AddCommand(newToken(a))
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
