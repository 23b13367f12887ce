package bpf_test

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
)

// The programs ask the host's routes and neighbours, so the tests run on a host made for
// them: this binary again, in a network namespace that goes when it exits.
//
//	container .2, .3 -- docker0 172.17.0.1/16      eth0 203.0.113.2/24 -- gateway .1 -- world
//	                            fd00:17::1/64           2001:db8:113::2/64
//	             a third: br1 172.18.0.1/16        eth1 192.0.2.2/24, no programs: 198.18.0.0/15
//	                            fd00:18::1/64           2001:db8:2::2/64, no programs: 2001:db8:18::/48
const insideEnv = "TCNAT_TEST_INSIDE"

func TestMain(m *testing.M) {
	if os.Getenv(insideEnv) == "" {
		os.Exit(runInside())
	}
	if err := buildHost(); err != nil {
		fmt.Fprintln(os.Stderr, "test host:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// runInside runs this test binary in a new network namespace and answers its exit code.
func runInside() int {
	runtime.LockOSThread() // Pdeathsig is about the thread that started the child
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	c := exec.Command(self, os.Args[1:]...)
	c.Env = append(os.Environ(), insideEnv+"=1")
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err = c.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return max(exit.ExitCode(), 1)
	case errors.Is(err, syscall.EPERM):
		fmt.Fprintln(os.Stderr, "these tests make a network namespace and load programs: run them as root")
	default:
		fmt.Fprintln(os.Stderr, err)
	}
	return 1
}

// family is the test host in one of the two families.
type family struct {
	name                     string
	bridge, container, other netip.Addr // other: a second container on the same bridge
	subnet                   netip.Prefix
	bridge2, neighbour       netip.Addr // of another managed bridge
	subnet2                  netip.Prefix
	uplink, second           netip.Addr // eth0's address, and another one that it has
	poolFirst, poolLast      netip.Addr // four consecutive addresses, not on any device
	gateway, world, router   netip.Addr
	unmanaged                netip.Addr // routed by a device without programs
	nowhere                  netip.Addr // a blackhole
	icmp                     uint8
	echoRequest, echoReply   uint8
}

var families = []family{
	{
		name: "ipv4", bridge: ip("172.17.0.1"), container: ip("172.17.0.2"), other: ip("172.17.0.3"), subnet: cidr("172.17.0.0/16"),
		bridge2: ip("172.18.0.1"), neighbour: ip("172.18.0.2"), subnet2: cidr("172.18.0.0/16"),
		uplink: ip("203.0.113.2"), second: ip("203.0.113.7"), poolFirst: ip("203.0.113.64"), poolLast: ip("203.0.113.67"),
		gateway: ip("203.0.113.1"), world: ip("198.51.100.9"), router: ip("192.0.2.77"),
		unmanaged: ip("198.18.0.5"), nowhere: ip("198.19.255.1"), icmp: protoICMP, echoRequest: 8, echoReply: 0,
	},
	{
		name: "ipv6", bridge: ip("fd00:17::1"), container: ip("fd00:17::2"), other: ip("fd00:17::3"), subnet: cidr("fd00:17::/64"),
		bridge2: ip("fd00:18::1"), neighbour: ip("fd00:18::2"), subnet2: cidr("fd00:18::/64"),
		uplink: ip("2001:db8:113::2"), second: ip("2001:db8:113::7"), poolFirst: ip("2001:db8:113::40"), poolLast: ip("2001:db8:113::43"),
		gateway: ip("2001:db8:113::1"), world: ip("2001:db8:51::9"), router: ip("2001:db8:77::1"),
		unmanaged: ip("2001:db8:18::5"), nowhere: ip("2001:db8:19::1"), icmp: protoICMPv6, echoRequest: 128, echoReply: 129,
	},
}

var ip, cidr = netip.MustParseAddr, netip.MustParsePrefix

// at answers an endpoint.
func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// Stations of the test host's links.
var (
	bridgeMAC    = macs{net.HardwareAddr{2, 0, 0, 0, 17, 1}}
	bridge2MAC   = macs{net.HardwareAddr{2, 0, 0, 0, 18, 1}}
	containerMAC = macs{net.HardwareAddr{2, 0, 0, 0, 17, 2}}
	otherMAC     = macs{net.HardwareAddr{2, 0, 0, 0, 17, 3}}
	neighbourMAC = macs{net.HardwareAddr{2, 0, 0, 0, 18, 2}}
	uplinkMAC    = macs{net.HardwareAddr{2, 0, 0, 1, 13, 2}}
	gatewayMAC   = macs{net.HardwareAddr{2, 0, 0, 1, 13, 1}}
	eth1MAC      = macs{net.HardwareAddr{2, 0, 0, 2, 13, 2}}
)

// Devices of the test host, by ifindex; eth1 and dead have no programs. portIf and otherPortIf are
// docker0's ports, of the first and of the second container.
var bridgeIf, bridge2If, uplinkIf, eth1If, portIf, otherPortIf uint32

func buildHost() error {
	for path, value := range map[string]string{
		"/proc/sys/net/ipv4/ip_forward":              "1",
		"/proc/sys/net/ipv6/conf/all/forwarding":     "1",
		"/proc/sys/net/ipv6/conf/default/accept_dad": "0",
		"/proc/sys/net/ipv6/conf/all/accept_dad":     "0",
		"/proc/sys/net/ipv6/conf/default/autoconf":   "0",
		"/proc/sys/net/ipv6/conf/default/accept_ra":  "0",
		"/proc/sys/net/ipv6/conf/default/forwarding": "1",
	} {
		if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
			return err
		}
	}
	if err := linkUp("lo"); err != nil {
		return err
	}
	var err error
	if bridgeIf, err = addBridge("docker0", bridgeMAC, "172.17.0.1/16", "fd00:17::1/64"); err != nil {
		return err
	}
	if portIf, err = linkIndex("p-docker0"); err != nil {
		return err
	}
	if otherPortIf, err = addPort("docker0", "2", macs{net.HardwareAddr{2, 2, 0, 0, 17, 1}}); err != nil {
		return err
	}
	if bridge2If, err = addBridge("br1", bridge2MAC, "172.18.0.1/16", "fd00:18::1/64"); err != nil {
		return err
	}
	uplinkIf, err = addVeth("eth0", "gw0", uplinkMAC, "203.0.113.2/24", "2001:db8:113::2/64", "203.0.113.7/24", "2001:db8:113::7/64")
	if err != nil {
		return err
	}
	if eth1If, err = addVeth("eth1", "gw1", eth1MAC, "192.0.2.2/28", "2001:db8:2::2/64"); err != nil {
		return err
	}
	for _, r := range []struct{ to, via string }{
		{"0.0.0.0/0", "203.0.113.1"}, {"::/0", "2001:db8:113::1"},
		{"198.18.0.0/15", "192.0.2.1"}, {"2001:db8:18::/48", "2001:db8:2::1"},
	} {
		_, to, _ := net.ParseCIDR(r.to)
		if err := netlink.RouteAdd(&netlink.Route{Dst: to, Gw: net.ParseIP(r.via)}); err != nil {
			return fmt.Errorf("route %s: %w", r.to, err)
		}
	}
	for _, to := range []string{"198.19.255.0/24", "2001:db8:19::/48"} {
		_, dst, _ := net.ParseCIDR(to)
		if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Type: syscall.RTN_BLACKHOLE}); err != nil {
			return fmt.Errorf("blackhole %s: %w", to, err)
		}
	}
	for _, n := range []struct {
		dev  uint32
		ip   string
		stop macs
	}{
		{bridgeIf, "172.17.0.2", containerMAC}, {bridgeIf, "fd00:17::2", containerMAC},
		{bridgeIf, "172.17.0.3", otherMAC}, {bridgeIf, "fd00:17::3", otherMAC},
		{bridge2If, "172.18.0.2", neighbourMAC}, {bridge2If, "fd00:18::2", neighbourMAC},
		{uplinkIf, "203.0.113.1", gatewayMAC}, {uplinkIf, "2001:db8:113::1", gatewayMAC},
		{eth1If, "192.0.2.1", gatewayMAC}, {eth1If, "2001:db8:2::1", gatewayMAC},
	} {
		err := netlink.NeighSet(&netlink.Neigh{
			LinkIndex: int(n.dev), State: netlink.NUD_PERMANENT, IP: net.ParseIP(n.ip), HardwareAddr: n.stop.mac,
		})
		if err != nil {
			return fmt.Errorf("neighbour %s: %w", n.ip, err)
		}
	}
	return nil
}

func linkUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return netlink.LinkSetUp(l)
}

// addVeth makes a veth pair, up, its first end with addresses, and answers its ifindex.
func addVeth(name, peer string, mac macs, addrs ...string) (uint32, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = name, mac.mac
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer}); err != nil {
		return 0, fmt.Errorf("veth %s: %w", name, err)
	}
	if err := linkUp(peer); err != nil {
		return 0, err
	}
	return addAddrs(name, addrs)
}

// addBridge makes a bridge with one port, so that it has a carrier.
func addBridge(name string, mac macs, addrs ...string) (uint32, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = name, mac.mac
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	if err := netlink.LinkAdd(bridge); err != nil {
		return 0, fmt.Errorf("bridge %s: %w", name, err)
	}
	if _, err := addPort(name, "", macs{net.HardwareAddr{2, 1, mac.mac[2], mac.mac[3], mac.mac[4], mac.mac[5]}}); err != nil {
		return 0, err
	}
	return addAddrs(name, addrs)
}

// addPort makes a veth pair, both ends up, the first one a port of the bridge, and answers its ifindex.
func addPort(bridge, suffix string, mac macs) (uint32, error) {
	index, err := addVeth("p-"+bridge+suffix, "c-"+bridge+suffix, mac)
	if err != nil {
		return 0, err
	}
	master, err := netlink.LinkByName(bridge)
	if err != nil {
		return 0, err
	}
	port, err := netlink.LinkByIndex(int(index))
	if err != nil {
		return 0, err
	}
	if err := netlink.LinkSetMaster(port, master); err != nil {
		return 0, fmt.Errorf("port of %s: %w", bridge, err)
	}
	return index, nil
}

func linkIndex(name string) (uint32, error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return uint32(link.Attrs().Index), nil
}

func addAddrs(name string, addrs []string) (uint32, error) {
	if err := linkUp(name); err != nil {
		return 0, err
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return 0, err
	}
	for i, a := range addrs {
		parsed, err := netlink.ParseAddr(a)
		if err != nil {
			return 0, err
		}
		parsed.Flags = syscall.IFA_F_NODAD
		if i > 1 && parsed.IP.To4() == nil { // the second one: not the host's own choice
			parsed.ValidLft, parsed.PreferedLft = math.MaxInt32, 0
		}
		if err := netlink.AddrAdd(link, parsed); err != nil {
			return 0, fmt.Errorf("%s: %s: %w", name, a, err)
		}
	}
	return uint32(link.Attrs().Index), nil
}
