package maps

import (
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
)

// FlowFilter chooses flows. What is zero in it matches everything.
type FlowFilter struct {
	Protocol        Protocol
	Source          netip.Prefix // of the original direction's source
	Destination     netip.Prefix // of the original direction's destination
	DestinationPort uint16       // of the original direction
	Container       netip.Addr   // takes part in the flow by its own address
}

// Match tells whether the filter chooses f.
func (filter FlowFilter) Match(f Flow) bool {
	switch {
	case filter.Protocol != 0 && filter.Protocol != f.Original.Protocol,
		filter.Source.IsValid() && !filter.Source.Contains(f.Original.Src.Addr()),
		filter.Destination.IsValid() && !filter.Destination.Contains(f.Original.Dst.Addr()),
		filter.DestinationPort != 0 && filter.DestinationPort != f.Original.Dst.Port():
		return false
	case !filter.Container.IsValid():
		return true
	}
	// Who starts a flow is the original's source; who answers it sends the reply.
	return filter.Container == f.Original.Src.Addr() || filter.Container == f.Reply.Src.Addr()
}

// FlushFlows ends every flow that the filter chooses, at once, and returns how many. end is
// the program end_flow. Flows that ended by themselves meanwhile are not counted.
func (s *State) FlushFlows(end *ebpf.Program, filter FlowFilter) (n int, err error) {
	flows, _, err := s.Flows()
	if err != nil {
		return 0, err
	}
	for _, f := range flows {
		if f.State == FlowEnding || !filter.Match(f) {
			continue
		}
		status, err := end.Run(&ebpf.RunOptions{
			Context: bpf.NATExpiryEntry{Claim: toTuple(f.Reply), Id: f.ID},
		})
		if err != nil {
			return n, fmt.Errorf("end flow %d, %s: %w", f.ID, f.Original, err)
		}
		if status == 0 {
			n++
		}
	}
	return n, nil
}
