package e2e

import (
	"errors"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
	"tcnat/loader"
)

// Options of UDP-Lite sockets: how many bytes the checksum of what is sent covers, and must cover.
const (
	udpliteSendCoverage    = 10
	udpliteReceiveCoverage = 11
)

// newUDPLite makes a socket of a node, whose checksums cover the header and as many bytes as said. Without UDP-Lite
// in the kernel the test is skipped.
func newUDPLite(t *testing.T, n *lab.Node, bound netip.AddrPort, covered int) *rawSocket {
	t.Helper()
	s := &rawSocket{fd: -1, mapped: bound.Addr().Is6()}
	domain := unix.AF_INET
	if s.mapped {
		domain = unix.AF_INET6
	}
	err := n.Do(func() (err error) {
		s.fd, err = unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.IPPROTO_UDPLITE)
		return err
	})
	if errors.Is(err, unix.EPROTONOSUPPORT) && os.Getenv("TCNAT_TEST_REQUIRE") != "all" {
		t.Skip("this kernel has no UDP-Lite")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(s.fd) })
	if err := unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(patience.Seconds())}); err != nil {
		t.Fatal(err)
	}
	for _, option := range []int{udpliteSendCoverage, udpliteReceiveCoverage} {
		if err := unix.SetsockoptInt(s.fd, unix.IPPROTO_UDPLITE, option, 8+covered); err != nil {
			t.Fatal(err)
		}
	}
	s.bind(t, bound)
	return s
}

// Two containers speak UDP-Lite from one port to one server: each hears its own answer, with checksums that the
// kernels at both ends verify.
func TestUDPLite(t *testing.T) {
	r := newRig(t, lab.Options{Containers: 2})
	r.attach(t, loader.AttachOptions{})
	for _, f := range lab.Families() {
		for _, covered := range []int{0, 5} {
			t.Run(name(f, covered), func(t *testing.T) {
				world := at(r.World.Addr(f), uint16(7000+covered))
				server := newUDPLite(t, r.World, world, covered)
				seen := make(map[netip.AddrPort]bool)
				for _, c := range r.Containers {
					client := newUDPLite(t, c, at(c.Addr(f), 40000), covered)
					if err := client.connect(world); err != nil {
						t.Fatal(err)
					}
					for _, text := range []string{"question of " + c.Role, "another, longer one"} {
						if _, err := unix.Write(client.fd, []byte(text)); err != nil {
							t.Fatal(err)
						}
						got, from, err := server.receive()
						if err != nil || got != text {
							t.Fatalf("the server receives %q, %v; want %q", got, err, text)
						}
						if from.Addr() != r.Host.Addr(f) {
							t.Errorf("the server sees %s, want the host's %s", from, r.Host.Addr(f))
						}
						seen[from] = true
						if err := server.sendTo(from, text); err != nil {
							t.Fatal(err)
						}
						if got, _, err := client.receive(); err != nil || got != text {
							t.Fatalf("%s receives %q, %v; want %q", c.Role, got, err, text)
						}
					}
				}
				if len(seen) != 2 {
					t.Errorf("the server sees %v of two containers", seen)
				}
			})
		}
	}
	r.mustNotDrop(t)
}
