package e2e

import (
	"context"
	"net/netip"
	"slices"
	"testing"
	"time"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// Containers leave by a fixed address of the host that is not the uplink's first, by IPv4 and, as NAT66, by IPv6.
func TestFixedSource(t *testing.T) {
	r := newRig(t, lab.Options{Containers: 2})
	r.ownSecondHost(t)
	r.attach(t, loader.AttachOptions{})
	for _, f := range lab.Families() {
		c, server := r.Containers[0], at(r.World.Loopback(f), 7)
		r.rules(t, func(rules *maps.Rules) error {
			_, err := rules.AddSNAT(maps.SNATRule{Source: single(c.Addr(f)), ToFirst: secondHost(f), ToLast: secondHost(f)})
			return err
		})
		for _, protocol := range protocols() {
			call{protocol, c, r.World, server, server}.mustSee(t, secondHost(f))
			call{protocol, r.Containers[1], r.World, server, server}.mustSee(t, r.Host.Addr(f))
		}
		mustPing(t, c, r.World.Loopback(f), lab.PingOptions{})
	}
	r.mustNotDrop(t)
}

// Without masquerade the world sees the containers' own addresses, and answers them where it has a route.
func TestRouted(t *testing.T) {
	r := newRig(t, lab.Options{})
	for _, f := range lab.Families() {
		if err := r.Router.AddRoute(lab.BridgeSubnet(f), r.Host.Addr(f), "eth0"); err != nil {
			t.Fatal(err)
		}
	}
	r.attach(t, loader.AttachOptions{NoMasquerade: true})
	c := r.Containers[0]
	for _, f := range lab.Families() {
		for _, protocol := range protocols() {
			server := at(r.Router.Addr(f), 7)
			call{protocol, c, r.Router, server, server}.mustSee(t, c.Addr(f))
		}
		mustPing(t, c, r.Router.Addr(f), lab.PingOptions{})
	}
	r.mustNotDrop(t)
}

// The list of destinations that see a container's own address: one, all, none; and a change holds for what begins after it.
func TestMasqueradeExcept(t *testing.T) {
	r := newRig(t, lab.Options{})
	for _, f := range lab.Families() {
		if err := r.Router.AddRoute(lab.BridgeSubnet(f), r.Host.Addr(f), "eth0"); err != nil {
			t.Fatal(err)
		}
	}
	r.attach(t, loader.AttachOptions{})
	c := r.Containers[0]
	for _, f := range lab.Families() {
		server := at(r.Router.Addr(f), 7)
		for _, test := range []struct {
			except []netip.Prefix
			want   netip.Addr
		}{
			{nil, r.Host.Addr(f)},
			{[]netip.Prefix{single(r.World.Loopback(f))}, r.Host.Addr(f)},
			{[]netip.Prefix{single(r.World.Loopback(f)), single(r.Router.Addr(f))}, c.Addr(f)},
			{[]netip.Prefix{everywhere(f)}, c.Addr(f)},
			{nil, r.Host.Addr(f)},
		} {
			r.rules(t, func(rules *maps.Rules) error {
				rules.SNAT = slices.DeleteFunc(rules.SNAT, func(s maps.SNATRule) bool { return s.Source == single(c.Addr(f)) })
				_, err := rules.AddSNAT(maps.SNATRule{Source: single(c.Addr(f)), Masquerade: true, Except: test.except})
				return err
			})
			for _, protocol := range protocols() {
				call{protocol, c, r.Router, server, server}.mustSee(t, test.want)
			}
		}
	}
	r.mustNotDrop(t)
}

// Direct access to a container's own address, by ping, to a published port and to one that is not: what is forbidden by
// default, allowed by --allow-direct, and in the host's firewall's hands then.
func TestDirectAccess(t *testing.T) {
	t.Parallel()
	for _, mode := range []struct {
		name    string
		options loader.AttachOptions
		allowed bool
	}{
		{"nat", loader.AttachOptions{}, false},
		{"nat-unprotected", loader.AttachOptions{AllowDirect: true}, true},
		{"routed", loader.AttachOptions{NoMasquerade: true}, false},
		{"routed-unprotected", loader.AttachOptions{NoMasquerade: true, AllowDirect: true}, true},
	} {
		for _, forward := range []string{"accept", "drop"} {
			t.Run(name(mode.name, "forward "+forward), func(t *testing.T) {
				t.Parallel()
				r := newRig(t, lab.Options{})
				nft(t, r.Host, "table inet guard { chain forward { type filter hook forward priority filter; policy "+forward+"; }; }")
				r.attach(t, mode.options)
				c := r.Containers[0]
				for _, f := range lab.Families() {
					if err := r.Router.AddRoute(lab.BridgeSubnet(f), r.Host.Addr(f), "eth0"); err != nil {
						t.Fatal(err)
					}
					r.dnat(t, 8080, at(c.Addr(f), 80), nil)
					reached := mode.allowed && forward == "accept"
					if reached {
						mustPing(t, r.Router, c.Addr(f), lab.PingOptions{})
					} else {
						mustNotPing(t, r.Router, c.Addr(f), lab.PingOptions{})
					}
					for _, port := range []uint16{80, 81} { // that a published port leads to, and another
						server := at(c.Addr(f), port)
						for _, protocol := range protocols() {
							in := call{protocol, r.Router, c, server, server}
							if reached {
								in.mustSee(t, r.Router.Addr(f))
							} else {
								in.mustFail(t)
							}
						}
					}
					published := call{"tcp", r.Router, c, at(c.Addr(f), 80), at(r.Host.Addr(f), 8080)}
					if forward == "accept" {
						published.mustSee(t, r.Router.Addr(f))
					} else {
						published.mustFail(t)
					}
				}
			})
		}
	}
}

// A changed address of the uplink is what new conversations leave by.
func TestMasqueradeFollowsAddress(t *testing.T) {
	r := newRig(t, lab.Options{})
	r.attach(t, loader.AttachOptions{})
	c := r.Containers[0]
	for _, f := range lab.Families() {
		server := at(r.World.Loopback(f), 7)
		call{"tcp", c, r.World, server, server}.mustSee(t, r.Host.Addr(f))
	}
	next := map[lab.Family]string{lab.IPv4: "203.0.113.88/24", lab.IPv6: "2001:db8:113::88/64"}
	for _, f := range lab.Families() {
		was := netip.PrefixFrom(r.Host.Addr(f), netip.MustParsePrefix(next[f]).Bits())
		ip(t, r.Host, "addr del "+was.String()+" dev eth0")
		if err := r.Host.AddAddress(lab.Uplink, netip.MustParsePrefix(next[f])); err != nil {
			t.Fatal(err)
		}
		ip(t, r.Host, "route replace default via "+r.Router.Addr(f).String()+" dev eth0")
	}
	r.attach(t, loader.AttachOptions{}) // where the kernel does not choose the address, attach tells it
	for _, f := range lab.Families() {
		server := at(r.World.Loopback(f), 7)
		for _, protocol := range protocols() { // each CPU keeps the old one for a second
			poll(t, name(f, protocol)+": the new address is seen", func() bool {
				ctx, cancel := context.WithTimeout(t.Context(), slowly(500*time.Millisecond))
				defer cancel()
				_, seen, err := call{protocol, c, r.World, server, server}.do(ctx)
				return err == nil && seen.Addr() == netip.MustParsePrefix(next[f]).Addr()
			})
		}
	}
}

// When the ports of a rule are used up, what is new is refused and counted, and what is there goes on.
func TestPortsUsedUp(t *testing.T) {
	r := newRig(t, lab.Options{Containers: 2})
	r.attach(t, loader.AttachOptions{})
	for _, f := range lab.Families() {
		echo, err := lab.StartUDPEcho(r.World, at(r.World.Loopback(f), 9000))
		if err != nil {
			t.Fatal(err)
		}
		defer echo.Close()
		r.rules(t, func(rules *maps.Rules) error {
			_, err := rules.AddSNAT(maps.SNATRule{
				Source: single(r.Containers[0].Addr(f)), ToFirst: r.Host.Addr(f), ToLast: r.Host.Addr(f), Ports: maps.PortRange{First: 20000, Last: 20001},
			})
			return err
		})
		c := r.Containers[0]
		ask := func(port uint16) error {
			_, err := lab.ExchangeUDP(t.Context(), c, at(c.Addr(f), port), echo.Addr, []byte("x"))
			return err
		}
		for _, port := range []uint16{30000, 30001} {
			if err := ask(port); err != nil {
				t.Errorf("%s: port %d: %v", f, port, err)
			}
		}
		before := r.drops(t)["no-port"]
		if err := ask(30002); err == nil {
			t.Errorf("%s: a third conversation by two ports", f)
		}
		if after := r.drops(t); after["no-port"] == before {
			t.Errorf("%s: dropped: %v, want one for want of a port", f, after)
		}
		for _, port := range []uint16{30000, 30001} {
			if err := ask(port); err != nil {
				t.Errorf("%s: port %d, after the refusal: %v", f, port, err)
			}
		}
	}
}
