package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// Ten upgrades to other builds, during a TCP transfer and a stream of datagrams through
// SNAT and another through DNAT, lose nothing.
func TestUpgradeLosesNothing(t *testing.T) {
	const (
		upgrades = 10
		outRate  = 20_000 // datagrams a second
		inRate   = 2_000
		tcpRate  = 10 << 20 // bytes a second
	)
	forEachMode(t, lab.Options{Containers: 2, SecondUplink: true}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		options := loader.AttachOptions{Mode: mode, Uplinks: []string{lab.Uplink, lab.Uplink2}}
		start := time.Now()
		status := r.attach(t, options)
		took := time.Since(start)

		// The transfer has a way of its own, so that its packets can be counted on it.
		c, f := r.Containers[0], lab.IPv4
		tcp := newMeter(t, c, r.World, unix.IPPROTO_TCP)
		server, err := lab.StartServer(t.Context(), r.World, at(r.World.Loopback(f), 5001))
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		var (
			work     sync.WaitGroup
			upgraded atomic.Bool // all of them are done
		)
		t.Cleanup(work.Wait)
		// An upgrade takes less than the first attach, for it makes no maps, unless the machine has become
		// busier: then another transfer follows the first.
		bytes := int64(1.5 * took.Seconds() * upgrades * tcpRate)
		work.Go(func() {
			for done := false; !done && !t.Failed(); {
				got, err := lab.RunTransfer(t.Context(), c, server.Addr, bytes, bytes/8, tcpRate)
				if done = upgraded.Load(); err != nil {
					t.Error(err)
				}
				report(t, got)
			}
		})

		second := r.Containers[1]
		r.publish(t, maps.SinglePort(8080), second.Addr(lab.IPv6), maps.SinglePort(80))
		out := r.startStream(t, second, r.Other, at(r.Other.Loopback(f), 6001), at(r.Other.Loopback(f), 6001), outRate)
		in := r.startStream(t, r.Other, second, at(second.Addr(lab.IPv6), 80), at(lab.Uplink2Addr(lab.IPv6), 8080), inRate)

		for n := range upgrades {
			options.Spec = otherBuild(n + 1)
			next := r.attach(t, options)
			mustBeOtherBuild(t, status, next)
			status = next
		}
		upgraded.Store(true)
		out.mustArrive(t, lab.Uplink2Addr(f))
		in.mustArrive(t, r.Other.Addr(lab.IPv6))
		work.Wait()
		tcp.mustMatch(t)
		r.mustNotDrop(t)
	})
}

// otherBuild is the datapath with n instructions more that do nothing: other tags.
func otherBuild(n int) func() (*ebpf.CollectionSpec, error) {
	return func() (*ebpf.CollectionSpec, error) {
		spec, err := bpf.LoadNAT()
		if err != nil {
			return nil, err
		}
		for name, program := range spec.Programs {
			// Behind the first instruction, which carries the function's symbol and BTF. The
			// context is in R1 from the entry on, and jumps within the rest stay as they are.
			first := program.Instructions[0].OpCode
			if first.JumpOp() != asm.InvalidJumpOp {
				return nil, fmt.Errorf("program %s begins with a jump", name)
			}
			padding := make(asm.Instructions, n)
			for i := range padding {
				padding[i] = asm.Mov.Reg(asm.R1, asm.R1)
			}
			program.Instructions = slices.Insert(program.Instructions, 1, padding...)
		}
		return spec, nil
	}
}

// mustBeOtherBuild checks that every hook runs another program than before.
func mustBeOtherBuild(t *testing.T, before, after loader.Status) {
	t.Helper()
	if len(after.Devices) != len(before.Devices) || len(after.Problems) > 0 {
		t.Fatalf("devices %+v, were %+v; problems %v", after.Devices, before.Devices, after.Problems)
	}
	for i, device := range after.Devices {
		was := before.Devices[i]
		for _, hook := range [][2]loader.HookStatus{{was.Ingress, device.Ingress}, {was.Egress, device.Egress}} {
			if hook[1].ID == 0 || hook[1].ID == hook[0].ID || hook[1].Tag == hook[0].Tag {
				t.Errorf("%s: %s was program %d, tag %s, is %d, %s",
					device.Name, hook[1].Program, hook[0].ID, hook[0].Tag, hook[1].ID, hook[1].Tag)
			}
		}
	}
}

