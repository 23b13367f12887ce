package judge

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// pair is an address and port at one end, and what that end takes for its peer's.
type pair struct {
	protocol    uint8
	local, peer netip.AddrPort
}

// endpoint is a peer, whoever it speaks to.
type endpoint struct {
	protocol uint8
	peer     netip.AddrPort
}

// ports knows which of the ports that a world's ends see were chosen by its NAT, and what they
// were before: the class of differences called port choice.
type ports struct {
	pairs     map[pair]uint16
	endpoints map[endpoint]uint16
	latest    map[pair]uint16 // the other way round: the port chosen last
}

func newPorts() ports {
	return ports{map[pair]uint16{}, map[endpoint]uint16{}, map[pair]uint16{}}
}

// learn notes what a packet that was sent has become at the other end.
func (p ports) learn(sent, arrived []byte) {
	from, _, ok := endpoints(sent)
	src, dst, ok2 := endpoints(arrived)
	a, _ := parse(sent)
	b, _ := parse(arrived)
	if !ok || !ok2 || a.protocol != b.protocol || src.Port() == from.Port() {
		return
	}
	if isICMP(a.protocol) {
		if request, _ := isEcho(a.protocol, sent[a.l4]); !request {
			return
		}
		dst = netip.AddrPortFrom(dst.Addr(), 0)
	}
	p.pairs[pair{a.protocol, dst, src}] = from.Port()
	p.endpoints[endpoint{a.protocol, src}] = from.Port()
	p.latest[pair{a.protocol, dst, netip.AddrPortFrom(src.Addr(), from.Port())}] = src.Port()
}

// outdated tells whether a peer's port is one that the NAT had chosen, and not the last one.
func (p ports) outdated(protocol uint8, local, peer netip.AddrPort) bool {
	latest, ok := p.latest[pair{protocol, local, netip.AddrPortFrom(peer.Addr(), p.original(protocol, local, peer))}]
	return ok && latest != peer.Port()
}

func (p ports) original(protocol uint8, local, peer netip.AddrPort) uint16 {
	if port, ok := p.pairs[pair{protocol, local, peer}]; ok {
		return port
	}
	if port, ok := p.endpoints[endpoint{protocol, peer}]; ok {
		return port
	}
	return peer.Port()
}

// normalize gives a packet that arrived the ports that were there before the NAT chose others,
// and adjusts the checksums, so that what was wrong stays wrong. made: by the host itself, which
// chooses an IPv4 id.
func (p ports) normalize(ip []byte, made bool) []byte {
	ip = bytes.Clone(ip)
	h, ok := parse(ip)
	if !ok {
		return ip
	}
	if made && !h.v6 {
		adjustAt(ip, 10, binary.BigEndian.Uint16(ip[4:]), 0)
		ip[4], ip[5] = 0, 0
	}
	if !h.fragment && isICMP(h.protocol) && h.l4+icmpSize < len(ip) && isError(h.protocol, ip[h.l4]) {
		p.restoreQuote(ip, h)
		blankSCTPQuote(ip, h)
	} else if !h.fragment {
		p.restore(ip, h, false)
	}
	unify(ip, h)
	return ip
}

// restore puts the peer's original port into a packet: as its source, or as its destination where
// the packet is a quote of what the end had sent.
func (p ports) restore(ip []byte, h header, quoted bool) (changes []change) {
	src, dst, ok := endpoints(ip)
	if !ok {
		return nil
	}
	at := h.l4
	peer, local := src, dst
	if quoted {
		peer, local, at = dst, src, h.l4+2
	}
	if isICMP(h.protocol) {
		at = h.l4 + 4
		local = netip.AddrPortFrom(local.Addr(), 0)
	}
	original := p.original(h.protocol, local, peer)
	if original == peer.Port() {
		return nil
	}
	if h.protocol == unix.IPPROTO_SCTP {
		return restoreSCTP(ip, h, at, original)
	}
	binary.BigEndian.PutUint16(ip[at:], original)
	changes = append(changes, change{at, peer.Port(), original})
	field := h.l4 + checksumAt(h.protocol)
	if field+2 > len(ip) {
		return changes
	}
	was := binary.BigEndian.Uint16(ip[field:])
	if was == 0 && h.protocol == unix.IPPROTO_UDP {
		return changes
	}
	adjustAt(ip, field, peer.Port(), original)
	if h.protocol == unix.IPPROTO_UDP && binary.BigEndian.Uint16(ip[field:]) == 0 {
		ip[field], ip[field+1] = 0xff, 0xff
	}
	return append(changes, change{field, was, binary.BigEndian.Uint16(ip[field:])})
}

// change is a word of a packet that has become another.
type change struct {
	at       int
	from, to uint16
}

// restoreQuote does the same for what an ICMP error quotes.
func (p ports) restoreQuote(ip []byte, h header) {
	quoted := ip[h.l4+icmpSize:]
	q, ok := parse(quoted)
	if !ok || q.fragment {
		return
	}
	for _, c := range p.restore(quoted, q, true) {
		if c.at%2 == 0 { // else the quote's IP header is of an odd length, which it never is
			adjustAt(ip, h.l4+2, c.from, c.to)
		}
	}
}

func adjustAt(ip []byte, field int, from, to uint16) {
	binary.BigEndian.PutUint16(ip[field:], adjust(binary.BigEndian.Uint16(ip[field:]), from, to))
}

// unify writes the zero of a checksum in one way: 0 and ffff are the same to whoever verifies it,
// and an incremental update may come to either. Not for UDP, where 0 has a meaning.
func unify(ip []byte, h header) {
	fields := []int{}
	if !h.v6 {
		fields = append(fields, 10)
	}
	if at := checksumAt(h.protocol); at >= 0 && h.protocol != unix.IPPROTO_UDP && !h.fragment {
		fields = append(fields, h.l4+at)
	}
	for _, field := range fields {
		if field+2 <= len(ip) && binary.BigEndian.Uint16(ip[field:]) == 0xffff {
			ip[field], ip[field+1] = 0, 0
		}
	}
}

// faults are what no packet may have, whatever the other world says: an inside address outside, or a
// checksum that is wrong though that of the packet sent was right.
func faults(end int, ip, sent []byte) (faults []string) {
	h, ok := parse(ip)
	if !ok {
		return []string{"malformed"}
	}
	if end == outside && (inside(h.src) || inside(h.dst)) {
		faults = append(faults, "an inside address outside")
	}
	was, _ := parse(sent)
	if headerWrong(ip, h) && !headerWrong(sent, was) {
		faults = append(faults, "wrong header checksum")
	}
	if transportWrong(ip, h) && !transportWrong(sent, was) {
		faults = append(faults, fmt.Sprintf("wrong %s checksum", protocolName(h.protocol)))
	}
	return faults
}

func headerWrong(ip []byte, h header) bool {
	return !h.v6 && fold(sumBytes(0, ip[:h.l4])) != 0xffff
}

func transportWrong(ip []byte, h header) bool {
	if h.protocol == unix.IPPROTO_SCTP && !h.fragment {
		return sctpWrong(ip[h.l4:])
	}
	at := checksumAt(h.protocol)
	if at < 0 || h.fragment || h.l4+at+2 > len(ip) {
		return false
	}
	if h.protocol == unix.IPPROTO_UDP && ip[h.l4+at]|ip[h.l4+at+1] == 0 {
		return false // there is none
	}
	src, dst := addresses(ip)
	return transportSum(src, dst, h.protocol, ip[h.l4:]) != 0xffff
}
