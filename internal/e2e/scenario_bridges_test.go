package e2e

import (
	"net/netip"
	"testing"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// Two networks of one host: a container of one reaches ports that the other publishes, by the other's gateway, by its own and
// by the host's address; and the other's containers themselves only where the networks are not isolated.
func TestTwoNetworks(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		options loader.AttachOptions
	}{
		{"isolated", loader.AttachOptions{}},
		{"not isolated", loader.AttachOptions{NoIsolation: true}},
		{"isolated, always", loader.AttachOptions{FastPath: loader.FastPathAlways}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, lab.Options{Containers: 2})
			a := r.Containers[0]
			b := r.moveContainer(t, r.Containers[1], "br1", netip.MustParsePrefix("172.18.0.1/16"), netip.MustParsePrefix("fd00:18::1/64"))
			test.options.Bridges = []string{lab.Bridge, b.name}
			r.attach(t, test.options)
			for _, f := range lab.Families() {
				server := at(b.address[f], 80)
				for _, protocol := range protocols() {
					direct := call{protocol, a, b.container, server, server}
					if test.options.NoIsolation {
						direct.mustSee(t, a.Addr(f))
					} else {
						direct.mustFail(t)
					}
				}
				if test.options.NoIsolation {
					mustPing(t, a, b.address[f], lab.PingOptions{})
				} else {
					mustNotPing(t, a, b.address[f], lab.PingOptions{})
				}
				r.dnat(t, 8080, server, nil)
				for _, host := range []netip.Addr{b.gateway[f], lab.BridgeAddr(f), r.Host.Addr(f)} {
					r.mustLeadTo(t, a, b.container, server, at(host, 8080), host)
				}
				r.mustLeadTo(t, r.World, b.container, server, at(r.Host.Addr(f), 8080), r.World.Addr(f))
				for _, protocol := range protocols() {
					out := at(r.World.Loopback(f), 7)
					call{protocol, b.container, r.World, out, out}.mustSee(t, r.Host.Addr(f))
				}
			}
			drops := r.drops(t)
			if counted := drops["isolated"] > 0; counted == test.options.NoIsolation || len(drops) > 1 {
				t.Errorf("dropped: %v", drops)
			}
		})
	}
}

// A network of one family alone, and one of two addresses, work as others do.
func TestOddNetworks(t *testing.T) {
	for _, test := range []struct {
		name     string
		prefixes []netip.Prefix
	}{
		{"IPv4 alone", []netip.Prefix{netip.MustParsePrefix("172.18.0.1/16")}},
		{"IPv6 alone", []netip.Prefix{netip.MustParsePrefix("fd00:18::1/64")}},
		{"31 and 127 bits", []netip.Prefix{netip.MustParsePrefix("172.18.0.0/31"), netip.MustParsePrefix("fd00:18::2/127")}},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t, lab.Options{Containers: 2})
			n := r.moveContainer(t, r.Containers[1], "br1", test.prefixes...)
			status := r.attach(t, loader.AttachOptions{Bridges: []string{lab.Bridge, n.name}})
			if len(status.Problems) > 0 {
				t.Errorf("problems: %q", status.Problems)
			}
			leaked := watch(t, r.Router, "eth0", func(p lab.Packet) bool {
				for _, prefix := range test.prefixes {
					if prefix.Masked().Contains(p.Src) {
						return true
					}
				}
				return leaks(p)
			})
			for _, p := range test.prefixes {
				f := lab.FamilyOf(p.Addr())
				c, server := n.container, at(n.address[f], 80)
				mustPing(t, c, r.World.Loopback(f), lab.PingOptions{})
				for _, protocol := range protocols() {
					out := at(r.World.Loopback(f), 7)
					call{protocol, c, r.World, out, out}.mustSee(t, r.Host.Addr(f))
				}
				r.publish(t, maps.SinglePort(8080), n.address[f], maps.SinglePort(80))
				r.mustLeadTo(t, r.World, c, server, at(r.Host.Addr(f), 8080), r.World.Addr(f))
				r.mustLeadTo(t, c, c, server, at(r.Host.Addr(f), 8080), r.Host.Addr(f))
			}
			mustSeeNothing(t, leaked, "left with a container's address")
			drops := r.drops(t)
			delete(drops, "hairpin-redirect") // the host's advice that the server is a neighbour: itself
			if len(drops) > 0 {
				t.Errorf("dropped: %v", drops)
			}
		})
	}
}
