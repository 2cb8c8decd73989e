package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/user"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/litefs-agent/litefs-agent/fuse"
	"github.com/litefs-agent/litefs-agent/internal/config"
	"github.com/litefs-agent/litefs-agent/internal/control"
	"github.com/litefs-agent/litefs-agent/store"
)

// Options configure a Core.
type Options struct {
	DataDir    string
	UnsafeData bool
	ID         string                 // configured; may be empty
	FallbackID func() (string, error) // where neither the configuration nor the data folder names one
	Mount      config.Mount           // Dir empty: none
	Socket     string
	Budget     int64    // bytes of backlog up to which the service is healthy
	Watcher    []string // command of the mount's watcher (fuse.Watch); empty: none
	Log        *slog.Logger
}

// A Core is a service's data folder, engine, mount and control socket. It is
// brought up in this order, and taken down in the other:
//
//	Open ─► Serve ─► Recover ─► Mount ─► ... ─► Close
//
// The socket answers from Serve on, what needs the engine with an error until
// Recover has returned.
type Core struct {
	ID   string // set by Open
	Data *Data  // set by Open

	opt     Options
	log     *slog.Logger
	changes changes
	events  events

	st         atomic.Pointer[store.Store]
	srv        *fuse.Server // owned by who calls Mount and Close
	mountState atomic.Pointer[string]

	stopSocket context.CancelFunc // set by Serve
	socketDone chan struct{}      // set by Serve; closed when the socket is gone
}

// ErrStarting is the answer to what needs the engine before it has recovered.
var ErrStarting = errors.New("the service is starting: it recovers its databases")

// Open opens and locks the data folder and finds the service's id.
func Open(opt Options) (*Core, error) {
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	data, err := OpenData(opt.DataDir, opt.UnsafeData, opt.Log)
	if err != nil {
		return nil, err
	}
	c := &Core{Data: data, opt: opt, log: opt.Log}
	c.setMountState(control.MountStarting)
	if opt.Mount.Dir == "" {
		c.setMountState(control.MountOff)
	}
	if c.ID, err = data.ID(opt.ID, opt.FallbackID); err != nil {
		data.Close()
		return nil, err
	}
	return c, nil
}

// Serve answers the commands at the socket from now on. The socket belongs to
// the mount's group.
func (c *Core) Serve(answers control.Service) error {
	gid := -1
	if group := mountGroup(c.opt.Mount.Group); group != "" {
		var err error
		if gid, err = groupID(group); err != nil {
			return fmt.Errorf("control socket: %w", err)
		}
	}
	srv, err := control.Listen(answers, control.Options{Path: c.opt.Socket, GID: gid, Log: c.log})
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	c.stopSocket, c.socketDone = stop, make(chan struct{})
	go func() {
		defer close(c.socketDone)
		if err := srv.Run(ctx); err != nil {
			c.log.Error("control socket failed", "err", err)
		}
	}()
	return nil
}

// mountGroup is the group that the configuration means: a missing default group
// is none.
func mountGroup(group string) string {
	if group == config.DefaultGroup {
		if _, err := user.LookupGroup(group); err != nil {
			return ""
		}
	}
	return group
}

func groupID(group string) (int, error) {
	if n, err := strconv.ParseUint(group, 10, 31); err == nil {
		return int(n), nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(g.Gid)
}

// Recover opens the engine. opt needs no FS, Node and Logger.
func (c *Core) Recover(opt store.Options) (*store.Store, error) {
	opt.FS, opt.Node, opt.Logger = c.Data.FS, c.ID, c.log
	st, err := store.Open(opt)
	if err != nil {
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
			err = fmt.Errorf("%w; nothing is lost: free some space there and start again", err)
		}
		return nil, fmt.Errorf("recover the data folder %s: %w", c.opt.DataDir, err)
	}
	st.Watch(func(*store.DB) { c.changes.happened() })
	st.OnEvent(c.EmitDatabase)
	c.st.Store(st)
	return st, nil
}

// Mount shows the engine at the mount point. Without one it does nothing.
func (c *Core) Mount(ctx context.Context) error {
	m := c.opt.Mount
	if m.Dir == "" {
		return nil
	}
	others := fuse.MayAllowOther()
	if !others {
		c.log.Warn("the mount is for this user alone: a line user_allow_other in /etc/fuse.conf admits others", "dir", m.Dir)
	}
	srv, err := fuse.Mount(ctx, c.st.Load(), fuse.Options{
		Dir: m.Dir, Method: m.Method, Group: mountGroup(m.Group),
		FileMode: uint32(m.FileMode), DirMode: uint32(m.DirMode),
		AllowOther: others, Logger: c.log,
		Watcher: c.opt.Watcher, WatcherLock: c.Data.LockFile(),
		OnPanic: func(node store.Node) { c.st.Load().FenceNode(node, errors.New("a request panicked")) },
	})
	if err != nil {
		c.setMountState(control.MountFailed)
		return fmt.Errorf("mount %s: %w", m.Dir, err)
	}
	c.srv = srv
	c.setMountState(control.MountMounted)
	c.log.Info("mounted", "dir", m.Dir, "method", srv.Method())
	return nil
}

// Wait returns nil when ctx ends, or an error when the mount does.
func (c *Core) Wait(ctx context.Context) error {
	if c.srv == nil {
		<-ctx.Done()
		return nil
	}
	ended := make(chan error, 1)
	go func() { ended <- c.srv.Wait() }() // ends at Close at the latest
	select {
	case <-ctx.Done():
		return nil
	case err := <-ended:
		c.setMountState(control.MountFailed)
		if err == nil {
			err = fuse.ErrUnmounted
		}
		return fmt.Errorf("mount %s: %w", c.opt.Mount.Dir, err)
	}
}

// Close unmounts, closes the engine, the socket and the data folder: whatever
// there is of them.
func (c *Core) Close() error {
	var errs []error
	if c.srv != nil {
		if err := c.srv.Close(); err != nil && !errors.Is(err, fuse.ErrUnmounted) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", c.opt.Mount.Dir, err))
		}
		c.srv = nil
	}
	if c.stopSocket != nil {
		c.stopSocket() // before the engine goes, that requests in progress end
		<-c.socketDone
	}
	if st := c.st.Load(); st != nil {
		if err := st.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close the data folder: %w", err))
		}
	}
	return errors.Join(append(errs, c.Data.Close())...)
}

// Store returns the engine, nil before Recover.
func (c *Core) Store() *store.Store { return c.st.Load() }

// Changed tells those that wait for a position to look again.
func (c *Core) Changed() { c.changes.happened() }

func (c *Core) setMountState(s string) { c.mountState.Store(&s) }

// changes wakes all that wait for something to happen in the engine. It costs
// next to nothing while nobody waits.
type changes struct {
	mu   sync.Mutex
	next chan struct{} // nil while nobody waits
}

// wait returns a channel that is closed at the next change. Look at the state
// after calling it.
func (c *changes) wait() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.next == nil {
		c.next = make(chan struct{})
	}
	return c.next
}

func (c *changes) happened() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.next != nil {
		close(c.next)
		c.next = nil
	}
}
