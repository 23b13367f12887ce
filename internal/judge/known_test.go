package judge

import (
	"bytes"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
)

// knownDifference is one that is allowed.
type knownDifference struct {
	name string
	// why says who is right. A bug's number stands first, where tcnat is not.
	why     string
	matches func(d *difference) bool
	// goesOn: both hosts know the same after it, so the conversation goes on, as if the step had
	// brought nothing.
	goesOn bool
}

// is tells whether a flag means this difference.
func (k knownDifference) is(what string) bool {
	return what != "" && (what == "all" || what == k.name || strings.HasPrefix(k.why, what+": "))
}

// knownDifferences are looked through in this order. What is none of them fails the test.
func knownDifferences() []knownDifference {
	return []knownDifference{
		{
			name: "TCP out of order",
			why: "TCP window checks: conntrack refuses segments that its state machine or its table of flags " +
				"holds invalid. tcnat translates them, and who receives them judges.",
			matches: tcpOutOfOrder,
		},
		{
			name: "SCTP out of order",
			why: "TCP window checks, which SCTP's verification tags are like: conntrack refuses packets with another tag, or " +
				"out of its states. tcnat translates them, and who receives them judges.",
			matches: strayOfSCTP,
		},
		{
			name: "refused connection",
			why: "Timer lengths: conntrack forgets a connection as soon as a SYN is answered by RST. tcnat keeps " +
				"it for 4 minutes, since an RST may be forged (RFC 7857 section 2.2).",
			matches: refusedConnection,
		},
		{
			name: "flow gone astray",
			why: "The host drops a packet (TTL, options) that changes the flow's state. conntrack's TCP state changes " +
				"before routing, tcnat's where the packet leaves; a new flow is kept by conntrack when its first " +
				"packet leaves, by tcnat, if it comes from outside, before routing.",
			matches: goneAstray,
		},
		{
			name: "mapping by destination",
			why: "Port choice: where netfilter chose a port, it is for one destination. tcnat uses one port " +
				"for all (RFC 4787 REQ-1), so that another one that the container speaks to reaches it by that port.",
			matches: mappingByDestination,
		},
		{
			name: "a published port chosen",
			why: "Port choice: netfilter may choose a published port for a container's flow, and what others send to " +
				"it is for the server then. tcnat does not choose such ports.",
			matches: publishedPortChosen,
		},
		{
			name: "about the port before",
			why: "Port choice: netfilter chooses a port anew for each connection, tcnat keeps it for one that takes the " +
				"place of another on the same tuple. So what comes late for the one before reaches the container.",
			matches: aboutPortBefore,
			goesOn:  true,
		},
		{
			name: "called back at a chosen port",
			why: "Port choice: where a client's port was changed, a server that calls it back when their connection is " +
				"over uses the port that it has seen.",
			matches: calledBackAtChosenPort,
		},
		{
			name: "short quote",
			why: "conntrack wants 8 bytes behind the quoted IP header, and for tcnat the ports are enough. " +
				"RFC 792 has everybody quote 8.",
			matches: shortQuote,
			goesOn:  true,
		},
		{
			name:    "quote that is not IP",
			why:     "netfilter does not look at the version of a quoted packet. tcnat does.",
			matches: quoteOfNoVersion,
			goesOn:  true,
		},
		{
			name: "error about a neighbour's packet",
			why: "A container sends with its own address, and speaks of what was sent to itself: DESIGN " +
				"section 2, invariant 7.",
			matches: errorOfNeighbour,
			goesOn:  true,
		},
		{
			name:    "other ICMP messages",
			why:     "tcnat carries echo and errors, and drops and counts other protocols: README, limits.",
			matches: otherMessage,
			goesOn:  true,
		},
		{
			name: "the host's errors have its own address",
			why: "netfilter gives the host's error about a packet that it could not deliver the address that the " +
				"packet was sent to. tcnat leaves it the one that the host chose.",
			matches: hostsOwnAddress,
			goesOn:  true,
		},
		{
			name: "the host's errors about an inside address",
			why: "Who sends to a container's own address gets no error that quotes it: an inside address is never shown " +
				"outside (DESIGN section 2, invariant 1).",
			matches: insideAddressQuoted,
			goesOn:  true,
		},
		{
			name: "router hidden",
			why: "Where netfilter changed a client's port, it takes the source of errors about that flow for the " +
				"client's, and hides the router that sent them. RFC 5508 REQ-4 has it unchanged, as tcnat.",
			matches: routerHidden,
			goesOn:  true,
		},
		{
			name: "quoted TCP checksum",
			why: "A quote that ends within the TCP header, behind the checksum: netfilter leaves the checksum as it " +
				"was, tcnat corrects it (RFC 5508 section 4.1).",
			matches: quotedTCPChecksum,
			goesOn:  true,
		},
		{
			name: "error in fragments",
			why: "netfilter puts an ICMP error together, tcnat drops it, or leaves it to the host. An error is not larger than " +
				"any path carries whole: RFC 792 and RFC 1812 (576 bytes), RFC 4443 (1280).",
			matches: errorInFragments,
			goesOn:  true,
		},
		{
			name: "the host's errors about fragments",
			why: "conntrack puts a datagram together before it is routed, so the host says of the whole that its TTL is used up; " +
				"with tcnat it forwards fragments, and says so of the first, or with IPv6 of each.",
			matches: hostsErrorAboutFragments,
			goesOn:  true,
		},
		{
			name: "error with a bad checksum",
			why: "judge 2: RFC 5508 REQ-3: an error with a bad checksum should be dropped. " +
				"tcnat translates it, and it stays wrong.",
			matches: errorWithBadChecksum,
			goesOn:  true,
		},
	}
}

