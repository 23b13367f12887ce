package bpf_test

import (
	"errors"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
)

// What the fast path leaves to the host's stack: the program that sees it first must not touch it.

// detour is a reason for the long way, for a path that is on the fast path both ways.
type detour struct {
	name   string
	packet func(f family, p packet) packet
	frame  func(f family, frame []byte) []byte
	hook   func(d *datapath, h hook) hook
	set    func(c path)
	proto  uint8 // only this one
	family string
	only   string // "out" or "in"
}

func flags(flags string) func(family, packet) packet {
	return func(_ family, p packet) packet { p.tcp = flags; return p }
}

// eachHalf changes both halves of the path's flow.
func eachHalf(change func(*bpf.NATHalf)) func(c path) {
	return func(c path) {
		c.Helper()
		c.changeHalf(c.outTuple(), change)
		c.changeHalf(c.inTuple(), change)
	}
}

func deviceFlag(ifindex *uint32, flag bpf.NATDeviceFlag) func(c path) {
	return func(c path) {
		c.Helper()
		c.setDevice(*ifindex, func(dev *bpf.NATDevice) { dev.Flags |= flag })
	}
}

// poke answers a change of one byte of the IP packet.
func poke(at int, value byte) func(family, []byte) []byte {
	return func(_ family, frame []byte) []byte { frame[ethernetLen+at] = value; return frame }
}

// ipLength changes what the IP header says of the packet's length, its checksum along with it.
func ipLength(by int) func(f family, frame []byte) []byte {
	return func(f family, frame []byte) []byte {
		at := ethernetLen + 2
		if f.name == "ipv6" {
			at = ethernetLen + 4
		}
		length := int(frame[at])<<8 | int(frame[at+1])
		frame[at], frame[at+1] = byte((length+by)>>8), byte(length+by)
		return frame
	}
}

