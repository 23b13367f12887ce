package bpf_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"tcnat/bpf"
)

// model is the flow table as simply as it can be said: a list of flows, searched from one
// end to the other. It does not choose ports: it judges the choice that it is shown.
type model struct {
	rules  ruleSet
	routed bool
	flows  []*modelFlow
}

type modelFlow struct {
	original, reply tuple
	inbound         bool
	translation     bpf.NATTranslation
	rule            uint32
	mapped          bool // an UDP flow that has its endpoint's port
	ended           bool // no packet is of it, but it may still be in the table
	out, in         uint64
	outTCP, inTCP   bpf.NATTcpSeen
}

// find answers the living flow that a packet with this tuple is of.
func (m *model) find(t tuple, fromWorld bool) *modelFlow {
	for _, f := range m.flows {
		if !f.ended && (f.original == t && f.inbound == fromWorld || f.reply == t && f.inbound != fromWorld) {
			return f
		}
	}
	return nil
}

// remains tells whether an ended flow with this key may still be in the table.
func (m *model) remains(key tuple) bool {
	return slices.ContainsFunc(m.flows, func(f *modelFlow) bool { return f.ended && (f.original == key || f.reply == key) })
}

// taken tells whether a living flow has this key.
func (m *model) taken(key tuple) bool {
	return slices.ContainsFunc(m.flows, func(f *modelFlow) bool { return !f.ended && (f.original == key || f.reply == key) })
}

func (m *model) living() (n int) {
	for _, f := range m.flows {
		if !f.ended {
			n++
		}
	}
	return n
}

func (f *modelFlow) closed() bool {
	return f.outTCP&f.inTCP&sawFIN != 0 || (f.outTCP|f.inTCP)&sawRST != 0
}

// see notes a packet of the flow and answers what it leaves as.
func (f *modelFlow) see(p packet) packet {
	original := p.tuple() == f.original
	packets, bits, leaves := &f.in, &f.inTCP, f.original.inverse()
	if original {
		packets, bits, leaves = &f.out, &f.outTCP, f.reply.inverse()
	}
	*packets++
	if p.proto == protoTCP {
		*bits &^= sawRST
		*bits |= tcpBits(p.tcp)
	}
	return p.addrs(leaves.src, leaves.dst)
}

func tcpBits(flags string) (b bpf.NATTcpSeen) {
	b = sawACK
	for _, c := range flags {
		switch c {
		case 'S':
			b = b&^sawACK | sawSYN
		case 'F':
			b |= sawFIN
		case 'R':
			b |= sawRST
		}
	}
	return b
}

// choice is what a new flow may become: its claim without the port, and the ports.
type choice struct {
	flow  modelFlow
	ports portRange
	// claim answers the reply tuple with that port.
	claim func(port uint16) tuple
}

// outward answers the choice for a first packet of a container, or why there is none.
func (m *model) outward(p packet, fam family) (choice, bpf.NATCounter) {
	t := p.tuple()
	if p.proto == protoTCP && tcpBits(p.tcp)&sawRST != 0 {
		return choice{}, bpf.NATCounterDROP_TCP_UNEXPECTED
	}
	if p.echo() && !p.echoRequest() {
		return choice{}, bpf.NATCounterDROP_ICMP_UNRELATED
	}
	c := choice{flow: modelFlow{original: t}, ports: one(t.src.Port())}
	c.claim = func(port uint16) tuple { return tuple{t.proto, t.dst, at(t.src.Addr(), port)} }
	rule := m.snat(t.src.Addr())
	if rule == nil && !m.routed {
		return c, bpf.NATCounterDROP_NO_RULE
	}
	if rule == nil || slices.ContainsFunc(rule.except, func(x netip.Prefix) bool { return x.Contains(t.dst.Addr()) }) {
		return c, passed
	}
	c.flow.rule, c.flow.translation, c.flow.mapped = rule.id, bpf.NATTranslationTRANSLATION_SNAT, t.proto == protoUDP
	c.ports = rule.ports
	if rule.ports.first == 0 || t.proto == fam.icmp {
		c.ports = class(t)
	}
	address := rule.first
	if rule.masquerade {
		address = fam.uplink
	}
	c.claim = func(port uint16) tuple { return tuple{t.proto, t.dst, at(address, port)} }
	return c, passed
}

