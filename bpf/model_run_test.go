package bpf_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"tcnat/bpf"
)

// seedEnv replays a run of the model, and of other tests that draw lots.
const seedEnv = "TCNAT_TEST_SEED"

// history is how many of the last steps a failure prints.
const history = 2000

// seeded answers a source of random numbers, having said how to get the same again.
func seeded(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv(seedEnv); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("%s: %v", seedEnv, err)
		}
	}
	t.Logf("replay with %s=%d", seedEnv, seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

// candidates are the rules of which each run has some, with ids of their own.
func candidates() (rules ruleSet) {
	for i, f := range families {
		base := uint32(10 * i)
		rules.snat = append(rules.snat,
			snatRule{id: base + 1, source: f.subnet, masquerade: true, except: []netip.Prefix{prefixOf(f.router)}},
			snatRule{id: base + 2, source: prefixOf(f.container), first: f.second, last: f.second},
			snatRule{id: base + 3, source: prefixOf(f.other), first: f.poolFirst, last: f.poolFirst, ports: portRange{40000, 40003}},
			snatRule{id: base + 4, source: prefixOf(f.third()), first: f.poolFirst, last: f.poolFirst, ports: portRange{40000, 40003}},
		)
		for j, proto := range []uint8{protoTCP, protoUDP} {
			id := 100 + base + uint32(5*j)
			tie := publish(f, proto, portRange{3004, 3005}, one(80)) // two ports to one: clients clash
			tie.id = id + 1
			shifted := publish(f, proto, portRange{40001, 40002}, portRange{80, 81})
			shifted.id, shifted.destination = id+2, f.second
			kept := publish(f, proto, one(40000), portRange{})
			kept.id, kept.to = id+3, f.other
			rules.dnat = append(rules.dnat, tie, shifted, kept)
		}
	}
	return rules
}

// player plays random packets and changes against the datapath and the model.
type player struct {
	*datapath
	*rand.Rand
	model
	last string // what became of the last packet
}

func (p *player) step() string {
	switch n := p.IntN(100); {
	case n < 48:
		return p.outward()
	case n < 92:
		return p.inward()
	case n < 97:
		return p.endOne()
	default:
		return p.changeRules()
	}
}

// changeRules puts another choice of the candidates in force; flows of rules that go end.
func (p *player) changeRules() string {
	all := candidates()
	var next ruleSet
	kept := make(map[uint32]bool)
	for _, r := range all.snat {
		if p.IntN(4) > 0 {
			next.snat = append(next.snat, r)
			kept[r.id] = true
		}
	}
	for _, r := range all.dnat {
		if p.IntN(4) > 0 {
			next.dnat = append(next.dnat, r)
			kept[r.id] = true
		}
	}
	p.setRules(next)
	gone := map[uint32]bool{0: true} // identity flows ask the SNAT rules again
	for _, r := range p.model.rules.snat {
		gone[r.id] = !kept[r.id]
	}
	for _, r := range p.model.rules.dnat {
		gone[r.id] = !kept[r.id]
	}
	for id, is := range gone {
		if is {
			p.endRule(id)
		}
	}
	p.end(func(f *modelFlow) bool { return gone[f.rule] })
	p.model.rules = next
	return fmt.Sprintf("rules: %d snat, %d dnat", len(next.snat), len(next.dnat))
}

// endOne ends a flow as flush does.
func (p *player) endOne() string {
	living := slices.DeleteFunc(slices.Clone(p.flows), func(f *modelFlow) bool { return f.ended })
	if len(living) == 0 {
		return "nothing to end"
	}
	f := pick(p.Rand, living)
	if !p.endFlow(f.reply, p.mustHalf(f.reply).Standing.Id) {
		p.Errorf("end_flow did not find %s", f.reply)
	}
	f.ended = true
	return "end " + f.original.String()
}

func (p *player) draw() (f family, proto uint8, flags string) {
	f = pick(p.Rand, families)
	return f, pick(p.Rand, []uint8{protoTCP, protoTCP, protoUDP, protoUDP, f.icmp}), pick(p.Rand, []string{"S", "S", "A", "PA", "FA", "SA", "R"})
}

// outward sends a packet of a container to the world through to_uplink.
func (p *player) outward() string {
	f, proto, flags := p.draw()
	in := packet{
		src:   at(pick(p.Rand, []netip.Addr{f.container, f.other, f.third()}), pick(p.Rand, []uint16{80, 81, 40000, 40001})),
		dst:   at(pick(p.Rand, []netip.Addr{f.world, f.world, f.router}), pick(p.Rand, []uint16{443, 40000, 40001, 80})),
		proto: proto, tcp: flags, icmpType: f.echoRequest,
	}
	if proto == f.icmp {
		in.dst = at(in.dst.Addr(), 0)
	}
	if replies := p.replies(f, proto, false); len(replies) > 0 && p.IntN(3) == 0 {
		t := pick(p.Rand, replies)
		in.src, in.dst = t.src, t.dst
		if proto == f.icmp && t.src.Port() == 0 {
			in.icmpType = f.echoReply
		}
	}
	what := fmt.Sprintf("out %s %s", in.tuple(), flags)
	before := p.counts()
	verdict, out := p.run(toUplink(), in.frame())
	counted := p.counts().since(before)
	old := p.find(in.tuple(), false)
	if old != nil && !opensAnew(old, in) {
		p.expect(what, verdict, out, counted, old.see(in))
		return what
	}
	c, reason := p.model.outward(in, f)
	if reason != passed {
		if verdict != shot || counted[reason] != 1 {
			p.Errorf("%s: verdict %d, counted %s; want %s", what, int32(verdict), counted, counterName()(reason))
		}
		return what
	}
	p.opened(what, c, old, in, verdict, out, counted, func(frame []byte) uint16 { return sourcePort(f, proto, frame) })
	return what
}

// inward sends a packet of the world through from_uplink.
func (p *player) inward() string {
	f, proto, flags := p.draw()
	in := packet{
		src:   at(pick(p.Rand, []netip.Addr{f.world, f.router}), pick(p.Rand, []uint16{443, 40000, 40001, 80})),
		dst:   at(pick(p.Rand, []netip.Addr{f.uplink, f.second}), pick(p.Rand, []uint16{3004, 3005, 40000, 40001, 40002})),
		proto: proto, tcp: flags, icmpType: f.echoReply,
	}
	if proto == f.icmp {
		in.src = at(in.src.Addr(), 0)
	}
	if replies := p.replies(f, proto, true); len(replies) > 0 && p.IntN(3) > 0 {
		t := pick(p.Rand, replies)
		in.src, in.dst = t.src, t.dst
	}
	in = in.between(gatewayMAC, uplinkMAC)
	what := fmt.Sprintf("in %s %s", in.tuple(), flags)
	before := p.counts()
	verdict, out := p.run(fromUplink(), in.frame())
	counted := p.counts().since(before)
	old := p.find(in.tuple(), true)
	if old != nil && !opensAnew(old, in) {
		p.expect(what, verdict, out, counted, old.see(in))
		return what
	}
	c, ours := p.model.inward(in)
	if !ours {
		p.expect(what, verdict, out, counted, in)
		return what
	}
	p.opened(what, c, old, in, verdict, out, counted, func(frame []byte) uint16 { return sourcePort(f, proto, frame) })
	return what
}

// replies answers the keys of flows, also of ended ones, that this side presents.
func (p *player) replies(f family, proto uint8, fromWorld bool) (keys []tuple) {
	for _, flow := range p.flows {
		key := flow.original
		if flow.inbound != fromWorld {
			key = flow.reply
		}
		if key.proto == proto && key.src.Addr().Is6() == (f.name == "ipv6") && !f.subnet.Contains(key.dst.Addr()) {
			keys = append(keys, key)
		}
	}
	return keys
}

// opensAnew tells whether a packet begins a new flow on the tuple of a closed one.
func opensAnew(f *modelFlow, in packet) bool {
	return in.proto == protoTCP && in.tcp == "S" && f.closed()
}

func (p *player) expect(what string, verdict uint32, out []byte, counted counts, want packet) {
	p.Helper()
	p.last = " => " + want.tuple().String()
	if verdict != unspec {
		p.Fatalf("%s: verdict %d, counted %s; want %s", what, int32(verdict), counted, want.tuple())
	}
	if w := want.frame(); string(w) != string(out) {
		p.Errorf("%s:", what)
		p.sameFrame(w, out)
	}
}

// opened judges what the datapath did with the first packet of a flow; old is the closed
// flow whose tuple it has, if any.
func (p *player) opened(what string, c choice, old *modelFlow, in packet, verdict uint32, out []byte, counted counts, port func([]byte) uint16) {
	p.Helper()
	if old != nil {
		old.ended = true
		if verdict == shot { // it is half-ended: no reason to guess how its packets fare
			p.endFlow(old.reply, p.mustHalf(old.reply).Standing.Id)
		}
	}
	if verdict == shot {
		switch {
		case counted[bpf.NATCounterDROP_NO_PORT] == 1 && p.exhaustedOf(c):
		case counted[bpf.NATCounterDROP_ENDING] == 1 && p.remains(c.flow.original):
		default:
			p.Fatalf("%s: dropped, counted %s\nflows:\n%s", what, counted, p.flowsLike(c.flow.original))
		}
		return
	}
	chosen := port(out)
	f, err := p.judge(c, chosen, counted[bpf.NATCounterPORTS_SHARED] > 0)
	if err != nil {
		p.Fatalf("%s: %v; counted %s\nflows:\n%s", what, err, counted, p.flowsLike(c.flow.original))
	}
	p.expect(what, verdict, out, counted, f.see(in))
}

// flowsLike prints the model's flows that could matter to a new one.
func (p *player) flowsLike(t tuple) (s string) {
	for _, f := range p.flows {
		if f.original.proto == t.proto && f.original.src.Addr().Is4() == t.src.Addr().Is4() {
			s += fmt.Sprintf("%s, reply %s, rule %d, mapped %v, ended %v\n", f.original, f.reply, f.rule, f.mapped, f.ended)
		}
	}
	return s
}

// exhaustedOf tells whether no port may be left, by what the datapath can know.
func (p *player) exhaustedOf(c choice) bool {
	if c.ports.last-c.ports.first > 1000 { // of so many some are free
		return false
	}
	if !c.flow.mapped {
		return p.exhausted(c, false)
	}
	shared := c
	shared.flow.mapped = false
	return p.exhausted(shared, false)
}

func TestModel(t *testing.T) {
	steps := 6000
	if testing.Short() {
		steps = 1000
	}
	d := load(t, 16384)
	p := &player{datapath: d, Rand: seeded(t)}
	p.complete = p.IntN(2) == 1
	p.changeRules()
	var log []string
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the last of %d steps, oldest first:\n%s", len(log), strings.Join(log[max(0, len(log)-history):], "\n"))
		}
	})
	for i := range steps {
		p.last = ""
		log = append(log, p.step()+p.last)
		if i%500 == 499 || t.Failed() {
			p.compare(d)
		}
		if i%1000 == 999 {
			p.model.routed = !p.model.routed
			routed := p.model.routed
			d.configure(func(c *bpf.NATConfig) {
				if routed {
					c.Flags |= bpf.NATConfigFlagCONFIG_ROUTED
				}
			})
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	t.Logf("%d steps, %d flows live, counted %s", steps, p.living(), d.counts())
	d.emptied()
}