var detours = []detour{
	{name: "hop-limit-1", packet: func(_ family, p packet) packet { p.ttl = 1; return p }},
	{name: "hop-limit-0", frame: func(f family, frame []byte) []byte {
		if f.name == "ipv6" {
			return poke(7, 0)(f, frame)
		}
		return poke(8, 0)(f, frame)
	}},
	{name: "bad-header-checksum", family: "ipv4", frame: func(_ family, frame []byte) []byte {
		frame[ethernetLen+10] ^= 1
		return frame
	}},
	{name: "ip-options", family: "ipv4", packet: func(_ family, p packet) packet { p.options = []byte{148, 4, 0, 0}; return p }},
	{name: "destination-options", family: "ipv6", packet: func(_ family, p packet) packet {
		p.extensions = []extension{{nextDestination, []byte{0, 1, 4, 0, 0, 0, 0}}}
		return p
	}},
	{name: "hop-by-hop", family: "ipv6", packet: func(_ family, p packet) packet {
		p.extensions = []extension{{nextHopByHop, []byte{0, 1, 4, 0, 0, 0, 0}}}
		return p
	}},
	{name: "syn", proto: protoTCP, packet: flags("S")},
	{name: "syn-ack", proto: protoTCP, packet: flags("SA")},
	{name: "fin", proto: protoTCP, packet: flags("FA")},
	{name: "rst", proto: protoTCP, packet: flags("R")},
	{name: "icmp", packet: func(f family, p packet) packet { p.proto, p.icmpType = f.icmp, f.echoRequest; return p }},
	{name: "sctp", packet: func(_ family, p packet) packet { p.proto, p.payload = 132, make([]byte, 20); return p }},
	{name: "other-source-mac", only: "out", packet: func(_ family, p packet) packet { p.srcMAC = otherMAC.mac; return p }},
	{name: "other-destination-mac", packet: func(_ family, p packet) packet { p.dstMAC = otherMAC.mac; return p }},
	{name: "other-port", only: "out", hook: func(_ *datapath, h hook) hook {
		if h.skb.Ifindex == portIf {
			return h.on(otherPortIf).by(otherPortIf)
		}
		return h.on(bridge2If).by(bridge2If)
	}, packet: func(_ family, p packet) packet { return p }},
	{name: "other-uplink", only: "in", hook: func(d *datapath, h hook) hook {
		d.check(d.Devices.Put(eth1If, bpf.NATDevice{Class: bpf.NATDeviceClassCLASS_UPLINK}))
		return h.on(eth1If).by(eth1If)
	}, packet: func(_ family, p packet) packet { p.dstMAC = eth1MAC.mac; return p }},
	{name: "vlan", hook: func(d *datapath, h hook) hook { return d.tagged(h, 5) }},
	{name: "priority-tag", hook: func(d *datapath, h hook) hook { return d.tagged(h, 3<<13) }},
	{name: "lease-run-out", set: eachHalf(func(h *bpf.NATHalf) { h.Lease.Stamp -= leaseStamps + 10 })},
	{name: "lease-of-52-days-ago", set: eachHalf(func(h *bpf.NATHalf) { h.Lease.Stamp += 1 << 31 })},
	{name: "lease-of-the-future", set: eachHalf(func(h *bpf.NATHalf) { h.Lease.Stamp += 1000 })},
	{name: "no-lease", set: eachHalf(func(h *bpf.NATHalf) { h.Lease.Out = uint16(bpf.NATUnleasedUNLEASED_NO_ROOM) })},
	{name: "no-input", set: eachHalf(func(h *bpf.NATHalf) { h.Lease.In = 0 })},
	{name: "no-such-adjacency", set: eachHalf(func(h *bpf.NATHalf) { h.Lease.Out = 0xffff })},
	{name: "ending", set: func(c path) {
		for _, key := range []tuple{c.outTuple(), c.inTuple()} {
			c.changeHalf(key, func(h *bpf.NATHalf) {
				h.Standing.Life = map[bpf.NATRole]bpf.NATLife{
					bpf.NATRoleROLE_ORIGINAL: bpf.NATLifeLIFE_ORIGINAL_ENDING, bpf.NATRoleROLE_REPLY: bpf.NATLifeLIFE_ENDING,
				}[h.Role]
			})
		}
	}},
	{name: "rst-seen", proto: protoTCP, set: eachHalf(func(h *bpf.NATHalf) { h.Tcp |= sawRST })},
	{name: "no-ack-seen", proto: protoTCP, set: eachHalf(func(h *bpf.NATHalf) { h.Tcp &^= sawACK })},
	{name: "memory-of-another-flow", set: eachHalf(func(h *bpf.NATHalf) { h.Standing.Id++ })},
	{name: "translation-of-another-flow", set: eachHalf(func(h *bpf.NATHalf) { h.Other.Dport ^= 0x0100 })},
	{name: "fast-path-off", set: func(c path) {
		c.set(func(s *bpf.NATConfig) { s.FastPath = bpf.NATFastPathFAST_PATH_OFF })
	}},
	{name: "not-live", set: func(c path) { c.set(func(s *bpf.NATConfig) { s.Live = 0 }) }},
	{name: "rule-changed", set: func(c path) { c.endRule(c.mustHalf(c.outTuple()).Rule) }},
	{name: "ended-by-hand", set: func(c path) {
		h := c.mustHalf(c.outTuple())
		claim := c.outTuple()
		if h.Role == bpf.NATRoleROLE_ORIGINAL {
			claim = c.inTuple()
		}
		if !c.endFlow(claim, h.Standing.Id) {
			c.Fatal("the flow was not there")
		}
	}},
	{name: "ip-longer-than-the-frame", frame: ipLength(1)},
	{name: "ip-shorter-than-its-headers", frame: func(f family, frame []byte) []byte {
		if f.name == "ipv6" {
			return ipLength(3-(len(frame)-ethernetLen-40))(f, frame)
		}
		return ipLength(23-(len(frame)-ethernetLen))(f, frame)
	}},
	{name: "another-version", frame: func(f family, frame []byte) []byte { frame[ethernetLen] ^= 0x30; return frame }},
	{name: "header-shorter-than-20", family: "ipv4", frame: poke(0, 0x44)},
	{name: "tcp-header-shorter-than-20", proto: protoTCP, frame: func(f family, frame []byte) []byte {
		frame[ethernetLen+ipHeader(f)+12] = 0x40
		return frame
	}},
	{name: "tcp-header-longer-than-the-packet", proto: protoTCP, frame: func(f family, frame []byte) []byte {
		frame[ethernetLen+ipHeader(f)+12] = 0xf0
		return frame
	}},
	{name: "first-fragment", packet: func(_ family, p packet) packet { p.fragment = -1; return p }},
	{name: "later-fragment-that-looks-like-ports", family: "ipv4", frame: poke(7, 1)},
	{name: "later-fragment-of-a-high-offset", family: "ipv4", frame: poke(6, 0x10)},
}

