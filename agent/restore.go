package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/store"
	"github.com/litefs-agent/litefs-agent/transport"
)

// restoreFile marks a data folder whose databases are to come back from the hub,
// until all of them are there.
const restoreFile = "restoring"

// RestorePending reports whether the data folder holds no database, or only some
// of those that the hub has. It leaves a mark, for the case that the restore is
// interrupted.
func (l *Link) RestorePending() (bool, error) {
	_, err := l.opt.FS.Stat(restoreFile)
	if err == nil {
		return true, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if len(l.st.DBs()) > 0 || len(l.opt.Endpoints) == 0 {
		return false, nil
	}
	return true, nil
}

// RestoreDone removes the mark of Restore.
func (l *Link) RestoreDone() error {
	err := l.opt.FS.Remove(restoreFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = l.opt.FS.SyncDir(".")
	}
	return err
}

// Restore brings back every database that the hub has of this node, and returns
// their number. It tries until ctx ends.
func (l *Link) Restore(ctx context.Context) (n int, err error) {
	var last error
	l.keep(ctx, func(ctx context.Context, c transport.Conn, w *transport.Welcome) error {
		if len(w.Databases) > 0 {
			// From here on an empty folder is a folder half restored.
			if last = disk.WriteFileAtomic(l.opt.FS, restoreFile, nil); last != nil {
				return last
			}
		}
		n = 0
		for _, d := range w.Databases {
			if d.Owner != transport.OwnerNode {
				continue
			}
			if last = l.fetch(ctx, c, d); last != nil {
				return last
			}
			n++
		}
		last = errDone
		return errDone
	}, true)
	switch {
	case errors.Is(last, errDone):
		return n, l.RestoreDone()
	case last == nil:
		last = l.lastErr()
	}
	return n, errors.Join(ctx.Err(), last)
}

func (l *Link) lastErr() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// fetch brings back one database.
func (l *Link) fetch(ctx context.Context, c transport.Conn, d transport.DatabaseState) error {
	if db := l.st.DB(d.Name); db != nil {
		if info := db.Place(); info.History == uint64(d.History) && info.Pos == d.Pos {
			return nil // from a restore that was interrupted
		}
	}
	if err := c.Send(ctx, &transport.Subscribe{Name: d.Name, Snapshot: true}); err != nil {
		return err
	}
	f, err := l.opt.FS.CreateTemp(".")
	if err != nil {
		return err
	}
	defer f.Close()
	p, size, err := receiveRecord(ctx, c, d.Name, f)
	if err != nil {
		return fmt.Errorf("restore %s: %w", d.Name, err)
	}
	began := time.Now()
	db, err := l.st.Apply(store.Incoming{
		Name: d.Name, History: uint64(p.History), Epoch: store.Epoch(p.Epoch), Replace: true, LTX: f, Size: size,
	})
	if err == nil {
		err = db.Sync()
	}
	if err == nil {
		err = db.SetAcked(p.Pos())
	}
	if err != nil {
		return fmt.Errorf("restore %s: %w", d.Name, err)
	}
	l.log.Info("database restored from the hub", "db", d.Name, "pos", p.Pos(), "bytes", size, "dur", time.Since(began))
	return nil
}

// A nakError is a subscription that the hub refused.
type nakError struct{ *transport.Nak }

func (e *nakError) Error() string { return fmt.Sprintf("the hub refuses: %s: %s", e.Code, e.Text) }

// receiveRecord writes the next record that answers a subscription into f.
// Errors but a nakError end the session.
func receiveRecord(ctx context.Context, c transport.Conn, name string, f disk.File) (p *transport.Push, size int64, err error) {
	in := transport.Inbound{Max: 1}
	for {
		m, err := c.Recv(ctx)
		if err != nil {
			return nil, 0, &sessionError{err}
		}
		var b []byte
		last := false
		switch m := m.(type) {
		case *transport.Nak:
			return nil, 0, &nakError{m}
		case *transport.Push:
			if p != nil || m.Name != name {
				return nil, 0, &sessionError{fmt.Errorf("push of %s: %w", m.Name, transport.ErrCorrupt)}
			}
			if err := in.Push(m); err != nil {
				return nil, 0, &sessionError{err}
			}
			p, b, last = m, m.Payload, m.Last
		case *transport.Data:
			if known, err := in.Data(m); err != nil || known == nil {
				return nil, 0, &sessionError{errors.Join(err, transport.ErrCorrupt)}
			}
			b, last = m.Payload, m.Last
		default:
			continue
		}
		if _, err := f.WriteAt(b, size); err != nil {
			return nil, 0, &sessionError{err} // more of it is on its way
		}
		if size += int64(len(b)); last {
			return p, size, nil
		}
	}
}
