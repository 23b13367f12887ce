package maps

import (
	"errors"
	"fmt"
	"net"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
)

// MAC is an Ethernet address; the zero value stands for none.
type MAC [6]byte

// String returns "02:42:ac:11:00:02", "" for none.
func (m MAC) String() string {
	if m == (MAC{}) {
		return ""
	}
	return net.HardwareAddr(m[:]).String()
}

// PortKey is an Ethernet address on a bridge.
type PortKey struct {
	Bridge uint32
	MAC    MAC
}

// Ports reads which port, by ifindex, owns which address.
func (s *State) Ports() (map[PortKey]uint32, error) {
	ports := make(map[PortKey]uint32)
	err := readAll(s.m.Ports, func(key bpf.NATPortKey, ifindex uint32) {
		ports[PortKey{key.Bridge, key.Mac}] = ifindex
	})
	if err != nil {
		return nil, fmt.Errorf("read ports: %w", err)
	}
	return ports, nil
}

// SetPorts replaces who owns which address. What stays is never missing meanwhile. The ports
// must be among the devices by then: a port without device has no fast path.
func (s *State) SetPorts(ports map[PortKey]uint32) error {
	have, err := s.Ports()
	if err != nil {
		return err
	}
	for key := range have {
		if _, stays := ports[key]; stays {
			continue
		}
		if err := s.m.Ports.Delete(key.raw()); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("delete port of %s: %w", key.MAC, err)
		}
	}
	for key, ifindex := range ports {
		if old, ok := have[key]; ok && old == ifindex {
			continue
		}
		if err := s.m.Ports.Put(key.raw(), ifindex); err != nil {
			return fmt.Errorf("write port %d of %s: %w", ifindex, key.MAC, err)
		}
	}
	return nil
}

func (k PortKey) raw() bpf.NATPortKey { return bpf.NATPortKey{Bridge: k.Bridge, Mac: k.MAC} }
