package e2e

import (
	"sync"
	"time"
)

// A virtual machine stands still at times, and what "within 2 s" means is two seconds in which it ran.

// stalls are times that a goroutine which only sleeps was woken too late.
type stalls struct {
	mu   sync.Mutex
	seen []stall
}

type stall struct {
	at   time.Time
	long time.Duration
}

// machine is this process's: TestMain watches.
var machine stalls

func (s *stalls) watch() {
	const nap, late = 10 * time.Millisecond, 20 * time.Millisecond
	for last := time.Now(); ; {
		time.Sleep(nap)
		now := time.Now()
		if long := now.Sub(last) - nap; long > late {
			s.mu.Lock()
			s.seen = append(s.seen, stall{now, long})
			s.mu.Unlock()
		}
		last = now
	}
}

// stalledSince is how much of the time since then was lost.
func stalledSince(then time.Time) (sum time.Duration) {
	machine.mu.Lock()
	defer machine.mu.Unlock()
	for _, stall := range machine.seen {
		if stall.at.After(then) {
			sum += stall.long
		}
	}
	return sum
}
