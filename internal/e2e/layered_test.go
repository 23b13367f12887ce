package e2e

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// Uplinks that are on top of the uplink eth0: a VLAN and a VPN.

// layered is such a device in the host, and its other end in another node.
type layered struct {
	device     string
	far        *lab.Node
	host, peer map[lab.Family]netip.Addr
}

func newLayered(device string, far *lab.Node, subnet4, subnet6 string) layered {
	l := layered{device, far, map[lab.Family]netip.Addr{}, map[lab.Family]netip.Addr{}}
	for f, subnet := range map[lab.Family]string{lab.IPv4: subnet4, lab.IPv6: subnet6} {
		l.peer[f] = netip.MustParseAddr(subnet).Next()
		l.host[f] = l.peer[f].Next()
	}
	return l
}

// up gives both ends their addresses and brings them up.
func (l layered) up(t *testing.T, host *lab.Node) {
	t.Helper()
	for _, end := range []struct {
		node  *lab.Node
		addrs map[lab.Family]netip.Addr
	}{{host, l.host}, {l.far, l.peer}} {
		ip(t, end.node, fmt.Sprintf("addr add %s/24 dev %s", end.addrs[lab.IPv4], l.device),
			fmt.Sprintf("addr add %s/64 dev %s nodad", end.addrs[lab.IPv6], l.device), "link set "+l.device+" up")
	}
}

// addDevice makes a device of a kind that not every kernel has: without it the test is skipped, unless
// TCNAT_TEST_REQUIRE is "all".
func addDevice(t *testing.T, n *lab.Node, device func() (netlink.Link, error)) {
	t.Helper()
	var kind string
	err := n.Do(func() error {
		link, err := device()
		if err != nil {
			return err
		}
		kind = link.Type()
		return netlink.LinkAdd(link)
	})
	if errors.Is(err, unix.EOPNOTSUPP) && os.Getenv("TCNAT_TEST_REQUIRE") != "all" {
		t.Skipf("this kernel has no devices of type %s", kind)
	}
	if err != nil {
		t.Fatalf("%s: %s device: %v", n.Role, kind, err)
	}
}

// vlan puts eth0.100 on the wire between host and router.
func (r *rig) vlan(t *testing.T) layered {
	t.Helper()
	l := newLayered("eth0.100", r.Router, "10.100.0.0", "2001:db8:100::")
	for _, n := range []*lab.Node{r.Host, r.Router} {
		addDevice(t, n, func() (netlink.Link, error) {
			parent, err := netlink.LinkByName("eth0")
			if err != nil {
				return nil, err
			}
			attrs := netlink.NewLinkAttrs()
			attrs.Name, attrs.ParentIndex = l.device, parent.Attrs().Index
			return &netlink.Vlan{LinkAttrs: attrs, VlanId: 100, VlanProtocol: netlink.VLAN_PROTOCOL_8021Q}, nil
		})
	}
	l.up(t, r.Host)
	return l
}

// wireguard makes a tunnel from the host to world, whose packets go by eth0. The host takes world for
// its way to everywhere; world takes from the tunnel what has the host's addresses and nothing else.
func (r *rig) wireguard(t *testing.T) layered {
	t.Helper()
	const port = 51820
	l := newLayered("wg0", r.World, "10.9.0.0", "2001:db8:9::")
	ends := []*lab.Node{r.Host, r.World}
	for _, n := range ends {
		addDevice(t, n, func() (netlink.Link, error) {
			attrs := netlink.NewLinkAttrs()
			attrs.Name, attrs.MTU = l.device, 1420
			return &netlink.Wireguard{LinkAttrs: attrs}, nil
		})
	}
	var private, public [2]string
	for i := range ends {
		key, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		private[i] = filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(private[i], base64.StdEncoding.AppendEncode(nil, key.Bytes()), 0o600); err != nil {
			t.Fatal(err)
		}
		public[i] = base64.StdEncoding.EncodeToString(key.PublicKey().Bytes())
	}
	allowed := []string{"0.0.0.0/0,::/0", fmt.Sprintf("%s/32,%s/128", l.host[lab.IPv4], l.host[lab.IPv6])}
	for i, n := range ends {
		far := ends[1-i].Addr(lab.IPv4)
		tool(t, n, "wg", "set", l.device, "listen-port", fmt.Sprint(port), "private-key", private[i],
			"peer", public[1-i], "endpoint", at(far, port).String(), "allowed-ips", allowed[i])
	}
	l.up(t, r.Host)
	return l
}