// meter counts the packets of a protocol where they are sent and where they arrive, both
// directions of a conversation between two nodes.
type meter struct {
	ends     [2]*lab.Capture
	sent     [2]atomic.Uint64
	received [2]atomic.Uint64
}

func newMeter(t *testing.T, a, b *lab.Node, protocol uint8) *meter {
	m := &meter{}
	for i, n := range []*lab.Node{a, b} {
		m.ends[i] = watch(t, n, "eth0", func(p lab.Packet) bool {
			switch {
			case p.Protocol != protocol:
			case p.Outgoing:
				m.sent[i].Add(1)
			default:
				m.received[i].Add(1)
			}
			return false
		})
	}
	return m
}

func (m *meter) mustMatch(t *testing.T) {
	t.Helper()
	for i := range m.ends {
		poll(t, "packets sent are packets received", func() bool { return m.sent[i].Load() == m.received[1-i].Load() })
		t.Logf("packets: %d sent, %d received", m.sent[i].Load(), m.received[1-i].Load())
	}
	for _, end := range m.ends {
		if err := end.Close(); err != nil {
			t.Error(err)
		}
	}
}

// stream is a UDP stream that runs until mustArrive.
type stream struct {
	from, to *lab.Node
	sink     *lab.Sink
	before   [2]lab.DeviceCounters // of the sender's device, of the receiver's
	stop     context.CancelFunc
	done     chan struct{}
	sent     uint64
	err      error
}

// startStream sends datagrams to call, which are to arrive at listen.
func (r *rig) startStream(t *testing.T, from, to *lab.Node, listen, call netip.AddrPort, rate int) *stream {
	t.Helper()
	sink, err := lab.StartSink(to, listen)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(sink.Close)
	ctx, stop := context.WithCancel(t.Context())
	s := &stream{from: from, to: to, sink: sink, stop: stop, done: make(chan struct{})}
	s.before = s.counters(t)
	go func() {
		defer close(s.done)
		s.sent, s.err = lab.RunStream(ctx, from, call, lab.StreamOptions{Rate: rate})
	}()
	t.Cleanup(func() { stop(); <-s.done })
	return s
}

// mustArrive ends the stream and checks that every datagram has arrived, once, and all of
// them from one port of the source.
func (s *stream) mustArrive(t *testing.T, source netip.Addr) {
	t.Helper()
	s.stop()
	<-s.done
	if s.err != nil {
		t.Error(s.err)
	}
	poll(t, "the stream has arrived", func() bool { return s.sink.Count().Distinct == s.sent })
	count := s.sink.Count()
	after := s.counters(t)
	t.Logf("%d datagrams sent, %d arrived; %s sent %d packets, %s received %d", s.sent, count.Distinct,
		s.from.Role, after[0].TxPackets-s.before[0].TxPackets, s.to.Role, after[1].RxPackets-s.before[1].RxPackets)
	if count.Duplicates > 0 || len(count.Peers) != 1 {
		t.Errorf("%d came twice; they came from %v", count.Duplicates, count.Peers)
	}
	for peer := range count.Peers {
		if peer.Addr() != source {
			t.Errorf("they came from %s, want %s", peer, source)
		}
	}
	for i, n := range []*lab.Node{s.from, s.to} {
		if dropped := after[i].RxDropped + after[i].TxDropped - s.before[i].RxDropped - s.before[i].TxDropped; dropped > 0 {
			t.Errorf("%s: eth0 dropped %d packets", n.Role, dropped)
		}
	}
	if count.Distinct != s.sent {
		t.Errorf("%d datagrams are lost", s.sent-count.Distinct)
	}
}

func (s *stream) counters(t *testing.T) (counters [2]lab.DeviceCounters) {
	t.Helper()
	for i, n := range []*lab.Node{s.from, s.to} {
		var err error
		if counters[i], err = n.DeviceCounters("eth0"); err != nil {
			t.Fatal(err)
		}
	}
	return counters
}
