package bpf_test

import (
	"net/netip"
	"slices"
	"testing"

	"tcnat/bpf"
)

// by answers the path of another container, or of another port of it.
func (c path) by(container netip.Addr, port uint16) path {
	c.inside = at(container, port)
	return c
}

// toward answers the path to another endpoint of the world.
func (c path) toward(a netip.AddrPort) path {
	if c.proto == c.icmp {
		a = at(a.Addr(), 0)
	}
	c.peer, c.world = a, a
	return c
}

func (f family) third() netip.Addr { return f.other.Next() }

// Two containers with the same port to the same destination get different ports, and each
// gets its own replies.
func TestPortClash(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, udpZero, udpLite, sctp, sctpZero, echo} {
			d.each(f.name+"/"+p.name, func(d *datapath) {
				masquerade(d, f)
				a := d.path(f, p).as(f.uplink, 0)
				b, c := a.by(f.other, 40000).open(), a.by(f.third(), 40000).open()
				a = a.open()
				ports := []uint16{a.outside.Port(), b.outside.Port(), c.outside.Port()}
				slices.Sort(ports)
				if len(slices.Compact(ports)) != 3 {
					d.Fatalf("outside ports %v", ports)
				}
				if b.outside.Port() != 40000 {
					d.Errorf("the first one got port %d, want its own", b.outside.Port())
				}
				for range 2 {
					for _, c := range []path{a, b, c} {
						wire, seen := c.in("SA", "reply")
						c.passes(fromUplink(), wire, seen)
						sent, out := c.out("A", "x")
						c.passes(toUplink(), sent, out)
					}
				}
			})
		}
	}
}

// A port is of one class: below 512, below 1024, above (RFC 4787 REQ-3a).
func TestPortClass(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, class := range []portRange{{1, 511}, {512, 1023}, {1024, 65535}} {
			for _, port := range []uint16{class.first, class.last} {
				for _, p := range []protocol{tcp, udp, sctp} {
					d.each(f.name+"/"+p.name, func(d *datapath) {
						masquerade(d, f)
						c := d.path(f, p).as(f.uplink, 0)
						if got := c.by(f.container, port).open().outside.Port(); got != port {
							d.Errorf("port %d became %d though nobody has it", port, got)
						}
						got := c.by(f.other, port).open().outside.Port()
						if got == port || got < class.first || got > class.last {
							d.Errorf("port %d became %d, want another in %d-%d", port, got, class.first, class.last)
						}
					})
				}
			}
		}
	}
}

// Every port of a range is given out, and then none: refused and counted, what is there stays.
func TestPortRangeExhausted(t *testing.T) {
	d := load(t, 1024)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, sctp} {
			for _, size := range []uint16{1, 2, 7, 64} {
				d.each(f.name+"/"+p.name, func(d *datapath) {
					d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, first: f.second, last: f.second, ports: portRange{65535 - size + 1, 65535}}}})
					c := d.path(f, p).as(f.second, 0)
					container := f.container
					got := make(map[uint16]path)
					for range size {
						o := c.by(container, 40000).open()
						if o.outside.Port() < 65535-size+1 {
							d.Fatalf("port %d is outside of the range", o.outside.Port())
						}
						if _, twice := got[o.outside.Port()]; twice {
							d.Fatalf("port %d twice", o.outside.Port())
						}
						got[o.outside.Port()] = o
						container = container.Next()
					}
					sent, _ := c.by(container, 40000).out("S", "")
					d.drops(toUplink(), sent, bpf.NATCounterDROP_NO_PORT)
					if n := d.halves(); n != 2*int(size) {
						d.Errorf("%d halves, want %d", n, 2*size)
					}
					for _, o := range got {
						o.receives("SA", "")
					}
				})
			}
		}
	}
}

// What the host itself uses is not given to a container.
func TestPortOfHost(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		d.each(f.name+"/udp-socket", func(d *datapath) {
			masquerade(d, f)
			bound := bindUDP(d, at(f.uplink, 0))
			if got := d.path(f, udp).as(f.uplink, 0).by(f.container, bound.Port()).open().outside.Port(); got == bound.Port() {
				d.Errorf("got port %d, where a socket of the host is", got)
			}
		})
		d.each(f.name+"/tcp-connection", func(d *datapath) {
			// the host is connected with itself, so the "world" is its second address
			d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, first: f.uplink, last: f.uplink}}})
			used := connectTCP(d, f)
			c := d.path(f, tcp).as(f.uplink, 0).toward(used.client)
			if got := c.by(f.container, used.server.Port()).open().outside.Port(); got == used.server.Port() {
				d.Errorf("got port %d, where a connection of the host is", got)
			}
		})
		d.each(f.name+"/tcp-listener-does-not-count", func(d *datapath) {
			masquerade(d, f)
			l := listenTCP(d, at(f.uplink, 0))
			if got := d.path(f, tcp).as(f.uplink, 0).by(f.container, l.Port()).open().outside.Port(); got != l.Port() {
				d.Errorf("port %d became %d", l.Port(), got)
			}
		})
	}
}

// A published port is given to nobody but the endpoint that it leads to, which speaks from it.
func TestPortOfPublished(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, sctp} {
			rules := ruleSet{
				snat: []snatRule{{source: f.subnet, masquerade: true}},
				dnat: []dnatRule{publish(f, p.number(f), one(5000), one(5000)), publish(f, p.number(f), portRange{6000, 6099}, portRange{7000, 7099})},
			}
			d.each(f.name+"/"+p.name+"/others", func(d *datapath) {
				d.setRules(rules)
				c := d.path(f, p).as(f.uplink, 0)
				for _, port := range []uint16{5000, 6000, 6099} {
					if got := c.by(f.other, port).open().outside.Port(); got == port {
						d.Errorf("got the published port %d", got)
					}
				}
			})
			d.each(f.name+"/"+p.name+"/endpoint", func(d *datapath) {
				d.setRules(rules)
				c := d.path(f, p).as(f.uplink, 0)
				if got := c.by(f.container, 5000).open().outside.Port(); got != 5000 {
					d.Errorf("the endpoint behind port 5000 speaks from %d", got)
				}
			})
		}
	}
}

