package maps

import (
	"fmt"
	"time"

	"tcnat/bpf"
)

// ExpiryStats is what the expiry has done since the maps were made.
type ExpiryStats struct {
	LastTick time.Duration // age of the last tick; means nothing while Ticks is 0
	Ticks    uint64
	Longest  time.Duration // of one tick, pauses of the machine included
	Slow     uint64        // ticks of more than 0.5 ms
	Checked  uint64        // flows looked at, each as often as that happened
}

// Expiry reads what the expiry has done.
func (s *State) Expiry() (ExpiryStats, error) {
	var raw bpf.NATExpiry

	if err := s.m.Expiry.Lookup(uint32(0), &raw); err != nil {
		return ExpiryStats{}, fmt.Errorf("read expiry: %w", err)
	}
	now, err := monotonic()
	if err != nil {
		return ExpiryStats{}, err
	}
	return ExpiryStats{
		LastTick: max(0, now-time.Duration(raw.LastTick)),
		Ticks:    raw.Ticks,
		Longest:  time.Duration(raw.Longest),
		Slow:     raw.Slow,
		Checked:  raw.Checked,
	}, nil
}
