package judge

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

const (
	ipv4Size = 20
	ipv6Size = 40
	tcpSize  = 20
	udpSize  = 8
	icmpSize = 8
)

// Flags of TCP.
const (
	fin = 0x01
	syn = 0x02
	rst = 0x04
	psh = 0x08
	ack = 0x10
	urg = 0x20
)

// header is what an IP packet says of itself, as far as it is there.
type header struct {
	v6       bool
	src, dst netip.Addr
	protocol uint8
	l4       int // offset of the transport header, or of a fragment's header
	last     int // offset of the byte that names the protocol
	fragment bool
}

// parse reads the headers of an IP packet, which may be cut short or be nonsense.
func parse(ip []byte) (h header, ok bool) {
	if len(ip) < ipv4Size {
		return h, false
	}
	switch ip[0] >> 4 {
	case 4:
		h.l4 = int(ip[0]&15) * 4
		h.src, _ = netip.AddrFromSlice(ip[12:16])
		h.dst, _ = netip.AddrFromSlice(ip[16:20])
		h.protocol, h.last = ip[9], 9
		h.fragment = binary.BigEndian.Uint16(ip[6:])&0x3fff != 0
		return h, h.l4 >= ipv4Size && h.l4 <= len(ip)
	case 6:
		if len(ip) < ipv6Size {
			return h, false
		}
		h.v6 = true
		h.src, _ = netip.AddrFromSlice(ip[8:24])
		h.dst, _ = netip.AddrFromSlice(ip[24:40])
		h.protocol, h.last, h.l4 = ip[6], 6, ipv6Size
		for {
			switch h.protocol {
			case unix.IPPROTO_HOPOPTS, unix.IPPROTO_DSTOPTS, unix.IPPROTO_ROUTING:
			case unix.IPPROTO_FRAGMENT:
				h.fragment = true
				return h, h.l4+fragmentHeader <= len(ip)
			default:
				return h, h.l4 <= len(ip)
			}
			if h.l4+8 > len(ip) {
				return h, false
			}
			h.protocol, h.last, h.l4 = ip[h.l4], h.l4, h.l4+8*(int(ip[h.l4+1])+1)
		}
	}
	return h, false
}

// addresses returns the bytes of the source and of the destination.
func addresses(ip []byte) (src, dst []byte) {
	if ip[0]>>4 == 6 {
		return ip[8:24], ip[24:40]
	}
	return ip[12:16], ip[16:20]
}

// isICMP tells whether the protocol is ICMP, of either family.
func isICMP(protocol uint8) bool {
	return protocol == unix.IPPROTO_ICMP || protocol == unix.IPPROTO_ICMPV6
}

// isError tells whether a message quotes a packet.
func isError(protocol, kind uint8) bool {
	if protocol == unix.IPPROTO_ICMPV6 {
		return kind < 128
	}
	return protocol == unix.IPPROTO_ICMP &&
		(kind == 3 || kind == 4 || kind == 5 || kind == 11 || kind == 12)
}

// Types of echo.
const (
	echoReply4, echo4 = 0, 8
	echo6, echoReply6 = 128, 129
)

func isEcho(protocol, kind uint8) (request, reply bool) {
	if protocol == unix.IPPROTO_ICMPV6 {
		return kind == echo6, kind == echoReply6
	}
	return kind == echo4, kind == echoReply4
}

// damage is what is wrong with a packet.
type damage uint8

const (
	sound             damage = iota
	noChecksum               // of UDP: 0
	badChecksum              // of the transport header
	badHeaderChecksum        // of IPv4
)

// wrongBy is what is added to what a bad checksum covers.
const wrongBy = 0x5a5a

// shape is what a packet has besides its transport header.
type shape struct {
	ttl, tos   uint8
	id         uint16
	df         bool
	label      uint32 // of IPv6
	options    []byte // of IPv4, four at a time
	extensions []extension
	padding    int // bytes on the wire behind the packet
	fragment   int // cut into fragments with so many bytes, a multiple of 8; 0: not
	late       int // fragments that come before the first
	damage     damage
}