// inward answers the choice for a first packet of the world; false: it is not ours.
func (m *model) inward(p packet) (choice, bool) {
	t := p.tuple()
	rule := m.dnat(t.proto, t.dst, true)
	if rule == nil || p.proto == protoTCP && tcpBits(p.tcp)&sawRST != 0 {
		return choice{}, false
	}
	port := t.dst.Port()
	switch to := rule.toPorts; {
	case to == portRange{}:
	case to.first == to.last:
		port = to.first
	default:
		port = to.first + port - rule.ports.first
	}
	c := choice{
		flow:  modelFlow{original: t, inbound: true, rule: rule.id, translation: bpf.NATTranslationTRANSLATION_DNAT},
		ports: class(t),
	}
	c.claim = func(np uint16) tuple { return tuple{t.proto, at(rule.to, port), at(t.src.Addr(), np)} }
	return c, true
}

// class answers the ports of the same class as the source's.
func class(t tuple) portRange {
	switch port := t.src.Port(); {
	case t.proto != protoTCP && t.proto != protoUDP:
		return portRange{0, 65535}
	case port < 512:
		return portRange{1, 511}
	case port < 1024:
		return portRange{512, 1023}
	}
	return portRange{1024, 65535}
}

// snat answers the rule with the longest source that holds the address.
func (m *model) snat(source netip.Addr) (best *snatRule) {
	for i, r := range m.rules.snat {
		if r.source.Contains(source) && (best == nil || r.source.Bits() > best.source.Bits()) {
			best = &m.rules.snat[i]
		}
	}
	return best
}

// dnat answers the rule that publishes an endpoint: one with the address before one
// without, a port before a range.
func (m *model) dnat(proto uint8, dst netip.AddrPort, arriving bool) *dnatRule {
	for _, specific := range []bool{true, false} {
		if !specific && arriving && !slices.ContainsFunc(families, func(f family) bool { return dst.Addr() == f.uplink || dst.Addr() == f.second }) {
			return nil // without an address it is about those of the host
		}
		for _, single := range []bool{true, false} {
			for i, r := range m.rules.dnat {
				if r.proto == proto && r.destination.IsValid() == specific && (r.ports.first == r.ports.last) == single &&
					(!specific || r.destination == dst.Addr()) && r.to.Is4() == dst.Addr().Is4() &&
					r.ports.first <= dst.Port() && dst.Port() <= r.ports.last {
					return &m.rules.dnat[i]
				}
			}
		}
	}
	return nil
}

// published tells whether an outside endpoint is published to somebody else than inside.
func (m *model) published(proto uint8, outside, inside netip.AddrPort) bool {
	r := m.dnat(proto, outside, false)
	if r == nil {
		return false
	}
	port := outside.Port()
	if r.toPorts != (portRange{}) {
		port = r.toPorts.first
		if r.toPorts.first != r.toPorts.last {
			port += outside.Port() - r.ports.first
		}
	}
	return at(r.to, port) != inside
}

// owner answers the endpoint whose flows have an outside UDP endpoint for themselves.
func (m *model) owner(outside netip.AddrPort, ended bool) (inside netip.AddrPort, ok bool) {
	for _, f := range m.flows {
		if f.mapped && f.ended == ended && f.reply.dst == outside && f.reply.proto == protoUDP {
			return f.original.src, true
		}
	}
	return inside, false
}

// mapping answers the outside ports that an endpoint's flows have for it alone at an
// outside address: one for living flows, whatever is left for ended ones.
func (m *model) mapping(inside netip.AddrPort, outside netip.Addr, ended bool) (ports []uint16) {
	for _, f := range m.flows {
		if f.mapped && f.ended == ended && f.original.src == inside && f.reply.dst.Addr() == outside {
			ports = append(ports, f.reply.dst.Port())
		}
	}
	return ports
}

// free tells whether the datapath must find the port free; maybe, whether it may.
func (m *model) free(c choice, port uint16) (free, maybe bool) {
	claim := c.claim(port)
	if m.taken(claim) {
		return false, false
	}
	if c.flow.translation == bpf.NATTranslationTRANSLATION_SNAT && m.published(claim.proto, claim.dst, c.flow.original.src) {
		return false, false
	}
	free, maybe = !m.remains(claim), true
	if c.flow.mapped {
		if o, ok := m.owner(claim.dst, false); ok && o != c.flow.original.src {
			return false, false
		}
		if o, ok := m.owner(claim.dst, true); ok && o != c.flow.original.src {
			free = false
		}
	}
	return free, maybe
}

