package bpf_test

import "encoding/binary"

// udpLite answers the packet from its UDP-Lite header on. The checksum covers all of an even payload, and the
// header alone of an odd one.
func (p packet) udpLite() []byte {
	b := binary.BigEndian.AppendUint16(nil, p.src.Port())
	b = binary.BigEndian.AppendUint16(b, p.dst.Port())
	b = append(append(b, 0, 0, 0, 0), p.payload...)
	covered := b
	if len(p.payload)%2 == 1 {
		binary.BigEndian.PutUint16(b[4:], 8)
		covered = b[:8]
	}
	pseudo := append(p.src.Addr().AsSlice(), p.dst.Addr().AsSlice()...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(b)))
	pseudo = binary.BigEndian.AppendUint32(pseudo, protoLite)
	var sum uint32
	for part := append(pseudo, covered...); len(part) > 0; part = part[2:] {
		sum += uint32(binary.BigEndian.Uint16(part))
	}
	sum = sum&0xffff + sum>>16
	check := ^uint16(sum + sum>>16)
	if check == 0 {
		check = 0xffff
	}
	binary.BigEndian.PutUint16(b[6:], check)
	return b
}
