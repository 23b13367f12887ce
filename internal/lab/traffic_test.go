package lab

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"
)

func TestEchoSeesClient(t *testing.T) {
	l := newLab(t, Options{})
	for _, f := range Families() {
		t.Run(f.String(), func(t *testing.T) {
			tcp, err := StartTCPEcho(t.Context(), l.World, netip.AddrPortFrom(l.World.Loopback(f), 7))
			if err != nil {
				t.Fatal(err)
			}
			defer tcp.Close()
			udp, err := StartUDPEcho(l.World, netip.AddrPortFrom(l.World.Loopback(f), 7))
			if err != nil {
				t.Fatal(err)
			}
			defer udp.Close()
			for name, run := range map[string]func() (netip.AddrPort, error){
				"tcp": func() (netip.AddrPort, error) {
					return ExchangeTCP(t.Context(), l.Host, tcp.Addr, []byte("hello"))
				},
				"udp": func() (netip.AddrPort, error) {
					return ExchangeUDP(t.Context(), l.Host, netip.AddrPort{}, udp.Addr, []byte("hello"))
				},
			} {
				echo := map[string]*Echo{"tcp": tcp, "udp": udp}[name]
				local, err := run()
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
				if peers := echo.Peers(); len(peers) != 1 || peers[0] != local || local.Addr() != l.Host.Addr(f) {
					t.Errorf("%s: server saw %v, client was %s", name, peers, local)
				}
			}
		})
	}
}

func TestExchangeWithoutAnswer(t *testing.T) {
	l := newLab(t, Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	to := netip.AddrPortFrom(l.World.Loopback(IPv4), 9)
	if _, err := ExchangeTCP(ctx, l.Containers[0], to, []byte("x")); !errors.Is(err, ErrNoReply) {
		t.Errorf("got %v, want %v", err, ErrNoReply)
	}
}

func TestTransferBothWays(t *testing.T) {
	const up, down = 3<<20 + 1, 1<<20 + 7
	for name, o := range map[string]Options{"segmentation": {}, "no segmentation": {NoSegmentation: true}} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, o)
			big, err := StartCapture(l.Router, "eth0", func(p Packet) bool { return p.Length > 1500 })
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range Families() {
				server, err := StartServer(t.Context(), l.World, netip.AddrPortFrom(l.World.Addr(f), 0))
				if err != nil {
					t.Fatal(err)
				}
				got, err := RunTransfer(t.Context(), l.Host, server.Addr, up, down, 0)
				server.Close()
				if err != nil {
					t.Fatal(err)
				}
				if got.Up.Bytes != up || got.Down.Bytes != down || got.ClientAsSeen != got.Client {
					t.Errorf("%+v", got)
				}
			}
			if err := big.Close(); err != nil {
				t.Error(err)
			}
			if seen := len(big.Packets()) > 0; seen == o.NoSegmentation {
				t.Errorf("packets over the MTU seen: %t", seen)
			}
		})
	}
}

func TestTransferEndsWithContext(t *testing.T) {
	l := newLab(t, Options{})
	server, err := StartServer(t.Context(), l.World, netip.AddrPortFrom(l.World.Addr(IPv4), 0))
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := RunTransfer(ctx, l.Host, server.Addr, 1<<40, 0, 1<<20); err == nil {
		t.Error("a transfer of 12 days has ended")
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("took %s to end", took)
	}
}

func TestSinkAccounts(t *testing.T) {
	var s Sink
	for _, seq := range []uint64{0, 2, 1, 3, 3, 1} {
		s.account(seq)
	}
	if s.count.Packets != 6 || s.count.Distinct != 4 || s.count.Duplicates != 2 || s.count.Reordered != 2 {
		t.Errorf("%+v, want 6 packets: 4 distinct, 2 again, 2 behind a higher one", s.count)
	}
}

func TestStreamIsCounted(t *testing.T) {
	l := newLab(t, Options{})
	sink, err := StartSink(l.World, netip.AddrPortFrom(l.World.Addr(IPv6), 0))
	if err != nil {
		t.Fatal(err)
	}
	defer sink.Close()
	before, err := l.World.DeviceCounters("eth0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	const rate = 5000
	start := time.Now()
	sent, err := RunStream(ctx, l.Host, sink.Addr, StreamOptions{Rate: rate})
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); sent < rate/4 || float64(sent) > took.Seconds()*rate {
		t.Errorf("sent %d in %s at %d/s", sent, took, rate)
	}
	eventually(t, func() bool { return sink.Count().Distinct == sent })
	// A sender that moves to another CPU may overtake itself: the order is not asked for.
	if count := sink.Count(); count.Duplicates != 0 || len(count.Peers) != 1 {
		t.Errorf("%+v", count)
	}
	after, err := l.World.DeviceCounters("eth0")
	if err != nil {
		t.Fatal(err)
	}
	if got := after.RxPackets - before.RxPackets; got < sent {
		t.Errorf("device counted %d packets of %d", got, sent)
	}
}

func TestCaptureReadsHeaders(t *testing.T) {
	l := newLab(t, Options{TunUplink: true})
	for name, capture := range map[string]struct {
		node   *Node
		device string
		to     *Node
	}{
		"ethernet": {l.World, "eth0", l.World},
		"tun":      {l.Far, TunUplink, l.Far},
	} {
		for _, f := range Families() {
			t.Run(name+"/"+f.String(), func(t *testing.T) {
				c, err := StartCapture(capture.node, capture.device, func(p Packet) bool { return p.Protocol == 17 })
				if err != nil {
					t.Fatal(err)
				}
				echo, err := StartUDPEcho(capture.to, netip.AddrPortFrom(capture.to.Loopback(f), 4000))
				if err != nil {
					t.Fatal(err)
				}
				defer echo.Close()
				local, err := ExchangeUDP(t.Context(), l.Host, netip.AddrPort{}, echo.Addr, []byte("0123456789"))
				if err != nil {
					t.Fatal(err)
				}
				eventually(t, func() bool { return len(c.Packets()) == 2 })
				if err := c.Close(); err != nil {
					t.Error(err)
				}
				for i, p := range c.Packets() {
					src, dst := netip.AddrPortFrom(p.Src, p.SrcPort), netip.AddrPortFrom(p.Dst, p.DstPort)
					if p.Outgoing {
						src, dst = dst, src
					}
					if p.Outgoing != (i == 1) || src != local || dst != echo.Addr || p.Fragment || p.Length != len(p.IP) {
						t.Errorf("packet %d: %s, outgoing %t", i, p, p.Outgoing)
					}
				}
			})
		}
	}
}

func TestFragmentsAreSeen(t *testing.T) {
	l := newLab(t, Options{})
	for _, f := range Families() {
		c, err := StartCapture(l.World, "eth0", func(p Packet) bool { return p.Fragment && !p.Outgoing })
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Ping(t.Context(), l.Host, l.World.Addr(f), PingOptions{Size: 3000}); err != nil {
			t.Error(err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if n := len(c.Packets()); n != 3 {
			t.Errorf("%s: %d fragments of a 3000 byte ping, want 3", f, n)
		}
	}
}

// eventually polls until the condition holds.
func eventually(t *testing.T, holds func() bool) {
	t.Helper()
	const patience = 20 * time.Second
	deadline := time.Now().Add(patience)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("did not come to hold in %s", patience)
		}
		time.Sleep(2 * time.Millisecond)
	}
}
