package bpf_test

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"tcnat/bpf"
)

// fragmented is a hook, and a datagram of a flow that it translates, in fragments; inside is a container's or
// one for it.
type fragmented struct {
	hook
	name     string
	in, want packet
}

func (c path) fragmentedAt() []fragmented {
	sent, wire := c.out("A", c.payloadFor())
	back, seen := c.in("A", c.payloadFor())
	route := func(p packet) packet { return p.forwarded().between(uplinkMAC, gatewayMAC) }
	entering := seen.forwarded().between(bridgeMAC, c.mac())
	return []fragmented{
		{toUplink(), "to-uplink", route(sent), route(wire)},
		{fromUplink(), "from-uplink", back, seen},
		{toBridge(), "to-bridge", entering, entering},
	}
}

// eachFragmented runs a test at each hook with TCP and UDP flows of both families.
func eachFragmented(t *testing.T, test func(c path, f fragmented)) {
	d := load(t, 1024)
	for _, fam := range families {
		for _, p := range []protocol{tcp, udp} {
			for i, name := range []string{"to-uplink", "from-uplink", "to-bridge"} {
				d.each(fmt.Sprintf("%s/%s/%s", fam.name, p.name, name), func(d *datapath) {
					c := translated[0].open(d, fam, p)
					test(c, c.fragmentedAt()[i])
				})
			}
		}
	}
}

// A later fragment that overlaps the first would replace what has been looked at (RFC 1858, RFC 3128, RFC 5722).
func TestFragmentsOverlapping(t *testing.T) {
	eachFragmented(t, func(c path, f fragmented) {
		from, to := f.in.cut(pieceSize, fragmentID), f.want.cut(pieceSize, fragmentID)
		early := f.in.piece(8, bytes.Repeat([]byte("evil"), 8), true, fragmentID)
		c.holds(f.hook, early)
		c.releases(f.hook, from[0], to[0], [][]byte{early})
		for at := 8; at < pieceSize; at += 8 {
			c.dropsFrame(f.hook, f.in.piece(at, bytes.Repeat([]byte("evil"), 8), true, fragmentID), bpf.NATCounterDROP_FRAGMENT)
		}
		for i := range from { // duplicates are none of ours to find
			c.passesFrame(f.hook, from[i], to[i])
			c.passesFrame(f.hook, from[i], to[i])
		}
	})
}

// A first fragment that is too short for ports and flags is malformed (RFC 1858 section 3).
func TestFragmentsTiny(t *testing.T) {
	d := load(t, 1024)
	for _, fam := range families {
		d.each(fam.name, func(d *datapath) {
			c := translated[0].open(d, fam, tcp)
			for _, f := range c.fragmentedAt() {
				for _, size := range []int{8, 16} {
					pieces := f.in.cut(size, uint32(size))
					d.dropsFrame(f.hook, pieces[0], bpf.NATCounterDROP_MALFORMED)
					d.holds(f.hook, pieces[1])
				}
				d.passesFrame(f.hook, f.in.cut(24, 1)[0], f.want.cut(24, 1)[0])
			}
		})
	}
}

// A fragment with another id, of another sender or to another receiver waits for a first of its own.
func TestFragmentsOfOthers(t *testing.T) {
	eachFragmented(t, func(c path, f fragmented) {
		from, to := f.in.cut(pieceSize, fragmentID), f.want.cut(pieceSize, fragmentID)
		c.passesFrame(f.hook, from[0], to[0])
		c.holds(f.hook, f.in.cut(pieceSize, fragmentID+1)[1])
		other := f.in
		if f.name == "to-uplink" {
			other.src = at(c.other, other.src.Port())
		} else {
			other.src = at(c.router, other.src.Port())
		}
		c.holds(f.hook, other.cut(pieceSize, fragmentID)[1])
		if f.name != "from-uplink" { // another device has another MAC
			c.holds(f.hook.on(bridge2If), from[1])
		}
		c.passesFrame(f.hook, from[1], to[1])
	})
}

