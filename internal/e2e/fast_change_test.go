package e2e

import (
	"fmt"
	gomaps "maps"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// changeTime is within which a change on the host takes effect; recoverTime leaves TCP the time to send
// again what was lost meanwhile.
const (
	changeTime  = 2 * time.Second
	recoverTime = changeTime + 2*time.Second
)

// arrivals counts what comes in by a device, for ports of talks, and notes when the last came.
type arrivals struct {
	capture *lab.Capture
	last    atomic.Int64
	count   atomic.Uint64
}

func watchArrivals(t *testing.T, n *lab.Node, device string, want func(lab.Packet) bool) *arrivals {
	t.Helper()
	a := &arrivals{}
	a.capture = watch(t, n, device, func(p lab.Packet) bool {
		if !p.Outgoing && want(p) {
			a.count.Add(1)
			a.last.Store(time.Now().UnixNano())
		}
		return false
	})
	return a
}

// mustStop waits until nothing comes any more, and wants the last to have come by then.
func (a *arrivals) mustStop(t *testing.T, what string, by time.Time) {
	t.Helper()
	time.Sleep(time.Until(by.Add(500 * time.Millisecond)))
	if last := time.Unix(0, a.last.Load()); last.After(by.Add(stalledSince(by.Add(-changeTime)))) {
		t.Errorf("%s: one more came %s too late", what, last.Sub(by))
	}
}

func (a *arrivals) mustStart(t *testing.T, what string, by time.Time) {
	t.Helper()
	for before := a.count.Load(); a.count.Load() < before+10; time.Sleep(time.Millisecond) {
		if time.Now().After(by.Add(stalledSince(by.Add(-changeTime)))) {
			t.Errorf("%s: nothing came in time", what)
			return
		}
	}
}

// mustRecover wants talks to go on in time.
func mustRecover(t *testing.T, talks []*talk) {
	t.Helper()
	var datagrams, connections []*talk
	for _, k := range talks {
		if k.protocol == maps.UDP {
			datagrams = append(datagrams, k)
		} else {
			connections = append(connections, k)
		}
	}
	mustGoOn(t, datagrams, changeTime)
	mustGoOn(t, connections, recoverTime)
}

// A changed route takes effect: another router on the same uplink, a policy rule for what comes in
// by the bridge, and another uplink.
func TestFastRouteChanges(t *testing.T) {
	forEachFast(t, fastVariants(), lab.Options{SecondUplink: true}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		attach.Uplinks = []string{lab.Uplink, lab.Uplink2}
		r.attach(t, attach)
		leaked := [2]*lab.Capture{watch(t, r.Router, "eth0", leaks), watch(t, r.Other, "eth0", leaks)}

		// Another router: the same node by another address and device.
		if err := r.Router.SetSysctl("net/ipv4/conf/all/arp_ignore", "1"); err != nil {
			t.Fatal(err)
		}
		ip(t, r.Router, "link add mv0 link eth0 type macvlan mode bridge", "link set mv0 up",
			"addr add 203.0.113.9/32 dev mv0", "addr add 2001:db8:113::9/128 dev mv0 nodad",
			"route add 203.0.113.2/32 dev eth0 metric 1")
		start := func(protocol string, port uint16) (talks []*talk) {
			for _, f := range lab.Families() {
				talks = append(talks, r.ways(t, r.Containers[0], f, port)[0].start(t, protocol))
			}
			goOn(talks, false)
			return talks
		}
		datagrams, connections := start("udp", talkPort), start("tcp", talkPort+1)
		r.mustBeFast(t, slices.Concat(datagrams, connections))

		for i, change := range []struct {
			name     string
			commands []string
			from, to *lab.Node
			by, then string
			back     bool // answers come back
		}{
			{"next hop", []string{"route replace 1.1.1.1 via 203.0.113.9 dev eth0",
				"-6 route replace 2606:4700:4700::1111 via 2001:db8:113::9 dev eth0"}, r.Router, r.Router, "eth0", "mv0", true},
			{"rule", []string{"route add default via 192.0.2.1 dev eth1 table 100", "-6 route add default via 2001:db8:2::1 dev eth1 table 100",
				"rule add iif docker0 lookup 100", "-6 rule add iif docker0 lookup 100"}, r.Router, r.Other, "mv0", "eth0", false},
			{"rule gone", []string{"rule del iif docker0 lookup 100", "-6 rule del iif docker0 lookup 100"}, r.Other, r.Router, "eth0", "mv0", true},
			{"uplink", []string{"route replace 1.1.1.1 via 192.0.2.1 dev eth1",
				"-6 route replace 2606:4700:4700::1111 via 2001:db8:2::1 dev eth1"}, r.Router, r.Other, "mv0", "eth0", false},
		} {
			if change.name == "next hop" { // or its neighbour entry would come first
				mustPing(t, r.Host, netip.MustParseAddr("203.0.113.9"), lab.PingOptions{})
				mustPing(t, r.Host, netip.MustParseAddr("2001:db8:113::9"), lab.PingOptions{})
			}
			var before, after []*arrivals
			for _, f := range lab.Families() {
				towards := func(p lab.Packet) bool { return p.Dst == r.World.Loopback(f) }
				before = append(before, watchArrivals(t, change.from, change.by, towards))
				after = append(after, watchArrivals(t, change.to, change.then, towards))
			}
			ip(t, r.Host, change.commands...)
			since := time.Now() // to run so many commands takes its time too
			for i, f := range lab.Families() {
				after[i].mustStart(t, name(change.name, f)+": the new way", since.Add(changeTime))
			}
			for i, f := range lab.Families() {
				if change.from != change.to { // a macvlan's packets pass eth0 too
					before[i].mustStop(t, name(change.name, f)+": the old way", since.Add(changeTime))
				}
			}
			for _, a := range slices.Concat(before, after) {
				if err := a.capture.Close(); err != nil {
					t.Error(err)
				}
			}
			if !change.back { // and with another address: see TestStaleMasquerade
				pause(connections)
				connections = nil
				continue
			}
			if connections == nil {
				connections = start("tcp", uint16(talkPort+1+i))
			}
			talks := slices.Concat(datagrams, connections)
			mustRecover(t, talks)
			r.mustBeFast(t, talks)
		}
		for _, capture := range leaked {
			mustSeeNothing(t, capture, "left with a container's address")
		}
	})
}

