package bpf_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"tcnat/bpf"
)

// resident is a container: its address, that of its device, and its bridge.
type resident struct {
	address netip.Addr
	mac     macs
	bridge  uint32
	gateway macs // the bridge's own address
}

func clientOf(f family) resident { return resident{f.container, containerMAC, bridgeIf, bridgeMAC} }
func besideOf(f family) resident { return resident{f.other, otherMAC, bridgeIf, bridgeMAC} }
func beyondOf(f family) resident { return resident{f.neighbour, neighbourMAC, bridge2If, bridge2MAC} }

// loop is a conversation of a client container with a server container by a published port:
//
//	client's side              between the hooks          server's side
//	client -> published   >>   client -> server   >>   outside -> server
type loop struct {
	path
	client, server                      resident
	asks, published, outsideAt, answers netip.AddrPort
}

func (d *datapath) loop(f family, p protocol, client, server resident, published netip.Addr) loop {
	return loop{
		path: d.path(f, p), client: client, server: server,
		asks: at(client.address, 40000), published: at(published, 3005), outsideAt: at(published, 40000), answers: at(server.address, 80),
	}
}

// carry takes a packet from one container to the other: through from_bridge, which changes the
// destination, the host's routing, and to_bridge, which changes the source.
func (l loop) carry(from, to resident, sent packet, turned, left netip.AddrPort, arrives netip.AddrPort) {
	l.Helper()
	sent = sent.between(from.mac, from.gateway)
	between := sent.addrs(turned, arrives)
	l.turns(fromBridge().on(from.bridge).by(from.bridge), sent, between)
	between = between.forwarded().between(to.gateway, to.mac)
	l.passes(toBridge().on(to.bridge).by(from.bridge), between, between.addrs(left, arrives))
}

func (l loop) forth(flags, payload string) {
	l.Helper()
	l.carry(l.client, l.server, l.packet(l.asks, l.published, true, flags, payload), l.asks, l.outsideAt, l.answers)
}

func (l loop) back(flags, payload string) {
	l.Helper()
	l.carry(l.server, l.client, l.packet(l.answers, l.outsideAt, false, flags, payload), l.answers, l.published, l.asks)
}

func (l loop) life() {
	l.Helper()
	l.forth("S", "question")
	l.back("SA", "answer")
	l.forth("A", "x")
	l.back("PA", "y")
}

func publishOn(server netip.Addr, protos ...uint8) (rules ruleSet) {
	for _, proto := range protos {
		rules.dnat = append(rules.dnat, dnatRule{proto: proto, ports: one(3005), to: server, toPorts: one(80)})
	}
	return rules
}

// A container reaches its own published port, that of a neighbour and that of a container on another
// bridge, by every address of the host; the server sees that address.
func TestHairpin(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, udpZero, sctp, sctpZero} {
			for name, pair := range map[string][2]resident{
				"own": {clientOf(f), clientOf(f)}, "neighbour": {clientOf(f), besideOf(f)}, "other-bridge": {clientOf(f), beyondOf(f)},
			} {
				for _, published := range []netip.Addr{f.uplink, f.second, f.bridge} {
					d.each(fmt.Sprintf("%s/%s/%s/%s", f.name, p.name, name, published), func(d *datapath) {
						d.setRules(publishOn(pair[1].address, p.number(f)))
						l := d.loop(f, p, pair[0], pair[1], published)
						l.life()
						if n := d.halves(); n != 4 {
							d.Errorf("%d halves, want the two of the flow and its two transits:\n%s", n, d.allFlows())
						}
						if p.number(f) == protoUDP {
							if n := len(d.mappings()); n != 1 {
								d.Errorf("%d mappings, want 1", n)
							}
						}
					})
				}
			}
		}
		d.each(f.name+"/ends", func(d *datapath) {
			d.setRules(publishOn(f.other, protoTCP, protoUDP, protoSCTP))
			for _, p := range []protocol{tcp, udp, sctp} {
				d.loop(f, p, clientOf(f), besideOf(f), f.uplink).life()
			}
			if !d.complete { // it takes seconds
				d.emptied()
			}
		})
	}
}