func ipHeader(f family) int {
	if f.name == "ipv6" {
		return 40
	}
	return 20
}

// leavesAlone expects the hook not to redirect the frame, and whatever it makes of it not to be
// the fast path's doing: the same hook does the same with the fast path switched off.
func (d *datapath) leavesAlone(h hook, frame []byte) {
	d.Helper()
	before := d.counts()
	verdict, out := d.run(h, frame)
	if verdict == redirect || d.counts().since(before)[bpf.NATCounterPACKETS_REDIRECTED] != 0 {
		d.Fatalf("%s: redirected\nin:\n%s\nout:\n%s", h.program, describe(frame), describe(out))
	}
	if h.program == bpf.NATProgFromPort || h.program == bpf.NATProgFromBridge {
		if verdict == shot {
			return // a guard's word
		}
		d.sameFrame(frame, out)
	}
}

func TestFastDetours(t *testing.T) {
	eachPath(t, func(c path, ports bool) {
		flow, settings := c.allHalves(), c.config()
		generation, rule := uint32(0), c.mustHalf(c.outTuple()).Rule
		generation = c.generation(rule)
		for _, detour := range detours {
			if detour.proto != 0 && detour.proto != c.proto || detour.family != "" && detour.family != c.family.name {
				continue
			}
			for _, way := range []string{"out", "in"} {
				if detour.only != "" && detour.only != way {
					continue
				}
				c.group(detour.name+"/"+way, func(c path) {
					c.detoured(detour, way == "out", ports)
				})
				c.forget()
				for key, half := range flow {
					c.check(c.Flows.Put(key, half))
				}
				c.check(c.Config.Put(uint32(0), settings))
				c.check(c.Generations.Put(rule, generation))
			}
		}
	})
}

// detoured sends a packet that has cause for the long way, and one that would have the right to the
// fast one if nothing else were changed.
func (c path) detoured(detour detour, out, ports bool) {
	c.Helper()
	c.renew()
	h, mark := fromUplink(), enterMark(0, ports)
	p, want := c.fastIn("A", "some payload")
	if out {
		h, mark = sender(ports), leaveMark(0)
		p, want = c.fastOut("A", "some payload")
	}
	if detour.set == nil { // it would be redirected but for the detour
		c.redirects(h, p, want, mark)
	} else {
		detour.set(c)
	}
	if detour.packet != nil {
		p = detour.packet(c.family, p)
	}
	frame := p.frame()
	if detour.frame != nil {
		frame = detour.frame(c.family, frame)
	}
	if detour.hook != nil {
		h = detour.hook(c.datapath, h)
	}
	halves := c.allHalves()
	c.leavesAlone(h, frame)
	if out && ports && !equalHalves(halves, c.allHalves()) {
		c.Error("from_port changed a flow without redirecting its packet")
	}
}

