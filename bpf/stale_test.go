package bpf_test

import (
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"tcnat/bpf"
)

// Flows whose way to the world has changed: another uplink, or an address that the host has no more.

// localStamps is how long a program takes an address for the host's without asking again.
const localStamps = 250 * time.Millisecond

// withAddress gives eth0 an address that nothing else needs until lose is called.
func withAddress(t testing.TB, f family) (addr netip.Addr, lose func()) {
	t.Helper()
	addr, bits := ip("203.0.113.99"), 24
	if f.name == "ipv6" {
		addr, bits = ip("2001:db8:113::99"), 64
	}
	link, err := netlink.LinkByIndex(int(uplinkIf))
	must(err)
	a := &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(bits, addr.BitLen())}, Flags: syscall.IFA_F_NODAD}
	must(netlink.AddrReplace(link, a))
	lost := false
	lose = func() {
		if !lost {
			must(netlink.AddrDel(link, a))
			lost = true
		}
	}
	t.Cleanup(lose)
	return addr, lose
}

// addUplink makes eth1 an uplink as well.
func (d *datapath) addUplink() {
	d.check(d.Devices.Put(eth1If, bpf.NATDevice{Class: bpf.NATDeviceClassCLASS_UPLINK, Attach: bpf.NATAttachKindATTACH_TCX}))
	d.Cleanup(func() { d.check(d.Devices.Delete(eth1If)) })
}

// eth1Addr is what masquerade gives on eth1.
func eth1Addr(f family) netip.Addr {
	if f.name == "ipv6" {
		return ip("2001:db8:2::2")
	}
	return ip("192.0.2.2")
}

// routeByEth1 leads what goes to the world by eth1, until back is called.
func routeByEth1(t testing.TB, f family) (back func()) {
	t.Helper()
	gateway := ip("192.0.2.1")
	if f.name == "ipv6" {
		gateway = ip("2001:db8:2::1")
	}
	route := &netlink.Route{
		Dst: &net.IPNet{IP: f.world.AsSlice(), Mask: net.CIDRMask(f.world.BitLen(), f.world.BitLen())},
		Gw:  gateway.AsSlice(), LinkIndex: int(eth1If),
	}
	must(netlink.RouteAdd(route))
	gone := false
	back = func() {
		if !gone {
			must(netlink.RouteDel(route))
			gone = true
		}
	}
	t.Cleanup(back)
	return back
}

// moved expects the path's packet to leave by a device as a new flow with an address, and answers that path.
func (c path) moved(h hook, a netip.Addr) path {
	c.Helper()
	before := c.mustHalf(c.outTuple())
	stale := c.counts()[bpf.NATCounterFLOWS_STALE]
	c = c.as(a, 0)
	sent, wire := c.out("A", "x")
	c.untouched(fromBridge(), sent)
	c.passes(h, sent.forwarded(), wire.forwarded())
	now := c.mustHalf(c.outTuple())
	if now.Standing.Id == before.Standing.Id {
		c.Errorf("flow %d goes on", now.Standing.Id)
	}
	if n := c.counts()[bpf.NATCounterFLOWS_STALE] - stale; n != 1 {
		c.Errorf("%d flows counted as stale, want 1", n)
	}
	sent, wire = c.out("A", "again")
	c.untouched(fromBridge(), sent)
	c.passes(h, sent.forwarded(), wire.forwarded())
	return c
}

// A flow of masquerade's whose address the host has lost begins anew with the address that is due now, when
// the host is asked about it again; until then, and while the host has it, the flow goes on.
func TestStaleAddress(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, echo} {
			for _, mode := range []bpf.NATFastPath{bpf.NATFastPathFAST_PATH_OFF, bpf.NATFastPathFAST_PATH_ESTABLISHED} {
				d.each(f.name+"/"+p.name, func(d *datapath) {
					addr, lose := withAddress(d, f)
					fixed := snatRule{id: 9, source: f.subnet, first: addr, last: addr}
					d.setRules(ruleSet{snat: []snatRule{fixed}})
					c := d.path(f, p).as(addr, 0).open()
					c.changeHalf(c.outTuple(), func(h *bpf.NATHalf) { h.Standing.Uplink |= uint16(bpf.NATUplinkBitsUPLINK_MASQUERADE) })
					d.setRules(ruleSet{snat: []snatRule{{id: 9, source: f.subnet, masquerade: true}}})
					d.setFast(mode, true)
					c.sends("A", "it is there")
					c.age(c.outTuple(), leaseStamps)
					time.Sleep(localStamps + 20*time.Millisecond)
					c.sends("A", "it is there still")
					lose()
					time.Sleep(localStamps + 20*time.Millisecond)
					c.sends("A", "nobody has asked")
					c.age(c.outTuple(), leaseStamps)
					c.moved(toUplink(), f.uplink)
				})
			}
		}
	}
}

