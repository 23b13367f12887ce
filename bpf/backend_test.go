package bpf_test

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
)

// Which of a rule's several targets a new flow goes to.

// several are the targets of a rule; ids are those of the targets.
type several struct {
	targets  []netip.AddrPort
	weights  []int
	ids      []uint32
	source   bool
	affinity uint32 // stamps
}

const backendByID = 0xffffffff

// lay makes a rule one with several targets, and adds what the map of backends has of them.
func (s *several) lay(d *datapath, v *bpf.NATDnatRule, backends map[bpf.NATBackendKey]bpf.NATBackend) {
	v.Flags |= bpf.NATDnatFlagDNAT_BACKENDS
	if s.source {
		v.Flags |= bpf.NATDnatFlagDNAT_SOURCE
	}
	v.Affinity = s.affinity
	for i, to := range s.targets {
		b := bpf.NATBackend{
			To: natAddr(to.Addr()), ToFirst: to.Port(), ToLast: to.Port(), Rule: v.Id,
			Id: s.ids[i], Generation: d.generation(s.ids[i]), Weight: uint16(s.weights[i]),
		}
		backends[bpf.NATBackendKey{Rule: b.Id, Slot: backendByID}] = b
		for range s.weights[i] {
			backends[bpf.NATBackendKey{Rule: v.Id, Slot: uint32(v.Slots)}] = b
			v.Slots++
		}
	}
}

// twoBackends publishes port 80, of TCP, of the host by two containers; the second has port 8080.
func twoBackends(d *datapath, f family, weights ...int) (dnatRule, *several) {
	s := &several{
		targets: []netip.AddrPort{at(f.container, 80), at(f.other, 8080)}, weights: weights, ids: []uint32{201, 202},
	}
	spec := natSpec().Maps[bpf.NATMapNoAffinities].Copy()
	spec.MaxEntries = 4096
	clients, err := ebpf.NewMap(spec)
	d.check(err)
	defer clients.Close()
	d.check(d.Affinities.Put(uint32(0), clients))
	return dnatRule{proto: protoTCP, ports: one(80), to: f.container, toPorts: one(80), several: s}, s
}

// chooses sends a client's SYN in, and answers the index of the target that it goes to, and its flow.
func (s *several) chooses(d *datapath, f family, client netip.AddrPort) (int, bpf.NATHalf) {
	d.Helper()
	syn := packet{src: client, dst: at(f.uplink, 80), proto: protoTCP, tcp: "S"}.between(gatewayMAC, uplinkMAC)
	verdict, out := d.run(fromUplink(), syn.frame())
	if verdict != unspec {
		d.Fatalf("verdict %d; counted: %s", int32(verdict), d.counts())
	}
	half := d.mustHalf(tuple{protoTCP, client, at(f.uplink, 80)})
	for i, to := range s.targets {
		if goAddr(half.Other.Src, half.Other.Family) == to.Addr() {
			want := syn.addrs(client, to)
			d.sameFrame(want.frame(), out)
			if half.Rule != s.ids[i] || half.Generation != d.generation(s.ids[i]) {
				d.Errorf("flow of rule %d, generation %d; want that of target %d", half.Rule, half.Generation, s.ids[i])
			}
			return i, half
		}
	}
	d.Fatalf("goes to none of the targets: %+v", half)
	return 0, half
}

// At random, each target gets its share by weight, within five standard deviations; all packets of a flow
// go the same way.
func TestBackendsByWeight(t *testing.T) {
	d := load(t, 4096)
	for _, f := range families {
		for _, weights := range [][]int{{1, 1}, {3, 1}, {1, 9}} {
			d.reset()
			d.TB = t
			rule, s := twoBackends(d, f, weights...)
			d.setRules(ruleSet{dnat: []dnatRule{rule}})
			const flows = 1000
			first := 0
			for i := range uint16(flows) {
				n, _ := s.chooses(d, f, at(f.world, 20000+i))
				again, _ := s.chooses(d, f, at(f.world, 20000+i))
				if again != n {
					t.Errorf("flow %d went to %d, and to %d", i, n, again)
				}
				if n == 0 {
					first++
				}
			}
			share := float64(weights[0]) / float64(weights[0]+weights[1])
			if off := 5 * math.Sqrt(flows*share*(1-share)); math.Abs(float64(first)-flows*share) > off {
				t.Errorf("%s: weights %v: %d of %d went to the first, want %.0f +- %.0f", f.name, weights, first, flows, flows*share, off)
			}
			if created := d.counts()[bpf.NATCounterFLOWS_CREATED]; created != flows {
				t.Errorf("%d flows made of %d", created, flows)
			}
		}
	}
}