// What the first is refused for, the others are too.
func TestFragmentsRefused(t *testing.T) {
	eachFragmented(t, func(c path, f fragmented) {
		from := f.in.cut(pieceSize, fragmentID)
		c.forget()
		c.setRules(ruleSet{})
		if f.name == "from-uplink" { // the host's own then
			c.passesFrame(f.hook, from[0], from[0])
			c.passesFrame(f.hook, from[1], from[1])
			return
		}
		reason := bpf.NATCounterDROP_NO_RULE
		if f.name == "to-bridge" {
			reason = bpf.NATCounterDROP_NO_FLOW
		}
		c.holds(f.hook, from[2])
		c.refuses(f.hook, from[0], reason)
		for _, piece := range from[1:] {
			c.dropsFrame(f.hook, piece, bpf.NATCounterDROP_FRAGMENT)
		}
	})
}

// Fragments of a flow that ended do not go where they went, and none begins one.
func TestFragmentsAfterTheEnd(t *testing.T) {
	eachFragmented(t, func(c path, f fragmented) {
		from, to := f.in.cut(pieceSize, fragmentID), f.want.cut(pieceSize, fragmentID)
		c.passesFrame(f.hook, from[0], to[0])
		c.passesFrame(f.hook, from[1], to[1])
		c.endRule(snatID(0))
		reason := bpf.NATCounterDROP_FRAGMENT
		if f.name == "to-bridge" {
			reason = bpf.NATCounterDROP_NO_FLOW
		}
		had := c.halves()
		c.dropsFrame(f.hook, from[2], reason)
		c.forget()
		c.dropsFrame(f.hook, from[2], reason)
		if c.halves() > had {
			c.Errorf("a later fragment made a flow")
		}
	})
}

// Two seconds after its last fragment nothing is known of a datagram any more.
func TestFragmentsForgotten(t *testing.T) {
	const second = uint32(1e9 >> 20)
	eachFragmented(t, func(c path, f fragmented) {
		from, to := f.in.cut(pieceSize, fragmentID), f.want.cut(pieceSize, fragmentID)
		c.passesFrame(f.hook, from[0], to[0])
		age := func(by uint32) {
			for k, v := range elements[bpf.NATDatagramKey, bpf.NATDatagram](c.datapath, c.Fragments) {
				v.Stamp -= by
				c.check(c.Fragments.Put(k, v))
			}
		}
		age(second * 3 / 2)
		c.passesFrame(f.hook, from[1], to[1])
		age(second * 3 / 2)
		c.passesFrame(f.hook, from[2], to[2])
		age(second * 5 / 2)
		c.holds(f.hook, from[3])
	})
}

// Who waits takes little room, and not for long.
func TestFragmentsBounds(t *testing.T) {
	const all = 256
	d := load(t, 1024)
	for _, fam := range families {
		t.Run(fam.name, func(t *testing.T) {
			d := *d
			d.TB = t
			d.reset()
			d.startExpiry()
			c := translated[0].open(&d, fam, udp)
			for _, f := range c.fragmentedAt() {
				spare := func(id uint32, n int) {
					t.Helper()
					piece := f.in.piece(pieceSize*(n+1), []byte("fragment"), true, id)
					if f.name == "from-uplink" { // to whom it may belong
						d.passesFrame(f.hook, piece, piece)
					} else {
						d.dropsFrame(f.hook, piece, bpf.NATCounterDROP_FRAGMENT_NO_ROOM)
					}
				}
				before := d.counts()
				for i := range all {
					d.holds(f.hook, f.in.piece(pieceSize*(i%heldSlots+1), []byte("fragment"), true, uint32(i/heldSlots)))
					if i == heldSlots-1 {
						spare(0, heldSlots)
					}
				}
				spare(all, 0)
				// a flow goes on
				d.passesFrame(f.hook, f.in.frame(), f.want.frame())
				from, to := f.in.cut(pieceSize, fragmentID), f.want.cut(pieceSize, fragmentID)
				for i := range from {
					d.passesFrame(f.hook, from[i], to[i])
				}
				d.until("those who wait in vain go", 10*time.Second, func() bool { return d.heldFragments() == 0 })
				if n := d.counts().since(before)[bpf.NATCounterDROP_FRAGMENT_ALONE]; n != all {
					t.Errorf("%s: %d counted as alone, want %d", f.name, n, all)
				}
			}
		})
	}
}

