package loader

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tcnat/maps"
)

// sync brings what depends on the devices' addresses up to date: the bridges' subnets, their
// masquerade rules, the source addresses of uplinks, and the host's own. Rules of the user stay.
func (a *attachment) sync(state *maps.State, devices []device) error {
	subnets := make(map[netip.Prefix]uint32)
	for _, d := range devices {
		addresses, err := a.addresses(d)
		if err != nil {
			return err
		}
		if d.Class == maps.Uplink {
			sources, err := a.sources(d, addresses)
			if err != nil {
				return err
			}
			if err := state.SetAddresses(d.Ifindex, sources); err != nil {
				return err
			}
			continue
		}
		if len(addresses) == 0 {
			a.log.Warn("bridge has no address: its containers get no NAT until it has one and attach runs again",
				"bridge", d.name)
		}
		for _, address := range addresses {
			subnets[address.Masked()] = d.Ifindex
		}
	}
	own, err := a.hostAddresses(true)
	if err != nil {
		return err
	}
	if err := state.SetHostAddresses(own); err != nil {
		return err
	}
	if err := a.masquerade(state, subnets); err != nil {
		return err
	}
	return state.SetSubnets(subnets)
}

// addresses are the device's global ones, with their prefix lengths.
func (a *attachment) addresses(d device) ([]netip.Prefix, error) {
	link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: d.index(), Name: d.name}}
	list, err := retryDump(func() ([]netlink.Addr, error) { return a.nl.AddrList(link, unix.AF_UNSPEC) })
	if err != nil {
		return nil, fmt.Errorf("%s: list addresses: %w", d, known(err))
	}
	var addresses []netip.Prefix
	for _, entry := range list {
		address, ok := netip.AddrFromSlice(entry.IP)
		if !ok || entry.Scope != unix.RT_SCOPE_UNIVERSE {
			continue
		}
		bits, _ := entry.Mask.Size()
		addresses = append(addresses, netip.PrefixFrom(address.Unmap(), bits))
	}
	return addresses, nil
}

// sources tell which address the host takes towards each destination of the uplink's routes.
func (a *attachment) sources(d device, addresses []netip.Prefix) (map[netip.Prefix]netip.Addr, error) {
	sources := make(map[netip.Prefix]netip.Addr)
	for _, address := range addresses {
		any := netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		if address.Addr().Is4() {
			any = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		for _, prefix := range []netip.Prefix{any, address.Masked()} {
			if _, have := sources[prefix]; !have { // the first of a subnet is the primary one
				sources[prefix] = address.Addr()
			}
		}
	}
	link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: d.index(), Name: d.name}}
	routes, err := retryDump(func() ([]netlink.Route, error) { return a.nl.RouteList(link, unix.AF_UNSPEC) })
	if err != nil {
		return nil, fmt.Errorf("%s: list routes: %w", d, known(err))
	}
	for _, route := range routes {
		prefix, ok := destination(route)
		if !ok {
			continue
		}
		if source, ok := netip.AddrFromSlice(route.Src); ok {
			sources[prefix] = source.Unmap()
		} else if gateway, ok := netip.AddrFromSlice(route.Gw); ok {
			for _, address := range addresses {
				if address.Contains(gateway.Unmap()) {
					sources[prefix] = address.Addr()
					break
				}
			}
		}
	}
	return sources, nil
}

// destination is the route's, unless that is none that containers send to by this uplink.
func destination(route netlink.Route) (netip.Prefix, bool) {
	if route.Dst == nil {
		if route.Family == unix.AF_INET6 {
			return netip.PrefixFrom(netip.IPv6Unspecified(), 0), true
		}
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0), true
	}
	address, ok := netip.AddrFromSlice(route.Dst.IP)
	if !ok || address.IsMulticast() || address.IsLinkLocalUnicast() {
		return netip.Prefix{}, false
	}
	bits, _ := route.Dst.Mask.Size()
	return netip.PrefixFrom(address.Unmap(), bits).Masked(), true
}

// masquerade makes one rule a subnet, and takes away those of subnets that are gone. A rule of
// the user for the same subnet goes first.
func (a *attachment) masquerade(state *maps.State, subnets map[netip.Prefix]uint32) error {
	have, err := state.Rules()
	if err != nil {
		return err
	}
	want := maps.Rules{DNAT: have.DNAT}
	done := make(map[netip.Prefix]bool)
	for _, rule := range have.SNAT {
		_, wanted := subnets[rule.Source]
		if rule.Attach && (!wanted || a.opts.NoMasquerade) {
			continue
		}
		want.SNAT = append(want.SNAT, rule)
		if rule.Uplink == 0 {
			done[rule.Source] = true
		}
	}
	for subnet := range subnets {
		if done[subnet] || a.opts.NoMasquerade {
			continue
		}
		if _, err := want.AddSNAT(maps.SNATRule{Source: subnet, Masquerade: true, Attach: true}); err != nil {
			return fmt.Errorf("masquerade %s: %w", subnet, err)
		}
	}
	// Also when nothing changes: it ends the flows of rules that a killed run has taken away.
	return state.SetRules(want)
}
