package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/user"

	"github.com/litefs-agent/litefs-agent/fuse"
	"github.com/litefs-agent/litefs-agent/internal/config"
	"github.com/litefs-agent/litefs-agent/service"
	"github.com/litefs-agent/litefs-agent/store"
)

// Run is the node's service: it recovers, mounts, ships and serves until ctx
// ends.
func Run(ctx context.Context, cfg Config, opts Options) (err error) {
	log := opts.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	data, err := service.OpenData(cfg.Node.Data, opts.UnsafeData, log)
	if err != nil {
		return err
	}
	defer data.Close()
	id, err := data.ID(cfg.Node.ID, DefaultID)
	if err != nil {
		return err
	}
	st, err := store.Open(store.Options{
		FS: data.FS, Node: id, Logger: log,
		Durability: store.Durability{Commit: cfg.Sync.Durability.EveryCommit, After: cfg.Sync.Durability.AtLatest.Std()},
		Flush:      cfg.Sync.Flush.Std(), History: cfg.Sync.History.Std(),
		Budget: int64(cfg.Sync.Budget), Memory: int64(cfg.Sync.Memory),
		Shipping: len(cfg.Hub.URL) > 0,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	group := cfg.Mount.Group
	if group == config.DefaultGroup {
		if _, lookupErr := user.LookupGroup(group); lookupErr != nil {
			group = ""
		}
	}
	srv, err := fuse.Mount(ctx, st, fuse.Options{
		Dir: cfg.Mount.Dir, Method: cfg.Mount.Method, Group: group,
		FileMode: uint32(cfg.Mount.FileMode), DirMode: uint32(cfg.Mount.DirMode),
		AllowOther: true, Logger: log,
	})
	if err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	log.Info("mounted", "dir", cfg.Mount.Dir, "method", srv.Method())
	if opts.Ready != nil {
		opts.Ready()
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.Wait() }()
	select {
	case <-ctx.Done():
		return srv.Close()
	case err := <-ended:
		return err
	}
}