// An address of IPv6 that looks like one of IPv4 does not find the flow of IPv4.
func TestFastV4Mapped(t *testing.T) {
	d := load(t, 64)
	f := families[0]
	for _, tr := range translated {
		for _, way := range ways {
			d.each(tr.name+"/"+way.name, func(d *datapath) {
				c := tr.open(d, f, udp).established()
				d.setFast(bpf.NATFastPathFAST_PATH_ESTABLISHED, way.ports)
				c.slowly(way.ports)
				sent, _ := c.out("A", "some payload")
				wire, _ := c.in("A", "some payload")
				for h, p := range map[string]packet{"out": sent, "in": wire} {
					hook := fromUplink()
					if h == "out" {
						hook = sender(way.ports)
					}
					mapped := packet{src: at(ip("2001:db8::1"), p.src.Port()), dst: at(ip("2001:db8::2"), p.dst.Port()), proto: p.proto, payload: p.payload}
					frame := ethernet(p.srcMAC, p.dstMAC, 0x86dd, mapped.ip())
					a, b := p.src.Addr().As16(), p.dst.Addr().As16()
					copy(frame[ethernetLen+8:], a[:])
					copy(frame[ethernetLen+24:], b[:])
					d.leavesAlone(hook, frame)
				}
			})
		}
	}
}

// UDP without a checksum whose ports change is for the slow path, which knows how (see TestFastLife);
// where they do not change it is fast, and its checksum stays 0.
func TestFastWithoutChecksum(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, masquerade: true}}})
			d.setFast(bpf.NATFastPathFAST_PATH_ESTABLISHED, true)
			c := d.path(f, udpZero).as(f.uplink, 0)
			c.sends("", "the first packet makes the flow")
			c.slowly(true)
			c.fastLife(true)
		})
	}
}

// Cut short anywhere, a frame is not the fast path's.
func TestFastTruncated(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp} {
			d.each(f.name+"/"+p.name, func(d *datapath) {
				c := translated[1].open(d, f, p).established()
				d.setFast(bpf.NATFastPathFAST_PATH_ESTABLISHED, true)
				c.slowly(true)
				for _, h := range []hook{fromPort(), fromUplink()} {
					whole, _ := c.out("A", "payload")
					if h.program == bpf.NATProgFromUplink {
						whole, _ = c.in("A", "payload")
					}
					frame := whole.frame()
					for n := ethernetLen + shortest(f); n < len(frame); n++ {
						d.leavesAlone(h, frame[:n])
					}
				}
			})
		}
	}
}

// A frame is often longer than its packet: what is behind it changes nothing.
func TestFastPadding(t *testing.T) {
	eachPath(t, func(c path, ports bool) {
		padding := make([]byte, 1600)
		sent, wire := c.fastOut("A", "x")
		c.redirectsFrame(sender(ports), append(sent.frame(), padding...), append(wire.frame(), padding...), leaveMark(0))
		arrived, seen := c.fastIn("A", "x")
		c.redirectsFrame(fromUplink(), append(arrived.frame(), padding...), append(seen.frame(), padding...), enterMark(0, ports))
	})
}

// Packets in pieces: with the headers in the first one they are fast, else they may go the long way.
func TestFastNonLinear(t *testing.T) {
	eachPath(t, func(c path, ports bool) {
		sent, wire := c.fastOut("A", string(make([]byte, 600)))
		frame := sent.frame()
		headers := len(frame) - 600
		for _, linear := range []int{headers, headers - 1, headers - 5} {
			h := sender(ports)
			h.skb.DataEnd = uint32(linear)
			out := make([]byte, len(frame))
			verdict, err := c.programs[h.program].Run(&ebpf.RunOptions{Data: frame, DataOut: out, Context: h.skb})
			if errors.Is(err, unix.EINVAL) {
				c.Skip("this kernel's prog.Run makes no packets in pieces")
			}
			c.check(err)
			switch {
			case verdict == redirect:
				c.sameFrame(wire.frame(), out)
			case verdict != unspec || linear == headers:
				c.Fatalf("%d bytes of %d in the first piece: verdict %d", linear, headers, int32(verdict))
			default:
				c.sameFrame(frame, out)
			}
		}
	})
}
