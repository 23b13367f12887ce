package bpf_test

import (
	"fmt"
	"net/netip"
	"testing"

	"tcnat/bpf"
)

// --fast-path always: a flow's first packet is redirected, by what the routing and neighbour tables
// say. What they do not say goes the long way, where it meets the same guards as ever.

// firstHook is the hook that sees a container's packet first.
func firstHook(ports bool) hook {
	if ports {
		return fromPort().running(bpf.NATProgFromPortFirst)
	}
	return fromBridgeFirst()
}

func fromBridgeFirst() hook { return fromBridge().running(bpf.NATProgFromBridgeFirst) }

// eachAlways runs a test with the fast path always on, in both families and with both ways in.
func eachAlways(t *testing.T, test func(d *datapath, f family, ports bool)) {
	load(t, 64).eachAlways("", test)
}

func (d *datapath) eachAlways(name string, test func(d *datapath, f family, ports bool)) {
	for _, f := range families {
		for _, way := range ways {
			d.each(name+f.name+"/"+way.name, func(d *datapath) {
				d.setRules(ruleSet{
					snat: []snatRule{{source: f.subnet, first: f.second, last: f.second, ports: portRange{30000, 30009}}},
					dnat: []dnatRule{publish(f, protoUDP, one(3005), one(80)), publish(f, protoTCP, one(3005), one(80))},
				})
				d.setFast(bpf.NATFastPathFAST_PATH_ALWAYS, way.ports)
				test(d, f, way.ports)
			})
		}
	}
}

// first sends the first packet of a path out on the fast path, and answers the path with its port.
func (c path) first(ports bool) path {
	c.Helper()
	sent, wire := c.fastOut("", "the first one")
	verdict, out, meta := c.runMeta(firstHook(ports), sent.frame())
	if verdict != redirect || meta.Mark != testMark {
		c.Fatalf("verdict %d, mark %#x; counted %s", int32(verdict), meta.Mark, c.counts())
	}
	c = c.as(c.outside.Addr(), sourcePort(c.family, c.proto, out))
	c.sameFrame(wire.from(c.outside).frame(), out)
	return c
}

func TestAlwaysOutward(t *testing.T) {
	eachAlways(t, func(d *datapath, f family, ports bool) {
		before := d.counts()
		c := d.path(f, udp).as(f.second, 0).first(ports)
		want := c.flow(false, bpf.NATTranslationTRANSLATION_SNAT, snatID(0))
		want.out = 1
		d.checkFlow(want)
		sent, wire := c.fastOut("", "the second one")
		d.redirects(firstHook(ports), sent, wire, leaveMark(0))
		arrived, seen := c.fastIn("", "the answer")
		d.redirects(fromUplink(), arrived, seen, enterMark(0, ports))
		d.redirects(fromUplink(), arrived, seen, enterMark(0, ports))
		want.out, want.in = 2, 2
		d.checkFlow(want)
		if n := d.counts().since(before); n[bpf.NATCounterFLOWS_CREATED] != 1 || n[bpf.NATCounterPACKETS_REDIRECTED] != 4 || len(n.drops()) != 0 {
			d.Errorf("counted %s", n)
		}
		if o, r := c.mustHalf(c.outTuple()), c.mustHalf(c.inTuple()); o.Bytes != uint64(len(sent.frame())*2-1) || r.Bytes != uint64(2*len(arrived.frame())) {
			d.Errorf("counted %d bytes out, %d in", o.Bytes, r.Bytes)
		}
		// each second it is asked again
		d.age(c.outTuple(), leaseStamps+10)
		d.age(c.inTuple(), leaseStamps+10)
		d.redirects(firstHook(ports), sent, wire, leaveMark(0))
		d.redirects(fromUplink(), arrived, seen, enterMark(0, ports))
	})
}

func TestAlwaysInward(t *testing.T) {
	eachAlways(t, func(d *datapath, f family, ports bool) {
		c := d.path(f, udp)
		c.inside, c.outside = at(f.container, 80), at(f.uplink, 3005)
		c.world = at(f.world, 50001)
		c.peer = c.world
		arrived, seen := c.fastIn("", "request")
		d.redirects(fromUplink(), arrived, seen, enterMark(0, ports))
		sent, wire := c.fastOut("", "answer")
		d.redirects(firstHook(ports), sent, wire, leaveMark(0))
		want := c.flow(true, bpf.NATTranslationTRANSLATION_DNAT, dnatID(0))
		want.out, want.in = 1, 1
		d.checkFlow(want)
	})
}