// judge takes the flow that the datapath made into the model, or says why it is wrong.
func (m *model) judge(c choice, port uint16, shared bool) (*modelFlow, error) {
	wanted := c.flow.original.src.Port()
	claim := c.claim(port)
	if port < c.ports.first || port > c.ports.last {
		return nil, fmt.Errorf("port %d is not in %d-%d", port, c.ports.first, c.ports.last)
	}
	if m.taken(claim) {
		return nil, fmt.Errorf("claim %s is another flow's", claim)
	}
	var mapped uint16
	var has, held bool
	var left []uint16
	if c.flow.mapped {
		if ports := m.mapping(c.flow.original.src, claim.dst.Addr(), false); len(ports) > 0 {
			mapped, has = ports[0], true
			held = !m.taken(c.claim(mapped)) && !m.remains(c.claim(mapped)) && c.ports.first <= mapped && mapped <= c.ports.last
		}
		// What ended flows leave until the expiry comes by, the endpoint may find or not.
		left = m.mapping(c.flow.original.src, claim.dst.Addr(), true)
	}
	switch free, maybe := m.free(c, port); {
	case held && port != mapped:
		return nil, fmt.Errorf("the endpoint has port %d, got %d", mapped, port)
	case has && port == mapped || slices.Contains(left, port):
	case has || shared:
		if shared && !has && len(left) == 0 && !m.exhausted(c, false) {
			return nil, fmt.Errorf("shares port %d though there are free ones", port)
		}
		c.flow.mapped = false
	case !maybe:
		return nil, fmt.Errorf("port %d is not free", port)
	case port != wanted && len(left) == 0:
		if wantedFree, _ := m.free(c, wanted); wantedFree && c.ports.first <= wanted && wanted <= c.ports.last {
			return nil, fmt.Errorf("got port %d (free: %v), though its own %d is free", port, free, wanted)
		}
	}
	f := c.flow
	f.reply = claim
	m.drop(f.original, f.reply)
	m.flows = append(m.flows, &f)
	return &f, nil
}

// exhausted tells whether no port of the range is surely free (or, maybe, is free at all).
func (m *model) exhausted(c choice, maybe bool) bool {
	for port := uint32(c.ports.first); port <= uint32(c.ports.last); port++ {
		free, perhaps := m.free(c, uint16(port))
		if free || maybe && perhaps {
			return false
		}
	}
	return true
}

// drop forgets ended flows with these keys: a new flow has replaced them.
func (m *model) drop(keys ...tuple) {
	m.flows = slices.DeleteFunc(m.flows, func(f *modelFlow) bool {
		return f.ended && (slices.Contains(keys, f.original) && slices.Contains(keys, f.reply))
	})
}

// end ends flows.
func (m *model) end(which func(f *modelFlow) bool) {
	for _, f := range m.flows {
		if which(f) {
			f.ended = true
		}
	}
}

// compare checks the table against the model.
func (m *model) compare(d *datapath) {
	d.Helper()
	halves := d.allHalves()
	m.flows = slices.DeleteFunc(m.flows, func(f *modelFlow) bool { // the expiry has been there
		h, ok := halves[f.reply.nat()]
		return f.ended && (!ok || goTuple(h.Other) != f.original)
	})
	generations := make(map[uint32]uint32)
	for _, h := range halves {
		if _, ok := generations[h.Rule]; !ok {
			generations[h.Rule] = d.generation(h.Rule)
		}
	}
	maps.DeleteFunc(halves, func(_ bpf.NATTuple, h bpf.NATHalf) bool {
		return h.Generation != generations[h.Rule] || h.Standing.Life == bpf.NATLifeLIFE_DEAD || h.Standing.Life == bpf.NATLifeLIFE_BURIED
	})
	for _, f := range m.flows {
		if f.ended {
			continue
		}
		want := wantFlow{
			original: f.original, reply: f.reply, translation: f.translation, rule: f.rule, out: f.out, in: f.in,
			outTCP: f.outTCP, inTCP: f.inTCP, inbound: f.inbound,
		}
		if f.inbound {
			want.back = bridgeIf
		} else {
			want.originalIf = bridgeIf
		}
		d.checkFlow(want)
		delete(halves, f.original.nat())
		delete(halves, f.reply.nat())
	}
	for key := range halves {
		d.Errorf("a living half that the model does not have: %s", goTuple(key))
	}
}
