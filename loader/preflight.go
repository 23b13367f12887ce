package loader

import (
	"fmt"
	"net/netip"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tcnat/maps"
)

// Finding is a setting of the host that stands in the way.
type Finding struct {
	Setting string // such as net.ipv4.ip_forward
	Value   string
	Problem string // what does not work because of it
	Remedy  string // what to do, a command where there is one
}

// Preflight looks for settings in the way of NAT between these devices, in the current network
// namespace. It changes nothing. What cannot be read, as a firewall whose tools are not
// installed, is left out. The error wraps ErrNoDevice or ErrBadDevice.
func Preflight(bridges, uplinks []string) ([]Finding, error) {
	nl, err := newNetlink()
	if err != nil {
		return nil, err
	}
	defer nl.Close()
	links, err := listLinks(nl)
	if err != nil {
		return nil, err
	}
	devices, err := resolveDevices(links, bridges, uplinks)
	if err != nil {
		return nil, err
	}
	a := &attachment{nl: nl}
	var subnets []netip.Prefix
	for _, d := range devices {
		if d.Class != maps.Bridge {
			continue
		}
		addresses, err := a.addresses(d)
		if err != nil {
			return nil, err
		}
		for _, address := range addresses {
			subnets = append(subnets, address.Masked())
		}
	}
	findings := checkForwarding(devices, subnets)
	reverse, err := checkReversePath(nl, devices)
	if err != nil {
		return nil, err
	}
	findings = append(findings, reverse...)
	findings = append(findings, checkBridgeNetfilter(devices)...)
	findings = append(findings, checkFirewall(readFirewall(), subnets)...)
	return append(findings, checkMemory("/proc/self")...), nil
}

func families(subnets []netip.Prefix) (v4, v6 bool) {
	for _, subnet := range subnets {
		v4 = v4 || subnet.Addr().Is4()
		v6 = v6 || subnet.Addr().Is6()
	}
	return v4, v6
}

// checkForwarding looks at IP forwarding, globally for each family that the bridges have, and
// on each device where it differs from the rest.
func checkForwarding(devices []device, subnets []netip.Prefix) []Finding {
	var findings []Finding
	v4, v6 := families(subnets)
	off := func(path string) bool {
		value, err := readSysctl(path)
		return err == nil && value == "0"
	}
	if v4 {
		if off("net/ipv4/ip_forward") {
			findings = append(findings, Finding{
				"net.ipv4.ip_forward", "0",
				"the host forwards no IPv4 packet, so containers reach nobody",
				"sysctl -w net.ipv4.ip_forward=1",
			})
		} else {
			for _, d := range devices {
				if off("net/ipv4/conf/" + d.name + "/forwarding") {
					findings = append(findings, Finding{
						"net.ipv4.conf." + d.name + ".forwarding", "0",
						"the host forwards no IPv4 packet that comes in by " + d.name,
						"sysctl -w net/ipv4/conf/" + d.name + "/forwarding=1",
					})
				}
			}
		}
	}
	if v6 && off("net/ipv6/conf/all/forwarding") {
		findings = append(findings, Finding{
			"net.ipv6.conf.all.forwarding", "0",
			"the host forwards no IPv6 packet, so containers reach nobody",
			"sysctl -w net.ipv6.conf.all.forwarding=1",
		})
	}
	if v6 && !off("net/ipv6/conf/all/forwarding") {
		for _, d := range devices {
			if d.Class == maps.Bridge && off("net/ipv6/conf/"+d.name+"/forwarding") {
				findings = append(findings, Finding{
					"net.ipv6.conf." + d.name + ".forwarding", "0",
					"the kernel does not tell programs where it routes IPv6 packets that come in by " + d.name + ", so they are dropped",
					"sysctl -w net/ipv6/conf/" + d.name + "/forwarding=1",
				})
			}
		}
	}
	if v6 {
		findings = append(findings, checkRouterAdvertisements(devices)...)
	}
	return findings
}

