package e2e

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"tcnat/internal/lab"
	"tcnat/loader"
)

// listenUDP is a socket of a node, gone with the test.
func listenUDP(t *testing.T, n *lab.Node, at netip.AddrPort) *net.UDPConn {
	t.Helper()
	var conn *net.UDPConn
	err := n.Do(func() (err error) {
		conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// reaches tells whether what one socket sends to an address comes to another, and from whom.
func reaches(t *testing.T, from *net.UDPConn, to netip.AddrPort, at *net.UDPConn, wait time.Duration) (seen netip.AddrPort, ok bool) {
	t.Helper()
	if _, err := from.WriteToUDPAddrPort([]byte("hello"), to); err != nil {
		t.Fatal(err)
	}
	if err := at.SetReadDeadline(time.Now().Add(wait)); err != nil {
		t.Fatal(err)
	}
	_, seen, err := at.ReadFromUDPAddrPort(make([]byte, 64))
	return netip.AddrPortFrom(seen.Addr().Unmap(), seen.Port()), err == nil
}

// With endpoint-independent filtering whoever knows the outside port of a container's socket reaches it, and is
// answered from there; an attach changes it either way. A neighbour reaches it always.
func TestFiltering(t *testing.T) {
	const long = 5 * time.Second
	short := slowly(300 * time.Millisecond)
	forEachMode(t, lab.Options{Containers: 2}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		r.attach(t, loader.AttachOptions{Mode: mode})
		for i, f := range lab.Families() {
			port := uint16(40000 + i)
			player := listenUDP(t, r.Containers[0], at(r.Containers[0].Addr(f), port))
			server := listenUDP(t, r.World, at(r.World.Addr(f), 3478+uint16(i)))
			outside, ok := reaches(t, player, at(r.World.Addr(f), 3478+uint16(i)), server, long)
			if !ok || outside.Addr() != r.Host.Addr(f) {
				t.Fatalf("%s: the server saw %s, %t", f, outside, ok)
			}
			for round, filtering := range []bool{false, true, false} {
				r.attach(t, loader.AttachOptions{Mode: mode, AnySender: filtering})
				stranger := listenUDP(t, r.World, at(r.World.Addr(f), 5000+uint16(10*i+round)))
				seen, ok := reaches(t, stranger, outside, player, map[bool]time.Duration{true: long, false: short}[filtering])
				if ok != filtering {
					t.Errorf("%s, endpoint-independent %t: a stranger reaches the port: %t", f, filtering, ok)
				}
				if !ok {
					continue
				}
				if from, ok := reaches(t, player, seen, stranger, long); !ok || from != outside {
					t.Errorf("%s: the stranger is answered from %s, %t, want %s", f, from, ok, outside)
				}
			}
			neighbour := listenUDP(t, r.Containers[1], at(r.Containers[1].Addr(f), 6000))
			seen, ok := reaches(t, neighbour, outside, player, long)
			if !ok || seen.Addr() != r.Host.Addr(f) {
				t.Fatalf("%s: a neighbour reaches the port: %t, and is seen as %s", f, ok, seen)
			}
			if from, ok := reaches(t, player, seen, neighbour, long); !ok || from != outside {
				t.Errorf("%s: the neighbour is answered from %s, %t, want %s", f, from, ok, outside)
			}
		}
	})
}
