package bpf_test

import (
	"net/netip"
	"testing"

	"tcnat/bpf"
)

// What must not pass is dropped for the reason given, and what is next to it passes.

// passed stands for "not dropped" among the reasons.
const passed = bpf.NATCounterCOUNTER_COUNT

type guard struct {
	name   string
	hook   func() hook
	packet func(f family, p packet) packet // from a TCP SYN of the container to the world
	set    func(d *datapath, f family)
	flags  bpf.NATConfigFlag
	reason bpf.NATCounter
}

func loopback(f family) netip.Addr {
	if f.name == "ipv4" {
		return ip("127.0.0.1")
	}
	return ip("::1")
}

func source(a func(f family) netip.Addr) func(family, packet) packet {
	return func(f family, p packet) packet { return p.from(at(a(f), p.src.Port())) }
}

func destination(a func(f family) netip.Addr, port uint16) func(family, packet) packet {
	return func(f family, p packet) packet { return p.to(at(a(f), port)) }
}

func same(_ family, p packet) packet { return p }

func worldOf(f family) netip.Addr     { return f.world }
func uplinkOf(f family) netip.Addr    { return f.uplink }
func bridgeOf(f family) netip.Addr    { return f.bridge }
func neighbourOf(f family) netip.Addr { return f.neighbour }
func unmanagedOf(f family) netip.Addr { return f.unmanaged }
func nowhereOf(f family) netip.Addr   { return f.nowhere }

// inbound answers a packet of the world to this address and port.
func inbound(to func(f family) netip.Addr, port uint16) func(family, packet) packet {
	return func(f family, p packet) packet {
		return p.addrs(at(f.world, 50000), at(to(f), port)).between(gatewayMAC, uplinkMAC)
	}
}

func masquerade(d *datapath, f family) {
	d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, masquerade: true}}})
}

func publishTCP(d *datapath, f family) {
	d.setRules(ruleSet{dnat: []dnatRule{publish(f, protoTCP, one(3005), one(80))}})
}

func tcpFlags(flags string) func(family, packet) packet {
	return func(_ family, p packet) packet { p.tcp = flags; return p }
}

func portless(f family, p packet) packet {
	p.proto, p.payload = 47, make([]byte, 20)
	return p.addrs(at(p.src.Addr(), 0), at(p.dst.Addr(), 0))
}

func echoOf(request bool) func(family, packet) packet {
	return func(f family, p packet) packet {
		p.proto, p.icmpType = f.icmp, f.echoReply
		if request {
			p.icmpType = f.echoRequest
		}
		return p
	}
}

// otherICMP is a timestamp request or, of IPv6, a node information query: neither an echo nor an error.
func otherICMP(f family, p packet) packet {
	p.proto, p.icmpType, p.tcp = f.icmp, 13, ""
	if f.name == "ipv6" {
		p.icmpType = 139
	}
	return p.addrs(at(p.src.Addr(), 0), at(p.dst.Addr(), 0))
}

