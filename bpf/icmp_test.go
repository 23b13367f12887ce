package bpf_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tcnat/bpf"
)

// icmpError is an ICMP error message without what it quotes.
type icmpError struct {
	name       string
	kind, code uint8
	rest       uint32
}

var icmpErrors = map[string][]icmpError{
	"ipv4": {
		{"net-unreachable", 3, 0, 0}, {"host-unreachable", 3, 1, 0}, {"protocol-unreachable", 3, 2, 0},
		{"port-unreachable", 3, 3, 0}, {"fragmentation-needed", 3, 4, 1400}, {"prohibited", 3, 13, 0},
		{"source-quench", 4, 0, 0}, {"ttl-exceeded", 11, 0, 0}, {"reassembly-time", 11, 1, 0},
		{"parameter-problem", 12, 0, 9 << 24},
	},
	"ipv6": {
		{"no-route", 1, 0, 0}, {"prohibited", 1, 1, 0}, {"address-unreachable", 1, 3, 0}, {"port-unreachable", 1, 4, 0},
		{"packet-too-big", 2, 0, 1280}, {"hop-limit", 3, 0, 0}, {"reassembly-time", 3, 1, 0},
		{"parameter-problem", 4, 0, 40}, {"unknown-next-header", 4, 1, 6},
	},
}

// quoteForms are the ways in which a router quotes a packet.
var quoteForms = []struct {
	name   string
	change func(p packet) packet
	length func(p packet) int // 0: all of it
}{
	{"whole", func(p packet) packet { return p }, func(packet) int { return 0 }},
	{"8-bytes", func(p packet) packet { return p }, func(p packet) int { return p.headerLen() + 8 }},
	{"9-bytes", func(p packet) packet { return p }, func(p packet) int { return p.headerLen() + 9 }},
	{"checksum-and-no-more", func(p packet) packet { return p }, func(p packet) int { return p.headerLen() + 18 }},
	{"half-a-checksum", func(p packet) packet { return p }, func(p packet) int { return p.headerLen() + 17 }},
	{"options-8-bytes", withOptions, func(p packet) int { return p.headerLen() + 8 }},
	{"options-whole", withOptions, func(packet) int { return 0 }},
}

// withOptions gives an IPv4 packet options, an IPv6 packet extension headers.
func withOptions(p packet) packet {
	if p.v6() {
		p.extensions = []extension{
			{nextHopByHop, []byte{0, 1, 4, 0, 0, 0, 0}},
			{nextDestination, []byte{1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}},
		}
		return p
	}
	p.options = []byte{7, 7, 4, 0, 0, 0, 0, 1} // record route, then a nop
	return p
}

// error answers an ICMP error between these, quoting q.
func (c path) error(m icmpError, src, dst netip.Addr, q packet, quoted int) packet {
	q.ttl = 1
	return packet{
		src: at(src, 0), dst: at(dst, 0), proto: c.icmp, icmpType: m.kind, icmpCode: m.code, icmpRest: m.rest,
		quote: &q, quoteLen: quoted,
	}
}

// keepHalfChecksum: a quote that ends inside the transport checksum has it as it was, since
// half of one cannot be made right.
func keepHalfChecksum(before packet, after *packet) {
	size := 2
	if before.quote.proto == protoSCTP {
		size = 4
	}
	if part := before.quoteLen - before.quote.checksumAt(); part > 0 && part < size {
		q := before.quoted()
		after.quoteTail = q[len(q)-part:]
	}
}

// errorIn carries an error of a router in the world about a packet of the container.
func (c path) errorIn(m icmpError, form int) {
	c.Helper()
	sent, wire := c.out("PA", "the packet that the router quotes")
	f := quoteForms[form]
	sent, wire = f.change(sent), f.change(wire)
	before := c.error(m, c.router, c.outside.Addr(), wire, f.length(wire)).between(gatewayMAC, uplinkMAC)
	after := c.error(m, c.router, c.inside.Addr(), sent, f.length(sent)).between(gatewayMAC, uplinkMAC)
	keepHalfChecksum(before, &after)
	c.carryIn(before, after)
}

// errorOut carries an error of the container about a packet of the world.
func (c path) errorOut(m icmpError, form int) {
	c.Helper()
	wire, seen := c.in("PA", "the packet that the container quotes")
	f := quoteForms[form]
	wire, seen = f.change(wire), f.change(seen)
	before := c.error(m, c.inside.Addr(), c.peer.Addr(), seen, f.length(seen)).between(containerMAC, bridgeMAC)
	after := c.error(m, c.outside.Addr(), c.world.Addr(), wire, f.length(wire)).between(containerMAC, bridgeMAC)
	keepHalfChecksum(before, &after)
	c.carryOut(before, after)
}

