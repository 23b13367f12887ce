package e2e

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// A second way to the world: its host and its world have .2 and .1 of these.
const (
	way2     = "way2"
	way2IPv4 = "198.51.99.%d"
	way2IPv6 = "2001:db8:99::%d"
)

func way2Addr(f lab.Family, n int) netip.Addr {
	if f == lab.IPv4 {
		return netip.MustParseAddr(fmt.Sprintf(way2IPv4, n))
	}
	return netip.MustParseAddr(fmt.Sprintf(way2IPv6, n))
}

// secondWay makes another uplink that leads to the world.
func (r *rig) secondWay(t *testing.T) {
	t.Helper()
	r.owned = append(r.owned, way2)
	ip(t, r.Host, "link add "+way2+" type veth peer name "+way2+" netns "+r.World.Netns)
	for n, node := range []*lab.Node{1: r.World, 2: r.Host} {
		if node == nil {
			continue
		}
		ip(t, node, fmt.Sprintf("addr add "+way2IPv4+"/24 dev "+way2, n), fmt.Sprintf("addr add "+way2IPv6+"/64 dev "+way2+" nodad", n),
			"link set "+way2+" up")
	}
}

// routeBy leads what goes to the world's own address by a device.
func (r *rig) routeBy(t *testing.T, device string) {
	t.Helper()
	for _, f := range lab.Families() {
		next := r.World.Addr(f)
		if device == way2 {
			next = way2Addr(f, 1)
		}
		ip(t, r.Host, fmt.Sprintf("-%d route replace %s via %s dev %s", int(f), r.World.Loopback(f), next, device))
	}
}

// staleVariants are the ways to have a fast path, and none.
func staleVariants() []loader.AttachOptions {
	return append(fastVariants(),
		loader.AttachOptions{FastPath: loader.FastPathOff, Mode: loader.Auto},
		loader.AttachOptions{FastPath: loader.FastPathAlways, Mode: loader.Clsact})
}

// sources notes the addresses that datagrams to the world's port come from, and when each came last.
func (r *rig) sources(t *testing.T, f lab.Family, from netip.Addr) *arrivals {
	t.Helper()
	a := &arrivals{}
	for _, device := range []string{"eth0", way2} {
		capture := watch(t, r.World, device, func(p lab.Packet) bool {
			if !p.Outgoing && p.Src == from && p.Dst == r.World.Loopback(f) {
				a.count.Add(1)
				a.last.Store(time.Now().UnixNano())
			}
			return false
		})
		a.capture = capture
	}
	return a
}

// change is something that happens to the host's uplinks, after which another address is due.
type change struct {
	name       string
	commands   func(f lab.Family) []string
	from, then func(r *rig, f lab.Family) netip.Addr
}

func hostAddr(r *rig, f lab.Family) netip.Addr { return r.Host.Addr(f) }

func newHostAddr(_ *rig, f lab.Family) netip.Addr {
	if f == lab.IPv4 {
		return netip.MustParseAddr("203.0.113.50")
	}
	return netip.MustParseAddr("2001:db8:113::50")
}

func way2Host(_ *rig, f lab.Family) netip.Addr { return way2Addr(f, 2) }

func bits(f lab.Family) int {
	if f == lab.IPv4 {
		return 24
	}
	return 64
}

// nodad is what an IPv6 address needs to be of use at once.
func nodad(f lab.Family) string {
	if f == lab.IPv6 {
		return " nodad"
	}
	return ""
}

func changes(r *rig) []change {
	world := func(f lab.Family, via netip.Addr, device string) string {
		return fmt.Sprintf("route replace %s via %s dev %s", r.World.Loopback(f), via, device)
	}
	return []change{
		{"to another uplink", func(f lab.Family) []string {
			return []string{world(f, way2Addr(f, 1), way2)}
		}, hostAddr, way2Host},
		{"and back", func(f lab.Family) []string {
			return []string{world(f, r.World.Addr(f), "eth0")}
		}, way2Host, hostAddr},
		{"another address", func(f lab.Family) []string {
			return []string{
				fmt.Sprintf("addr del %s/%d dev eth0", hostAddr(r, f), bits(f)),
				fmt.Sprintf("addr add %s/%d dev eth0%s", newHostAddr(r, f), bits(f), nodad(f)),
				world(f, r.World.Addr(f), "eth0"),
			}
		}, hostAddr, newHostAddr},
		{"one of two addresses goes", func(f lab.Family) []string {
			return []string{
				fmt.Sprintf("addr add %s/%d dev eth0%s", hostAddr(r, f), bits(f), nodad(f)),
				fmt.Sprintf("addr del %s/%d dev eth0", newHostAddr(r, f), bits(f)),
				world(f, r.World.Addr(f), "eth0"),
			}
		}, newHostAddr, hostAddr},
	}
}

