package e2e

import (
	"math"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// backendRig has two containers that serve a port, and a third.
type backendRig struct {
	*rig
	family  lab.Family
	servers map[string][2]*lab.Echo // by protocol
}

const backendPort = 8080

func (r *rig) backends(t *testing.T, f lab.Family) *backendRig {
	t.Helper()
	b := &backendRig{r, f, map[string][2]*lab.Echo{}}
	for _, protocol := range protocols() {
		var echoes [2]*lab.Echo
		for i := range echoes {
			c := r.Containers[i]
			at := at(c.Addr(f), talkPort+uint16(i))
			var err error
			if protocol == "tcp" {
				echoes[i], err = lab.StartTCPEcho(t.Context(), c, at)
			} else {
				echoes[i], err = lab.StartUDPEcho(c, at)
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(echoes[i].Close)
		}
		b.servers[protocol] = echoes
	}
	return b
}

// publish publishes the two, TCP and UDP, with a change of that. Flows of an earlier rule are gone.
func (b *backendRig) publish(t *testing.T, change func(*maps.DNATRule)) {
	t.Helper()
	b.rules(t, func(rules *maps.Rules) error { rules.DNAT = nil; return nil })
	b.rules(t, func(rules *maps.Rules) error {
		for _, protocol := range []maps.Protocol{maps.TCP, maps.UDP} {
			rule := maps.DNATRule{Protocol: protocol, Ports: maps.SinglePort(backendPort)}
			for i, c := range b.Containers[:2] {
				rule.Backends = append(rule.Backends, maps.Backend{To: c.Addr(b.family), ToPorts: maps.SinglePort(talkPort + uint16(i))})
			}
			if change != nil {
				change(&rule)
			}
			if _, err := rules.AddDNAT(rule); err != nil {
				return err
			}
		}
		return nil
	})
}

// share makes calls from a node, and answers how many of them the first backend had.
func (b *backendRig) share(t *testing.T, client *lab.Node, protocol string, to netip.Addr, calls int) (first int) {
	t.Helper()
	echoes := b.servers[protocol]
	before := [2]int{len(echoes[0].Peers()), len(echoes[1].Peers())}
	for range calls {
		var err error
		if protocol == "tcp" {
			_, err = lab.ExchangeTCP(t.Context(), client, at(to, backendPort), []byte("x"))
		} else {
			_, err = lab.ExchangeUDP(t.Context(), client, netip.AddrPort{}, at(to, backendPort), []byte("x"))
		}
		if err != nil {
			t.Fatalf("%s from %s: %v", protocol, client.Role, err)
		}
	}
	first = len(echoes[0].Peers()) - before[0]
	if second := len(echoes[1].Peers()) - before[1]; first+second != calls {
		t.Errorf("%s from %s: %d and %d of %d calls", protocol, client.Role, first, second, calls)
	}
	return first
}

// mustShare wants the first backend to have its part of many calls, within five standard deviations.
func (b *backendRig) mustShare(t *testing.T, client *lab.Node, protocol string, to netip.Addr, part float64) {
	t.Helper()
	const calls = 100
	got := float64(b.share(t, client, protocol, to, calls))
	if off := 5 * math.Sqrt(calls*part*(1-part)); math.Abs(got-calls*part) > off {
		t.Errorf("%s from %s: the first backend had %.0f of %d, want %.0f +- %.0f", protocol, client.Role, got, calls, calls*part, off)
	}
}

// A port that two containers serve is shared by weight, or by the client's address; from the world, and
// from containers, be it one of the two. Each server has a port of its own.
func TestBackends(t *testing.T) {
	forEachMode(t, lab.Options{Containers: 3}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		r.attach(t, loader.AttachOptions{Mode: mode})
		for _, f := range lab.Families() {
			b := r.backends(t, f)
			for _, client := range []*lab.Node{r.World, r.Containers[0], r.Containers[2]} {
				for _, protocol := range protocols() {
					t.Run(name(f, client.Role, protocol), func(t *testing.T) {
						b.publish(t, nil)
						b.mustShare(t, client, protocol, r.Host.Addr(f), 0.5)
						b.publish(t, func(rule *maps.DNATRule) { rule.Backends[0].Weight = 9 })
						b.mustShare(t, client, protocol, r.Host.Addr(f), 0.9)
						for what, change := range map[string]func(*maps.DNATRule){
							"by source":     func(rule *maps.DNATRule) { rule.Balance = maps.BalanceSource },
							"with affinity": func(rule *maps.DNATRule) { rule.Affinity = time.Minute },
						} {
							b.publish(t, change)
							if first := b.share(t, client, protocol, r.Host.Addr(f), 20); first != 0 && first != 20 {
								t.Errorf("%s: the first backend had %d of 20", what, first)
							}
						}
					})
				}
			}
		}
		drops := r.drops(t)
		delete(drops, "hairpin-redirect") // which does no harm
		if len(drops) > 0 {
			t.Errorf("dropped: %v", drops)
		}
	})
}

// A backend that goes takes its flows with it at once, and the others' go on; one that comes disturbs
// nobody. The rule may have one target before or after.
func TestBackendsChange(t *testing.T) {
	forEachFast(t, staleVariants(), lab.Options{Containers: 2}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		r.attach(t, attach)
		for _, f := range lab.Families() {
			rule := func(protocol maps.Protocol, containers ...*lab.Node) maps.DNATRule {
				rule := maps.DNATRule{Protocol: protocol, Ports: maps.SinglePort(backendPort)}
				for _, c := range containers {
					rule.Backends = append(rule.Backends, maps.Backend{To: c.Addr(f), ToPorts: maps.SinglePort(talkPort)})
				}
				return rule
			}
			set := func(containers ...*lab.Node) {
				r.rules(t, func(rules *maps.Rules) error {
					rules.DNAT = []maps.DNATRule{rule(maps.TCP, containers...), rule(maps.UDP, containers...)}
					return nil
				})
			}
			first, second := r.Containers[0], r.Containers[1]
			to := at(r.Host.Addr(f), backendPort)
			set(first)
			var stays, goes []*talk
			for _, protocol := range protocols() {
				stays = append(stays, way{"stays", r.World, first, at(first.Addr(f), talkPort), to}.start(t, protocol))
			}
			goOn(stays, false)
			set(first, second)
			mustGoOn(t, stays, changeTime)
			set(second) // to have somebody talk to it
			for _, protocol := range protocols() {
				goes = append(goes, way{"goes", r.World, second, at(second.Addr(f), talkPort), to}.start(t, protocol))
			}
			pause(stays)
			for _, k := range stays {
				if k.protocol == maps.TCP {
					poll(t, name(f, "the first one's connection is reset"), func() bool { return k.client.failed.Load() != nil })
				}
			}
			goOn(goes, false)
			set(first, second)
			mustGoOn(t, goes, changeTime)
			ids := map[maps.Tuple]uint32{}
			for _, flow := range r.flows(t) {
				ids[flow.Original] = flow.ID
			}
			set(second)
			mustGoOn(t, goes, changeTime)
			for _, k := range goes {
				if flow := r.flowOf(t, k); flow.ID != ids[flow.Original] {
					t.Errorf("%s: flow %d became %d", k.name, ids[flow.Original], flow.ID)
				}
			}
			pause(goes)
		}
	})
}