// errorOfHost carries an error of the host itself about a packet of the world that it had
// translated and could not deliver.
func (c path) errorOfHost(m icmpError, form int) {
	c.Helper()
	wire, seen := c.in("PA", "the packet that the host quotes")
	f := quoteForms[form]
	wire, seen = f.change(wire), f.change(seen)
	before := c.error(m, c.uplink, c.peer.Addr(), seen, f.length(seen)).between(uplinkMAC, gatewayMAC)
	after := c.error(m, c.uplink, c.world.Addr(), wire, f.length(wire)).between(uplinkMAC, gatewayMAC)
	keepHalfChecksum(before, &after)
	c.passes(toUplink().by(0), before, after)
}

// translated are ways to have a flow, for tests that have another subject than flows.
var translated = []struct {
	name string
	open func(d *datapath, f family, p protocol) path // and the flow is answered
}{
	{"snat", func(d *datapath, f family, p protocol) path {
		d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, first: f.second, last: f.second, ports: portRange{30000, 30009}}}})
		c := d.path(f, p).as(f.second, 0).open()
		c.receives("SA", "")
		return c
	}},
	{"dnat", func(d *datapath, f family, p protocol) path {
		d.setRules(ruleSet{dnat: []dnatRule{publish(f, p.number(f), one(3005), one(80))}})
		c := d.path(f, p)
		c.inside, c.outside = at(f.container, 80), at(f.uplink, 3005)
		c.world = at(f.world, 50001)
		c.peer = c.world
		c.receives("S", "")
		c.sends("SA", "")
		return c
	}},
	{"dnat-client-port-moved", func(d *datapath, f family, p protocol) path {
		d.setRules(ruleSet{dnat: []dnatRule{
			publish(f, p.number(f), one(3005), one(80)), publish(f, p.number(f), one(3006), one(80)),
		}})
		first := d.path(f, p)
		first.inside, first.outside, first.peer, first.world = at(f.container, 80), at(f.uplink, 3005), at(f.world, 50001), at(f.world, 50001)
		first.receives("S", "")
		return first.clash(3006)
	}},
	{"identity", func(d *datapath, f family, p protocol) path {
		d.configure(func(c *bpf.NATConfig) { c.Flags |= bpf.NATConfigFlagCONFIG_ROUTED })
		c := d.path(f, p)
		c.sends("S", "")
		c.receives("SA", "")
		return c
	}},
}

// clash opens a DNAT flow from the same client port to another published port of the same
// server, whose client port must therefore change, and answers its path.
func (c path) clash(published uint16) path {
	c.Helper()
	c.outside = at(c.outside.Addr(), published)
	wire, seen := c.in("S", "")
	verdict, out := c.run(fromUplink(), wire.frame())
	if verdict != unspec {
		c.Fatalf("second flow: verdict %d, counted: %s", int32(verdict), c.counts())
	}
	moved := sourcePort(c.family, c.proto, out)
	if moved == c.world.Port() {
		c.Fatalf("both flows come from port %d", moved)
	}
	if moved < 1024 {
		c.Errorf("client port %d became %d: another class", c.world.Port(), moved)
	}
	c.peer = at(c.peer.Addr(), moved)
	c.sameFrame(seen.from(c.peer).frame(), out)
	c.sends("SA", "")
	return c
}

func TestICMPErrors(t *testing.T) {
	d := load(t, 1024)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, udpZero, udpLite, sctp, sctpZero, echo} {
			for _, tr := range translated {
				if p.name == echo.name && (tr.name == "dnat" || tr.name == "dnat-client-port-moved") {
					continue
				}
				d.each(f.name+"/"+p.name+"/"+tr.name, func(d *datapath) {
					c := tr.open(d, f, p)
					original, reply := c.halfOf(tuple{c.proto, c.inside, c.peer}), c.halfOf(tuple{c.proto, c.world, c.outside})
					for form, q := range quoteForms {
						for _, m := range icmpErrors[f.name] {
							c.group(m.name+"/"+q.name+"/in", func(c path) { c.errorIn(m, form) })
							c.group(m.name+"/"+q.name+"/out", func(c path) { c.errorOut(m, form) })
							c.group(m.name+"/"+q.name+"/host", func(c path) { c.errorOfHost(m, form) })
						}
					}
					// RFC 5508 REQ-6, RFC 5382: an error neither refreshes nor ends a flow.
					if diff := cmp.Diff(original, c.halfOf(tuple{c.proto, c.inside, c.peer})); diff != "" {
						c.Errorf("errors changed the flow: %s", diff)
					}
					if diff := cmp.Diff(reply, c.halfOf(tuple{c.proto, c.world, c.outside})); diff != "" {
						c.Errorf("errors changed the flow: %s", diff)
					}
				})
			}
		}
	}
}

