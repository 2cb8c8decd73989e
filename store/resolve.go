package store

import (
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/litefs-agent/litefs-agent/internal/sqlitefile"
)

// The resolver is the one goroutine that finds out whether tentative WAL records
// were published. Where commits come one after the other each answers for the one
// before, and to look would only take time from them. So the mount says when no
// request has come for a moment ([Store.Quiet]); where that does not happen, the
// resolver looks every 20 ms. When a look gives no answer, it looks again with
// doubling pauses up to 100 ms, and sleeps while nothing is tentative.
const (
	resolveNow   = 0
	resolveFirst = 50 * time.Microsecond
	resolveLazy  = 20 * time.Millisecond
	resolveLast  = 100 * time.Millisecond
)

// walWriteLock is the byte of WAL_WRITE_LOCK in the wal-index. Source: SQLite's
// WAL format page, "WAL locks".
const walWriteLock = 120

// resolveIn asks the resolver to look at a database after d at the latest. It
// never blocks, and wakes the resolver only if that would have looked later.
func (st *Store) resolveIn(db *DB, d time.Duration) {
	st.resolveMu.Lock()
	if st.resolving == nil {
		st.resolving = make(map[*DB]struct{})
	}
	st.resolving[db] = struct{}{}
	st.resolveMu.Unlock()
	st.resolveSoon(d)
}

// WantsQuiet implements FS: whether Quiet has something to do.
func (st *Store) WantsQuiet() bool { return st.quiet.Load() }

// Quiet implements FS: what was committed last is published by now, most likely.
func (st *Store) Quiet() {
	if st.quiet.Swap(false) {
		st.resolveSoon(resolveNow)
	}
}

// resolveSoon has the resolver look after d at the latest if it has anything to
// look at.
func (st *Store) resolveSoon(d time.Duration) {
	at := st.sinceOpen() + d
	st.resolveMu.Lock()
	sooner := len(st.resolving) > 0 && (st.resolveAt == 0 || at < st.resolveAt)
	if sooner {
		st.resolveAt, st.resolvePause = at, max(d, resolveFirst)
	}
	st.resolveMu.Unlock()
	if sooner {
		select {
		case st.resolveKick <- struct{}{}:
		default:
		}
	}
}

// sinceOpen is a clock that only goes forward and is never 0.
func (st *Store) sinceOpen() time.Duration { return time.Since(st.opened) + 1 }

func (st *Store) resolveLoop() {
	defer st.wg.Done()
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	for {
		select {
		case <-st.done:
			return
		case <-st.resolveKick:
		case <-timer.C:
			st.resolveMu.Lock()
			st.resolveAt = 0
			st.resolveMu.Unlock()
			if st.resolveAll(false) > 0 {
				st.resolveMu.Lock()
				if next := st.sinceOpen() + st.resolvePause; st.resolveAt == 0 || next < st.resolveAt {
					st.resolveAt = next
				}
				st.resolvePause = min(2*st.resolvePause, resolveLast)
				st.resolveMu.Unlock()
			}
		}
		st.resolveMu.Lock()
		at := st.resolveAt
		st.resolveMu.Unlock()
		if at != 0 {
			timer.Reset(max(0, at-st.sinceOpen()))
		}
	}
}

// resolveAll looks at every database that is waiting, and returns how many still
// are.
func (st *Store) resolveAll(force bool) int {
	st.resolveMu.Lock()
	list := make([]*DB, 0, len(st.resolving))
	for db := range st.resolving {
		list = append(list, db)
	}
	st.resolveMu.Unlock()
	left := 0
	for _, db := range list {
		if !db.resolve(force) {
			left++
			continue
		}
		st.resolveMu.Lock()
		delete(st.resolving, db)
		st.resolveMu.Unlock()
		// A record that came between the look and the removal asked again.
		db.mu.Lock()
		again := db.pend != nil && db.pend.wal
		db.mu.Unlock()
		if again {
			st.resolveMu.Lock()
			st.resolving[db] = struct{}{}
			st.resolveMu.Unlock()
			left++
		}
	}
	return left
}