// inFragments tells whether the step's packet, or its repetition, was sent in fragments.
func (d *difference) inFragments() bool { return d.steps[d.at].shape.fragment > 0 }

// delivered tells whether the one packet that a step brings arrives at the other side's end, and
// nothing else anywhere.
func (d *difference) delivered(world int) bool {
	return d.total(world) == 1 && d.count(world, d.flows[d.step.flow].endOf(d.step.from.other())) == 1 &&
		len(d.faults[world]) == 0
}

// bounced tells whether a step brings nothing but an answer by the host itself.
func (d *difference) bounced(world int) bool {
	return d.total(world) == 1 && d.count(world, d.flows[d.step.flow].endOf(d.step.from)) == 1
}

// isError tells whether an ICMP error was sent.
func (d *difference) isError() (e errorAction, ok bool) {
	e, ok = d.step.act.(errorAction)
	return e, ok
}

func tcpOutOfOrder(d *difference) bool {
	h := d.header()
	if h.protocol != unix.IPPROTO_TCP {
		return false
	}
	initiator := d.step.from == d.flows[d.step.flow].initiator()
	refusedThere := d.total(netfilter) == 0 || d.step.from == without && d.bounced(netfilter)
	return !d.connection(d.step.flow).inOrder(initiator, d.sent[netfilter][h.l4+13]) && refusedThere &&
		(d.delivered(tcnat) || d.bounced(tcnat) && d.step.shape.ttl <= 1)
}

func refusedConnection(d *difference) bool {
	return d.connection(d.step.flow).progress == refused && len(d.faults[tcnat]) == 0
}

func goneAstray(d *difference) bool {
	for i, f := range d.flows { // also another flow of the endpoint: whose turn it is, is then unclear
		mine := d.flows[d.step.flow]
		if d.connection(i).progress == astray && f.container == mine.container && f.inside == mine.inside {
			return len(d.faults[tcnat]) == 0
		}
	}
	return false
}

func calledBackAtChosenPort(d *difference) bool {
	_, a, _ := endpoints(d.sent[netfilter])
	_, b, ok := endpoints(d.sent[tcnat])
	h := d.header()
	return ok && a != b && h.protocol == unix.IPPROTO_TCP && d.flows[d.step.flow].inward && d.step.from == within &&
		d.sent[netfilter][h.l4+13]&(syn|ack|rst) == syn && d.delivered(netfilter) && d.delivered(tcnat) &&
		sameBut(d, d.flows[d.step.flow].endOf(without), destinationPort)
}

func publishedPortChosen(d *difference) bool {
	_, to, ok := endpoints(d.sent[netfilter])
	return ok && d.step.from == without && !d.flows[d.step.flow].inward && len(d.views[netfilter].ports.endpoints) > 0 &&
		slices.ContainsFunc(published(), func(p publishedPort) bool {
			return p.protocol == d.header().protocol && to.Port() >= p.port && to.Port() < p.port+p.ports
		})
}

func mappingByDestination(d *difference) bool {
	u, ok := d.step.act.(udpAction)
	elsewhere := d.again || u.blind || u.otherPort != 0 || u.otherAddr != 0
	return ok && d.step.from == without && elsewhere && len(d.views[netfilter].ports.endpoints) > 0 &&
		!d.delivered(netfilter) && (d.delivered(tcnat) || d.bounced(tcnat) && d.step.shape.ttl <= 1)
}

func aboutPortBefore(d *difference) bool {
	ip := d.sent[netfilter]
	_, isError := d.isError()
	if isError {
		ip = ip[d.header().l4+icmpSize:]
	}
	h, _ := parse(ip)
	src, dst, ok := endpoints(ip)
	if !ok || !isError && !d.again || d.step.from != without && !isError {
		return false
	}
	if !isError {
		src, dst = dst, src
	}
	return d.views[netfilter].ports.outdated(h.protocol, dst, src) && !d.delivered(netfilter) && d.delivered(tcnat)
}

