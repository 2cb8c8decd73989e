package hub

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/litefs-agent/litefs-agent/store"
)

// A group is a transaction over several databases, whose records wait for each
// other.
type group struct {
	records []*record
	applied chan struct{} // closed when all were applied, or none
}

// groupWait bounds how long the records of a group wait for each other.
const groupWait = 30 * time.Second

// applyGroup waits until every record of the group has reached its turn; the last
// one applies them all.
func (s *session) applyGroup(ctx context.Context, r *record) error {
	s.mu.Lock()
	g := s.groups[r.push.Group]
	if g == nil {
		s.mu.Unlock()
		return errGivenUp
	}
	g.records = append(g.records, r)
	last := len(g.records) >= int(r.push.Parts)
	s.mu.Unlock()
	if last {
		s.applyParts(g.records)
		s.endGroup(r.push.Group, g)
		return r.err
	}
	select {
	case <-g.applied:
		return r.err
	case <-ctx.Done():
	case <-time.After(groupWait):
	}
	// Once all are there another goroutine has them, until it is done.
	s.mu.Lock()
	waiting := s.groups[r.push.Group] == g && len(g.records) < int(r.push.Parts)
	if waiting {
		for _, x := range g.records {
			x.err = errGivenUp
		}
		delete(s.groups, r.push.Group)
	}
	s.mu.Unlock()
	if waiting {
		close(g.applied)
	}
	<-g.applied
	return r.err
}

// giveUp ends the wait of a group of which a record was refused.
func (s *session) giveUp(number uint64) {
	if number == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lost = number
	if g := s.groups[number]; g != nil {
		for _, r := range g.records {
			r.err = errGivenUp
		}
		delete(s.groups, number)
		close(g.applied)
	}
}

var errGivenUp = errors.New("the other records of its transaction did not come")

func (s *session) endGroup(number uint64, g *group) {
	s.mu.Lock()
	delete(s.groups, number)
	s.mu.Unlock()
	close(g.applied)
}

func (s *session) applyParts(list []*record) {
	var all []store.Incoming
	var err error
	for _, r := range list {
		var in store.Incoming
		if in, err = s.h.incoming(s.node, r); err != nil {
			break
		}
		if in.Replace {
			err = fmt.Errorf("%s: %w", in.Name, store.ErrHistory)
			break
		}
		all = append(all, in)
	}
	if err == nil {
		err = s.h.opt.Store.ApplyGroup(all)
	}
	for _, r := range list {
		r.err = err
		if db := s.h.opt.Store.DB(nameAt(s.node, r.push.Name)); err == nil && db != nil {
			r.err = s.check(db, r.push)
		}
	}
}
