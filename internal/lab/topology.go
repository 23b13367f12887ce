package lab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
)

// Names of the host's devices. Each of the other nodes calls its own side eth0; router
// and isp call the side away from the host eth1.
const (
	Bridge    = "docker0"
	Uplink    = "eth0"
	Uplink2   = "eth1"
	TunUplink = "tun0"
)

// network is an IPv4 and an IPv6 prefix that go together.
type network map[Family]netip.Prefix

func newNetwork(v4, v6 string) network {
	return network{IPv4: netip.MustParsePrefix(v4), IPv6: netip.MustParsePrefix(v6)}
}

// address returns the n-th address of the network, n < 255.
func (w network) address(f Family, n int) netip.Addr {
	bytes := w[f].Addr().AsSlice()
	bytes[len(bytes)-1] += byte(n)
	addr, _ := netip.AddrFromSlice(bytes)
	return addr
}

// The lab's networks; never changed.
var (
	bridgeNet = newNetwork("172.17.0.0/16", "fd00:17::/64")
	uplinkNet = newNetwork("203.0.113.0/24", "2001:db8:113::/64") // host .2, router .1
	hopNet    = newNetwork("198.18.0.0/24", "2001:db8:18::/64")   // router .1, isp .2
	worldNet  = newNetwork("198.51.100.0/24", "2001:db8:51::/64") // isp .1, world .2
	otherNet  = newNetwork("192.0.2.0/24", "2001:db8:2::/64")     // host .2, other .1
	tunNet    = newNetwork("10.8.0.0/24", "2001:db8:8::/64")      // host .2, far .1

	// Addresses that only their own node and the routes to it know.
	worldOnly = newNetwork("1.1.1.1/32", "2606:4700:4700::1111/128")
	otherOnly = newNetwork("9.9.9.9/32", "2620:fe::9/128")
	farOnly   = newNetwork("8.8.8.8/32", "2001:4860:4860::8888/128")
)

// BridgeSubnet returns the subnet of docker0.
func BridgeSubnet(f Family) netip.Prefix { return bridgeNet[f] }

// BridgeAddr returns the host's address on docker0, the containers' gateway.
func BridgeAddr(f Family) netip.Addr { return bridgeNet.address(f, 1) }

// Uplink2Addr returns the host's address on eth1.
func Uplink2Addr(f Family) netip.Addr { return otherNet.address(f, 2) }

// TunAddr returns the host's address on tun0.
func TunAddr(f Family) netip.Addr { return tunNet.address(f, 2) }

