package lab

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Packet is an IP packet as seen on a device. Fields that a packet does not have are
// zero: a frame that is not IP has no addresses, a fragment behind the first no ports.
type Packet struct {
	// Outgoing: the device sends it; else the device received it.
	Outgoing bool
	// Src, Dst are the addresses, SrcPort and DstPort the ports of TCP and UDP.
	Src, Dst         netip.Addr
	SrcPort, DstPort uint16
	// Protocol is the IP protocol number (IPv6: of the header behind the fixed one).
	Protocol uint8
	// TTL is the TTL or hop limit.
	TTL uint8
	// Fragment tells whether it is a part of a packet.
	Fragment bool
	// Length is that of the IP packet on the wire, in bytes.
	Length int
	// IP is the packet from its IP header on, as much of it as was captured, Payload
	// what is behind the IP header.
	IP, Payload []byte
}

// String prints addresses, protocol and length.
func (p Packet) String() string {
	return fmt.Sprintf("%s > %s proto %d len %d",
		netip.AddrPortFrom(p.Src, p.SrcPort), netip.AddrPortFrom(p.Dst, p.DstPort), p.Protocol, p.Length)
}

// parseIP reads the headers of an IP packet that may be cut short.
func parseIP(ip []byte) Packet {
	p := Packet{IP: ip, Length: len(ip)}
	if len(ip) == 0 {
		return p
	}
	switch ip[0] >> 4 {
	case 4:
		header := int(ip[0]&15) * 4
		if header < 20 || len(ip) < header {
			return p
		}
		p.Src, _ = netip.AddrFromSlice(ip[12:16])
		p.Dst, _ = netip.AddrFromSlice(ip[16:20])
		p.Protocol, p.TTL = ip[9], ip[8]
		fragment := binary.BigEndian.Uint16(ip[6:])
		p.Fragment = fragment&0x3fff != 0 // more to come, or an offset
		p.Payload = ip[header:]
		if fragment&0x1fff != 0 {
			return p
		}
	case 6:
		if len(ip) < 40 {
			return p
		}
		p.Src, _ = netip.AddrFromSlice(ip[8:24])
		p.Dst, _ = netip.AddrFromSlice(ip[24:40])
		p.Protocol, p.TTL = ip[6], ip[7]
		p.Fragment = p.Protocol == unix.IPPROTO_FRAGMENT
		p.Payload = ip[40:]
	}
	if (p.Protocol == unix.IPPROTO_TCP || p.Protocol == unix.IPPROTO_UDP) && len(p.Payload) >= 4 {
		p.SrcPort = binary.BigEndian.Uint16(p.Payload)
		p.DstPort = binary.BigEndian.Uint16(p.Payload[2:])
	}
	return p
}
