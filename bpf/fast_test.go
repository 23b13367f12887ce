package bpf_test

import (
	"fmt"
	"testing"

	"tcnat/bpf"
)

// The fast path: a packet whose direction has a lease is translated and redirected by the first
// program that sees it.

// needsSlow answers whether the fast path leaves the path's packets alone: UDP without a checksum
// whose ports change.
func (c path) needsSlow() bool {
	changed := c.inside.Port() != c.outside.Port() || c.peer.Port() != c.world.Port()
	return c.noChecksum && changed
}

func TestFastLife(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, udpZero} {
			for _, tr := range translated {
				for _, way := range ways {
					d.each(fmt.Sprintf("%s/%s/%s/%s", f.name, p.name, tr.name, way.name), func(d *datapath) {
						c := tr.open(d, f, p).established()
						d.setFast(bpf.NATFastPathFAST_PATH_ESTABLISHED, way.ports)
						before := d.counts()
						c.slowly(way.ports)
						if n := d.counts().since(before)[bpf.NATCounterLEASES_GRANTED]; n != 2 {
							d.Fatalf("%d leases granted, want 2", n)
						}
						c.fastLife(way.ports)
					})
				}
			}
		}
	}
}

// fastLife carries packets both ways on the fast path and looks at what was counted and at what
// the hooks of the output devices make of them.
func (c path) fastLife(ports bool) {
	c.Helper()
	for i, payload := range []string{"", "odd", "some payload of a good length"} {
		sent, wire := c.fastOut("PA", payload)
		arrived, seen := c.fastIn("PA", payload)
		if c.needsSlow() {
			c.untouched(sender(ports), sent)
			c.untouched(fromBridge(), sent)
			c.carryIn(c.in("PA", payload))
			continue
		}
		c.renew()
		before, other := c.mustHalf(c.outTuple()), c.mustHalf(c.inTuple())
		c.onOneCPU(func() {
			c.redirects(sender(ports).marked(hostMark), sent, wire, leaveMark(hostMark))
			c.passesRedirected(toUplink().by(sender(ports).skb.Ifindex), wire)
		})
		c.counted(before, c.mustHalf(c.outTuple()), len(sent.frame()))
		if now := c.mustHalf(c.inTuple()); now != other {
			c.Errorf("packet %d changed the other half:\n%+v\n%+v", i, other, now)
		}

		before, other = c.mustHalf(c.inTuple()), c.mustHalf(c.outTuple())
		c.onOneCPU(func() {
			c.redirects(fromUplink().marked(hostMark), arrived, seen, enterMark(hostMark, ports))
			if !ports {
				c.passesRedirected(toBridge(), seen)
			}
		})
		c.counted(before, c.mustHalf(c.inTuple()), len(arrived.frame()))
		if now := c.mustHalf(c.outTuple()); now != other {
			c.Errorf("packet %d changed the other half:\n%+v\n%+v", i, other, now)
		}
	}
}

// counted expects a half to have counted one packet of so many bytes, and nothing else to be new.
func (c path) counted(before, after bpf.NATHalf, bytes int) {
	c.Helper()
	want := before
	want.Packets++
	want.Bytes += uint64(bytes)
	if age := after.Seen - before.Seen; age > 10000 {
		c.Errorf("last seen %d stamps later", age)
	}
	want.Seen = after.Seen
	if after != want {
		c.Errorf("half:\n got %+v\nwant %+v", after, want)
	}
}

// passesRedirected expects an egress hook to pass the packet that was redirected just now as it is, to
// take our bit off its mark and to grant nothing.
func (d *datapath) passesRedirected(h hook, p packet) {
	d.Helper()
	halves, counts := d.allHalves(), d.counts()
	verdict, out, meta := d.runMeta(h.marked(hostMark|testMark), p.frame())
	if verdict != unspec {
		d.Fatalf("%s: verdict %d for a redirected packet; counted %s", h.program, int32(verdict), d.counts().since(counts))
	}
	d.sameFrame(p.frame(), out)
	if meta.Mark != hostMark {
		d.Errorf("%s: mark %#x, want %#x", h.program, meta.Mark, hostMark)
	}
	if !equalHalves(halves, d.allHalves()) {
		d.Errorf("%s: a redirected packet changed a flow", h.program)
	}
	if n := d.counts().since(counts); len(n) != 0 {
		d.Errorf("%s: a redirected packet counted %s", h.program, n)
	}
}