// A rule that maps the client to an address of its own choice holds here as well (RFC 4787 REQ-9a).
func TestHairpinOutsideAddress(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			rules := publishOn(f.other, protoTCP)
			rules.snat = []snatRule{{source: f.subnet, first: f.second, last: f.second}}
			d.setRules(rules)
			l := d.loop(f, tcp, clientOf(f), besideOf(f), f.uplink)
			l.outsideAt = at(f.second, 40000)
			l.life()
		})
	}
}

// Two clients with one port: the server sees two.
func TestHairpinPortClash(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, sctp} {
			d.each(f.name+"/"+p.name, func(d *datapath) {
				d.setRules(publishOn(f.neighbour, p.number(f)))
				a := d.loop(f, p, clientOf(f), beyondOf(f), f.uplink)
				b := d.loop(f, p, besideOf(f), beyondOf(f), f.uplink)
				a.life()
				sent := b.packet(b.asks, b.published, true, "S", "x").between(otherMAC, bridgeMAC)
				turned := sent.addrs(b.asks, b.answers)
				b.turns(fromBridge(), sent, turned)
				between := turned.forwarded().between(bridge2MAC, neighbourMAC)
				verdict, out := b.run(toBridge().on(bridge2If).by(bridgeIf), between.frame())
				if verdict != unspec {
					d.Fatalf("verdict %d; counted %s", int32(verdict), d.counts())
				}
				port := sourcePort(f, b.proto, out)
				if port == 40000 || port < 1024 {
					d.Errorf("the server sees port %d of both", port)
				}
				b.outsideAt = at(f.uplink, port)
				b.life()
				a.back("A", "z")
				a.forth("A", "z")
			})
		}
	}
}

// A closed connection gives its place to a new one at once, transits and all.
func TestHairpinAgain(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			d.setRules(publishOn(f.other, protoTCP))
			l := d.loop(f, tcp, clientOf(f), besideOf(f), f.uplink)
			for range 3 {
				l.life()
				l.forth("FA", "")
				l.back("FA", "")
				l.forth("A", "")
			}
			l.life()
			if n := d.halves(); n != 4 {
				d.Errorf("%d halves, want 4:\n%s", n, d.allFlows())
			}
			if !d.complete { // it takes seconds
				d.emptied()
			}
		})
	}
}

// From one port to two published ports of one server port: the packets would look alike to to_bridge.
func TestHairpinAmbiguous(t *testing.T) {
	t.Parallel() // most of it is waiting
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, sctp} {
			d.each(f.name+"/"+p.name, func(d *datapath) {
				rules := publishOn(f.other, p.number(f))
				second := rules.dnat[0]
				second.ports = one(3006)
				rules.dnat = append(rules.dnat, second)
				d.setRules(rules)
				l := d.loop(f, p, clientOf(f), besideOf(f), f.uplink)
				l.life()
				sent := l.packet(l.asks, at(f.uplink, 3006), true, "S", "x").between(containerMAC, bridgeMAC)
				d.drops(fromBridge(), sent, bpf.NATCounterDROP_HAIRPIN)
				l.forth("A", "")
				l.back("A", "")
				if n := d.halves(); n != 4 {
					d.Errorf("%d halves, want 4:\n%s", n, d.allFlows())
				}
				l.asks, l.published, l.outsideAt = at(f.container, 40001), at(f.uplink, 3006), at(f.uplink, 40001)
				l.life()
				if !d.complete { // it takes seconds
					d.emptied()
				}
			})
		}
	}
}

