package store

import (
	"bytes"
	"slices"
)

// nodeDown is a crash of the node. What it had handed out may still arrive.
func (l *link) nodeDown() {
	for len(l.flight) > 0 && l.c.rng.IntN(3) > 0 && !l.c.hub.stopped() {
		if err := l.deliver(); err != nil {
			if !l.c.hub.excused(err) {
				l.c.fatalf("link: deliver: %v", err)
			}
			break
		}
		l.c.count("records that outlived their node")
	}
	l.end()
	if l.c.hub.stopped() {
		l.hubDown()
	}
}

// nodeUp asserts that the node knows every position that the hub may stand at.
func (l *link) nodeUp() {
	c := l.c
	for _, name := range dbNames {
		db := c.st.DB(name)
		if db == nil {
			continue
		}
		info := db.Info()
		for _, p := range l.handed[name] {
			if p.history != info.History {
				continue
			}
			if p.pos.TXID > info.Pos.TXID {
				c.fatalf("invariant 5: %s of %s was handed to a link, the node is at %s", p.pos, name, info.Pos)
			}
			if !db.Owed(p.history, p.pos) && !l.mayForget(name) {
				c.fatalf("%s of %s was handed to a link, and the node at %s does not know it", p.pos, name, info.Pos)
			}
			c.count("positions known again")
		}
	}
}

// hubDown is a crash of the hub, and its next start.
func (l *link) hubDown() {
	c := l.c
	l.end()
	c.remember()
	for {
		c.hub.down()
		if c.hub.boot(c.ops()) {
			break
		}
	}
	c.hub.undisturbed(func() {
		c.hub.healthy()
		l.compareHub()
		c.hub.checkInvariants()
	})
	c.hub.wasCut = false
	c.count("crashes of the hub")
}

// compareHub asserts that the hub holds what it confirmed, that it is something
// that the node had committed, and that groups are whole.
func (l *link) compareHub() {
	c := l.c
	for _, name := range dbNames {
		db := c.hub.st.DB(atHub(name))
		var place Place
		if db != nil {
			place = db.Place()
		}
		if a, ok := l.acked[name]; ok && (place.History != a.history || place.Pos.TXID < a.pos.TXID) {
			c.fatalf("hub: %s was confirmed to be at %016x %s, is at %016x %s", name, a.history, a.pos, place.History, place.Pos)
		}
		if db == nil {
			continue
		}
		if got := c.hubContent(db); !c.past[name][contentKey(got)] {
			c.fatalf("hub: %s at %s holds %d bytes that never were committed", name, place.Pos, len(got))
		}
		kept := db.Branches()
		for _, b := range l.branches[name] {
			if !slices.ContainsFunc(kept, func(k Branch) bool { return k.History == b.history && k.Pos.TXID >= b.pos.TXID }) {
				// Replaced, and the replacement was lost with the power: then that line
				// is the present one again, or its turn comes once more.
				if place.History == b.history {
					continue
				}
				c.fatalf("hub: %s has no branch %016x at %s", name, b.history, b.pos)
			}
			c.count("branches found again")
		}
	}
	for _, g := range l.groups {
		have, known := 0, 0
		for _, m := range g {
			if db := c.hub.st.DB(atHub(m.name)); db != nil && db.Place().History == m.at.history {
				known++
				if db.Place().Pos.TXID >= m.at.pos.TXID {
					have++
				}
			} else if db == nil {
				known++
			}
		}
		if known == len(g) && have != 0 && have != len(g) {
			c.fatalf("invariant 12: the hub has %d of %d parts of a group: %+v", have, len(g), g)
		}
	}
	l.groups = nil
}

// hubContent reads a database at the hub, nil if it is dropped.
func (c *crasher) hubContent(db *DB) []byte {
	if !db.Exists() {
		return nil
	}
	img, err := db.Snapshot()
	if err != nil {
		c.fatalf("hub: read %s: %v", db.Name(), err)
	}
	defer img.Close()
	var b bytes.Buffer
	if _, err := img.WriteTo(&b); err != nil {
		c.fatalf("hub: read %s: %v", db.Name(), err)
	}
	return b.Bytes()
}

// finish ships everything and compares both sides.
func (l *link) finish() {
	c := l.c
	l.hubDown()
	c.hub.stopAt = 1 << 60
	c.hub.d.StopAt(0)
	c.hub.faulty, c.faulty = false, false
	for range 2000 {
		busy := false
		for _, name := range dbNames {
			db := c.st.DB(name)
			if db == nil || db.Acked() == db.Pos() {
				continue
			}
			busy = true
			l.ok("ship", l.send(name))
			for len(l.flight) > 0 {
				l.ok("deliver", l.deliver())
			}
			l.ok("ack", l.ack(name))
		}
		if !busy {
			break
		}
		if err := c.st.wlog.Wait(c.st.wlog.Appended()); err != nil {
			c.fatalf("%v", err)
		}
	}
	for _, name := range dbNames {
		db, there := c.st.DB(name), c.hub.st.DB(atHub(name))
		if db == nil {
			continue
		}
		if db.Pos().IsZero() {
			continue
		}
		if there == nil || there.Place() != db.Place() {
			c.fatalf("in the end %s is at %+v and the hub at %+v", name, db.Info(), there.Info())
		}
		if !bytes.Equal(c.hubContent(there), c.content(name)) {
			c.fatalf("in the end %s differs at the hub", name)
		}
		c.count("databases equal in the end")
	}
	c.hub.verify()
}
