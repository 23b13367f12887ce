package e2e

import (
	"net/netip"
	"testing"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// A container reaches an address that is only known outside, as the uplink's address.
func TestOutbound(t *testing.T) {
	forEachMode(t, lab.Options{Containers: 2}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		for _, f := range lab.Families() {
			mustNotPing(t, r.Containers[0], r.World.Loopback(f), lab.PingOptions{})
		}
		r.attach(t, loader.AttachOptions{Mode: mode})
		leak := watch(t, r.Router, "eth0", leaks)
		for _, f := range lab.Families() {
			t.Run(f.String(), func(t *testing.T) {
				for _, c := range r.Containers {
					for _, to := range []netip.Addr{r.World.Loopback(f), r.World.Addr(f), r.Router.Addr(f)} {
						mustPing(t, c, to, lab.PingOptions{})
						mustPing(t, c, to, lab.PingOptions{Size: 1400, ID: 7, Seq: 65535})
					}
					for _, protocol := range protocols() {
						server := at(r.World.Loopback(f), 7)
						call{protocol, c, r.World, server, server}.mustSee(t, r.Host.Addr(f))
					}
				}
			})
		}
		mustSeeNothing(t, leak, "left with a container's address")
		r.mustNotDrop(t)
	})
}

// The same id and port from two containers are told apart.
func TestOutboundPortClash(t *testing.T) {
	forEachMode(t, lab.Options{Containers: 2}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		r.attach(t, loader.AttachOptions{Mode: mode})
		for _, f := range lab.Families() {
			server, err := lab.StartUDPEcho(r.World, at(r.World.Loopback(f), 9000))
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			for _, c := range r.Containers {
				from := at(c.Addr(f), 40000)
				if _, err := lab.ExchangeUDP(t.Context(), c, from, server.Addr, []byte("x")); err != nil {
					t.Error(err)
				}
				mustPing(t, c, r.World.Loopback(f), lab.PingOptions{ID: 4711})
			}
			peers := server.Peers()
			if len(peers) != 2 || peers[0] == peers[1] || peers[0] != at(r.Host.Addr(f), 40000) {
				t.Errorf("%s: server saw %v, want the port kept for the first, another for the second", f, peers)
			}
		}
		r.mustNotDrop(t)
	})
}

// Rules with a fixed address, a range of ports, and destinations that are left alone.
func TestOutboundRules(t *testing.T) {
	const first, last = 20000, 20009
	forEachMode(t, lab.Options{Containers: 2}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		r.attach(t, loader.AttachOptions{Mode: mode})
		for _, f := range lab.Families() {
			c := r.Containers[0]
			rule := maps.SNATRule{
				Source: netip.PrefixFrom(c.Addr(f), c.Addr(f).BitLen()), ToFirst: r.Host.Addr(f),
				Ports:  maps.PortRange{First: first, Last: last},
				Except: []netip.Prefix{netip.PrefixFrom(r.Router.Addr(f), c.Addr(f).BitLen())},
			}
			r.rules(t, func(rules *maps.Rules) error { _, err := rules.AddSNAT(rule); return err })
			for _, protocol := range protocols() {
				server := at(r.World.Loopback(f), 7)
				local, seen, err := call{protocol, c, r.World, server, server}.do(t.Context())
				if err != nil || seen.Addr() != r.Host.Addr(f) || seen.Port() < first || seen.Port() > last {
					t.Errorf("%s %s: %s was seen as %s, error %v, want ports %d-%d", f, protocol, local, seen, err, first, last)
				}
				// The other container has the rule of attach.
				call{protocol, r.Containers[1], r.World, server, server}.mustSee(t, r.Host.Addr(f))
			}
			seen := watch(t, r.Router, "eth0", func(p lab.Packet) bool { return p.Dst == r.Router.Addr(f) && !p.Outgoing })
			mustNotPing(t, c, r.Router.Addr(f), lab.PingOptions{})
			if err := seen.Close(); err != nil {
				t.Error(err)
			}
			if packets := seen.Packets(); len(packets) != 1 || packets[0].Src != c.Addr(f) {
				t.Errorf("%s: router saw %v, want a ping from %s, which the rule excepts", f, packets, c.Addr(f))
			}
		}
	})
}

// With bridge-nf-call-iptables=1, as Docker hosts often have it, all works as well.
func TestBridgeNetfilter(t *testing.T) {
	forEachMode(t, lab.Options{Containers: 2, BridgeNetfilter: true}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		r.attach(t, loader.AttachOptions{Mode: mode})
		for _, f := range lab.Families() {
			c, neighbour := r.Containers[0], r.Containers[1]
			r.publish(t, maps.SinglePort(3005), c.Addr(f), maps.PortRange{})
			mustPing(t, c, r.World.Loopback(f), lab.PingOptions{})
			mustPing(t, c, neighbour.Addr(f), lab.PingOptions{})
			for _, protocol := range protocols() {
				server := at(r.World.Loopback(f), 7)
				call{protocol, c, r.World, server, server}.mustSee(t, r.Host.Addr(f))
				call{protocol, r.World, c, at(c.Addr(f), 3005), at(r.Host.Addr(f), 3005)}.mustSee(t, r.World.Addr(f))
			}
		}
		r.mustNotDrop(t)
	})
}

// The host's own traffic and that between neighbours is none of the datapath's business.
func TestNotOurs(t *testing.T) {
	forEachMode(t, lab.Options{Containers: 2}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		r.attach(t, loader.AttachOptions{Mode: mode})
		c, neighbour := r.Containers[0], r.Containers[1]
		for _, f := range lab.Families() {
			for _, path := range []struct {
				from, to *lab.Node
				as, addr netip.Addr
			}{
				{r.Host, r.World, r.Host.Addr(f), r.World.Loopback(f)},
				{r.World, r.Host, r.World.Addr(f), r.Host.Addr(f)},
				{r.Host, c, lab.BridgeAddr(f), c.Addr(f)},
				{c, r.Host, c.Addr(f), lab.BridgeAddr(f)},
				{c, r.Host, c.Addr(f), r.Host.Addr(f)},
				{c, neighbour, c.Addr(f), neighbour.Addr(f)},
			} {
				mustPing(t, path.from, path.addr, lab.PingOptions{})
				mustPing(t, path.from, path.addr, lab.PingOptions{Size: 3000})
				for _, protocol := range protocols() {
					server := at(path.addr, 7)
					call{protocol, path.from, path.to, server, server}.mustSee(t, path.as)
				}
			}
		}
		r.read(t, func(d *loader.Datapath) error {
			flows, unpaired, err := d.State().Flows()
			if len(flows) > 0 || unpaired > 0 {
				t.Errorf("%d halves alone, flows %+v", unpaired, flows)
			}
			return err
		})
		r.mustNotDrop(t)
	})
}
