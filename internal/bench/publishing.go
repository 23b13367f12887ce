package bench

import (
	"fmt"
	"net/netip"
)

// Ports of rules that are there to be many.
const (
	firstFiller = 1024
	fillerPorts = 50000 // more rules take other addresses
	matchPort   = 60000 // of the rule that packets are for: the last one
	addedPort   = 61500 // of the first rule that is added
	rangeFirst  = 1024
	rangePorts  = 60000
)

// Protocols as command lines name them.
const (
	wordTCP = "tcp"
	wordUDP = "udp"
)

// publishing is a set of DNAT rules to the first container, each port to the same port there.
type publishing struct {
	rules  int    // the last of them publishes match; 0: one rule for a range of ports
	match  uint16 // UDP
	tcpToo bool   // publish match of TCP as well
}

// published is one DNAT rule.
type published struct {
	protocol    string
	destination netip.Addr // zero: any of the host's
	first, last uint16
}

// list returns the rules in order.
func (p publishing) list() []published {
	if p.rules == 0 {
		return []published{{protocol: wordUDP, first: rangeFirst, last: rangeFirst + rangePorts - 1}}
	}
	rules := make([]published, 0, p.rules+1)
	for i := range p.rules - 1 {
		port := uint16(firstFiller + i%fillerPorts)
		rule := published{protocol: wordUDP, first: port, last: port}
		if page := i / fillerPorts; page > 0 {
			rule.destination = netip.AddrFrom4([4]byte{10, 99, 0, byte(page)})
		}
		rules = append(rules, rule)
	}
	if p.tcpToo {
		rules = append(rules, published{protocol: wordTCP, first: p.match, last: p.match})
	}
	return append(rules, published{protocol: wordUDP, first: p.match, last: p.match})
}

// target is where a rule sends packets, as iptables writes it.
func (p published) target(r *rig) string {
	if p.first != p.last {
		return r.containerAddr(0).String()
	}
	return fmt.Sprintf("%s:%d", r.containerAddr(0), p.first)
}
