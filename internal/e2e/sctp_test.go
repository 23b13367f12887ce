package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// sctpSocket is a one-to-one SCTP socket that blocks for patience at most.
type sctpSocket struct{ fd int }

// newSCTP makes a socket of a node, bound to one address: to all of them, an association would name those
// that only its own side knows. Without SCTP in the kernel the test is skipped, unless
// TCNAT_TEST_REQUIRE is "all".
func newSCTP(t *testing.T, n *lab.Node, bound netip.AddrPort) sctpSocket {
	t.Helper()
	domain := unix.AF_INET
	if bound.Addr().Is6() {
		domain = unix.AF_INET6
	}
	var fd int
	err := n.Do(func() (err error) {
		fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
		return err
	})
	if errors.Is(err, unix.EPROTONOSUPPORT) && os.Getenv("TCNAT_TEST_REQUIRE") != "all" {
		t.Skip("this kernel has no SCTP")
	}
	if err != nil {
		t.Fatalf("SCTP socket: %v", err)
	}
	s := sctpSocket{fd}
	t.Cleanup(s.close)
	for _, option := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &unix.Timeval{Sec: int64(patience.Seconds())}); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Bind(fd, sockaddr(bound, false)); err != nil {
		t.Fatalf("bind %s: %v", bound, err)
	}
	return s
}

func (s *sctpSocket) close() {
	if s.fd >= 0 {
		_ = unix.Close(s.fd)
	}
	s.fd = -1
}

// sctpServer listens until the test ends.
func sctpServer(t *testing.T, n *lab.Node, at netip.AddrPort) sctpSocket {
	t.Helper()
	s := newSCTP(t, n, at)
	if err := unix.Listen(s.fd, 8); err != nil {
		t.Fatal(err)
	}
	return s
}

// association is one between two nodes.
type association struct {
	client, server sctpSocket
	seen           netip.AddrPort // the client, as the server sees it
}

// associate connects a client that is bound to an address with a server that others reach at to.
func associate(t *testing.T, client *lab.Node, bound netip.AddrPort, server sctpSocket, to netip.AddrPort) *association {
	t.Helper()
	a := &association{client: newSCTP(t, client, bound)}
	if err := unix.Connect(a.client.fd, sockaddr(to, false)); err != nil {
		t.Fatalf("connect %s to %s: %v", bound, to, err)
	}
	fd, from, err := unix.Accept4(server.fd, unix.SOCK_CLOEXEC)
	if err != nil {
		t.Fatalf("accept from %s: %v", bound, err)
	}
	a.server, a.seen = sctpSocket{fd}, fromSockaddr(from)
	t.Cleanup(a.server.close)
	return a
}

// exchange carries so many random bytes each way, at the same time, and compares them.
func (a *association) exchange(size int) error {
	errs := make(chan error, 4)
	for i, way := range [][2]sctpSocket{{a.client, a.server}, {a.server, a.client}} {
		seed := rand.Uint64()
		content := make([]byte, size)
		rng := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(i)})
		_, _ = rng.Read(content)
		go func() {
			for part := range slices.Chunk(content, 16<<10) {
				if _, err := unix.Write(way[0].fd, part); err != nil {
					errs <- fmt.Errorf("way %d: send: %w", i, err)
					return
				}
			}
			errs <- nil
		}()
		go func() {
			got := make([]byte, 0, size)
			buffer := make([]byte, 64<<10)
			for len(got) < size {
				n, err := unix.Read(way[1].fd, buffer)
				if err == nil && n == 0 {
					err = io.ErrUnexpectedEOF
				}
				if err != nil {
					errs <- fmt.Errorf("way %d: receive after %d of %d bytes: %w", i, len(got), size, err)
					return
				}
				got = append(got, buffer[:n]...)
			}
			if !bytes.Equal(got, content) {
				errs <- fmt.Errorf("way %d: other bytes than were sent", i)
				return
			}
			errs <- nil
		}()
	}
	var err error
	for range cap(errs) {
		err = errors.Join(err, <-errs)
	}
	return err
}

// shutdown ends the association in good order and closes both ends.
func (a *association) shutdown() error {
	if err := unix.Shutdown(a.client.fd, unix.SHUT_WR); err != nil {
		return fmt.Errorf("shutdown: %w", err)
	}
	buffer := make([]byte, 16)
	n, err := unix.Read(a.server.fd, buffer)
	if err != nil {
		return fmt.Errorf("read after the other end's shutdown: %w", err)
	}
	if n != 0 {
		return fmt.Errorf("%d bytes after the other end's shutdown", n)
	}
	a.server.close()
	a.client.close()
	return nil
}

