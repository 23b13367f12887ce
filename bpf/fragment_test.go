package bpf_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"tcnat/bpf"
)

// Four fragments, of which the last is shorter than the first, or longer than its own headers at least.
const pieceSize, piecesPayload = 40, 3*40 + 5

func fragmentOrders(random *rand.Rand) [][]int {
	return [][]int{{0, 1, 2, 3}, {3, 2, 1, 0}, {1, 0, 3, 2}, random.Perm(4), random.Perm(4)}
}

// payloadFor makes a datagram of four fragments.
func (c path) payloadFor() string {
	header := map[uint8]int{protoTCP: 20}[c.proto]
	if header == 0 {
		header = 8
	}
	return strings.Repeat("fragment", 20)[:piecesPayload-header+20]
}

// Fragments are translated as their datagram would be, in whatever order they come.
func TestFragments(t *testing.T) {
	d := load(t, 1024)
	random := rand.New(rand.NewPCG(4, 5))
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, udpZero, echo} {
			if f.name == "ipv6" && p.noChecksum {
				continue
			}
			for _, way := range translated {
				if p.name == "echo" && strings.HasPrefix(way.name, "dnat") {
					continue
				}
				d.each(fmt.Sprintf("%s/%s/%s", f.name, p.name, way.name), func(d *datapath) {
					c := way.open(d, f, p)
					for _, order := range fragmentOrders(random) {
						c.inOrder(order)
					}
				})
			}
		}
	}
}

func (c path) inOrder(order []int) {
	c.Helper()
	sent, wire := c.out("A", c.payloadFor())
	for _, n := range order {
		c.passesFrame(fromBridge(), sent.cut(pieceSize, fragmentID)[n], sent.cut(pieceSize, fragmentID)[n])
	}
	route := func(p packet) packet { return p.forwarded().between(uplinkMAC, gatewayMAC) }
	c.ordered(toUplink(), route(sent), route(wire), pieceSize, order)
	back, seen := c.in("A", c.payloadFor())
	c.ordered(fromUplink(), back, seen, pieceSize, order)
	seen = seen.forwarded().between(bridgeMAC, c.mac())
	c.ordered(toBridge(), seen, seen, pieceSize, order)
}

// A datagram in fragments begins a flow, which is counted in full.
func TestFragmentsBegin(t *testing.T) {
	d := load(t, 1024)
	for _, f := range families {
		d.each(f.name+"/snat", func(d *datapath) {
			d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, masquerade: true}}})
			c := d.path(f, udp).as(f.uplink, 0)
			sent, wire := c.out("", c.payloadFor())
			c.ordered(toUplink(), sent, wire, pieceSize, []int{2, 0, 1, 3})
			half := c.mustHalf(c.outTuple())
			var bytes int
			for _, piece := range sent.cut(pieceSize, fragmentID) {
				bytes += len(piece)
			}
			if half.Packets != 4 || half.Bytes != uint64(bytes) {
				d.Errorf("counted %d packets of %d bytes, want 4 of %d", half.Packets, half.Bytes, bytes)
			}
		})
		d.each(f.name+"/dnat", func(d *datapath) {
			d.setRules(ruleSet{dnat: []dnatRule{publish(f, protoUDP, one(3005), one(80))}})
			c := d.path(f, udp)
			c.inside, c.outside, c.world = at(f.container, 80), at(f.uplink, 3005), at(f.world, 50001)
			c.peer = c.world
			wire, seen := c.in("", c.payloadFor())
			c.ordered(fromUplink(), wire, seen, pieceSize, []int{3, 1, 0, 2})
		})
	}
}

// Containers that speak to published ports by the host's addresses, on one bridge and across two.
func TestFragmentsHairpin(t *testing.T) {
	d := load(t, 1024)
	random := rand.New(rand.NewPCG(6, 7))
	for _, f := range families {
		for _, p := range []protocol{tcp, udp} {
			for name, server := range map[string]resident{"beside": besideOf(f), "beyond": beyondOf(f), "itself": clientOf(f)} {
				d.each(fmt.Sprintf("%s/%s/%s", f.name, p.name, name), func(d *datapath) {
					d.setRules(ruleSet{dnat: []dnatRule{{proto: p.number(f), ports: one(3005), to: server.address, toPorts: one(80)}}})
					l := d.loop(f, p, clientOf(f), server, f.uplink)
					l.forth("S", "")
					for _, order := range fragmentOrders(random) {
						l.carryInOrder(l.client, l.server, l.packet(l.asks, l.published, true, "A", l.payloadFor()), l.asks, l.outsideAt, l.answers, order)
						l.carryInOrder(l.server, l.client, l.packet(l.answers, l.outsideAt, false, "A", l.payloadFor()), l.answers, l.published, l.asks, order)
					}
				})
			}
		}
	}
}

