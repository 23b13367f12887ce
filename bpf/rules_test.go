package bpf_test

import (
	"cmp"
	"fmt"
	"math/bits"
	"net/netip"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
)

// portRange is a range of ports, both ends included; zero: any port.
type portRange struct{ first, last uint16 }

// snatRule is an SNAT rule as a test writes it.
type snatRule struct {
	id          uint32 // 0: by its place in the list
	source      netip.Prefix
	uplink      uint32 // 0: every uplink
	masquerade  bool
	first, last netip.Addr
	ports       portRange
	except      []netip.Prefix
}

// dnatRule is a published port or range of ports; a zero destination is every address of
// the host.
type dnatRule struct {
	id          uint32 // 0: by its place in the list
	proto       uint8
	destination netip.Addr
	ingress     uint32
	ports       portRange
	to          netip.Addr
	toPorts     portRange // zero: the port is kept
	allow       []netip.Prefix
	several     *several // instead of to and toPorts
}

type ruleSet struct {
	snat []snatRule
	dnat []dnatRule
}

// setRules puts the rules in force by one switch. A rule has the id of its place in the
// list, so a rule that changes must be followed by endRule.
func (d *datapath) setRules(rules ruleSet) {
	d.Helper()
	config := d.config()
	slot := uint32(config.Rules&1 ^ 1)
	word := uint64(slot)

	ports := make(map[bpf.NATDnatKey]bpf.NATDnatRule)
	ranges := make(map[bpf.NATDnatRangeKey]bpf.NATDnatRule)
	sources := make(map[bpf.NATSnatKey]bpf.NATSnatRule)
	prefixes := make(map[bpf.NATRulePrefixKey]uint8)
	backends := make(map[bpf.NATBackendKey]bpf.NATBackend)
	for i, r := range rules.snat {
		id := cmp.Or(r.id, snatID(i))
		v := bpf.NATSnatRule{
			PortFirst: r.ports.first, PortLast: r.ports.last, Id: id, Generation: d.generation(id),
		}
		if r.masquerade {
			v.Flags |= bpf.NATSnatFlagSNAT_MASQUERADE
		} else {
			v.To, v.ToCount = natAddr(r.first), 1
			for a := r.first; a != r.last; a = a.Next() {
				v.ToCount++
			}
		}
		for _, p := range r.except {
			v.Flags |= bpf.NATSnatFlagSNAT_EXCEPT
			prefixes[bpf.NATRulePrefixKey{Prefixlen: 32 + prefixBits(p), Rule: id, Addr: natAddr(p.Addr())}] = 1
		}
		if r.uplink != 0 {
			word |= uint64(bpf.NATRulesWordRULES_SNAT_DEVICE)
		}
		sources[bpf.NATSnatKey{Prefixlen: 32 + prefixBits(r.source), Ifindex: r.uplink, Source: natAddr(r.source.Addr())}] = v
	}
	for i, r := range rules.dnat {
		id := cmp.Or(r.id, dnatID(i))
		v := bpf.NATDnatRule{
			To: natAddr(r.to), PortFirst: r.ports.first, PortLast: r.ports.last, ToFirst: r.toPorts.first, ToLast: r.toPorts.last,
			Id: id, Generation: d.generation(id),
		}
		if r.toPorts == (portRange{}) {
			v.Flags |= bpf.NATDnatFlagDNAT_KEEP_PORT
			v.ToFirst, v.ToLast = r.ports.first, r.ports.last
		}
		for _, p := range r.allow {
			v.Flags |= bpf.NATDnatFlagDNAT_ALLOW_LIST
			prefixes[bpf.NATRulePrefixKey{Prefixlen: 32 + prefixBits(p), Rule: id, Addr: natAddr(p.Addr())}] = 1
		}
		if r.several != nil {
			r.several.lay(d, &v, backends)
		}
		dst := r.destination
		if !dst.IsValid() {
			dst = netip.IPv4Unspecified()
			if r.to.Is6() {
				dst = netip.IPv6Unspecified()
			}
		}
		kind := bpf.NATDnatKindDNAT_ADDRESS_DEVICE
		if !r.destination.IsValid() {
			kind = bpf.NATDnatKindDNAT_ANY_DEVICE
		}
		if r.ingress == 0 {
			kind++
		}
		if r.ports.first == r.ports.last {
			word |= uint64(bpf.NATRulesWordRULES_DNAT_PORTS) << kind
			ports[bpf.NATDnatKey{Dst: natAddr(dst), Ifindex: r.ingress, Port: be16(r.ports.first), Proto: r.proto}] = v
			continue
		}
		word |= uint64(bpf.NATRulesWordRULES_DNAT_RANGES) << kind
		for _, p := range portPrefixes(r.ports) {
			ranges[bpf.NATDnatRangeKey{
				Prefixlen: 176 + p.bits, Dst: natAddr(dst), Ifindex: r.ingress, Proto: r.proto, Port: be16(p.port),
			}] = v
		}
	}
	// An update of an outer map waits for an RCU grace period: the empty sets stay.
	replace(d, d.DnatPorts, bpf.NATMapNoDnatPorts, slot, ports)
	replace(d, d.DnatRanges, bpf.NATMapNoDnatRanges, slot, ranges)
	replace(d, d.SnatSources, bpf.NATMapNoSnatSources, slot, sources)
	replace(d, d.RulePrefixes, bpf.NATMapNoRulePrefixes, slot, prefixes)
	replace(d, d.Backends, bpf.NATMapNoBackends, slot, backends)
	config.Rules = word
	d.check(d.Config.Put(uint32(0), config))
	d.rules = rules
}

// Ids: SNAT rules from 1 on, DNAT rules from 101 on.
func snatID(i int) uint32 { return uint32(1 + i) }
func dnatID(i int) uint32 { return uint32(101 + i) }

func (d *datapath) generation(id uint32) (g uint32) {
	d.Helper()
	d.check(d.Generations.Lookup(id, &g))
	return g
}

// endRule raises a rule's generation, as deleting it does.
func (d *datapath) endRule(id uint32) {
	d.Helper()
	d.check(d.Generations.Put(id, d.generation(id)+1))
}

// replace makes an inner map with these elements and puts it in a slot of the outer map.
func replace[K comparable, V any](d *datapath, outer *ebpf.Map, inner string, slot uint32, elements map[K]V) {
	d.Helper()
	place := fmt.Sprint(inner, slot)
	if len(elements) == 0 && !d.filled[place] {
		return
	}
	d.filled[place] = len(elements) > 0
	s := natSpec().Maps[inner].Copy()
	s.MaxEntries = uint32(max(1, len(elements)))
	m, err := ebpf.NewMap(s)
	d.check(err)
	defer m.Close()
	for k, v := range elements {
		d.check(m.Put(k, v))
	}
	d.check(outer.Put(slot, m))
}

type portPrefix struct {
	port uint16
	bits uint32
}

// portPrefixes answers the port prefixes that cover exactly this range.
func portPrefixes(r portRange) (p []portPrefix) {
	for first, last := uint32(r.first), uint32(r.last); first <= last; {
		size := uint32(1) << min(bits.TrailingZeros32(first|1<<16), 16)
		for first+size-1 > last {
			size >>= 1
		}
		p = append(p, portPrefix{uint16(first), 16 - uint32(bits.TrailingZeros32(size))})
		first += size
	}
	return p
}
