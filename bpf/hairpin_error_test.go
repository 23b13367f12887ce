package bpf_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tcnat/bpf"
)

// crossing is a packet of a loop as each of those who see it sees it.
type crossing struct {
	from, to               resident
	sent, between, arrived packet
}

// cross answers a packet of the client's, or of the server's.
func (l loop) cross(forth bool) crossing {
	if forth {
		sent := l.packet(l.asks, l.published, true, "PA", "the packet that is quoted")
		between := sent.addrs(l.asks, l.answers)
		return crossing{l.client, l.server, sent, between, between.addrs(l.outsideAt, l.answers)}
	}
	sent := l.packet(l.answers, l.outsideAt, false, "PA", "the packet that is quoted")
	between := sent.addrs(l.answers, l.asks)
	return crossing{l.server, l.client, sent, between, between.addrs(l.published, l.asks)}
}

// errors carries an error of the packet's receiver back to its sender, who gets to see its own packet, and
// whom it had sent that to.
func (l loop) errors(c crossing, m icmpError, form int) {
	l.Helper()
	f := quoteForms[form]
	quoted := f.change(c.arrived)
	before := l.error(m, c.to.address, c.arrived.src.Addr(), quoted, f.length(quoted)).between(c.to.mac, c.to.gateway)
	quoted = f.change(c.between)
	turned := l.error(m, c.to.address, c.from.address, quoted, f.length(quoted)).between(c.to.mac, c.to.gateway)
	keepHalfChecksum(before, &turned)
	l.turns(fromBridge().on(c.to.bridge).by(c.to.bridge), before, turned)

	turned = turned.forwarded().between(c.from.gateway, c.from.mac)
	quoted = f.change(c.sent)
	after := l.error(m, c.sent.dst.Addr(), c.from.address, quoted, f.length(quoted)).forwarded().between(c.from.gateway, c.from.mac)
	keepHalfChecksum(before, &after)
	l.passes(toBridge().on(c.from.bridge).by(c.to.bridge), turned, after)
}

// errorOfHost carries an error of the host, which saw the packet between the hooks.
func (l loop) errorOfHost(c crossing, own netip.Addr, m icmpError, form int) {
	l.Helper()
	f := quoteForms[form]
	quoted := f.change(c.between)
	before := l.error(m, own, c.from.address, quoted, f.length(quoted)).between(c.from.gateway, c.from.mac)
	quoted = f.change(c.sent)
	after := l.error(m, own, c.from.address, quoted, f.length(quoted)).between(c.from.gateway, c.from.mac)
	keepHalfChecksum(before, &after)
	l.passes(toBridge().on(c.from.bridge).by(0), before, after)
}

// Errors about packets of a hairpin flow reach who sent them, and speak of the addresses that it knows
// (RFC 5508 REQ-7, 7a).
func TestHairpinErrors(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, udpZero} {
			for name, pair := range map[string][2]resident{
				"own": {clientOf(f), clientOf(f)}, "neighbour": {clientOf(f), besideOf(f)}, "other-bridge": {clientOf(f), beyondOf(f)},
			} {
				for form, q := range quoteForms {
					d.each(f.name+"/"+p.name+"/"+name+"/"+q.name, func(d *datapath) {
						d.setRules(publishOn(pair[1].address, p.number(f)))
						l := d.loop(f, p, pair[0], pair[1], f.uplink)
						l.life()
						before := elements[bpf.NATTuple, bpf.NATHalf](d, d.Flows)
						for _, m := range icmpErrors[f.name] {
							for _, forth := range []bool{true, false} {
								c := l.cross(forth)
								l.errors(c, m, form)
								l.errorOfHost(c, f.bridge, m, form)
							}
						}
						if change := cmp.Diff(before, elements[bpf.NATTuple, bpf.NATHalf](d, d.Flows)); change != "" {
							d.Errorf("an error changed the flow (- before, + after): %s", change)
						}
						l.forth("A", "")
						l.back("A", "")
					})
				}
			}
		}
	}
}

// A container cannot speak for another one, nor to one that did not send what it quotes.
func TestHairpinErrorsForged(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			d.setRules(publishOn(f.other, protoTCP))
			l := d.loop(f, tcp, clientOf(f), besideOf(f), f.uplink)
			l.life()
			m := icmpErrors[f.name][0]
			arrived := l.cross(true).arrived
			forged := l.error(m, f.container, arrived.src.Addr(), arrived, 0).between(containerMAC, bridgeMAC)
			d.drops(fromBridge(), forged, bpf.NATCounterDROP_ICMP_UNRELATED)
			elsewhere := l.error(m, f.other, f.second, arrived, 0).between(otherMAC, bridgeMAC)
			d.drops(fromBridge(), elsewhere, bpf.NATCounterDROP_ICMP_UNRELATED)
			// about what was never sent: the host's business
			unknown := arrived.addrs(at(f.uplink, 41000), l.answers)
			d.untouched(fromBridge(), l.error(m, f.other, f.uplink, unknown, 0).between(otherMAC, bridgeMAC))
		})
	}
}