// checkRouterAdvertisements: a host that forwards ignores them, unless told to listen, and then
// loses the default route that it had from one.
func checkRouterAdvertisements(devices []device) []Finding {
	var findings []Finding
	for _, d := range devices {
		if d.Class != maps.Uplink {
			continue
		}
		if value, err := readSysctl("net/ipv6/conf/" + d.name + "/accept_ra"); err == nil && value == "1" {
			findings = append(findings, Finding{
				"net.ipv6.conf." + d.name + ".accept_ra", value,
				"with IPv6 forwarding on, the host takes no route from router advertisements on " + d.name +
					" and loses the one it has",
				"sysctl -w net/ipv6/conf/" + d.name + "/accept_ra=2, unless routes are set by hand",
			})
		}
	}
	return findings
}

// checkReversePath looks at uplinks with a strict filter that are not the only way out: it drops
// what comes in by another device than the route back leads to. The larger of the device's value
// and that of all holds.
func checkReversePath(nl *netlink.Handle, devices []device) ([]Finding, error) {
	routes, err := retryDump(func() ([]netlink.Route, error) { return nl.RouteList(nil, unix.AF_INET) })
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", known(err))
	}
	all, _ := readSysctl("net/ipv4/conf/all/rp_filter")
	var findings []Finding
	for _, d := range devices {
		if d.Class != maps.Uplink {
			continue
		}
		own, err := readSysctl("net/ipv4/conf/" + d.name + "/rp_filter")
		if err != nil || max(own, all) != "1" || onlyWayOut(routes, d) {
			continue
		}
		findings = append(findings, Finding{
			"net.ipv4.conf." + d.name + ".rp_filter", "1",
			"packets that come in by " + d.name + " are dropped where the route back leads to another device",
			"sysctl -w net/ipv4/conf/" + d.name + "/rp_filter=2",
		})
	}
	return findings, nil
}

// onlyWayOut says whether no default route leads elsewhere.
func onlyWayOut(routes []netlink.Route, d device) bool {
	for _, route := range routes {
		if prefix, ok := destination(route); ok && prefix.Bits() == 0 && route.LinkIndex != d.index() {
			return false
		}
	}
	return true
}

// checkBridgeNetfilter: the sysctl is there only while br_netfilter is loaded.
func checkBridgeNetfilter(devices []device) []Finding {
	var findings []Finding
	for _, setting := range []string{"bridge-nf-call-iptables", "bridge-nf-call-ip6tables"} {
		value, err := readSysctl("net/bridge/" + setting)
		if err != nil || value != "1" {
			continue
		}
		for _, d := range devices {
			if d.Class == maps.Bridge {
				findings = append(findings, Finding{
					"net.bridge." + setting, "1",
					"iptables also sees, and may drop, what containers on " + d.name + " send each other, at a cost for every packet",
					"sysctl -w net.bridge." + setting + "=0, unless rules of yours rely on it",
				})
				break
			}
		}
	}
	return findings
}

// checkMemory looks at the memory cgroups of a process, which its maps are charged to.
func checkMemory(proc string) []Finding {
	var findings []Finding
	for _, limit := range memoryLimits(proc) {
		findings = append(findings, Finding{
			limit.file, strconv.FormatUint(limit.bytes, 10),
			fmt.Sprintf("flows are charged to this cgroup, %d MB for %d of them: new flows fail when it is full",
				flowMemory(DefaultMaxFlows)>>20, DefaultMaxFlows),
			"attach from a shell or unit without memory limit",
		})
	}
	return findings
}

// flowMemory is about what the tables take for so many flows: two halves, their buckets, a mapping and the
// expiry's entry.
func flowMemory(flows uint64) uint64 {
	const half, bucket, mapping, entry = 192, 16, 32, 60
	return flows * (2*(half+bucket) + mapping + entry)
}
