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
			if host.bridge && f == lab.IPv6 && way.to == published && way.from != r.World && size > 1452 {
				continue // joined on the bridge, it is too large for where it goes: docs/datapath.md
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
					if host.bridge && f == lab.IPv6 && way.name == "hairpin" {
						continue // as above
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

// By an uplink without a link header, too, in whatever order.
func TestFragmentsByTunnel(t *testing.T) {
	random := rand.New(rand.NewPCG(8, 9))
	r := newRig(t, lab.Options{TunUplink: true})
	r.attach(t, loader.AttachOptions{Uplinks: []string{lab.Uplink, lab.TunUplink}})
	for _, f := range lab.Families() {
		far, inside := at(r.Far.Loopback(f), 7000), at(r.Containers[0].Addr(f), 7000)
		for _, n := range []struct {
			node *lab.Node
			at   netip.AddrPort
		}{{r.Far, far}, {r.Containers[0], inside}} {
			echo, err := lab.StartUDPEcho(n.node, n.at)
			if err != nil {
				t.Fatal(err)
			}
			defer echo.Close()
		}
		r.publish(t, maps.SinglePort(8000), inside.Addr(), maps.SinglePort(inside.Port()))
		for _, way := range []struct {
			from *lab.Node
			src  netip.Addr
			to   netip.AddrPort
		}{{r.Containers[0], inside.Addr(), far}, {r.Far, r.Far.Addr(f), at(lab.TunAddr(f), 8000)}} {
			if _, err := lab.ExchangeUDP(t.Context(), way.from, netip.AddrPort{}, way.to, randomBytes(10000, random)); err != nil {
				t.Error(err)
			}
			c := newCaller(t, way.from, at(way.src, 20000))
			d := datagram{c.src, way.to, random.Uint32(), randomBytes(1200, random)}
			parts := d.cut(512)
			c.raw.send(t, parts[2], parts[1], parts[0])
			if !c.hears(d.payload, 2*time.Second) {
				t.Errorf("%s > %s: no answer", c.src, way.to)
			}
		}
	}
	r.mustNotDrop(t)
	if held, released := r.counter(t, "fragments-held"), r.counter(t, "fragments-released"); held != released || held == 0 {
		t.Errorf("held %d fragments, released %d", held, released)
	}
}

// Floods of first fragments, and of others, from outside and from a container, leave pings and datagrams in
// fragments of others alone, mostly: some may be lost when there is no room.
func TestFragmentFloods(t *testing.T) {
	r := newRig(t, lab.Options{Containers: 2})
	r.attach(t, loader.AttachOptions{})
	leak := watch(t, r.Router, "eth0", func(p lab.Packet) bool { return !p.Outgoing && leaks(p) })
	for _, f := range lab.Families() {
		good, bad := r.Containers[0], r.Containers[1]
		outside := at(r.World.Loopback(f), 7000)
		echo, err := lab.StartUDPEcho(r.World, outside)
		if err != nil {
			t.Fatal(err)
		}
		defer echo.Close()
		inward, outward := newRawSender(t, r.World, f), newRawSender(t, bad, f)
		for i := range uint32(3000) {
			for k := range uint32(2) {
				in := datagram{at(r.World.Addr(f), 5000), at(r.Host.Addr(f), 3005), 2*i + k, make([]byte, 80)}
				out := datagram{at(bad.Addr(f), 5000), outside, 2*i + k, make([]byte, 80)}
				inward.send(t, in.cut(40)[k])
				outward.send(t, out.cut(40)[k])
			}
			if i%500 == 0 {
				if _, err := lab.ExchangeUDP(t.Context(), good, netip.AddrPort{}, outside, make([]byte, largest(f))); err != nil {
					t.Errorf("after %d datagrams of a flood: %v", i, err)
				}
			}
		}
		poll(t, "nobody waits any more", func() bool {
			return r.counter(t, "fragments-held") == r.counter(t, "fragments-released")+r.counter(t, "fragment-alone")
		})
	}
	mustSeeNothing(t, leak, "left the host")
	if drops := r.drops(t); drops["fragment-no-room"] == 0 || drops["fragment-alone"] == 0 {
		t.Errorf("dropped: %v", drops)
	}
}
