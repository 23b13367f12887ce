package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// redirects counts the ICMP redirects that a node gets.
func redirects(t *testing.T, n *lab.Node) *atomic.Int64 {
	t.Helper()
	var count atomic.Int64
	watch(t, n, "eth0", func(p lab.Packet) bool {
		if !p.Outgoing && len(p.Payload) > 0 &&
			(p.Protocol == unix.IPPROTO_ICMP && p.Payload[0] == 5 || p.Protocol == unix.IPPROTO_ICMPV6 && p.Payload[0] == 137) {
			count.Add(1)
		}
		return false
	})
	return &count
}

// A container reaches its own published port and its neighbour's by each address of the host, which is
// what the server sees, whether bridged packets go through netfilter or not, and on no fast path and each.
func TestHairpin(t *testing.T) {
	for _, filtered := range []bool{false, true} {
		for _, fast := range []loader.FastPath{loader.FastPathOff, loader.FastPathEstablished, loader.FastPathAlways} {
			t.Run(fmt.Sprintf("bridge-nf-call=%t/%s", filtered, fast), func(t *testing.T) {
				forEachMode(t, lab.Options{Containers: 2, BridgeNetfilter: filtered}, func(t *testing.T, r *rig, mode loader.AttachMode) {
					r.attach(t, loader.AttachOptions{Mode: mode, FastPath: fast})
					told := []*atomic.Int64{redirects(t, r.Containers[0]), redirects(t, r.Containers[1])}
					for _, f := range lab.Families() {
						for i, server := range r.Containers {
							port := uint16(8080 + i)
							r.publish(t, maps.SinglePort(port), server.Addr(f), maps.SinglePort(80))
							for _, client := range r.Containers {
								for _, host := range []netip.Addr{r.Host.Addr(f), lab.BridgeAddr(f)} {
									for _, protocol := range protocols() {
										call{protocol, client, server, at(server.Addr(f), 80), at(host, port)}.mustSee(t, host)
									}
								}
							}
							// from outside as ever
							call{"tcp", r.World, server, at(server.Addr(f), 80), at(r.Host.Addr(f), port)}.mustSee(t, r.World.Addr(f))
						}
					}
					for i, count := range told {
						if n := count.Load(); n > 0 {
							t.Errorf("container %d was told %d times that the server is its neighbour", i, n)
						}
					}
				})
			})
		}
	}
}

// A firewall that knows connections lets hairpin ones pass, wherever netfilter gets to see bridged packets: to
// conntrack both directions are of one connection.
func TestHairpinBesideConntrack(t *testing.T) {
	for _, filtered := range []bool{false, true} {
		t.Run(fmt.Sprintf("bridge-nf-call=%t", filtered), func(t *testing.T) {
			forEachMode(t, lab.Options{Containers: 2, BridgeNetfilter: filtered}, func(t *testing.T, r *rig, mode loader.AttachMode) {
				nft(t, r.Host, `table inet guard { chain forward { type filter hook forward priority filter; policy drop;
					ct state invalid counter name invalid drop; ct state established,related accept; ct state new ct direction original accept; };
					counter invalid { }; }`)
				r.attach(t, loader.AttachOptions{Mode: mode})
				for _, f := range lab.Families() {
					client := r.Containers[0]
					for i, server := range r.Containers {
						r.publish(t, maps.SinglePort(uint16(8080+i)), server.Addr(f), maps.SinglePort(80))
						for _, host := range []netip.Addr{r.Host.Addr(f), lab.BridgeAddr(f)} {
							for _, protocol := range protocols() {
								call{protocol, client, server, at(server.Addr(f), 80), at(host, uint16(8080+i))}.mustSee(t, host)
							}
						}
					}
				}
				if invalid := nft(t, r.Host, "list counter inet guard invalid"); !strings.Contains(invalid, "packets 0 ") {
					t.Errorf("conntrack took packets for invalid: %s", invalid)
				}
			})
		})
	}
}

// A transfer by hairpin survives upgrades, and ends with its rule.
func TestHairpinLasts(t *testing.T) {
	forEachMode(t, lab.Options{Containers: 2}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		options := loader.AttachOptions{Mode: mode}
		r.attach(t, options)
		for _, f := range lab.Families() {
			client, server := r.Containers[0], r.Containers[1]
			r.publish(t, maps.SinglePort(8080), server.Addr(f), maps.SinglePort(80))
			echo, err := lab.StartUDPEcho(server, at(server.Addr(f), 80))
			if err != nil {
				t.Fatal(err)
			}
			exchange := func() error {
				_, err := lab.ExchangeUDP(t.Context(), client, at(client.Addr(f), 5000), at(r.Host.Addr(f), 8080), []byte("hello"))
				return err
			}
			for build := range 3 {
				options.Spec = otherBuild(build)
				r.attach(t, options)
				if err := exchange(); err != nil {
					t.Errorf("after upgrade %d: %v", build, err)
				}
			}
			if peers := slices.Compact(echo.Peers()); len(peers) != 1 {
				t.Errorf("the server saw %v, want one client", peers)
			}
			r.rules(t, func(rules *maps.Rules) error {
				*rules = maps.Rules{SNAT: rules.SNAT}
				return nil
			})
			if err := exchange(); err == nil {
				t.Error("an answer without a rule")
			}
			echo.Close()
		}
		poll(t, "transit halves go with their flows", func() bool { return r.elements(t)["flows"] == 0 })
	})
}

// Where nobody listens, the client's socket learns of it: the server's ICMP error comes back by the address that
// the client spoke to.
func TestHairpinErrors(t *testing.T) {
	forEachMode(t, lab.Options{Containers: 2}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		r.attach(t, loader.AttachOptions{Mode: mode})
		for _, f := range lab.Families() {
			for _, server := range r.Containers {
				r.publish(t, maps.SinglePort(8080), server.Addr(f), maps.SinglePort(80))
				client := r.Containers[0]
				for _, host := range []netip.Addr{r.Host.Addr(f), lab.BridgeAddr(f)} {
					conn, err := client.DialUDP(netip.AddrPort{}, at(host, 8080))
					if err != nil {
						t.Fatal(err)
					}
					defer conn.Close()
					if err := refusal(conn); !errors.Is(err, unix.ECONNREFUSED) {
						t.Errorf("%s to %s: %v, want %v", client.Addr(f), conn.RemoteAddr(), err, unix.ECONNREFUSED)
					}
				}
				r.rules(t, func(rules *maps.Rules) error {
					*rules = maps.Rules{SNAT: rules.SNAT}
					return nil
				})
			}
		}
	})
}

// refusal is what a connected socket gets to know of what it sends.
func refusal(conn net.Conn) error {
	if err := conn.SetDeadline(time.Now().Add(lab.DefaultTimeout)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte("anybody?")); err != nil {
		return err
	}
	_, err := conn.Read(make([]byte, 1))
	return err
}