// When the host loses the address that masquerade gave, or routes by another uplink, datagrams go on with
// another address: all are answered within two seconds, and the old address is not seen any more. A TCP
// connection cannot go on, and the container's socket is told by its peer.
func TestStaleMasquerade(t *testing.T) {
	forEachFast(t, staleVariants(), lab.Options{NearWorld: true, HostSysctls: map[string]string{
		"net/ipv4/conf/all/promote_secondaries": "1",
	}}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		r.secondWay(t)
		r.routeBy(t, "eth0")
		attach.Uplinks = []string{lab.Uplink, way2}
		r.attach(t, attach)
		leaks := []*lab.Capture{watch(t, r.World, "eth0", leaks), watch(t, r.World, way2, leaks)}
		var datagrams []*talk
		for _, f := range lab.Families() {
			outside := at(r.World.Loopback(f), talkPort)
			datagrams = append(datagrams, way{"snat", r.Containers[0], r.World, outside, outside}.start(t, "udp"))
		}
		goOn(datagrams, false)
		for i, c := range changes(r) {
			var connections []*talk
			old, now := map[lab.Family]*arrivals{}, map[lab.Family]*arrivals{}
			for _, f := range lab.Families() {
				outside := at(r.World.Loopback(f), uint16(talkPort+1+i))
				k := way{"snat", r.Containers[0], r.World, outside, outside}.start(t, "tcp")
				k.client.goOn()
				connections = append(connections, k)
				old[f], now[f] = r.sources(t, f, c.from(r, f)), r.sources(t, f, c.then(r, f))
			}
			mustGoOn(t, datagrams, changeTime)
			for _, f := range lab.Families() {
				for _, command := range c.commands(f) {
					ip(t, r.Host, fmt.Sprintf("-%d %s", int(f), command))
				}
			}
			since := time.Now() // to run so many commands takes its time too
			for _, f := range lab.Families() {
				now[f].mustStart(t, name(c.name, f)+": the new address", since.Add(changeTime))
			}
			mustGoOn(t, datagrams, changeTime)
			for _, k := range connections {
				poll(t, name(c.name, k.name)+": the container's socket is told", func() bool { return k.client.failed.Load() != nil })
				// the writer may have had the reset already
				if failed := k.client.failed.Load(); failed != nil && !errors.Is(*failed, syscall.ECONNRESET) && !errors.Is(*failed, io.EOF) {
					t.Errorf("%s: %v, want a reset", k.name, *failed)
				}
			}
			for _, f := range lab.Families() {
				old[f].mustStop(t, name(c.name, f)+": the old address", since.Add(changeTime))
			}
			if t.Failed() {
				t.Fatalf("after %s; flows: %s", c.name, r.flowsText(t))
			}
		}
		pause(datagrams)
		if n := r.counter(t, "flows-stale"); n < 2*2*4 {
			t.Errorf("%d flows were stale, want %d", n, 2*2*4)
		}
		for _, leak := range leaks {
			mustSeeNothing(t, leak, "left with a container's address")
		}
	})
}

func (r *rig) flowsText(t *testing.T) string {
	t.Helper()
	var text strings.Builder
	for _, flow := range r.flows(t) {
		fmt.Fprintf(&text, "%s %s %s / %s\n", flow.State, flow.Translation, flow.Original, flow.Reply)
	}
	return text.String()
}

