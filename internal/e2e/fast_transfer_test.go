package e2e

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// fastSize is how many bytes a transfer on the fast path has, of which there are many.
func fastSize() int64 {
	if os.Getenv("TCNAT_TEST_LONG") != "" {
		return 1 << 30
	}
	return 64 << 20
}

// Bulk transfers arrive intact by the fast path, with segmentation offload and without: outward by SNAT,
// inward by a published port.
func TestFastTransfers(t *testing.T) {
	variants := append(fastVariants(), loader.AttachOptions{FastPath: loader.FastPathAlways, Mode: loader.Clsact, NoPorts: true})
	forEachFast(t, variants, lab.Options{}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		r.attach(t, attach)
		c := r.Containers[0]
		for _, segmentation := range []bool{true, false} {
			if err := r.SetSegmentation(segmentation); err != nil {
				t.Fatal(err)
			}
			for _, f := range lab.Families() {
				for _, w := range r.ways(t, c, f, talkPort) {
					server, err := lab.StartServer(t.Context(), w.server, w.listen)
					if err != nil {
						t.Fatal(err)
					}
					before, redirected := r.wire(t), r.redirected(t)
					got, err := lab.RunTransfer(t.Context(), w.client, w.call, fastSize(), fastSize()/16, 0)
					server.Close()
					if err != nil {
						t.Fatal(err)
					}
					packets := r.wire(t) - before
					redirected = r.redirected(t) - redirected
					t.Logf("%s %s, gso %t: %d packets, %d redirected, %s", f, w.name, segmentation, packets, redirected, got.Duration)
					if redirected < packets*9/10 {
						t.Errorf("%s %s, gso %t: %d of %d packets redirected", f, w.name, segmentation, redirected, packets)
					}
				}
			}
		}
		r.mustNotDrop(t)
	})
}

// wire is the number of packets that have passed the uplink.
func (r *rig) wire(t *testing.T) uint64 {
	t.Helper()
	counters, err := r.Host.DeviceCounters(lab.Uplink)
	if err != nil {
		t.Fatal(err)
	}
	return counters.RxPackets + counters.TxPackets
}

// A flow's packets and bytes are what was sent, on the fast path and on the way to it, both ways,
// fast and slowly: slowly, each is the first of a lease, or the last of one.
func TestFastCounts(t *testing.T) {
	forEachFast(t, fastVariants(), lab.Options{TunUplink: true}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		attach.Uplinks = []string{lab.Uplink, lab.TunUplink}
		r.attach(t, attach)
		c := r.Containers[0]
		type count struct {
			k       *talk
			ip      uint64 // bytes of an IP header
			link    uint64 // and of a link header
			packets [2]uint64
			bytes   [2]uint64
		}
		var counts []*count
		for _, f := range lab.Families() {
			ipBytes := map[lab.Family]uint64{lab.IPv4: 20, lab.IPv6: 40}[f]
			outside := at(r.Far.Loopback(f), talkPort)
			for i, w := range append(r.ways(t, c, f, talkPort), way{"tun", c, r.Far, outside, outside}) {
				n := &count{k: w.start(t, "udp"), ip: ipBytes, link: 14}
				if i == 2 {
					n.link = 0
				}
				counts = append(counts, n)
				for side := range 2 { // the first question and its answer
					n.packets[side]++
					n.bytes[side] += messageSize
				}
			}
		}
		send := func(n *count, side, size int) {
			e := [2]*end{n.k.client, n.k.server}[side]
			message := make([]byte, size) // neither question nor answer: nothing comes back
			message[0] = answer
			binary.BigEndian.PutUint64(message[8:], uint64(size))
			if err := e.write(message); err != nil {
				t.Fatal(err)
			}
			n.packets[side]++
			n.bytes[side] += uint64(size)
		}
		for i := range 4 {
			for _, n := range counts {
				send(n, 0, 100+i)
				send(n, 1, 200+i)
			}
			time.Sleep(700 * time.Millisecond)
		}
		before := r.redirected(t)
		const burst = 2000
		for i := range burst {
			for _, n := range counts {
				send(n, 0, 64+i%1000)
				send(n, 1, 64+i%700)
			}
			if i%10 == 0 {
				time.Sleep(2 * time.Millisecond) // or a queue runs over: this process carries for tun0
			}
		}
		if redirected := r.redirected(t) - before; redirected < uint64(len(counts)*burst*2*9/10) {
			t.Errorf("%d of %d packets redirected", redirected, len(counts)*burst*2)
		}
		for _, n := range counts {
			var flow maps.Flow
			want := [2]maps.Traffic{}
			for side := range 2 {
				want[side] = maps.Traffic{Packets: n.packets[side], Bytes: n.bytes[side] + n.packets[side]*(n.ip+8+n.link)}
			}
			poll(t, n.k.name+" has all packets", func() bool {
				flow = r.flowOf(t, n.k)
				return flow.Out.Packets == want[0].Packets && flow.In.Packets == want[1].Packets
			})
			if flow.Out != want[0] || flow.In != want[1] {
				t.Errorf("%s: out %+v, in %+v, want %+v", n.k.name, flow.Out, flow.In, want)
			}
		}
		r.mustNotDrop(t)
	})
}

