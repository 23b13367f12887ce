package bpf_test

import (
	"bytes"
	"fmt"
	"net/netip"

	"github.com/google/go-cmp/cmp"

	"tcnat/bpf"
)

// path is a conversation as each side sees it: the container is at inside and sees the
// world at peer; on the wire the world is at world and sees the container at outside. The
// datapath's whole job is to turn one into the other:
//
//	container                wire
//	inside  -> peer    <=>   outside -> world
//
// An ICMP echo has its id as the port of inside and outside, and 0 as the others.
type path struct {
	*datapath
	family
	proto                        uint8
	noChecksum                   bool
	inside, peer, outside, world netip.AddrPort
	options                      []byte
	extensions                   []extension
}

// packet answers a packet of the path between these two, the container asking where it
// is an echo.
func (c path) packet(src, dst netip.AddrPort, request bool, flags, payload string) packet {
	p := packet{
		src: src, dst: dst, proto: c.proto, tcp: flags, noChecksum: c.noChecksum, payload: []byte(payload),
		options: c.options, extensions: c.extensions,
	}
	if c.proto == c.icmp {
		p.icmpType = c.echoReply
		if request {
			p.icmpType = c.echoRequest
		}
	}
	return p
}

// mac is the container's.
func (c path) mac() macs {
	if c.inside.Addr() == c.other {
		return otherMAC
	}
	return containerMAC
}

// out answers a packet as the container sends it and as the wire must carry it, out of
// docker0 and eth0.
func (c path) out(flags, payload string) (sent, wire packet) {
	sent = c.packet(c.inside, c.peer, true, flags, payload).between(c.mac(), bridgeMAC)
	wire = sent.addrs(c.outside, c.world)
	return sent, wire
}

// in answers a packet as the wire carries it and as the container must see it.
func (c path) in(flags, payload string) (wire, seen packet) {
	wire = c.packet(c.world, c.outside, false, flags, payload).between(gatewayMAC, uplinkMAC)
	seen = wire.addrs(c.peer, c.inside)
	return wire, seen
}

// sends carries a packet from the container to the wire, through both hooks and the
// host's routing between them.
func (c path) sends(flags, payload string) {
	c.Helper()
	sent, wire := c.out(flags, payload)
	c.carryOut(sent, wire)
}

func (c path) carryOut(sent, wire packet) {
	c.Helper()
	c.untouched(fromBridge(), sent)
	route := func(p packet) packet { return p.forwarded().between(uplinkMAC, gatewayMAC) }
	c.passes(toUplink(), route(sent), route(wire))
}

// receives carries a packet from the wire to the container.
func (c path) receives(flags, payload string) {
	c.Helper()
	wire, seen := c.in(flags, payload)
	c.carryIn(wire, seen)
}

func (c path) carryIn(wire, seen packet) {
	c.Helper()
	c.passes(fromUplink(), wire, seen)
	c.untouched(toBridge(), seen.forwarded().between(bridgeMAC, c.mac()))
}

// tuples answers the keys that the flow must have, the original one first.
func (c path) tuples(inbound bool) (original, reply tuple) {
	out := tuple{c.proto, c.inside, c.peer}
	in := tuple{c.proto, c.world, c.outside}
	if inbound {
		return in, out
	}
	return out, in
}

// flow answers what the path's flow must look like after so many packets out and in.
func (c path) flow(inbound bool, translation bpf.NATTranslation, rule uint32) wantFlow {
	f := wantFlow{translation: translation, rule: rule, inbound: inbound}
	f.original, f.reply = c.tuples(inbound)
	if inbound {
		f.back = bridgeIf
	} else {
		f.originalIf = bridgeIf
	}
	return f
}

// open sends the first packet of a conversation out, whatever outside port it gets, checks
// that only the source changed, and answers the path with that port in it.
func (c path) open() path {
	c.Helper()
	port := c.tryOpen()
	if port == 0 && c.proto != c.icmp {
		c.Fatalf("%s -> %s got no port; counted: %s", c.inside, c.peer, c.counts())
	}
	c.outside = at(c.outside.Addr(), port)
	return c
}

// tryOpen is open without an insistence: 0 when the packet was dropped.
func (c path) tryOpen() uint16 {
	c.Helper()
	sent, _ := c.out("S", "x")
	sent = sent.forwarded().between(uplinkMAC, gatewayMAC)
	verdict, out := c.run(toUplink(), sent.frame())
	if verdict == shot {
		return 0
	}
	wire := sent.from(at(c.outside.Addr(), sourcePort(c.family, c.proto, out)))
	c.sameFrame(wire.frame(), out)
	return wire.src.Port()
}

// sourcePort reads the source port (the id of an echo request) of a frame without options.
func sourcePort(f family, proto uint8, frame []byte) uint16 {
	at := ethernetLen + 20
	if f.name == "ipv6" {
		at = ethernetLen + 40
	}
	if proto == f.icmp {
		at += 4
	}
	return uint16(frame[at])<<8 | uint16(frame[at+1])
}

// protocol is what a life is lived in.
type protocol struct {
	name       string
	number     func(family) uint8
	noChecksum bool
}

// states tells whether it has connections, whose states a flow notes.
func (p protocol) states() bool {
	return p.name == tcp.name || p.name == sctp.name || p.name == sctpZero.name
}

func fixedProto(n uint8) func(family) uint8 { return func(family) uint8 { return n } }

var (
	tcp     = protocol{"tcp", fixedProto(protoTCP), false}
	udp     = protocol{"udp", fixedProto(protoUDP), false}
	udpZero = protocol{"udp-checksum-0", fixedProto(protoUDP), true}
	sctp    = protocol{"sctp", fixedProto(protoSCTP), false}
	udpLite = protocol{"udp-lite", fixedProto(protoLite), false}
	// what a container's socket sends: the checksum is left to a device
	sctpZero = protocol{"sctp-checksum-0", fixedProto(protoSCTP), true}
	echo     = protocol{"echo", func(f family) uint8 { return f.icmp }, false}
)

// path answers a path from the first container to the world, for which the wire is not
// yet different: no translation.
func (d *datapath) path(f family, p protocol) path {
	c := path{
		datapath: d, family: f, proto: p.number(f), noChecksum: p.noChecksum,
		inside: at(f.container, 40000), peer: at(f.world, 443),
	}
	if c.proto == f.icmp {
		c.peer = at(f.world, 0)
	}
	c.outside, c.world = c.inside, c.peer
	return c
}

// as answers the path with another address, and port where it is not 0, on the wire.
func (c path) as(a netip.Addr, port uint16) path {
	if port == 0 {
		port = c.inside.Port()
	}
	c.outside = at(a, port)
	return c
}

// sameFrame compares frames byte for byte.
func (d *datapath) sameFrame(want, got []byte) {
	d.Helper()
	if !bytes.Equal(want, got) {
		d.Fatalf("packet differs (-want +got):\n%s", cmp.Diff(describe(want), describe(got)))
	}
}

func (c path) String() string {
	return fmt.Sprintf("%d: %s -> %s <=> %s -> %s", c.proto, c.inside, c.peer, c.outside, c.world)
}
