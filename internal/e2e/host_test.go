package e2e

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// hostServer is an echo server of a container for TCP and UDP on talkPort.
func hostServer(t *testing.T, c *lab.Node, f lab.Family) (tcp, udp *lab.Echo) {
	t.Helper()
	tcp, err := lab.StartTCPEcho(t.Context(), c, at(c.Addr(f), talkPort))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tcp.Close)
	udp, err = lab.StartUDPEcho(c, at(c.Addr(f), talkPort))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(udp.Close)
	return tcp, udp
}

func lastPeer(t *testing.T, e *lab.Echo) netip.Addr {
	t.Helper()
	peers := e.Peers()
	if len(peers) == 0 {
		t.Fatal("the server saw nobody")
	}
	return peers[len(peers)-1].Addr()
}

// The host reaches a published port by each of its addresses, and reads the address that it named;
// the container sees the bridge's address. On the fast path or off it, nothing is dropped.
func TestHostReachesPublished(t *testing.T) {
	for _, fast := range []loader.FastPath{loader.FastPathOff, loader.FastPathEstablished, loader.FastPathAlways} {
		t.Run(fast.String(), func(t *testing.T) {
			r, _ := newHostRig(t, lab.Options{}, loader.AttachOptions{FastPath: fast})
			c := r.Containers[0]
			for _, f := range lab.Families() {
				r.publish(t, maps.SinglePort(3005), c.Addr(f), maps.SinglePort(talkPort))
				r.publish(t, maps.PortRange{First: 8000, Last: 8099}, c.Addr(f), maps.PortRange{First: talkPort - 50, Last: talkPort + 49})
				tcp, udp := hostServer(t, c, f)
				for which, address := range ownAddresses(r, f) {
					for _, port := range []uint16{3005, 8050} {
						to := at(address, port)
						for _, inet6 := range []bool{false, true} {
							if f == lab.IPv6 && !inet6 || which == "unspecified" && f == lab.IPv4 && inet6 {
								continue
							}
							t.Run(name(f, which, port, "inet6", inet6), func(t *testing.T) {
								mustConnect(t, r, to, inet6, unix.SOCK_STREAM)
								mustConnect(t, r, to, inet6, unix.SOCK_DGRAM)
								mustSend(t, r, to, inet6)
								for _, server := range []*lab.Echo{tcp, udp} {
									if seen := lastPeer(t, server); seen != lab.BridgeAddr(f) {
										t.Errorf("the container saw %s, want the bridge's address", seen)
									}
								}
							})
						}
					}
				}
			}
			r.mustNotDrop(t)
		})
	}
}

// mustConnect talks over a connected socket.
func mustConnect(t *testing.T, r *rig, to netip.AddrPort, inet6 bool, kind int) {
	t.Helper()
	s := newSocket(t, r.Host, kind, inet6)
	if err := s.connect(to); err != nil {
		t.Errorf("connect to %s: %v", to, err)
		return
	}
	if err := s.ask("hello"); err != nil {
		t.Errorf("over %s: %v", to, err)
	}
	if peer := s.peer(t); peer != s.named(to) {
		t.Errorf("peer is %s, want %s", peer, s.named(to))
	}
	if kind != unix.SOCK_DGRAM {
		return
	}
	if _, err := unix.Write(s.fd, []byte("again")); err != nil {
		t.Error(err)
	}
	if _, from, err := s.receive(); err != nil || from != s.named(to) {
		t.Errorf("an answer is from %s, want %s; error %v", from, s.named(to), err)
	}
}

// mustSend talks over a socket that is not connected.
func mustSend(t *testing.T, r *rig, to netip.AddrPort, inet6 bool) {
	t.Helper()
	s := newSocket(t, r.Host, unix.SOCK_DGRAM, inet6)
	for _, text := range []string{"hello", "again"} {
		if err := s.sendTo(to, text); err != nil {
			t.Errorf("send to %s: %v", to, err)
			return
		}
		got, from, err := s.receive()
		if err != nil || got != text || from != s.named(to) {
			t.Errorf("sent %q to %s, got %q from %s, want it from %s; error %v", text, to, got, from, s.named(to), err)
		}
	}
}

