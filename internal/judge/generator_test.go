package judge

import (
	"math/rand/v2"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
)

// features are parts of the generator that can be switched on and off.
type features struct {
	sctp bool // conversations of SCTP alone
}

// generator writes one script.
type generator struct {
	*rand.Rand
	*script
	features
	cuts *rand.Rand // of its own: what a seed has said before fragments came stays so
	port uint16     // the first of the conversation's block
}

// newScript writes the script of one conversation; the same seed and number give the same.
func newScript(seed uint64, number int, on features) *script {
	g := &generator{
		Rand:     rand.New(rand.NewPCG(seed, uint64(number))),
		features: on,
		cuts:     rand.New(rand.NewPCG(^seed, uint64(number))),
		script:   &script{number: number, family: lab.IPv4},
		port:     uint16(firstPort + number%maxTogether*portBlock),
	}
	if g.IntN(2) == 1 {
		g.family = lab.IPv6
	}
	if on.sctp {
		g.sctpKinds()
	} else {
		g.kinds()
	}
	parts := make([][]step, len(g.flows))
	for i := range g.flows {
		parts[i] = g.talk(i)
	}
	g.merge(parts)
	return g.script
}

// kinds draws what kind of conversation it is, each with its weight.
func (g *generator) kinds() {
	g.oneOf([]choice{
		{20, func() { g.outward(unix.IPPROTO_TCP, 1) }},
		{15, func() { g.inward(unix.IPPROTO_TCP, 1) }},
		{15, func() { g.outward(unix.IPPROTO_UDP, 1+g.IntN(3)) }},
		{10, func() { g.inward(unix.IPPROTO_UDP, 1+g.IntN(2)) }},
		{10, func() { g.outward(g.echo(), 1+g.IntN(2)) }},
		{3, func() { g.hostEcho() }},
		{12, func() { g.clash() }},
		{5, func() { g.clashInward() }},
		{10, func() { g.outward(g.protocol(), 1); g.outward(g.protocol(), 1); g.inward(unix.IPPROTO_TCP, g.IntN(2)) }},
	})
}

// choice is one of several, as likely as its weight.
type choice struct {
	weight int
	do     func()
}

func (g *generator) oneOf(choices []choice) {
	total := 0
	for _, c := range choices {
		total += c.weight
	}
	at := g.IntN(total)
	for _, c := range choices {
		if at < c.weight {
			c.do()
			return
		}
		at -= c.weight
	}
}

// percent is true that often.
func (g *generator) percent(n int) bool { return g.IntN(100) < n }

// echo is the family's ICMP.
func (g *generator) echo() uint8 {
	if g.family == lab.IPv6 {
		return unix.IPPROTO_ICMPV6
	}
	return unix.IPPROTO_ICMP
}

func (g *generator) protocol() uint8 {
	return []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP, g.echo()}[g.IntN(3)]
}

// merge interleaves flows at random, each in its own order.
func (g *generator) merge(parts [][]step) {
	left := 0
	for _, part := range parts {
		left += len(part)
	}
	for left > 0 {
		at := g.IntN(left)
		for i := range parts {
			if at < len(parts[i]) {
				g.steps = append(g.steps, parts[i][0])
				parts[i] = parts[i][1:]
				break
			}
			at -= len(parts[i])
		}
		left--
	}
}

// nextPort takes a port of the conversation's block.
func (g *generator) nextPort() uint16 {
	p := g.port
	g.port++
	return p
}

// outward begins flows from one port of a container to several outside endpoints.
func (g *generator) outward(protocol uint8, n int) {
	container, port := g.IntN(containers), g.nextPort()
	if protocol == unix.IPPROTO_TCP && g.percent(3) {
		port = uint16(1 + g.IntN(1023))
	}
	for i := range n {
		f := flow{protocol: protocol, container: container, inside: port, outside: len(g.flows) % 4}
		if !isICMP(protocol) {
			f.outsidePort = g.outsidePort()
		}
		if i > 0 && g.percent(40) && !isICMP(protocol) {
			f.outside = g.flows[len(g.flows)-1].outside // the same address, another port
			f.outsidePort = g.flows[len(g.flows)-1].outsidePort + 1
		}
		g.flows = append(g.flows, f)
	}
}

func (g *generator) outsidePort() uint16 {
	if g.percent(30) {
		return []uint16{53, 80, 123, 443, 500, 5353}[g.IntN(6)]
	}
	return uint16(1024 + g.IntN(60000))
}

// inward begins flows from the outside to published ports.
func (g *generator) inward(protocol uint8, n int) {
	for range n {
		var all []publishedPort
		for _, p := range published() {
			if p.protocol == protocol {
				all = append(all, p)
			}
		}
		p := all[g.IntN(len(all))]
		nth := uint16(g.IntN(int(p.ports)))
		g.flows = append(g.flows, flow{
			protocol: protocol, container: p.container, inside: p.to + nth, inward: true,
			published: p.port + nth, outside: len(g.flows) % 4, outsidePort: g.outsidePort(),
		})
	}
}