// A redirected packet renews no lease that has run out.
func TestFastNeverRenewsItself(t *testing.T) {
	eachPath(t, func(c path, ports bool) {
		c.renew()
		sent, wire := c.fastOut("A", "x")
		arrived, seen := c.fastIn("A", "x")
		c.onOneCPU(func() {
			c.redirects(sender(ports), sent, wire, leaveMark(0))
			c.age(c.outTuple(), leaseStamps+10)
			c.passesRedirected(toUplink(), wire)
		})
		c.untouched(sender(ports), sent)
		c.onOneCPU(func() {
			c.redirects(fromUplink(), arrived, seen, enterMark(0, ports))
			c.age(c.inTuple(), leaseStamps+10)
			if !ports {
				c.passesRedirected(toBridge(), seen)
			}
		})
		arrived, inside := c.in("A", "x")
		c.passes(fromUplink(), arrived, inside)
	})
}

// Our bit alone, set by somebody's rule, opens no door: not with a container's address, not into a
// container, not with the length or the device of another packet.
func TestFastMarkAlone(t *testing.T) {
	eachPath(t, func(c path, ports bool) {
		const marks = testMark | hostMark
		translates := func(payload string) {
			sent, wire := c.out("A", payload)
			verdict, out, meta := c.runMeta(toUplink().marked(marks), sent.frame())
			if verdict != unspec || meta.Mark != marks {
				c.Errorf("verdict %d, mark %#x", int32(verdict), meta.Mark)
			}
			c.sameFrame(wire.frame(), out)
		}
		stranger := func(payload string) {
			_, p := c.in("A", payload)
			p = p.from(at(c.router, 7)).between(bridgeMAC, containerMAC)
			c.drops(toBridge().marked(marks), p, bpf.NATCounterDROP_NO_FLOW)
		}
		c.renew()
		translates("x")
		stranger("x")
		sent, wire := c.fastOut("A", "some length")
		c.onOneCPU(func() { // the redirected packet is still to come
			c.redirects(sender(ports), sent, wire, leaveMark(0))
			translates("another length")
			stranger("some length")
		})
		c.onOneCPU(func() { // it has come
			c.redirects(sender(ports), sent, wire, leaveMark(0))
			c.passesRedirected(toUplink(), wire)
			translates("some length")
		})
	})
}

// A packet that stands for many has one segment's length, and counts as many.
func TestFastGSO(t *testing.T) {
	eachPath(t, func(c path, ports bool) {
		c.renew()
		payload := string(make([]byte, 3000))
		headers := c.packet(c.inside, c.peer, true, "A", "").frame()
		room := uint32(1500 - (len(headers) - ethernetLen))
		sent, wire := c.fastOut("A", payload)
		arrived, seen := c.fastIn("A", payload)
		before := c.mustHalf(c.outTuple())
		c.redirects(sender(ports).gso(room, 3), sent, wire, leaveMark(0))
		after := c.mustHalf(c.outTuple())
		if after.Packets != before.Packets+3 || after.Bytes != before.Bytes+uint64(len(sent.frame())) {
			c.Errorf("counted %d packets, %d bytes more", after.Packets-before.Packets, after.Bytes-before.Bytes)
		}
		c.redirects(fromUplink().gso(room, 3), arrived, seen, enterMark(0, ports))
		c.untouched(sender(ports).gso(room+1, 3), sent)
		c.untouched(fromBridge().gso(room+1, 3), sent)
		_, inside := c.in("A", payload)
		c.passes(fromUplink().gso(room+1, 3), arrived, inside)
	})
}

// Exactly the MTU goes, of the device or of the route.
func TestFastMTU(t *testing.T) {
	eachPath(t, func(c path, ports bool) {
		c.renew()
		headers := len(c.packet(c.inside, c.peer, true, "A", "").frame()) - ethernetLen
		fits, over := string(make([]byte, 1500-headers)), string(make([]byte, 1501-headers))
		sent, wire := c.fastOut("A", fits)
		c.redirects(sender(ports), sent, wire, leaveMark(0))
		arrived, seen := c.fastIn("A", fits)
		c.redirects(fromUplink(), arrived, seen, enterMark(0, ports))
		sent, _ = c.out("A", over)
		c.untouched(sender(ports), sent)
		c.untouched(fromBridge(), sent)
		arrived, seen = c.in("A", over)
		c.passes(fromUplink(), arrived, seen)
	})
}
