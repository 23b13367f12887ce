package bpf_test

import (
	"fmt"
	"net/netip"
	"testing"

	"tcnat/bpf"
)

// Who is given a lease, for how long, and what happens when there is no room for what it needs.

// leases expects both directions of a path to have a lease, or not.
func (c path) leases(out, in bool) {
	c.Helper()
	for key, want := range map[tuple]bool{c.outTuple(): out, c.inTuple(): in} {
		h := c.mustHalf(key)
		if got := h.Lease.Out >= firstAdjacency; got != want {
			c.Errorf("%s: lease %t (%+v), want %t", key, got, h.Lease, want)
		}
	}
}

type grant struct {
	name    string
	set     func(c path) // before a packet goes either way, the long way
	carry   func(c path) // instead of that
	out, in bool
}

var grants = []grant{
	{name: "both", out: true, in: true},
	{name: "uplink-slow", set: deviceFlag(&uplinkIf, bpf.NATDeviceFlagDEVICE_SLOW)},
	{name: "bridge-slow", set: deviceFlag(&bridgeIf, bpf.NATDeviceFlagDEVICE_SLOW)},
	{name: "port-slow", set: deviceFlag(&portIf, bpf.NATDeviceFlagDEVICE_SLOW), in: true},
	{name: "other-port-slow", set: deviceFlag(&otherPortIf, bpf.NATDeviceFlagDEVICE_SLOW), out: true, in: true},
	{name: "off", set: func(c path) { c.set(func(s *bpf.NATConfig) { s.FastPath = bpf.NATFastPathFAST_PATH_OFF }) }},
	{name: "bridge-has-not-seen-it", carry: func(c path) {
		sent, wire := c.out("A", "x")
		c.passes(toUplink(), sent.forwarded(), wire.forwarded())
	}},
	{name: "bridge-saw-it-long-ago", carry: func(c path) {
		sent, wire := c.out("A", "x")
		c.untouched(fromBridge(), sent)
		c.age(c.outTuple(), leaseStamps)
		c.passes(toUplink(), sent.forwarded(), wire.forwarded())
	}},
	{name: "the-firewall-drops-it", carry: func(c path) {
		sent, _ := c.out("A", "x")
		wire, seen := c.in("A", "x")
		for range 5 {
			c.untouched(fromBridge(), sent)
			c.age(c.outTuple(), leaseStamps)
			c.untouched(fromBridge(), sent)
			c.passes(fromUplink(), wire, seen)
		}
	}},
	{name: "from-the-host", carry: func(c path) {
		_, seen := c.in("A", "x")
		c.untouched(toBridge().by(0), seen.forwarded().between(bridgeMAC, containerMAC))
	}},
	{name: "from-an-unmanaged-device", carry: func(c path) {
		_, seen := c.in("A", "x")
		back := seen.forwarded().between(bridgeMAC, containerMAC)
		if c.translation() == bpf.NATTranslationTRANSLATION_IDENTITY {
			c.untouched(toBridge().by(eth1If), back)
		} else { // nobody has translated it
			c.drops(toBridge().by(eth1If), back, bpf.NATCounterDROP_NO_FLOW)
		}
	}},
	{name: "our-bit-set-by-others", carry: func(c path) {
		sent, wire := c.out("A", "x")
		arrived, seen := c.in("A", "x")
		run := func(h hook, in, want packet) {
			verdict, out, meta := c.runMeta(h.marked(testMark|hostMark), in.frame())
			if verdict != unspec || meta.Mark != testMark|hostMark {
				c.Errorf("%s: verdict %d, mark %#x", h.program, int32(verdict), meta.Mark)
			}
			c.sameFrame(want.frame(), out)
		}
		run(fromBridge(), sent, sent)
		run(toUplink(), sent.forwarded(), wire.forwarded())
		run(fromUplink(), arrived, seen)
		seen = seen.forwarded().between(bridgeMAC, containerMAC)
		run(toBridge(), seen, seen)
	}, out: true, in: true},
	{name: "not-plain", carry: func(c path) {
		change := func(p packet) packet {
			if c.proto == protoTCP {
				p.tcp = "FA"
			} else if c.family.name == "ipv6" {
				p.extensions = []extension{{nextDestination, []byte{0, 1, 4, 0, 0, 0, 0}}}
			} else {
				p.options = []byte{1, 1, 1, 0}
			}
			return p
		}
		sent, wire := c.out("A", "x")
		c.carryOut(change(sent), change(wire))
		arrived, seen := c.in("A", "x")
		c.carryIn(change(arrived), change(seen))
	}},
	{name: "mark-of-others", carry: func(c path) {
		sent, wire := c.out("A", "x")
		c.untouched(fromBridge().marked(hostMark), sent)
		c.passes(toUplink().marked(hostMark), sent.forwarded(), wire.forwarded())
	}, out: true},
}

