package judge

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// sumBytes adds the 16-bit words of data, the last byte as if a zero followed.
func sumBytes(sum uint32, data []byte) uint32 {
	for ; len(data) > 1; data = data[2:] {
		sum += uint32(binary.BigEndian.Uint16(data))
	}
	if len(data) == 1 {
		sum += uint32(data[0]) << 8
	}
	return sum
}

func fold(sum uint32) uint16 {
	sum = sum&0xffff + sum>>16
	sum = sum&0xffff + sum>>16
	return uint16(sum)
}

// pseudoSum is the sum of the pseudo header of a transport header of length bytes.
func pseudoSum(src, dst []byte, protocol uint8, length int) uint32 {
	return sumBytes(sumBytes(0, src), dst) + uint32(protocol) + uint32(length>>16) + uint32(length&0xffff)
}

// checksumAt is where a transport header has its checksum, or -1.
func checksumAt(protocol uint8) int {
	switch protocol {
	case unix.IPPROTO_TCP:
		return 16
	case unix.IPPROTO_UDP:
		return 6
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		return 2
	}
	return -1
}

// transportSum is the folded sum over a whole transport segment with its pseudo header: ffff when
// its checksum is right.
func transportSum(src, dst []byte, protocol uint8, segment []byte) uint16 {
	sum := uint32(0)
	if protocol != unix.IPPROTO_ICMP {
		sum = pseudoSum(src, dst, protocol, len(segment))
	}
	return fold(sumBytes(sum, segment))
}

// setChecksum fills in the checksum of a transport segment whose field is zero.
func setChecksum(src, dst []byte, protocol uint8, segment []byte) {
	if protocol == unix.IPPROTO_SCTP {
		setSCTPChecksum(segment)
		return
	}
	at := checksumAt(protocol)
	if at < 0 || len(segment) < at+2 {
		return
	}
	sum := ^transportSum(src, dst, protocol, segment)
	if sum == 0 && protocol == unix.IPPROTO_UDP {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(segment[at:], sum)
}

// adjust makes up in a checksum for a word that changes (RFC 1624).
func adjust(checksum, from, to uint16) uint16 {
	return ^fold(uint32(^checksum) + uint32(^from) + uint32(to))
}
