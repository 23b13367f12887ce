package bpf_test

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"tcnat/bpf"
)

// Bad input. The property that holds for all of it: the packet is passed on as it is, or
// dropped for one reason that is counted. Bytes never change, flows are never made.

// sane runs a frame through a hook and checks the property; it answers what was counted.
func (d *datapath) sane(h hook, frame []byte) counts {
	d.Helper()
	halves := d.halves()
	before := d.counts()
	verdict, out := d.run(h, frame)
	counted := d.counts().since(before)
	switch verdict {
	case unspec:
		if !bytes.Equal(frame, out) {
			d.sameFrame(frame, out)
		}
		if len(counted.drops()) != 0 {
			d.Errorf("%s: passed on, but counted %s", h.program, counted)
		}
	case shot:
		var n uint64
		for _, c := range counted.drops() {
			n += c
		}
		if n != 1 {
			d.Errorf("%s: dropped and counted %q, want one reason", h.program, counted)
		}
	default:
		d.Errorf("%s: verdict %d", h.program, int32(verdict))
	}
	if now := d.halves(); now != halves {
		d.Errorf("%s: made or ended a flow (%d halves, now %d)\n%s", h.program, halves, now, describe(frame))
	}
	return counted
}

func allHooks() []hook { return []hook{fromBridge(), toUplink(), fromUplink(), toBridge()} }

// arrive answers packets that each hook would translate or let pass, all of open flows.
func (c path) arrive() map[string]packet {
	sent, _ := c.out("PA", "some payload")
	wire, seen := c.in("PA", "some payload")
	return map[string]packet{
		bpf.NATProgFromBridge: sent, bpf.NATProgToUplink: sent,
		bpf.NATProgFromUplink: wire, bpf.NATProgToBridge: seen.between(bridgeMAC, containerMAC),
	}
}

// shortest answers how many bytes of an IP packet prog.Run wants at least.
func shortest(f family) int {
	if f.name == "ipv6" {
		return 40
	}
	return 20
}

// A packet of a flow cut at every length; its lengths then say more than there is.
func TestTruncated(t *testing.T) {
	d := load(t, 1024)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, udpLite, sctp, echo} {
			d.each(f.name+"/"+p.name, func(d *datapath) {
				c := translated[0].open(d, f, p)
				for _, h := range allHooks() {
					for _, options := range []bool{false, true} {
						p := c.arrive()[h.program]
						if options {
							p = withOptions(p)
						}
						whole := p.frame()
						for n := ethernetLen + shortest(f); n < len(whole); n++ {
							counted := d.sane(h, whole[:n])
							if h.program != bpf.NATProgFromUplink && counted[bpf.NATCounterDROP_MALFORMED] != 1 {
								d.Fatalf("%s: cut to %d of %d bytes: counted %s, want malformed", h.program, n, len(whole), counted)
							}
						}
					}
				}
			})
		}
	}
}

// ICMP errors of which the quote ends anywhere, the lengths of the outer packet being right.
func TestTruncatedQuotes(t *testing.T) {
	d := load(t, 1024)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, udpLite, sctp, echo} {
			d.each(f.name+"/"+p.name, func(d *datapath) {
				c := translated[0].open(d, f, p)
				m := icmpErrors[f.name][0]
				_, wire := c.out("PA", "x")
				_, seen := c.in("PA", "x")
				wire, seen = withOptions(wire), withOptions(seen)
				ports := wire.headerLen() + 4 // enough of TCP and UDP; an echo's id takes 6
				if c.proto == c.icmp {
					ports = wire.headerLen() + 8
				}
				for n := 1; n < ports; n++ {
					in := c.error(m, c.router, c.outside.Addr(), wire, n).between(gatewayMAC, uplinkMAC)
					d.sane(fromUplink(), in.frame())
					out := c.error(m, c.inside.Addr(), c.peer.Addr(), seen, n)
					d.sane(toUplink(), out.frame())
				}
				for n := ports; n <= len(wire.ip()); n++ {
					in := c.error(m, c.router, c.outside.Addr(), wire, n).between(gatewayMAC, uplinkMAC)
					sent, _ := c.out("PA", "x")
					after := c.error(m, c.router, c.inside.Addr(), withOptions(sent), n).between(gatewayMAC, uplinkMAC)
					keepHalfChecksum(in, &after)
					c.passes(fromUplink(), in, after)
				}
			})
		}
	}
}

