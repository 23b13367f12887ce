package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// A port is reached by each address of the host and answers from that; with an address in the rule by that alone; and
// the more specific of two rules wins.
func TestPublishedByAddress(t *testing.T) {
	r := newRig(t, lab.Options{Containers: 2})
	r.ownSecondHost(t)
	r.attach(t, loader.AttachOptions{})
	first, second := r.Containers[0], r.Containers[1]
	for _, f := range lab.Families() {
		own, other, world := r.Host.Addr(f), secondHost(f), r.World.Addr(f)
		one, two := at(first.Addr(f), 80), at(second.Addr(f), 80)
		t.Run(name(f, "any"), func(t *testing.T) {
			r.dnat(t, 8001, one, nil)
			for _, host := range []netip.Addr{own, other} {
				r.mustLeadTo(t, r.World, first, one, at(host, 8001), world)
			}
		})
		t.Run(name(f, "one"), func(t *testing.T) {
			r.dnat(t, 8002, one, func(rule *maps.DNATRule) { rule.Destination = other })
			r.mustLeadTo(t, r.World, first, one, at(other, 8002), world)
			r.mustLeadNowhere(t, r.World, first, one, at(own, 8002))
		})
		t.Run(name(f, "specific wins"), func(t *testing.T) {
			r.dnat(t, 8003, one, nil)
			r.dnat(t, 8003, two, func(rule *maps.DNATRule) { rule.Destination = other })
			r.mustLeadTo(t, r.World, first, one, at(own, 8003), world)
			r.mustLeadTo(t, r.World, second, two, at(other, 8003), world)
		})
		t.Run(name(f, "delete one of two"), func(t *testing.T) {
			r.rules(t, func(rules *maps.Rules) error {
				for _, rule := range append([]maps.DNATRule(nil), rules.DNAT...) {
					if rule.Ports.First == 8003 && rule.Destination == other && rule.Protocol == maps.TCP {
						if _, err := rules.DeleteDNAT(rule); err != nil {
							return err
						}
					}
				}
				return nil
			})
			for protocol, wins := range map[string]*lab.Node{"tcp": first, "udp": second} {
				call{protocol, r.World, wins, at(wins.Addr(f), 80), at(other, 8003)}.mustSee(t, world)
				call{protocol, r.World, first, one, at(own, 8003)}.mustSee(t, world)
			}
		})
	}
	r.mustNotDrop(t)
}

// Ranges of ports, to the same ports and to others: both ends lead into the container, and what is beside them does not.
func TestPublishedRanges(t *testing.T) {
	r := newRig(t, lab.Options{})
	r.attach(t, loader.AttachOptions{})
	c := r.Containers[0]
	for _, f := range lab.Families() {
		for _, test := range []struct {
			name      string
			ports, to maps.PortRange
		}{
			{"same", maps.PortRange{First: 5000, Last: 5010}, maps.PortRange{}},
			{"shifted", maps.PortRange{First: 8000, Last: 8010}, maps.PortRange{First: 80, Last: 90}},
		} {
			t.Run(name(f, test.name), func(t *testing.T) {
				r.publish(t, test.ports, c.Addr(f), test.to)
				first := test.to.First
				if first == 0 {
					first = test.ports.First
				}
				for _, offset := range []uint16{0, 4, 10} {
					r.mustLeadTo(t, r.World, c, at(c.Addr(f), first+offset), at(r.Host.Addr(f), test.ports.First+offset), r.World.Addr(f))
				}
				r.mustLeadNowhere(t, r.World, c, at(c.Addr(f), first-1), at(r.Host.Addr(f), test.ports.First-1))
				r.mustLeadNowhere(t, r.World, c, at(c.Addr(f), first+11), at(r.Host.Addr(f), test.ports.Last+1))
			})
		}
	}
	r.mustNotDrop(t)
}

