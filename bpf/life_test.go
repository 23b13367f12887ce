package bpf_test

import (
	"net/netip"
	"testing"

	"tcnat/bpf"
)

const (
	sawSYN = bpf.NATTcpSeenTCP_SEEN_SYN
	sawFIN = bpf.NATTcpSeenTCP_SEEN_FIN
	sawRST = bpf.NATTcpSeenTCP_SEEN_RST
	sawACK = bpf.NATTcpSeenTCP_SEEN_ACK // a segment without SYN
)

// outgoing is a way in which a container's conversation with the world is translated.
type outgoing struct {
	name        string
	rule        func(f family) []snatRule
	configure   func(*bpf.NATConfig)
	translation bpf.NATTranslation
	ruled       bool // the flow names the rule
	addresses   func(f family) []netip.Addr
	ports       portRange // zero: the port is kept
}

var outgoings = []outgoing{
	{
		name:        "snat",
		rule:        func(f family) []snatRule { return []snatRule{{source: f.subnet, first: f.second, last: f.second}} },
		translation: bpf.NATTranslationTRANSLATION_SNAT, ruled: true,
		addresses: func(f family) []netip.Addr { return []netip.Addr{f.second} },
	},
	{
		name: "snat-range",
		rule: func(f family) []snatRule {
			return []snatRule{{source: f.subnet, first: f.poolFirst, last: f.poolLast, ports: portRange{20000, 20099}}}
		},
		translation: bpf.NATTranslationTRANSLATION_SNAT, ruled: true,
		addresses: func(f family) []netip.Addr {
			var all []netip.Addr
			for a := f.poolFirst; a.Compare(f.poolLast) <= 0; a = a.Next() {
				all = append(all, a)
			}
			return all
		},
		ports: portRange{20000, 20099},
	},
	{
		name:        "masquerade",
		rule:        func(f family) []snatRule { return []snatRule{{source: f.subnet, masquerade: true}} },
		translation: bpf.NATTranslationTRANSLATION_SNAT, ruled: true,
		addresses: func(f family) []netip.Addr { return []netip.Addr{f.uplink} },
	},
	{
		name: "masquerade-this-uplink", // before the rule for every uplink
		rule: func(f family) []snatRule {
			return []snatRule{
				{source: f.subnet, uplink: uplinkIf, masquerade: true}, {source: f.subnet, first: f.second, last: f.second},
				{source: f.subnet, uplink: eth1If, first: f.poolFirst, last: f.poolFirst},
			}
		},
		translation: bpf.NATTranslationTRANSLATION_SNAT, ruled: true,
		addresses: func(f family) []netip.Addr { return []netip.Addr{f.uplink} },
	},
	{
		name: "longest-source",
		rule: func(f family) []snatRule {
			return []snatRule{
				{source: prefixOf(f.container), masquerade: true},
				{source: f.subnet, first: f.second, last: f.second},
			}
		},
		translation: bpf.NATTranslationTRANSLATION_SNAT, ruled: true,
		addresses: func(f family) []netip.Addr { return []netip.Addr{f.uplink} },
	},
	{
		name: "except",
		rule: func(f family) []snatRule {
			return []snatRule{{source: f.subnet, masquerade: true, except: []netip.Prefix{prefixOf(f.world)}}}
		},
		translation: bpf.NATTranslationTRANSLATION_IDENTITY,
		addresses:   func(f family) []netip.Addr { return []netip.Addr{f.container} },
	},
	{
		name:        "routed",
		rule:        func(family) []snatRule { return nil },
		configure:   func(c *bpf.NATConfig) { c.Flags |= bpf.NATConfigFlagCONFIG_ROUTED },
		translation: bpf.NATTranslationTRANSLATION_IDENTITY,
		addresses:   func(f family) []netip.Addr { return []netip.Addr{f.container} },
	},
}