// A rule that gives the same address on both uplinks lets a connection go on by the other one; and an
// address that is the host's still keeps its flows, whichever one new flows would get.
func TestNotStale(t *testing.T) {
	forEachFast(t, staleVariants(), lab.Options{NearWorld: true}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		r.secondWay(t)
		r.routeBy(t, "eth0")
		attach.Uplinks = []string{lab.Uplink, way2}
		r.attach(t, attach)
		start := func(port uint16) (talks []*talk) {
			for _, f := range lab.Families() {
				outside := at(r.World.Loopback(f), port)
				for _, protocol := range protocols() {
					talks = append(talks, way{"snat", r.Containers[0], r.World, outside, outside}.start(t, protocol))
				}
			}
			goOn(talks, false)
			return talks
		}
		same := func(before []maps.Flow) {
			t.Helper()
			now := make(map[maps.Tuple]maps.Flow)
			for _, flow := range r.flows(t) {
				now[flow.Original] = flow
			}
			for _, was := range before {
				if flow := now[was.Original]; flow.ID != was.ID || flow.Reply != was.Reply {
					t.Errorf("flow %d %s / %s became %d %s", was.ID, was.Original, was.Reply, flow.ID, flow.Reply)
				}
			}
		}

		masqueraded := start(talkPort)
		before := r.flows(t)
		ip(t, r.Host,
			"addr add 203.0.113.51/24 dev eth0", "-6 addr change 2001:db8:113::2/64 dev eth0 preferred_lft 0",
			"-6 addr add 2001:db8:113::51/64 dev eth0 nodad")
		time.Sleep(changeTime)
		mustGoOn(t, masqueraded, changeTime)
		same(before)
		pause(masqueraded)

		r.rules(t, func(rules *maps.Rules) error {
			rules.SNAT = nil
			for _, f := range lab.Families() {
				fixed := maps.SNATRule{Source: lab.BridgeSubnet(f), ToFirst: r.Host.Addr(f)}
				if _, err := rules.AddSNAT(fixed); err != nil {
					return err
				}
			}
			return nil
		})
		fixed := start(talkPort + 1)
		before = r.flows(t)
		ip(t, r.World, "route add "+r.Host.Addr(lab.IPv4).String()+" via 198.51.99.2", "-6 route add "+r.Host.Addr(lab.IPv6).String()+" via 2001:db8:99::2")
		r.routeBy(t, way2)
		mustRecover(t, fixed)
		var living []maps.Flow
		for _, flow := range before {
			if flow.Original.Dst.Port() == talkPort+1 {
				living = append(living, flow)
			}
		}
		same(living)
		if n := r.counter(t, "flows-stale"); n != 0 {
			t.Errorf("%d flows were stale", n)
		}
	})
}

// A published port that goes to another container takes its clients along at once, also those that go on
// from the port that they have: datagrams reach the second container, and a connection to the first is
// reset. From the world, and from a neighbour (hairpin).
func TestPublishedMoves(t *testing.T) {
	forEachFast(t, staleVariants(), lab.Options{Containers: 3}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		r.attach(t, attach)
		first, second, neighbour := r.Containers[0], r.Containers[1], r.Containers[2]
		for _, f := range lab.Families() {
			for i, client := range []*lab.Node{r.World, neighbour} {
				port := uint16(talkPort + i)
				r.publish(t, maps.SinglePort(published(port)), first.Addr(f), maps.SinglePort(port))
				w := way{fmt.Sprintf("%s/%s", f, client.Role), client, first, at(first.Addr(f), port), at(r.Host.Addr(f), published(port))}
				datagrams, connection := w.start(t, "udp"), w.start(t, "tcp")
				goOn([]*talk{datagrams, connection}, false)
				mustGoOn(t, []*talk{datagrams, connection}, changeTime)
				echo, err := lab.StartUDPEcho(second, at(second.Addr(f), port))
				if err != nil {
					t.Fatal(err)
				}
				defer echo.Close()
				var asked uint64
				r.rules(t, func(rules *maps.Rules) error {
					for i := range rules.DNAT {
						if rules.DNAT[i].To == first.Addr(f) {
							rules.DNAT[i].To = second.Addr(f)
						}
					}
					return nil
				})
				asked = datagrams.server.questions.Load() // the change is in force
				poll(t, w.name+": datagrams reach the second container", func() bool { return len(echo.Peers()) > 0 })
				if more := datagrams.server.questions.Load() - asked; more > 100 { // what was under way
					t.Errorf("%s: %d datagrams more to the first container", w.name, more)
				}
				poll(t, w.name+": the connection is reset", func() bool { return connection.client.failed.Load() != nil })
				datagrams.server.settle(t, &datagrams.server.questions)
				now := datagrams.server.questions.Load()
				mustGoOn(t, []*talk{datagrams}, changeTime)
				if datagrams.server.questions.Load() != now {
					t.Errorf("%s: datagrams go to the first container still", w.name)
				}
				pause([]*talk{datagrams, connection})

				// and where it is published no more, nowhere
				datagrams.client.settle(t, &datagrams.client.answers)
				r.rules(t, func(rules *maps.Rules) error { rules.DNAT = nil; return nil })
				if err := datagrams.ask(datagrams.client); err == nil {
					t.Errorf("%s: answered though the rule is gone", w.name)
				}
			}
		}
	})
}