// When the router gets another Ethernet address, and the host knows, packets go there.
func TestFastNeighbourChanges(t *testing.T) {
	forEachFast(t, fastVariants(), lab.Options{}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		r.attach(t, attach)
		talks := r.talkAll(t, r.Containers[0], talkPort)
		goOn(talks, false)
		r.mustBeFast(t, talks)
		before := r.hardwareAddr(t, r.Router, "eth0")
		ip(t, r.Router, "link set eth0 address 02:00:00:00:99:01")
		ip(t, r.Host, "neigh flush dev eth0")
		mustRecover(t, talks)
		r.mustBeFast(t, talks)
		if now := r.hardwareAddr(t, r.Router, "eth0"); now == before {
			t.Fatal("the router has the same address as before")
		}
		r.mustNotDrop(t)
	})
}

// A container that is restarted behind the same address goes on being reached: by a new port that has no
// program, with another Ethernet address or the same.
func TestFastContainerRestarts(t *testing.T) {
	forEachFast(t, fastVariants(), lab.Options{Containers: 2}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		r.attach(t, attach)
		c := r.Containers[0]
		talks := r.talkAll(t, c, talkPort)
		goOn(talks, false)
		r.mustBeFast(t, talks)
		mac := r.hardwareAddr(t, c, "eth0")
		port := "vethc1"
		for i, next := range []string{"02:00:00:00:99:02", "02:00:00:00:99:02", mac, mac} {
			port = r.restart(t, c, port, next, i)
			mustRecover(t, talks)
			if t.Failed() {
				t.Fatalf("after restart %d, with %s", i+1, next)
			}
			if i == 1 { // and one that has a program
				attached := r.attach(t, attach)
				if len(attached.Ports) != 2 {
					t.Errorf("ports %+v", attached.Ports)
				}
			}
			r.mustBeFast(t, talks)
		}
		// Another container with its address, where the first is gone.
		moved := r.Containers[1]
		k := r.ways(t, c, lab.IPv4, talkPort+1)[1].start(t, "udp")
		k.client.goOn()
		ip(t, r.Host, "link del "+port)
		r.forget(port)
		ip(t, moved, "addr add "+c.Addr(lab.IPv4).String()+"/16 dev eth0")
		ip(t, r.Host, "neigh flush dev docker0")
		sink := watchArrivals(t, moved, "eth0", func(p lab.Packet) bool { return p.DstPort == talkPort+1 })
		sink.mustStart(t, "the other container", time.Now().Add(changeTime))
	})
}

// restart takes a container's device away and makes another, in the same namespace, so that its
// sockets live on. It returns the new port.
func (r *rig) restart(t *testing.T, c *lab.Node, port, mac string, n int) string {
	t.Helper()
	next := fmt.Sprintf("veth%d-%s", n, c.Role)
	r.forget(port)
	ip(t, r.Host, "link del "+port,
		fmt.Sprintf("link add %s type veth peer name eth0 address %s netns %s", next, mac, c.Netns),
		fmt.Sprintf("link set %s master docker0 up", next))
	ip(t, c, fmt.Sprintf("addr add %s/16 dev eth0", c.Addr(lab.IPv4)), fmt.Sprintf("addr add %s/64 dev eth0 nodad", c.Addr(lab.IPv6)),
		"link set eth0 up", fmt.Sprintf("route add default via %s", lab.BridgeAddr(lab.IPv4)),
		fmt.Sprintf("-6 route add default via %s", lab.BridgeAddr(lab.IPv6)))
	ip(t, r.Host, "neigh flush dev docker0") // a container's first ARP request does it, no sooner than 1 s after the last
	return next
}

// forget leaves a device that goes out of what detach has to leave as it was.
func (r *rig) forget(device string) {
	gomaps.DeleteFunc(r.sysctls, func(key, _ string) bool { return strings.Contains(key, "/"+device+"/") })
}

func (r *rig) hardwareAddr(t *testing.T, n *lab.Node, device string) string {
	t.Helper()
	return strings.Fields(tool(t, n, "ip", "-br", "link", "show", "dev", device))[2]
}
