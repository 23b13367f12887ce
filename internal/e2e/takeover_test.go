package e2e

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// startProxy listens at an address of a node and connects whoever comes to a server, as docker-proxy does.
func startProxy(t *testing.T, n *lab.Node, listen, to netip.AddrPort) {
	t.Helper()
	listener, err := n.ListenTCP(t.Context(), listen)
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	var held sync.Map
	t.Cleanup(func() {
		_ = listener.Close()
		held.Range(func(conn, _ any) bool { _ = conn.(net.Conn).Close(); return true })
		work.Wait()
	})
	work.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := n.DialTCP(t.Context(), netip.AddrPort{}, to)
			if err != nil {
				_ = client.Close()
				continue
			}
			held.Store(client, true)
			held.Store(server, true)
			for _, way := range [][2]net.Conn{{client, server}, {server, client}} {
				work.Go(func() {
					_, _ = io.Copy(way[0], way[1])
					_ = way[0].(*net.TCPConn).CloseWrite()
				})
			}
		}
	})
}

// A connection that docker-proxy carries is docker-proxy's until it ends, whatever rules come for its port; new
// connections go to the rule. And when the rule is gone they are docker-proxy's again.
func TestProxyConnectionsSurvive(t *testing.T) {
	for _, before := range []bool{true, false} {
		for _, fast := range []loader.FastPath{loader.FastPathEstablished, loader.FastPathAlways} {
			t.Run(fmt.Sprintf("open before attach=%t/%s", before, fast), func(t *testing.T) {
				r := newRig(t, lab.Options{})
				c := r.Containers[0]
				options := loader.AttachOptions{FastPath: fast}
				if !before {
					r.attach(t, options)
				}
				for _, f := range lab.Families() {
					startProxy(t, r.Host, at(r.Host.Addr(f), 8080), at(c.Addr(f), 80))
				}
				talks := make(map[lab.Family]*talk)
				for _, f := range lab.Families() {
					w := way{"proxy", r.World, c, at(c.Addr(f), 80), at(r.Host.Addr(f), 8080)}
					talks[f] = w.start(t, "tcp")
				}
				if before {
					r.attach(t, options)
				}
				for _, f := range lab.Families() {
					k := talks[f]
					ask := func(when string) {
						t.Helper()
						for side, e := range map[string]*end{"client": k.client, "server": k.server} {
							if err := k.ask(e); err != nil {
								t.Errorf("%s, %s: the %s asks: %v", f, when, side, err)
							}
						}
					}
					r.dnat(t, 8080, at(c.Addr(f), 80), nil)
					ask("a rule has come")
					call{"tcp", r.World, c, at(c.Addr(f), 80), at(r.Host.Addr(f), 8080)}.mustSee(t, r.World.Addr(f))
					k.client.goOn()
					mustGoOn(t, []*talk{k}, recoverTime)
					k.client.pause()
					r.rules(t, func(rules *maps.Rules) error { rules.DNAT = nil; return nil })
					ask("the rule has gone")
					call{"tcp", r.World, c, at(c.Addr(f), 80), at(r.Host.Addr(f), 8080)}.mustSee(t, lab.BridgeAddr(f))
					r.dnat(t, 8080, at(c.Addr(f), 80), nil)
					ask("it is back")
					if got := k.client.conn.(*net.TCPConn).CloseWrite(); got != nil {
						t.Error(got)
					}
					poll(t, "the server hears that the client has ended", func() bool { return k.server.failed.Load() != nil })
				}
				r.mustNotDrop(t)
			})
		}
	}
}

// masqueradeRules are what Docker's iptables rules come to: out by masquerade, and in by a published port.
func masqueradeRules(c *lab.Node) string {
	return fmt.Sprintf(`
table ip nat {
	chain post { type nat hook postrouting priority srcnat; ip saddr 172.17.0.0/16 oifname != "docker0" masquerade; }
	chain pre { type nat hook prerouting priority dstnat; fib daddr type local meta l4proto { tcp, udp } th dport %[1]d dnat to %[2]s:%[3]d; }
}
table ip6 nat {
	chain post { type nat hook postrouting priority srcnat; ip6 saddr fd00:17::/64 oifname != "docker0" masquerade; }
	chain pre { type nat hook prerouting priority dstnat; fib daddr type local meta l4proto { tcp, udp } th dport %[1]d dnat to [%[4]s]:%[3]d; }
}`, published(talkPort), c.Addr(lab.IPv4), talkPort, c.Addr(lab.IPv6))
}

// Conversations that run through iptables' or nftables' NAT go on when attach runs and those rules go, in both directions:
// at once where nothing was sent meanwhile. What is sent while both are there is lost, which TCP makes up for.
func TestTakesOverFromMasquerade(t *testing.T) {
	for _, fast := range []loader.FastPath{loader.FastPathOff, loader.FastPathEstablished} {
		for _, meanwhile := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/sent meanwhile=%t", fast, meanwhile), func(t *testing.T) {
				r := newRig(t, lab.Options{})
				c := r.Containers[0]
				nft(t, r.Host, masqueradeRules(c))
				var talks []*talk
				for _, f := range lab.Families() {
					outside := at(r.World.Loopback(f), talkPort)
					for _, w := range []way{
						{"snat", c, r.World, outside, outside},
						{"dnat", r.World, c, at(c.Addr(f), talkPort), at(r.Host.Addr(f), published(talkPort))},
					} {
						for _, protocol := range protocols() {
							talks = append(talks, w.start(t, protocol))
						}
					}
				}
				leaked := watch(t, r.Router, "eth0", leaks)
				r.attach(t, loader.AttachOptions{FastPath: fast})
				for _, f := range lab.Families() {
					r.dnat(t, published(talkPort), at(c.Addr(f), talkPort), nil)
				}
				if meanwhile {
					r.sendInVain(t, talks)
				}
				nft(t, r.Host, "flush ruleset")
				for _, k := range talks {
					for _, e := range []*end{k.client, k.server} {
						poll(t, k.name+": what was sent meanwhile is answered", func() bool {
							return k.protocol == maps.UDP || e.answers.Load() == e.asked.Load()
						})
						if err := k.ask(e); err != nil {
							t.Errorf("%s: client asks %t: %v", k.name, e == k.client, err)
						}
					}
				}
				// And they are flows as all others are, on the fast path where there is one.
				goOn(talks, false)
				if fast == loader.FastPathOff {
					mustGoOn(t, talks, changeTime)
				} else {
					r.attach(t, loader.AttachOptions{FastPath: fast})
					r.mustBeFast(t, talks)
				}
				pause(talks)
				mustSeeNothing(t, leaked, "left with a container's address")
			})
		}
	}
}

// sendInVain has all ends send something that is lost, as status tells.
func (r *rig) sendInVain(t *testing.T, talks []*talk) {
	t.Helper()
	for _, k := range talks {
		for _, e := range []*end{k.client, k.server} {
			before, answers := r.drops(t)["no-flow"], e.answers.Load()
			if err := e.question(); err != nil {
				t.Fatal(err)
			}
			poll(t, k.name+": a packet is counted as dropped", func() bool { return r.drops(t)["no-flow"] > before })
			if e.answers.Load() != answers {
				t.Errorf("%s: an answer beside the rules of another NAT", k.name)
			}
		}
	}
}
