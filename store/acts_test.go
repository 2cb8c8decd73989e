package store

import (
	"bytes"
	"errors"
	"syscall"

	"github.com/litefs-agent/litefs-agent/internal/testrig/pager"
)

var dbNames = []string{"a.db", "b.db", "d/c.db", "e.db"}

// act is one thing that a program, or a person, does at the node.
func (c *crasher) act() {
	db := c.w.DB(dbNames[c.rng.IntN(len(dbNames))])
	if len(db.Versions) == 1 && !db.Exists() && db.Name == "d/c.db" {
		_, _ = c.st.Mkdir("d", 0o770)
	}
	what, err := c.actOn(db)
	c.logf("%s (%s, sync %d, excl %v) %s: version %d, %v", db.Name, db.Mode, db.Sync, db.Exclusive, what, db.Cur, err)
	if err == nil {
		if what != "" {
			c.count(what)
		}
		return
	}
	if c.stopped() {
		panic(pager.Killed{})
	}
	if errors.Is(err, pager.ErrMismatch) || errors.Is(err, pager.ErrAccepted) {
		c.fatalf("%s of %s: %v", what, db.Name, err)
	}
	c.count("failed calls")
	if errors.Is(err, syscall.ENOSPC) {
		c.count("full disks")
	}
	if errors.Is(err, pager.ErrUncopied) && c.uncopied {
		c.uncopied = false
		return // it stays a file for now, as the log says
	}
	if !c.excused(err) {
		c.fatalf("%s %s (%s): %v", what, db.Name, db.Mode, err)
	}
}

// actOn says what was done, "" if there was nothing to do.
func (c *crasher) actOn(db *pager.DB) (what string, err error) {
	switch n := c.rng.IntN(44); {
	case n < 14:
		db.Sync = pager.Sync(c.rng.IntN(3))
		return "commits in " + db.Mode.String(), db.Commit(db.RandomChange(c.maxPage))
	case n < 16:
		return c.group()
	case n < 18:
		return "checkpoints of a WAL", db.Checkpoint(c.rng.IntN(2) == 0)
	case n < 19:
		db.Exclusive = false
		m := pager.Mode(c.rng.IntN(4))
		err := db.SetMode(m)
		db.Exclusive = m == pager.WAL && c.rng.IntN(4) == 0
		return "changes of the journal mode", err
	case n < 20:
		return "closed WALs", db.CloseWAL()
	case n < 21:
		if !db.Exists() {
			return "", nil
		}
		return "drops", db.Drop()
	case n < 22:
		if db.Exists() {
			return "", nil
		}
		return "copies", db.Copy(c.maxPage)
	case n < 23:
		if !db.Exists() {
			return "", nil
		}
		return "vacuums", db.Commit(db.RandomVacuum(c.maxPage))
	case n < 25:
		db.StartReader(c.rng.IntN(3))
		return "", nil
	case n < 27:
		db.EndReader(c.rng.IntN(3))
		return "", nil
	case n < 29:
		return c.sameAgain(db)
	case n < 30:
		to := c.w.DB(dbNames[c.rng.IntN(len(dbNames))])
		if to == db || !db.Exists() || to.Name == "d/c.db" {
			return "", nil
		}
		what := "renames to a new name"
		if to.Exists() {
			what = "renames over a database"
		}
		return what, db.Rename(to)
	case n < 32:
		tried, err := db.Scribble()
		if !tried {
			return "", err
		}
		return "refused writes", err
	case n < 34:
		if !db.Remains() {
			return "", nil
		}
		return "removed remains", db.RemoveRemains()
	case n < 37:
		return c.actOnFile()
	case n < 38:
		return c.newHistory(db)
	case n < 39:
		return c.export(db)
	}
	return "checks", db.Check()
}

// sameAgain is a transaction that changes nothing (invariant 25).
func (c *crasher) sameAgain(db *pager.DB) (string, error) {
	if !db.Exists() {
		return "", nil
	}
	if err := db.Check(); err != nil { // a hot journal, or another's tentative commit, is settled first
		return "checks", err
	}
	x := c.st.DB(db.Name)
	if x == nil {
		return "", nil
	}
	before := x.Pos()
	ch := db.NoChange()
	if db.Mode != pager.WAL {
		ch.Spill = 0
	}
	db.Sync = pager.Sync(c.rng.IntN(3))
	if err := db.Commit(ch); err != nil {
		return "transactions without a change", err
	}
	if after := x.Pos(); after != before {
		c.fatalf("invariant 25: a transaction without a change moved %s from %s to %s", db.Name, before, after)
	}
	return "transactions without a change", nil
}

func (c *crasher) group() (string, error) {
	var dbs []*pager.DB
	var changes []pager.Change
	for _, i := range c.rng.Perm(len(dbNames))[:2+c.rng.IntN(2)] {
		db := c.w.DB(dbNames[i])
		if db.Mode == pager.WAL || db.Name == "d/c.db" {
			continue
		}
		db.Sync = pager.Sync(1 + c.rng.IntN(2))
		ch := db.RandomChange(c.maxPage)
		ch.Rollback = false
		dbs, changes = append(dbs, db), append(changes, ch)
	}
	if len(dbs) < 2 {
		return "", nil
	}
	return "groups", c.w.Group(dbs, changes)
}

