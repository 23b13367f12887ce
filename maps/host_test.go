package maps

import (
	"net/netip"
	"testing"

	"tcnat/bpf"
)

func TestHostAddresses(t *testing.T) {
	s := newState(t)
	for _, want := range []map[netip.Addr]uint32{
		{addr("203.0.113.2"): 2, addr("2001:db8::2"): 2},
		{addr("203.0.113.3"): 3},
		{},
	} {
		if err := s.SetHostAddresses(want); err != nil {
			t.Fatal(err)
		}
		if d := diff(want, must[map[netip.Addr]uint32](t)(s.HostAddresses())); d != "" {
			t.Error(d)
		}
	}
}

// A peer has ended when its rule has, and the others are not touched by forgetting it.
func TestHostPeers(t *testing.T) {
	s := newState(t)
	if peers, err := s.HostPeers(); err != nil || len(peers) != 0 {
		t.Fatalf("at first %v, error %v", peers, err)
	}
	if err := s.SetRules(Rules{DNAT: []DNATRule{
		{Protocol: TCP, Ports: SinglePort(3005), To: addr("172.17.0.2"), ToPorts: SinglePort(80)},
		{Protocol: UDP, Ports: SinglePort(53), To: addr("fd17::2")},
	}}); err != nil {
		t.Fatal(err)
	}
	rules := must[Rules](t)(s.Rules())
	var want []HostPeer
	for i, r := range rules.DNAT {
		peer := HostPeer{
			Cookie: uint64(77 + i), Published: netip.AddrPortFrom(addr("::1"), r.Ports.First),
			To: netip.AddrPortFrom(r.To, r.effectivePorts().First), Connected: i == 0, Rule: r.ID,
		}
		want = append(want, peer)
		generation, err := s.generation(r.ID)
		if err != nil {
			t.Fatal(err)
		}
		value := bpf.NATHostPeer{Published: toAddr(addr("::1")), Port: swapPort(r.Ports.First), Rule: r.ID, Generation: generation}
		if peer.Connected {
			value.Connected = 1
		}
		key := bpf.NATHostPeerKey{Cookie: peer.Cookie, Addr: toAddr(r.To), Port: swapPort(peer.To.Port())}
		if err := s.m.HostPeers.Put(key, value); err != nil {
			t.Fatal(err)
		}
	}
	byCookie := func(peers []HostPeer) map[uint64]HostPeer {
		all := map[uint64]HostPeer{}
		for _, p := range peers {
			all[p.Cookie] = p
		}
		return all
	}
	if d := diff(byCookie(want), byCookie(must[[]HostPeer](t)(s.HostPeers()))); d != "" {
		t.Error(d)
	}
	if ended := must[[]HostPeer](t)(s.EndedHostPeers()); len(ended) != 0 {
		t.Errorf("ended with their rules in force: %v", ended)
	}
	if changed, err := s.DeleteDNAT(DNATRule{Protocol: rules.DNAT[0].Protocol, Ports: rules.DNAT[0].Ports}); err != nil || !changed {
		t.Fatalf("changed %v, error %v", changed, err)
	}
	ended := must[[]HostPeer](t)(s.EndedHostPeers())
	if d := diff(want[:1], ended); d != "" {
		t.Error(d)
	}
	for range 2 { // what is not there is done
		if err := s.ForgetHostPeers(ended); err != nil {
			t.Fatal(err)
		}
	}
	if d := diff(want[1:], must[[]HostPeer](t)(s.HostPeers())); d != "" {
		t.Error(d)
	}
}
