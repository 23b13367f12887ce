package bpf_test

import (
	"net/netip"
	"testing"
	"time"

	"tcnat/bpf"
)

func (d *datapath) anySender() {
	d.configure(func(c *bpf.NATConfig) { c.Flags |= bpf.NATConfigFlagCONFIG_ANY_SENDER })
}

// Whoever sends to the outside port of a container's endpoint reaches it where filtering is
// endpoint-independent, and nobody but whom the container has sent to where it is not (RFC 4787 REQ-8).
func TestFiltering(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{udp, udpZero} {
			open := func(d *datapath) (c, stranger path) {
				masquerade(d, f)
				d.path(f, p).as(f.uplink, 0).by(f.other, 40000).open() // so that the port moves
				c = d.path(f, p).as(f.uplink, 0).open()
				return c, c.toward(at(f.router, 5555))
			}
			d.each(f.name+"/"+p.name+"/endpoint-dependent", func(d *datapath) {
				_, stranger := open(d)
				wire, _ := stranger.in("", "who is there")
				d.untouched(fromUplink(), wire)
			})
			d.each(f.name+"/"+p.name+"/endpoint-independent", func(d *datapath) {
				d.anySender()
				c, stranger := open(d)
				for range 2 {
					stranger.receives("", "who is there")
					stranger.sends("", "it is me")
					c.receives("", "x")
					c.sends("", "y")
				}
				want := stranger.flow(true, bpf.NATTranslationTRANSLATION_DNAT, snatID(0))
				want.out, want.in = 2, 2
				d.checkFlow(want)
				d.checkMappings()
				// a port that is nobody's, and TCP, are the host's business
				wire, _ := stranger.as(f.uplink, 41234).in("", "x")
				d.untouched(fromUplink(), wire)
				wire.proto, wire.dst, wire.tcp = protoTCP, stranger.outside, "S"
				d.untouched(fromUplink(), wire)
			})
		}
	}
}

// The stranger's flow keeps the mapping when the container's own has ended, and ends with the rule that the
// container's flows have. Then the port is nobody's.
func TestFilteringEnds(t *testing.T) {
	t.Parallel() // most of it is waiting
	d := load(t, 64)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			sub := *d
			d := &sub
			d.TB = t
			d.reset()
			d.anySender()
			masquerade(d, f)
			c := d.path(f, udp).as(f.uplink, 0).open()
			stranger := c.toward(at(f.router, 5555))
			stranger.receives("", "hello")
			_, claim := c.tuples(false)
			if !d.endFlow(claim, c.id(false)) {
				t.Fatal("no flow to end")
			}
			d.startExpiry()
			d.until("the container's flow ends", 20*time.Second, func() bool { return d.halves() == 2 })
			d.checkMappings()
			stranger.receives("", "still there")
			c.toward(at(f.gateway, 7)).receives("", "so is the mapping")

			d.endRule(snatID(0))
			wire, _ := stranger.in("", "and now")
			d.run(fromUplink(), wire.frame()) // may begin one by the rule that is still there, if the mapping is
			d.setRules(ruleSet{})
			d.endRule(snatID(0))
			d.untouched(fromUplink(), wire)
			d.until("the flows end with their rule", 20*time.Second, func() bool { return d.halves() == 0 && len(d.mappings()) == 0 })
			masquerade(d, f)
			d.untouched(fromUplink(), wire)
			d.emptied()
		})
	}
}

