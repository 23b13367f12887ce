package bpf_test

import (
	"fmt"
	"net"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/gopacket/gopacket/layers"

	"tcnat/bpf"
)

// What is not ours is passed on untouched by every hook, and nothing is counted.

// ignored expects hooks to pass a frame on as it is without counting or making anything.
func (d *datapath) ignored(frame []byte, hooks ...hook) {
	d.Helper()
	before := d.counts()
	for _, h := range hooks {
		d.passesFrame(h, frame, frame)
	}
	if counted := d.counts().since(before); len(counted) != 0 {
		d.Errorf("counted %s", counted)
	}
	if n := d.halves(); n != 0 {
		d.Errorf("made flows:\n%s", d.allFlows())
	}
}

// everything gives the datapath a rule for whatever could match.
func (d *datapath) everything(f family) {
	d.Helper()
	d.setRules(ruleSet{
		snat: []snatRule{{source: f.subnet, masquerade: true}},
		dnat: []dnatRule{
			publish(f, protoTCP, portRange{1, 65535}, portRange{}), publish(f, protoUDP, portRange{1, 65535}, portRange{}),
		},
	})
}

// aim addresses a frame to the device of a hook, so that only its content is not ours.
func aim(h hook, frame []byte) []byte {
	frame = append([]byte(nil), frame...)
	copy(frame, map[string]net.HardwareAddr{
		bpf.NATProgFromBridge: bridgeMAC.mac, bpf.NATProgToBridge: containerMAC.mac,
		bpf.NATProgFromUplink: uplinkMAC.mac, bpf.NATProgToUplink: gatewayMAC.mac,
	}[h.program])
	return frame
}

func TestNotOursNotIP(t *testing.T) {
	d := load(t, 16)
	for name, kind := range map[string]layers.EthernetType{
		"arp": layers.EthernetTypeARP, "lldp": layers.EthernetTypeLinkLayerDiscovery, "vlan-in-frame": layers.EthernetTypeDot1Q,
		"length": 46, "unknown": 0x88b5,
	} {
		d.each(name, func(d *datapath) {
			d.everything(families[0])
			for _, h := range allHooks() {
				d.ignored(aim(h, ethernet(containerMAC.mac, nil, kind, make([]byte, 46))), h)
			}
		})
	}
}

func TestNotOursLinkICMPv6(t *testing.T) {
	d := load(t, 16)
	f := families[1]
	for _, kind := range []uint8{130, 131, 132, 133, 134, 135, 136, 137, 143} {
		d.each(fmt.Sprint(kind), func(d *datapath) {
			d.everything(f)
			p := packet{src: at(f.container, 0), dst: at(f.world, 0), proto: protoICMPv6, icmpType: kind, payload: make([]byte, 16)}
			d.ignoredUnlessLeaving(p)
		})
	}
}

// Addresses that no router forwards, as source or as destination.
func TestNotOursAddresses(t *testing.T) {
	d := load(t, 16)
	for name, c := range map[string]struct {
		family   int
		src, dst string
	}{
		"dhcp":                   {0, "0.0.0.0", "255.255.255.255"},
		"source-0.0.0.0":         {0, "0.0.0.0", "203.0.113.2"},
		"broadcast":              {0, "172.17.0.2", "255.255.255.255"},
		"multicast":              {0, "172.17.0.2", "224.0.0.251"},
		"multicast-of-a-site":    {0, "172.17.0.2", "239.1.2.3"},
		"v6-link-local":          {1, "fe80::2", "fe80::1"},
		"v6-link-local-client":   {1, "fe80::2", "2001:db8:113::2"},
		"v6-to-link-local":       {1, "fd00:17::2", "febf::1"},
		"v6-multicast":           {1, "fd00:17::2", "ff02::fb"},
		"v6-multicast-of-a-site": {1, "fd00:17::2", "ff05::2"},
		"v6-unspecified":         {1, "::", "2001:db8:113::2"},
	} {
		d.each(name, func(d *datapath) {
			d.everything(families[c.family])
			for _, proto := range []uint8{protoTCP, protoUDP, families[c.family].icmp} {
				p := packet{src: at(ip(c.src), 40000), dst: at(ip(c.dst), 3005), proto: proto, tcp: "S", icmpType: families[c.family].echoRequest}
				d.ignoredUnlessLeaving(p)
			}
		})
	}
}

// ignoredUnlessLeaving expects every hook to ignore the packet, but the one where it would
// leave the host with a container's address.
func (d *datapath) ignoredUnlessLeaving(p packet) {
	d.Helper()
	for _, h := range allHooks() {
		if h.program == bpf.NATProgToUplink && (families[0].subnet.Contains(p.src.Addr()) || families[1].subnet.Contains(p.src.Addr())) {
			d.drops(h, p, bpf.NATCounterDROP_MULTICAST)
			h = h.by(0) // the host's own, with the bridge's address
		}
		d.ignored(aim(h, p.frame()), h)
	}
}

