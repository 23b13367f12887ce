package e2e

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// The largest datagrams that there are.
func largest(f lab.Family) int {
	if f == lab.IPv6 {
		return 65487
	}
	return 65507
}

// fragmentHosts are hosts that treat fragments differently: conntrack puts datagrams together before they are
// routed, with bridge-nf-call-iptables=1 on the bridge already, and the host cuts them again.
func fragmentHosts() []fragmentHost {
	return []fragmentHost{{name: "plain"}, {name: "conntrack", tracks: true}, {name: "conntrack on the bridge", tracks: true, bridge: true}}
}

type fragmentHost struct {
	name   string
	tracks bool
	bridge bool
}

func (h fragmentHost) rig(t *testing.T, o lab.Options) *rig {
	t.Helper()
	o.BridgeNetfilter = h.bridge
	r := newRig(t, o)
	if h.tracks {
		nft(t, r.Host, "table inet tracks { chain forward { type filter hook forward priority filter; ct state established accept; }; }")
	}
	return r
}

// Datagrams of any size, and pings, out and in and from container to container.
func TestFragments(t *testing.T) {
	for _, host := range fragmentHosts() {
		for _, mode := range []loader.AttachMode{loader.TCX, loader.Clsact} {
			t.Run(name(host.name, mode), func(t *testing.T) {
				if mode == loader.TCX {
					needTCX(t)
				}
				r := host.rig(t, lab.Options{Containers: 2})
				r.attach(t, loader.AttachOptions{Mode: mode, FastPath: loader.FastPathEstablished})
				leak := watch(t, r.Router, "eth0", func(p lab.Packet) bool { return !p.Outgoing && leaks(p) })
				for _, f := range lab.Families() {
					t.Run(f.String(), func(t *testing.T) { carryLarge(t, r, f, host) })
				}
				mustSeeNothing(t, leak, "left the host")
				r.mustCarryFragments(t)
			})
		}
	}
}

// mustCarryFragments fails the test if the datapath has dropped anything but the host's own redirects.
func (r *rig) mustCarryFragments(t *testing.T) {
	t.Helper()
	drops := r.drops(t)
	delete(drops, "hairpin-redirect")
	if len(drops) > 0 {
		t.Errorf("dropped: %v", drops)
	}
}

func carryLarge(t *testing.T, r *rig, f lab.Family, host fragmentHost) {
	client, server := r.Containers[0], r.Containers[1]
	outside, inside := at(r.World.Loopback(f), 7000), at(server.Addr(f), 7000)
	for _, n := range []struct {
		node *lab.Node
		at   netip.AddrPort
	}{{r.World, outside}, {server, inside}} {
		echo, err := lab.StartUDPEcho(n.node, n.at)
		if err != nil {
			t.Fatal(err)
		}
		defer echo.Close()
	}
	r.publish(t, maps.SinglePort(8000), inside.Addr(), maps.SinglePort(inside.Port()))
	published := at(r.Host.Addr(f), 8000)
	random := rand.New(rand.NewPCG(1, uint64(f)))
	for _, size := range []int{100, 1473, 3000, largest(f)} {
		payload := randomBytes(size, random)
		for _, way := range []struct {
			name string
			from *lab.Node
			to   netip.AddrPort
		}{{"out", client, outside}, {"in", r.World, published}, {"hairpin", client, published}, {"hairpin to itself", server, published}} {
			if host.bridge && way.to == published && way.from != r.World {
				continue // not on a host that tracks what the bridge carries
			}
			if _, err := lab.ExchangeUDP(t.Context(), way.from, netip.AddrPort{}, way.to, payload); err != nil {
				t.Errorf("%d bytes, %s: %v", size, way.name, err)
			}
		}
	}
	mustPing(t, client, outside.Addr(), lab.PingOptions{Size: 60000})
}

