package e2e

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// Sockets that a rule led to a container end when the rule goes or leads elsewhere; others to the same
// container stay, and so does a socket that sends datagrams one by one: the next goes to the new one.
func TestHostSocketsEndWithTheirRule(t *testing.T) {
	r, _ := newHostRig(t, lab.Options{Containers: 2}, loader.AttachOptions{})
	for _, f := range lab.Families() {
		t.Run(f.String(), func(t *testing.T) {
			first, second := r.Containers[0], r.Containers[1]
			r.publish(t, maps.SinglePort(3005), first.Addr(f), maps.SinglePort(talkPort))
			r.publish(t, maps.SinglePort(3006), first.Addr(f), maps.SinglePort(talkPort))
			hostServer(t, first, f)
			_, moved := hostServer(t, second, f)
			inet6 := f == lab.IPv6
			to := at(ownAddresses(r, f)["loopback"], 3005)
			ends := map[string]*rawSocket{"tcp": newSocket(t, r.Host, unix.SOCK_STREAM, inet6), "udp": newSocket(t, r.Host, unix.SOCK_DGRAM, inet6)}
			stay := map[string]*rawSocket{"direct": newSocket(t, r.Host, unix.SOCK_STREAM, inet6), "other rule": newSocket(t, r.Host, unix.SOCK_STREAM, inet6)}
			if f == lab.IPv4 {
				ends["v4-mapped"] = newSocket(t, r.Host, unix.SOCK_STREAM, true)
			}
			for name, s := range ends {
				if err := errors.Join(s.connect(to), s.ask("x")); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
			}
			for name, where := range map[string]netip.AddrPort{"direct": at(first.Addr(f), talkPort), "other rule": at(to.Addr(), 3006)} {
				if err := errors.Join(stay[name].connect(where), stay[name].ask("x")); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
			}
			sender := newSocket(t, r.Host, unix.SOCK_DGRAM, inet6)
			if err := sender.sendTo(to, "x"); err != nil {
				t.Fatal(err)
			}
			if _, _, err := sender.receive(); err != nil {
				t.Fatal(err)
			}

			r.with(t, loader.OpenRules, func(d *loader.Datapath) error {
				_, err := d.State().ChangeRules(func(rules *maps.Rules) (bool, error) {
					for i := range rules.DNAT {
						if rules.DNAT[i].Ports.First == 3005 && rules.DNAT[i].To == first.Addr(f) {
							rules.DNAT[i].To = second.Addr(f)
						}
					}
					return true, nil
				})
				if err != nil {
					return err
				}
				if peers, err := d.State().HostPeers(); err != nil || len(peers) < len(ends)+2 {
					t.Errorf("peers %v, error %v", peers, err)
				}
				ended, err := d.EndHostSockets()
				if ended != len(ends) {
					t.Errorf("%d sockets ended, want %d", ended, len(ends))
				}
				return err
			})
			for name, s := range ends {
				if _, err := unix.Read(s.fd, make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) {
					t.Errorf("%s: %v, want it aborted", name, err)
				}
			}
			for name, s := range stay {
				if err := s.ask("y"); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
			if err := sender.sendTo(to, "y"); err != nil {
				t.Error(err)
			}
			if _, from, err := sender.receive(); err != nil || from != to || len(moved.Peers()) != 1 {
				t.Errorf("from %s, error %v; the new container saw %v", from, err, moved.Peers())
			}
			mustConnect(t, r, to, inet6, unix.SOCK_STREAM)
		})
	}
}

// What a connected socket named is forgotten when it is closed, so that the table does not fill up.
func TestHostSocketsForgotten(t *testing.T) {
	r, _ := newHostRig(t, lab.Options{}, loader.AttachOptions{})
	for _, f := range lab.Families() {
		r.publish(t, maps.SinglePort(3005), r.Containers[0].Addr(f), maps.SinglePort(talkPort))
	}
	c := r.Containers[0]
	hostServer(t, c, lab.IPv4)
	hostServer(t, c, lab.IPv6)
	var open []*rawSocket
	for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM} {
		for _, to := range []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:3005"), netip.MustParseAddrPort("[::1]:3005")} {
			for _, inet6 := range []bool{false, true} {
				if to.Addr().Is6() && !inet6 {
					continue
				}
				s := newSocket(t, r.Host, kind, inet6)
				if err := errors.Join(s.connect(to), s.ask("x")); err != nil {
					t.Fatal(err)
				}
				open = append(open, s)
			}
		}
	}
	count := func() (n int) {
		r.read(t, func(d *loader.Datapath) error {
			peers, err := d.State().HostPeers()
			n = len(peers)
			return err
		})
		return n
	}
	for left := len(open); left > 0; left-- {
		if n := count(); n != left {
			t.Errorf("%d are known of %d open ones", n, left)
		}
		if err := unix.Close(open[left-1].fd); err != nil {
			t.Fatal(err)
		}
		open[left-1].fd = -1
	}
	if n := count(); n != 0 {
		t.Errorf("%d are known, and all are closed", n)
	}
}

// Upgrades under way lose nothing of what the host sends; then detaching leaves connections as they
// are, and --cgroup none takes the programs away.
func TestHostUpgrade(t *testing.T) {
	r, cgroup := newHostRig(t, lab.Options{}, loader.AttachOptions{})
	c, f := r.Containers[0], lab.IPv4
	r.publish(t, maps.SinglePort(3005), c.Addr(f), maps.SinglePort(talkPort))
	tcp, udp := hostServer(t, c, f)
	to := at(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 3005)
	long := newSocket(t, r.Host, unix.SOCK_STREAM, false)
	if err := errors.Join(long.connect(to), long.ask("x")); err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	stop := make(chan struct{})
	sender := newSocket(t, r.Host, unix.SOCK_DGRAM, false)
	asked := 0
	work.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(beat):
			}
			asked++
			if _, err := lab.ExchangeTCP(t.Context(), r.Host, to, []byte("x")); err != nil {
				t.Error(err)
			}
			if err := sender.sendTo(to, "x"); err != nil {
				t.Error(err)
			}
			if _, from, err := sender.receive(); err != nil || from != to {
				t.Errorf("from %s, error %v", from, err)
			}
		}
	})
	before := onCgroup(t, cgroup)
	for n := range 3 {
		r.attach(t, loader.AttachOptions{Spec: otherBuild(n + 1), Cgroup: cgroup})
		after := onCgroup(t, cgroup)
		if len(before) != len(cgroupHooks) || len(after) != len(cgroupHooks) || slices.ContainsFunc(after, func(id ebpf.ProgramID) bool { return slices.Contains(before, id) }) {
			t.Errorf("programs on the cgroup: were %v, are %v", before, after)
		}
		before = after
	}
	close(stop)
	work.Wait()
	if len(tcp.Peers()) != asked+1 || len(udp.Peers()) != asked {
		t.Errorf("asked %d times, the container saw %d and %d", asked, len(tcp.Peers()), len(udp.Peers()))
	}
	if status := r.attach(t, loader.AttachOptions{}); status.HostAccess.Attached || len(onCgroup(t, cgroup)) > 0 {
		t.Errorf("still attached: %+v, %v", status.HostAccess, onCgroup(t, cgroup))
	}
	if err := long.ask("y"); err != nil {
		t.Error(err)
	}
	if _, err := lab.ExchangeTCP(t.Context(), r.Host, to, []byte("x")); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("without the programs: %v", err)
	}
	r.mustNotDrop(t)
}