// TCP begins with a SYN, which is not plain: the handshake takes the long way, what follows does not.
func TestAlwaysTCP(t *testing.T) {
	eachAlways(t, func(d *datapath, f family, ports bool) {
		c := d.path(f, tcp).as(f.second, 0)
		sent, _ := c.out("S", "")
		d.untouched(firstHook(ports), sent)
		d.untouched(fromBridgeFirst(), sent)
		mid, _ := c.out("A", "of a connection that nobody knows")
		d.untouched(firstHook(ports), mid)
		if n := d.halves(); n != 0 {
			d.Fatalf("made flows:\n%s", d.allFlows())
		}
		c = c.open()
		c.receives("SA", "")
		c.sends("A", "") // established
		sent, wire := c.fastOut("PA", "data")
		d.redirects(firstHook(ports), sent, wire, leaveMark(0))
		arrived, seen := c.in("A", "")
		d.passes(fromUplink(), arrived, seen) // the first ACK of its direction
		arrived, seen = c.fastIn("PA", "data")
		d.redirects(fromUplink(), arrived, seen, enterMark(0, ports))
	})
}

// aside is a container's first packet that must not be forwarded at once.
type aside struct {
	name   string
	packet func(f family, p packet) packet
	set    func(d *datapath, f family)
	bridge bpf.NATCounter // what from_bridge drops it for afterwards, or passed
	flow   bool           // one may be made: it would be by the long way, too
}

var asides = []aside{
	{name: "unmanaged-device", packet: func(f family, p packet) packet { return p.to(at(f.unmanaged, 443)) }, bridge: bpf.NATCounterDROP_NO_UPLINK},
	{name: "blackhole", packet: func(f family, p packet) packet { return p.to(at(f.nowhere, 443)) }, bridge: passed},
	{name: "to-the-host", packet: func(f family, p packet) packet { return p.to(at(f.bridge, 53)) }, bridge: passed},
	{name: "to-a-neighbour-bridge", packet: func(f family, p packet) packet { return p.to(at(f.neighbour, 53)) }, bridge: bpf.NATCounterDROP_ISOLATED},
	{name: "to-loopback", packet: func(f family, p packet) packet { return p.to(at(loopback(f), 53)) }, bridge: bpf.NATCounterDROP_LOOPBACK},
	{name: "no-neighbour", packet: func(f family, p packet) packet {
		return p.to(at(map[string]netip.Addr{"ipv4": ip("203.0.113.99"), "ipv6": ip("2001:db8:113::99")}[f.name], 443))
	}, bridge: passed},
	{name: "no-rule", set: func(d *datapath, _ family) { d.setRules(ruleSet{}) }, bridge: passed},
	{name: "spoofed-address", packet: func(f family, p packet) packet { return p.from(at(f.world, 1)) }, bridge: bpf.NATCounterDROP_SPOOFED_ADDRESS},
	{name: "address-of-a-neighbour", packet: func(f family, p packet) packet { return p.from(at(f.other, 1)) }, bridge: bpf.NATCounterDROP_SPOOFED_MAC},
	{name: "address-of-another-bridge", packet: func(f family, p packet) packet { return p.from(at(f.neighbour, 1)) }, bridge: bpf.NATCounterDROP_SPOOFED_ADDRESS},
	{name: "hop-limit-1", packet: func(_ family, p packet) packet { p.ttl = 1; return p }, bridge: passed, flow: true},
	{name: "over-mtu", packet: func(_ family, p packet) packet { p.payload = make([]byte, 1473); return p }, bridge: passed, flow: true},
	{name: "no-checksum-other-port", packet: func(_ family, p packet) packet { p.noChecksum = true; return p }, bridge: passed, flow: true},
	{name: "fragment", packet: func(_ family, p packet) packet { p.fragment = -1; return p }, bridge: passed},
	{name: "syn", packet: func(_ family, p packet) packet { p.proto, p.tcp = protoTCP, "S"; return p }, bridge: passed},
	{name: "echo", packet: func(f family, p packet) packet {
		p.proto, p.icmpType = f.icmp, f.echoRequest
		return p.addrs(at(p.src.Addr(), 7), at(p.dst.Addr(), 0))
	}, bridge: passed},
	{name: "uplink-slow", set: func(d *datapath, _ family) { deviceFlag(&uplinkIf, bpf.NATDeviceFlagDEVICE_SLOW)(path{datapath: d}) }, bridge: passed},
	{name: "bridge-slow", set: func(d *datapath, _ family) { deviceFlag(&bridgeIf, bpf.NATDeviceFlagDEVICE_SLOW)(path{datapath: d}) }, bridge: passed},
	{name: "only-established", set: func(d *datapath, _ family) {
		d.set(func(c *bpf.NATConfig) { c.FastPath = bpf.NATFastPathFAST_PATH_ESTABLISHED })
	}, bridge: passed},
	{name: "off", set: func(d *datapath, _ family) {
		d.set(func(c *bpf.NATConfig) { c.FastPath = bpf.NATFastPathFAST_PATH_OFF })
	}, bridge: passed},
	{name: "no-mark", set: func(d *datapath, _ family) { d.set(func(c *bpf.NATConfig) { c.Mark = 0 }) }, bridge: passed},
	{name: "table-full", set: func(d *datapath, f family) {
		for i := range d.config().MaxFlows {
			d.path(f, tcp).as(f.second, 0).toward(at(f.world, uint16(1000+i))).tryOpen()
		}
	}, bridge: passed},
}