// Fragments in whatever order they come.
func TestFragmentOrder(t *testing.T) {
	const size = 512
	random := rand.New(rand.NewPCG(2, 3))
	for _, host := range fragmentHosts() {
		t.Run(host.name, func(t *testing.T) {
			r := host.rig(t, lab.Options{Containers: 2})
			r.attach(t, loader.AttachOptions{})
			for _, f := range lab.Families() {
				client, server := r.Containers[0], r.Containers[1]
				outside, inside := at(r.World.Loopback(f), 7000), at(server.Addr(f), 7000)
				for _, n := range []struct {
					node *lab.Node
					at   netip.AddrPort
				}{{r.World, outside}, {server, inside}, {r.Host, at(r.Host.Addr(f), 9000)}} {
					echo, err := lab.StartUDPEcho(n.node, n.at)
					if err != nil {
						t.Fatal(err)
					}
					defer echo.Close()
				}
				r.publish(t, maps.SinglePort(8000), inside.Addr(), maps.SinglePort(inside.Port()))
				for _, way := range []struct {
					name string
					from *lab.Node
					src  netip.Addr
					to   netip.AddrPort
				}{
					{"out", client, client.Addr(f), outside},
					{"in", r.World, r.World.Addr(f), at(r.Host.Addr(f), 8000)},
					{"hairpin", client, client.Addr(f), at(r.Host.Addr(f), 8000)},
					{"to the host from outside", r.World, r.World.Addr(f), at(r.Host.Addr(f), 9000)},
					{"to the host from a container", client, client.Addr(f), at(r.Host.Addr(f), 9000)},
				} {
					if host.bridge && way.name == "hairpin" {
						continue
					}
					c := newCaller(t, way.from, at(way.src, uint16(20000+random.IntN(10000))))
					for i, order := range [][]int{{0, 1, 2, 3, 4}, {4, 3, 2, 1, 0}, {1, 0, 4, 2, 3}, random.Perm(5), random.Perm(5), random.Perm(5)} {
						d := datagram{c.src, way.to, random.Uint32(), randomBytes(4*size+100+random.IntN(300), random)}
						parts := d.cut(size)
						for _, n := range order {
							c.raw.send(t, parts[n])
						}
						if !c.hears(d.payload, 2*time.Second) {
							t.Errorf("%s, %s, order %d %v: no answer; dropped: %v", f, way.name, i, order, r.drops(t))
						}
					}
				}
			}
			r.mustCarryFragments(t)
			if held, released := r.counter(t, "fragments-held"), r.counter(t, "fragments-released"); held != released || held == 0 {
				t.Errorf("held %d fragments, released %d", held, released)
			}
		})
	}
}

// The host cuts what is too large for its uplink, and a router what is too large for the next hop.
func TestFragmentsOfRouters(t *testing.T) {
	const mtu = 1300
	for _, host := range fragmentHosts() {
		t.Run(host.name, func(t *testing.T) {
			r := host.rig(t, lab.Options{HopMTU: mtu - 20})
			ip(t, r.Host, fmt.Sprintf("link set eth0 mtu %d", mtu))
			ip(t, r.Router, fmt.Sprintf("link set eth0 mtu %d", mtu))
			var err error
			if r.sysctls, err = r.Host.Sysctls(); err != nil {
				t.Fatal(err)
			}
			r.attach(t, loader.AttachOptions{})
			to := r.World.Loopback(lab.IPv4)
			leak := watch(t, r.Router, "eth0", func(p lab.Packet) bool { return !p.Outgoing && leaks(p) })
			cut := watch(t, r.Router, "eth0", func(p lab.Packet) bool { return !p.Outgoing && p.Fragment })
			for _, size := range []int{1250, 1400, 1472} {
				mustPing(t, r.Containers[0], to, lab.PingOptions{Size: size})
			}
			mustPing(t, r.Containers[0], to, lab.PingOptions{Size: 20000})
			if err := cut.Close(); err != nil || len(cut.Packets()) == 0 {
				t.Errorf("no fragment left the host (%v)", err)
			}
			mustSeeNothing(t, leak, "left the host")
			r.mustNotDrop(t)
		})
	}
}

