package maps

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"tcnat/bpf"
)

// SetAddresses says which source address masquerade takes on an uplink, by destination: an
// on-link prefix, or 0.0.0.0/0 and ::/0 for all else. It is for kernels whose FIB lookup
// does not tell. Other uplinks' entries stay; an empty map removes this uplink's.
func (s *State) SetAddresses(ifindex uint32, sources map[netip.Prefix]netip.Addr) error {
	want := map[bpf.NATAddressKey]bpf.NATAddr{}
	shorterFirst := func(a, b netip.Prefix) int { return cmp.Compare(a.Bits(), b.Bits()) }
	for _, dst := range slices.SortedFunc(maps.Keys(sources), shorterFirst) {
		source := sources[dst]
		if !dst.IsValid() || !source.IsValid() || source.Is4In6() || !sameFamily(dst.Addr(), source) {
			return faultf(ErrInvalidPrefix, "address of uplink %d: %s for %s: not of one family", ifindex, source, dst)
		}
		for _, part := range withoutIPv4(dst) {
			if err := checkPrefix(part); err != nil {
				return faultf(ErrInvalidPrefix, "address of uplink %d: %s", ifindex, err)
			}
			bits, addr := toPrefix(part)
			// a part of ::/0 gives way to a prefix of its own
			want[bpf.NATAddressKey{Prefixlen: 32 + bits, Ifindex: ifindex, Dst: addr}] = toAddr(source)
		}
	}
	err := setAll(s.m.Addresses, want, func(k bpf.NATAddressKey) bool { return k.Ifindex == ifindex })
	if err != nil {
		return fmt.Errorf("addresses of uplink %d: %w", ifindex, err)
	}
	return nil
}

// withoutIPv4 cuts 0::/16 out of an IPv6 prefix that covers the IPv4-mapped addresses, which
// are in there: ::/0 would match every IPv4 address. Nothing routed globally lies in 0::/16.
func withoutIPv4(p netip.Prefix) []netip.Prefix {
	if !coversIPv4(p) || p.Addr().Is4In6() {
		return []netip.Prefix{p}
	}
	var parts []netip.Prefix
	for bit := p.Bits(); bit < 16; bit++ {
		var b [16]byte
		b[bit/8] = 0x80 >> (bit % 8)
		parts = append(parts, netip.PrefixFrom(netip.AddrFrom16(b), bit+1))
	}
	return parts
}