// A flood of first fragments takes nothing from anybody: the table forgets the oldest.
func TestFragmentsFlood(t *testing.T) {
	eachFragmented(t, func(c path, f fragmented) {
		if c.proto != protoUDP {
			return // once is enough
		}
		whole := f.in.cut(pieceSize, fragmentID)[0]
		for i := range uint32(3 * c.Fragments.MaxEntries()) {
			first := f.in.piece(0, whole[ethernetLen+f.in.cutHeader():], true, i)
			if verdict, _ := c.run(f.hook, first); verdict != unspec {
				c.Fatalf("verdict %d", verdict)
			}
		}
		from, to := f.in.cut(pieceSize, fragmentID), f.want.cut(pieceSize, fragmentID)
		for i := range from {
			c.passesFrame(f.hook, from[i], to[i])
		}
	})
}

// cutHeader is the length of the headers that each of the packet's fragments has.
func (p packet) cutHeader() int {
	if p.v6() {
		return p.headerLen() + 8
	}
	return p.headerLen()
}

// What a container sends is looked at in each fragment.
func TestFragmentsSpoofed(t *testing.T) {
	d := load(t, 1024)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			c := translated[0].open(d, f, udp)
			sent, _ := c.out("", c.payloadFor())
			for _, piece := range []int{0, 1} {
				d.dropsFrame(fromBridge(), sent.from(at(f.neighbour, 1)).cut(pieceSize, 1)[piece], bpf.NATCounterDROP_SPOOFED_ADDRESS)
				d.dropsFrame(fromBridge(), sent.from(at(f.other, 1)).cut(pieceSize, 1)[piece], bpf.NATCounterDROP_SPOOFED_MAC)
				d.dropsFrame(fromBridge(), sent.to(at(f.unmanaged, 1)).cut(pieceSize, 1)[piece], bpf.NATCounterDROP_NO_UPLINK)
				d.dropsFrame(fromBridge(), sent.to(at(f.neighbour, 1)).cut(pieceSize, 1)[piece], bpf.NATCounterDROP_ISOLATED)
				d.dropsFrame(toUplink().by(bridge2If), sent.cut(pieceSize, 1)[piece], bpf.NATCounterDROP_SPOOFED_ADDRESS)
			}
			// what a device without from_uplink let in was translated by nobody
			for _, f := range c.fragmentedAt()[2:] {
				pieces := f.in.cut(pieceSize, 2)
				d.passesFrame(f.hook, pieces[0], pieces[0])
				d.holds(f.hook.by(eth1If), pieces[1])
				d.refuses(f.hook.by(eth1If), pieces[0], bpf.NATCounterDROP_NO_FLOW)
				d.dropsFrame(f.hook.by(eth1If), pieces[1], bpf.NATCounterDROP_FRAGMENT)
			}
			// nobody outside speaks to a container by its own address
			wire, _ := c.in("", c.payloadFor())
			direct := wire.to(c.inside).cut(pieceSize, 3)
			d.holds(fromUplink(), direct[1])
			d.refuses(fromUplink(), direct[0], bpf.NATCounterDROP_NO_FLOW)
			d.dropsFrame(fromUplink(), direct[1], bpf.NATCounterDROP_FRAGMENT)
			// nor with an inside address
			for _, piece := range sent.to(at(f.world, 443)).between(gatewayMAC, uplinkMAC).cut(pieceSize, 4) {
				d.dropsFrame(fromUplink(), piece, bpf.NATCounterDROP_SPOOFED_ADDRESS)
			}
			// by another uplink than the first, it is of the datagram all the same
			pieces := wire.cut(pieceSize, 5)
			d.holds(fromUplink().on(eth1If).by(eth1If), wire.between(gatewayMAC, eth1MAC).cut(pieceSize, 5)[1])
			verdict, _ := d.run(fromUplink(), pieces[0])
			if verdict != unspec {
				d.Fatalf("verdict %d of a first fragment", int32(verdict))
			}
			if n := len(elements[bpf.NATHeldKey, bpf.NATHeldFragment](d, d.HeldFragments)); n != 0 {
				d.Errorf("%d fragments wait still", n)
			}
		})
	}
}
