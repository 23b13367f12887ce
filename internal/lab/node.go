package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Family is an IP version, to ask a node for the address of that version.
type Family int

// The two families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// String returns "ipv4" or "ipv6".
func (f Family) String() string { return fmt.Sprintf("ipv%d", int(f)) }

// Families lists both, for tests that go through them.
func Families() []Family { return []Family{IPv4, IPv6} }

// FamilyOf returns the family of an address; a v4-mapped one is IPv6.
func FamilyOf(addr netip.Addr) Family {
	if addr.Is4() {
		return IPv4
	}
	return IPv6
}

// Node is one network namespace of a lab. Its methods may be used from any goroutine
// until the lab is closed.
type Node struct {
	// Role is the node's part: host, router, isp, world, other, far, c1, c2, ...
	Role string
	// Netns is the namespace's name below /run/netns.
	Netns string

	addrs    map[Family]netip.Addr
	loopback map[Family]netip.Addr
	ns       netns.NsHandle
	link     *netlink.Handle
}

// Addr returns the address that others reach the node by: of a container that on the
// bridge, of the host that of eth0.
func (n *Node) Addr(f Family) netip.Addr { return n.addrs[f] }

// Loopback returns the address on the loopback device of an outside node, such as
// 1.1.1.1 of world: no neighbour knows it. Invalid for nodes that have none.
func (n *Node) Loopback(f Family) netip.Addr { return n.loopback[f] }

// Path returns the file that stands for the namespace, for nsenter --net=PATH.
func (n *Node) Path() string { return filepath.Join(netnsDir, n.Netns) }

// Do runs fn on a thread of its own inside the namespace and returns its error. The
// thread is thrown away, so fn may do to it what it likes; goroutines that fn starts run
// outside of the namespace. Panics and runtime.Goexit go through to the caller.
func (n *Node) Do(fn func() error) error {
	return onOwnThread(func() error {
		if err := netns.Set(n.ns); err != nil {
			return fmt.Errorf("enter %s: %w", n.Netns, permission(err))
		}
		return fn()
	})
}

