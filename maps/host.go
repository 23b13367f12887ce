package maps

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
)

// HostAddresses returns the host's own addresses that rules without a destination hold for when
// one of its own sockets or a container names them, and the ifindex of each one's device. 127.0.0.1 and ::1 are
// not among them: rules hold for those anyway.
func (s *State) HostAddresses() (map[netip.Addr]uint32, error) {
	addresses := map[netip.Addr]uint32{}
	err := readAll(s.m.HostAddresses, func(a bpf.NATAddr, ifindex uint32) { addresses[fromAddr(a)] = ifindex })
	if err != nil {
		return nil, fmt.Errorf("read addresses of the host: %w", err)
	}
	return addresses, nil
}

// SetHostAddresses says what HostAddresses returns. Those that stay are not touched.
func (s *State) SetHostAddresses(addresses map[netip.Addr]uint32) error {
	want := map[bpf.NATAddr]uint32{}
	for a, ifindex := range addresses {
		want[toAddr(a)] = ifindex
	}
	err := setAll(s.m.HostAddresses, want, func(bpf.NATAddr) bool { return true })
	if err != nil {
		return fmt.Errorf("addresses of the host: %w", err)
	}
	return nil
}

// HostPeer is a socket of the host and a container that it was led to.
type HostPeer struct {
	Cookie    uint64         // the kernel's number of the socket
	Published netip.AddrPort // what the socket named
	To        netip.AddrPort // what it was led to
	Connected bool           // false: it has sent datagrams there one by one
	Rule      uint32         // id of the rule that led it there
}

// HostPeers reads what the host's sockets were led to, sockets that are closed since included.
func (s *State) HostPeers() ([]HostPeer, error) {
	peers, err := s.hostPeers(func(bpf.NATHostPeer) bool { return true })
	if err != nil {
		return nil, fmt.Errorf("read peers of the host: %w", err)
	}
	return peers, nil
}

// EndedHostPeers are those whose rule has gone.
func (s *State) EndedHostPeers() ([]HostPeer, error) {
	generations := map[uint32]uint32{}
	var bad error
	peers, err := s.hostPeers(func(p bpf.NATHostPeer) bool {
		if _, known := generations[p.Rule]; !known {
			generation, err := s.generation(p.Rule)
			bad = errors.Join(bad, err)
			generations[p.Rule] = generation
		}
		return generations[p.Rule] != p.Generation
	})
	if err = errors.Join(err, bad); err != nil {
		return nil, fmt.Errorf("read peers of the host: %w", err)
	}
	return peers, nil
}

func (s *State) hostPeers(wanted func(bpf.NATHostPeer) bool) ([]HostPeer, error) {
	// Most of the time there is none, and this tells it without room for many.
	if err := s.m.HostPeers.NextKey(nil, new(bpf.NATHostPeerKey)); errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, nil
	}
	var peers []HostPeer
	err := readAll(s.m.HostPeers, func(k bpf.NATHostPeerKey, p bpf.NATHostPeer) {
		if !wanted(p) {
			return
		}
		peers = append(peers, HostPeer{
			Cookie:    k.Cookie,
			Published: netip.AddrPortFrom(fromAddr(p.Published), swapPort(p.Port)),
			To:        netip.AddrPortFrom(fromAddr(k.Addr), swapPort(k.Port)),
			Connected: p.Connected != 0,
			Rule:      p.Rule,
		})
	})
	return peers, err
}

// ForgetHostPeers deletes what is noted of sockets. One that is not there is done.
func (s *State) ForgetHostPeers(peers []HostPeer) error {
	for _, p := range peers {
		key := bpf.NATHostPeerKey{Cookie: p.Cookie, Addr: toAddr(p.To.Addr()), Port: swapPort(p.To.Port())}
		if err := s.m.HostPeers.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget a peer of the host: %w", err)
		}
	}
	return nil
}
