package agent

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"strings"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/control"
	"github.com/litefs-agent/litefs-agent/ltx"
	"github.com/litefs-agent/litefs-agent/service"
	"github.com/litefs-agent/litefs-agent/store"
)

// Run is the node's service: it recovers, restores, mounts, ships and serves
// until ctx ends.
func Run(ctx context.Context, cfg Config, opts Options) (err error) {
	log := opts.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	backlog := int64(cfg.Sync.Budget)
	if len(cfg.Hub.URL) == 0 {
		backlog = 0 // a node that stands alone owes nobody anything
	}
	core, err := service.Open(service.Options{
		DataDir: cfg.Node.Data, UnsafeData: opts.UnsafeData, ID: cfg.Node.ID, FallbackID: DefaultID,
		Mount: cfg.Mount, Watcher: opts.Watcher, Socket: cfg.Status.Socket, Budget: backlog, Log: log,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, core.Close()) }()
	link, err := newLink(cfg, opts, core, log)
	if err != nil {
		return err
	}
	if err := core.Serve(&answers{core, opts.Version, link}); err != nil {
		return err
	}
	st, err := core.Recover(store.Options{
		Durability: store.Durability{Commit: cfg.Sync.Durability.EveryCommit, After: cfg.Sync.Durability.AtLatest.Std()},
		Flush:      cfg.Sync.Flush.Std(), History: cfg.Sync.History.Std(),
		BacklogStep: cfg.Sync.BacklogStep.Std(),
		Budget:      int64(cfg.Sync.Budget), Memory: int64(cfg.Sync.Memory),
		FileMode: uint32(cfg.Mount.FileMode),
		Reserved: func(name string) bool { return name == "nodes" || strings.HasPrefix(name, "nodes/") },
		Lag:      link.Lag,
		Shipping: len(cfg.Hub.URL) > 0,
	})
	if err != nil || ctx.Err() != nil {
		return err
	}
	link.Attach(st)
	if err := restore(ctx, cfg.Node.Restore, link, core, log); err != nil || ctx.Err() != nil {
		return err
	}
	if err := core.Mount(ctx); err != nil || ctx.Err() != nil {
		return err
	}
	if opts.Ready != nil {
		opts.Ready()
	}
	ctx, stop := context.WithCancel(ctx)
	shipped := make(chan struct{})
	go func() {
		defer close(shipped)
		link.Run(ctx)
	}()
	err = core.Wait(ctx)
	stop() // first shipping ends, then the mount and the engine
	<-shipped
	return err
}

func newLink(cfg Config, opts Options, core *service.Core, log *slog.Logger) (*Link, error) {
	var list []Endpoint
	for _, url := range cfg.Hub.URL {
		d, err := opts.Dial(url)
		if err != nil {
			return nil, fmt.Errorf("hub.url: %w", err)
		}
		list = append(list, Endpoint{url, d})
	}
	var hardware uint64
	if id, err := HardwareID("/"); err == nil {
		h := fnv.New64a()
		_, _ = h.Write(id)
		hardware = h.Sum64()
	}
	return NewLink(LinkOptions{
		Endpoints: list, ID: core.ID, Hardware: hardware, Version: opts.Version,
		FS: core.Data.FS, Rate: int64(cfg.Sync.Rate), Emit: core.Emit, Log: log,
	})
}

// tryFor is how long restore = "try" asks the hub.
const tryFor = 60 * time.Second

// restore asks the hub for what it has, where the data folder holds no database
// or an earlier restore did not end.
func restore(ctx context.Context, how string, link *Link, core *service.Core, log *slog.Logger) error {
	pending, err := link.RestorePending()
	if err != nil {
		return err
	}
	if how == "off" || len(link.opt.Endpoints) == 0 || !pending {
		return nil
	}
	log.Info("the data folder is empty: asking the hub for what it has", "restore", how)
	try := ctx
	if how == "try" {
		var cancel context.CancelFunc
		try, cancel = context.WithTimeout(ctx, tryFor)
		defer cancel()
	}
	n, err := link.Restore(try)
	switch {
	case ctx.Err() != nil:
		return nil
	case err != nil && how == "try" && n == 0 && len(core.Store().DBs()) == 0:
		log.Warn("the hub did not answer: starting empty", "err", err)
		return link.RestoreDone()
	case err != nil:
		return fmt.Errorf("restore from the hub: %w", err)
	}
	log.Info("restored from the hub", "databases", n)
	return nil
}

// answers is the node's control.Service.
type answers struct {
	*service.Core
	version string
	link    *Link
}

var _ control.Service = (*answers)(nil)

// Wait implements control.Service.
func (a *answers) Wait(ctx context.Context, db string, txid ltx.TXID, acked bool) error {
	return a.WaitFor(ctx, db, txid, func(db *store.DB, txid ltx.TXID) bool {
		if !acked {
			return service.Applied(db, txid)
		}
		return db.Acked().TXID >= txid
	})
}

// Status implements control.Service.
func (a *answers) Status(context.Context) any {
	problems := a.Problems()
	s := control.StatusNode{
		Role: "node", ID: a.ID, Version: a.version, Healthy: len(problems) == 0, Problems: problems,
		Hub: a.link.Status(), Mount: a.MountStatus(), Databases: []control.StatusDatabase{},
		Card: a.Card(), Memory: service.Memory(),
	}
	if site := a.link.Site(); site != "" {
		s.Site = &site
	}
	st := a.Store()
	if st == nil {
		return s
	}
	for _, db := range st.DBs() {
		if !db.Exists() {
			continue
		}
		d := service.Database(db, a.ID, "primary")
		if s.Hub.State != control.LinkOff {
			service.Backlog(&d, db)
		}
		s.Databases = append(s.Databases, d)
	}
	return s
}
