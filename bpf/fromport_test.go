package bpf_test

import (
	"net"
	"testing"

	"tcnat/bpf"
)

// What from_port does besides the fast path, and what neighbours on a bridge can do to each other.

var portPrograms = []string{bpf.NATProgFromPort, bpf.NATProgFromPortFirst}

// A frame with the address of another port's container would lead the bridge's own table astray.
func TestPortStolenMAC(t *testing.T) {
	d := load(t, 64)
	unknown := macs{net.HardwareAddr{2, 9, 9, 9, 9, 9}}
	for _, f := range families {
		for _, program := range portPrograms {
			for _, mode := range []bpf.NATFastPath{bpf.NATFastPathFAST_PATH_OFF, bpf.NATFastPathFAST_PATH_ESTABLISHED, bpf.NATFastPathFAST_PATH_ALWAYS} {
				d.each(f.name+"/"+program, func(d *datapath) {
					masquerade(d, f)
					d.setFast(mode, true)
					h := fromPort().running(program)
					sent, _ := d.path(f, tcp).out("S", "x")
					for _, destination := range []macs{bridgeMAC, otherMAC, unknown} {
						d.untouched(h, sent.between(containerMAC, destination))
						d.untouched(h, sent.between(unknown, destination))
						d.drops(h, sent.between(otherMAC, destination), bpf.NATCounterDROP_SPOOFED_MAC)
						d.drops(h.on(otherPortIf).by(otherPortIf), sent.between(containerMAC, destination), bpf.NATCounterDROP_SPOOFED_MAC)
					}
					arp := ethernet(containerMAC.mac, net.HardwareAddr{255, 255, 255, 255, 255, 255}, 0x0806, make([]byte, 46))
					d.passesFrame(h, arp, arp)
					copy(arp[6:], otherMAC.mac)
					d.dropsFrame(h, arp, bpf.NATCounterDROP_SPOOFED_MAC)
					// a port that nobody has told of, and an owner on another bridge
					d.check(d.Devices.Delete(portIf))
					d.untouched(h, sent.between(otherMAC, bridgeMAC))
					d.addPort(portIf, containerMAC)
					d.check(d.Ports.Delete(portKey(bridgeIf, otherMAC)))
					d.check(d.Ports.Put(portKey(bridge2If, otherMAC), otherPortIf))
					d.untouched(h, sent.between(otherMAC, bridgeMAC))
					if n := d.halves(); n != 0 {
						d.Errorf("made flows:\n%s", d.allFlows())
					}
				})
			}
		}
	}
}

// Containers of one bridge talk past the host: with tuples of leased flows, too (a container that
// is another's gateway).
func TestPortNeighbours(t *testing.T) {
	eachPath(t, func(c path, ports bool) {
		if !ports {
			c.Skip("not here")
		}
		c.renew()
		for _, program := range portPrograms {
			h := fromPort().running(program)
			sent, _ := c.out("A", "x")
			c.untouched(h, sent.between(containerMAC, otherMAC))
			c.untouched(h, sent.to(at(c.other, 80)).between(containerMAC, otherMAC))
			c.untouched(h, sent.between(containerMAC, macs{net.HardwareAddr{255, 255, 255, 255, 255, 255}}))
			c.untouched(h, sent.between(containerMAC, macs{net.HardwareAddr{1, 0, 0x5e, 0, 0, 1}}))
		}
	})
}

// A neighbour that has a container's address and live tuple gets no lease for its own port, and
// costs the container none.
func TestPortForged(t *testing.T) {
	eachPath(t, func(c path, ports bool) {
		c.renew()
		before := c.allHalves()
		sent, wire := c.fastOut("A", "x")
		forged := sent.between(otherMAC, bridgeMAC)
		hook := fromBridge()
		if ports {
			c.untouched(fromPort().on(otherPortIf).by(otherPortIf), forged)
		}
		c.drops(hook, forged, bpf.NATCounterDROP_SPOOFED_MAC)
		if !equalHalves(before, c.allHalves()) {
			c.Error("a neighbour's frame changed the flow")
		}
		c.redirects(sender(ports), sent, wire, leaveMark(0))

		// and when the host is asked again
		c.age(c.outTuple(), leaseStamps+10)
		c.age(c.inTuple(), leaseStamps+10)
		c.drops(hook, forged, bpf.NATCounterDROP_SPOOFED_MAC)
		c.slowly(ports)
		c.redirects(sender(ports), sent, wire, leaveMark(0))
		for _, index := range []uint16{c.mustHalf(c.outTuple()).Lease.In, c.mustHalf(c.inTuple()).Lease.Out} {
			if a := c.adjacency(index); string(a.Remote[:]) != string(containerMAC.mac) {
				c.Errorf("lease for %+v", a)
			}
		}
	})
}

// Marks are the host's: what is not redirected keeps its own, our bit included.
func TestMarkOfOthers(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			masquerade(d, f)
			d.setFast(bpf.NATFastPathFAST_PATH_ESTABLISHED, true)
			sent, _ := d.path(f, udp).as(f.uplink, 0).out("", "x")
			for _, h := range append(allHooks(), fromPort()) {
				for _, mark := range []uint32{hostMark, hostMark | testMark} {
					if _, _, meta := d.runMeta(h.marked(mark), aim(h, sent.frame())); meta.Mark != mark {
						d.Errorf("%s: mark %#x became %#x", h.program, mark, meta.Mark)
					}
				}
			}
		})
	}
}
