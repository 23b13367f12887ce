package maps

import (
	"fmt"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
)

// Count is one counter of the datapath.
type Count struct {
	Name    string // one word, like "no-flow"
	Text    string // one sentence for people: what happened, and the usual cause
	Drop    bool   // packets were dropped; else something happened
	Packets uint64 // how often, on all CPUs together
}

// The names of the counters of the fast path.
const (
	LeasesGranted     = "leases-granted"
	PacketsRedirected = "packets-redirected"
)

// wording is how people are told of a counter.
type wording struct {
	name, text string
}

// wordings are by enum counter of abi.h; DROP_END is none and has none.
func wordings() [bpf.NATCounterCOUNTER_COUNT]wording {
	return [bpf.NATCounterCOUNTER_COUNT]wording{
		bpf.NATCounterDROP_MALFORMED:        {"malformed", "The headers were cut short or contradict each other; usually a broken or hostile sender."},
		bpf.NATCounterDROP_V4MAPPED:         {"v4-mapped", "An IPv6 packet carried IPv4-mapped addresses, which never belong on a wire."},
		bpf.NATCounterDROP_FRAGMENT:         {"fragment", "A fragment belonged to a datagram whose first fragment was refused, or overlapped that one."},
		bpf.NATCounterDROP_FRAGMENT_NO_ROOM: {"fragment-no-room", "A fragment came before the first one of its datagram, and four were waiting for that already, or 256 for others."},
		bpf.NATCounterDROP_FRAGMENT_ALONE:   {"fragment-alone", "A fragment waited two seconds for the first one of its datagram, which did not come."},
		bpf.NATCounterDROP_PROTOCOL:         {"protocol", "A container used a protocol that is not translated: TCP, UDP, UDP-Lite, SCTP and ICMP are."},
		bpf.NATCounterDROP_LOOPBACK:         {"loopback", "A packet from outside or from a container was sent to or from a loopback address."},
		bpf.NATCounterDROP_SPOOFED_ADDRESS:  {"spoofed-address", "A packet had an address that its sender has no right to: a container one that is not its own, or somebody else a container's."},
		bpf.NATCounterDROP_SPOOFED_MAC:      {"spoofed-mac", "A container sent with a MAC address that is not its own."},
		bpf.NATCounterDROP_NO_UPLINK:        {"no-uplink", "The host routes the packet out by a device without programs: attach it as an uplink, or allow it with --unmanaged-devices pass."},
		bpf.NATCounterDROP_MULTICAST:        {"multicast", "A container's multicast packet was routed to an uplink, where its address would have shown."},
		bpf.NATCounterDROP_NO_RULE:          {"no-rule", "No SNAT rule covers the container's address on this uplink, so the packet would have left untranslated."},
		bpf.NATCounterDROP_NO_FLOW:          {"no-flow", "A packet for a container belongs to no flow and no published port; usually late replies or somebody trying its own address."},
		bpf.NATCounterDROP_ISOLATED:         {"isolated", "A container on one managed bridge tried to reach another bridge."},
		bpf.NATCounterDROP_NOT_ALLOWED:      {"not-allowed", "The source is not in the published port's list of allowed sources."},
		bpf.NATCounterDROP_HAIRPIN:          {"hairpin", "A container speaks to one server by two published ports from one port of its own, which cannot be told apart."},
		bpf.NATCounterDROP_HAIRPIN_REDIRECT: {"hairpin-redirect", "The host told a container that the server behind a published port is its neighbour; no harm is done."},
		bpf.NATCounterDROP_ICMP_UNRELATED:   {"icmp-unrelated", "An ICMP error or answer of a container belongs to no flow; usually the flow ended before it came."},
		bpf.NATCounterDROP_TCP_UNEXPECTED:   {"tcp-unexpected", "A container's TCP reset, or an SCTP packet that ends or answers something, belongs to no flow; usually the flow ended before it came."},
		bpf.NATCounterDROP_NO_ADDRESS:       {"no-address", "The uplink has no address of the packet's family to masquerade with."},
		bpf.NATCounterDROP_NO_PORT:          {"no-port", "No outside port was free for a new flow; give the SNAT rule more ports or addresses."},
		bpf.NATCounterDROP_TABLE_FULL:       {"table-full", "The flow table is full and a new flow was refused; attach with a larger --max-flows."},
		bpf.NATCounterDROP_NO_MEMORY:        {"no-memory", "The kernel had no memory for a new flow; usually the memory limit of the control group that attach ran in."},
		bpf.NATCounterDROP_ENDING:           {"ending", "The packet's flow was just being ended, by its timeout, a flush or a deleted rule; a later packet makes a new one."},
		bpf.NATCounterDROP_REWRITE:          {"rewrite", "The kernel refused to change the packet, so it was dropped half translated."},
		bpf.NATCounterFLOWS_CREATED:         {"flows-created", "A flow was made."},
		bpf.NATCounterFLOWS_ENDED:           {"flows-ended", "A flow ended, by its timeout, a flush or a deleted rule."},
		bpf.NATCounterFLOWS_REVIVED:         {"flows-revived", "A packet came for a flow that was about to end, and kept it alive."},
		bpf.NATCounterFLOWS_TAKEN_OVER:      {"flows-taken-over", "A closed flow gave its place at once to a new one of the same addresses and ports."},
		bpf.NATCounterFLOWS_RACED:           {"flows-raced", "Two CPUs made the same flow at the same time, and one used the other's."},
		bpf.NATCounterMAPPINGS_CREATED:      {"mappings-created", "A container's endpoint got an outside port."},
		bpf.NATCounterMAPPINGS_ENDED:        {"mappings-ended", "An outside port became free, since the last flow of its endpoint ended."},
		bpf.NATCounterPORTS_SHARED:          {"ports-shared", "No outside port was free for an endpoint, so it shares one with another by destination."},
		bpf.NATCounterLEASES_GRANTED:        {LeasesGranted, "A direction of a flow was let on the fast path for a second and a half, since the host let a packet of it through."},
		bpf.NATCounterPACKETS_REDIRECTED:    {PacketsRedirected, "A packet took the fast path, past the host's stack."},
		bpf.NATCounterEXPIRY_OVERDUE:        {"expiry-overdue", "A new flow found that the expiry had not run for a second: flows may not end."},
		bpf.NATCounterFLOWS_STALE:           {"flows-stale", "A container's flow ended, since the host lost the address that masquerade gave it, or routes it by another uplink; it began anew."},
		bpf.NATCounterFRAGMENTS_HELD:        {"fragments-held", "A fragment came before the first one of its datagram, and waits for that."},
		bpf.NATCounterFRAGMENTS_RELEASED:    {"fragments-released", "A fragment that had waited for the first one of its datagram went on."},
	}
}

