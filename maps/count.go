package maps

import (
	"fmt"

	"tcnat/bpf"
)

// Elements counts what is in the tables that packets fill, by map name: "flows" (two elements a
// flow, four where it is a hairpin), "mappings" (places that are not free), "moved_ports" (one for a mapping whose endpoint has
// not kept its own port).
func (s *State) Elements() (map[string]int, error) {
	var flows, moved int

	if err := readAll(s.m.Flows, func(bpf.NATTuple, bpf.NATHalf) { flows++ }); err != nil {
		return nil, fmt.Errorf("count flows: %w", err)
	}
	mappings, err := s.countMappings()
	if err != nil {
		return nil, err
	}
	if err := readAll(s.m.MovedPorts, func(bpf.NATEndpoint, bpf.NATMovedPort) { moved++ }); err != nil {
		return nil, fmt.Errorf("count moved ports: %w", err)
	}
	return map[string]int{bpf.NATMapFlows: flows, bpf.NATMapMappings: mappings, bpf.NATMapMovedPorts: moved}, nil
}

// countMappings counts the outside ports that endpoints have.
func (s *State) countMappings() (n int, err error) {
	err = readAll(s.m.Mappings, func(_ uint32, m bpf.NATMapping) {
		if uint32(m.Hold) != 0 {
			n++
		}
	})
	if err != nil {
		return 0, fmt.Errorf("count mappings: %w", err)
	}
	return n, nil
}