// A container that has IPv4 alone is reached by the host's IPv6 addresses too, over connected
// sockets. Datagrams one by one the kernel would refuse, so they are left alone.
func TestHostIPv6ToIPv4Container(t *testing.T) {
	r, _ := newHostRig(t, lab.Options{}, loader.AttachOptions{})
	c := r.Containers[0]
	r.publish(t, maps.SinglePort(3005), c.Addr(lab.IPv4), maps.SinglePort(talkPort))
	tcp, udp := hostServer(t, c, lab.IPv4)
	for which, address := range ownAddresses(r, lab.IPv6) {
		t.Run(which, func(t *testing.T) {
			to := at(address, 3005)
			mustConnect(t, r, to, true, unix.SOCK_STREAM)
			mustConnect(t, r, to, true, unix.SOCK_DGRAM)
			for _, server := range []*lab.Echo{tcp, udp} {
				if seen := lastPeer(t, server); seen != lab.BridgeAddr(lab.IPv4) {
					t.Errorf("the container saw %s", seen)
				}
			}
			seen := len(udp.Peers())
			s := newSocket(t, r.Host, unix.SOCK_DGRAM, true)
			if err := s.sendTo(to, "hello"); err != nil {
				t.Errorf("send to %s: %v", to, err)
			}
			if len(udp.Peers()) != seen {
				t.Error("the datagram came to the container")
			}
		})
	}
	// Native IPv6 wins where there is a rule for it.
	r.publish(t, maps.SinglePort(3005), c.Addr(lab.IPv6), maps.SinglePort(talkPort))
	tcp6, _ := hostServer(t, c, lab.IPv6)
	mustConnect(t, r, at(netip.IPv6Loopback(), 3005), true, unix.SOCK_STREAM)
	if seen := lastPeer(t, tcp6); seen != lab.BridgeAddr(lab.IPv6) {
		t.Errorf("the container saw %s", seen)
	}
	r.mustNotDrop(t)
}

// A rule for an address holds for that address; one for a loopback address holds for the host
// alone. The device that a rule names is none of the host's own sockets', and lists of
// sources do not hold for them.
func TestHostRules(t *testing.T) {
	r, _ := newHostRig(t, lab.Options{}, loader.AttachOptions{})
	c, f := r.Containers[0], lab.IPv4
	hostServer(t, c, f)
	uplink, err := r.Host.Ifindex(lab.Uplink)
	if err != nil {
		t.Fatal(err)
	}
	loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	rule := func(port uint16, edit func(*maps.DNATRule)) {
		r.rules(t, func(rules *maps.Rules) error {
			rule := maps.DNATRule{Protocol: maps.TCP, Ports: maps.SinglePort(port), To: c.Addr(f), ToPorts: maps.SinglePort(talkPort)}
			edit(&rule)
			_, err := rules.AddDNAT(rule)
			return err
		})
	}
	resolver := netip.AddrFrom4([4]byte{127, 0, 0, 53})
	rule(1000, func(*maps.DNATRule) {})
	rule(1005, func(rule *maps.DNATRule) { rule.Destination = resolver })
	rule(1001, func(rule *maps.DNATRule) { rule.Destination = loopback })
	rule(1002, func(rule *maps.DNATRule) { rule.Destination = r.Host.Addr(f) })
	rule(1003, func(rule *maps.DNATRule) { rule.Ingress = uint32(uplink) })
	rule(1004, func(rule *maps.DNATRule) { rule.Allow = []netip.Prefix{netip.MustParsePrefix("192.0.2.77/32")} })
	for _, test := range []struct {
		port    uint16
		address netip.Addr
		reached bool
	}{
		{1000, loopback, true},
		{1000, resolver, false}, // where somebody else listens, perhaps
		{1005, resolver, true},
		{1001, loopback, true},
		{1001, netip.AddrFrom4([4]byte{127, 0, 0, 2}), false},
		{1001, r.Host.Addr(f), false},
		{1002, r.Host.Addr(f), true},
		{1002, loopback, false},
		{1002, lab.BridgeAddr(f), false},
		{1003, r.Host.Addr(f), false},
		{1003, loopback, false},
		{1004, r.Host.Addr(f), true},
		{1004, loopback, true},
		{1004, r.World.Addr(f), false}, // not the host's
	} {
		s := newSocket(t, r.Host, unix.SOCK_STREAM, false)
		err := s.connect(at(test.address, test.port))
		if test.reached && err != nil || !test.reached && !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s port %d: reached %v wanted, error %v", test.address, test.port, test.reached, err)
		}
	}
	// The rule for 127.0.0.1 holds for nobody else.
	for _, test := range []struct {
		client *lab.Node
		to     netip.Addr
	}{{r.World, r.Host.Addr(f)}, {c, r.Host.Addr(f)}, {c, lab.BridgeAddr(f)}} {
		if _, err := lab.ExchangeTCP(t.Context(), test.client, at(test.to, 1001), []byte("x")); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s to %s: %v", test.client.Role, test.to, err)
		}
	}
	r.mustNotDrop(t)
}

