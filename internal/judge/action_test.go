package judge

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
)

// tcpAction sends a TCP segment.
type tcpAction struct {
	tcpSegment
	blind bool
}

func (a tcpAction) packet(v *view, s step) []byte {
	to, ok := v.peer(s.flow, s.from, a.blind)
	if !ok {
		return nil
	}
	own := v.own(v.flows[s.flow], s.from)
	return s.shape.build(own.Addr(), to.Addr(), unix.IPPROTO_TCP, a.bytes(own.Port(), to.Port()))
}

func (a tcpAction) String() string {
	return fmt.Sprintf("tcp %s seq %d ack %d, %d bytes", flagNames(a.flags), a.seq, a.ack, len(a.payload))
}

func flagNames(flags uint8) string {
	var b strings.Builder
	for i, name := range "FSRPAUEC" {
		if flags>>i&1 != 0 {
			b.WriteRune(name)
		}
	}
	if b.Len() == 0 {
		return "none"
	}
	return b.String()
}

// udpAction sends a datagram, from another port or address than the flow's where that is not 0.
type udpAction struct {
	payload     []byte
	otherPort   uint16
	otherAddr   int // added to the number of the outside's address
	blind       bool
	toContainer bool // straight to the container's own address
}

func (a udpAction) packet(v *view, s step) []byte {
	to, ok := v.peer(s.flow, s.from, a.blind)
	if !ok {
		return nil
	}
	f := v.flows[s.flow]
	if s.from == without {
		f.outside += a.otherAddr
	}
	own := v.own(f, s.from)
	switch {
	case a.toContainer:
		to = v.own(f, within)
	case s.from == within && a.otherPort != 0:
		to = v.own(f, without) // not the port that the NAT may have given it in this flow
	}
	return s.shape.build(own.Addr(), to.Addr(), unix.IPPROTO_UDP, udpDatagram(own.Port()+a.otherPort, to.Port(), a.payload))
}

func (a udpAction) String() string {
	text := fmt.Sprintf("udp, %d bytes", len(a.payload))
	if a.otherPort != 0 {
		text += fmt.Sprintf(", from port +%d", a.otherPort)
	}
	if a.otherAddr != 0 {
		text += fmt.Sprintf(", from address +%d", a.otherAddr)
	}
	if a.toContainer {
		text += ", to the container's own address"
	}
	return text
}

// echoAction sends an echo request or reply.
type echoAction struct {
	reply    bool
	sequence uint16
	payload  []byte
	blind    bool
}

func (a echoAction) packet(v *view, s step) []byte {
	f := v.flows[s.flow]
	to, ok := v.peer(s.flow, s.from, a.blind)
	if !ok {
		return nil
	}
	kind, id := uint8(echo4), v.own(f, s.from).Port()
	if a.reply {
		kind = echoReply4
	}
	if f.protocol == unix.IPPROTO_ICMPV6 {
		kind = echo6
		if a.reply {
			kind = echoReply6
		}
	}
	if s.from != f.initiator() {
		id = to.Port()
	}
	rest := uint32(id)<<16 | uint32(a.sequence)
	return s.shape.build(v.own(f, s.from).Addr(), to.Addr(), f.protocol, icmpMessage(kind, 0, rest, a.payload))
}

func (a echoAction) String() string {
	kind := "request"
	if a.reply {
		kind = "reply"
	}
	return fmt.Sprintf("echo %s %d, %d bytes", kind, a.sequence, len(a.payload))
}

// messageAction sends an ICMP message that is neither echo nor an error.
type messageAction struct {
	kind, code uint8
	rest       uint32
	payload    []byte
}

func (a messageAction) packet(v *view, s step) []byte {
	to, ok := v.peer(s.flow, s.from, true)
	if !ok {
		return nil
	}
	protocol := uint8(unix.IPPROTO_ICMP)
	if to.Addr().Is6() {
		protocol = unix.IPPROTO_ICMPV6
	}
	return s.shape.build(v.own(v.flows[s.flow], s.from).Addr(), to.Addr(), protocol, icmpMessage(a.kind, a.code, a.rest, a.payload))
}

func (a messageAction) String() string { return fmt.Sprintf("icmp %d/%d", a.kind, a.code) }

// quote says what an ICMP error quotes.
type quote uint8

const (
	quoteHeard   quote = iota // what the sender has received of the flow
	quoteSent                 // what the sender itself has sent
	quoteMangled              // received, with a byte of its IP header changed
	quoteOther                // received, with ports that no flow has
	quoteNoise                // anything
)

// errorAction sends an ICMP error to whom the quoted packet is from.
type errorAction struct {
	kind, code uint8
	rest       uint32
	what       quote
	back       int    // how many packets before the last
	cut        int    // bytes behind the quote's IP header; negative: all of it
	extended   bool   // RFC 4884: 128 bytes of quote, and an extension behind them
	byRouter   bool   // from an address that is not the flow's
	noise      []byte // what is quoted, or where and by what it is mangled
}