// errorToAnother: the error does not go to whom the quoted packet is from.
func shortQuote(d *difference) bool {
	e, ok := d.isError()
	return ok && e.cut >= 4 && e.cut < 8 && !e.extended && d.total(netfilter) == 0 && d.delivered(tcnat)
}

func quoteOfNoVersion(d *difference) bool {
	e, ok := d.isError()
	at := d.header().l4 + icmpSize
	return ok && e.what == quoteMangled && d.sent[netfilter][at]>>4 != byte(d.family) &&
		d.delivered(netfilter) && d.total(tcnat) == 0
}

func errorOfNeighbour(d *difference) bool {
	_, ok := d.isError()
	if !ok || d.step.from != within || !d.delivered(netfilter) || d.total(tcnat) != 0 {
		return false
	}
	quoted, ok := parse(d.sent[netfilter][d.header().l4+icmpSize:])
	return ok && quoted.dst != d.header().src
}

func otherMessage(d *difference) bool {
	_, ok := d.step.act.(messageAction)
	return ok && d.step.from == within && d.delivered(netfilter) && d.total(tcnat) == 0
}

func hostsOwnAddress(d *difference) bool {
	if !d.bounced(netfilter) || !d.bounced(tcnat) {
		return false
	}
	end := d.flows[d.step.flow].endOf(d.step.from)
	a, _ := parse(d.normal[netfilter][end][0])
	b, _ := parse(d.normal[tcnat][end][0])
	own := d.views[tcnat].world.Host.Addr(d.family)
	if d.step.from == within {
		own = lab.BridgeAddr(d.family)
	}
	return isICMP(b.protocol) && a.src == d.header().dst && b.src == own && sameBut(d, end, sourceAddress)
}

func insideAddressQuoted(d *difference) bool {
	u, ok := d.step.act.(udpAction)
	return ok && u.toContainer && d.step.shape.ttl <= 1 && d.bounced(netfilter) && d.total(tcnat) == 0
}

func routerHidden(d *difference) bool {
	e, ok := d.isError()
	if !ok || d.step.from != without || !d.delivered(netfilter) || !d.delivered(tcnat) {
		return false
	}
	end := d.flows[d.step.flow].container
	a, _ := parse(d.normal[netfilter][end][0])
	b, _ := parse(d.normal[tcnat][end][0])
	blank := sourceAddress
	if e.cut >= 18 && e.cut < tcpSize { // and the checksum, too
		blank = func(ip []byte, h header) {
			sourceAddress(ip, h)
			quotedChecksum(ip, h)
		}
	}
	quoted, _ := parse(d.sent[netfilter][d.header().l4+icmpSize:])
	return len(d.views[netfilter].ports.endpoints) > 0 && a.src == quoted.dst &&
		b.src == d.header().src && sameBut(d, end, blank)
}

func quotedTCPChecksum(d *difference) bool {
	e, ok := d.isError()
	return ok && e.cut >= 18 && e.cut < tcpSize && d.delivered(netfilter) && d.delivered(tcnat) &&
		sameBut(d, d.flows[d.step.flow].endOf(d.step.from.other()), quotedChecksum)
}

func errorWithBadChecksum(d *difference) bool {
	_, ok := d.isError()
	return ok && d.step.shape.damage == badChecksum && d.total(netfilter) == 0 && d.delivered(tcnat)
}

// sameBut tells whether the one packet at an end is the same in both worlds, but for what blank
// blanks out.
func sameBut(d *difference, end int, blank func(ip []byte, h header)) bool {
	var both [worldCount][]byte
	for i := range both {
		both[i] = bytes.Clone(d.normal[i][end][0])
		h, ok := parse(both[i])
		if !ok {
			return false
		}
		blank(both[i], h)
	}
	return bytes.Equal(both[netfilter], both[tcnat])
}

// destinationPort blanks the port that TCP goes to, and its checksum.
func destinationPort(ip []byte, h header) {
	clear(ip[h.l4+2 : h.l4+4])
	clear(ip[h.l4+16 : h.l4+18])
}

// sourceAddress blanks the source, and the checksums that cover it.
func sourceAddress(ip []byte, h header) {
	src, _ := addresses(ip)
	clear(src)
	if h.v6 {
		clear(ip[h.l4+2 : h.l4+4])
	} else {
		clear(ip[10:12])
	}
}

// quotedChecksum blanks the checksum of a quoted TCP header, and the ICMP checksum that covers it.
func quotedChecksum(ip []byte, h header) {
	q, ok := parse(ip[h.l4+icmpSize:])
	at := h.l4 + icmpSize + q.l4 + checksumAt(unix.IPPROTO_TCP)
	if ok && q.protocol == unix.IPPROTO_TCP && at+2 <= len(ip) {
		clear(ip[at : at+2])
		clear(ip[h.l4+2 : h.l4+4])
	}
}