// A published port's rule is asked first, and so is a socket of the host's own. What has an inside address
// does not come from outside, and an excepted peer knows the container by its own.
func TestFilteringRefuses(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			d.anySender()
			d.setRules(ruleSet{
				snat: []snatRule{{source: f.subnet, masquerade: true, except: []netip.Prefix{prefixOf(f.gateway)}}},
				dnat: []dnatRule{publish(f, protoUDP, one(3005), one(3005))},
			})
			c := d.path(f, udp).as(f.uplink, 0).open()
			spoofed, _ := c.toward(at(f.neighbour, 1)).in("", "x")
			d.drops(fromUplink(), spoofed, bpf.NATCounterDROP_SPOOFED_ADDRESS)
			excepted, _ := c.toward(at(f.gateway, 1)).in("", "x")
			d.untouched(fromUplink(), excepted)

			// the endpoint behind a published port speaks from it: the rule still decides who comes
			own := d.path(f, udp).as(f.uplink, 0).by(f.container, 3005).open()
			rules := d.rules
			rules.dnat = []dnatRule{publish(f, protoUDP, one(3005), one(3005))}
			rules.dnat[0].allow = []netip.Prefix{prefixOf(f.gateway)}
			d.setRules(rules)
			stranger, _ := own.toward(at(f.router, 1)).in("", "x")
			d.drops(fromUplink(), stranger, bpf.NATCounterDROP_NOT_ALLOWED)

			bound := d.path(f, udp).as(f.uplink, 0).by(f.container, 45678).open()
			bindUDP(d, bound.outside)
			late, _ := bound.toward(at(f.router, 1)).in("", "x")
			d.untouched(fromUplink(), late)
		})
	}
}

// A container reaches another's live mapping by its outside address and port, and is seen by its own (RFC
// 4787 REQ-9, 9a): on the same bridge always, from another one where these are not isolated or any sender
// may come. Both keep one outside port, towards each other and towards the world.
func TestHairpinToMapping(t *testing.T) {
	t.Parallel() // most of it is waiting
	d := load(t, 64)
	for _, f := range families {
		for _, tc := range []struct {
			name    string
			client  resident
			flags   bpf.NATConfigFlag
			refused bool
		}{
			{name: "neighbour", client: clientOf(f)},
			{name: "other-bridge", client: beyondOf(f), refused: true},
			{name: "other-bridge-not-isolated", client: beyondOf(f), flags: bpf.NATConfigFlagCONFIG_NO_ISOLATION},
			{name: "other-bridge-any-sender", client: beyondOf(f), flags: bpf.NATConfigFlagCONFIG_ANY_SENDER},
		} {
			d.each(f.name+"/"+tc.name, func(d *datapath) {
				d.configure(func(c *bpf.NATConfig) { c.Flags |= tc.flags })
				d.setRules(ruleSet{snat: []snatRule{
					{source: f.subnet, first: f.uplink, last: f.uplink}, {source: f.subnet2, first: f.uplink, last: f.uplink},
				}})
				server := d.path(f, udp).as(f.uplink, 0).by(f.other, 40000).open()
				l := d.loop(f, udp, tc.client, besideOf(f), f.uplink)
				l.published, l.answers = server.outside, server.inside
				if tc.refused {
					d.untouched(fromBridge().on(bridge2If).by(bridge2If), l.packet(l.asks, l.published, true, "", "x").between(neighbourMAC, bridge2MAC))
					return
				}
				var own path
				if tc.client.address == f.container { // its port has moved
					own = d.path(f, udp).as(f.uplink, 0).open()
					l.outsideAt = own.outside
				} else {
					l.asks, l.outsideAt = at(f.neighbour, 41000), at(f.uplink, 41000)
				}
				l.life()
				server.receives("", "as ever")
				if own.datapath != nil {
					own.receives("", "as ever")
				}
				d.checkMappings()
				if n := d.counts()[bpf.NATCounterPORTS_SHARED]; n != 0 {
					d.Errorf("%d ports are shared", n)
				}
				// to its own mapping there is nobody to speak with
				self := d.packetTo(l, l.asks, l.outsideAt)
				d.untouched(fromBridge().on(l.client.bridge).by(l.client.bridge), self)
				if !d.complete { // it takes seconds
					d.emptied()
				}
			})
		}
	}
}

func (d *datapath) packetTo(l loop, src, dst netip.AddrPort) packet {
	return l.packet(src, dst, true, "", "x").between(l.client.mac, l.client.gateway)
}
