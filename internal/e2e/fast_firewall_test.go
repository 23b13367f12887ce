package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// A firewall that follows connections, as hosts have it: what containers begin, what is published,
// and what belongs to either.
const statefulRules = `
table inet guard {
	counter invalid { }
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state invalid counter name invalid drop
		ct state established,related accept
		iifname "docker0" ct state new accept
		oifname "docker0" meta l4proto { tcp, udp } th dport 7000-7099 ct state new accept
	}
}`

// Beside such a firewall flows live on: while they are busy, of which conntrack sees a packet a
// second, and after idling longer than conntrack keeps a connection whose acknowledgements it
// misses. The datagrams' own timeout is not ours: what begins anew then has to be allowed.
func TestFastBesideConntrack(t *testing.T) {
	const (
		unacknowledged = "net/netfilter/nf_conntrack_tcp_timeout_unacknowledged"
		udpTimeout     = 3 * time.Second
		busy           = 4 * time.Second // more than each of the timeouts
	)
	t.Parallel()
	for _, bridgeNetfilter := range []bool{false, true} {
		t.Run(fmt.Sprintf("bridge-nf=%t", bridgeNetfilter), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, lab.Options{BridgeNetfilter: bridgeNetfilter})
			nft(t, r.Host, statefulRules)
			for key, value := range map[string]string{
				unacknowledged:                                  "1",
				"net/netfilter/nf_conntrack_udp_timeout":        "3",
				"net/netfilter/nf_conntrack_udp_timeout_stream": "3",
			} {
				if err := r.Host.SetSysctl(key, value); err != nil {
					t.Fatal(err)
				}
			}
			var err error
			if r.sysctls, err = r.Host.Sysctls(); err != nil { // what detach has to leave
				t.Fatal(err)
			}
			auto := r.attach(t, loader.AttachOptions{}).FastPath
			// By the rule or, where the kernel lists its hooks, by that.
			why := strings.Contains(auto.Reason, "nft table inet guard, chain forward, has a rule with ct") ||
				strings.Contains(auto.Reason, "netfilter's hook")
			if auto.Mode != maps.FastPathOff || !why {
				t.Errorf("auto: %+v, want off because of the rule", auto)
			}
			r.attach(t, loader.AttachOptions{FastPath: loader.FastPathEstablished})
			talks := r.talkAll(t, r.Containers[0], talkPort)
			again := r.talkAll(t, r.Containers[0], talkPort+1)
			all := append(talks, again...)
			goOn(all, false)
			r.mustBeFast(t, all)
			time.Sleep(busy)
			mustGoOn(t, all, 2*time.Second)
			pause(all)
			// 2 s are twice the timeout of connections, and 6 s that of datagrams.
			for _, idle := range []struct {
				protocol maps.Protocol
				time     time.Duration
			}{{maps.TCP, 2500 * time.Millisecond}, {maps.UDP, 2*udpTimeout - 2*time.Second}} {
				time.Sleep(idle.time)
				for i, k := range all {
					// Half of them are woken by the client, half by the server.
					waker := k.client
					if i >= len(talks) {
						waker = k.server
					}
					if k.protocol != idle.protocol || k.protocol == maps.UDP && waker == k.server && strings.HasPrefix(k.name, "snat") {
						continue // to the firewall that is the world calling a container
					}
					if err := k.ask(waker); err != nil {
						t.Errorf("%s: after idling, client first %t: %v", k.name, waker == k.client, err)
					}
				}
			}
			if t.Failed() {
				return
			}
			goOn(talks, false)
			r.mustBeFast(t, talks)
			pause(talks)
			if invalid := nft(t, r.Host, "list counter inet guard invalid"); !strings.Contains(invalid, "packets 0 ") {
				t.Errorf("conntrack took packets for invalid: %s", invalid)
			}
			nft(t, r.Host, "flush ruleset")
			r.mustNotDrop(t)
		})
	}
}

// A rule that newly forbids running flows stops them within 2 s, however long they have run: a
// lease never renews itself. And each direction by itself: datagrams of the other way go on.
func TestFastForbidden(t *testing.T) {
	const soon = 2 * time.Second
	forEachFast(t, fastVariants()[:2], lab.Options{}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		r.attach(t, attach)
		talks := r.talkAll(t, r.Containers[0], talkPort)
		nft(t, r.Host, "table inet guard { chain forward { type filter hook forward priority filter; }; }")
		goOn(talks, true)
		time.Sleep(10 * time.Second)
		r.mustBeFast(t, talks)

		forbid := func(direction string) time.Time {
			nft(t, r.Host, "add rule inet guard forward "+direction+` "docker0" meta l4proto { tcp, udp } drop`)
			return time.Now()
		}
		since := forbid("iifname")
		time.Sleep(soon + time.Second)
		for _, k := range talks {
			inside, outside := k.sides()
			mustHaveStopped(t, k.name+" outward", outside, since.Add(soon))
			if before := inside.questions.Load(); k.protocol == maps.UDP {
				poll(t, k.name+" goes on inward, which is not forbidden", func() bool { return inside.questions.Load() >= before+10 })
			}
		}
		since = forbid("oifname")
		time.Sleep(soon + 500*time.Millisecond)
		for _, k := range talks {
			inside, _ := k.sides()
			mustHaveStopped(t, k.name+" inward", inside, since.Add(soon))
		}
		if dropped := r.drops(t); len(dropped) > 0 {
			t.Errorf("dropped by us: %v", dropped)
		}
		// It was the rule, not the flow's end.
		nft(t, r.Host, "flush ruleset")
		r.mustBeFast(t, talks)
	})
}

// sides are the end in the container and the one outside.
func (k *talk) sides() (inside, outside *end) {
	if strings.HasPrefix(k.name, "dnat") {
		return k.server, k.client
	}
	return k.client, k.server
}

func mustHaveStopped(t *testing.T, what string, e *end, by time.Time) {
	t.Helper()
	if last := time.Unix(0, e.last.Load()); last.After(by.Add(stalledSince(by.Add(-changeTime)))) {
		t.Errorf("%s: the last one came %s too late", what, last.Sub(by))
	}
}
