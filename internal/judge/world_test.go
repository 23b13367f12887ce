package judge

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
)

const (
	endDevice  = "eth0" // of a container, and of the outside
	containers = 3
	// outside is the number of the outside's end, behind those of the containers.
	outside  = containers
	endCount = containers + 1

	sentinelPort     = 4000 // of the first container, in no conversation's range
	sentinelPatience = 5 * time.Second
	sentinelAgain    = 100 * time.Millisecond
)

// Addresses that both worlds have.
var (
	// fixedSource is where the last container's traffic leaves from; the others' is masqueraded.
	fixedSource = map[lab.Family]netip.Addr{
		lab.IPv4: netip.MustParseAddr("203.0.113.77"), lab.IPv6: netip.MustParseAddr("2001:db8:113::77"),
	}
	sentinelAddr = netip.MustParseAddr("100.127.255.254")
)

// publishedPort is a DNAT rule, for every address of the host.
type publishedPort struct {
	protocol    uint8
	port, ports uint16 // the first, and how many
	container   int
	to          uint16 // the first port there
}

func published() []publishedPort {
	return []publishedPort{
		{unix.IPPROTO_TCP, 3005, 1, 0, 3005},
		{unix.IPPROTO_TCP, 3080, 1, 0, 80},
		{unix.IPPROTO_TCP, 3081, 1, 0, 80}, // two ways to one endpoint
		{unix.IPPROTO_TCP, 3100, 10, 1, 3100},
		{unix.IPPROTO_UDP, 3005, 1, 0, 3005},
		{unix.IPPROTO_UDP, 3053, 1, 1, 53},
		{unix.IPPROTO_UDP, 3054, 1, 1, 53},
		{unix.IPPROTO_UDP, 3100, 10, 2, 3100},
		{unix.IPPROTO_SCTP, 3005, 1, 0, 3005},
		{unix.IPPROTO_SCTP, 3868, 5, 1, 4868},
	}
}

// world is one host that translates, with the ends around it.
type world struct {
	name string
	*lab.Lab
	ends [endCount]*end
	// forget makes the host forget every flow.
	forget func() error

	round uint64 // of sentinels
	turn  uint16 // of forgetting
}

func mac(last byte) net.HardwareAddr { return net.HardwareAddr{2, 0x42, 0, 0, 1, last} }

