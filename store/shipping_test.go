package store

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"

	"github.com/litefs-agent/litefs-agent/ltx"
)

// A link carries what the node hands out to the hub, in order, as agent and hub
// do: a packet may arrive after the node has died, or never.
type link struct {
	c      *crasher
	ships  map[string]*shipping
	flight []packet

	handed   map[string][]posOf // positions that the hub may stand at: the node must know them
	acked    map[string]posOf   // where the hub was when it said that it is durable
	branches map[string][]posOf // lines that the hub had to keep
	groups   [][]groupMember    // transactions over several databases that the hub took
}

// shipping is where the node is with the shipping of one database.
type shipping struct {
	synced, whole bool
	history       uint64
	next          ltx.Pos
}

// A packet is one record on its way, or those of one transaction over several
// databases.
type packet struct{ parts []part }

type part struct {
	name    string // at the node
	history uint64
	epoch   Epoch
	pos     ltx.Pos
	min     ltx.TXID
	body    []byte
}

type groupMember struct {
	name string
	at   posOf
}

func newLink(c *crasher) link {
	return link{
		c: c, ships: map[string]*shipping{}, handed: map[string][]posOf{}, acked: map[string]posOf{}, branches: map[string][]posOf{},
	}
}

func atHub(name string) string { return "nodes/node/" + name }

func (l *link) ship(name string) *shipping {
	x := l.ships[name]
	if x == nil {
		x = &shipping{}
		l.ships[name] = x
	}
	return x
}

// forget makes the node ask the hub where it stands before it ships on.
func (l *link) forget(name string) { delete(l.ships, name) }

// end is the end of the session: what was on its way is lost.
func (l *link) end() {
	clear(l.ships)
	l.flight = nil
}

// mayForget reports whether the node need not keep what the hub lacks.
func (l *link) mayForget(name string) bool { return !l.c.o.Shipping || l.c.forgot[name] }

// act is one thing that the link does.
func (l *link) act() {
	c := l.c
	name := dbNames[c.rng.IntN(len(dbNames))]
	switch n := c.rng.IntN(20); {
	case n < 7:
		l.ok("ship", l.send(name))
	case n < 13:
		l.ok("deliver", l.deliver())
	case n < 16:
		l.ok("ack", l.ack(name))
	case n < 17:
		l.end()
		c.count("broken sessions")
	case n < 19:
		l.mischief()
	default:
		if db := c.st.DB(name); db != nil && c.rng.IntN(3) == 0 {
			l.ok("unack", db.SetAcked(ltx.Pos{})) // the hub lost it all, says a session
			l.end()
			c.count("acks taken back")
		}
	}
}

// ok fails unless an error is that of a disk, which ends the session.
func (l *link) ok(what string, err error) {
	c := l.c
	if err == nil {
		return
	}
	c.logf("link: %s: %v", what, err)
	if !c.excused(err) && !c.hub.excused(err) {
		c.fatalf("link: %s: %v", what, err)
	}
	l.end()
}

// start finds out how to go on from where the hub stands, as a session does.
func (l *link) start(name string, x *shipping, db *DB) error {
	c := l.c
	info := db.Info()
	*x = shipping{synced: true, history: info.History}
	there := c.hub.st.DB(atHub(name))
	if there == nil {
		l.handed[name] = nil // what an older session had on its way is over
		return db.SetAcked(ltx.Pos{})
	}
	if err := there.Sync(); err != nil {
		return err
	}
	hub := there.Place()
	switch {
	case hub.History != info.History:
		x.whole = true
		return db.SetAcked(ltx.Pos{})
	case db.Owed(hub.History, hub.Pos):
		x.next = hub.Pos
		l.handed[name] = []posOf{{hub.History, hub.Pos}} // what an older session had on its way is over
		return l.setAcked(name, db, hub.Pos)
	case hub.Pos.TXID < info.Acked.TXID, l.mayForget(name):
		x.whole = true
		c.count("snapshots for a hub that went back")
		return db.SetAcked(ltx.Pos{})
	}
	c.fatalf("the hub is at %s of %s, which the node, at %s, does not know", hub.Pos, name, info.Pos)
	return nil
}

func (l *link) setAcked(name string, db *DB, pos ltx.Pos) error {
	l.handed[name] = slices.DeleteFunc(l.handed[name], func(p posOf) bool { return p.pos.TXID < pos.TXID })
	l.c.count("acks")
	return db.SetAcked(pos)
}