var guards = []guard{
	{name: "own-address", hook: fromBridge, packet: same, reason: passed},
	{name: "address-of-the-world", hook: fromBridge, packet: source(worldOf), reason: bpf.NATCounterDROP_SPOOFED_ADDRESS},
	{name: "address-of-the-host", hook: fromBridge, packet: source(uplinkOf), reason: bpf.NATCounterDROP_SPOOFED_ADDRESS},
	{name: "address-of-another-bridge", hook: fromBridge, packet: source(neighbourOf), reason: bpf.NATCounterDROP_SPOOFED_ADDRESS},
	{name: "on-another-bridge", hook: func() hook { return fromBridge().on(bridge2If).by(bridge2If) },
		packet: func(_ family, p packet) packet { return p.between(containerMAC, bridge2MAC) }, reason: bpf.NATCounterDROP_SPOOFED_ADDRESS},
	{name: "another-mac", hook: fromBridge, packet: func(_ family, p packet) packet { return p.between(otherMAC, bridgeMAC) },
		reason: bpf.NATCounterDROP_SPOOFED_MAC},
	{name: "to-loopback", hook: fromBridge, packet: destination(loopback, 80), reason: bpf.NATCounterDROP_LOOPBACK},
	{name: "from-loopback", hook: fromBridge, packet: source(loopback), reason: bpf.NATCounterDROP_LOOPBACK},
	{name: "unmanaged-device", hook: fromBridge, packet: destination(unmanagedOf, 80), reason: bpf.NATCounterDROP_NO_UPLINK},
	{name: "unmanaged-device-echo", hook: fromBridge, packet: func(f family, p packet) packet {
		return echoOf(true)(f, p.to(at(f.unmanaged, 0)))
	}, reason: bpf.NATCounterDROP_NO_UPLINK},
	{name: "unmanaged-device-gre", hook: fromBridge, packet: func(f family, p packet) packet {
		return portless(f, p.to(at(f.unmanaged, 0)))
	}, reason: bpf.NATCounterDROP_NO_UPLINK},
	{name: "unmanaged-device-passed", hook: fromBridge, packet: destination(unmanagedOf, 80), flags: bpf.NATConfigFlagCONFIG_PASS_UNMANAGED, reason: passed},
	{name: "another-bridge", hook: fromBridge, packet: destination(neighbourOf, 80), reason: bpf.NATCounterDROP_ISOLATED},
	{name: "another-bridge-not-isolated", hook: fromBridge, packet: destination(neighbourOf, 80), flags: bpf.NATConfigFlagCONFIG_NO_ISOLATION, reason: passed},
	{name: "blackhole-is-for-the-kernel", hook: fromBridge, packet: destination(nowhereOf, 80), reason: passed},
	{name: "to-the-host", hook: fromBridge, packet: destination(bridgeOf, 53), reason: passed},
	{name: "another-port-of-the-host", hook: fromBridge, packet: destination(uplinkOf, 3006), set: publishTCP, reason: passed},

	{name: "other-icmp", hook: toUplink, packet: otherICMP, set: masquerade, reason: bpf.NATCounterDROP_PROTOCOL},
	{name: "other-icmp-to-the-host", hook: fromUplink, packet: func(f family, p packet) packet {
		return otherICMP(f, inbound(uplinkOf, 0)(f, p))
	}, reason: passed},
	{name: "no-rule", hook: toUplink, packet: same, reason: bpf.NATCounterDROP_NO_RULE},
	{name: "rule-of-another-uplink", hook: toUplink, packet: same, set: func(d *datapath, f family) {
		d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, uplink: eth1If, masquerade: true}}})
	}, reason: bpf.NATCounterDROP_NO_RULE},
	{name: "rule-of-another-source", hook: toUplink, packet: same, set: func(d *datapath, f family) {
		d.setRules(ruleSet{snat: []snatRule{{source: prefixOf(f.other), masquerade: true}}})
	}, reason: bpf.NATCounterDROP_NO_RULE},
	{name: "rst-without-a-flow", hook: toUplink, packet: tcpFlags("R"), set: masquerade, reason: bpf.NATCounterDROP_TCP_UNEXPECTED},
	{name: "gre", hook: toUplink, packet: portless, set: masquerade, reason: bpf.NATCounterDROP_PROTOCOL},
	{name: "echo-reply-without-a-flow", hook: toUplink, packet: echoOf(false), set: masquerade, reason: bpf.NATCounterDROP_ICMP_UNRELATED},
	{name: "the-host-s-own", hook: func() hook { return toUplink().by(0) }, packet: source(uplinkOf), set: masquerade, reason: passed},
	{name: "forwarded-for-others", hook: func() hook { return toUplink().by(eth1If) }, packet: source(unmanagedOf), set: masquerade, reason: passed},
	{name: "gre-of-the-host", hook: func() hook { return toUplink().by(0) },
		packet: func(f family, p packet) packet { return portless(f, source(uplinkOf)(f, p)) }, set: masquerade, reason: passed},

	{name: "reply-to-nothing", hook: fromUplink, packet: inbound(uplinkOf, 40000), set: masquerade, reason: passed},
	{name: "not-published", hook: fromUplink, packet: inbound(uplinkOf, 3006), set: publishTCP, reason: passed},
	{name: "published-for-udp", hook: fromUplink, packet: func(f family, p packet) packet {
		p.proto = protoUDP
		return inbound(uplinkOf, 3005)(f, p)
	}, set: publishTCP, reason: passed},
	{name: "published-rst", hook: fromUplink, packet: func(f family, p packet) packet {
		p.tcp = "R"
		return inbound(uplinkOf, 3005)(f, p)
	}, set: publishTCP, reason: passed},
	{name: "any-address-is-the-host-s", hook: fromUplink, packet: inbound(neighbourOf, 3005), set: publishTCP, reason: bpf.NATCounterDROP_NO_FLOW},
	{name: "published-on-another-address", hook: fromUplink, packet: inbound(uplinkOf, 3005), set: func(d *datapath, f family) {
		r := publish(f, protoTCP, one(3005), one(80))
		r.destination = f.second
		d.setRules(ruleSet{dnat: []dnatRule{r}})
	}, reason: passed},
	{name: "published-on-another-device", hook: fromUplink, packet: inbound(uplinkOf, 3005), set: func(d *datapath, f family) {
		r := publish(f, protoTCP, one(3005), one(80))
		r.ingress = eth1If
		d.setRules(ruleSet{dnat: []dnatRule{r}})
	}, reason: passed},
	{name: "not-allowed", hook: fromUplink, packet: inbound(uplinkOf, 3005), set: func(d *datapath, f family) {
		r := publish(f, protoTCP, one(3005), one(80))
		r.allow = []netip.Prefix{prefixOf(f.router), f.subnet2}
		d.setRules(ruleSet{dnat: []dnatRule{r}})
	}, reason: bpf.NATCounterDROP_NOT_ALLOWED},
	{name: "from-loopback-outside", hook: fromUplink, packet: func(f family, p packet) packet {
		return inbound(uplinkOf, 3005)(f, p).from(at(loopback(f), 1))
	}, set: publishTCP, reason: bpf.NATCounterDROP_LOOPBACK},
	{name: "to-loopback-outside", hook: fromUplink, packet: inbound(loopback, 3005), set: publishTCP, reason: bpf.NATCounterDROP_LOOPBACK},
	{name: "direct", hook: fromUplink, packet: inbound(func(f family) netip.Addr { return f.container }, 80), reason: bpf.NATCounterDROP_NO_FLOW},
	{name: "direct-echo", hook: fromUplink, packet: func(f family, p packet) packet {
		return echoOf(true)(f, inbound(func(f family) netip.Addr { return f.container }, 0)(f, p))
	}, reason: bpf.NATCounterDROP_NO_FLOW},
	{name: "to-the-bridge-s-address", hook: fromUplink, packet: inbound(bridgeOf, 53), reason: passed},

	{name: "host-to-container", hook: func() hook { return toBridge().by(0) }, packet: inbound(func(f family) netip.Addr { return f.container }, 80), reason: passed},
	{name: "world-to-container", hook: toBridge, packet: inbound(func(f family) netip.Addr { return f.container }, 80), reason: bpf.NATCounterDROP_NO_FLOW},
	{name: "world-to-container-echo", hook: toBridge, packet: func(f family, p packet) packet {
		return echoOf(true)(f, inbound(func(f family) netip.Addr { return f.container }, 0)(f, p))
	}, reason: bpf.NATCounterDROP_NO_FLOW},
	{name: "world-to-container-gre", hook: toBridge, packet: func(f family, p packet) packet {
		return portless(f, inbound(func(f family) netip.Addr { return f.container }, 0)(f, p))
	}, reason: bpf.NATCounterDROP_NO_FLOW},
	{name: "unmanaged-to-container", hook: func() hook { return toBridge().by(eth1If) },
		packet: inbound(func(f family) netip.Addr { return f.container }, 80), reason: bpf.NATCounterDROP_NO_FLOW},
	{name: "bridge-to-bridge", hook: func() hook { return toBridge().by(bridge2If) }, packet: func(f family, p packet) packet {
		return p.addrs(at(f.neighbour, 1), at(f.container, 80))
	}, reason: bpf.NATCounterDROP_ISOLATED},
	{name: "bridge-to-bridge-not-isolated", hook: func() hook { return toBridge().by(bridge2If) }, packet: func(f family, p packet) packet {
		return p.addrs(at(f.neighbour, 1), at(f.container, 80))
	}, flags: bpf.NATConfigFlagCONFIG_NO_ISOLATION, reason: passed},
}

