package lab

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// prepare brings the loopback device up and sets the sysctls of a new namespace, before
// it has other devices, which inherit them.
func (n *Node) prepare(forwards bool) error {
	lo, err := n.link.LinkByName("lo")
	if err == nil {
		err = n.link.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("%s: lo: %w", n.Role, err)
	}
	forwarding := "0"
	if forwards {
		forwarding = "1"
	}
	for _, sysctl := range []struct{ key, value string }{
		{"net/ipv4/ip_forward", forwarding},
		{"net/ipv6/conf/all/forwarding", forwarding},
		{"net/ipv6/conf/default/forwarding", forwarding},
		{"net/ipv4/conf/all/rp_filter", "0"},
		{"net/ipv4/conf/default/rp_filter", "0"},
		{"net/ipv4/conf/default/accept_redirects", "0"},
		{"net/ipv4/ping_group_range", "0 2147483647"}, // for people who enter the lab
		{"net/ipv6/conf/all/disable_ipv6", "0"},
		{"net/ipv6/conf/default/disable_ipv6", "0"},
		{"net/ipv6/conf/default/accept_dad", "0"}, // addresses are usable at once
		{"net/ipv6/conf/default/accept_ra", "0"},
		{"net/ipv6/icmp/ratelimit", "0"}, // every packet that a test sends is answered
		{"net/ipv4/icmp_ratelimit", "0"},
	} {
		if err := n.SetSysctl(sysctl.key, sysctl.value); err != nil {
			return err
		}
	}
	return nil
}

// connect makes a veth pair with one end in each of two nodes.
func connect(a *Node, aDevice string, b *Node, bDevice string, mtu int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = aDevice
	attrs.MTU = mtu
	veth := &netlink.Veth{
		LinkAttrs:     attrs,
		PeerName:      bDevice,
		PeerNamespace: netlink.NsFd(b.ns),
		PeerMTU:       uint32(mtu),
	}
	if err := a.link.LinkAdd(veth); err != nil {
		return fmt.Errorf("veth %s:%s to %s:%s: %w", a.Role, aDevice, b.Role, bDevice, err)
	}
	return nil
}

// configure gives a device the number-th address of a network and brings it up.
func (n *Node) configure(device string, on network, number int) error {
	link, err := n.link.LinkByName(device)
	if err != nil {
		return fmt.Errorf("%s: %s: %w", n.Role, device, err)
	}
	for _, f := range Families() {
		if err := n.addAddress(link, netip.PrefixFrom(on.address(f, number), on[f].Bits())); err != nil {
			return err
		}
	}
	if err := n.link.LinkSetUp(link); err != nil {
		return fmt.Errorf("%s: %s up: %w", n.Role, device, err)
	}
	return nil
}

// own attaches addresses to the loopback device.
func (n *Node) own(addrs network) error {
	lo, err := n.link.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("%s: lo: %w", n.Role, err)
	}
	for _, f := range Families() {
		if err := n.addAddress(lo, addrs[f]); err != nil {
			return err
		}
		n.loopback[f] = addrs[f].Addr()
	}
	return nil
}

// knownBy notes which addresses the others reach the node by.
func (n *Node) knownBy(on network, number int) {
	for _, f := range Families() {
		n.addrs[f] = on.address(f, number)
	}
}

// AddAddress gives a device one more address.
func (n *Node) AddAddress(device string, prefix netip.Prefix) error {
	link, err := n.link.LinkByName(device)
	if err != nil {
		return fmt.Errorf("%s: %s: %w", n.Role, device, err)
	}
	return n.addAddress(link, prefix)
}

func (n *Node) addAddress(link netlink.Link, prefix netip.Prefix) error {
	addr := &netlink.Addr{IPNet: ipNet(prefix)}
	if prefix.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := n.link.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("%s: address %s on %s: %w", n.Role, prefix, link.Attrs().Name, err)
	}
	return nil
}

// AddRoute adds a route; a zero via: straight out of the device.
func (n *Node) AddRoute(to netip.Prefix, via netip.Addr, device string) error {
	link, err := n.link.LinkByName(device)
	if err != nil {
		return fmt.Errorf("%s: %s: %w", n.Role, device, err)
	}
	route := &netlink.Route{Dst: ipNet(to), LinkIndex: link.Attrs().Index}
	if via.IsValid() {
		route.Gw = via.AsSlice()
	}
	if err := n.link.RouteAdd(route); err != nil {
		return fmt.Errorf("%s: route to %s: %w", n.Role, to, err)
	}
	return nil
}

// openNode takes hold of a namespace that is there; one that cannot be entered any more
// can still be removed.
func openNode(netnsName, role string) *Node {
	n := &Node{Role: role, Netns: netnsName, ns: netns.None()}
	_ = n.open()
	return n
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