func (a errorAction) packet(v *view, s step) []byte {
	f := v.flows[s.flow]
	to, ok := v.peer(s.flow, s.from, true)
	if !ok {
		return nil
	}
	src := v.own(f, s.from).Addr()
	if a.byRouter && s.from == without {
		src = v.addr(routerAddr)
	} else if a.byRouter {
		src = v.world.Containers[(f.container+1)%containers].Addr(v.family)
	}
	quoted := a.quoted(v, s)
	if quoted == nil {
		return nil
	}
	if h, ok := parse(quoted); ok && a.what == quoteHeard {
		to = netip.AddrPortFrom(h.src, 0)
	}
	protocol := uint8(unix.IPPROTO_ICMP)
	if v.family == lab.IPv6 {
		protocol = unix.IPPROTO_ICMPV6
	}
	rest := a.rest
	if a.extended {
		quoted = append(quoted, make([]byte, 128)...)[:128]
		if v.family == lab.IPv6 {
			rest = rest&0x00ffffff | 128/8<<24
		} else {
			rest = rest&0xff00ffff | 128/4<<16
		}
		// one object of class 1 (MPLS): its header, and a label
		object := []byte{0x20, 0, 0, 0, 0, 8, 1, 1, 0, 1, 0x11, 0x40}
		binary.BigEndian.PutUint16(object[2:], ^fold(sumBytes(0, object)))
		quoted = append(quoted, object...)
	}
	return s.shape.build(src, to.Addr(), protocol, icmpMessage(a.kind, a.code, rest, quoted))
}

// quoted is what is quoted, cut.
func (a errorAction) quoted(v *view, s step) []byte {
	if a.what == quoteNoise {
		return a.noise
	}
	// Not of the host's own that it is too big: the host would learn it, for all conversations.
	ip := v.last(s.flow, s.from, a.back, v.family == lab.IPv6 && a.kind == 2 || v.family == lab.IPv4 && a.kind == 3 && a.code == 4)
	if a.what == quoteSent {
		ip = v.sent[speaker{s.flow, s.from}].ip
	}
	if ip == nil {
		return nil
	}
	ip = bytes.Clone(ip)
	h, ok := parse(ip)
	if !ok {
		return nil
	}
	switch a.what {
	case quoteMangled:
		ip[int(a.noise[0])%h.l4] ^= a.noise[1] | 1
	case quoteOther:
		at := h.l4 + int(a.noise[0]&3)
		if isICMP(h.protocol) {
			at = h.l4 + 4 + int(a.noise[0]&1)
		}
		if at >= len(ip) {
			break
		}
		// not those of another flow: which has them is for the NAT to choose, in each world
		for was, flip := ip[at], a.noise[1]|1; ; flip += 2 {
			if ip[at] = was ^ flip; !v.knows(ip) {
				break
			}
		}
	}
	if a.cut >= 0 {
		ip = ip[:min(len(ip), h.l4+a.cut)]
	}
	return ip[:min(len(ip), 1280-ipv6Size-icmpSize-tcpSize*2)]
}

func (a errorAction) String() string {
	what := map[quote]string{
		quoteHeard: "the packet received", quoteSent: "the packet sent", quoteMangled: "the packet received, mangled",
		quoteOther: "the packet received, with other ports", quoteNoise: "noise",
	}[a.what]
	text := fmt.Sprintf("icmp error %d/%d rest %#x, quotes %s", a.kind, a.code, a.rest, what)
	if a.back > 0 {
		text += fmt.Sprintf(" %d before the last", a.back)
	}
	if a.cut >= 0 {
		text += fmt.Sprintf(", cut to %d bytes", a.cut)
	}
	if a.extended {
		text += ", extended"
	}
	if a.byRouter {
		text += ", from another address"
	}
	return text
}

// repeatAction sends the side's last packet of the flow once more.
type repeatAction struct{}

func (repeatAction) packet(v *view, s step) []byte {
	ip := v.sent[speaker{s.flow, s.from}].ip
	if s.shape.fragment == 0 || len(ip) < 20 || ip[0]>>4 != 4 {
		return ip
	}
	// In fragments of another size under the same id the two would be taken for one, which is cut twice.
	ip = bytes.Clone(ip)
	sum := uint32(^binary.BigEndian.Uint16(ip[10:])) + uint32(^binary.BigEndian.Uint16(ip[4:])) + uint32(s.shape.id)
	binary.BigEndian.PutUint16(ip[4:], s.shape.id)
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum))
	return ip
}

func (repeatAction) String() string { return "the same once more" }