func TestLeaseGranted(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp} {
			for _, tr := range translated {
				for _, g := range grants {
					d.each(fmt.Sprintf("%s/%s/%s/%s", f.name, p.name, tr.name, g.name), func(d *datapath) {
						c := tr.open(d, f, p).established()
						d.setFast(bpf.NATFastPathFAST_PATH_ESTABLISHED, true)
						if g.set != nil {
							g.set(c)
						}
						if g.carry == nil {
							g.carry = func(c path) { c.slowly(true) }
						}
						before := d.counts()
						g.carry(c)
						c.leases(g.out, g.in)
						want := uint64(0)
						for _, has := range []bool{g.out, g.in} {
							if has {
								want++
							}
						}
						if n := d.counts().since(before)[bpf.NATCounterLEASES_GRANTED]; n != want {
							d.Errorf("%d leases granted, want %d", n, want)
						}
					})
				}
			}
		}
	}
}

// A lease is in force a second from when the host was asked: at from_bridge for what goes out, at
// to_bridge for what comes in. A packet that finds it in force does not make it longer.
func TestLeaseLasts(t *testing.T) {
	eachPath(t, func(c path, ports bool) {
		c.renew()
		c.age(c.outTuple(), leaseStamps/2)
		c.age(c.inTuple(), leaseStamps/2)
		was := c.allHalves()
		sent, wire := c.fastOut("A", "x")
		c.redirects(sender(ports), sent, wire, leaveMark(0))
		c.leavesSlowly(c.out("A", "not plain enough"))
		arrived, seen := c.fastIn("A", "x")
		c.redirects(fromUplink(), arrived, seen, enterMark(0, ports))
		_, inside := c.in("A", "x")
		c.untouched(toBridge(), inside.forwarded().between(bridgeMAC, containerMAC))
		for key, half := range c.allHalves() {
			if half.Lease != was[key].Lease {
				c.Errorf("%s: lease %+v became %+v", goTuple(key), was[key].Lease, half.Lease)
			}
		}

		// when it has run out, one packet goes the long way, and the next is fast again
		c.age(c.outTuple(), leaseStamps)
		c.age(c.inTuple(), leaseStamps)
		if ports {
			c.untouched(fromPort(), sent)
		}
		c.slowly(ports)
		c.redirects(sender(ports), sent, wire, leaveMark(0))
		c.redirects(fromUplink(), arrived, seen, enterMark(0, ports))

		// the stack took its time: that counts
		c.age(c.outTuple(), leaseStamps)
		first, _ := c.out("A", "x")
		c.untouched(fromBridge(), first)
		c.age(c.outTuple(), leaseStamps/2)
		asked := c.mustHalf(c.outTuple()).Lease
		c.leavesSlowly(c.out("A", "x"))
		if got := c.mustHalf(c.outTuple()).Lease; got.Stamp != asked.Stamp || got.In != asked.In || got.Out < firstAdjacency {
			c.Errorf("lease %+v, asked for at %+v", got, asked)
		}
	})
}

// leavesSlowly carries a packet through to_uplink alone.
func (c path) leavesSlowly(sent, wire packet) {
	c.Helper()
	route := func(p packet) packet { return p.forwarded().between(uplinkMAC, gatewayMAC) }
	c.passes(toUplink(), route(sent), route(wire))
}

// A port that is gone, or that must not be used past the bridge, is not: the bridge is, with the mark
// that its egress hook asks for.
func TestLeasePort(t *testing.T) {
	d := load(t, 64)
	const gone = 0x7ffffff0
	for _, f := range families {
		for name, set := range map[string]func(d *datapath){
			"gone": func(d *datapath) {
				d.addPort(gone, containerMAC)
			},
			"not-a-peer": func(d *datapath) {
				d.setDevice(portIf, func(dev *bpf.NATDevice) { dev.Flags &^= bpf.NATDeviceFlagDEVICE_PEER })
			},
			"slow":             func(d *datapath) { deviceFlag(&portIf, bpf.NATDeviceFlagDEVICE_SLOW)(path{datapath: d}) },
			"without-programs": func(d *datapath) { d.check(d.Devices.Delete(portIf)) },
			"of-another-bridge": func(d *datapath) {
				d.check(d.Ports.Delete(portKey(bridgeIf, containerMAC)))
				d.check(d.Ports.Put(portKey(bridge2If, containerMAC), portIf))
			},
		} {
			d.each(f.name+"/"+name, func(d *datapath) {
				c := translated[0].open(d, f, udp).established()
				d.setFast(bpf.NATFastPathFAST_PATH_ESTABLISHED, true)
				set(d)
				c.carryIn(c.in("", "the long way"))
				arrived, seen := c.fastIn("", "x")
				c.redirects(fromUplink(), arrived, seen, leaveMark(0))
				if a := d.adjacency(c.mustHalf(c.inTuple()).Lease.Out); a.Ifindex != bridgeIf || a.Flags != bpf.NATAdjacencyFlagADJACENCY_MARK {
					d.Errorf("goes by %+v", a)
				}
			})
		}
	}
}

// used are the adjacencies that are not free.
func (d *datapath) used() map[int]bpf.NATAdjacency {
	d.Helper()
	used := make(map[int]bpf.NATAdjacency)
	for i, a := range d.adjacencies() {
		if a.State != bpf.NATAdjacencyStateADJACENCY_FREE {
			used[i] = a
		}
	}
	return used
}