func TestAlwaysAside(t *testing.T) {
	d := load(t, 64)
	for _, a := range asides {
		d.eachAlways(a.name+"/", func(d *datapath, f family, ports bool) {
			if a.set != nil {
				a.set(d, f)
			}
			p, _ := d.path(f, udp).out("", "x")
			if a.packet != nil {
				p = a.packet(f, p)
			}
			had := d.halves()
			if ports {
				d.untouched(firstHook(true), p)
			}
			if a.bridge == passed {
				d.untouched(fromBridgeFirst(), p)
			} else {
				d.drops(fromBridgeFirst(), p, a.bridge)
			}
			if n := d.halves(); n != had && !a.flow {
				d.Errorf("made flows:\n%s", d.allFlows())
			}
		})
	}
}

// At a port only its own container's frames to the bridge are forwarded at once.
func TestAlwaysPort(t *testing.T) {
	eachAlways(t, func(d *datapath, f family, ports bool) {
		if !ports {
			d.Skip("not here")
		}
		sent, _ := d.path(f, udp).out("", "x")
		h := firstHook(true)
		stranger := macs{[]byte{2, 9, 9, 9, 9, 9}}
		d.untouched(h, sent.between(containerMAC, otherMAC))
		d.untouched(h, sent.between(stranger, bridgeMAC))
		d.drops(h, sent.between(otherMAC, bridgeMAC), bpf.NATCounterDROP_SPOOFED_MAC)
		d.drops(h.on(otherPortIf).by(otherPortIf), sent, bpf.NATCounterDROP_SPOOFED_MAC)
		d.untouched(d.tagged(h, 5), sent)
		d.untouched(h, sent.from(at(f.other, 1))) // its own MAC, a neighbour's address
		d.setDevice(portIf, func(dev *bpf.NATDevice) { dev.Flags |= bpf.NATDeviceFlagDEVICE_SLOW })
		d.untouched(h, sent)
		if n := d.halves(); n != 0 {
			d.Errorf("made flows:\n%s", d.allFlows())
		}
	})
}

// Devices without link headers have no neighbours; their MTU counts all the same.
func TestAlwaysWithoutEthernet(t *testing.T) {
	eachAlways(t, func(d *datapath, f family, ports bool) {
		d.setDevice(uplinkIf, func(dev *bpf.NATDevice) { dev.Flags |= bpf.NATDeviceFlagDEVICE_L3 })
		for i, to := range []netip.Addr{f.world, map[string]netip.Addr{"ipv4": ip("203.0.113.99"), "ipv6": ip("2001:db8:113::99")}[f.name]} {
			c := d.path(f, udp).as(f.second, 0).toward(at(to, 443)).by(f.container, uint16(41000+i))
			headers := len(c.packet(c.inside, c.peer, true, "", "").frame()) - ethernetLen
			fits, _ := c.out("", string(make([]byte, 1500-headers)))
			verdict, out, meta := d.runMeta(firstHook(ports), fits.frame())
			if verdict != redirect || meta.Mark != testMark {
				d.Fatalf("to %s: verdict %d, mark %#x; counted %s", to, int32(verdict), meta.Mark, d.counts())
			}
			d.sameFrame(fits.from(at(f.second, sourcePort(f, protoUDP, out))).forwarded().frame(), out)
			over, _ := c.out("", string(make([]byte, 1501-headers)))
			d.untouched(firstHook(ports), over)
		}
	})
}

// A reply finds the lease of its direction by the routes as well; not to a device without programs.
func TestAlwaysInwardAside(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for name, set := range map[string]func(d *datapath){
			"bridge-slow": func(d *datapath) { deviceFlag(&bridgeIf, bpf.NATDeviceFlagDEVICE_SLOW)(path{datapath: d}) },
			"uplink-slow": func(d *datapath) { deviceFlag(&uplinkIf, bpf.NATDeviceFlagDEVICE_SLOW)(path{datapath: d}) },
			"unmanaged":   func(d *datapath) { d.check(d.Devices.Delete(bridgeIf)) },
		} {
			d.each(fmt.Sprint(f.name, "/", name), func(d *datapath) {
				c := translated[0].open(d, f, udp).established()
				d.setFast(bpf.NATFastPathFAST_PATH_ALWAYS, true)
				set(d)
				arrived, seen := c.in("", "x")
				d.passes(fromUplink(), arrived, seen)
				d.passes(fromUplink(), arrived, seen)
			})
		}
	}
}
