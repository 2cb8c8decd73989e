package main

import (
	"bufio"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mattn/go-sqlite3"
)

// The worker is a process of its own that does what a program with SQLite does.
// It runs as an ordinary user: for root SQLite adds a chown to each journal. One
// worker holds the databases of both sides, and does one request at a time.

// A request asks the worker for something; one JSON line each.
type request struct {
	Do    string        // open, exec, tx, fill, read, scan, mixed, close, drop, version
	Side  string        // which database: ext4 | mount
	Path  string        `json:",omitempty"` // open, drop
	Mode  string        `json:",omitempty"` // open: journal mode
	SQL   string        `json:",omitempty"` // exec
	Batch int           `json:",omitempty"` // rows a transaction
	N     int           `json:",omitempty"` // operations; 0: as many as fit into For
	For   time.Duration `json:",omitempty"`
	Conns int           `json:",omitempty"` // read, mixed
	MB    int           `json:",omitempty"` // fill
}

// A reply is the worker's answer, one JSON line each.
type reply struct {
	Err     string  `json:",omitempty"`
	Ops     int     `json:",omitempty"` // transactions, queries; scan: bytes
	Seconds float64 `json:",omitempty"`
	P50     float64 `json:",omitempty"` // us
	P99     float64 `json:",omitempty"`
	Reads   int     `json:",omitempty"` // mixed: queries of the readers
	Busy    int     `json:",omitempty"`
	Text    string  `json:",omitempty"`
}

// A client is one connection with its prepared statements.
type client struct {
	conn                                *sqlite3.SQLiteConn
	begin, commit, insert, lookup, scan driver.Stmt
}

// A database is what one side has open.
type database struct {
	path, mode string
	own        *client
	readers    []*client
	rows       int // with which fill filled it
	payload    *payload
}

func work(in io.Reader, out io.Writer) error {
	open := map[string]*database{}
	requests, replies := json.NewDecoder(bufio.NewReader(in)), json.NewEncoder(out)
	for {
		var r request
		if err := requests.Decode(&r); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		got, err := serve(open, r)
		if err != nil {
			got.Err = fmt.Sprintf("%s %s %s: %v", r.Side, r.Do, r.Path, err)
		}
		if err := replies.Encode(got); err != nil {
			return err
		}
	}
}

func serve(open map[string]*database, r request) (reply, error) {
	switch r.Do {
	case "version":
		v, _, _ := sqlite3.Version()
		return reply{Text: v}, nil
	case "open":
		own, err := connect(r.Path, r.Mode)
		if err != nil {
			return reply{}, err
		}
		open[r.Side] = &database{path: r.Path, mode: r.Mode, own: own, payload: newPayload(100)}
		return reply{}, own.exec(createTable)
	case "drop":
		for _, suffix := range []string{"", "-journal", "-wal", "-shm"} {
			if err := os.Remove(r.Path + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
				return reply{}, err
			}
		}
		return reply{}, nil
	}
	db := open[r.Side]
	if db == nil {
		return reply{}, errors.New("not open")
	}
	switch r.Do {
	case "exec":
		return reply{}, db.own.exec(r.SQL)
	case "query":
		text, err := db.own.one(r.SQL)
		return reply{Text: text}, err
	case "tx":
		return db.transactions(r)
	case "fill":
		return reply{}, db.fill(r.MB)
	case "read":
		return db.reads(r)
	case "scan":
		return db.fullScan()
	case "mixed":
		return db.mixed(r)
	case "close":
		delete(open, r.Side)
		return reply{}, db.close()
	}
	return reply{}, errors.New("unknown request")
}

const createTable = `CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, v BLOB)`

func connect(path, mode string) (*client, error) {
	conn, err := (&sqlite3.SQLiteDriver{}).Open("file:" + path + "?_busy_timeout=5000&_journal_mode=" + mode)
	if err != nil {
		return nil, err
	}
	c := &client{conn: conn.(*sqlite3.SQLiteConn)}
	got, err := c.one("PRAGMA journal_mode")
	if err == nil && !strings.EqualFold(got, mode) {
		err = fmt.Errorf("journal mode is %s, not %s", got, mode)
	}
	return c, err
}

func (c *client) exec(sql string) error {
	_, err := c.conn.Exec(sql, nil)
	return err
}

