package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"tcnat/internal/lab"
	"tcnat/maps"
)

// What Docker, Podman and CNI promise of NAT, filtering and publishing: docs/scenarios.md lists it.

// secondHost is an address that the host is given beside its own on the uplink.
func secondHost(f lab.Family) netip.Addr {
	return map[lab.Family]netip.Addr{
		lab.IPv4: netip.MustParseAddr("203.0.113.77"), lab.IPv6: netip.MustParseAddr("2001:db8:113::77"),
	}[f]
}

// single is the prefix of one address.
func single(addr netip.Addr) netip.Prefix { return netip.PrefixFrom(addr, addr.BitLen()) }

// everywhere is the prefix of all addresses, of IPv6 those of the world.
func everywhere(f lab.Family) netip.Prefix {
	return map[lab.Family]netip.Prefix{
		lab.IPv4: netip.PrefixFrom(netip.IPv4Unspecified(), 0), lab.IPv6: netip.MustParsePrefix("2000::/3"),
	}[f]
}

// ownSecondHost gives the host its second address, which it uses for nothing of its own.
func (r *rig) ownSecondHost(t *testing.T) {
	t.Helper()
	for _, f := range lab.Families() {
		ip(t, r.Host, "addr add "+single(secondHost(f)).String()+" dev eth0 valid_lft forever preferred_lft 0")
		poll(t, secondHost(f).String()+" answers", func() bool {
			_, err := lab.Ping(t.Context(), r.World, secondHost(f), lab.PingOptions{})
			return err == nil
		})
	}
}

// dnat adds a rule for each of TCP and UDP; edit may be nil.
func (r *rig) dnat(t *testing.T, port uint16, to netip.AddrPort, edit func(*maps.DNATRule)) {
	t.Helper()
	r.rules(t, func(rules *maps.Rules) error {
		for _, protocol := range []maps.Protocol{maps.TCP, maps.UDP} {
			rule := maps.DNATRule{Protocol: protocol, Ports: maps.SinglePort(port), To: to.Addr(), ToPorts: maps.SinglePort(to.Port())}
			if edit != nil {
				edit(&rule)
			}
			if _, err := rules.AddDNAT(rule); err != nil {
				return err
			}
		}
		return nil
	})
}

// mustLeadTo calls an address of the host and wants a container's server to be there, which sees that client.
func (r *rig) mustLeadTo(t *testing.T, client, server *lab.Node, listen, to netip.AddrPort, as netip.Addr) {
	t.Helper()
	for _, protocol := range protocols() {
		call{protocol, client, server, listen, to}.mustSee(t, as)
	}
}

// mustLeadNowhere calls an address of the host at which nothing is published, where a container's server would answer.
func (r *rig) mustLeadNowhere(t *testing.T, client, server *lab.Node, listen, to netip.AddrPort) {
	t.Helper()
	for _, protocol := range protocols() {
		ctx, cancel := context.WithTimeout(t.Context(), slowly(300*time.Millisecond))
		_, seen, err := call{protocol, client, server, listen, to}.do(ctx)
		if cancel(); err == nil || seen.IsValid() {
			t.Errorf("%s from %s to %s: the server at %s saw %s, and nothing leads there", protocol, client.Role, to, listen, seen)
		}
	}
}

// network is a second bridge of the host with a container that was moved there.
type network struct {
	name      string
	container *lab.Node
	gateway   map[lab.Family]netip.Addr
	address   map[lab.Family]netip.Addr // the container's
}

// moveContainer makes a bridge, and has a container on it instead of docker0. An invalid prefix: the network
// has none of that family. The host has the prefix's own address, the container the next one.
func (r *rig) moveContainer(t *testing.T, c *lab.Node, name string, prefixes ...netip.Prefix) network {
	t.Helper()
	n := network{name, c, make(map[lab.Family]netip.Addr), make(map[lab.Family]netip.Addr)}
	r.owned = append(r.owned, name)
	ip(t, r.Host, "link add "+name+" type bridge", "link set "+name+" up", "link set veth"+c.Role+" master "+name)
	ip(t, c, "-4 addr flush dev eth0", "-6 addr flush dev eth0 scope global")
	for _, p := range prefixes {
		f := lab.FamilyOf(p.Addr())
		n.gateway[f], n.address[f] = p.Addr(), p.Addr().Next()
		for _, own := range []struct {
			node   *lab.Node
			addr   netip.Addr
			device string
		}{{r.Host, n.gateway[f], name}, {c, n.address[f], "eth0"}} {
			if err := own.node.AddAddress(own.device, netip.PrefixFrom(own.addr, p.Bits())); err != nil {
				t.Fatal(err)
			}
		}
		ip(t, c, fmt.Sprintf("route replace default via %s dev eth0", n.gateway[f]))
		poll(t, name+" carries "+f.String(), func() bool {
			_, err := lab.Ping(t.Context(), c, n.gateway[f], lab.PingOptions{})
			return err == nil
		})
	}
	return n
}
