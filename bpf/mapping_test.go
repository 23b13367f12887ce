package bpf_test

import (
	"encoding/binary"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
)

// TCP shares a port among destinations; a UDP port belongs to one endpoint (RFC 4787 REQ-3),
// which has it towards all destinations (REQ-1).
func TestMappings(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		worlds := []netip.AddrPort{at(f.world, 443), at(f.world, 444), at(f.router, 443), at(f.gateway, 53)}
		d.each(f.name+"/tcp-shares", func(d *datapath) {
			masquerade(d, f)
			c := d.path(f, tcp).as(f.uplink, 0)
			for i, w := range worlds {
				container := []netip.Addr{f.container, f.other}[i%2]
				if got := c.by(container, 40000).toward(w).open().outside.Port(); got != 40000 {
					d.Errorf("port 40000 towards %s became %d", w, got)
				}
			}
		})
		d.each(f.name+"/udp-keeps", func(d *datapath) {
			masquerade(d, f)
			c := d.path(f, udp).as(f.uplink, 0)
			c.by(f.other, 40000).open() // so that the port must move
			moved := c.open()
			if moved.outside.Port() == 40000 {
				d.Fatal("two endpoints have port 40000")
			}
			for _, w := range worlds {
				again := moved.toward(w)
				again.sends("", "x")
				again.receives("", "y")
			}
			if n, moved := len(d.mappings()), d.moved(); n != 2 || moved != 1 {
				d.Errorf("%d mappings, %d of them of ports that moved, want one for each of two endpoints, and one that moved", n, moved)
			}
			for _, m := range d.mappings() {
				want := uint32(1)
				if goAddr(m.Inside, bpf.NATFamily(f.abi())) == f.container {
					want = uint32(len(worlds)) | uint32(bpf.NATMappingBitsMAPPING_MOVED)
				}
				if uint32(m.Hold) != want {
					d.Errorf("mapping %v is held by %x, want %x", m, uint32(m.Hold), want)
				}
			}
		})
		d.each(f.name+"/udp-shares-when-none-is-left", func(d *datapath) {
			d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, first: f.second, last: f.second, ports: portRange{20000, 20001}}}})
			c := d.path(f, udp).as(f.second, 0)
			c.by(f.container, 1).open()
			c.by(f.other, 1).open()
			if got := c.by(f.third(), 1).tryOpen(); got != 0 {
				d.Errorf("port %d for a third endpoint towards the same destination", got)
			}
			before := d.counts()
			third := c.by(f.third(), 1).toward(worlds[1]).open()
			third.receives("", "reply")
			if n := d.counts().since(before)[bpf.NATCounterPORTS_SHARED]; n != 1 {
				d.Errorf("ports shared: %d, want 1", n)
			}
		})
	}
}

// outsideHash is outside_hash() of mapping.h.
func outsideHash(address netip.Addr, proto uint8) uint32 {
	bytes := address.As16()
	var hash uint64
	for _, word := range []uint64{
		binary.NativeEndian.Uint64(bytes[:8]), binary.NativeEndian.Uint64(bytes[8:]), uint64(proto),
	} {
		hash = (hash ^ word) * 0x9e3779b97f4a7c15
		hash ^= hash >> 29
	}
	return uint32(hash >> 32)
}

// meetingPorts answers a port of each outside address, such that all have the same place in the table.
func meetingPorts(outside []netip.Addr) (ports []uint16) {
	for first := uint16(40000); ; first += 1000 {
		ports = nil
		for _, a := range outside {
			port := uint16(uint32(first) + outsideHash(outside[0], protoUDP) - outsideHash(a, protoUDP))
			if port < 1024 {
				break // another class of ports
			}
			ports = append(ports, port)
		}
		if len(ports) == len(outside) {
			return ports
		}
	}
}

// Outside ports of several addresses meet in one place of the table. The second one lives in the place
// beside it; a third counts as taken: its endpoint gets another port, one towards all destinations. Each
// gets its replies.
func TestMappingsMeet(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			outside := []netip.Addr{f.uplink, f.second, f.poolFirst}
			inside := []netip.Addr{f.container, f.other, f.third()}
			ports := meetingPorts(outside)
			var rules ruleSet
			var open []path
			for i := range outside {
				rules.snat = append(rules.snat, snatRule{source: netip.PrefixFrom(inside[i], inside[i].BitLen()), first: outside[i], last: outside[i]})
			}
			d.setRules(rules)
			for i := range outside {
				open = append(open, d.path(f, udp).as(outside[i], 0).by(inside[i], ports[i]).open())
			}
			for i, c := range open {
				if (c.outside.Port() != ports[i]) != (i == 2) {
					d.Fatalf("port %d of %s, of three that meet, became %d: want the third one moved, and no other", ports[i], outside[i], c.outside.Port())
				}
			}
			for _, c := range open {
				c.toward(at(f.router, 443)).sends("", "x")
				c.toward(at(f.router, 443)).receives("", "y")
				c.receives("", "z")
			}
			d.checkMappings()
			if n, moved := len(d.mappings()), d.moved(); n != 3 || moved != 1 {
				d.Errorf("%d mappings, %d of them moved, want 3 and 1", n, moved)
			}
			d.emptied()
			if c := d.path(f, udp).as(outside[2], 0).by(inside[2], ports[2]).open(); c.outside.Port() != ports[2] {
				d.Errorf("port %d became %d though its places are free again", ports[2], c.outside.Port())
			}
		})
	}
}

