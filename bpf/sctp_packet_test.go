package bpf_test

import (
	"encoding/binary"
	"hash/crc32"
	"strings"
)

// Chunk types of SCTP.
const (
	chunkData             = 0
	chunkInit             = 1
	chunkInitAck          = 2
	chunkSack             = 3
	chunkHeartbeat        = 4
	chunkAbort            = 6
	chunkShutdown         = 7
	chunkShutdownAck      = 8
	chunkError            = 9
	chunkCookieEcho       = 10
	chunkCookieAck        = 11
	chunkShutdownComplete = 14
	chunkAuth             = 15
	chunkIData            = 64
	chunkAsconf           = 193
)

// chunk answers a chunk with its padding.
func chunk(kind uint8, value string) []byte {
	c := binary.BigEndian.AppendUint16([]byte{kind, 0}, uint16(4+len(value)))
	c = append(c, value...)
	return append(c, make([]byte, -len(c)&3)...)
}

// sctp answers the packet from its SCTP header on, with the chunk that is like its TCP flags, or with
// those of its payload where the flags are "chunks".
func (p packet) sctp() []byte {
	payload := string(p.payload)
	tag := uint32(0x01020304)
	var chunks []byte
	switch {
	case p.tcp == "chunks":
		tag, chunks = p.sctpTag, p.payload
	case p.tcp == "S":
		tag, chunks = 0, chunk(chunkInit, strings.Repeat("i", 16)+payload)
	case p.tcp == "SA":
		chunks = chunk(chunkInitAck, strings.Repeat("i", 16)+payload)
	case strings.Contains(p.tcp, "R"):
		chunks = chunk(chunkAbort, payload)
	case strings.Contains(p.tcp, "F"):
		chunks = chunk(chunkShutdown, "tsn.")
	case payload == "":
		chunks = chunk(chunkSack, strings.Repeat("s", 12))
	default:
		chunks = chunk(chunkData, strings.Repeat("d", 12)+payload)
	}
	return sctpPacket(p.src.Port(), p.dst.Port(), tag, chunks, !p.noChecksum)
}

// sctpPacket answers a header and chunks, with the right checksum or with 0.
func sctpPacket(from, to uint16, tag uint32, chunks []byte, checksum bool) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = binary.BigEndian.AppendUint32(b, tag)
	b = append(append(b, 0, 0, 0, 0), chunks...)
	if checksum {
		binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	}
	return b
}
