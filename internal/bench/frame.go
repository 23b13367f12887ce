package bench

import (
	"encoding/binary"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

const (
	frameSize    = 64 // bytes on the wire, without the check sequence
	ethernetSize = 14
	ipSize       = 20
	tcpSize      = 20
	vnetSize     = 10 // bytes of struct virtio_net_hdr before a frame
)

// Flags of TCP.
const (
	tcpSYN = 0x02
	tcpACK = 0x10
)

// Flags of the virtio header, from linux/virtio_net.h.
const vnetNeedsChecksum = 1

// Offsets into a frame.
const (
	atPorts  = ethernetSize + ipSize
	atUDPSum = atPorts + 6
	atTCPSum = atPorts + 16
)

// frameOptions describe frames that differ in their ports alone.
type frameOptions struct {
	srcMAC, dstMAC net.HardwareAddr
	src, dst       netip.Addr // IPv4
	partial        bool       // leave the checksum to the device, as a container's own socket does
	tcpFlags       byte       // 0: UDP; else TCP with these flags
}

// template is a frame whose ports are filled in packet by packet.
type template struct {
	bytes   [vnetSize + frameSize]byte // begins with the virtio header
	atSum   int                        // offset of the checksum within the frame
	sum     uint32                     // of all but the ports, not yet folded
	partial bool
}

// newTemplate lays out a 64-byte frame.
func newTemplate(o frameOptions) template {
	t := template{atSum: atUDPSum, partial: o.partial}
	frame := t.bytes[vnetSize:]
	copy(frame[0:6], o.dstMAC)
	copy(frame[6:12], o.srcMAC)
	binary.BigEndian.PutUint16(frame[12:], unix.ETH_P_IP)

	ip := frame[ethernetSize:atPorts]
	protocol := byte(unix.IPPROTO_UDP)
	if o.tcpFlags != 0 {
		protocol = unix.IPPROTO_TCP
	}
	ip[0] = 0x45
	binary.BigEndian.PutUint16(ip[2:], frameSize-ethernetSize)
	binary.BigEndian.PutUint16(ip[6:], 0x4000) // do not fragment
	ip[8], ip[9] = 64, protocol
	src, dst := o.src.As4(), o.dst.As4()
	copy(ip[12:], src[:])
	copy(ip[16:], dst[:])
	binary.BigEndian.PutUint16(ip[10:], ^fold(sumWords(0, ip)))

	segment := frame[atPorts:]
	if o.tcpFlags != 0 {
		t.atSum = atTCPSum
		sequence := uint32(1000)
		if o.tcpFlags&tcpSYN == 0 {
			sequence++ // behind the SYN
		}
		binary.BigEndian.PutUint32(segment[4:], sequence)
		binary.BigEndian.PutUint32(segment[8:], 1001) // acknowledged
		segment[12], segment[13] = tcpSize/4<<4, o.tcpFlags
		binary.BigEndian.PutUint16(segment[14:], 65535) // window
	} else {
		binary.BigEndian.PutUint16(segment[4:], uint16(len(segment)))
	}
	t.sum = pseudoSum(o.src, o.dst, protocol, len(segment))
	if o.partial {
		t.bytes[0] = vnetNeedsChecksum
		binary.NativeEndian.PutUint16(t.bytes[6:], atPorts)
		binary.NativeEndian.PutUint16(t.bytes[8:], uint16(t.atSum-atPorts))
		binary.BigEndian.PutUint16(frame[t.atSum:], fold(t.sum))
	} else {
		t.sum = sumWords(t.sum, segment)
	}
	return t
}

// fill sets the ports of a copy of the template, and the checksum that goes with them. frame
// is without the virtio header.
func (t *template) fill(frame []byte, sport, dport uint16) {
	binary.BigEndian.PutUint16(frame[atPorts:], sport)
	binary.BigEndian.PutUint16(frame[atPorts+2:], dport)
	if t.partial {
		return
	}
	sum := ^fold(t.sum + uint32(sport) + uint32(dport))
	if sum == 0 {
		sum = 0xffff // 0 would mean that there is none
	}
	binary.BigEndian.PutUint16(frame[t.atSum:], sum)
}

func pseudoSum(src, dst netip.Addr, protocol byte, length int) uint32 {
	sum := sumWords(0, src.AsSlice())
	sum = sumWords(sum, dst.AsSlice())
	return sum + uint32(protocol) + uint32(length)
}

// sumWords adds the 16-bit words of an even number of bytes.
func sumWords(sum uint32, data []byte) uint32 {
	for i := 0; i+1 < len(data); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(data[i:]))
	}
	return sum
}

func fold(sum uint32) uint16 {
	sum = sum&0xffff + sum>>16
	sum = sum&0xffff + sum>>16
	return uint16(sum)
}

// nativeWord is four bytes in network order as the machine reads them.
func nativeWord(b [4]byte) uint32 { return binary.NativeEndian.Uint32(b[:]) }