// By source a client gets one target, whatever its port; clients are shared by weight.
func TestBackendsBySource(t *testing.T) {
	d := load(t, 4096)
	seed := rand.Uint64()
	t.Log("seed", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	for _, f := range families {
		d.reset()
		rule, s := twoBackends(d, f, 3, 1)
		s.source = true
		d.setRules(ruleSet{dnat: []dnatRule{rule}})
		const clients = 400
		first := 0
		for range clients {
			bytes := f.world.AsSlice()
			for i := len(bytes) - 2; i < len(bytes); i++ {
				bytes[i] = byte(random.Uint32())
			}
			client, _ := netip.AddrFromSlice(bytes)
			n, _ := s.chooses(d, f, at(client, 20000))
			for port := range uint16(3) {
				if again, _ := s.chooses(d, f, at(client, 20001+port)); again != n {
					t.Errorf("%s went to %d, and to %d", client, n, again)
				}
			}
			if n == 0 {
				first++
			}
		}
		if off := 5 * math.Sqrt(clients*.75*.25); math.Abs(float64(first)-clients*.75) > off {
			t.Errorf("%s: %d of %d clients go to the first, want 300 +- %.0f", f.name, first, clients, off)
		}
	}
}

// With affinity a client stays with its target for the time since its last new flow; not longer, and not
// with one that has gone, even where another has its id by now.
func TestBackendsAffinity(t *testing.T) {
	d := load(t, 4096)
	const minute = uint32(60e9 >> 20)
	for _, f := range families {
		d.reset()
		rule, s := twoBackends(d, f, 1, 1)
		s.affinity = minute
		d.setRules(ruleSet{dnat: []dnatRule{rule}})
		port := uint16(20000)
		next := func() int {
			port++
			n, _ := s.chooses(d, f, at(f.world, port))
			return n
		}
		var clients *ebpf.Map
		d.check(d.Affinities.Lookup(uint32(0), &clients))
		key := bpf.NATAffinityKey{Client: natAddr(f.world), Rule: dnatID(0)}
		age := func(stamps uint32) {
			var last bpf.NATAffinity
			d.check(clients.Lookup(key, &last))
			last.Stamp -= stamps
			d.check(clients.Put(key, last))
		}
		stays := next()
		for range 40 {
			age(minute - 100)
			if n := next(); n != stays {
				t.Fatalf("%s: went to %d, and to %d", f.name, stays, n)
			}
		}
		moved := 0
		for range 40 {
			was := next()
			age(minute + 100)
			if next() != was {
				moved++
			}
		}
		if moved < 5 {
			t.Errorf("%s: %d of 40 moved though the time was over", f.name, moved)
		}

		// its target goes; the other has all of the slots, and it alone
		was := next()
		kept := 1 - was
		s.targets, s.weights, s.ids = s.targets[kept:kept+1], []int{1}, s.ids[kept:kept+1]
		d.setRules(ruleSet{dnat: []dnatRule{rule}})
		d.endRule(201 + uint32(was))
		for range 10 {
			next()
		}
		// another rule's target gets the id of the one that has gone
		d.check(clients.Put(key, bpf.NATAffinity{Backend: 201 + uint32(was), Generation: d.generation(201 + uint32(was)), Stamp: d.now()}))
		stranger := dnatRule{proto: protoTCP, ports: one(81), to: f.container, toPorts: one(81), several: &several{
			targets: []netip.AddrPort{at(f.container, 81)}, weights: []int{1}, ids: []uint32{201 + uint32(was)},
		}}
		d.setRules(ruleSet{dnat: []dnatRule{rule, stranger}})
		next()
		clients.Close()
	}
}

// A target that goes takes its flows with it, and those of the other go on; where no target has a bridge
// any more, the packet is the host's.
func TestBackendsEnd(t *testing.T) {
	d := load(t, 4096)
	for _, f := range families {
		d.reset()
		rule, s := twoBackends(d, f, 1, 1)
		d.setRules(ruleSet{dnat: []dnatRule{rule}})
		ids, was := make(map[uint16]uint32), make(map[uint16]int)
		for i := range uint16(40) {
			n, half := s.chooses(d, f, at(f.world, 20000+i))
			ids[i], was[i] = half.Standing.Id, n
		}
		s.targets, s.weights, s.ids = s.targets[1:], []int{1}, s.ids[1:]
		d.setRules(ruleSet{dnat: []dnatRule{rule}})
		d.endRule(201)
		for i := range uint16(40) {
			_, half := s.chooses(d, f, at(f.world, 20000+i))
			if stays := half.Standing.Id == ids[i]; stays != (was[i] == 1) {
				t.Errorf("flow %d, to target %d: goes on %t", i, was[i], stays)
			}
		}
		d.check(d.Subnets.Delete(subnetKey(f.subnet)))
		d.untouched(fromUplink(), packet{src: at(f.world, 30000), dst: at(f.uplink, 80), proto: protoTCP, tcp: "S"}.between(gatewayMAC, uplinkMAC))
	}
}