// A flow that the host routes by another uplink begins anew there, at its first packet: with that one's
// address, or untranslated, or not at all, as the rules there say. Where they give what it has, it goes on.
func TestStaleUplink(t *testing.T) {
	d := load(t, 64)
	d.addUplink()
	for _, f := range families {
		eth1 := toUplink().on(eth1If)
		byEth1 := func(r snatRule) snatRule { r.uplink, r.source = eth1If, f.subnet; return r }
		own := snatRule{id: 7, source: f.subnet, masquerade: true}
		fixed := snatRule{id: 7, source: f.subnet, first: f.second, last: f.second}
		for _, test := range []struct {
			name  string
			rules []snatRule
			here  netip.Addr // on eth0
			there netip.Addr // on eth1; the zero one: dropped
		}{
			{"masquerade", []snatRule{own}, f.uplink, eth1Addr(f)},
			{"fixed", []snatRule{fixed}, f.second, f.second},
			{"two rules, one address", []snatRule{fixed, byEth1(snatRule{id: 8, first: f.second, last: f.second})}, f.second, f.second},
			{"two addresses", []snatRule{fixed, byEth1(snatRule{id: 8, first: f.poolFirst, last: f.poolFirst})}, f.second, f.poolFirst},
			{"other ports", []snatRule{fixed, byEth1(snatRule{id: 8, first: f.second, last: f.second, ports: portRange{20000, 20000}})}, f.second, f.second},
			{"masquerade there", []snatRule{fixed, byEth1(snatRule{id: 8, masquerade: true})}, f.second, eth1Addr(f)},
			{"no rule there", []snatRule{{id: 7, uplink: uplinkIf, source: f.subnet, masquerade: true}}, f.uplink, netip.Addr{}},
			{"except there", []snatRule{own, byEth1(snatRule{id: 8, masquerade: true, except: []netip.Prefix{prefixOf(f.world)}})}, f.uplink, f.container},
			{"except here", []snatRule{byEth1(snatRule{id: 8, masquerade: true}), {id: 7, source: f.subnet, masquerade: true, except: []netip.Prefix{prefixOf(f.world)}}}, f.container, eth1Addr(f)},
			{"except both", []snatRule{{id: 7, source: f.subnet, masquerade: true, except: []netip.Prefix{prefixOf(f.world)}}}, f.container, f.container},
		} {
			for _, p := range []protocol{tcp, udp} {
				d.each(f.name+"/"+test.name+"/"+p.name, func(d *datapath) {
					d.setRules(ruleSet{snat: test.rules})
					c := d.path(f, p).as(test.here, 0).open()
					c.sends("A", "x")
					back := routeByEth1(d, f)
					sent, wire := c.as(test.there, 0).out("A", "x")
					switch {
					case !test.there.IsValid():
						c.drops(eth1, sent.forwarded(), bpf.NATCounterDROP_NO_RULE)
					case test.name == "other ports":
						wire.src = at(test.there, 20000)
						c.passes(eth1, sent.forwarded(), wire.forwarded())
					case test.there == test.here:
						was := c.mustHalf(c.outTuple())
						c.passes(eth1, sent.forwarded(), wire.forwarded())
						if h := c.mustHalf(c.outTuple()); h.Standing.Id != was.Standing.Id || h.Standing.Uplink == was.Standing.Uplink {
							d.Errorf("flow %+v became %+v", was.Standing, h.Standing)
						}
						back()
						c.sends("A", "back")
						if n := d.counts()[bpf.NATCounterFLOWS_STALE]; n != 0 {
							d.Errorf("%d stale flows", n)
						}
					default:
						c.moved(eth1, test.there)
					}
				})
			}
		}
	}
}
