package bpf_test

import (
	"bytes"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
)

// pair runs two programs at the same instant on two CPUs, again and again.
type pair struct {
	*datapath
	started, done atomic.Int64
	rounds        int64
	second        func()
}

// newPair ties the test to one CPU and a goroutine to another; both leave with the test.
func newPair(t *testing.T, d *datapath) *pair {
	all := cpus(t)
	if len(all) < 2 {
		t.Skip("needs two CPUs")
	}
	p := &pair{datapath: d}
	runtime.LockOSThread() // not unlocked: the threads end with their goroutines
	tie := func(cpu int) {
		var set unix.CPUSet
		set.Set(cpu)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			t.Error(err)
		}
	}
	tie(all[0])
	go func() {
		runtime.LockOSThread()
		tie(all[1])
		for round := int64(1); ; round++ {
			for p.started.Load() != round {
				if p.started.Load() < 0 {
					return
				}
				runtime.Gosched()
			}
			p.second()
			p.done.Store(round)
		}
	}()
	t.Cleanup(func() { p.started.Store(-1) })
	return p
}

// together runs both frames through a hook at once.
func (p *pair) together(h hook, one, two []byte) (verdicts [2]uint32, out [2][]byte) {
	p.Helper()
	var errs [2]error
	run := func(i int, frame []byte) {
		opts := &ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+64), Context: h.skb}
		verdicts[i], errs[i] = p.programs[h.program].Run(opts)
		out[i] = opts.DataOut
	}
	p.second = func() { run(1, two) }
	p.rounds++
	p.started.Store(p.rounds)
	run(0, one)
	for p.done.Load() != p.rounds {
		runtime.Gosched()
	}
	p.check(errs[0])
	p.check(errs[1])
	return verdicts, out
}

// Two CPUs get the first packets of one conversation at once: one flow comes of it, both
// packets leave alike, and none is lost.
func TestRaceForFlow(t *testing.T) {
	d := load(t, 16384)
	for _, f := range families {
		for _, c := range []struct {
			name  string
			proto uint8
			hook  hook
			rules ruleSet
		}{
			{"tcp-out", protoTCP, toUplink(), ruleSet{snat: []snatRule{{source: f.subnet, first: f.second, last: f.second, ports: portRange{1, 1023}}}}},
			{"udp-out", protoUDP, toUplink(), ruleSet{snat: []snatRule{{source: f.subnet, first: f.second, last: f.second, ports: portRange{1, 1023}}}}},
			{"echo-out", f.icmp, toUplink(), ruleSet{snat: []snatRule{{source: f.subnet, masquerade: true}}}},
			{"tcp-in", protoTCP, fromUplink(), ruleSet{dnat: []dnatRule{publish(f, protoTCP, one(3005), one(80))}}},
			{"udp-in", protoUDP, fromUplink(), ruleSet{dnat: []dnatRule{publish(f, protoUDP, one(3005), one(80))}}},
		} {
			t.Run(f.name+"/"+c.name, func(t *testing.T) {
				sub := *d
				d := &sub
				d.TB = t
				d.reset()
				d.setRules(c.rules)
				pair := newPair(t, d)
				began := time.Now()
				rounds := uint16(0)
				for i := range uint16(800) {
					if i > 50 && time.Since(began) > 3*time.Second {
						break // others use the CPUs
					}
					rounds++
					p := packet{src: at(f.container, 2000+i), dst: at(f.world, 443), proto: c.proto, tcp: "S", icmpType: f.echoRequest}
					if c.proto == f.icmp {
						p.dst = at(f.world, 0)
					}
					if c.hook.program == bpf.NATProgFromUplink {
						p = p.addrs(at(f.world, 2000+i), at(f.uplink, 3005)).between(gatewayMAC, uplinkMAC)
					}
					verdicts, out := pair.together(c.hook, p.frame(), p.frame())
					if verdicts != [2]uint32{unspec, unspec} {
						t.Fatalf("round %d: verdicts %d; counted %s", i, verdicts, d.counts())
					}
					if bytes.Equal(out[0], p.frame()) || !bytes.Equal(out[0], out[1]) {
						t.Fatalf("round %d: one packet, two translations\n%s\n%s", i, describe(out[0]), describe(out[1]))
					}
				}
				if n := d.halves(); n != 2*int(rounds) {
					t.Errorf("%d halves, want %d", n, 2*rounds)
				}
				counted := d.counts()
				t.Logf("counted %s", counted)
				if n := counted[bpf.NATCounterFLOWS_CREATED]; n != uint64(rounds) {
					t.Errorf("%d flows created, want %d", n, rounds)
				}
				if c.proto == protoUDP && c.hook.program == bpf.NATProgToUplink {
					if n, moved := len(d.mappings()), d.moved(); n != int(rounds) || moved != n {
						t.Errorf("%d mappings, %d of them of ports that moved, want %d", n, moved, rounds)
					}
				}
				if c.proto == protoUDP { // which has most to give back; each takes the expiry seconds
					d.emptied()
				}
			})
		}
	}
}