// A port that lives beside its home stays one endpoint's when its home becomes free.
func TestMappingsHomeFreed(t *testing.T) {
	t.Parallel() // most of it is waiting
	d := load(t, 64)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			ports := meetingPorts([]netip.Addr{f.uplink, f.second})
			d.setRules(ruleSet{snat: []snatRule{
				{source: netip.PrefixFrom(f.container, f.container.BitLen()), first: f.uplink, last: f.uplink},
				{source: f.subnet, first: f.second, last: f.second},
			}})
			a := d.path(f, udp).as(f.uplink, 0).by(f.container, ports[0]).open()
			b := d.path(f, udp).as(f.second, 0).by(f.other, ports[1]).open()
			_, claim := a.tuples(false)
			if !d.endFlow(claim, a.id(false)) {
				d.Fatal("the flow in the ports' home was not there")
			}
			d.startExpiry()
			d.until("the home is free", 20*time.Second, func() bool { return len(d.mappings()) == 1 })
			if c := b.by(f.third(), ports[1]).toward(at(f.router, 443)).open(); c.outside.Port() == ports[1] {
				d.Errorf("port %d is two endpoints'", ports[1])
			}
			b.toward(at(f.gateway, 53)).sends("", "x")
			b.receives("", "y")
			d.checkMappings()
			d.emptied()
		})
	}
}

// checkMappings expects that no outside port is in two places, that no endpoint has two ports of an
// outside address, and that a mapping is held by as many flows as there are with it.
func (d *datapath) checkMappings() {
	d.Helper()
	type outsidePort struct {
		outside uint32
		port    uint16
	}
	type insidePort struct {
		inside  bpf.NATAddr
		port    uint16
		outside uint32
	}
	ports, endpoints := make(map[outsidePort]bpf.NATMapping), make(map[insidePort]bpf.NATMapping)
	held := 0
	for place, m := range d.mappings() {
		if uint32(m.Hold)&uint32(bpf.NATMappingBitsMAPPING_LOCKED) != 0 {
			d.Errorf("place %d is locked though nobody is at it: %x", place, m.Hold)
		}
		flows := int(uint32(m.Hold) & uint32(bpf.NATMappingBitsMAPPING_FLOWS))
		if flows == 0 {
			continue
		}
		held += flows
		if other, twice := ports[outsidePort{m.Outside, m.OutsidePort}]; twice {
			d.Errorf("outside port %d is in two places: %+v and %+v", be16(m.OutsidePort), m, other)
		}
		ports[outsidePort{m.Outside, m.OutsidePort}] = m
		if other, twice := endpoints[insidePort{m.Inside, m.InsidePort, m.Outside}]; twice {
			d.Errorf("an endpoint has two ports: %+v and %+v", m, other)
		}
		endpoints[insidePort{m.Inside, m.InsidePort, m.Outside}] = m
	}
	mapped := 0
	for _, half := range d.allHalves() {
		if half.Role == bpf.NATRoleROLE_REPLY && half.Standing.Held != 0 {
			mapped += bits.OnesCount8(uint8(half.Standing.Held))
		}
	}
	if held != mapped {
		d.Errorf("mappings are held by %d flows, where %d have one", held, mapped)
	}
}

// Two CPUs open flows from few endpoints by a table of mappings that is far too small, so that ports
// move, live beside their homes and are let go all the time; the expiry ends flows between them.
// Whenever both pause, what checkMappings expects must hold.
func TestMappingsOfTwoCPUs(t *testing.T) {
	all := cpus(t)
	if len(all) < 2 {
		t.Skip("needs two CPUs")
	}
	rounds := 60
	if testing.Short() {
		rounds = 12
	}
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			d := loadPlaces(t, 4096, 8)
			r := seeded(t)
			d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, first: f.poolFirst, last: f.poolLast}}})
			d.startExpiry()
			var sent atomic.Int64
			for range rounds {
				var stop atomic.Bool
				var running sync.WaitGroup
				for _, cpu := range all[:2] {
					random := rand.New(rand.NewPCG(r.Uint64(), 0))
					running.Go(func() {
						runtime.LockOSThread() // not unlocked: the thread, tied to the CPU, ends with its goroutine
						var set unix.CPUSet
						set.Set(cpu)
						if err := unix.SchedSetaffinity(0, &set); err != nil {
							t.Error(err)
							return
						}
						for !stop.Load() {
							p := packet{
								src: at(f.containerAt(random.IntN(4)), 40000+uint16(random.IntN(3))),
								dst: at(f.world, 1+uint16(random.IntN(4))), proto: protoUDP,
							}.between(uplinkMAC, gatewayMAC)
							h := toUplink()
							opts := &ebpf.RunOptions{Data: p.frame(), DataOut: make([]byte, 256), Context: h.skb}
							if _, err := d.programs[h.program].Run(opts); err != nil {
								t.Error(err)
								return
							}
							sent.Add(1)
						}
					})
				}
				for end := time.Now().Add(50 * time.Millisecond); time.Now().Before(end); {
					for key, half := range d.allHalves() {
						if half.Role == bpf.NATRoleROLE_REPLY && r.IntN(2) == 0 {
							d.endFlow(goTuple(key), half.Standing.Id)
						}
					}
				}
				stop.Store(true)
				running.Wait()
				d.settled()
				d.checkMappings()
				if t.Failed() {
					break
				}
			}
			t.Logf("%d packets; counted %s", sent.Load(), d.counts())
			d.emptied()
		})
	}
}

// settled waits until the expiry has ended what is over.
func (d *datapath) settled() {
	d.Helper()
	counted := uint64(0)
	d.until("the expiry has nothing to do", 30*time.Second, func() bool {
		before := counted
		counted = d.counts()[bpf.NATCounterFLOWS_ENDED]
		return before == counted
	})
}

func (f family) abi() bpf.NATFamily {
	if f.name == "ipv4" {
		return bpf.NATFamilyFAMILY_IPV4
	}
	return bpf.NATFamilyFAMILY_IPV6
}