// A VLAN device is an uplink as any other, whether the device below it is one as well or not.
func TestVLANUplink(t *testing.T) {
	for _, uplinks := range [][]string{{"eth0.100"}, {lab.Uplink, "eth0.100"}} {
		t.Run(fmt.Sprintf("uplinks=%d", len(uplinks)), func(t *testing.T) {
			forEachMode(t, lab.Options{}, func(t *testing.T, r *rig, mode loader.AttachMode) {
				l := r.vlan(t)
				r.uplinks(t, l, loader.AttachOptions{Mode: mode, Uplinks: uplinks})
			})
		})
	}
}

// A WireGuard device is an uplink, and the tunnel's own packets by the uplink below it are let alone.
func TestWireGuardUplink(t *testing.T) {
	forEachMode(t, lab.Options{}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		l := r.wireguard(t)
		r.uplinks(t, l, loader.AttachOptions{Mode: mode, Uplinks: []string{lab.Uplink, l.device}})
	})
}

// uplinks attaches, and has a container talk by the layered uplink both ways, and by eth0 where that is attached:
// on the slow path alone, then with the fast path.
func (r *rig) uplinks(t *testing.T, l layered, attach loader.AttachOptions) {
	t.Helper()
	c := r.Containers[0]
	bytes := int64(1 << 20)
	if testing.Short() {
		bytes = 256 << 10
	}
	for _, f := range lab.Families() {
		mustPing(t, r.Host, l.peer[f], lab.PingOptions{})
	}
	r.owned = append(r.owned, l.device)
	var err error
	if r.sysctls, err = r.Host.Sysctls(); err != nil { // WireGuard sets one when its device comes up
		t.Fatal(err)
	}
	leak := watch(t, l.far, l.device, leaks)
	for _, fast := range []loader.FastPath{loader.FastPathOff, loader.FastPathEstablished} {
		t.Run("fast="+fast.String(), func(t *testing.T) {
			attach.FastPath = fast
			r.attach(t, attach)
			var talks []*talk
			for _, f := range lab.Families() {
				mustPing(t, c, l.peer[f], lab.PingOptions{})
				r.publish(t, maps.SinglePort(8080), c.Addr(f), maps.SinglePort(80))
				for _, protocol := range protocols() {
					server := at(l.peer[f], 7)
					call{protocol, c, l.far, server, server}.mustSee(t, l.host[f])
					call{protocol, l.far, c, at(c.Addr(f), 80), at(l.host[f], 8080)}.mustSee(t, l.peer[f])
					if slices.Contains(attach.Uplinks, lab.Uplink) {
						server := at(r.World.Loopback(f), 7)
						call{protocol, c, r.World, server, server}.mustSee(t, r.Host.Addr(f))
						call{protocol, r.World, c, at(c.Addr(f), 80), at(r.Host.Addr(f), 8080)}.mustSee(t, r.World.Addr(f))
					}
				}
				out, err := lab.StartServer(t.Context(), l.far, at(l.peer[f], 5001))
				if err != nil {
					t.Fatal(err)
				}
				mustTransfer(t, c, out.Addr, bytes, bytes)
				out.Close()
				in, err := lab.StartServer(t.Context(), c, at(c.Addr(f), 80))
				if err != nil {
					t.Fatal(err)
				}
				mustTransfer(t, l.far, at(l.host[f], 8080), bytes, bytes)
				in.Close()
				if fast == loader.FastPathOff {
					continue
				}
				r.publish(t, maps.SinglePort(published(talkPort)), c.Addr(f), maps.SinglePort(talkPort))
				for _, w := range []way{
					{"snat", c, l.far, at(l.peer[f], talkPort), at(l.peer[f], talkPort)},
					{"dnat", l.far, c, at(c.Addr(f), talkPort), at(l.host[f], published(talkPort))},
				} {
					for _, protocol := range protocols() {
						talks = append(talks, w.start(t, protocol))
					}
				}
			}
			if len(talks) > 0 {
				goOn(talks, false)
				r.mustBeFast(t, talks)
			}
			r.mustNotDrop(t)
		})
	}
	mustSeeNothing(t, leak, "left by "+l.device+" with a container's address")
}