// halfOf answers what ICMP errors must not change of a half.
func (c path) halfOf(key tuple) [4]uint64 {
	c.Helper()
	h := c.mustHalf(key)
	return [4]uint64{h.Packets, h.Bytes, uint64(h.Seen), uint64(h.Tcp)}
}

// group runs a sub-test on the path.
func (c path) group(name string, test func(c path)) {
	c.Helper()
	c.TB.(*testing.T).Run(name, func(t *testing.T) {
		d := *c.datapath
		d.TB = t
		sub := c
		sub.datapath = &d
		test(sub)
	})
}

// What quotes nothing that we know is left to the host where it comes from outside, and
// does not leave where it comes from a container.
func TestICMPErrorsUnrelated(t *testing.T) {
	d := load(t, 1024)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			c := translated[0].open(d, f, tcp)
			m := icmpErrors[f.name][0]
			sent, wire := c.out("PA", "x")
			_, seen := c.in("PA", "x")
			wrongPort := func(p packet) packet { return p.from(at(p.src.Addr(), 999)) }
			nested := c.error(m, c.outside.Addr(), c.world.Addr(), wire, 0)
			gre := wire.with(func(p *packet) { p.proto, p.payload = 47, make([]byte, 24) })
			for name, quote := range map[string]packet{
				"other-port": wrongPort(wire), "an-error": nested, "gre": gre, "not-translated": sent,
				"later-fragment": wire.with(func(p *packet) { p.fragment = 1480 }),
			} {
				c.group(name+"/from-outside", func(c path) {
					c.untouched(fromUplink(), c.error(m, c.router, c.outside.Addr(), quote, 0).between(gatewayMAC, uplinkMAC))
				})
			}
			for name, quote := range map[string]packet{
				"other-port": wrongPort(seen), "gre": seen.with(func(p *packet) { p.proto, p.payload = 47, make([]byte, 24) }),
				"never-received": sent,
			} {
				e := c.error(m, c.inside.Addr(), c.peer.Addr(), quote, 0)
				c.group(name+"/from-container", func(c path) {
					c.untouched(fromBridge(), e.between(containerMAC, bridgeMAC))
					c.drops(toUplink(), e.forwarded(), bpf.NATCounterDROP_ICMP_UNRELATED)
				})
				c.group(name+"/to-container", func(c path) {
					if name == "never-received" {
						return // that is what an error to it quotes
					}
					in := c.error(m, c.router, c.inside.Addr(), quote, 0)
					c.drops(toBridge(), in.between(bridgeMAC, containerMAC), bpf.NATCounterDROP_NO_FLOW)
				})
			}
			// Cut before the ports: nothing says which flow it is about.
			for n := range wire.headerLen() + 4 {
				e := c.error(m, c.router, c.outside.Addr(), wire, n+1).between(gatewayMAC, uplinkMAC)
				if n+1 >= wire.headerLen()+4 {
					break
				}
				c.untouched(fromUplink(), e)
				o := c.error(m, c.inside.Addr(), c.peer.Addr(), seen, n+1)
				c.drops(toUplink(), o, bpf.NATCounterDROP_ICMP_UNRELATED)
			}
			// The host's own errors about its own traffic are its own; one that quotes an unknown
			// packet to a container would tell its address.
			c.untouched(toUplink().by(0), c.error(m, f.uplink, f.world, wire.addrs(c.world, at(f.uplink, 999)), 0))
			c.drops(toUplink().by(0), c.error(m, f.uplink, f.world, wrongPort(seen), 0), bpf.NATCounterDROP_ICMP_UNRELATED)
			// A container speaks of what was sent to itself, not of its neighbours' packets, and to who sent it.
			c.drops(toUplink(), c.error(m, f.other, f.world, seen, 0), bpf.NATCounterDROP_ICMP_UNRELATED)
			c.drops(toUplink(), c.error(m, c.inside.Addr(), f.router, seen, 0), bpf.NATCounterDROP_ICMP_UNRELATED)
			// Who sends to a container's own address is not heard, even if it knows what the container has sent.
			direct := c.error(m, c.router, c.inside.Addr(), sent, 0)
			c.drops(fromUplink(), direct.between(gatewayMAC, uplinkMAC), bpf.NATCounterDROP_NO_FLOW)
			c.drops(toBridge().by(eth1If), direct.between(bridgeMAC, containerMAC), bpf.NATCounterDROP_NO_FLOW)
		})
	}
}

// What an earlier error quoted is not taken for the quote of one that is cut short.
func TestErrorCut(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			c := translated[0].open(d, f, tcp)
			_, seen := c.in("A", "")
			m := icmpErrors[f.name][0]
			cut := c.error(m, c.uplink, c.router, seen, 12).between(uplinkMAC, gatewayMAC)
			d.onOneCPU(func() {
				c.errorOut(m, 0)
				d.untouched(toUplink().by(0), cut)
			})
		})
	}
}
