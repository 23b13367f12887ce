package maps

import (
	"fmt"
	"net/netip"

	"tcnat/bpf"
)

// Subnets returns the subnets of the managed bridges and the ifindex of each one's bridge.
func (s *State) Subnets() (map[netip.Prefix]uint32, error) {
	var (
		subnets = map[netip.Prefix]uint32{}
		bad     error
	)
	err := readAll(s.m.Subnets, func(k bpf.NATSubnetKey, ifindex uint32) {
		p, err := fromPrefix(k.Prefixlen, k.Addr)
		if err != nil {
			bad = err
			return
		}
		subnets[p] = ifindex
	})
	if err == nil {
		err = bad
	}
	if err != nil {
		return nil, fmt.Errorf("read subnets: %w", err)
	}
	return subnets, nil
}

// SetSubnets makes subnets the subnets of the managed bridges: prefix to ifindex of the
// bridge. Those that stay are not touched.
func (s *State) SetSubnets(subnets map[netip.Prefix]uint32) error {
	want := map[bpf.NATSubnetKey]uint32{}
	for p, ifindex := range subnets {
		if err := checkPrefix(p); err != nil {
			return faultf(ErrInvalidPrefix, "subnet %s", err)
		}
		bits, addr := toPrefix(p)
		want[bpf.NATSubnetKey{Prefixlen: bits, Addr: addr}] = ifindex
	}
	err := setAll(s.m.Subnets, want, func(bpf.NATSubnetKey) bool { return true })
	if err != nil {
		return fmt.Errorf("subnets: %w", err)
	}
	return nil
}