// Two containers want the same port at the same time: each gets one of its own.
func TestRaceForPort(t *testing.T) {
	d := load(t, 16384)
	for _, f := range families {
		for _, proto := range []uint8{protoTCP, protoUDP, f.icmp} {
			t.Run(f.name, func(t *testing.T) {
				sub := *d
				d := &sub
				d.TB = t
				d.reset()
				masquerade(d, f)
				pair := newPair(t, d)
				began, rounds := time.Now(), 0
				for i := range uint16(800) {
					if i > 50 && time.Since(began) > 3*time.Second {
						break // others use the CPUs
					}
					rounds++
					a := packet{src: at(f.container, 2000+i), dst: at(f.world, 443), proto: proto, tcp: "S", icmpType: f.echoRequest}
					if proto == f.icmp {
						a.dst = at(f.world, 0)
					}
					b := a.from(at(f.other, 2000+i))
					verdicts, out := pair.together(toUplink(), a.frame(), b.frame())
					if verdicts != [2]uint32{unspec, unspec} {
						t.Fatalf("round %d: verdicts %d; counted %s", i, verdicts, d.counts())
					}
					for n, p := range []packet{a, b} {
						d.sameFrame(p.from(at(f.uplink, sourcePort(f, proto, out[n]))).frame(), out[n])
					}
					if sourcePort(f, proto, out[0]) == sourcePort(f, proto, out[1]) {
						t.Fatalf("round %d: both got port %d", i, sourcePort(f, proto, out[0]))
					}
				}
				if n := d.halves(); n != 4*rounds {
					t.Errorf("%d halves, want %d", n, 4*rounds)
				}
			})
		}
	}
}

// Two containers want the same port at the same time, towards different destinations: no reply tuple
// tells them apart, but a UDP port is one endpoint's (RFC 4787 REQ-3).
func TestRaceForMapping(t *testing.T) {
	d := load(t, 16384)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			sub := *d
			d := &sub
			d.TB = t
			d.reset()
			masquerade(d, f)
			pair := newPair(t, d)
			began := time.Now()
			shared := uint64(0) // where a CPU stood still for long while it had the lock, and the other one did not wait
			for i := range uint16(2000) {
				if i > 50 && time.Since(began) > 3*time.Second {
					break // others use the CPUs
				}
				a := packet{src: at(f.container, 2000+i), dst: at(f.world, 443), proto: protoUDP}
				b := a.addrs(at(f.other, 2000+i), at(f.router, 443))
				verdicts, out := pair.together(toUplink(), a.frame(), b.frame())
				if verdicts != [2]uint32{unspec, unspec} {
					t.Fatalf("round %d: verdicts %d; counted %s", i, verdicts, d.counts())
				}
				if port := sourcePort(f, protoUDP, out[0]); port == sourcePort(f, protoUDP, out[1]) && d.counts()[bpf.NATCounterPORTS_SHARED] == shared {
					t.Fatalf("round %d: port %d is two endpoints'; counted %s", i, port, d.counts())
				}
				shared = d.counts()[bpf.NATCounterPORTS_SHARED]
			}
			if shared > 20 {
				t.Errorf("%d ports are shared", shared)
			}
			d.checkMappings()
		})
	}
}