// Command runs a program inside the namespace and returns what it printed to stdout and
// stderr. The program keeps the mount namespace of the caller.
func (n *Node) Command(ctx context.Context, name string, args ...string) (string, error) {
	var out []byte
	err := n.Do(func() (err error) {
		out, err = exec.CommandContext(ctx, name, args...).CombinedOutput()
		return err
	})
	if err != nil {
		return string(out), fmt.Errorf("%s: %s: %w: %s", n.Role, name, err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// SetSysctl writes a sysctl of the namespace; key is its path below /proc/sys, such as
// net/ipv4/ip_forward.
func (n *Node) SetSysctl(key, value string) error {
	return n.Do(func() error {
		path := filepath.Join("/proc/sys", key)
		if err := os.WriteFile(path, []byte(value), 0); err != nil {
			return fmt.Errorf("%s: sysctl %s=%s: %w", n.Role, key, value, permission(err))
		}
		return nil
	})
}

// Sysctls returns every sysctl below net that the namespace has, by key, so that two
// points in time can be compared. Left out are the count of conntrack entries, and the sizes of the
// table that all namespaces share, which others may change meanwhile.
func (n *Node) Sysctls() (map[string]string, error) {
	values := make(map[string]string)
	err := n.Do(func() error {
		return filepath.WalkDir("/proc/sys/net", func(path string, entry fs.DirEntry, err error) error {
			if err != nil {
				if errors.Is(err, fs.ErrNotExist) { // a device went while we walked
					return nil
				}
				return err
			}
			switch entry.Name() {
			case "nf_conntrack_count", "nf_conntrack_buckets", "nf_conntrack_max", "nf_conntrack_expect_max":
				return nil
			}
			if entry.IsDir() {
				return nil
			}
			// Some are write-only or refuse to be read until set: they have no value.
			if text, err := os.ReadFile(path); err == nil {
				values[strings.TrimPrefix(path, "/proc/sys/")] = strings.TrimSpace(string(text))
			}
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("%s: sysctls: %w", n.Role, err)
	}
	return values, nil
}

// DeviceCounters are a device's own statistics since it was made.
type DeviceCounters struct {
	RxPackets, RxBytes, RxDropped, RxErrors uint64
	TxPackets, TxBytes, TxDropped, TxErrors uint64
}

// DeviceCounters reads the statistics of a device.
func (n *Node) DeviceCounters(device string) (DeviceCounters, error) {
	link, err := n.link.LinkByName(device)
	if err != nil {
		return DeviceCounters{}, fmt.Errorf("%s: %s: %w", n.Role, device, err)
	}
	s := link.Attrs().Statistics
	if s == nil {
		return DeviceCounters{}, fmt.Errorf("%s: %s: no statistics", n.Role, device)
	}
	return DeviceCounters{
		RxPackets: s.RxPackets, RxBytes: s.RxBytes, RxDropped: s.RxDropped, RxErrors: s.RxErrors,
		TxPackets: s.TxPackets, TxBytes: s.TxBytes, TxDropped: s.TxDropped, TxErrors: s.TxErrors,
	}, nil
}

// Ifindex returns the index of a device within the namespace.
func (n *Node) Ifindex(device string) (int, error) {
	link, err := n.link.LinkByName(device)
	if err != nil {
		return 0, fmt.Errorf("%s: %s: %w", n.Role, device, err)
	}
	return link.Attrs().Index, nil
}

// PathMTU returns the MTU that the node's route cache holds for a destination, or 0 when
// it has learnt none.
func (n *Node) PathMTU(to netip.Addr) (int, error) {
	routes, err := n.link.RouteGet(to.AsSlice())
	if err != nil {
		return 0, fmt.Errorf("%s: route to %s: %w", n.Role, to, err)
	}
	if len(routes) == 0 {
		return 0, fmt.Errorf("%s: route to %s: %w", n.Role, to, unix.ENETUNREACH)
	}
	return routes[0].MTU, nil
}

// DialTCP connects from the namespace. A zero from lets the kernel choose.
func (n *Node) DialTCP(ctx context.Context, from, to netip.AddrPort) (*net.TCPConn, error) {
	dialer := net.Dialer{}
	if from.IsValid() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(from)
	}
	dialer.SetMultipathTCP(false)
	var conn net.Conn
	err := n.Do(func() (err error) {
		conn, err = dialer.DialContext(ctx, "tcp", to.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", n.Role, err)
	}
	return conn.(*net.TCPConn), nil
}

// ListenTCP listens in the namespace.
func (n *Node) ListenTCP(ctx context.Context, at netip.AddrPort) (*net.TCPListener, error) {
	config := net.ListenConfig{}
	config.SetMultipathTCP(false)
	var listener net.Listener
	err := n.Do(func() (err error) {
		listener, err = config.Listen(ctx, "tcp", at.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", n.Role, err)
	}
	return listener.(*net.TCPListener), nil
}

// DialUDP returns a connected UDP socket. A zero from lets the kernel choose.
func (n *Node) DialUDP(from, to netip.AddrPort) (*net.UDPConn, error) {
	var (
		local *net.UDPAddr
		conn  *net.UDPConn
	)
	if from.IsValid() {
		local = net.UDPAddrFromAddrPort(from)
	}
	err := n.Do(func() (err error) {
		conn, err = net.DialUDP("udp", local, net.UDPAddrFromAddrPort(to))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", n.Role, err)
	}
	return conn, nil
}

// ListenUDP binds a UDP socket. Bind it to one address: from a wildcard socket an answer
// would carry the source that routing chooses.
func (n *Node) ListenUDP(at netip.AddrPort) (*net.UDPConn, error) {
	var conn *net.UDPConn
	err := n.Do(func() (err error) {
		conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", n.Role, err)
	}
	return conn, nil
}

// newNode makes the namespace for a role.
func newNode(prefix, role string) (*Node, error) {
	n := &Node{Role: role, Netns: prefix + role, addrs: map[Family]netip.Addr{}, loopback: map[Family]netip.Addr{}}
	if err := createNetns(n.Netns); err != nil {
		return nil, err
	}
	if err := n.open(); err != nil {
		return nil, errors.Join(err, n.remove())
	}
	return n, nil
}

// open takes hold of the namespace that stands under the node's name.
func (n *Node) open() (err error) {
	if n.ns, err = netns.GetFromPath(n.Path()); err != nil {
		return fmt.Errorf("%s: namespace %s: %w", n.Role, n.Netns, permission(err))
	}
	return n.Do(func() error {
		if n.link, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return fmt.Errorf("%s: netlink: %w", n.Role, err)
		}
		return nil
	})
}

// release closes what the node holds open, the namespace stays.
func (n *Node) release() {
	if n.link != nil {
		n.link.Close()
		n.link = nil
	}
	if n.ns.IsOpen() {
		_ = n.ns.Close()
	}
}

// remove takes the namespace away. Its devices are deleted first, so that they are gone
// even where a process is still inside, and before the kernel gets to freeing it.
func (n *Node) remove() error {
	if n.link != nil {
		links, _ := n.link.LinkList()
		for _, link := range links {
			switch link.Type() {
			case "veth", "bridge":
				_ = n.link.LinkDel(link) // gone with its peer already, or with the namespace
			}
		}
	}
	n.release()
	return deleteNetns(n.Netns)
}