// next reads what is to be sent of a database; nil if nothing is.
func (l *link) next(name string) (*part, *Shipment, error) {
	c := l.c
	db := c.st.DB(name)
	if db == nil {
		return nil, nil, nil
	}
	x := l.ship(name)
	if !x.synced {
		if err := l.start(name, x, db); err != nil {
			return nil, nil, err
		}
	}
	var s *Shipment
	var err error
	compactFrom := 0
	if c.rng.IntN(2) == 0 {
		compactFrom = 2 + c.rng.IntN(4)
	}
	if !x.whole {
		s, err = db.Next(x.next, compactFrom, int64(1000+c.rng.IntN(200_000)))
		if errors.Is(err, ErrNothing) {
			return nil, nil, nil
		}
		if errors.Is(err, ErrPages) {
			s, err = db.PagesShipment(x.next)
			c.count("shipped sets of pages")
		}
		if errors.Is(err, ErrGap) {
			x.whole = true
			c.count("gaps")
		} else if err != nil {
			return nil, nil, err
		}
	}
	if x.whole {
		if s, err = db.SnapshotShipment(); err != nil {
			return nil, nil, err
		}
		c.count("shipped snapshots")
	}
	body, err := io.ReadAll(s.Body)
	if err = errors.Join(err, s.Body.Close()); err != nil {
		return nil, nil, err
	}
	if int64(len(body)) != s.Size {
		c.fatalf("shipment %s of %s has %d bytes, says %d", s.Pos(), name, len(body), s.Size)
	}
	if s.Records > 1 {
		c.count("compacted shipments")
	}
	if durable := c.watchedPos(db, s); !durable {
		c.fatalf("invariant 5: %s of %s is handed to a link and not durable", s.Pos(), name)
	}
	return &part{name, s.History, s.Epoch, s.Pos(), s.Min, body}, s, nil
}

// watchedPos reports whether what a shipment ends with is durable and confirmed.
func (c *crasher) watchedPos(db *DB, s *Shipment) bool {
	db.mu.Lock()
	defer db.mu.Unlock()
	if s.Max > db.at.TXID {
		return false
	}
	for _, e := range db.recs.list {
		if e.max == s.Max && e.lsn > c.st.wlog.Durable() {
			return false
		}
	}
	return true
}

// send hands the next record of a database to the link; one of a transaction over
// several databases together with its siblings, if those are up to it.
func (l *link) send(name string) error {
	p, s, err := l.next(name)
	if p == nil || err != nil {
		return err
	}
	pk := packet{parts: []part{*p}}
	if s.Group != 0 {
		for _, sib := range s.Parts {
			q, wait, err := l.sibling(name, s.Group, sib)
			if wait || err != nil {
				return err
			}
			if q != nil {
				pk.parts = append(pk.parts, *q)
			}
		}
	}
	l.hand(pk)
	return nil
}

// sibling reads the part of a group that is to go together with that of name; nil
// if none is. With wait something else of that database went first.
func (l *link) sibling(name string, group uint64, sib GroupPart) (p *part, wait bool, err error) {
	db := l.c.st.DB(sib.Name)
	if sib.Name == name || db == nil || db.Place().History != sib.History {
		return nil, false, nil
	}
	y := l.ship(sib.Name)
	if !y.synced {
		if err := l.start(sib.Name, y, db); err != nil {
			return nil, false, err
		}
	}
	switch {
	case y.whole || y.next.TXID+1 < sib.TXID:
		return nil, true, l.send(sib.Name) // first what comes before it
	case y.next.TXID >= sib.TXID:
		return nil, false, nil // at the hub, or on its way
	}
	p, s, err := l.next(sib.Name)
	if err != nil || p == nil {
		return nil, true, err
	}
	if s.Group == group {
		return p, false, nil
	}
	if s.Group != 0 || s.Min != 1 {
		l.c.fatalf("the part of %s in group %d is %+v", sib.Name, group, s)
	}
	l.hand(packet{parts: []part{*p}}) // its records are gone: a snapshot
	return nil, true, nil
}

// hand puts a packet on its way.
func (l *link) hand(pk packet) {
	for _, p := range pk.parts {
		x := l.ship(p.name)
		x.next, x.whole = p.pos, false
		l.handed[p.name] = append(l.handed[p.name], posOf{p.history, p.pos})
		l.c.logf("link: sends %s to %s of %s, %d parts", p.min, p.pos, p.name, len(pk.parts))
	}
	l.flight = append(l.flight, pk)
	l.c.count("shipments")
}

// incoming is a part as the hub takes it.
func (l *link) incoming(p part) Incoming {
	in := Incoming{Name: atHub(p.name), History: p.history, Epoch: p.epoch, LTX: bytes.NewReader(p.body), Size: int64(len(p.body))}
	if db := l.c.hub.st.DB(in.Name); db != nil && db.Place().History != in.History {
		in.Replace = p.min == 1
	}
	return in
}