// damage is one way to spoil a good packet.
type damage struct {
	name    string
	family  string // "": both
	proto   string // "": all
	spoil   func(ip []byte)
	reason  bpf.NATCounter // on the bridge side
	inside  bool           // the uplink's ingress drops it, too
	payload int            // bytes; 0: 80
}

const (
	malformed = bpf.NATCounterDROP_MALFORMED
	mapped    = bpf.NATCounterDROP_V4MAPPED
)

func set(offset int, value ...byte) func([]byte) {
	return func(ip []byte) { copy(ip[offset:], value) }
}

var damages = []damage{
	{name: "ihl-0", family: "ipv4", spoil: set(0, 0x40), reason: malformed},
	{name: "ihl-4", family: "ipv4", spoil: set(0, 0x44), reason: malformed},
	{name: "ihl-15", family: "ipv4", spoil: set(0, 0x4f), reason: malformed, payload: 20},
	{name: "version-0", spoil: set(0, 0x05), reason: malformed},
	{name: "version-6-in-ipv4", family: "ipv4", spoil: set(0, 0x65), reason: malformed},
	{name: "version-4-in-ipv6", family: "ipv6", spoil: set(0, 0x45), reason: malformed},
	{name: "total-length-0", family: "ipv4", spoil: set(2, 0, 0), reason: malformed},
	{name: "total-length-19", family: "ipv4", spoil: set(2, 0, 19), reason: malformed},
	{name: "total-length-of-header", family: "ipv4", spoil: set(2, 0, 20), reason: malformed},
	{name: "total-length-too-long", family: "ipv4", spoil: func(ip []byte) {
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+1))
	}, reason: malformed},
	{name: "total-length-65535", family: "ipv4", spoil: set(2, 0xff, 0xff), reason: malformed},
	{name: "payload-length-too-long", family: "ipv6", spoil: func(ip []byte) {
		binary.BigEndian.PutUint16(ip[4:], uint16(len(ip)-40+1))
	}, reason: malformed},
	{name: "payload-length-65535", family: "ipv6", spoil: set(4, 0xff, 0xff), reason: malformed},
	{name: "payload-length-3", family: "ipv6", spoil: set(4, 0, 3), reason: malformed},
	{name: "v4-mapped-source", family: "ipv6", spoil: set(8, mappedBytes...), reason: mapped, inside: true},
	{name: "v4-mapped-destination", family: "ipv6", spoil: set(24, mappedBytes...), reason: mapped, inside: true},
	{name: "data-offset-4", family: "ipv4", proto: "tcp", spoil: set(32, 0x40), reason: malformed},
	{name: "data-offset-15", family: "ipv4", proto: "tcp", spoil: set(32, 0xf0), reason: malformed, payload: 39},
	{name: "data-offset-4", family: "ipv6", proto: "tcp", spoil: set(52, 0x40), reason: malformed},
	{name: "data-offset-15", family: "ipv6", proto: "tcp", spoil: set(52, 0xf0), reason: malformed, payload: 39},
	{name: "endless-extensions", family: "ipv6", spoil: func(ip []byte) {
		ip[6] = nextDestination
		for i := 40; i+8 <= len(ip); i += 8 {
			ip[i], ip[i+1] = nextDestination, 0
		}
	}, reason: malformed},
	{name: "extension-beyond-end", family: "ipv6", spoil: func(ip []byte) {
		ip[6], ip[40], ip[41] = nextDestination, protoTCP, 0xff
	}, reason: malformed},
	{name: "segments-left", family: "ipv6", spoil: func(ip []byte) {
		ip[6], ip[40], ip[41], ip[42], ip[43] = nextRouting, protoTCP, 0, 0, 1
	}, reason: malformed},
}

