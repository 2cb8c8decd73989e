package hub

import (
	"sync"
	"time"
)

// A throttle lets a few messages through and counts the others. Its zero value is
// ready.
type throttle struct {
	mu     sync.Mutex // guards what follows
	window time.Time  // when the present half minute began
	n      int        // messages in it
	hidden int
}

const (
	throttleEvery = 30 * time.Second
	throttleN     = 10
)

// allow reports whether to say something at a time, and how often nothing was
// said since the last time.
func (t *throttle) allow(now time.Time) (hidden int, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now.Sub(t.window) >= throttleEvery {
		t.window, t.n = now, 0
	}
	if t.n++; t.n > throttleN {
		t.hidden++
		return 0, false
	}
	hidden, t.hidden = t.hidden, 0
	return hidden, true
}

// A meter lets a burst of things happen, then so many a second. Its zero value is
// ready; who has it guards it.
type meter struct {
	debt float64
	at   time.Time
}

func (m *meter) allow(now time.Time, burst, perSecond float64) bool {
	m.debt = max(0, m.debt-perSecond*now.Sub(m.at).Seconds())
	m.at = now
	if m.debt >= burst {
		return false
	}
	m.debt++
	return true
}