// flowOfSCTP returns the one flow of an association.
func (r *rig) flowOfSCTP(t *testing.T, client, server netip.AddrPort) maps.Flow {
	t.Helper()
	for _, f := range r.flows(t) {
		if f.Original.Protocol == maps.SCTP && f.Original.Src == client && f.Original.Dst == server {
			return f
		}
	}
	t.Fatalf("no flow of SCTP from %s to %s in %v", client, server, r.flows(t))
	return maps.Flow{}
}

// SCTP associations of real sockets, out and in, through changed ports, with the checksum made by who sends, left to
// devices all the way, and left to the uplink alone.
func TestSCTP(t *testing.T) {
	r := newRig(t, lab.Options{Containers: 2})
	r.attach(t, loader.AttachOptions{})
	size := 1 << 20
	if testing.Short() {
		size = 128 << 10
	}
	for _, offload := range []struct {
		name string
		set  func() error
	}{
		{"offload", func() error { return r.SetChecksumOffload(true) }},
		{"uplink-makes", func() error { return r.Host.SetChecksumOffload(lab.Uplink, false) }},
		{"sender-makes", func() error { return r.SetChecksumOffload(false) }},
	} {
		t.Run(offload.name, func(t *testing.T) {
			if err := offload.set(); err != nil {
				t.Fatal(err)
			}
			for _, f := range lab.Families() {
				t.Run(f.String(), func(t *testing.T) { r.sctp(t, f, size) })
			}
		})
	}
	drops := r.drops(t)
	delete(drops, "hairpin-redirect") // what the host tells a container of its neighbour
	if len(drops) > 0 {
		t.Errorf("dropped: %v", drops)
	}
}

func (r *rig) sctp(t *testing.T, f lab.Family, size int) {
	t.Helper()
	world, host := at(r.World.Addr(f), 7000), r.Host.Addr(f)
	c := r.Containers[0]

	// Out: both containers from one port, at the same time; again from that port as soon as it is over.
	server := sctpServer(t, r.World, world)
	var ports []uint16
	var open []*association
	for _, c := range r.Containers {
		client := at(c.Addr(f), 40000)
		a := associate(t, c, client, server, world)
		if a.seen.Addr() != host {
			t.Errorf("the server sees %s, want the host's %s", a.seen, host)
		}
		ports = append(ports, a.seen.Port())
		open = append(open, a)
		if flow := r.flowOfSCTP(t, client, world); flow.State != maps.FlowAnswered || flow.Timeout < 7000e9 {
			t.Errorf("flow of an association: %+v", flow)
		}
	}
	if ports[0] == ports[1] {
		t.Errorf("the server sees both containers with port %d", ports[0])
	}
	for i, a := range open {
		if err := a.exchange(size >> i); err != nil {
			t.Errorf("out, container %d: %v", i+1, err)
		}
	}
	for i, a := range open {
		if err := a.shutdown(); err != nil {
			t.Errorf("out, container %d: %v", i+1, err)
		}
	}
	client := at(c.Addr(f), 40000)
	poll(t, "the flow is closed", func() bool { return r.flowOfSCTP(t, client, world).State == maps.FlowClosed })
	again := associate(t, c, client, server, world)
	if flow := r.flowOfSCTP(t, client, world); flow.State != maps.FlowAnswered {
		t.Errorf("flow of the second association: %+v", flow)
	}
	// An ABORT closes, too.
	if err := unix.SetsockoptLinger(again.client.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		t.Fatal(err)
	}
	again.client.close()
	poll(t, "the flow is closed by an ABORT", func() bool { return r.flowOfSCTP(t, client, world).State == maps.FlowClosed })
	server.close()

	// In: to a published port, with another inside.
	r.rules(t, func(rules *maps.Rules) error {
		_, err := rules.AddDNAT(maps.DNATRule{Protocol: maps.SCTP, Ports: maps.SinglePort(9000), To: c.Addr(f), ToPorts: maps.SinglePort(7000)})
		return err
	})
	inside := sctpServer(t, c, at(c.Addr(f), 7000))
	client = at(r.World.Addr(f), 41000)
	in := associate(t, r.World, client, inside, at(host, 9000))
	if in.seen != client {
		t.Errorf("the server in the container sees %s, want %s", in.seen, client)
	}
	if err := in.exchange(size); err != nil {
		t.Errorf("in: %v", err)
	}
	if err := in.shutdown(); err != nil {
		t.Errorf("in: %v", err)
	}
	poll(t, "the flow is closed", func() bool { return r.flowOfSCTP(t, client, at(host, 9000)).State == maps.FlowClosed })

	// A neighbour by the published port.
	near := associate(t, r.Containers[1], at(r.Containers[1].Addr(f), 42000), inside, at(host, 9000))
	if near.seen.Addr() != host {
		t.Errorf("the server sees its neighbour as %s, want the host's %s", near.seen, host)
	}
	if err := near.exchange(64 << 10); err != nil {
		t.Errorf("hairpin: %v", err)
	}
	if err := near.shutdown(); err != nil {
		t.Errorf("hairpin: %v", err)
	}
}