func TestGuards(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, g := range guards {
			d.each(f.name+"/"+g.name, func(d *datapath) {
				d.configure(func(c *bpf.NATConfig) { c.Flags |= g.flags })
				if g.set != nil {
					g.set(d, f)
				}
				sent, _ := d.path(f, tcp).out("S", "")
				p := g.packet(f, sent)
				if g.reason == passed {
					d.untouched(g.hook(), p)
				} else {
					d.drops(g.hook(), p, g.reason)
				}
				if n := d.halves(); n != 0 {
					t.Errorf("made flows:\n%s", d.allFlows())
				}
				unmanaged := elements[uint32, uint64](d, d.Unmanaged)
				if want := g.reason == bpf.NATCounterDROP_NO_UPLINK; want && unmanaged[eth1If] != 1 || !want && len(unmanaged) != 0 {
					d.Errorf("packets to devices without programs: %v", unmanaged)
				}
			})
		}
	}
}

// A tuple is easily forged: a flow's packets count only where the flow's own side can be.
func TestPresenter(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, sctp, echo} {
			d.each(f.name+"/"+p.name, func(d *datapath) {
				c := translated[0].open(d, f, p)
				before := d.allHalves()
				sent, _ := c.out("A", "")
				wire, seen := c.in("A", "")
				// the reply, forged by a container
				d.drops(fromBridge(), wire.between(containerMAC, bridgeMAC), bpf.NATCounterDROP_SPOOFED_ADDRESS)
				// the original, from outside: not the flow's, so not translated
				d.untouched(fromUplink(), sent.between(gatewayMAC, uplinkMAC))
				// the original, from another bridge
				verdict, _ := d.run(toUplink().by(bridge2If), sent.frame())
				if verdict != shot {
					d.Errorf("another bridge's packet with the flow's tuple: verdict %d", int32(verdict))
				}
				// the reply, already translated, by another way than the uplink's translation
				d.drops(toBridge().on(bridge2If), seen.between(bridge2MAC, containerMAC), bpf.NATCounterDROP_NO_FLOW)
				// sent to the container's own address by whom it speaks with
				d.drops(fromUplink(), seen, bpf.NATCounterDROP_NO_FLOW)
				d.drops(toBridge().by(eth1If), seen.between(bridgeMAC, containerMAC), bpf.NATCounterDROP_NO_FLOW)
				if after := d.allHalves(); !equalHalves(before, after) {
					d.Errorf("forged packets changed the flow:\n%v\n%v", before, after)
				}
			})
		}
	}
}

// Linux forwards 169.254.0.0/16 (cloud metadata), unlike fe80::/10: it is translated like
// any address, and is no container's own.
func TestLinkLocalIPv4(t *testing.T) {
	d := load(t, 64)
	f := families[0]
	d.each("destination", func(d *datapath) {
		masquerade(d, f)
		c := d.path(f, tcp).as(f.uplink, 0).toward(at(ip("169.254.169.254"), 80))
		c.sends("S", "")
		c.receives("SA", "")
	})
	d.each("source", func(d *datapath) {
		sent, _ := d.path(f, tcp).out("S", "")
		d.drops(fromBridge(), sent.from(at(ip("169.254.1.2"), 1)), bpf.NATCounterDROP_SPOOFED_ADDRESS)
	})
}