// One port at two loopback addresses leads into two containers; and a neighbour on the uplink that sends to a loopback
// address, to the host's Ethernet address, reaches neither.
func TestPublishedOnLoopback(t *testing.T) {
	r, _ := newHostRig(t, lab.Options{Containers: 2}, loader.AttachOptions{})
	mark := []byte("for a loopback address")
	var inward []*lab.Capture
	loopbacks := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2"), netip.IPv6Loopback()}
	for i, c := range r.Containers {
		r.dnat(t, 3005, at(c.Addr(lab.IPv4), 80), func(rule *maps.DNATRule) { rule.Destination = loopbacks[i] })
		inward = append(inward, watch(t, c, "eth0", func(p lab.Packet) bool { return bytes.Contains(p.Payload, mark) }))
	}
	r.dnat(t, 3005, at(r.Containers[0].Addr(lab.IPv6), 80), func(rule *maps.DNATRule) { rule.Destination = loopbacks[2] })
	for i, c := range r.Containers {
		call{"tcp", r.Host, c, at(c.Addr(lab.IPv4), 80), at(loopbacks[i], 3005)}.mustSee(t, lab.BridgeAddr(lab.IPv4))
	}

	// To the container too, at the address that the rule leads to, in case a loopback rule is taken for one of the world's.
	sender, err := lab.OpenFrameSender(r.Router, "eth0")
	if err != nil {
		t.Fatal(err)
	}
	defer sender.Close()
	for _, to := range loopbacks {
		from := at(r.Router.Addr(lab.FamilyOf(to)), 5555)
		frame := udpFrame(t, r.hardwareAddr(t, r.Router, "eth0"), r.hardwareAddr(t, r.Host, lab.Uplink), from, at(to, 3005), mark)
		if err := sender.Send(frame); err != nil {
			t.Fatal(err)
		}
	}
	poll(t, "three packets are counted as dropped", func() bool { return r.drops(t)["loopback"] == 3 })
	for i, capture := range inward {
		mustSeeNothing(t, capture, fmt.Sprintf("container %d got a packet for a loopback address", i+1))
	}
}

// A second container takes over a port: a client that goes on from its port reaches the new one at once, by UDP, and by
// TCP even where the first connection has just been closed by the server, which keeps it in TIME_WAIT.
func TestPublishedTakenOver(t *testing.T) {
	for _, fast := range []loader.FastPath{loader.FastPathOff, loader.FastPathEstablished, loader.FastPathAlways} {
		t.Run(fast.String(), func(t *testing.T) {
			r := newRig(t, lab.Options{Containers: 2})
			r.attach(t, loader.AttachOptions{FastPath: fast})
			for _, f := range lab.Families() {
				to := at(r.Host.Addr(f), 8080)
				for i, c := range []*lab.Node{r.Containers[0], r.Containers[1], r.Containers[0]} {
					r.rules(t, func(rules *maps.Rules) error { rules.DNAT = nil; return nil })
					r.dnat(t, 8080, at(c.Addr(f), 80), nil)
					echo, err := lab.StartUDPEcho(c, at(c.Addr(f), 80))
					if err != nil {
						t.Fatal(err)
					}
					for range 3 {
						if _, err := lab.ExchangeUDP(t.Context(), r.World, at(r.World.Addr(f), 5555), to, []byte("x")); err != nil {
							t.Errorf("%s: udp to server %d: %v", f, i, err)
						}
					}
					if n := len(echo.Peers()); n != 3 {
						t.Errorf("%s: server %d saw %d datagrams of 3", f, i, n)
					}
					echo.Close()
					if err := r.closedByServer(t, c, at(c.Addr(f), 80), at(r.World.Addr(f), 6666), to); err != nil {
						t.Errorf("%s: tcp to server %d: %v", f, i, err)
					}
				}
			}
		})
	}
}

// closedByServer has the server close a connection first, as soon as it is there.
func (r *rig) closedByServer(t *testing.T, server *lab.Node, listen, from, to netip.AddrPort) error {
	t.Helper()
	listener, err := server.ListenTCP(t.Context(), listen)
	if err != nil {
		return err
	}
	defer listener.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn, err := r.World.DialTCP(ctx, from, to)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := listener.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	accepted, err := listener.Accept()
	if err != nil {
		return err
	}
	if err := accepted.Close(); err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
		return fmt.Errorf("%d bytes, error %v, want the end", n, err)
	}
	return nil
}

