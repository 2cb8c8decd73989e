package service

import (
	"context"
	"fmt"
	"io"

	"github.com/litefs-agent/litefs-agent/internal/control"
	"github.com/litefs-agent/litefs-agent/ltx"
	"github.com/litefs-agent/litefs-agent/store"
)

// This file answers the commands that node and hub answer alike.

func (c *Core) db(name string) (*store.DB, error) {
	st := c.st.Load()
	if st == nil {
		return nil, ErrStarting
	}
	db := st.DB(name)
	if db == nil {
		return nil, fmt.Errorf("%s: %w", name, control.ErrNoDatabase)
	}
	return db, nil
}

// WaitFor returns when db has reached txid by reached, which is called again
// after each change in the engine. txid 0 is the present one.
func (c *Core) WaitFor(ctx context.Context, name string, txid ltx.TXID, reached func(*store.DB, ltx.TXID) bool) error {
	db, err := c.db(name)
	if err != nil {
		return err
	}
	if txid == 0 {
		txid = db.Pos().TXID
	}
	for {
		changed := c.changes.wait()
		// A database dropped and made again is another object with the same history.
		if db, err = c.db(name); err != nil {
			return err
		}
		if reached(db, txid) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Applied reports whether db has reached txid here.
func Applied(db *store.DB, txid ltx.TXID) bool { return db.Pos().TXID >= txid }

// Export implements control.Service.
func (c *Core) Export(ctx context.Context, name string, w io.Writer) error {
	db, err := c.db(name)
	if err != nil {
		return err
	}
	if !db.Exists() {
		return fmt.Errorf("%s: dropped: %w", name, control.ErrNoDatabase)
	}
	img, err := db.Snapshot()
	if err != nil {
		return err
	}
	defer img.Close()
	_, err = img.WriteTo(contextWriter{ctx, w})
	return err
}

// Import implements control.Service.
func (c *Core) Import(ctx context.Context, name string, r io.Reader) error {
	st := c.st.Load()
	if st == nil {
		return ErrStarting
	}
	db, err := st.Import(name, r)
	if err == nil {
		c.log.Info("database imported", "db", name, "pos", db.Pos())
	}
	return err
}

// contextWriter ends a long copy when the client has gone.
type contextWriter struct {
	ctx context.Context
	w   io.Writer
}

func (w contextWriter) Write(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, context.Cause(w.ctx)
	}
	return w.w.Write(p)
}

// Verify implements control.Service.
func (c *Core) Verify(ctx context.Context, name string, report func(control.Check)) error {
	st := c.st.Load()
	if st == nil {
		return ErrStarting
	}
	list := st.DBs()
	if name != "" {
		db, err := c.db(name)
		if err != nil {
			return err
		}
		list = []*store.DB{db}
	}
	for _, db := range list {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		verify(db, report)
	}
	return nil
}

func verify(db *store.DB, report func(control.Check)) {
	problem := func(err error) *string {
		if err == nil {
			return nil
		}
		text := err.Error()
		return &text
	}
	info := db.Info()
	size := int64(info.Commit) * int64(info.PageSize)
	report(control.Check{DB: db.Name(), Object: "database", Total: max(size, 1), OK: true})
	pos, err := db.VerifyPages()
	text := pos.String()
	report(control.Check{DB: db.Name(), Object: "database", Pos: &text, Done: size, Total: size, OK: err == nil, Problem: problem(err)})
	_, bytes, err := db.VerifyRecords()
	text = db.Pos().String()
	report(control.Check{DB: db.Name(), Object: "records", Pos: &text, Done: bytes, Total: bytes, OK: err == nil, Problem: problem(err)})
}

// ExportLTX implements control.Service.
func (c *Core) ExportLTX(ctx context.Context, name string, create control.CreateFunc) error {
	db, err := c.db(name)
	if err != nil {
		return err
	}
	return db.EachRecord(func(min, max ltx.TXID, size int64, body io.Reader) error {
		w, err := create(ltx.FormatFilename(min, max), size)
		if err != nil {
			return err
		}
		_, err = io.Copy(contextWriter{ctx, w}, body)
		return err
	})
}