var mappedBytes = []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 198, 51, 100, 9}

func TestMalformed(t *testing.T) {
	d := load(t, 1024)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, udpLite, sctp, echo} {
			d.each(f.name+"/"+p.name, func(d *datapath) {
				c := translated[0].open(d, f, p)
				for _, bad := range damages {
					if bad.family != "" && bad.family != f.name || bad.proto != "" && bad.proto != p.name {
						continue
					}
					for _, h := range allHooks() {
						c.group(bad.name+"/"+h.program, func(c path) {
							in := c.arrive()[h.program]
							in.payload = make([]byte, cmp.Or(bad.payload, 80))
							frame := in.frame()
							bad.spoil(frame[ethernetLen:])
							counted := c.sane(h, frame)
							want := counts{bad.reason: 1}
							if h.program == bpf.NATProgFromUplink && !bad.inside {
								want = counts{}
							}
							if got := counted.drops(); fmt.Sprint(got) != fmt.Sprint(want) {
								c.Errorf("counted %s, want %s", got, want)
							}
						})
					}
				}
			})
		}
	}
}

// IPv4 options and IPv6 extension headers do not keep a packet from being translated.
func TestOptions(t *testing.T) {
	d := load(t, 1024)
	chains := [][]extension{
		{{nextHopByHop, []byte{0, 1, 4, 0, 0, 0, 0}}},
		{{nextDestination, []byte{0, 1, 4, 0, 0, 0, 0}}, {nextRouting, []byte{0, 4, 0, 0, 0, 0, 0}}},
		{{nextHopByHop, []byte{0, 1, 4, 0, 0, 0, 0}}, {nextDestination, []byte{0, 1, 4, 0, 0, 0, 0}},
			{nextRouting, []byte{0, 4, 0, 0, 0, 0, 0}}, {nextDestination, bytes.Repeat([]byte{1, 1, 0, 0, 0, 0, 0, 0}, 2)[1:]}},
		{{nextFragment, []byte{0, 0, 0, 0, 0, 0, 9}}}, // an atomic fragment (RFC 6946)
	}
	options := [][]byte{{1, 1, 1, 1}, {7, 7, 4, 0, 0, 0, 0, 1}, append([]byte{7, 39, 4}, append(make([]byte, 36), 0)...)}
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, udpLite, sctp, echo} {
			for i := range max(len(chains), len(options)) {
				if f.name == "ipv4" && i >= len(options) || f.name == "ipv6" && i >= len(chains) {
					continue
				}
				d.each(fmt.Sprintf("%s/%s/%d", f.name, p.name, i), func(d *datapath) {
					d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, masquerade: true}}})
					c := d.path(f, p).as(f.uplink, 0)
					if f.name == "ipv4" {
						c.options = options[i]
					} else {
						c.extensions = chains[i]
					}
					c.live(false, c.flow(false, bpf.NATTranslationTRANSLATION_SNAT, snatID(0)))
				})
			}
		}
	}
}

// Padding behind the IP packet, as short Ethernet frames have it, is not the packet's.
func TestPadding(t *testing.T) {
	d := load(t, 1024)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			c := translated[0].open(d, f, udp)
			pad := func(p packet) []byte { return append(p.frame(), make([]byte, 18)...) }
			sent, wire := c.out("", "")
			c.passesFrame(toUplink(), pad(sent), pad(wire))
			back, seen := c.in("", "")
			c.passesFrame(fromUplink(), pad(back), pad(seen))
		})
	}
}

// prefixOf answers the prefix that holds one address alone.
func prefixOf(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