// Who may not come in from outside may not by hairpin, and a rule that goes takes its flows along.
func TestHairpinRules(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			rules := publishOn(f.other, protoTCP)
			rules.dnat[0].allow = []netip.Prefix{prefixOf(f.container)}
			d.setRules(rules)
			l := d.loop(f, tcp, clientOf(f), besideOf(f), f.uplink)
			l.life()
			far := d.loop(f, tcp, beyondOf(f), besideOf(f), f.uplink)
			refused := far.packet(far.asks, far.published, true, "S", "").between(neighbourMAC, bridge2MAC)
			d.drops(fromBridge().on(bridge2If).by(bridge2If), refused, bpf.NATCounterDROP_NOT_ALLOWED)
			// a port that is not published is the host's own business, and so is one for another device
			d.untouched(fromBridge(), l.packet(l.asks, at(f.uplink, 3006), true, "S", "").between(containerMAC, bridgeMAC))
			d.setRules(ruleSet{})
			d.endRule(dnatID(0))
			d.untouched(fromBridge(), l.packet(l.asks, l.published, true, "A", "").between(containerMAC, bridgeMAC))
			rules = publishOn(f.other, protoTCP)
			rules.dnat[0].ingress = uplinkIf
			d.setRules(rules)
			d.untouched(fromBridge(), l.packet(at(f.container, 41000), l.published, true, "S", "").between(containerMAC, bridgeMAC))
		})
	}
}

// A rule that goes and comes back, as when a container starts anew, takes old flows along: the next packet begins
// one that works, on whichever bridge.
func TestHairpinRuleSwap(t *testing.T) {
	t.Parallel() // most of it is waiting
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, sctp} {
			for _, server := range []resident{clientOf(f), besideOf(f), beyondOf(f)} {
				d.each(f.name+"/"+p.name+"/"+server.address.String(), func(d *datapath) {
					rules := publishOn(server.address, p.number(f))
					d.setRules(rules)
					l := d.loop(f, p, clientOf(f), server, f.uplink)
					l.life()
					for range 3 {
						d.endRule(dnatID(0))
						d.setRules(rules)
						l.forth("A", "x")
						l.back("A", "y")
						l.forth("A", "x")
					}
					if n := d.halves(); n != 4 {
						d.Errorf("%d halves, want 4:\n%s", n, d.allFlows())
					}
					if f.name == "ipv4" && !d.complete { // it takes seconds
						d.emptied()
					}
				})
			}
		}
	}
}

// An address that is nobody's known one is none of the host's, though the host may have no route to it; what an
// unconnected socket of the host is answered is not for a container whose published range it hits.
func TestHairpinNotOurs(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			d.setRules(publishOn(f.other, protoTCP, protoUDP))
			l := d.loop(f, tcp, clientOf(f), besideOf(f), f.second)
			d.check(d.HostAddresses.Delete(natAddr(f.second)))
			d.untouched(fromBridge(), l.packet(l.asks, l.published, true, "S", "").between(containerMAC, bridgeMAC))
			d.loop(f, udp, clientOf(f), besideOf(f), f.uplink).life()
			bindUDP(d, at(f.uplink, 3005))
			answer := l.packet(at(f.container, 53), at(f.uplink, 3005), true, "", "answer")
			answer.proto = protoUDP
			d.untouched(fromBridge(), answer.between(containerMAC, bridgeMAC))
		})
	}
}

// The host tells who routes by it that the destination is a neighbour. Of a hairpin that is not to be
// known; of other destinations it is.
func TestHairpinRedirect(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			redirect := func(about netip.Addr) packet {
				rest := about.AsSlice()
				quote := packet{src: at(f.container, 40000), dst: at(about, 80), proto: protoTCP, tcp: "S"}
				p := packet{src: at(f.bridge, 0), dst: at(f.container, 0), proto: f.icmp, icmpType: 5, icmpCode: 1, quote: &quote}
				if f.name == "ipv6" {
					// target and destination, then options
					p.icmpType, p.icmpCode, p.quote = 137, 0, nil
					p.payload = append(append([]byte{}, rest...), rest...)
				} else {
					p.icmpRest = binary.BigEndian.Uint32(rest)
				}
				return p.between(bridgeMAC, containerMAC)
			}
			host := toBridge().by(0)
			d.drops(host, redirect(f.other), bpf.NATCounterDROP_HAIRPIN_REDIRECT)
			d.untouched(host, redirect(f.world))
			d.untouched(host, packet{src: at(f.bridge, 0), dst: at(f.container, 0), proto: f.icmp, icmpType: f.echoRequest}.between(bridgeMAC, containerMAC))
		})
	}
}
