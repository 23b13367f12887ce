package maps

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"

	"tcnat/bpf"
)

// This file alone knows byte order. An address in a map is 16 bytes in network order, IPv4
// as ::ffff:a.b.c.d; the generated type holds them as four words, whose bytes in memory are
// those of the network. Ports in keys are in network order too, all else is the machine's.

// v4Bits is what the v4-mapped prefix adds to the length of an IPv4 prefix.
const v4Bits = 96

var (
	// mappedPrefix covers every IPv4 address as a map holds it.
	mappedPrefix = netip.MustParsePrefix("::ffff:0:0/96")

	anyIPv4 = netip.IPv4Unspecified()
	anyIPv6 = netip.IPv6Unspecified()
)

// toAddr is the map's form of a. The zero Addr gives 16 zero bytes.
func toAddr(a netip.Addr) bpf.NATAddr {
	var out bpf.NATAddr

	b := a.As16()
	for i := range out.Word {
		out.Word[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return out
}

// fromAddr is the address that a holds; v4-mapped ones come out as IPv4.
func fromAddr(a bpf.NATAddr) netip.Addr {
	var b [16]byte

	for i, word := range a.Word {
		binary.NativeEndian.PutUint32(b[4*i:], word)
	}
	return netip.AddrFrom16(b).Unmap()
}

// swapPort turns a port in host order into one in network order, and back.
func swapPort(port uint16) uint16 {
	var b [2]byte

	binary.BigEndian.PutUint16(b[:], port)
	return binary.NativeEndian.Uint16(b[:])
}

// toPrefix is the map's form of p: the number of leading bits, and the address.
func toPrefix(p netip.Prefix) (bits uint32, addr bpf.NATAddr) {
	bits = uint32(p.Bits())
	if p.Addr().Is4() {
		bits += v4Bits
	}
	return bits, toAddr(p.Addr())
}

// fromPrefix is the prefix of the first bits of addr.
func fromPrefix(bits uint32, addr bpf.NATAddr) (netip.Prefix, error) {
	a, n := fromAddr(addr), int(bits)
	if a.Is4() {
		if n -= v4Bits; n < 0 {
			return netip.Prefix{}, faultf(ErrInvalidPrefix, "prefix of %d bits of ::ffff:%s: shorter than the IPv4 prefix", bits, a)
		}
	}
	p := netip.PrefixFrom(a, n)
	if !p.IsValid() {
		return netip.Prefix{}, faultf(ErrInvalidPrefix, "prefix of %d bits of %s: too long", bits, a)
	}
	return p, nil
}

// checkPrefix refuses a prefix that a longest-prefix map would not hold as it is meant.
func checkPrefix(p netip.Prefix) error {
	switch {
	case !p.IsValid():
		return fmt.Errorf("no prefix: write ADDRESS/BITS")
	case p.Addr().Is4In6():
		return fmt.Errorf("%s: IPv4-mapped: write %s", p, unmapPrefix(p))
	case p != p.Masked():
		return fmt.Errorf("%s: bits are set behind the prefix: write %s", p, p.Masked())
	case coversIPv4(p):
		return fmt.Errorf("%s: covers the IPv4-mapped addresses too: write 2000::/3 or fc00::/7", p)
	}
	return nil
}

// coversIPv4 tells whether an IPv6 prefix would match IPv4 addresses in a map.
func coversIPv4(p netip.Prefix) bool {
	return p.Addr().Is6() && p.Overlaps(mappedPrefix)
}

func unmapPrefix(p netip.Prefix) string {
	if p.Bits() < v4Bits {
		return p.Addr().Unmap().String() + "/0"
	}
	return netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-v4Bits).Masked().String()
}

// comparePrefix orders by address, then the shorter prefix first.
func comparePrefix(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

func sameFamily(a, b netip.Addr) bool { return a.Is4() == b.Is4() }

func familyName(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

// lastBits are the last 32 bits of an address, as a number.
func lastBits(a netip.Addr) uint32 {
	b := a.As16()
	return binary.BigEndian.Uint32(b[12:])
}

func sameUpperBits(a, b netip.Addr) bool {
	x, y := a.As16(), b.As16()
	return [12]byte(x[:12]) == [12]byte(y[:12])
}

// withLastBits is a with its last 32 bits replaced.
func withLastBits(a netip.Addr, last uint32) netip.Addr {
	b := a.As16()
	binary.BigEndian.PutUint32(b[12:], last)
	return netip.AddrFrom16(b).Unmap()
}

// toTuple is the map's form of t.
func toTuple(t Tuple) bpf.NATTuple {
	family := bpf.NATFamilyFAMILY_IPV6
	if t.Src.Addr().Is4() {
		family = bpf.NATFamilyFAMILY_IPV4
	}
	return bpf.NATTuple{
		Src:    toAddr(t.Src.Addr()),
		Dst:    toAddr(t.Dst.Addr()),
		Sport:  swapPort(t.Src.Port()),
		Dport:  swapPort(t.Dst.Port()),
		Family: family,
		Proto:  uint8(t.Protocol),
	}
}

// fromTuple is the tuple that t holds.
func fromTuple(t bpf.NATTuple) Tuple {
	return Tuple{
		Protocol: Protocol(t.Proto),
		Src:      netip.AddrPortFrom(fromAddr(t.Src), swapPort(t.Sport)),
		Dst:      netip.AddrPortFrom(fromAddr(t.Dst), swapPort(t.Dport)),
	}
}
