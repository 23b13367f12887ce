package bpf_test

import (
	"net"
	"os"
	"testing"

	"github.com/vishvananda/netlink"

	"tcnat/bpf"
)

// The guard must see the route that the kernel takes, or refuse: by eth1, which has no
// programs, a container's address would leave.
func TestGuardSeesIPv6Routes(t *testing.T) {
	const table = 77
	_, all, err := net.ParseCIDR("::/0")
	must(err)
	byEth1 := &netlink.Route{Dst: all, Gw: net.ParseIP("2001:db8:2::1"), Table: table}
	must(netlink.RouteAdd(byEth1))
	defer func() { must(netlink.RouteDel(byEth1)) }()
	rule := func(edit func(*netlink.Rule)) *netlink.Rule {
		r := netlink.NewRule()
		r.Family, r.Table, r.Priority = netlink.FAMILY_V6, table, 100
		edit(r)
		return r
	}
	iif := func(r *netlink.Rule) { r.IifName = "docker0" }
	for name, test := range map[string]struct {
		rule       *netlink.Rule
		forwarding string // of docker0
		passes     bool
	}{
		"default route":                    {forwarding: "1", passes: true},
		"rule by class":                    {rule: rule(func(r *netlink.Rule) { r.Tos = 0x10 }), forwarding: "1"},
		"rule by device":                   {rule: rule(iif), forwarding: "1"},
		"rule by device, no word about it": {rule: rule(iif), forwarding: "0"},
	} {
		t.Run(name, func(t *testing.T) {
			d := load(t, 64)
			masquerade(d, families[1])
			if test.rule != nil {
				must(netlink.RuleAdd(test.rule))
				defer func() { must(netlink.RuleDel(test.rule)) }()
			}
			const sysctl = "/proc/sys/net/ipv6/conf/docker0/forwarding"
			must(os.WriteFile(sysctl, []byte(test.forwarding), 0o644))
			defer func() { must(os.WriteFile(sysctl, []byte("1"), 0o644)) }()
			sent, _ := d.path(families[1], tcp).out("S", "")
			frame := sent.frame()
			frame[14], frame[15] = 0x61, 0 // traffic class 0x10
			if test.passes {
				if ret, _ := d.run(fromBridge(), frame); ret != unspec {
					t.Errorf("verdict %d, want it passed on", int32(ret))
				}
				return
			}
			d.dropsFrame(fromBridge(), frame, bpf.NATCounterDROP_NO_UPLINK)
		})
	}
}
