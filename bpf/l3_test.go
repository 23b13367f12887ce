package bpf_test

import (
	"testing"

	"github.com/cilium/ebpf/asm"

	"tcnat/bpf"
)

// Devices without an Ethernet header (tun, wireguard, ppp) have programs of their own.
// prog.Run always takes the first 14 bytes for an Ethernet header and reads the protocol
// from the last two of them. In a packet that begins with its IP header these belong to
// the source address, so sources are chosen to say what they are: 8.0.0.0/16 has 0x0800
// there, 2001:db8:86dd::/48 has 0x86dd.
var l3Families = []family{
	func(f family) family {
		f.container, f.subnet, f.world = ip("8.0.17.2"), cidr("8.0.17.0/24"), ip("8.0.99.9")
		return f
	}(families[0]),
	func(f family) family {
		f.container, f.subnet, f.world = ip("2001:db8:86dd:17::2"), cidr("2001:db8:86dd:17::/64"), ip("2001:db8:86dd:99::9")
		return f
	}(families[1]),
}

// addressed answers the hook for packets to the host, which a real device without
// Ethernet header says of all it receives.
func (d *datapath) addressed(h hook) hook {
	const packetHost = 0
	return d.after(h, asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, packetHost),
		asm.FnSkbChangeType.Call(),
	})
}

func TestWithoutEthernet(t *testing.T) {
	d := load(t, 64)
	for _, f := range l3Families {
		for _, p := range []protocol{tcp, udp, udpZero, udpLite, sctp, sctpZero, echo} {
			// not with CHECKSUM_COMPLETE: prog.Run would sum from the 14th byte on
			t.Run(f.name+"/"+p.name, func(t *testing.T) {
				sub := *d
				d := &sub
				d.TB = t
				d.reset()
				d.check(d.Subnets.Put(subnetKey(f.subnet), bridgeIf))
				d.setRules(ruleSet{
					snat: []snatRule{{source: f.subnet, first: f.second, last: f.second, ports: portRange{30000, 30009}}},
					dnat: []dnatRule{publish(f, p.number(f), one(3005), one(80))},
				})
				egress, ingress := toUplink(), fromUplink()
				egress.program, ingress.program = bpf.NATProgToUplinkL3, bpf.NATProgFromUplinkL3
				egress, ingress = d.addressed(egress), d.addressed(ingress)

				c := d.path(f, p)
				sent, _ := c.out("S", "a payload that is long enough for prog.Run")
				verdict, out := d.run(egress, sent.ip())
				if verdict != unspec {
					t.Fatalf("verdict %d, counted %s", int32(verdict), d.counts())
				}
				c = c.as(f.second, sourcePort(f, c.proto, append(make([]byte, ethernetLen), out...)))
				_, wire := c.out("S", "a payload that is long enough for prog.Run")
				d.sameBytes(wire.ip(), out)
				back, seen := c.in("SA", "an answer, as long as the question was")
				d.passesBytes(ingress, back.ip(), seen.ip())
				want := c.flow(false, bpf.NATTranslationTRANSLATION_SNAT, snatID(0))
				want.out, want.in = 1, 1
				if p.states() {
					want.outTCP, want.inTCP = sawSYN, sawSYN
				}
				d.checkFlow(want)

				// an error about it
				e := c.error(icmpErrors[f.name][0], f.world, f.second, wire, wire.headerLen()+8)
				d.passesBytes(ingress, e.ip(), c.error(icmpErrors[f.name][0], f.world, f.container, sent, sent.headerLen()+8).ip())
				if c.proto == f.icmp {
					return
				}
				in := d.path(f, p)
				in.inside, in.outside = at(f.container, 80), at(f.uplink, 3005)
				request, asked := in.in("S", "a request of a good length for prog.Run")
				d.passesBytes(ingress, request.ip(), asked.ip())
				answer, told := in.out("SA", "and an answer of a good length as well")
				d.passesBytes(egress, answer.ip(), told.ip())
			})
		}
	}
}

// passesBytes is passesFrame for packets without an Ethernet header.
func (d *datapath) passesBytes(h hook, in, want []byte) {
	d.Helper()
	verdict, out := d.run(h, in)
	if verdict != unspec {
		d.Fatalf("%s: verdict %d, counted %s", h.program, int32(verdict), d.counts())
	}
	d.sameBytes(want, out)
}

func (d *datapath) sameBytes(want, got []byte) {
	d.Helper()
	header := make([]byte, ethernetLen)
	copy(header[12:], []byte{0x08, 0})
	if want[0]>>4 == 6 {
		copy(header[12:], []byte{0x86, 0xdd})
	}
	d.sameFrame(append(header[:ethernetLen:ethernetLen], want...), append(header[:ethernetLen:ethernetLen], got...))
}

// A packet that stands for many (GSO) is translated like one and counts as many.
func TestGSO(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			masquerade(d, f)
			c := d.path(f, tcp).as(f.uplink, 0)
			c.sends("S", "")
			c.receives("SA", "")
			payload := string(make([]byte, 3000))
			sent, wire := c.out("PA", payload)
			h := toUplink()
			h.skb.GSOSize, h.skb.GSOSegs = 1000, 3
			d.passes(h, sent, wire)
			back, seen := c.in("PA", payload)
			h = fromUplink()
			h.skb.GSOSize, h.skb.GSOSegs = 1000, 3
			d.passes(h, back, seen)
			want := c.flow(false, bpf.NATTranslationTRANSLATION_SNAT, snatID(0))
			want.out, want.in, want.outTCP, want.inTCP = 4, 4, sawSYN|sawACK, sawSYN|sawACK
			d.checkFlow(want)
		})
	}
}
