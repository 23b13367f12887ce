package judge

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"tcnat/internal/lab"
)

const (
	// addressBlock is how many outside addresses a conversation has for itself.
	addressBlock = 8
	routerAddr   = 6 // of them, a router on the way to the outside's others
	blocks       = 1<<18 - 1

	// A conversation has a block of inside ports for itself among those that run beside it.
	portBlock    = 12
	firstPort    = 4096
	maxTogether  = 4096 // conversations
	outsideBase4 = 100<<24 | 64<<16
)

var outsideBase6 = [8]byte{0x20, 0x01, 0x0d, 0xb8, 0xf0}

// outsideAddr is the nth outside address of a conversation.
func outsideAddr(f lab.Family, conversation, nth int) netip.Addr {
	block := conversation % blocks
	if f == lab.IPv4 {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(outsideBase4+block*addressBlock+nth))
		return netip.AddrFrom4(b)
	}
	var b [16]byte
	copy(b[:], outsideBase6[:])
	binary.BigEndian.PutUint32(b[8:], uint32(block))
	b[15] = byte(nth)
	return netip.AddrFrom16(b)
}

// blockOf tells whose an outside address is, as a conversation's number within blocks.
func blockOf(a netip.Addr) (block int, ok bool) {
	if a.Is4() {
		b := a.As4()
		at := int(binary.BigEndian.Uint32(b[:])) - outsideBase4
		return at / addressBlock, at >= 0 && at < blocks*addressBlock
	}
	b := a.As16()
	return int(binary.BigEndian.Uint32(b[8:])), [8]byte(b[:8]) == outsideBase6
}

// side is one of the two who speak in a flow.
type side uint8

const (
	within  side = iota // the container
	without             // the outside
)

func (s side) other() side { return 1 - s }

func (s side) String() string {
	if s == within {
		return "inside"
	}
	return "outside"
}

// flow is who speaks with whom. Of ICMP echo the id is the port of who asks, and the other
// has none.
type flow struct {
	protocol    uint8
	container   int
	inside      uint16 // port of the container
	outside     int    // which address
	outsidePort uint16
	inward      bool   // begun by the outside
	published   uint16 // the host's port that it goes to, if inward; 0: the host's own echo
}

func (f flow) initiator() side {
	if f.inward {
		return without
	}
	return within
}

func (f flow) String() string {
	if f.inward {
		return fmt.Sprintf("%s outside.%d:%d > host:%d (c%d:%d)", protocolName(f.protocol), f.outside, f.outsidePort, f.published, f.container+1, f.inside)
	}
	return fmt.Sprintf("%s c%d:%d > outside.%d:%d", protocolName(f.protocol), f.container+1, f.inside, f.outside, f.outsidePort)
}

func protocolName(protocol uint8) string {
	switch {
	case protocol == 6:
		return "tcp"
	case protocol == 17:
		return "udp"
	case protocol == 132:
		return "sctp"
	case isICMP(protocol):
		return "icmp"
	}
	return fmt.Sprint("protocol ", protocol)
}

// step is one packet of a script. What it says depends on what its sender has received.
type step struct {
	flow  int
	from  side
	shape shape
	act   action
}

// action makes a step's packet. It returns nil when its sender knows nobody yet to send it to.
type action interface {
	packet(v *view, s step) []byte
	String() string
}

// script is a conversation, before it is held.
type script struct {
	number int
	family lab.Family
	flows  []flow
	steps  []step
}

func (s *script) addr(nth int) netip.Addr { return outsideAddr(s.family, s.number, nth) }

// String tells the script, a line a step.
func (s *script) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "conversation %d, %s\n", s.number, s.family)
	for i, f := range s.flows {
		fmt.Fprintf(&b, "  flow %d: %s\n", i, f)
	}
	for i, st := range s.steps {
		fmt.Fprintf(&b, "  step %d: flow %d, %s: %s%s\n", i, st.flow, st.from, st.act, st.shape)
	}
	return b.String()
}

// String names what is out of the ordinary.
func (s shape) String() string {
	var b strings.Builder
	if s.ttl < 8 {
		fmt.Fprintf(&b, ", ttl %d", s.ttl)
	}
	if len(s.options) > 0 {
		fmt.Fprintf(&b, ", IPv4 options %x", s.options)
	}
	for _, e := range s.extensions {
		fmt.Fprintf(&b, ", extension %d %x", e.kind, e.body)
	}
	if s.padding > 0 {
		fmt.Fprintf(&b, ", %d bytes of padding", s.padding)
	}
	if s.fragment > 0 {
		fmt.Fprintf(&b, ", in fragments of %d bytes", s.fragment)
		if s.late > 0 {
			fmt.Fprintf(&b, ", the first after %d others", s.late)
		}
	}
	switch s.damage {
	case noChecksum:
		b.WriteString(", checksum 0")
	case badChecksum:
		b.WriteString(", bad checksum")
	case badHeaderChecksum:
		b.WriteString(", bad header checksum")
	}
	return b.String()
}

// endOf is the number of the end that a side of a flow speaks at.
func (f flow) endOf(s side) int {
	if s == without {
		return outside
	}
	return f.container
}
