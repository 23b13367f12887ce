package e2e

import (
	"net/netip"
	"testing"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// The world reaches published ports, and the server sees the client's own address.
func TestPublished(t *testing.T) {
	forEachMode(t, lab.Options{Containers: 2}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		r.attach(t, loader.AttachOptions{Mode: mode})
		for _, f := range lab.Families() {
			t.Run(f.String(), func(t *testing.T) {
				first, second := r.Containers[0], r.Containers[1]
				r.publish(t, maps.SinglePort(3005), first.Addr(f), maps.PortRange{})
				r.publish(t, maps.SinglePort(8080), second.Addr(f), maps.SinglePort(80))
				r.publish(t, maps.PortRange{First: 8100, Last: 8199}, second.Addr(f), maps.PortRange{First: 9100, Last: 9199})
				for _, test := range []struct {
					server          *lab.Node
					port, published uint16
				}{
					{first, 3005, 3005},
					{second, 80, 8080},
					{second, 9100, 8100},
					{second, 9151, 8151},
					{second, 9199, 8199},
				} {
					for _, protocol := range protocols() {
						in := call{protocol, r.World, test.server, at(test.server.Addr(f), test.port), at(r.Host.Addr(f), test.published)}
						local, seen, err := in.do(t.Context())
						if err != nil || seen != local || local.Addr() != r.World.Addr(f) {
							t.Errorf("%s to port %d: client %s was seen as %s, error %v", protocol, test.published, local, seen, err)
						}
					}
				}
			})
		}
		r.mustNotDrop(t)
	})
}

// A published port with a list of sources is closed to all others.
func TestPublishedAllow(t *testing.T) {
	forEachMode(t, lab.Options{}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		r.attach(t, loader.AttachOptions{Mode: mode})
		c := r.Containers[0]
		for _, f := range lab.Families() {
			world := netip.PrefixFrom(r.World.Addr(f), c.Addr(f).BitLen())
			r.rules(t, func(rules *maps.Rules) error {
				_, err := rules.AddDNAT(maps.DNATRule{
					Protocol: maps.UDP, Ports: maps.SinglePort(53), To: c.Addr(f), Allow: []netip.Prefix{world},
				})
				return err
			})
			in := call{"udp", r.World, c, at(c.Addr(f), 53), at(r.Host.Addr(f), 53)}
			in.mustSee(t, r.World.Addr(f))
			in.client = r.ISP
			in.mustFail(t)
		}
		if n := r.drops(t)["not-allowed"]; n != 2 {
			t.Errorf("%d packets counted as not allowed, want 2", n)
		}
	})
}

// Deleting a rule ends what goes through it; a port that is not published stays closed.
func TestPublishedDelete(t *testing.T) {
	forEachMode(t, lab.Options{}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		r.attach(t, loader.AttachOptions{Mode: mode})
		c := r.Containers[0]
		for _, f := range lab.Families() {
			r.publish(t, maps.SinglePort(3005), c.Addr(f), maps.PortRange{})
			echo, err := lab.StartUDPEcho(c, at(c.Addr(f), 3005))
			if err != nil {
				t.Fatal(err)
			}
			defer echo.Close()
			from, to := at(r.World.Addr(f), 5555), at(r.Host.Addr(f), 3005)
			if _, err := lab.ExchangeUDP(t.Context(), r.World, from, to, []byte("x")); err != nil {
				t.Error(err)
			}
			r.rules(t, func(rules *maps.Rules) error {
				for _, rule := range rules.DNAT {
					if _, err := rules.DeleteDNAT(rule); err != nil {
						return err
					}
				}
				return nil
			})
			if _, err := lab.ExchangeUDP(t.Context(), r.World, from, to, []byte("x")); err == nil {
				t.Errorf("%s: the flow outlived its rule", f)
			}
			if peers := echo.Peers(); len(peers) != 1 {
				t.Errorf("%s: server saw %v, want the one datagram from before", f, peers)
			}
		}
	})
}