// resolve looks once whether the tentative record of db was published, and
// reports whether nothing is tentative any more. An old record, with force any,
// that nobody is publishing (the write lock is free) is taken back.
func (db *DB) resolve(force bool) bool {
	db.mu.Lock()
	p, w := db.pend, db.wal
	if p == nil || !p.wal || w == nil {
		db.mu.Unlock()
		return true
	}
	db.mu.Unlock()
	peer := db.st.peer()
	shm := db.file.shmNode()
	if peer == nil || shm == nil {
		return db.settleAs(p, true)
	}
	switch db.published(peer, shm, p, w) {
	case yes:
		return db.settleAs(p, true)
	case unknown:
		return false
	case unreadable:
		return true // fenced
	}
	if !force && time.Since(p.made) < resolveLast {
		return false
	}
	ok, err := peer.LockShm(shm, walWriteLock, 1)
	if err != nil || !ok {
		return false // the writer lives: it publishes, or gives up
	}
	defer func() { _ = peer.UnlockShm(shm, walWriteLock, 1) }()
	switch db.published(peer, shm, p, w) {
	case yes:
		return db.settleAs(p, true)
	case unreadable:
		return true
	}
	return db.settleAs(p, false)
}

type answer int

const (
	unknown answer = iota
	yes
	no
	unreadable // by an error of the disk: the database is fenced
)

// published compares the wal-index with the record.
func (db *DB) published(peer Peer, shm Node, p *pending, w *walState) answer {
	var b [sqlitefile.WALIndexHeaderSize]byte
	n, err := peer.ReadShm(shm, b[:], 0)
	switch {
	case err == nil && n == 0:
		// Nobody has the wal-index open. Either the writer keeps its own
		// (locking_mode=EXCLUSIVE beside a file that a killed program left), or it
		// is dead, and the next opener recovers the WAL with this commit.
		return yes
	case errors.Is(err, syscall.EIO):
		db.fenceWith(fmt.Errorf("read its wal-index: %w", err))
		return unreadable
	case err != nil || n < len(b):
		return no
	}
	h, ok := sqlitefile.ParseWALIndex(b[:])
	if !ok {
		return unknown
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.pend != p || !w.valid {
		return unknown
	}
	if h.Salt1 == w.header.Salt1 && h.Salt2 == w.header.Salt2 && h.MxFrame >= p.walFrame {
		return yes
	}
	return no
}

// settleAs confirms or refutes p if it is still the tentative record. A refuted
// record's frames are made unreadable, so that a later recovery of the WAL does
// not find a commit that was taken back.
func (db *DB) settleAs(p *pending, committed bool) bool {
	db.mu.Lock()
	defer db.mu.Unlock()
	w := db.wal
	if db.pend != p || w == nil {
		return db.pend == nil
	}
	if committed {
		db.confirmWAL(w, p)
		return true
	}
	start, end := p.walStart, p.walEnd
	if err := db.refuteTentative(w, p); err != nil {
		return true
	}
	zero := make([]byte, sqlitefile.FrameHeaderSize)
	for at := start; at < end; at += w.frameSize() {
		if err := w.data.WriteAt(zero, at, nil); err != nil {
			db.fenceWith(fmt.Errorf("take a commit frame back: %w", err))
			break
		}
	}
	node := w.node
	db.st.later(func(p Peer) { p.InvalidateData(node, start, end-start) })
	return true
}

// settle waits until nothing of the database is tentative, so that what a
// program knows to be committed shows. A prepared rollback transaction is not
// waited for: its COMMIT has not returned. Nor is that of a fenced database, which
// nothing resolves any more.
func (db *DB) settle() {
	for {
		db.mu.Lock()
		p, ch := db.pend, db.resolved
		db.mu.Unlock()
		if p == nil || !p.wal || db.fenced() != nil {
			return
		}
		db.st.resolveIn(db, resolveNow)
		if db.st.opt.inline {
			db.st.resolveAll(true)
			return
		}
		select {
		case <-ch:
		case <-db.fencing:
		case <-db.st.done:
			return
		}
	}
}

// lockSettled locks db.mu at a moment when nothing is tentative.
func (db *DB) lockSettled() {
	for {
		db.settle()
		db.mu.Lock()
		if db.pend == nil || !db.pend.wal || db.fenced() != nil || db.st.closing() {
			return
		}
		db.mu.Unlock()
	}
}
