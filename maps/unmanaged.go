package maps

import "fmt"

// Unmanaged tells by which devices without programs container traffic would have left, and
// how many packets were dropped for it, by ifindex.
func (s *State) Unmanaged() (map[uint32]uint64, error) {
	packets := map[uint32]uint64{}

	err := readAll(s.m.Unmanaged, func(ifindex uint32, n uint64) { packets[ifindex] = n })
	if err != nil {
		return nil, fmt.Errorf("read unmanaged devices: %w", err)
	}
	return packets, nil
}