// deliver gives the hub the packet that was sent first.
func (l *link) deliver() error {
	c := l.c
	if len(l.flight) == 0 {
		return nil
	}
	pk := l.flight[0]
	l.flight = l.flight[1:]
	if len(pk.parts) > 1 {
		return l.deliverGroup(pk)
	}
	p := pk.parts[0]
	in := l.incoming(p)
	var old Place
	if db := c.hub.st.DB(in.Name); db != nil {
		old = db.Place()
	}
	wasThere := old.History != 0 && c.hub.st.DB(in.Name).Exists()
	_, err := c.hub.st.Apply(in)
	c.hub.logf("takes %s to %s of %s, replaces %v: %v", p.min, p.pos, p.name, in.Replace, err)
	if err != nil {
		return err
	}
	c.count("applied records")
	if in.Replace {
		c.count("applied replacements")
		if wasThere {
			l.branches[p.name] = append(l.branches[p.name], posOf{old.History, old.Pos})
		}
		delete(l.acked, p.name)
	}
	return nil
}

func (l *link) deliverGroup(pk packet) error {
	c := l.c
	var list []Incoming
	var members []groupMember
	for _, p := range pk.parts {
		in := l.incoming(p)
		if in.Replace {
			l.end() // refused: the node sends a snapshot
			return nil
		}
		list = append(list, in)
		members = append(members, groupMember{p.name, posOf{p.history, p.pos}})
	}
	err := c.hub.st.ApplyGroup(list)
	c.hub.logf("takes a group of %d: %v", len(list), err)
	l.groups = append(l.groups, members)
	if err == nil {
		c.count("applied groups")
	}
	return err
}

// ack makes what the hub has of a database durable, and tells the node.
func (l *link) ack(name string) error {
	c := l.c
	there, db := c.hub.st.DB(atHub(name)), c.st.DB(name)
	if there == nil {
		return nil
	}
	place := there.Place()
	if err := there.Sync(); err != nil {
		return err
	}
	l.acked[name] = posOf{place.History, place.Pos}
	x := l.ship(name)
	if db == nil || !x.synced || x.history != place.History {
		return nil
	}
	if !db.Owed(place.History, place.Pos) {
		if place.History == db.Place().History && !l.mayForget(name) && place.Pos.TXID >= db.Acked().TXID {
			c.fatalf("the hub confirms %s of %s, which the node, at %s, does not know", place.Pos, name, db.Place().Pos)
		}
		l.end()
		return nil
	}
	return l.setAcked(name, db, place.Pos)
}

// mischief gives the hub a record that it must refuse, or knows already: nothing
// may change.
func (l *link) mischief() {
	c := l.c
	if len(l.flight) == 0 {
		return
	}
	pk := l.flight[c.rng.IntN(len(l.flight))]
	p := pk.parts[0]
	in := l.incoming(p)
	var before, after Place
	db := c.hub.st.DB(in.Name)
	if db != nil {
		before = db.Place()
	}
	what, want := "", error(nil)
	switch n := c.rng.IntN(4); {
	case n == 0:
		what, want = "corrupt records", ErrCorrupt
		body := bytes.Clone(p.body)
		body[c.rng.IntN(len(body))] ^= byte(1 + c.rng.IntN(255))
		in.LTX = bytes.NewReader(body)
		if db == nil {
			in.History ^= 0x5555 // of a line that never comes
		}
	case n == 1:
		what, want = "torn records", ErrCorrupt
		in.Size = c.rng.Int64N(in.Size)
		in.LTX = bytes.NewReader(p.body[:in.Size])
	case n == 2 && db != nil && before.Pos.TXID > 0:
		what, want = "records of another history", ErrHistory
		in.History, in.Replace = in.History^0x5555, false
	case n == 3 && db != nil && !in.Replace && p.min > before.Pos.TXID+1:
		what, want = "records from the future", ErrPosition
	default:
		return
	}
	_, err := c.hub.st.Apply(in)
	if db = c.hub.st.DB(in.Name); db != nil {
		after = db.Place()
	}
	c.hub.logf("%s: %v", what, err)
	if before != after && !c.hub.stopped() {
		c.fatalf("hub: %s moved %s from %+v to %+v (%v)", what, in.Name, before, after, err)
	}
	if err == nil && p.pos.TXID > before.Pos.TXID && !strings.Contains(what, "corrupt") || err != nil &&
		!errors.Is(err, want) && !errors.Is(err, ErrPosition) && before.History == p.history && !c.hub.excused(err) {
		c.fatalf("hub: %s: got %v, want %v", what, err, want)
	}
	c.count(what)
}