// newHistory begins a new line of a database, with what it holds.
func (c *crasher) newHistory(db *pager.DB) (string, error) {
	x := c.st.DB(db.Name)
	if x == nil {
		return "", nil
	}
	before := x.Place()
	err := x.NewHistory()
	if errors.Is(err, ErrBusy) {
		return "", nil
	}
	if after := x.Place(); err == nil && (after.Pos != before.Pos || after.History == before.History) {
		c.fatalf("a new history of %s moves it from %+v to %+v", db.Name, before, after)
	}
	c.link.forget(db.Name)
	return "new histories", err
}

// export copies a database while programs have it open.
func (c *crasher) export(db *pager.DB) (string, error) {
	x := c.st.DB(db.Name)
	if x == nil || !x.Exists() || !db.Exists() || db.Remains() {
		return "", nil
	}
	img, err := x.Snapshot()
	if err != nil {
		return "exports", err
	}
	defer img.Close()
	var b bytes.Buffer
	if _, err := img.WriteTo(&b); err != nil {
		return "exports", err
	}
	for _, v := range db.Versions[db.Cur:] { // the one that a killed program left may count
		if bytes.Equal(b.Bytes(), v.Bytes()) {
			return "exports", nil
		}
	}
	c.fatalf("the export of %s at %s is not what is committed", db.Name, img.Pos)
	return "", nil
}

// A plainFile is an ordinary file at the mount.
type plainFile struct {
	now     []byte // nil: there is none
	settled bool   // and it was synced since the last change: it survives a power cut
	busy    bool   // something is being done to it
}

var fileNames = []string{"f0.txt", "f1.txt", "d/f2.txt"}

func (c *crasher) file(name string) *plainFile {
	f := c.files[name]
	if f == nil {
		f = &plainFile{}
		c.files[name] = f
	}
	return f
}

// actOnFile does something with an ordinary file.
func (c *crasher) actOnFile() (what string, err error) {
	name := fileNames[c.rng.IntN(len(fileNames))]
	if name == "d/f2.txt" {
		_, _ = c.st.Mkdir("d", 0o770)
	}
	f := c.file(name)
	f.busy = true
	switch n := c.rng.IntN(6); {
	case n < 3:
		what, err = "written files", c.writeFile(name, f)
	case n < 4 && f.now != nil:
		f.settled = false
		if what, err = "removed files", c.st.Unlink(name); err == nil {
			f.now = nil
		}
	case n < 5 && f.now != nil:
		to := fileNames[c.rng.IntN(2)]
		if to == name {
			break
		}
		g := c.file(to)
		g.busy, g.settled, f.settled = true, false, false
		if what, err = "renamed files", c.st.Rename(name, to, false); err == nil {
			g.now, f.now = f.now, nil
			g.busy = false
		}
	default:
		what = "read files"
		if got := c.bytesOf(name); !bytes.Equal(got, f.now) && !c.stopped() && !c.errored {
			c.fatalf("file %s holds %d bytes, want %d", name, len(got), len(f.now))
		}
	}
	if err == nil && !c.stopped() {
		f.busy = false
	}
	return what, err
}

func (c *crasher) writeFile(name string, f *plainFile) error {
	f.settled = false
	_, h, err := c.st.Create(name, 0o644, false)
	if err != nil {
		return err
	}
	defer h.Release()
	n, err := c.st.Lookup(name)
	if err != nil {
		return err
	}
	p := make([]byte, 1+c.rng.IntN(3000))
	for i := range p {
		p[i] = byte(c.rng.Uint32())
	}
	if _, err := h.WriteAt(p, 0); err != nil {
		return err
	}
	if err := n.SetSize(h, int64(len(p))); err != nil {
		return err
	}
	f.now = p
	if c.rng.IntN(3) > 0 {
		if err := h.Sync(); err != nil {
			return err
		}
		f.settled = true
	}
	return nil
}

// compareFiles looks at ordinary files after a start (invariant 21).
func (c *crasher) compareFiles() {
	for _, name := range fileNames {
		f := c.file(name)
		got := c.bytesOf(name)
		if (f.settled || !c.wasCut) && !f.busy && !bytes.Equal(got, f.now) {
			c.fatalf("invariant 21: file %s holds %d bytes after a start, want %d (cut=%v, synced=%v)", name, len(got), len(f.now), c.wasCut, f.settled)
		}
		if f.settled {
			c.count("synced files found again")
		}
		*f = plainFile{now: got, settled: f.settled && !f.busy}
		if len(got) == 0 {
			f.now = nil
			if _, err := c.st.Lookup(name); err == nil {
				f.now = []byte{}
			}
		}
	}
}
