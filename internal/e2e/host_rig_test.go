package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
	"tcnat/loader"
)

// newCgroup makes a cgroup of version 2 that has this process in it until the test ends. Nothing
// is ever attached to the root, which all processes of the machine are in.
func newCgroup(t *testing.T, name string) string {
	t.Helper()
	root := cgroupRoot(t)
	was, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	before := root
	for line := range strings.Lines(string(was)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			before = filepath.Join(root, path)
		}
	}
	dir := filepath.Join(root, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(enterCgroup(before), os.Remove(dir)); err != nil {
			t.Error(err)
		}
	})
	if err := enterCgroup(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

func enterCgroup(dir string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
}

// cgroupRoot is where the hierarchy is mounted; this mounts it where it is not.
func cgroupRoot(t *testing.T) string {
	t.Helper()
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var stat unix.Statfs_t
		if err := unix.Statfs(dir, &stat); err == nil && stat.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir
		}
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "cgroup2", 0, ""); err != nil {
		t.Fatalf("mount cgroup2: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// cgroupHooks are those that an instance attaches to.
var cgroupHooks = []ebpf.AttachType{
	ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect,
	ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg,
	ebpf.AttachCGroupUDP4Recvmsg, ebpf.AttachCGroupUDP6Recvmsg,
	ebpf.AttachCgroupInetSockRelease, ebpf.AttachCgroupInet4GetPeername, ebpf.AttachCgroupInet6GetPeername,
}

// onCgroup are the programs on its hooks.
func onCgroup(t *testing.T, cgroup string) []ebpf.ProgramID {
	t.Helper()
	dir, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	var ids []ebpf.ProgramID
	for _, at := range cgroupHooks {
		result, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: at})
		if err != nil {
			t.Fatalf("query %s: %v", at, err)
		}
		for _, program := range result.Programs {
			ids = append(ids, program.ID)
		}
	}
	return ids
}

// newHostRig is a rig whose host's own sockets reach published ports, those of this process.
func newHostRig(t *testing.T, o lab.Options, attach loader.AttachOptions) (r *rig, cgroup string) {
	t.Helper()
	r = newRig(t, o)
	cgroup = newCgroup(t, "tcnat-e2e-"+r.Name)
	attach.Cgroup = cgroup
	status := r.attach(t, attach)
	if want := (loader.HostAccess{Attached: true, Cgroup: cgroup}); status.HostAccess != want || len(status.Problems) > 0 {
		t.Fatalf("host's own access is %+v, want %+v; problems %q", status.HostAccess, want, status.Problems)
	}
	t.Cleanup(func() {
		r.detach(t)
		poll(t, "nothing is on the cgroup", func() bool {
			_, err := os.Stat(cgroup)
			return errors.Is(err, fs.ErrNotExist) || len(onCgroup(t, cgroup)) == 0
		})
	})
	return r, cgroup
}

// ownAddresses are the host's, the loopback ones first, with names for subtests.
func ownAddresses(r *rig, f lab.Family) map[string]netip.Addr {
	loopback := netip.IPv6Loopback()
	addresses := map[string]netip.Addr{"uplink": r.Host.Addr(f), "bridge": lab.BridgeAddr(f)}
	if f == lab.IPv4 {
		loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		addresses["unspecified"] = netip.IPv4Unspecified()
	} else {
		addresses["unspecified"] = netip.IPv6Unspecified()
	}
	addresses["loopback"] = loopback
	return addresses
}

// sockaddr is the kernel's form of an address. mapped says to give IPv4 as IPv6.
func sockaddr(a netip.AddrPort, mapped bool) unix.Sockaddr {
	if a.Addr().Is4() && !mapped {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func fromSockaddr(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return at(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return at(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// rawSocket is a socket with nothing between a test and the kernel: it blocks for 2 seconds at most.
type rawSocket struct {
	fd     int
	mapped bool // of AF_INET6
}

func newSocket(t *testing.T, n *lab.Node, kind int, inet6 bool) *rawSocket {
	t.Helper()
	domain := unix.AF_INET
	if inet6 {
		domain = unix.AF_INET6
	}
	s := &rawSocket{fd: -1, mapped: inet6}
	err := n.Do(func() (err error) {
		s.fd, err = unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(s.fd) })
	for _, option := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, option, &unix.Timeval{Sec: 2}); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func (s *rawSocket) bind(t *testing.T, a netip.AddrPort) {
	t.Helper()
	if err := unix.Bind(s.fd, sockaddr(a, s.mapped)); err != nil {
		t.Fatalf("bind %s: %v", a, err)
	}
}

func (s *rawSocket) connect(to netip.AddrPort) error {
	return unix.Connect(s.fd, sockaddr(to, s.mapped))
}

func (s *rawSocket) sendTo(to netip.AddrPort, text string) error {
	return unix.Sendto(s.fd, []byte(text), 0, sockaddr(to, s.mapped))
}

// receive returns a message and whom it says to be from.
func (s *rawSocket) receive() (string, netip.AddrPort, error) {
	message := make([]byte, 100)
	n, from, err := unix.Recvfrom(s.fd, message, 0)
	if err != nil {
		return "", netip.AddrPort{}, err
	}
	return string(message[:n]), fromSockaddr(from), nil
}

// ask sends over a connected socket, and waits until it comes back.
func (s *rawSocket) ask(text string) error {
	if _, err := unix.Write(s.fd, []byte(text)); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	message := make([]byte, 100)
	n, err := unix.Read(s.fd, message)
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if got := string(message[:n]); got != text {
		return fmt.Errorf("got %q, want %q", got, text)
	}
	return nil
}

func (s *rawSocket) peer(t *testing.T) netip.AddrPort {
	t.Helper()
	sa, err := unix.Getpeername(s.fd)
	if err != nil {
		t.Fatal(err)
	}
	return fromSockaddr(sa)
}

// named is how a socket reads an address that it was given: IPv6 sockets read IPv4 as v4-mapped, and
// the unspecified address stands for the loopback one.
func (s *rawSocket) named(a netip.AddrPort) netip.AddrPort {
	addr := a.Addr()
	if addr.IsUnspecified() {
		addr = netip.IPv6Loopback()
		if a.Addr().Is4() {
			addr = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		}
	}
	if addr.Is4() && s.mapped {
		addr = netip.AddrFrom16(addr.As16())
	}
	return at(addr, a.Port())
}