// Counters reads all counters, drops first, in the order of the datapath.
func (s *State) Counters() ([]Count, error) {
	packets, err := sums(s.m.Counters, int(bpf.NATCounterCOUNTER_COUNT))
	if err != nil {
		return nil, fmt.Errorf("read counters: %w", err)
	}
	var counts []Count
	for i, w := range wordings() {
		if bpf.NATCounter(i) == bpf.NATCounterDROP_END {
			continue
		}
		counts = append(counts, Count{
			Name:    w.name,
			Text:    w.text,
			Drop:    bpf.NATCounter(i) < bpf.NATCounterDROP_END,
			Packets: packets[i],
		})
	}
	return counts, nil
}

// PortTries reads how many outside ports were tried for a flow before one was free: [n]
// counts the flows that got the port of try n, 0 being the one they asked for.
func (s *State) PortTries() ([]uint64, error) {
	tries, err := sums(s.m.PortTries, int(s.m.PortTries.MaxEntries()))
	if err != nil {
		return nil, fmt.Errorf("read port tries: %w", err)
	}
	return tries, nil
}

// sums adds up the first n elements of a per-CPU array, each over its CPUs.
func sums(m *ebpf.Map, n int) ([]uint64, error) {
	out := make([]uint64, n)
	for i := range out {
		var perCPU []uint64
		if err := m.Lookup(uint32(i), &perCPU); err != nil {
			return nil, err
		}
		for _, v := range perCPU {
			out[i] += v
		}
	}
	return out, nil
}
