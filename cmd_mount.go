package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/litefs-agent/litefs-agent/agent"
	"github.com/litefs-agent/litefs-agent/internal/config"
	"github.com/litefs-agent/litefs-agent/internal/tlsfiles"
	"github.com/litefs-agent/litefs-agent/transport"
	httptransport "github.com/litefs-agent/litefs-agent/transport/http"
)

// runNode is the node's service.
func runNode(ctx context.Context, cfg agent.Config, opts agent.Options) error {
	tuneMemory(int64(cfg.Sync.Memory))
	opts.Dial = func(url string) (transport.Dialer, error) {
		return newDialer(url, cfg.Hub, func() (string, error) { return agent.ReadToken(cfg.Hub.TokenFile) })
	}
	return agent.Run(ctx, cfg, opts)
}

// newDialer makes the way to the hub at a URL of the configuration. Token and
// files are read anew each time it dials.
func newDialer(rawURL string, cfg agent.HubConfig, token func() (string, error)) (*httptransport.Dialer, error) {
	u, err := url.Parse(rawURL)
	switch {
	case err != nil:
		return nil, err
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("%s: this version carries the link over http:// and https:// only", u.Redacted())
	}
	return httptransport.NewDialer(rawURL, httptransport.DialOptions{Credentials: func() (c httptransport.Credentials, err error) {
		if u.Scheme == "https" {
			if c.TLS, err = tlsfiles.Client(cfg.CA, cfg.Cert, cfg.Key); err != nil {
				return c, err
			}
		}
		c.Token, err = token()
		return c, err
	}})
}

// tuneMemory keeps the process small: memory is what boards have least of.
// budget is that of overlays, journals and WALs.
func tuneMemory(budget int64) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(100)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(16<<20 + 2*budget)
	}
}

func newMount(a *app) *cobra.Command {
	var file string
	var opts agent.Options
	cmd := &cobra.Command{
		Use:   "mount [flags] [-- CMD ARGS...]",
		Short: "run the node's service in the foreground",
		Long: `mount mounts the file system, recovers what a former life left, ships records to
the hub, and serves the other commands. It runs until SIGTERM or SIGINT.

With CMD it starts CMD once the databases are there, passes signals on to it, and
stops when CMD ends, with CMD's exit status: 128+N where signal N killed it, 125
where the service itself failed, 126 where CMD cannot be executed, 127 where it is
not found.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if dash := cmd.ArgsLenAtDash(); len(args) > 0 && dash != 0 {
				return usagef("unexpected argument %q: a program to start comes after --", args[0])
			} else if len(args) == 0 && dash == 0 {
				return usagef("a program must follow --")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, argv []string) error {
			cfg, err := agent.LoadConfig(file, a.env)
			if err != nil {
				return err
			}
			opts.Version = readBuildInfo().Version
			opts.Watcher = watcher()
			opts.Log = newLogger(a, cfg.Log)
			if len(argv) > 0 {
				return a.mountWith(cmd.Context(), cfg, opts, argv)
			}
			ctx, stop := stopContext(cmd.Context())
			defer stop()
			return runNode(ctx, cfg, opts)
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration `FILE` (default "+agent.ConfigFile+")")
	cmd.Flags().BoolVar(&opts.UnsafeData, "unsafe-data", false, "accept a data folder on a file system that may lose what was synced")
	cmd.Flags().BoolVar(&opts.SkipSync, "skip-sync", false, "do not wait for a first copy of hub-owned databases")
	return cmd
}

// mountWith runs the service around the program argv.
func (a *app) mountWith(ctx context.Context, cfg agent.Config, opts agent.Options, argv []string) error {
	ready := make(chan struct{})
	opts.Ready = sync.OnceFunc(func() { close(ready) })
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, passedOn...)
	defer signal.Stop(signals)

	service, stop := context.WithCancel(context.WithoutCancel(ctx)) // it outlives the program
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- runNode(service, cfg, opts) }()

	s := supervisor{
		argv: argv, ready: ready, ended: ended, signals: signals, log: opts.Log,
		stdin: os.Stdin, stdout: a.stdout, stderr: a.stderr,
	}
	status, err := s.run(ctx)
	stop()
	if !s.serviceEnded {
		err = errors.Join(err, <-ended)
	}
	if err != nil {
		opts.Log.Error("stopped", "err", err)
		if status == exitDone {
			status = exitOurs
		}
	}
	if status != exitDone {
		return exitError(status)
	}
	return nil
}

// stopContext ends with ctx and at SIGTERM (systemd) or SIGINT.
func stopContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
}

// newLogger returns the log of a service: on stderr, without the time where the
// journal adds its own.
func newLogger(a *app, cfg config.Log) *slog.Logger {
	var opts slog.HandlerOptions
	var level slog.Level
	must(level.UnmarshalText([]byte(cfg.Level)))
	opts.Level = level
	if _, journal := a.env("JOURNAL_STREAM"); journal {
		opts.ReplaceAttr = func(groups []string, attr slog.Attr) slog.Attr {
			if len(groups) == 0 && attr.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return attr
		}
	}
	if cfg.Format == "json" {
		return slog.New(slog.NewJSONHandler(a.stderr, &opts))
	}
	return slog.New(slog.NewTextHandler(a.stderr, &opts))
}
