package maps

import (
	"strconv"
	"strings"
)

// Protocol is an IP protocol number.
type Protocol uint8

// The protocols that have names here.
const (
	ICMP    Protocol = 1
	TCP     Protocol = 6
	UDP     Protocol = 17
	ICMPv6  Protocol = 58
	SCTP    Protocol = 132
	UDPLite Protocol = 136
)

// String returns the protocol's name as the command line has it, or its number.
func (p Protocol) String() string {
	switch p {
	case ICMP:
		return "icmp"
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case ICMPv6:
		return "icmpv6"
	case SCTP:
		return "sctp"
	case UDPLite:
		return "udplite"
	}
	return strconv.Itoa(int(p))
}

// ParseProtocol reads what String writes, in any case: a name, or a number from 1 to 255.
// Anything else is an ErrUnknownProtocol.
func ParseProtocol(text string) (Protocol, error) {
	for _, p := range []Protocol{ICMP, TCP, UDP, ICMPv6, SCTP, UDPLite} {
		if strings.EqualFold(text, p.String()) {
			return p, nil
		}
	}
	n, err := strconv.ParseUint(text, 10, 8)
	if err != nil || n == 0 {
		return 0, faultf(ErrUnknownProtocol, "protocol %q: unknown: use tcp, udp, udplite, sctp, icmp, icmpv6 or a number", text)
	}
	return Protocol(n), nil
}

// isPublished tells whether rules can publish ports of p.
func (p Protocol) isPublished() bool { return p == TCP || p == UDP || p == SCTP }

// hasStates tells whether p has connections, whose states bpf.NATTcpSeen tells.
func (p Protocol) hasStates() bool { return p == TCP || p == SCTP }