// The host itself reaches several backends, too: each of its sockets keeps to one.
func TestBackendsFromHost(t *testing.T) {
	r, _ := newHostRig(t, lab.Options{Containers: 2}, loader.AttachOptions{})
	for _, f := range lab.Families() {
		b := r.backends(t, f)
		for what, to := range ownAddresses(r, f) {
			if to.IsUnspecified() { // which Go's Dial has an opinion of its own about
				continue
			}
			b.publish(t, nil)
			for _, protocol := range protocols() {
				b.mustShare(t, r.Host, protocol, to, 0.5)
			}
			echoes := b.servers["udp"]
			for range 10 {
				before := [2]int{len(echoes[0].Peers()), len(echoes[1].Peers())}
				s := newSocket(t, r.Host, unix.SOCK_DGRAM, f == lab.IPv6)
				for range 8 {
					if err := s.sendTo(at(to, backendPort), "x"); err != nil {
						t.Fatal(err)
					}
					if _, from, err := s.receive(); err != nil || from.Port() != backendPort {
						t.Errorf("%s: from %s, error %v", what, from, err)
					}
				}
				if first, second := len(echoes[0].Peers())-before[0], len(echoes[1].Peers())-before[1]; first != 0 && second != 0 {
					t.Errorf("%s: one socket had answers of both: %d and %d", what, first, second)
				}
			}
			b.publish(t, func(rule *maps.DNATRule) { rule.Affinity = time.Minute })
			for _, protocol := range protocols() {
				if first := b.share(t, r.Host, protocol, to, 20); first != 0 && first != 20 {
					t.Errorf("%s %s with affinity: the first backend had %d of 20", what, protocol, first)
				}
			}
		}
	}
}