// What goes the same way shares an adjacency, however many flows; what does not never does.
func TestAdjacencyShared(t *testing.T) {
	d := load(t, 256)
	for _, f := range families {
		for _, way := range ways {
			d.each(f.name+"/"+way.name, func(d *datapath) {
				masquerade(d, f)
				d.setFast(bpf.NATFastPathFAST_PATH_ESTABLISHED, way.ports)
				lease := func(container station, flows uint16) {
					for i := range flows {
						c := d.path(f, udp).as(f.uplink, 0).by(container.addr, 20000+i)
						c = c.open()
						sent, wire := c.out("", "x")
						c.carryOut(sent.between(container.mac, bridgeMAC), wire)
						arrived, seen := c.in("", "x")
						c.passes(fromUplink(), arrived, seen)
						c.untouched(toBridge(), seen.forwarded().between(bridgeMAC, container.mac))
					}
				}
				lease(station{f.container, containerMAC}, 40)
				if n := len(d.used()); n != 4 {
					d.Errorf("%d adjacencies for one container, want 4: %+v", n, d.used())
				}
				lease(station{f.other, otherMAC}, 40)
				used := d.used()
				if n := len(used); n != 6 {
					d.Errorf("%d adjacencies for two containers, want 6: %+v", n, used)
				}
				seen := make(map[bpf.NATAdjacency]bool)
				for i, a := range used {
					if i < int(firstAdjacency) {
						d.Errorf("adjacency %d", i)
					}
					a.Used = 0
					if seen[a] {
						d.Errorf("twice: %+v", a)
					}
					seen[a] = true
				}
			})
		}
	}
}

// station is a container by its address and its MAC.
type station struct {
	addr netip.Addr
	mac  macs
}

// A full table refuses; what nobody has used for ten seconds makes room, what is in use never.
func TestAdjacencyRoom(t *testing.T) {
	eachPath(t, func(c path, ports bool) {
		strange := func(age uint32) []bpf.NATAdjacency {
			all := make([]bpf.NATAdjacency, c.Adjacencies.MaxEntries())
			for i := range all {
				all[i] = bpf.NATAdjacency{
					Used: c.now() - age, State: bpf.NATAdjacencyStateADJACENCY_READY, Ifindex: uint32(100000 + i), Mtu: 9000,
				}
			}
			return all
		}
		again := func() {
			for _, key := range []tuple{c.outTuple(), c.inTuple()} {
				c.changeHalf(key, func(h *bpf.NATHalf) { h.Lease = bpf.NATHalf{}.Lease })
			}
			c.slowly(ports)
		}
		const inUse = adjacencyStamps
		for _, age := range []uint32{0, inUse / 2, inUse - 500} {
			full := strange(age)
			c.putAdjacencies(full)
			again()
			c.leases(false, false)
			if got := c.mustHalf(c.inTuple()).Lease.Out; got != uint16(bpf.NATUnleasedUNLEASED_NO_ROOM) {
				c.Errorf("inward lease %d, want no room", got)
			}
			for i, a := range c.adjacencies() {
				if a != full[i] {
					c.Fatalf("age %d: adjacency %d in use became %+v", age, i, a)
				}
			}
		}
		for _, age := range []uint32{inUse + 100, 1 << 31} {
			c.putAdjacencies(strange(age))
			again()
			c.leases(true, true)
			sent, wire := c.fastOut("A", "x")
			c.redirects(sender(ports), sent, wire, leaveMark(0))
			arrived, seen := c.fastIn("A", "x")
			c.redirects(fromUplink(), arrived, seen, enterMark(0, ports))
		}
	})
}

// An adjacency that another CPU is filling in is nobody else's yet, whatever it says.
func TestAdjacencyBusy(t *testing.T) {
	eachPath(t, func(c path, ports bool) {
		for _, key := range []tuple{c.outTuple(), c.inTuple()} {
			index := c.mustHalf(key).Lease.Out
			busy := c.adjacency(index)
			busy.State, busy.Used = bpf.NATAdjacencyStateADJACENCY_BUSY, c.now()
			c.check(c.Adjacencies.Put(uint32(index), busy))
			c.changeHalf(c.outTuple(), func(h *bpf.NATHalf) { h.Lease = bpf.NATHalf{}.Lease })
			c.changeHalf(c.inTuple(), func(h *bpf.NATHalf) { h.Lease = bpf.NATHalf{}.Lease })
			c.slowly(ports)
			if h := c.mustHalf(key); h.Lease.Out == index {
				c.Errorf("%s: lease %+v for a busy adjacency", key, h.Lease)
			}
			if a := c.adjacency(index); a != busy {
				c.Errorf("busy adjacency %+v became %+v", busy, a)
			}
		}
	})
}

// translation is what the path's flow has.
func (c path) translation() bpf.NATTranslation {
	c.Helper()
	return c.mustHalf(c.outTuple()).Translation
}
