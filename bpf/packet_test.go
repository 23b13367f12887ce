package bpf_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
	protoSCTP   = 132
	protoLite   = 136

	nextHopByHop    = 0
	nextRouting     = 43
	nextFragment    = 44
	nextAH          = 51
	nextDestination = 60

	ethernetLen = 14
)

// packet is an IP packet in an Ethernet frame, by what a test wants to say of it.
// frame makes the bytes, with every length and checksum right.
type packet struct {
	srcMAC, dstMAC net.HardwareAddr
	// src and dst hold the ports too. An ICMP echo request has its id as the source's
	// port, an echo reply as the destination's, as in the flow's tuples.
	src, dst netip.AddrPort
	proto    uint8
	ttl      uint8 // 0: 64

	tcp        string // letters of SAFRP; of SCTP the chunk that means the same, or "chunks"
	noChecksum bool   // UDP or SCTP checksum 0
	sctpTag    uint32 // with the flags "chunks"

	icmpType, icmpCode uint8
	icmpRest           uint32  // second word of the ICMP header, when it is not an echo
	quote              *packet // what an ICMP error quotes
	quoteLen           int     // bytes of it, from its IP header on; 0: all
	quoteTail          []byte  // what the quote's last bytes are instead

	options    []byte      // of IPv4, a multiple of four
	extensions []extension // of IPv6
	fragment   int         // offset in bytes of a later fragment; negative: the first one
	payload    []byte
}

// extension is an IPv6 extension header; body is all of it but the next-header byte.
type extension struct {
	number uint8
	body   []byte
}

func (p packet) v6() bool { return p.src.Addr().Is6() }

// from, to and with answer copies that differ in one thing.
func (p packet) from(a netip.AddrPort) packet     { p.src = a; return p }
func (p packet) to(a netip.AddrPort) packet       { p.dst = a; return p }
func (p packet) with(change func(*packet)) packet { change(&p); return p }
func (p packet) between(s, d macs) packet         { p.srcMAC, p.dstMAC = s.mac, d.mac; return p }
func (p packet) forwarded() packet                { p.ttl = p.hops() - 1; return p }
func (p packet) addrs(s, d netip.AddrPort) packet { p.src, p.dst = s, d; return p }
func (p packet) hops() uint8 {
	if p.ttl == 0 {
		return 64
	}
	return p.ttl
}

// macs is a station on a link.
type macs struct{ mac net.HardwareAddr }

func (p packet) echoRequest() bool {
	return p.proto == protoICMP && p.icmpType == 8 || p.proto == protoICMPv6 && p.icmpType == 128
}

func (p packet) echo() bool {
	return p.echoRequest() || p.proto == protoICMP && p.icmpType == 0 || p.proto == protoICMPv6 && p.icmpType == 129
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// frame answers the packet with its Ethernet header.
func (p packet) frame() []byte {
	kind := layers.EthernetTypeIPv4
	if p.v6() {
		kind = layers.EthernetTypeIPv6
	}
	return ethernet(p.srcMAC, p.dstMAC, kind, p.ip())
}

// ethernet answers a frame, without the padding that gopacket would give a short one.
func ethernet(src, dst net.HardwareAddr, kind layers.EthernetType, payload []byte) []byte {
	frame := make([]byte, ethernetLen, ethernetLen+len(payload))
	copy(frame, dst)
	copy(frame[6:], src)
	binary.BigEndian.PutUint16(frame[12:], uint16(kind))
	return append(frame, payload...)
}

// ip answers the packet from its IP header on.
func (p packet) ip() []byte {
	if p.v6() {
		return p.ipv6()
	}
	ip := &layers.IPv4{
		Version: 4, TTL: p.hops(), Id: 0x1234, Protocol: layers.IPProtocol(p.proto),
		SrcIP: p.src.Addr().AsSlice(), DstIP: p.dst.Addr().AsSlice(), Flags: layers.IPv4DontFragment,
	}
	if p.fragment != 0 {
		ip.Flags = 0
		if p.fragment < 0 {
			ip.Flags = layers.IPv4MoreFragments
		} else {
			ip.FragOffset = uint16(p.fragment / 8)
		}
	}
	for o := p.options; len(o) > 0; o = o[optionLen(o):] {
		option := layers.IPv4Option{OptionType: o[0]}
		if n := optionLen(o); n > 1 {
			option.OptionLength, option.OptionData = uint8(n), o[2:n]
		}
		ip.Options = append(ip.Options, option)
	}
	b := gopacket.NewSerializeBuffer()
	must(gopacket.Payload(p.transport(ip)).SerializeTo(b, gopacket.SerializeOptions{}))
	must(ip.SerializeTo(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}))
	return b.Bytes()
}

func optionLen(o []byte) int {
	if o[0] <= 1 {
		return 1
	}
	return int(o[1])
}

// extensionChain answers the extension headers with the fragment header.
func (p packet) extensionChain() []extension {
	offset := uint16(p.fragment)
	switch {
	case p.fragment == 0:
		return p.extensions
	case p.fragment < 0:
		offset = 1 // more fragments
	}
	e := extension{nextFragment, binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16([]byte{0}, offset), 77)}
	return append(slices.Clone(p.extensions), e)
}

