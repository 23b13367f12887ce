// Package maps gives typed access to the state that the datapath keeps in BPF maps: the
// configuration, devices, rules, flows and counters of one instance.
//
// Values go in and come out as plain Go types (netip addresses, durations, names); how they
// lie in memory is known to addr.go and to the generated types of package bpf alone. The
// package knows no path, no interface and no lock: whoever calls a Set method holds the
// instance's lock, so that writers come one at a time. Reading needs no lock.
package maps

import "tcnat/bpf"

// State is the state of one instance, over its open maps.
type State struct {
	m *bpf.NATMaps
}

// New returns the state that m holds. The maps stay the caller's: closing them is his.
// The templates of inner maps (NoDnatPorts and its like) may be nil.
func New(m *bpf.NATMaps) *State {
	return &State{m: m}
}
