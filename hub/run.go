package hub

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/control"
	"github.com/litefs-agent/litefs-agent/internal/reload"
	"github.com/litefs-agent/litefs-agent/internal/tlsfiles"
	"github.com/litefs-agent/litefs-agent/ltx"
	"github.com/litefs-agent/litefs-agent/service"
	"github.com/litefs-agent/litefs-agent/store"
	"github.com/litefs-agent/litefs-agent/transport"
)

// A Carrier serves sessions on a listener until ctx ends. Main provides it, so that
// the hub does not know what carries the link.
// tlsConfig is nil for cleartext.
type Carrier func(ctx context.Context, ln net.Listener, h transport.Handler, tlsConfig *tls.Config) error

// Run is the hub's service: it recovers, listens, takes records and answers
// until ctx ends.
func Run(ctx context.Context, cfg Config, opts Options) (err error) {
	log := opts.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if err := supported(cfg); err != nil {
		return err
	}
	files, err := openTLS(cfg, log)
	if err != nil {
		return err
	}
	auth, err := NewAuth(cfg, files, log)
	if err != nil {
		return err
	}
	mount := cfg.Mount
	mount.FileMode &= 0o444 // nobody writes here
	core, err := service.Open(service.Options{
		DataDir: cfg.Hub.Data, UnsafeData: opts.UnsafeData, ID: cfg.Hub.ID,
		Mount: mount, Watcher: opts.Watcher, Socket: cfg.Status.Socket, Log: log,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, core.Close()) }()
	site, err := keptSite(core.Data.FS, opts.Site, newSite)
	if err != nil {
		return err
	}
	h := &answers{Core: core, version: opts.Version, site: site.String(), auth: auth}
	if err := core.Serve(h); err != nil {
		return err
	}
	st, err := core.Recover(store.Options{
		Writable: func(string) bool { return false },
		Reserved: func(string) bool { return true },
		Writer:   writerOf,
		Lag:      func() (time.Duration, bool) { return 0, true }, // it is the hub
		FileMode: uint32(mount.FileMode), Home: true,
		Flush: cfg.Sync.Flush.Std(), Budget: int64(cfg.Sync.Budget), Memory: int64(cfg.Sync.Memory),
	})
	if err != nil || ctx.Err() != nil {
		return err
	}
	ingest, err := NewIngest(IngestOptions{
		ID: core.ID, Site: site, Store: st, FS: core.Data.FS, Hold: cfg.Hub.Divergence == "hold", Auth: auth, Told: core, Log: log,
	})
	if err != nil {
		return err
	}
	h.ingest.Store(ingest)
	if err := core.Mount(ctx); err != nil || ctx.Err() != nil {
		return err
	}
	return serve(ctx, cfg, opts, core, ingest, files, log)
}

// serve listens until ctx ends, the mount does, or listening fails.
func serve(ctx context.Context, cfg Config, opts Options, core *service.Core, ingest *Ingest, files *tlsfiles.Server, log *slog.Logger) error {
	ln, err := net.Listen("tcp", cfg.HTTP.Listen)
	if err != nil {
		return fmt.Errorf("http.listen: %w", err)
	}
	if files == nil && !loopback(ln.Addr().String()) { // a name that resolves to something else
		ln.Close()
		return fmt.Errorf("http.listen: %s is %s, which is not loopback: set http.cert and http.key, or listen on 127.0.0.1", cfg.HTTP.Listen, ln.Addr())
	}
	var tlsConfig *tls.Config
	if files != nil {
		tlsConfig = files.Config()
	}
	log.Info("listening", "addr", ln.Addr().String(), "tls", files != nil, "site", ingest.opt.Site.String())
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	carried, watched := make(chan error, 1), make(chan struct{})
	go func() {
		carried <- opts.HTTP(ctx, ln, ingest, tlsConfig)
		cancel()
	}()
	go func() {
		defer close(watched)
		reload.Watch(ctx, log, ingest.Recheck, cfg.Auth.Tokens, cfg.HTTP.ClientCA)
	}()
	if opts.Ready != nil {
		opts.Ready()
	}
	err = core.Wait(ctx)
	cancel() // first the sessions end, then the mount and the engine
	<-watched
	if cerr := <-carried; cerr != nil {
		err = errors.Join(err, fmt.Errorf("http: %w", cerr))
	}
	return err
}

// supported names what the configuration asks for and this version lacks.
func supported(cfg Config) error {
	if cfg.HTTP.Listen == "" || cfg.MQTT.Broker != "" || cfg.MQTT.Listen != "" {
		return errors.New("this version carries the link over HTTP only: set http.listen, leave mqtt.broker and mqtt.listen empty")
	}
	return nil
}

// writerOf names who writes a database at the hub's mount.
func writerOf(name string) string {
	node, _ := splitName(name)
	return node
}

func newSite() (site transport.Site) {
	_, _ = rand.Read(site[:]) // never fails
	return site
}

func parseSite(text string) (site transport.Site, err error) {
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != len(site) {
		return site, fmt.Errorf("site %q: must be 32 lower-case hex digits", text)
	}
	copy(site[:], b)
	return site, nil
}

// answers is the hub's control.Service.
type answers struct {
	*service.Core
	version string
	site    string
	auth    *Auth
	ingest  atomic.Pointer[Ingest] // nil while recovering
}

var _ control.Service = (*answers)(nil)

// Wait implements control.Service. What the hub has applied it acks.
func (a *answers) Wait(ctx context.Context, db string, txid ltx.TXID, acked bool) error {
	return a.WaitFor(ctx, db, txid, func(db *store.DB, txid ltx.TXID) bool {
		return service.Applied(db, txid) && (!acked || db.Sync() == nil)
	})
}

// Status implements control.Service.
func (a *answers) Status(context.Context) any {
	problems := a.Problems()
	s := control.StatusHub{
		Role: "hub", ID: a.ID, Site: &a.site, Version: a.version, Healthy: len(problems) == 0, Problems: append(problems, a.auth.problems()...),
		Mount: a.MountStatus(), Databases: []control.StatusDatabase{}, Nodes: []control.StatusNodeAtHub{},
		Card: a.Card(), Memory: service.Memory(),
	}
	ingest := a.ingest.Load()
	if ingest == nil {
		s.Healthy, s.Problems = false, append(s.Problems, service.ErrStarting.Error())
		return s
	}
	s.Nodes = ingest.status()
	return s
}