func (p packet) ipv6() []byte {
	next, extensions := p.proto, p.extensionChain()
	if len(extensions) > 0 {
		next = extensions[0].number
	}
	ip := &layers.IPv6{
		Version: 6, TrafficClass: 0x20, FlowLabel: 0x12345, HopLimit: p.hops(), NextHeader: layers.IPProtocol(next),
		SrcIP: p.src.Addr().AsSlice(), DstIP: p.dst.Addr().AsSlice(),
	}
	var body []byte
	for i, e := range extensions {
		after := p.proto
		if i+1 < len(extensions) {
			after = extensions[i+1].number
		}
		body = append(append(body, after), e.body...)
	}
	body = append(body, p.transport(ip)...)
	b := gopacket.NewSerializeBuffer()
	must(gopacket.Payload(body).SerializeTo(b, gopacket.SerializeOptions{}))
	// Not FixLengths: gopacket would add a jumbo option of its own.
	ip.Length = uint16(len(body))
	must(ip.SerializeTo(b, gopacket.SerializeOptions{}))
	return b.Bytes()
}

// transport answers what follows the IP header and its options or extension headers.
func (p packet) transport(ip gopacket.NetworkLayer) []byte {
	if p.fragment > 0 {
		return p.payload
	}
	b := gopacket.NewSerializeBuffer()
	payload := p.payload
	var layer gopacket.SerializableLayer
	switch p.proto {
	case protoTCP:
		tcp := &layers.TCP{
			SrcPort: layers.TCPPort(p.src.Port()), DstPort: layers.TCPPort(p.dst.Port()), Seq: 1000, Ack: 2000, Window: 4096,
			SYN: strings.Contains(p.tcp, "S"), ACK: strings.Contains(p.tcp, "A"), FIN: strings.Contains(p.tcp, "F"),
			RST: strings.Contains(p.tcp, "R"), PSH: strings.Contains(p.tcp, "P"),
		}
		if tcp.SYN {
			tcp.Options = []layers.TCPOption{{OptionType: layers.TCPOptionKindMSS, OptionLength: 4, OptionData: []byte{5, 0xb4}}}
		}
		must(tcp.SetNetworkLayerForChecksum(ip))
		layer = tcp
	case protoUDP:
		udp := &layers.UDP{SrcPort: layers.UDPPort(p.src.Port()), DstPort: layers.UDPPort(p.dst.Port())}
		must(udp.SetNetworkLayerForChecksum(ip))
		layer = udp
	case protoICMP, protoICMPv6:
		payload = append(p.icmpWord(), payload...)
		if p.quote != nil {
			payload = append(payload, p.quoted()...)
		}
		if p.proto == protoICMPv6 {
			icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(p.icmpType, p.icmpCode)}
			must(icmp.SetNetworkLayerForChecksum(ip))
			layer = icmp
			break
		}
		icmp := &layers.ICMPv4{
			TypeCode: layers.CreateICMPv4TypeCode(p.icmpType, p.icmpCode),
			Id:       binary.BigEndian.Uint16(payload), Seq: binary.BigEndian.Uint16(payload[2:]),
		}
		payload, layer = payload[4:], icmp
	case protoSCTP:
		return p.sctp()
	case protoLite:
		return p.udpLite()
	default:
		return payload
	}
	must(gopacket.Payload(payload).SerializeTo(b, gopacket.SerializeOptions{}))
	must(layer.SerializeTo(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}))
	out := b.Bytes()
	if p.noChecksum && p.proto == protoUDP {
		out[6], out[7] = 0, 0
	}
	return out
}

func (p packet) icmpWord() []byte {
	word := p.icmpRest
	if p.echo() {
		id := p.src.Port()
		if !p.echoRequest() {
			id = p.dst.Port()
		}
		word = uint32(id)<<16 | 7
	}
	return binary.BigEndian.AppendUint32(nil, word)
}

func (p packet) quoted() []byte {
	q := p.quote.ip()
	if p.quoteLen > 0 && p.quoteLen < len(q) {
		q = q[:p.quoteLen]
	}
	copy(q[len(q)-len(p.quoteTail):], p.quoteTail)
	return q
}

// headerLen answers the length of the IP header with options and extension headers.
func (p packet) headerLen() int {
	if !p.v6() {
		return 20 + len(p.options)
	}
	n := 40
	for _, e := range p.extensionChain() {
		n += 1 + len(e.body)
	}
	return n
}

// checksumAt answers where the transport checksum is, from the IP header on.
func (p packet) checksumAt() int {
	switch p.proto {
	case protoTCP:
		return p.headerLen() + 16
	case protoUDP, protoLite:
		return p.headerLen() + 6
	case protoSCTP:
		return p.headerLen() + 8
	}
	return p.headerLen() + 2
}

// describe prints a frame for people: the layers that gopacket sees, and the bytes.
func describe(frame []byte) string {
	if frame == nil {
		return "nothing"
	}
	var b strings.Builder
	decoded := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	for _, l := range decoded.Layers() {
		fmt.Fprintf(&b, "%s\n", gopacket.LayerString(l))
	}
	for i := 0; i < len(frame); i += 16 {
		fmt.Fprintf(&b, "%04x  % x\n", i, frame[i:min(i+16, len(frame))])
	}
	return b.String()
}