// one returns the first column of the first row as text.
func (c *client) one(sql string) (string, error) {
	rows, err := c.conn.Query(sql, nil)
	if err != nil {
		return "", err
	}
	defer rows.Close()
	values := make([]driver.Value, len(rows.Columns()))
	if err := rows.Next(values); err != nil {
		return "", err
	}
	if b, ok := values[0].([]byte); ok {
		return string(b), nil
	}
	return fmt.Sprint(values[0]), nil
}

// prepare prepares the statement once.
func (c *client) prepare(stmt *driver.Stmt, sql string) (err error) {
	if *stmt == nil {
		*stmt, err = c.conn.Prepare(sql)
	}
	return err
}

func (c *client) prepareWrites() error {
	return errors.Join(c.prepare(&c.begin, `BEGIN IMMEDIATE`), c.prepare(&c.commit, `COMMIT`),
		c.prepare(&c.insert, `INSERT INTO t(v) VALUES(?)`))
}

func (c *client) prepareReads() error {
	return c.prepare(&c.lookup, `SELECT v FROM t WHERE id=?`)
}

func (c *client) close() error {
	for _, stmt := range []driver.Stmt{c.begin, c.commit, c.insert, c.lookup, c.scan} {
		if stmt != nil {
			_ = stmt.Close()
		}
	}
	return c.conn.Close()
}

func (db *database) close() (err error) {
	for _, reader := range db.readers {
		err = errors.Join(err, reader.close())
	}
	return errors.Join(err, db.own.close())
}

// write commits one transaction of batch rows.
func (db *database) write(batch int) error {
	c := db.own
	if batch == 1 {
		_, err := c.insert.Exec([]driver.Value{db.payload.next()})
		return err
	}
	if _, err := c.begin.Exec(nil); err != nil {
		return err
	}
	for range batch {
		if _, err := c.insert.Exec([]driver.Value{db.payload.next()}); err != nil {
			return errors.Join(err, c.exec(`ROLLBACK`))
		}
	}
	_, err := c.commit.Exec(nil)
	return err
}

func (db *database) transactions(r request) (reply, error) {
	if err := db.own.prepareWrites(); err != nil {
		return reply{}, err
	}
	var got []time.Duration
	start := time.Now()
	for last := start; r.N > 0 && len(got) < r.N || r.N == 0 && last.Sub(start) < r.For; {
		if err := db.write(r.Batch); err != nil {
			return reply{}, fmt.Errorf("transaction %d: %w", len(got)+1, err)
		}
		now := time.Now()
		got = append(got, now.Sub(last))
		last = now
	}
	return summary(got, time.Since(start)), nil
}

func summary(got []time.Duration, total time.Duration) reply {
	slices.Sort(got)
	r := reply{Ops: len(got), Seconds: total.Seconds()}
	if n := len(got); n > 0 {
		r.P50 = float64(got[n/2].Nanoseconds()) / 1e3
		r.P99 = float64(got[n*99/100].Nanoseconds()) / 1e3
	}
	return r
}

// fill brings the database to about mb MB of rows of 1 KiB.
func (db *database) fill(mb int) error {
	if err := db.own.prepareWrites(); err != nil {
		return err
	}
	p := newPayload(1024)
	for want := mb * 1e6 / 1100; db.rows < want; {
		if _, err := db.own.begin.Exec(nil); err != nil {
			return err
		}
		for i := 0; i < 2000 && db.rows < want; i++ {
			if _, err := db.own.insert.Exec([]driver.Value{p.next()}); err != nil {
				return err
			}
			db.rows++
		}
		if _, err := db.own.commit.Exec(nil); err != nil {
			return err
		}
	}
	if db.mode == "WAL" {
		return db.own.exec(`PRAGMA wal_checkpoint(TRUNCATE)`)
	}
	return nil
}

// reads looks rows up by number on r.Conns connections at once, each look-up a
// transaction of its own.
func (db *database) reads(r request) (reply, error) {
	var stop atomic.Bool
	if r.N == 0 {
		defer time.AfterFunc(r.For, func() { stop.Store(true) }).Stop()
	}
	start := time.Now()
	got, busy, err := db.lookups(r.Conns, r.N, &stop)
	out := summary(got, time.Since(start))
	out.Busy = busy
	return out, err
}