// build makes nodes, links, addresses and routes.
func (l *Lab) build(ctx context.Context, o Options) error {
	for _, node := range []struct {
		role string
		at   **Node
		want bool
	}{
		{"host", &l.Host, true},
		{"router", &l.Router, !o.NearWorld},
		{"isp", &l.ISP, !o.NearWorld},
		{"world", &l.World, true},
		{"other", &l.Other, o.SecondUplink},
		{"far", &l.Far, o.TunUplink},
	} {
		if !node.want {
			continue
		}
		n, err := l.add(node.role)
		if err != nil {
			return err
		}
		*node.at = n
	}
	for i := range o.Containers {
		n, err := l.add(fmt.Sprintf("c%d", i+1))
		if err != nil {
			return err
		}
		l.Containers = append(l.Containers, n)
	}
	for _, n := range l.nodes {
		if err := n.prepare(l.forwards(n)); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	if err := l.buildInside(ctx, o); err != nil {
		return err
	}
	if err := l.buildOutside(o); err != nil {
		return err
	}
	if o.NoSegmentation {
		if err := l.SetSegmentation(false); err != nil {
			return err
		}
	}
	return l.hostSysctls(o)
}

// buildInside makes the bridge and what is on it.
func (l *Lab) buildInside(ctx context.Context, o Options) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = Bridge
	attrs.MTU = 1500
	attrs.HardwareAddr = net.HardwareAddr{0x02, 0x42, 0xac, 0x11, 0x00, 0x01}
	if err := l.Host.link.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("bridge %s: %w", Bridge, err)
	}
	if err := l.Host.configure(Bridge, bridgeNet, 1); err != nil {
		return err
	}
	bridge, err := l.Host.link.LinkByName(Bridge)
	if err != nil {
		return fmt.Errorf("bridge %s: %w", Bridge, err)
	}
	for i, c := range l.Containers {
		port := "veth" + c.Role
		if err := connect(l.Host, port, c, "eth0", 1500); err != nil {
			return err
		}
		link, err := l.Host.link.LinkByName(port)
		if err == nil {
			err = l.Host.link.LinkSetMaster(link, bridge)
		}
		if err == nil {
			err = l.Host.link.LinkSetUp(link)
		}
		if err != nil {
			return fmt.Errorf("bridge port %s: %w", port, err)
		}
		if err := c.configure("eth0", bridgeNet, i+2); err != nil {
			return err
		}
		c.knownBy(bridgeNet, i+2)
		for _, f := range Families() {
			if err := c.AddRoute(everything(f), BridgeAddr(f), "eth0"); err != nil {
				return err
			}
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// buildOutside makes the uplinks and what is behind them.
func (l *Lab) buildOutside(o Options) error {
	hopMTU := 1500
	if o.HopMTU != 0 {
		hopMTU = o.HopMTU
	}
	for _, wire := range []struct {
		on     network
		a, b   *Node
		aDev   string
		bDev   string
		aN, bN int
		mtu    int
		want   bool
	}{
		{uplinkNet, l.Host, l.World, Uplink, "eth0", 2, 1, 1500, o.NearWorld},
		{uplinkNet, l.Host, l.Router, Uplink, "eth0", 2, 1, 1500, !o.NearWorld},
		{hopNet, l.Router, l.ISP, "eth1", "eth0", 1, 2, hopMTU, !o.NearWorld},
		{worldNet, l.ISP, l.World, "eth1", "eth0", 1, 2, 1500, !o.NearWorld},
		{otherNet, l.Host, l.Other, Uplink2, "eth0", 2, 1, 1500, o.SecondUplink},
		{tunNet, l.Host, l.Far, TunUplink, TunUplink, 2, 1, 1500, o.TunUplink},
	} {
		if !wire.want {
			continue
		}
		var err error
		if wire.aDev == TunUplink {
			l.tunnel, err = newTunnel(wire.a, wire.b, TunUplink)
		} else {
			err = connect(wire.a, wire.aDev, wire.b, wire.bDev, wire.mtu)
		}
		if err != nil {
			return err
		}
		if err := wire.a.configure(wire.aDev, wire.on, wire.aN); err != nil {
			return err
		}
		if err := wire.b.configure(wire.bDev, wire.on, wire.bN); err != nil {
			return err
		}
	}
	l.Host.knownBy(uplinkNet, 2)
	if o.NearWorld {
		l.World.knownBy(uplinkNet, 1)
	} else {
		l.Router.knownBy(uplinkNet, 1)
		l.ISP.knownBy(hopNet, 2)
		l.World.knownBy(worldNet, 2)
	}
	if err := l.World.own(worldOnly); err != nil {
		return err
	}
	if l.Other != nil {
		l.Other.knownBy(otherNet, 1)
		if err := l.Other.own(otherOnly); err != nil {
			return err
		}
	}
	if l.Far != nil {
		l.Far.knownBy(tunNet, 1)
		if err := l.Far.own(farOnly); err != nil {
			return err
		}
	}
	return l.routes()
}

func (l *Lab) routes() error {
	for _, f := range Families() {
		type route struct {
			at     *Node
			to     netip.Prefix
			via    netip.Addr
			device string
		}
		routes := []route{{l.Host, everything(f), uplinkNet.address(f, 1), Uplink}}
		if l.Router != nil {
			routes = append(routes, []route{
				{l.Router, worldNet[f], hopNet.address(f, 2), "eth1"},
				{l.Router, worldOnly[f], hopNet.address(f, 2), "eth1"},
				{l.ISP, uplinkNet[f], hopNet.address(f, 1), "eth0"},
				{l.ISP, worldOnly[f], worldNet.address(f, 2), "eth1"},
				{l.World, uplinkNet[f], worldNet.address(f, 1), "eth0"},
				{l.World, hopNet[f], worldNet.address(f, 1), "eth0"},
			}...)
		}
		if l.Other != nil {
			routes = append(routes, route{l.Host, otherOnly[f], otherNet.address(f, 1), Uplink2})
		}
		if l.Far != nil {
			routes = append(routes, route{l.Host, farOnly[f], netip.Addr{}, TunUplink})
		}
		for _, r := range routes {
			if err := r.at.AddRoute(r.to, r.via, r.device); err != nil {
				return err
			}
		}
	}
	return nil
}

// forwards tells whether a node is a router.
func (l *Lab) forwards(n *Node) bool {
	return n == l.Host || n == l.Router || n == l.ISP
}

// hostSysctls sets what a Docker host has, and what the options ask for.
func (l *Lab) hostSysctls(o Options) error {
	// Strict, as some distributions have it: a packet translated at the wrong hook would
	// look like a martian.
	if err := l.Host.SetSysctl("net/ipv4/conf/all/rp_filter", "1"); err != nil {
		return err
	}
	value := "0"
	if o.BridgeNetfilter {
		value = "1"
	}
	for _, name := range []string{"bridge-nf-call-iptables", "bridge-nf-call-ip6tables"} {
		// Not there on a kernel without br_netfilter, which is as good as 0.
		if !o.BridgeNetfilter && !fileExists(filepath.Join("/proc/sys/net/bridge", name)) {
			continue
		}
		if err := l.Host.SetSysctl("net/bridge/"+name, value); err != nil {
			return err
		}
	}
	keys := make([]string, 0, len(o.HostSysctls))
	for key := range o.HostSysctls {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	for _, key := range keys {
		if err := l.Host.SetSysctl(key, o.HostSysctls[key]); err != nil {
			return err
		}
	}
	return nil
}

func everything(f Family) netip.Prefix {
	if f == IPv4 {
		return netip.MustParsePrefix("0.0.0.0/0")
	}
	return netip.MustParsePrefix("::/0")
}
