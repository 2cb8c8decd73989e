package agent

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/config"
	"github.com/litefs-agent/litefs-agent/internal/control"
	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/store"
	"github.com/litefs-agent/litefs-agent/transport"
)

// An Endpoint is one way to the hub.
type Endpoint struct {
	URL    string
	Dialer transport.Dialer
}

// LinkOptions configure a Link.
type LinkOptions struct {
	Endpoints []Endpoint // tried in turn
	ID        string     // of the node
	Hardware  uint64     // hash of what tells this board from others
	Version   string     // of the program
	FS        disk.FS    // data folder, where site and session number are kept
	Rate      int64      // bytes a second towards the hub; 0: no limit
	// CompactFrom is how many records must wait for a run of them to be sent as
	// one; 0 is 64, below 0 means never.
	CompactFrom int
	// MinBackoff and MaxBackoff bound the pause between attempts; default 1 s and
	// 5 min.
	MinBackoff, MaxBackoff time.Duration
	Emit                   func(control.Event) // told when the link's state changes; must not block; nil: nobody
	Log                    *slog.Logger        // nil discards
}

// A Link ships the databases of an engine to the hub: it dials, and dials again,
// and in each session sends what the hub lacks.
type Link struct {
	opt  LinkOptions
	log  *slog.Logger
	st   *store.Store
	rate bucket

	mu      sync.Mutex // guards what follows
	kept    linkState
	url     string
	state   string // control.LinkConnected, ...
	err     error  // why it is not connected
	retryAt time.Time
	heard   time.Time // when the last session ended; zero before the first word
	conn    transport.Conn
	session *session // that of the moment, to be told of changes
}

// linkState is what a node remembers of its hub, in the file "link.json".
type linkState struct {
	Site    string `json:"site"` // 32 hex digits; pinned at first contact
	Session uint64 `json:"session"`
}

const linkFile = "link.json"

// NewLink reads what is kept of earlier sessions.
func NewLink(opt LinkOptions) (*Link, error) {
	if opt.CompactFrom == 0 {
		opt.CompactFrom = 64
	}
	if opt.MinBackoff == 0 {
		opt.MinBackoff = time.Second
	}
	if opt.MaxBackoff == 0 {
		opt.MaxBackoff = 5 * time.Minute
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	l := &Link{opt: opt, log: opt.Log, state: control.LinkConnecting}
	if len(opt.Endpoints) == 0 {
		l.state = control.LinkOff
	}
	l.rate.perSecond = float64(opt.Rate)
	b, err := disk.ReadFile(opt.FS, linkFile, 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &l.kept)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s in the data folder: %w", linkFile, err)
	}
	return l, nil
}

// Attach gives the link its engine, once, before Run.
func (l *Link) Attach(st *store.Store) {
	l.mu.Lock()
	l.st = st
	l.mu.Unlock()
	st.Watch(func(db *store.DB) {
		l.mu.Lock()
		s := l.session
		l.mu.Unlock()
		if s != nil {
			s.changed(db)
		}
	})
}

// Status describes the link.
func (l *Link) Status() control.StatusLink {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := control.StatusLink{State: l.state}
	if l.url != "" {
		s.URL = &l.url
	} else if len(l.opt.Endpoints) > 0 {
		s.URL = &l.opt.Endpoints[0].URL
	}
	if l.err != nil {
		text := l.err.Error()
		s.Error = &text
	}
	if !l.retryAt.IsZero() {
		at := l.retryAt.UTC()
		s.RetryAt = &at
	}
	if d, ok := l.lagLocked(); ok {
		ms := d.Milliseconds()
		s.LastHeardMS = &ms
	}
	return s
}

// Site returns the site as 32 hex digits, "" before the first contact.
func (l *Link) Site() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.kept.Site
}

// Lag returns the time since the hub was last heard; ok is false before the first
// word in this life of the agent.
func (l *Link) Lag() (time.Duration, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lagLocked()
}

func (l *Link) lagLocked() (time.Duration, bool) {
	if l.conn != nil {
		return l.conn.Stats().LastHeard, true
	}
	return time.Since(l.heard), !l.heard.IsZero()
}

// Run keeps a session with the hub until ctx ends.
func (l *Link) Run(ctx context.Context) {
	if len(l.opt.Endpoints) == 0 {
		return
	}
	l.keep(ctx, func(ctx context.Context, c transport.Conn, w *transport.Welcome) error {
		if err := l.catchUp(ctx, c, w); err != nil {
			return err
		}
		return l.ship(ctx, c, w)
	}, false)
}