// lookups ends at stop, or after n a connection where n is not 0.
func (db *database) lookups(conns, n int, stop *atomic.Bool) (all []time.Duration, busy int, err error) {
	for len(db.readers) < conns {
		c, err := connect(db.path, db.mode)
		if err != nil {
			return nil, 0, err
		}
		db.readers = append(db.readers, c)
	}
	var mu sync.Mutex // guards the results
	var wg sync.WaitGroup
	for i, c := range db.readers[:conns] {
		if err := c.prepareReads(); err != nil {
			return nil, 0, err
		}
		wg.Go(func() {
			rnd := rand.New(rand.NewSource(int64(i)))
			var got []time.Duration
			var failed error
			locked := 0
			values := make([]driver.Value, 1)
			for last := time.Now(); failed == nil && !stop.Load() && (n == 0 || len(got) < n); {
				failed = c.one1(int64(1+rnd.Intn(db.rows)), values)
				now := time.Now()
				if isBusy(failed) {
					failed = nil
					locked++
				} else {
					got = append(got, now.Sub(last))
				}
				last = now
			}
			mu.Lock()
			defer mu.Unlock()
			all, busy, err = append(all, got...), busy+locked, errors.Join(err, failed)
		})
	}
	wg.Wait()
	return all, busy, err
}

// one1 looks up one row.
func (c *client) one1(id int64, values []driver.Value) error {
	rows, err := c.lookup.Query([]driver.Value{id})
	if err != nil {
		return err
	}
	defer rows.Close()
	return rows.Next(values)
}

// fullScan reads the whole table on a new connection.
func (db *database) fullScan() (reply, error) {
	c, err := connect(db.path, db.mode)
	if err != nil {
		return reply{}, err
	}
	defer c.close()
	info, err := os.Stat(db.path)
	if err != nil {
		return reply{}, err
	}
	start := time.Now()
	_, err = c.one(`SELECT sum(length(v)) FROM t WHERE substr(v,-1,1) IS NOT NULL`)
	return reply{Ops: int(info.Size()), Seconds: time.Since(start).Seconds()}, err
}

// mixed writes on one connection while r.Conns others read.
func (db *database) mixed(r request) (reply, error) {
	if err := db.own.prepareWrites(); err != nil {
		return reply{}, err
	}
	var stop atomic.Bool
	var reads []time.Duration
	var locked int
	done := make(chan error, 1)
	go func() {
		var err error
		reads, locked, err = db.lookups(r.Conns, 0, &stop)
		done <- err
	}()
	var got []time.Duration
	var err error
	start := time.Now()
	for last := start; err == nil && last.Sub(start) < r.For; {
		err = db.write(r.Batch)
		now := time.Now()
		got = append(got, now.Sub(last))
		last = now
	}
	out := summary(got, time.Since(start))
	stop.Store(true)
	err = errors.Join(err, <-done)
	out.Reads, out.Busy = len(reads), locked
	return out, err
}

func isBusy(err error) bool {
	e, ok := errors.AsType[sqlite3.Error](err)
	return ok && (e.Code == sqlite3.ErrBusy || e.Code == sqlite3.ErrLocked)
}

// A payload makes values that shrink about as well as sensor records: text with
// repeated keys and changing numbers.
type payload struct {
	rnd *rand.Rand
	buf []byte
}

func newPayload(n int) *payload {
	return &payload{rnd: rand.New(rand.NewSource(1)), buf: make([]byte, 0, n+100)}
}

// next returns a value that is valid until the next call.
func (p *payload) next() []byte {
	n := cap(p.buf) - 100
	p.buf = p.buf[:0]
	for len(p.buf) < n {
		p.buf = fmt.Appendf(p.buf, `{"sensor":"s%04d","ts":%d,"value":%.4f},`,
			p.rnd.Intn(10000), 1700000000000+p.rnd.Int63n(1e10), p.rnd.Float64()*100)
	}
	return p.buf[:n]
}

// base is the name of a row's database.
func (row testRow) base(dir string) string {
	return filepath.Join(dir, strings.ToLower(strings.NewReplacer(" ", "-", ",", "").Replace(row.name))+".db")
}