// newWorld builds a world without NAT, whose ends are silent but for what is sent by them.
func newWorld(t *testing.T, name string) *world {
	t.Helper()
	l, err := lab.New(t.Context(), lab.Options{
		Containers: containers, NearWorld: true, NoSegmentation: true,
		// what the host sends itself shall not depend on what ports were chosen
		HostSysctls: map[string]string{"net/ipv6/auto_flowlabels": "0"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	// Every error that the host sends is one that the other host sends, too.
	for _, key := range []string{"icmp_msgs_per_sec", "icmp_msgs_burst"} {
		err := l.Host.SetSysctl("net/ipv4/"+key, "1000000")
		if errors.Is(err, fs.ErrNotExist) {
			t.Skip("on this kernel all namespaces share one limit of ICMP errors")
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	w := &world{name: name, Lab: l}
	// A frame is to have its whole checksum when it is looked at.
	if err := l.SetChecksumOffload(false); err != nil {
		t.Fatal(err)
	}
	if err := w.connect(); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	t.Cleanup(func() {
		for _, e := range w.ends {
			if e != nil {
				e.close()
			}
		}
	})
	return w
}

// connect gives the devices their Ethernet addresses, silences the ends and opens them.
func (w *world) connect() error {
	uplink := mac(100)
	if err := setMAC(w.Host, lab.Uplink, uplink); err != nil {
		return err
	}
	for _, f := range lab.Families() {
		if err := w.Host.AddAddress("lo", netip.PrefixFrom(fixedSource[f], fixedSource[f].BitLen())); err != nil {
			return err
		}
	}
	for i, n := range append(w.Containers[:containers:containers], w.World) {
		device, gateway := lab.Bridge, net.HardwareAddr{0x02, 0x42, 0xac, 0x11, 0x00, 0x01}
		if i == outside {
			device, gateway = lab.Uplink, uplink
		}
		if err := setMAC(n, endDevice, mac(byte(i+1))); err != nil {
			return err
		}
		for _, f := range lab.Families() {
			if err := addNeighbour(w.Host, device, n.Addr(f), mac(byte(i+1))); err != nil {
				return err
			}
		}
		if err := silence(n); err != nil {
			return err
		}
		e, err := openEnd(n, mac(byte(i+1)), gateway)
		if err != nil {
			return err
		}
		w.ends[i] = e
	}
	return nil
}

func setMAC(n *lab.Node, device string, addr net.HardwareAddr) error {
	return n.Do(func() error {
		link, err := netlink.LinkByName(device)
		if err == nil {
			err = netlink.LinkSetHardwareAddr(link, addr)
		}
		if err != nil {
			return fmt.Errorf("%s: %s: address: %w", n.Role, device, err)
		}
		return nil
	})
}

// addNeighbour makes a node know a neighbour without asking.
func addNeighbour(n *lab.Node, device string, addr netip.Addr, at net.HardwareAddr) error {
	return n.Do(func() error {
		link, err := netlink.LinkByName(device)
		if err == nil {
			err = netlink.NeighSet(&netlink.Neigh{
				LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT,
				IP: addr.AsSlice(), HardwareAddr: at,
			})
		}
		if err != nil {
			return fmt.Errorf("%s: %s: neighbour %s: %w", n.Role, device, addr, err)
		}
		return nil
	})
}

// silence takes all addresses from a node, so that its stack answers nothing.
func silence(n *lab.Node) error {
	if err := n.SetSysctl("net/ipv6/conf/all/disable_ipv6", "1"); err != nil {
		return err
	}
	return n.Do(func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return fmt.Errorf("%s: links: %w", n.Role, err)
		}
		for _, link := range links {
			addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
			if err != nil {
				return fmt.Errorf("%s: addresses: %w", n.Role, err)
			}
			for _, addr := range addrs {
				if err := netlink.AddrDel(link, &addr); err != nil {
					return fmt.Errorf("%s: address %s: %w", n.Role, addr, err)
				}
			}
		}
		return nil
	})
}

// barrier returns when all that was sent into the world has arrived where it arrives, and calls
// arrived with each packet. It takes two rounds: when the first sentinels are back, answers to
// what was sent before them may still be under way.
//
// Frames are sent by one thread, which stays on one CPU, and veth devices hand them over in a queue
// of that CPU: what is sent first arrives first.
func (w *world) barrier(arrived func(end int, ip []byte)) error {
	for range 2 {
		w.round++
		if err := w.sentinels(arrived); err != nil {
			return err
		}
	}
	return nil
}

// sentinels sends a packet each way and waits for both.
func (w *world) sentinels(arrived func(end int, ip []byte)) error {
	text := binary.BigEndian.AppendUint64([]byte("sentinel"), w.round)
	// another port after the flows were forgotten: the old flow may be being deleted
	far := 9000 + w.turn%1000
	plain := shape{ttl: 64, df: true}
	out := plain.build(w.Containers[0].Addr(lab.IPv4), sentinelAddr, unix.IPPROTO_UDP, udpDatagram(sentinelPort, far, text))
	in := plain.build(sentinelAddr, w.Host.Addr(lab.IPv4), unix.IPPROTO_UDP, udpDatagram(far, 3005, text))

	back := 0
	deadline := time.Now().Add(sentinelPatience)
	for {
		if err := errors.Join(w.ends[0].send(out, 0), w.ends[outside].send(in, 0)); err != nil {
			return err
		}
		for again := time.Now().Add(sentinelAgain); time.Now().Before(again); {
			for i, e := range w.ends {
				for {
					ip, err := e.receive()
					if err != nil {
						return err
					}
					if ip == nil {
						break
					}
					round, ours := sentinelRound(ip)
					switch {
					case !ours:
						arrived(i, ip)
					case round == w.round:
						back |= 1 << i
					}
				}
			}
			if back == 1|1<<outside {
				return w.complete()
			}
			if err := wait(w.ends[outside].fd, unix.POLLIN, time.Millisecond); err != nil {
				return err
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: sentinels of round %d: not within %s (back: %b)", w.name, w.round, sentinelPatience, back)
		}
	}
}

// sentinelRound tells sentinels from other packets.
func sentinelRound(ip []byte) (round uint64, ours bool) {
	const at = ipv4Size + udpSize
	if len(ip) != at+16 || string(ip[at:at+8]) != "sentinel" {
		return 0, false
	}
	return binary.BigEndian.Uint64(ip[at+8:]), true
}

// complete fails when an end had no room for a packet.
func (w *world) complete() error {
	for _, e := range w.ends {
		lost, err := e.lost()
		if err != nil {
			return err
		}
		if lost > 0 {
			return fmt.Errorf("%s: %s: %d packets found no room in the socket", w.name, e.name, lost)
		}
	}
	return nil
}

// fresh makes the host forget all flows, between batches.
func (w *world) fresh() error {
	w.turn++
	if err := w.forget(); err != nil {
		return fmt.Errorf("%s: forget flows: %w", w.name, err)
	}
	return nil
}