// once sends one datagram from a new socket and waits for its echo.
func once(t *testing.T, from *lab.Node, to netip.AddrPort) error {
	_, err := lab.ExchangeUDP(t.Context(), from, netip.AddrPort{}, to, []byte("once"))
	return err
}

// In always a datagram takes the fast path from the first on, both ways, and the firewall is not asked.
// Where the host knows no neighbour yet, it goes the long way and is not lost.
func TestFastAlways(t *testing.T) {
	t.Parallel()
	for _, noPorts := range []bool{false, true} {
		t.Run(variantName(loader.AttachOptions{FastPath: loader.FastPathAlways, NoPorts: noPorts}), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, lab.Options{})
			attach := loader.AttachOptions{FastPath: loader.FastPathAlways, NoPorts: noPorts}
			r.attach(t, attach)
			c := r.Containers[0]
			calls := make(map[string]way)
			for _, f := range lab.Families() {
				for _, w := range r.ways(t, c, f, talkPort) {
					echo, err := lab.StartUDPEcho(w.server, w.listen)
					if err != nil {
						t.Fatal(err)
					}
					defer echo.Close()
					calls[name(w.name, f)] = w
				}
			}
			for what, w := range calls {
				r.knowNeighbours(t)
				before := r.redirected(t)
				if err := once(t, w.client, w.call); err != nil {
					t.Errorf("%s: %v", what, err)
				}
				if redirected := r.redirected(t) - before; redirected != 2 {
					t.Errorf("%s: of a new flow's first two packets %d were redirected", what, redirected)
				}
				// Nobody's neighbour: the kernel asks for it, and keeps the packet meanwhile.
				for _, device := range []string{lab.Uplink, lab.Bridge} {
					ip(t, r.Host, "neigh flush dev "+device)
					if err := once(t, w.client, w.call); err != nil {
						t.Errorf("%s, neighbours of %s unknown: %v", what, device, err)
					}
				}
			}
			// The firewall has no say.
			nft(t, r.Host, "table inet guard { chain forward { type filter hook forward priority filter; policy drop; }; }")
			for what, w := range calls {
				r.knowNeighbours(t)
				if err := once(t, w.client, w.call); err != nil {
					t.Errorf("%s, with a firewall that drops: %v", what, err)
				}
				if conn, err := dialTimeout(w, 300*time.Millisecond); err == nil {
					_ = conn.Close()
					t.Errorf("%s: a connection's first packet, which is never on the fast path, passed the firewall", what)
				}
			}
			nft(t, r.Host, "flush ruleset")
			for what, w := range calls {
				listener, err := w.server.ListenTCP(t.Context(), w.listen)
				if err != nil {
					t.Fatal(err)
				}
				conn, err := dialTimeout(w, lab.DefaultTimeout)
				if err != nil {
					t.Errorf("%s: %v", what, err)
				} else {
					_ = conn.Close()
				}
				_ = listener.Close()
			}
			r.mustNotDrop(t)
		})
	}
}

// knowNeighbours has the host ask for its neighbours.
func (r *rig) knowNeighbours(t *testing.T) {
	t.Helper()
	for _, f := range lab.Families() {
		mustPing(t, r.Host, r.World.Addr(f), lab.PingOptions{})
		mustPing(t, r.Host, r.Containers[0].Addr(f), lab.PingOptions{})
	}
}

func dialTimeout(w way, timeout time.Duration) (net.Conn, error) {
	var conn net.Conn
	err := w.client.Do(func() (err error) {
		conn, err = net.DialTimeout("tcp", w.call.String(), timeout)
		return err
	})
	return conn, err
}
