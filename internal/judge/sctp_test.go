package judge

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tcnat/loader"
)

const (
	sctpSize       = 12
	sctpChecksumAt = 8
)

// Chunk types of SCTP.
const (
	chunkData             = 0
	chunkInit             = 1
	chunkInitAck          = 2
	chunkSack             = 3
	chunkHeartbeat        = 4
	chunkHeartbeatAck     = 5
	chunkAbort            = 6
	chunkShutdown         = 7
	chunkShutdownAck      = 8
	chunkError            = 9
	chunkCookieEcho       = 10
	chunkCookieAck        = 11
	chunkShutdownComplete = 14
)

// TestJudgeSCTP holds SCTP associations in both worlds. They have a script of their own, so that
// others stay what they are.
func TestJudgeSCTP(t *testing.T) {
	j := newJudge(t, loader.AttachOptions{FastPath: loader.FastPathEstablished}, nil)
	j.strict, j.on = *strictFlag, features{sctp: true}
	for _, seed := range seeds() {
		if judgeSeed(t, j, seed, (conversations()+3)/4); t.Failed() {
			break
		}
	}
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sctpSum is the checksum of a segment, whatever its field says.
func sctpSum(segment []byte) uint32 {
	segment = bytes.Clone(segment)
	clear(segment[sctpChecksumAt:sctpSize])
	return crc32.Checksum(segment, castagnoli)
}

func setSCTPChecksum(segment []byte) {
	if len(segment) >= sctpSize {
		binary.LittleEndian.PutUint32(segment[sctpChecksumAt:], sctpSum(segment))
	}
}

func sctpWrong(segment []byte) bool {
	return len(segment) >= sctpSize && binary.LittleEndian.Uint32(segment[sctpChecksumAt:]) != sctpSum(segment)
}

// adjustSCTP makes up in a checksum for ports that were others, in a packet that was so long; the segment may be a
// part of it.
func adjustSCTP(segment []byte, before [4]byte, length int) {
	if len(segment) < sctpSize || length < sctpSize {
		return
	}
	was, is := make([]byte, length), make([]byte, length)
	copy(was, before[:])
	copy(is, segment[:4])
	sum := binary.LittleEndian.Uint32(segment[sctpChecksumAt:])
	sum ^= crc32.Checksum(was, castagnoli) ^ crc32.Checksum(is, castagnoli)
	binary.LittleEndian.PutUint32(segment[sctpChecksumAt:], sum)
}

// ipLength is how long an IP packet says that it is.
func ipLength(ip []byte) int {
	if ip[0]>>4 == 6 {
		return ipv6Size + int(binary.BigEndian.Uint16(ip[4:]))
	}
	return int(binary.BigEndian.Uint16(ip[2:]))
}

// restoreSCTP puts a port back into an SCTP header, and tells which words that changes.
func restoreSCTP(ip []byte, h header, at int, original uint16) (changes []change) {
	segment := ip[h.l4:]
	before := bytes.Clone(segment[:min(len(segment), sctpSize)])
	binary.BigEndian.PutUint16(ip[at:], original)
	adjustSCTP(segment, [4]byte(before), ipLength(ip)-h.l4)
	for i := 0; i+2 <= len(before); i += 2 {
		from, to := binary.BigEndian.Uint16(before[i:]), binary.BigEndian.Uint16(segment[i:])
		if from != to {
			changes = append(changes, change{h.l4 + i, from, to})
		}
	}
	return changes
}

// chunk answers a chunk with its padding.
func chunk(kind, flags uint8, value []byte) []byte {
	c := binary.BigEndian.AppendUint16([]byte{kind, flags}, uint16(4+len(value)))
	c = append(c, value...)
	return append(c, make([]byte, -len(c)&3)...)
}

// sctpAction sends an SCTP packet.
type sctpAction struct {
	tag    uint32
	chunks [][]byte
	blind  bool
	// stray: no association expects it
	stray bool
}

func (a sctpAction) packet(v *view, s step) []byte {
	to, ok := v.peer(s.flow, s.from, a.blind)
	if !ok {
		return nil
	}
	own := v.own(v.flows[s.flow], s.from)
	b := binary.BigEndian.AppendUint16(nil, own.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	b = binary.BigEndian.AppendUint32(b, a.tag)
	b = append(append(b, 0, 0, 0, 0), bytes.Join(a.chunks, nil)...)
	return s.shape.build(own.Addr(), to.Addr(), unix.IPPROTO_SCTP, b)
}

func (a sctpAction) String() string {
	var names []string
	for _, c := range a.chunks {
		names = append(names, fmt.Sprint(c[0]))
	}
	text := fmt.Sprintf("sctp tag %#x, chunks %s", a.tag, strings.Join(names, " "))
	if a.stray {
		text += ", stray"
	}
	return text
}

// sctpKinds are the conversations of SCTP.
func (g *generator) sctpKinds() {
	g.oneOf([]choice{
		{50, func() { g.outward(unix.IPPROTO_SCTP, 1) }},
		{40, func() { g.inward(unix.IPPROTO_SCTP, 1) }},
		{20, func() { // two containers, one port
			port, far := g.nextPort(), g.outsidePort()
			for c := range 2 {
				g.flows = append(g.flows, flow{protocol: unix.IPPROTO_SCTP, container: c, inside: port, outsidePort: far})
			}
		}},
		{10, func() {
			g.outward(unix.IPPROTO_SCTP, 2)
			g.outward(unix.IPPROTO_UDP, 1)
			g.inward(unix.IPPROTO_SCTP, 1)
		}},
	})
}

// association is what both sides of one know.
type association struct {
	*talk
	tags [2]uint32 // by side: what the other's packets bear
	tsn  [2]uint32
}

func (a *association) send(from side, chunks ...[]byte) {
	a.packet(from, sctpAction{tag: a.tags[from.other()], chunks: chunks})
}

// packet sends without a wrong transport checksum, or one of 0: netfilter would write a right one. And INIT and
// INIT ACK without extension headers: behind these, conntrack has not always learned the tags.
func (a *association) packet(from side, act sctpAction) {
	s := a.shape()
	if kind := act.chunks[0][0]; kind == chunkInit || kind == chunkInitAck {
		s.extensions = nil
	}
	a.steps = append(a.steps, step{flow: a.number, from: from, shape: s, act: act})
}

func (a *association) init(from side, kind uint8) []byte {
	b := binary.BigEndian.AppendUint32(nil, a.tags[from])
	b = binary.BigEndian.AppendUint32(b, 65536)
	b = append(b, 0, 10, 0, 10)
	b = binary.BigEndian.AppendUint32(b, a.tsn[from])
	if kind == chunkInitAck { // with a state cookie
		b = append(append(b, 0, 7, 0, 12), "cookie!!"...)
	}
	return chunk(kind, 0, b)
}

func (a *association) data(from side) []byte {
	b := binary.BigEndian.AppendUint32(nil, a.tsn[from])
	b = append(b, make([]byte, 8)...)
	a.tsn[from]++
	return chunk(chunkData, 3, append(append(b, 1), a.payload(1200)...))
}

func (a *association) sack(from side) []byte {
	b := binary.BigEndian.AppendUint32(nil, a.tsn[from.other()]-1)
	return chunk(chunkSack, 0, append(b, 0, 1, 0, 0, 0, 0, 0, 0))
}

// sctp writes associations on one tuple, one after the other.
func (t *talk) sctp() {
	for n := 1 + t.IntN(3)/2; n > 0; n-- {
		a := &association{talk: t, tags: [2]uint32{t.Uint32() | 1, t.Uint32() | 1}, tsn: [2]uint32{t.Uint32(), t.Uint32()}}
		if !a.begin() {
			continue
		}
		for range t.IntN(8) {
			a.event()
		}
		a.end(t.side())
	}
}

func (a *association) begin() (open bool) {
	x := a.flow.initiator()
	y := x.other()
	init := sctpAction{chunks: [][]byte{a.init(x, chunkInit)}}
	a.oneOf([]choice{
		{75, func() {
			a.packet(x, init)
			a.sometimesAgain(x)
			a.send(y, a.init(y, chunkInitAck))
			a.sometimesAgain(y)
			echo := [][]byte{chunk(chunkCookieEcho, 0, []byte("cookie!!"))}
			if a.percent(40) {
				echo = append(echo, a.data(x))
			}
			a.send(x, echo...)
			a.sometimesAgain(x)
			a.send(y, chunk(chunkCookieAck, 0, nil))
			open = true
		}},
		{8, func() { // refused
			a.packet(x, init)
			a.packet(y, sctpAction{tag: a.tags[x], chunks: [][]byte{chunk(chunkAbort, 0, nil)}})
		}},
		{4, func() { a.packet(x, init) }}, // nobody answers
		{8, func() { // begun before anybody looked
			a.packet(x, sctpAction{tag: a.tags[y], chunks: [][]byte{a.data(x)}, stray: true})
			a.packet(y, sctpAction{tag: a.tags[x], chunks: [][]byte{a.sack(y)}, stray: true})
		}},
		{5, func() { // out of the blue
			kind := []uint8{chunkAbort, chunkShutdownComplete, chunkCookieAck}[a.IntN(3)]
			a.packet(x, sctpAction{tag: a.tags[y], chunks: [][]byte{chunk(kind, 0, nil)}, stray: true})
		}},
	})
	return open
}

func (a *association) event() {
	from := a.side()
	a.oneOf([]choice{
		{40, func() { a.send(from, a.data(from)); a.sometimesAgain(from) }},
		{15, func() { a.send(from, a.sack(from)) }},
		{15, func() { a.send(from, a.sack(from), a.data(from)) }},
		{8, func() {
			beat := []byte{0, 1, 0, 8, 1, 2, 3, 4}
			a.send(from, chunk(chunkHeartbeat, 0, beat))
			a.send(from.other(), chunk(chunkHeartbeatAck, 0, beat))
		}},
		{3, func() { a.send(from, chunk(chunkError, 0, []byte{0, 1, 0, 8, 0, 1, 0, 0})) }},
		{3, func() { // a tag that is not the association's
			a.packet(from, sctpAction{tag: a.tags[from.other()] ^ 0x10, chunks: [][]byte{a.data(from)}, stray: true})
		}},
		{14, func() { a.fail(a.side()) }},
		{2, func() { a.message(from) }},
	})
}

func (a *association) end(x side) {
	y := x.other()
	a.oneOf([]choice{
		{50, func() {
			a.send(x, chunk(chunkShutdown, 0, binary.BigEndian.AppendUint32(nil, a.tsn[y]-1)))
			if a.percent(30) { // what was on the way
				a.send(y, a.data(y))
				a.send(x, a.sack(x), chunk(chunkShutdown, 0, binary.BigEndian.AppendUint32(nil, a.tsn[y]-1)))
			}
			a.send(y, chunk(chunkShutdownAck, 0, nil))
			a.sometimesAgain(y)
			a.send(x, chunk(chunkShutdownComplete, 0, nil))
		}},
		{20, func() { a.send(x, chunk(chunkAbort, 0, nil)) }},
		{10, func() { // the T bit: the tag is the sender's own
			a.packet(x, sctpAction{tag: a.tags[x], chunks: [][]byte{chunk(chunkAbort, 1, nil)}})
		}},
		{20, func() {}},
	})
	if a.percent(8) {
		a.fail(a.side()) // about what is over
	}
}

// strayOfSCTP: conntrack refuses what its states or tags do not expect.
func strayOfSCTP(d *difference) bool {
	a, ok := d.step.act.(sctpAction)
	refusedThere := d.total(netfilter) == 0 || d.step.from == without && d.bounced(netfilter)
	return ok && a.stray && refusedThere && (d.delivered(tcnat) || d.bounced(tcnat) && d.step.shape.ttl <= 1)
}

// blankSCTPQuote blanks the checksum of a quoted SCTP header, or what there is of it, and the ICMP checksum that covers it: netfilter writes
// a CRC of what is quoted, tcnat that of the packet that is quoted (RFC 5508 section 4.1).
func blankSCTPQuote(ip []byte, h header) {
	q, ok := parse(ip[h.l4+icmpSize:])
	at := h.l4 + icmpSize + q.l4 + sctpChecksumAt
	if ok && q.protocol == unix.IPPROTO_SCTP && at < len(ip) {
		clear(ip[at:min(at+4, len(ip))])
		clear(ip[h.l4+2 : h.l4+4])
	}
}