// A rule that overlaps with one in force is refused as a whole, and the one in force goes on.
func TestPublishedPortInUse(t *testing.T) {
	r := newRig(t, lab.Options{Containers: 2})
	r.attach(t, loader.AttachOptions{})
	for _, f := range lab.Families() {
		one, two := at(r.Containers[0].Addr(f), 80), at(r.Containers[1].Addr(f), 80)
		r.dnat(t, 8080, one, nil)
		err := r.tryRules(t, func(rules *maps.Rules) error {
			_, err := rules.AddDNAT(maps.DNATRule{
				Protocol: maps.TCP, Ports: maps.PortRange{First: 8079, Last: 8080}, To: two.Addr(), ToPorts: maps.PortRange{First: 79, Last: 80},
			})
			return err
		})
		if !errors.Is(err, maps.ErrRuleOverlap) {
			t.Errorf("%s: %v, want %v", f, err, maps.ErrRuleOverlap)
		}
		r.mustLeadTo(t, r.World, r.Containers[0], one, at(r.Host.Addr(f), 8080), r.World.Addr(f))
		r.mustLeadNowhere(t, r.World, r.Containers[1], at(two.Addr(), 79), at(r.Host.Addr(f), 8079))
	}
}

// tryRules changes the rules in force, or says why not.
func (r *rig) tryRules(t *testing.T, change func(*maps.Rules) error) error {
	t.Helper()
	return r.Host.Do(func() error {
		d, err := loader.OpenForWrite(r.inst)
		if err != nil {
			return err
		}
		rules, err := d.State().Rules()
		if err == nil {
			err = change(&rules)
		}
		if err == nil {
			err = d.State().SetRules(rules)
		}
		return errors.Join(err, d.Close())
	})
}

// Flushing the whole ruleset of nftables, as a firewall's reload does, changes nothing, and neither does iptables-restore.
func TestFirewallReload(t *testing.T) {
	r := newRig(t, lab.Options{})
	r.attach(t, loader.AttachOptions{})
	c := r.Containers[0]
	talks := r.talkAll(t, c, talkPort)
	goOn(talks, false)
	for _, reload := range []func(){
		func() { nft(t, r.Host, "flush ruleset") },
		func() {
			nft(t, r.Host, "table inet t { chain f { type filter hook forward priority filter; policy accept; }; }")
		},
		func() { nft(t, r.Host, "flush ruleset") },
		func() { tool(t, r.Host, "iptables", "-t", "nat", "-F") },
		func() { tool(t, r.Host, "nft", "flush", "ruleset") },
	} {
		reload()
		mustGoOn(t, talks, changeTime)
	}
	pause(talks)
	for _, f := range lab.Families() {
		mustPing(t, c, r.World.Loopback(f), lab.PingOptions{})
	}
	r.mustNotDrop(t)
}

// Where the host's firewall drops what it forwards, preflight says so; with rules that let containers' traffic pass, all
// works, names included, which are UDP to port 53.
func TestDefaultDropFirewall(t *testing.T) {
	r := newRig(t, lab.Options{})
	nft(t, r.Host, "table inet guard { chain forward { type filter hook forward priority filter; policy drop; }; }")
	r.attach(t, loader.AttachOptions{})
	c := r.Containers[0]
	var findings []loader.Finding
	if err := r.Host.Do(func() (err error) {
		findings, err = loader.Preflight([]string{lab.Bridge}, []string{lab.Uplink})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	warned := false
	for _, f := range findings {
		warned = warned || f.Setting == "policy of inet guard forward"
	}
	if !warned {
		t.Errorf("preflight finds %+v, and not the policy", findings)
	}
	for _, f := range lab.Families() {
		mustNotPing(t, c, r.World.Loopback(f), lab.PingOptions{})
	}
	for _, rule := range []string{`iifname "docker0" accept`, `oifname "docker0" accept`} {
		nft(t, r.Host, "add rule inet guard forward "+rule)
	}
	for _, f := range lab.Families() {
		mustPing(t, c, r.World.Loopback(f), lab.PingOptions{})
		for _, protocol := range protocols() {
			resolver := at(r.World.Loopback(f), 53)
			call{protocol, c, r.World, resolver, resolver}.mustSee(t, r.Host.Addr(f))
		}
		r.dnat(t, 8080, at(c.Addr(f), 80), nil)
		r.mustLeadTo(t, r.World, c, at(c.Addr(f), 80), at(r.Host.Addr(f), 8080), r.World.Addr(f))
	}
	r.mustNotDrop(t)
}