// hostEcho lets the outside ping the host itself.
func (g *generator) hostEcho() {
	g.flows = append(g.flows, flow{protocol: g.echo(), inward: true, outsidePort: uint16(g.IntN(65536))})
}

// clash begins flows of two containers, from the same port to the same endpoint: one of them gets
// another port.
func (g *generator) clash() {
	protocol, port, far := g.protocol(), g.nextPort(), g.outsidePort()
	if isICMP(protocol) {
		far = 0
	}
	for c := range 2 {
		g.flows = append(g.flows, flow{protocol: protocol, container: c, inside: port, outsidePort: far})
	}
}

// clashInward lets one port of the outside go to two published ports that lead to one endpoint.
func (g *generator) clashInward() {
	protocol, port, to, container := uint8(unix.IPPROTO_TCP), uint16(3080), uint16(80), 0
	if g.percent(50) {
		protocol, port, to, container = unix.IPPROTO_UDP, 3053, 53, 1
	}
	far := g.outsidePort()
	for i := range uint16(2) {
		g.flows = append(g.flows, flow{
			protocol: protocol, container: container, inside: to, inward: true, published: port + i, outsidePort: far,
		})
	}
}

// talk writes the steps of one flow.
func (g *generator) talk(i int) []step {
	t := &talk{generator: g, flow: g.flows[i], number: i}
	switch {
	case t.flow.protocol == unix.IPPROTO_TCP:
		t.tcp()
	case t.flow.protocol == unix.IPPROTO_UDP:
		t.udp()
	case t.flow.protocol == unix.IPPROTO_SCTP:
		t.sctp()
	default:
		t.echoes()
	}
	return t.steps
}

// shape draws what a packet is like besides what it says.
func (g *generator) shape() shape {
	s := shape{ttl: 64, id: uint16(g.Uint32()), df: g.percent(50), label: g.Uint32() & 0xfffff}
	if g.percent(20) {
		s.tos = uint8(g.Uint32())
	}
	if g.percent(4) {
		s.ttl = uint8(g.IntN(4))
	} else if g.percent(30) {
		s.ttl = uint8(8 + g.IntN(248))
	}
	if g.percent(4) {
		if g.family == lab.IPv4 {
			s.options = g.options()
		} else {
			s.extensions = g.extensions()
		}
	}
	if g.percent(3) {
		s.padding = 1 + g.IntN(40)
	}
	if !g.sctp && g.cuts.IntN(100) < 6 { // its checksum does not follow ports in fragments
		s.fragment, s.df = 8*(3+g.cuts.IntN(20)), false
		if g.cuts.IntN(100) < 40 {
			s.late = 1 + g.cuts.IntN(4) // no more are held
		}
	}
	return s
}

// harm is a shape that may be damaged, too.
func (g *generator) harm() shape {
	s := g.shape()
	switch at := g.IntN(200); {
	case at < 8:
		s.damage = noChecksum
	case at < 12:
		s.damage = badChecksum
	case at < 14:
		s.damage = badHeaderChecksum
	}
	return s
}

// options draws IPv4 options.
func (g *generator) options() []byte {
	switch g.IntN(6) {
	case 0:
		return []byte{1, 1, 1, 0}
	case 1: // router alert
		return []byte{148, 4, 0, 0}
	case 2: // record route, room for two
		return append([]byte{7, 11, 4}, make([]byte, 9)...)
	case 3: // timestamps, no room for one more, which routers count
		return append([]byte{68, 12, 13, 0}, make([]byte, 8)...)
	case 4: // loose source route
		return []byte{131, 7, 8, 9, 9, 9, 9, 0}
	}
	return make([]byte, 4*(1+g.IntN(10))) // ends at once
}

// extensions draws IPv6 extension headers.
func (g *generator) extensions() []extension {
	pad := func(n int) []byte { // PadN over n bytes
		return append([]byte{1, byte(n - 2)}, make([]byte, n-2)...)
	}
	hop := extension{unix.IPPROTO_HOPOPTS, pad(6 + 8*g.IntN(3))}
	destination := extension{unix.IPPROTO_DSTOPTS, pad(6 + 8*g.IntN(3))}
	switch g.IntN(5) {
	case 0:
		return []extension{hop}
	case 1:
		return []extension{destination}
	case 2:
		return []extension{hop, destination}
	case 3: // router alert
		return []extension{{unix.IPPROTO_HOPOPTS, []byte{5, 2, 0, 0, 1, 0}}}
	}
	// an option that nobody knows, to be skipped
	return []extension{{unix.IPPROTO_DSTOPTS, []byte{0x1e, 4, 1, 2, 3, 4}}}
}

func (g *generator) payload(most int) []byte {
	b := make([]byte, g.IntN(most+1))
	for i := range b {
		b[i] = byte(g.Uint32())
	}
	return b
}