// One client's port to two published ports of one server: both would be answered alike, so
// the client's port changes for the second (design-review B5).
func TestClientPortClash(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, udpZero, sctp, sctpZero} {
			d.each(f.name+"/"+p.name, func(d *datapath) {
				moved := translated[2].open(d, f, p)
				first := moved
				first.outside = at(f.uplink, 3005)
				first.peer = first.world
				for range 2 {
					moved.receives("A", "to the second")
					moved.sends("A", "from the second")
					first.receives("A", "to the first")
					first.sends("A", "from the first")
				}
				want := moved.flow(true, bpf.NATTranslationTRANSLATION_DNAT, dnatID(1))
				want.out, want.in = 3, 3
				if p.states() {
					want.outTCP, want.inTCP = sawSYN|sawACK, sawSYN|sawACK
				}
				d.checkFlow(want)
			})
		}
	}
}

// An inside address always has the same outside one of a range (RFC 4787 REQ-2), and
// containers are spread over them.
func TestPaired(t *testing.T) {
	d := load(t, 4096)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, first: f.poolFirst, last: f.poolLast}}})
			users := make(map[netip.Addr]int)
			container := f.container
			for range 64 {
				var first netip.Addr
				for port := range uint16(4) {
					sent, _ := d.path(f, tcp).by(container, 40000+port).toward(at(f.world, 443+port)).out("S", "")
					_, out := d.run(toUplink(), sent.frame())
					a := sourceAddr(f, out)
					if a.Compare(f.poolFirst) < 0 || a.Compare(f.poolLast) > 0 {
						d.Fatalf("%s got %s", container, a)
					}
					if port == 0 {
						first = a
					}
					if a != first {
						d.Fatalf("%s has %s and %s", container, first, a)
					}
				}
				users[first]++
				container = container.Next()
			}
			if len(users) != 4 {
				d.Errorf("64 containers share %d of 4 addresses: %v", len(users), users)
			}
		})
	}
}

// When a container's own address of a range has no port left, it gets another one, until all are given out.
// UDP shares no port as long as there is one, and an endpoint that has gone over stays there.
func TestPairedFallsOver(t *testing.T) {
	d := load(t, 256)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp} {
			d.each(f.name+"/"+p.name, func(d *datapath) {
				const size = 2
				d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, first: f.poolFirst, last: f.poolLast, ports: portRange{40000, 40000 + size - 1}}}})
				got := make(map[netip.AddrPort]int)
				var order []netip.AddrPort
				open := func(port uint16, w netip.AddrPort) (at netip.AddrPort, ok bool) {
					sent, _ := d.path(f, p).by(f.container, port).toward(w).out("S", "x")
					verdict, out := d.run(toUplink(), sent.frame())
					return netip.AddrPortFrom(sourceAddr(f, out), sourcePort(f, p.number(f), out)), verdict == unspec
				}
				for i := range uint16(4 * size) {
					a, ok := open(50000+i, at(f.world, 443))
					if !ok || a.Addr().Compare(f.poolFirst) < 0 || a.Addr().Compare(f.poolLast) > 0 || a.Port() < 40000 || a.Port() >= 40000+size {
						d.Fatalf("endpoint %d got %s; counted %s", i, a, d.counts())
					}
					got[a]++
					order = append(order, a)
				}
				if len(got) != 4*size {
					d.Errorf("%d endpoints have %d outside ports of %d: %v", 4*size, len(got), 4*size, order)
				}
				if order[0].Addr() != order[1].Addr() || order[1].Addr() == order[2].Addr() {
					d.Errorf("addresses are %v, want the first one's used up before another", order)
				}
				sent, _ := d.path(f, p).by(f.container, 60000).out("S", "x")
				d.drops(toUplink(), sent, bpf.NATCounterDROP_NO_PORT)
				if p.name != udp.name {
					return
				}
				for i, first := range order {
					if again, ok := open(50000+uint16(i), at(f.router, 443)); !ok || again != first {
						d.Errorf("endpoint %d has %s and %s", i, first, again)
					}
				}
				if n := d.counts()[bpf.NATCounterPORTS_SHARED]; n != 0 {
					d.Errorf("%d ports shared", n)
				}
				d.checkMappings()
			})
		}
	}
}

// A full table refuses new flows, counts it, and keeps the ones that live.
func TestTableFull(t *testing.T) {
	d := load(t, 8)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, sctp} {
			d.each(f.name+"/"+p.name, func(d *datapath) {
				masquerade(d, f)
				c := d.path(f, p).as(f.uplink, 0)
				var open []path
				for i := range uint16(8) {
					open = append(open, c.by(f.container, 40000+i).open())
				}
				for i := range uint16(4) {
					sent, _ := c.by(f.container, 50000+i).out("S", "")
					d.drops(toUplink(), sent, bpf.NATCounterDROP_TABLE_FULL)
				}
				if n := d.halves(); n != 16 {
					d.Errorf("%d halves, want 16", n)
				}
				for _, o := range open {
					o.receives("SA", "")
				}
				if p.name == udp.name {
					if n := len(d.mappings()); n != 8 {
						d.Errorf("%d mappings, want 8", n)
					}
				}
			})
		}
	}
}