// extension is a header of IPv6; its body is what stands behind the length.
type extension struct {
	kind uint8
	body []byte
}

// build makes the IP packet around a transport segment whose checksum is zero.
func (s shape) build(src, dst netip.Addr, protocol uint8, segment []byte) []byte {
	var ip []byte
	if src.Is6() {
		ip = make([]byte, ipv6Size)
		binary.BigEndian.PutUint32(ip, 6<<28|uint32(s.tos)<<20|s.label&0xfffff)
		ip[7] = s.ttl
		copy(ip[8:], src.AsSlice())
		copy(ip[24:], dst.AsSlice())
		next := 6 // where the protocol of the next header is written
		for _, e := range s.extensions {
			ip[next], next = e.kind, len(ip)
			ip = append(append(ip, 0, byte((len(e.body)+2)/8-1)), e.body...)
		}
		ip[next] = protocol
		binary.BigEndian.PutUint16(ip[4:], uint16(len(ip)-ipv6Size+len(segment)))
	} else {
		at := ipv4Size + len(s.options)
		ip = make([]byte, at)
		ip[0], ip[1] = 4<<4|byte(at/4), s.tos
		binary.BigEndian.PutUint16(ip[2:], uint16(at+len(segment)))
		binary.BigEndian.PutUint16(ip[4:], s.id)
		if s.df {
			ip[6] = 0x40
		}
		ip[8], ip[9] = s.ttl, protocol
		copy(ip[12:], src.AsSlice())
		copy(ip[16:], dst.AsSlice())
		copy(ip[ipv4Size:], s.options)
		sum := ^fold(sumBytes(0, ip))
		if s.damage == badHeaderChecksum {
			sum ^= 0x0100
		}
		binary.BigEndian.PutUint16(ip[10:], sum)
	}
	at := len(ip)
	ip = append(ip, segment...)
	if s.damage == noChecksum && protocol == unix.IPPROTO_UDP {
		return ip
	}
	from, to := addresses(ip)
	setChecksum(from, to, protocol, ip[at:])
	if field := checksumAt(protocol); s.damage == badChecksum && field >= 0 && at+field+2 <= len(ip) {
		// as wrong as it is, whatever ports the NAT has chosen
		sum := binary.BigEndian.Uint16(ip[at+field:])
		adjustAt(ip, at+field, 0, wrongBy)
		if protocol == unix.IPPROTO_UDP && binary.BigEndian.Uint16(ip[at+field:]) == 0 {
			binary.BigEndian.PutUint16(ip[at+field:], sum-1)
		}
	}
	return ip
}

// tcpSegment is a TCP segment without its checksum; options are a multiple of four long.
type tcpSegment struct {
	flags    uint8
	seq, ack uint32
	window   uint16
	options  []byte
	payload  []byte
}

func (t tcpSegment) bytes(sport, dport uint16) []byte {
	b := make([]byte, tcpSize, tcpSize+len(t.options)+len(t.payload))
	binary.BigEndian.PutUint16(b, sport)
	binary.BigEndian.PutUint16(b[2:], dport)
	binary.BigEndian.PutUint32(b[4:], t.seq)
	binary.BigEndian.PutUint32(b[8:], t.ack)
	b[12], b[13] = byte(tcpSize+len(t.options))/4<<4, t.flags
	binary.BigEndian.PutUint16(b[14:], t.window)
	return append(append(b, t.options...), t.payload...)
}

func udpDatagram(sport, dport uint16, payload []byte) []byte {
	b := make([]byte, udpSize, udpSize+len(payload))
	binary.BigEndian.PutUint16(b, sport)
	binary.BigEndian.PutUint16(b[2:], dport)
	binary.BigEndian.PutUint16(b[4:], uint16(udpSize+len(payload)))
	return append(b, payload...)
}

// icmpMessage is a message whose checksum is zero; rest is what its second word says.
func icmpMessage(kind, code uint8, rest uint32, payload []byte) []byte {
	b := make([]byte, icmpSize, icmpSize+len(payload))
	b[0], b[1] = kind, code
	binary.BigEndian.PutUint32(b[4:], rest)
	return append(b, payload...)
}
