package e2e

import (
	"net/netip"
	"testing"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// What is not translated yet is dropped and counted by its reason, and never leaks.
func TestRefused(t *testing.T) {
	const big = 3000 // bytes, four fragments of 1000
	for _, test := range []struct {
		name    string
		counter string
		send    func(t *testing.T, r *rig, f lab.Family)
	}{
		{"the rest of a datagram without its first fragment", "fragment-alone", func(t *testing.T, r *rig, f lab.Family) {
			r.publish(t, maps.SinglePort(3005), r.Containers[0].Addr(f), maps.PortRange{})
			before := r.drops(t)["fragment-alone"]
			d := datagram{at(r.Containers[0].Addr(f), 5000), at(r.World.Loopback(f), 5000), 1, make([]byte, big)}
			newRawSender(t, r.Containers[0], f).send(t, d.cut(1000)[1:]...)
			d.src, d.dst = at(r.World.Addr(f), 5000), at(r.Host.Addr(f), 3005)
			newRawSender(t, r.World, f).send(t, d.cut(1000)[1:]...)
			poll(t, "all that wait in vain are dropped", func() bool { return r.drops(t)["fragment-alone"] == before+6 })
		}},
		{"a container's own address from outside", "no-flow", func(t *testing.T, r *rig, f lab.Family) {
			if err := r.Router.AddRoute(lab.BridgeSubnet(f), r.Host.Addr(f), "eth0"); err != nil {
				t.Fatal(err)
			}
			c := r.Containers[0]
			mustNotPing(t, r.Router, c.Addr(f), lab.PingOptions{})
			for _, protocol := range protocols() {
				call{protocol, r.Router, c, at(c.Addr(f), 80), at(c.Addr(f), 80)}.mustFail(t)
			}
		}},
		{"an address that is not the container's", "spoofed-address", func(t *testing.T, r *rig, f lab.Family) {
			c := r.Containers[0]
			alien := netip.MustParseAddr("192.168.77.7")
			if f == lab.IPv6 {
				alien = netip.MustParseAddr("fd00:77::7")
			}
			if err := c.AddAddress("eth0", netip.PrefixFrom(alien, alien.BitLen())); err != nil {
				t.Fatal(err)
			}
			mustNotPing(t, c, r.World.Loopback(f), lab.PingOptions{Source: alien})
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			forEachMode(t, lab.Options{Containers: 2}, func(t *testing.T, r *rig, mode loader.AttachMode) {
				r.attach(t, loader.AttachOptions{Mode: mode})
				for _, f := range lab.Families() {
					t.Run(f.String(), func(t *testing.T) {
						leak := watch(t, r.Router, "eth0", func(p lab.Packet) bool {
							return !p.Outgoing && (leaks(p) || p.Fragment)
						})
						before := r.drops(t)
						test.send(t, r, f)
						mustSeeNothing(t, leak, "left the host")
						after := r.drops(t)
						if after[test.counter] <= before[test.counter] {
							t.Errorf("counted before %v, after %v: want more %s", before, after, test.counter)
						}
						delete(before, test.counter)
						delete(after, test.counter)
						for counter, n := range after {
							if n != before[counter] {
								t.Errorf("counted as %s too: %d", counter, n-before[counter])
							}
						}
					})
				}
			})
		})
	}
}
