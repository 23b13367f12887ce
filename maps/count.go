package maps

import (
	"fmt"

	"tcnat/bpf"
)

// Elements counts the raw elements of the tables that packets fill, by map name: "flows"
// (two a flow) and "mappings" (one or two a mapping).
func (s *State) Elements() (map[string]int, error) {
	var flows, mappings int

	if err := readAll(s.m.Flows, func(bpf.NATTuple, bpf.NATHalf) { flows++ }); err != nil {
		return nil, fmt.Errorf("count flows: %w", err)
	}
	if err := readAll(s.m.Mappings, func(bpf.NATMappingKey, bpf.NATMapping) { mappings++ }); err != nil {
		return nil, fmt.Errorf("count mappings: %w", err)
	}
	return map[string]int{bpf.NATMapFlows: flows, bpf.NATMapMappings: mappings}, nil
}