// A socket that is bound to one of the host's addresses keeps it. One that is bound to a loopback
// address, or to another device, cannot reach the container: it is left to what listens on
// the host.
func TestHostBoundSocket(t *testing.T) {
	r, _ := newHostRig(t, lab.Options{}, loader.AttachOptions{})
	c := r.Containers[0]
	for _, f := range lab.Families() {
		t.Run(f.String(), func(t *testing.T) {
			r.publish(t, maps.SinglePort(3005), c.Addr(f), maps.SinglePort(talkPort))
			tcp, udp := hostServer(t, c, f)
			loopback := ownAddresses(r, f)["loopback"]
			to := at(loopback, 3005)
			for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM} {
				s := newSocket(t, r.Host, kind, f == lab.IPv6)
				s.bind(t, at(r.Host.Addr(f), 0))
				if err := errors.Join(s.connect(to), s.ask("x")); err != nil {
					t.Errorf("bound to %s: %v", r.Host.Addr(f), err)
				}
				if seen := lastPeer(t, map[int]*lab.Echo{unix.SOCK_STREAM: tcp, unix.SOCK_DGRAM: udp}[kind]); seen != r.Host.Addr(f) {
					t.Errorf("the container saw %s, want %s", seen, r.Host.Addr(f))
				}
			}
			s := newSocket(t, r.Host, unix.SOCK_DGRAM, f == lab.IPv6)
			s.bind(t, at(r.Host.Addr(f), 0))
			if err := s.sendTo(at(r.Host.Addr(f), 3005), "x"); err != nil {
				t.Error(err)
			}
			if _, from, err := s.receive(); err != nil || from != at(r.Host.Addr(f), 3005) {
				t.Errorf("from %s, error %v", from, err)
			}

			confined := func(kind int) []*rawSocket {
				bound, onDevice := newSocket(t, r.Host, kind, f == lab.IPv6), newSocket(t, r.Host, kind, f == lab.IPv6)
				bound.bind(t, at(loopback, 0))
				if err := unix.BindToDevice(onDevice.fd, "lo"); err != nil {
					t.Fatal(err)
				}
				return []*rawSocket{bound, onDevice}
			}
			for _, s := range confined(unix.SOCK_STREAM) {
				if err := s.connect(to); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("connect: %v, want it refused as where nothing is published", err)
				}
			}
			local, err := lab.StartUDPEcho(r.Host, to) // as docker-proxy would be there
			if err != nil {
				t.Fatal(err)
			}
			defer local.Close()
			for i, s := range confined(unix.SOCK_DGRAM) {
				if err := s.sendTo(to, "x"); err != nil {
					t.Error(err)
				}
				if _, from, err := s.receive(); err != nil || from != to || len(local.Peers()) != i+1 {
					t.Errorf("from %s, error %v, %v came to the host's own server", from, err, local.Peers())
				}
			}
		})
	}
	r.mustNotDrop(t)
}

// What listens on the host itself is hidden by a published port, and sockets of other network
// namespaces in the same cgroup are let alone. Another instance shares the cgroup.
func TestHostAndOthers(t *testing.T) {
	r, cgroup := newHostRig(t, lab.Options{}, loader.AttachOptions{})
	c, f := r.Containers[0], lab.IPv4
	r.publish(t, maps.SinglePort(3005), c.Addr(f), maps.SinglePort(talkPort))
	tcp, _ := hostServer(t, c, f)
	to := at(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 3005)
	for _, n := range []*lab.Node{r.Host, r.World, c} {
		own, err := lab.StartTCPEcho(t.Context(), n, to)
		if err != nil {
			t.Fatal(err)
		}
		defer own.Close()
		if _, err := lab.ExchangeTCP(t.Context(), n, to, []byte("x")); err != nil {
			t.Errorf("%s: %v", n.Role, err)
		}
		if hidden := len(own.Peers()) == 0; hidden != (n == r.Host) {
			t.Errorf("%s: its own server saw %v", n.Role, own.Peers())
		}
	}
	if len(tcp.Peers()) != 1 {
		t.Errorf("the container saw %v, want the host once", tcp.Peers())
	}

	other := newRig(t, lab.Options{})
	other.attach(t, loader.AttachOptions{Cgroup: cgroup})
	d := other.Containers[0]
	other.publish(t, maps.SinglePort(3005), d.Addr(f), maps.SinglePort(talkPort))
	theirs, _ := hostServer(t, d, f)
	for _, host := range []*lab.Node{r.Host, other.Host} {
		if _, err := lab.ExchangeTCP(t.Context(), host, to, []byte("x")); err != nil {
			t.Error(err)
		}
	}
	if len(tcp.Peers()) != 2 || len(theirs.Peers()) != 1 {
		t.Errorf("the containers saw %v and %v", tcp.Peers(), theirs.Peers())
	}
	other.detach(t)
	mustConnect(t, r, to, false, unix.SOCK_STREAM)
}