// choose sends the path's first packet out to learn which of these addresses and which
// port it gets, then forgets the flow: the same secret makes the same choice again.
func (c path) choose(addresses []netip.Addr, ports portRange) path {
	c.Helper()
	sent, _ := c.out("S", "x")
	verdict, out := c.run(toUplink(), sent.forwarded().frame())
	if verdict != unspec {
		c.Fatalf("first packet: verdict %d, counted: %s", int32(verdict), c.counts())
	}
	port := sourcePort(c.family, c.proto, out)
	if c.proto == c.icmp { // an echo's id is no port
		ports = portRange{}
	}
	if first := ports.first; first != 0 && (port < first || port > ports.last) {
		c.Fatalf("got port %d outside of %d-%d", port, ports.first, ports.last)
	}
	if ports.first == 0 && port != c.inside.Port() {
		c.Fatalf("port %d became %d though nobody has it", c.inside.Port(), port)
	}
	for _, a := range addresses {
		if sourceAddr(c.family, out) == a {
			c.forget()
			return c.as(a, port)
		}
	}
	c.Fatalf("got address %s, want one of %v", sourceAddr(c.family, out), addresses)
	return c
}

func sourceAddr(f family, frame []byte) netip.Addr {
	at, n := ethernetLen+12, 4
	if f.name == "ipv6" {
		at, n = ethernetLen+8, 16
	}
	a, _ := netip.AddrFromSlice(frame[at : at+n])
	return a
}

func TestOutgoing(t *testing.T) {
	d := load(t, 1024)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, udpZero, udpLite, sctp, sctpZero, echo} {
			for _, o := range outgoings {
				d.each(f.name+"/"+p.name+"/"+o.name, func(d *datapath) {
					d.configure(o.configure)
					d.setRules(ruleSet{snat: o.rule(f)})
					c := d.path(f, p).choose(o.addresses(f), o.ports)
					rule := uint32(0)
					if o.ruled {
						rule = snatID(0)
					}
					c.live(false, c.flow(false, o.translation, rule))
				})
			}
		}
	}
}

// live carries a whole conversation over the path and checks the flow on the way.
func (c path) live(inbound bool, want wantFlow) {
	c.Helper()
	asks, answers := c.sends, c.receives
	if inbound {
		asks, answers = answers, asks
	}
	if c.proto != protoTCP && c.proto != protoSCTP {
		asks("", "question")
		want.out = 1
		c.checkFlow(want)
		answers("", "the answer, of another length")
		asks("", "q")
		answers("", "")
		want.out, want.in = 2, 2
		c.checkFlow(want)
		if n := c.halves(); n != 2 {
			c.Errorf("%d halves, want 2:\n%s", n, c.allFlows())
		}
		return
	}
	asks("S", "")
	want.out, want.outTCP = 1, sawSYN
	c.checkFlow(want)
	answers("SA", "")
	want.in, want.inTCP = 1, sawSYN
	c.checkFlow(want)
	asks("A", "")
	asks("PA", "GET / HTTP/1.0\r\n\r\n")
	answers("PA", "HTTP/1.0 200 OK\r\n\r\nodd")
	answers("FA", "")
	want.out, want.in, want.outTCP, want.inTCP = 3, 3, sawSYN|sawACK, sawSYN|sawACK|sawFIN
	c.checkFlow(want)
	asks("FA", "")
	answers("A", "")
	want.out, want.in, want.outTCP = 4, 4, sawSYN|sawACK|sawFIN
	c.checkFlow(want)
	if n := c.halves(); n != 2 {
		c.Errorf("%d halves, want 2:\n%s", n, c.allFlows())
	}
}

// incoming is a way in which the world reaches a container.
type incoming struct {
	name      string
	rule      func(f family, proto uint8) []dnatRule
	published uint16 // the port that the world uses
	port      uint16 // the container's
	any       bool   // through the host's second address, too
	direct    bool   // to the container's own address
	matching  int    // index of the rule that must match
	configure func(*bpf.NATConfig)
}

// publish answers a rule that any address of the host forwards to the container.
func publish(f family, proto uint8, ports, toPorts portRange) dnatRule {
	return dnatRule{proto: proto, ports: ports, to: f.container, toPorts: toPorts}
}

func one(port uint16) portRange { return portRange{port, port} }