// A broadcast of a subnet is for the host itself, and comes in a broadcast frame.
func TestNotOursSubnetBroadcast(t *testing.T) {
	d := load(t, 16)
	all := macs{net.HardwareAddr{255, 255, 255, 255, 255, 255}}
	d.each("bridge", func(d *datapath) {
		d.everything(families[0])
		p := packet{src: at(families[0].container, 137), dst: at(ip("172.17.255.255"), 137), proto: protoUDP}
		d.ignored(p.between(containerMAC, all).frame(), fromBridge())
	})
	d.each("uplink", func(d *datapath) {
		d.everything(families[0])
		p := packet{src: at(families[0].gateway, 137), dst: at(ip("203.0.113.255"), 137), proto: protoUDP}
		d.ignored(p.between(gatewayMAC, all).frame(), fromUplink())
	})
}

// Frames for another station: seen when the device is promiscuous, or flooded.
func TestNotOursOtherStation(t *testing.T) {
	d := load(t, 16)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			d.everything(f)
			c := d.path(f, tcp)
			sent, _ := c.out("S", "")
			d.ignored(sent.between(containerMAC, otherMAC).frame(), fromBridge())
			wire, _ := c.in("S", "")
			d.ignored(wire.to(at(f.uplink, 3005)).between(gatewayMAC, otherMAC).frame(), fromUplink())
		})
	}
}

// While it is not live the datapath passes all on, also what it would drop.
func TestNotLive(t *testing.T) {
	d := load(t, 16)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			d.everything(f)
			d.configure(func(c *bpf.NATConfig) { c.Live = 0 })
			c := d.path(f, tcp)
			sent, _ := c.out("S", "")
			wire, _ := c.in("S", "")
			d.ignored(sent.frame(), fromBridge(), toUplink())
			d.ignored(sent.from(at(f.world, 1)).frame(), fromBridge())
			d.ignored(wire.to(at(f.uplink, 3005)).frame(), fromUplink())
			d.ignored(wire.to(at(f.container, 3005)).frame(), fromUplink(), toBridge())
			cut := sent.frame()
			cut[ethernetLen] = 0x40
			d.ignored(cut, allHooks()...)
		})
	}
}

// A connection that the host's own socket carries, docker-proxy's for one, stays with it
// when its port is published afterwards.
func TestNotOursProxyConnection(t *testing.T) {
	d := load(t, 16)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			client := connectTCP(d, f)
			d.setRules(ruleSet{dnat: []dnatRule{publish(f, protoTCP, one(client.server.Port()), one(80))}})
			for _, flags := range []string{"A", "PA", "FA", "R"} {
				p := packet{src: client.client, dst: client.server, proto: protoTCP, tcp: flags}
				d.ignored(p.between(gatewayMAC, uplinkMAC).frame(), fromUplink())
			}
			// another client of the same port has no socket
			other := packet{src: at(f.world, 50000), dst: client.server, proto: protoTCP, tcp: "S"}.between(gatewayMAC, uplinkMAC)
			d.passes(fromUplink(), other, other.to(at(f.container, 80)))
		})
	}
}

// A frame of a VLAN has its tag in the packet's metadata. An id of 0 is a priority tag:
// such a frame is ours.
func TestVLAN(t *testing.T) {
	d := load(t, 16)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			d.everything(f)
			c := d.path(f, udp).as(f.uplink, 0)
			sent, wire := c.out("", "x")
			for _, tci := range []uint16{5, 4095, 7<<13 | 1} {
				for _, h := range allHooks() {
					d.ignored(aim(h, sent.frame()), d.tagged(h, tci))
				}
			}
			d.passes(d.tagged(toUplink(), 7<<13), sent, wire)
		})
	}
}

// tagged answers the hook for frames with a VLAN tag in their metadata. prog.Run cannot
// set one, so a program that does runs before the hook's.
func (d *datapath) tagged(h hook, tci uint16) hook {
	d.Helper()
	const ethP8021Q = 0x0081 // big-endian
	return d.after(h, asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, ethP8021Q),
		asm.Mov.Imm(asm.R3, int32(tci)),
		asm.FnSkbVlanPush.Call(),
	})
}

// after answers the hook with instructions that run before its program. They find the
// context in r6 and leave their result in r0; anything but 0 fails the run.
func (d *datapath) after(h hook, before asm.Instructions) hook {
	d.Helper()
	jumps, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	d.check(err)
	d.Cleanup(func() { jumps.Close() })
	d.check(jumps.Put(uint32(0), d.programs[h.program]))
	insns := append(asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}, before...)
	insns = append(insns,
		asm.JNE.Imm(asm.R0, 0, "failed"),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.LoadMapPtr(asm.R2, jumps.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("failed"),
		asm.Add.Imm(asm.R0, 77),
		asm.Return(),
	)
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, Instructions: insns, License: "GPL"})
	if err != nil {
		d.Fatalf("%+v", err)
	}
	d.Cleanup(func() { p.Close() })
	h.instead = p
	return h
}
