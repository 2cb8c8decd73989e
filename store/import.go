package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/litefs-agent/litefs-agent/internal/disk"
)

// ErrNoSQLite: what is to be imported is no whole SQLite database.
var ErrNoSQLite = errors.New("is no whole SQLite database")

// Import makes the SQLite database that r holds the content of a database, as one
// durable transaction; where there is none of the name it is made. It waits some
// seconds for programs that use the database, and fails with ErrBusy while its
// journal or WAL is in use.
func (st *Store) Import(name string, r io.Reader) (*DB, error) {
	switch {
	case !ValidName(name) || st.opt.Reserved(name):
		return nil, fmt.Errorf("%s: %w", name, ErrReserved)
	case !st.opt.Writable(name):
		return nil, fmt.Errorf("%s: %w", name, ErrReplica)
	}
	f, err := st.fs.CreateTemp(".")
	if err != nil {
		return nil, st.noSpace(err)
	}
	defer f.Close()
	if _, err := writeBuffered(f, func(w io.Writer) error {
		_, err := io.Copy(w, r)
		return err
	}); err != nil {
		return nil, st.noSpace(fmt.Errorf("%s: %w", name, err))
	}
	c, err := wholeDatabase(f)
	if errors.Is(err, errNoDatabase) {
		return nil, fmt.Errorf("what is to be %s %w", name, ErrNoSQLite)
	}
	if err != nil {
		return nil, err
	}
	if db := st.DB(name); db != nil && db.Exists() {
		return db, db.importOver(c)
	}
	return st.importNew(name, f, c)
}

// importNew makes a database as SQLite would: a file that becomes one.
func (st *Store) importNew(name string, content disk.File, c change) (*DB, error) {
	n, h, err := st.Create(name, st.opt.FileMode, true)
	if err != nil {
		return nil, err
	}
	defer h.Release()
	f := n.(*file)
	db := st.databaseFor(f, name)
	db.flushMu.Lock()
	defer db.flushMu.Unlock()
	if err := db.flushLocked(); err != nil {
		return nil, err
	}
	db.mu.Lock()
	err = db.replace(c)
	db.mu.Unlock()
	if err != nil {
		_ = st.unlinkFile(name, f)
		return nil, err
	}
	return db, nil
}

// importOver replaces the content of a database under the locks of SQLite.
func (db *DB) importOver(c change) error {
	db.settle()
	unlock, err := db.lockReaders()
	if err != nil {
		return err
	}
	defer unlock()
	db.flushMu.Lock()
	defer db.flushMu.Unlock()
	if err := db.flushLocked(); err != nil {
		return err
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	if err := db.mayWrite(); err != nil {
		return err
	}
	if err := db.quiet(); err != nil {
		return err
	}
	c.read, err = db.counted(c)
	if err != nil {
		return err
	}
	return db.replace(c)
}

// counted returns a reader of c that gives page 1 a change counter which no
// program has seen of this database: by it SQLite knows that its cache is old.
func (db *DB) counted(c change) (func(uint32, []byte) error, error) {
	var now, next [4]byte
	page := make([]byte, c.pageSize)
	if err := c.read(1, page); err != nil {
		return nil, err
	}
	if err := db.readAt(now[:], 24); err != nil {
		return nil, err
	}
	binary.BigEndian.PutUint32(next[:], max(binary.BigEndian.Uint32(now[:]), binary.BigEndian.Uint32(page[24:]))+1)
	valid := string(page[24:28]) == string(page[92:96]) // the page count of the header counts
	return func(pgno uint32, p []byte) error {
		if err := c.read(pgno, p); err != nil || pgno != 1 {
			return err
		}
		copy(p[24:], next[:])
		if valid {
			copy(p[92:], next[:])
		}
		return nil
	}, nil
}