var incomings = []incoming{
	{
		name: "same-port", published: 3005, port: 3005, any: true,
		rule: func(f family, proto uint8) []dnatRule { return []dnatRule{publish(f, proto, one(3005), one(3005))} },
	},
	{
		name: "kept-port", published: 3005, port: 3005, any: true,
		rule: func(f family, proto uint8) []dnatRule { return []dnatRule{publish(f, proto, one(3005), portRange{})} },
	},
	{
		name: "other-port", published: 3005, port: 80, any: true,
		rule: func(f family, proto uint8) []dnatRule { return []dnatRule{publish(f, proto, one(3005), one(80))} },
	},
	{
		name: "range-kept", published: 8999, port: 8999, any: true,
		rule: func(f family, proto uint8) []dnatRule {
			return []dnatRule{publish(f, proto, portRange{8000, 8999}, portRange{})}
		},
	},
	{
		name: "range-shifted-first", published: 8001, port: 9101, any: true,
		rule: func(f family, proto uint8) []dnatRule {
			return []dnatRule{publish(f, proto, portRange{8001, 8014}, portRange{9101, 9114})}
		},
	},
	{
		name: "range-shifted-last", published: 8014, port: 9114, any: true,
		rule: func(f family, proto uint8) []dnatRule {
			return []dnatRule{publish(f, proto, portRange{8001, 8014}, portRange{9101, 9114})}
		},
	},
	{
		name: "range-to-one-port", published: 8010, port: 80, any: true,
		rule: func(f family, proto uint8) []dnatRule {
			return []dnatRule{publish(f, proto, portRange{8001, 8014}, one(80))}
		},
	},
	{
		name: "specific-address", published: 3005, port: 80,
		rule: func(f family, proto uint8) []dnatRule {
			r := publish(f, proto, one(3005), one(80))
			r.destination = f.uplink
			return []dnatRule{r}
		},
	},
	{
		name: "specific-before-any", published: 3005, port: 80, matching: 1,
		rule: func(f family, proto uint8) []dnatRule {
			r := publish(f, proto, portRange{3000, 3010}, one(80))
			r.destination = f.uplink
			return []dnatRule{publish(f, proto, one(3005), one(81)), r}
		},
	},
	{
		name: "this-device-before-any", published: 3005, port: 80, matching: 1, any: true,
		rule: func(f family, proto uint8) []dnatRule {
			r := publish(f, proto, one(3005), one(80))
			r.ingress = uplinkIf
			foreign := publish(f, proto, one(3005), one(82))
			foreign.ingress = eth1If
			return []dnatRule{publish(f, proto, one(3005), one(81)), r, foreign}
		},
	},
	{
		name: "allowed-source", published: 3005, port: 80, any: true,
		rule: func(f family, proto uint8) []dnatRule {
			r := publish(f, proto, one(3005), one(80))
			r.allow = []netip.Prefix{netip.PrefixFrom(f.world, f.world.BitLen()-8).Masked()}
			return []dnatRule{r}
		},
	},
	{
		name: "direct", published: 80, port: 80, direct: true,
		rule:      func(family, uint8) []dnatRule { return nil },
		configure: func(c *bpf.NATConfig) { c.Flags |= bpf.NATConfigFlagCONFIG_ALLOW_DIRECT },
	},
}

func TestIncoming(t *testing.T) {
	d := load(t, 1024)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, udpZero, sctp, sctpZero} {
			for _, in := range incomings {
				d.each(f.name+"/"+p.name+"/"+in.name, func(d *datapath) {
					d.configure(in.configure)
					d.setRules(ruleSet{dnat: in.rule(f, p.number(f))})
					addresses := []netip.Addr{f.uplink}
					if in.any {
						addresses = append(addresses, f.second)
					}
					translation, rule := bpf.NATTranslationTRANSLATION_DNAT, dnatID(in.matching)
					if in.direct {
						addresses, translation, rule = []netip.Addr{f.container}, bpf.NATTranslationTRANSLATION_IDENTITY, 0
					}
					for i, a := range addresses {
						c := d.path(f, p)
						c.inside = at(f.container, in.port)
						c.peer = at(f.world, 50000+uint16(i))
						c.outside, c.world = at(a, in.published), c.peer
						d.forget()
						c.live(true, c.flow(true, translation, rule))
					}
				})
			}
		}
	}
}
