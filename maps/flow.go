package maps

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"tcnat/bpf"
)

// Tuple is one direction of a flow. ICMP echo has its id as the port of whoever asked.
type Tuple struct {
	Protocol Protocol
	Src, Dst netip.AddrPort
}

// String returns "tcp 172.17.0.2:40000 > 1.1.1.1:443".
func (t Tuple) String() string {
	return fmt.Sprintf("%s %s > %s", t.Protocol, t.Src, t.Dst)
}

func (t Tuple) compare(o Tuple) int {
	return cmp.Or(
		cmp.Compare(t.Protocol, o.Protocol),
		t.Src.Compare(o.Src),
		t.Dst.Compare(o.Dst),
	)
}

// Translation is what is done to a flow's packets.
type Translation uint8

// The translations. Identity keeps the addresses.
const (
	Identity = Translation(bpf.NATTranslationTRANSLATION_IDENTITY)
	SNAT     = Translation(bpf.NATTranslationTRANSLATION_SNAT)
	DNAT     = Translation(bpf.NATTranslationTRANSLATION_DNAT)
	Hairpin  = Translation(bpf.NATTranslationTRANSLATION_HAIRPIN) // both: a container speaks to a published port
)

// String returns "identity", "snat", "dnat" or "hairpin".
func (t Translation) String() string {
	switch t {
	case Identity:
		return "identity"
	case SNAT:
		return "snat"
	case DNAT:
		return "dnat"
	case Hairpin:
		return "hairpin"
	}
	return fmt.Sprintf("translation %d", uint8(t))
}

// Traffic is what one direction has carried.
type Traffic struct {
	Packets, Bytes uint64
}

// Flow is a bidirectional conversation.
type Flow struct {
	ID          uint32
	Translation Translation

	// Original is the direction of the first packet, Reply the other, each as its packets
	// come to us: a packet leaves as the inverse of the other direction.
	Original, Reply Tuple

	State   FlowState
	Ifindex uint32  // the device that the original direction comes in by; 0: any
	Rule    uint32  // id of the rule that made it; 0: none
	Out, In Traffic // of the original direction, of the reply

	// FastOut and FastIn tell whether the two directions are on the fast path, or why not.
	FastOut, FastIn Lease

	Idle    time.Duration // since the last packet of either direction
	Timeout time.Duration // until it ends if no packet comes
}

// Flows reads all flows, sorted by their original direction. unpaired counts the halves
// whose other half was not there: a flow that came or went meanwhile, unless they stay.
func (s *State) Flows() (flows []Flow, unpaired int, err error) {
	raw, err := s.rawConfig()
	if err != nil {
		return nil, 0, err
	}
	halves := map[bpf.NATTuple]bpf.NATHalf{}
	err = readAll(s.m.Flows, func(k bpf.NATTuple, h bpf.NATHalf) {
		if h.Role != bpf.NATRoleROLE_TRANSIT {
			halves[k] = h
		}
	})
	if err != nil {
		return nil, 0, fmt.Errorf("read flows: %w", err)
	}
	now, err := monotonic()
	if err != nil {
		return nil, 0, err
	}
	j := judge{
		now: stampOf(now), timeouts: raw.Timeout, generations: map[uint32]uint32{},
		fastPath: FastPath(raw.FastPath),
	}
	for key, original := range halves {
		if original.Role != bpf.NATRoleROLE_ORIGINAL {
			continue
		}
		reply, ok := halves[original.Other]
		if !ok || reply.Standing.Id != original.Standing.Id || reply.Role != bpf.NATRoleROLE_REPLY {
			continue
		}
		if err := j.learn(s, original.Rule); err != nil {
			return nil, 0, err
		}
		flows = append(flows, j.flow(key, original, reply))
	}
	slices.SortFunc(flows, func(a, b Flow) int {
		return cmp.Or(a.Original.compare(b.Original), cmp.Compare(a.ID, b.ID))
	})
	return flows, len(halves) - 2*len(flows), nil
}