// keep dials until it has a session, hands it to serve, and again, until ctx
// ends or serve returns errDone.
func (l *Link) keep(ctx context.Context, serve func(context.Context, transport.Conn, *transport.Welcome) error, restore bool) {
	backoff := l.opt.MinBackoff
	for i := 0; ctx.Err() == nil; i++ {
		e := l.opt.Endpoints[i%len(l.opt.Endpoints)]
		began := time.Now()
		welcomed, err := l.once(ctx, e, serve, restore)
		if errors.Is(err, errDone) || ctx.Err() != nil {
			return
		}
		switch {
		case errors.Is(err, transport.ErrRefused):
			backoff = l.opt.MaxBackoff
		case welcomed && time.Since(began) > backoff:
			backoff = l.opt.MinBackoff
		}
		pause := jitter(backoff)
		if bye, ok := errors.AsType[*transport.ByeError](err); ok && bye.RetryAfter > pause {
			pause = jitter(bye.RetryAfter)
		}
		if next := (i + 1) % len(l.opt.Endpoints); next != 0 && !welcomed {
			pause = jitter(l.opt.MinBackoff) // there are more to try
		} else {
			backoff = min(2*backoff, l.opt.MaxBackoff)
		}
		l.down(err, time.Now().Add(pause), welcomed)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// errDone ends keep.
var errDone = errors.New("done")

// jitter returns something between d/2 and d.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }

// down notes that there is no session. An outage is logged when it starts.
func (l *Link) down(err error, retryAt time.Time, welcomed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if welcomed || l.err == nil || errors.Is(err, transport.ErrRefused) != errors.Is(l.err, transport.ErrRefused) {
		l.log.Warn("no link to the hub; trying again", "peer", l.url, "err", err)
		l.emitLocked(control.LinkConnecting, err)
	}
	l.state, l.err, l.retryAt = control.LinkConnecting, err, retryAt
}

// emitLocked tells of a new state.
func (l *Link) emitLocked(state string, err error) {
	if l.opt.Emit == nil {
		return
	}
	e := control.Event{Time: time.Now().UTC(), Event: control.EventLink, URL: config.Redact([]string{l.url})[0], State: state}
	if err != nil {
		e.Error = err.Error()
	}
	l.opt.Emit(e)
}

// once dials e, follows one referral, and serves the session.
func (l *Link) once(ctx context.Context, e Endpoint, serve func(context.Context, transport.Conn, *transport.Welcome) error, restore bool) (welcomed bool, err error) {
	l.mu.Lock()
	l.url, l.state = e.URL, control.LinkConnecting
	l.mu.Unlock()
	hello, err := l.hello(restore)
	if err != nil {
		return false, err
	}
	c, w, err := e.Dialer.Dial(ctx, hello)
	if err != nil {
		return false, err
	}
	if w.MovedURL != "" {
		return false, fmt.Errorf("the hub says to dial %s, which this version does not", w.MovedURL)
	}
	defer c.Close()
	if err := l.welcomed(w); err != nil {
		return true, err
	}
	l.mu.Lock()
	l.conn, l.state, l.err, l.retryAt = c, control.LinkConnected, nil, time.Time{}
	l.emitLocked(control.LinkConnected, nil)
	l.mu.Unlock()
	l.log.Info("connected to the hub", "peer", e.URL, "hub", w.Hub)
	defer func() {
		l.mu.Lock()
		l.heard = time.Now().Add(-c.Stats().LastHeard)
		l.conn, l.session = nil, nil
		l.mu.Unlock()
	}()
	return true, serve(ctx, c, w)
}

// hello describes where every database stands.
func (l *Link) hello(restore bool) (*transport.Hello, error) {
	l.mu.Lock()
	kept, st := l.kept, l.st
	l.mu.Unlock()
	h := &transport.Hello{
		Node: l.opt.ID, Hardware: l.opt.Hardware, Session: kept.Session,
		AgentVersion: l.opt.Version, Restore: restore, Site: parseSite(kept.Site),
	}
	for _, db := range st.DBs() {
		if err := db.Sync(); err != nil {
			return nil, err
		}
		info := db.Info()
		h.Databases = append(h.Databases, transport.DatabaseState{
			Name: info.Name, History: transport.History(info.History),
			Epoch: transport.Epoch(info.Epoch), Pos: info.Pos,
			Forked: info.Acked.TXID, PageSize: info.PageSize,
		})
		if len(h.Databases) == transport.MaxDatabases {
			break // the rest goes without: pushing needs no entry here
		}
	}
	return h, nil
}

// welcomed checks the hub's site against the pinned one, and keeps what is to be
// known in the next session.
func (l *Link) welcomed(w *transport.Welcome) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	kept := linkState{Site: w.Site.String(), Session: w.Session}
	if l.kept.Site != "" && l.kept.Site != kept.Site {
		return fmt.Errorf("the hub is of site %s, this node belongs to site %s: it gets nothing; "+
			"start the hub with --site %s if it lost its data, or this node with an empty data folder", kept.Site, l.kept.Site, l.kept.Site)
	}
	b, err := json.Marshal(kept)
	if err == nil {
		err = disk.WriteFileAtomic(l.opt.FS, linkFile, b)
	}
	if err != nil {
		return fmt.Errorf("keep the session number: %w", err)
	}
	l.kept = kept
	return nil
}

func parseSite(text string) (site transport.Site) {
	b, _ := hex.DecodeString(text) // what we wrote ourselves
	copy(site[:], b)
	return site
}

// A bucket limits a rate. Its zero value does not.
type bucket struct {
	perSecond float64

	mu    sync.Mutex // guards what follows
	level float64    // bytes that may be sent; below 0: debt
	at    time.Time
}

// take waits until n bytes may be sent. What is urgent may run up a second's debt.
func (b *bucket) take(ctx context.Context, n int, urgent bool) error {
	if b.perSecond <= 0 {
		return nil
	}
	b.mu.Lock()
	now := time.Now()
	if !b.at.IsZero() {
		b.level = min(b.perSecond/4, b.level+b.perSecond*now.Sub(b.at).Seconds())
	}
	b.at = now
	b.level -= float64(n)
	debt := -b.level
	if urgent {
		debt -= b.perSecond
	}
	b.mu.Unlock()
	if debt <= 0 {
		return nil
	}
	select {
	case <-time.After(time.Duration(debt / b.perSecond * float64(time.Second))):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