// carryInOrder is loop.carry of a datagram in fragments.
func (l loop) carryInOrder(from, to resident, sent packet, turned, left, arrives netip.AddrPort, order []int) {
	l.Helper()
	sent = sent.between(from.mac, from.gateway)
	between := sent.addrs(turned, arrives)
	h := fromBridge().on(from.bridge).by(from.bridge)
	l.orderedAs(redirect, h, sent, between, pieceSize, order)
	for _, n := range order { // they come once more
		piece := between.cut(pieceSize, fragmentID)[n]
		l.passesFrame(h, piece, piece)
	}
	between = between.forwarded().between(to.gateway, to.mac)
	l.ordered(toBridge().on(to.bridge).by(from.bridge), between, between.addrs(left, arrives), pieceSize, order)
}

// What the checksum of SCTP changes by depends on the rest: fragments pass where the ports do not change.
func TestFragmentsSCTP(t *testing.T) {
	d := load(t, 1024)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, masquerade: true}}, dnat: []dnatRule{publish(f, protoSCTP, one(3005), one(80))}})
			c := d.path(f, sctp).as(f.uplink, 0)
			c.sends("S", "")
			c.receives("SA", "")
			for _, order := range [][]int{{0, 1, 2, 3}, {2, 1, 0, 3}} {
				c.inOrder(order)
			}
			wire, _ := c.in("S", c.payloadFor())
			pieces := wire.addrs(at(f.world, 50000), at(f.uplink, 3005)).cut(pieceSize, 5)
			for _, piece := range pieces {
				d.dropsFrame(fromUplink(), piece, bpf.NATCounterDROP_FRAGMENT)
			}
		})
	}
}

// What is the host's own stays so, in whatever order it comes and however much of it.
func TestFragmentsOfTheHost(t *testing.T) {
	d := load(t, 1024)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, echo} {
			d.each(f.name+"/"+p.name, func(d *datapath) {
				d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, masquerade: true}}, dnat: []dnatRule{publish(f, protoUDP, one(3005), one(80))}})
				c := d.path(f, p).as(f.uplink, 9)
				wire, _ := c.in("S", c.payloadFor())
				sent := c.packet(c.inside, at(f.bridge, 53), true, "S", c.payloadFor()).between(containerMAC, bridgeMAC)
				for _, order := range [][]int{{0, 1, 2, 3}, {3, 1, 0, 2}} {
					d.ordered(fromUplink(), wire, wire, pieceSize, order)
					d.ordered(fromBridge(), sent, sent, pieceSize, order)
				}
				d.forgetFragments()
				own := c.packet(c.outside, c.world, true, "S", c.payloadFor())
				for _, piece := range own.cut(pieceSize, 1) {
					d.passesFrame(toUplink().by(0), piece, piece)
				}
				for _, h := range []hook{fromUplink(), fromBridge()} {
					in := wire
					if h.program == bpf.NATProgFromBridge {
						in = sent
					}
					for i, piece := range in.cut(8, 2)[1:] {
						if i < heldSlots {
							d.holds(h, piece)
						} else {
							d.passesFrame(h, piece, piece)
						}
					}
				}
			})
		}
	}
}

// What the host forwards for somebody else is not held.
func TestFragmentsPassBy(t *testing.T) {
	d := load(t, 1024)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			c := d.path(f, udp).as(f.unmanaged, 0)
			wire, _ := c.in("", c.payloadFor())
			for _, piece := range wire.cut(pieceSize, 3)[1:] {
				d.passesFrame(fromUplink(), piece, piece)
			}
		})
	}
}

// An IPv6 datagram may have options behind the fragment header: only its first fragment tells the protocol.
func TestFragmentsWithOptions(t *testing.T) {
	d := load(t, 1024)
	f := families[1]
	d.each("destination-options", func(d *datapath) {
		c := translated[0].open(d, f, udp)
		c.extensions = []extension{{nextDestination, []byte{0, 1, 4, 0, 0, 0, 0}}}
		wire, seen := c.in("", c.payloadFor())
		// the options into the fragmentable part
		cut := func(p packet) (parts [][]byte) {
			whole, bare := p.frame()[ethernetLen+40:], p
			bare.extensions = nil
			for at := 0; at < len(whole); at += pieceSize {
				end := min(at+pieceSize, len(whole))
				piece := bare.piece(at, whole[at:end], end < len(whole), 9)
				piece[ethernetLen+40] = nextDestination
				parts = append(parts, piece)
			}
			return parts
		}
		from, to := cut(wire), cut(seen)
		d.holds(fromUplink(), from[2])
		d.releases(fromUplink(), from[0], to[0], from[2:3])
		for i := range from {
			d.passesFrame(fromUplink(), from[i], to[i])
		}
	})
}
