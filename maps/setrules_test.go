package maps

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
)

// sample has every kind of rule, sorted, in their one form.
func sample() Rules {
	return Rules{
		SNAT: []SNATRule{
			snat(toSource("203.0.113.2", "203.0.113.9"), func(r *SNATRule) {
				r.Source, r.Uplink, r.Ports = prefix("10.1.0.0/16"), 2, PortRange{20000, 29999}
				r.Except = prefixes("10.0.0.0/8", "192.0.2.0/24")
			}),
			snat(func(r *SNATRule) { r.Attach = true }),
			snat(func(r *SNATRule) { r.Uplink, r.Except = 7, prefixes("0.0.0.0/0") }),
			snat(toSource("2001:db8::1", "2001:db8::1"), func(r *SNATRule) { r.Source = prefix("fd00::/64") }),
		},
		DNAT: []DNATRule{
			dnat(),
			dnat(func(r *DNATRule) {
				r.Ports, r.ToPorts = PortRange{8000, 8999}, PortRange{}
				r.Allow = prefixes("10.0.0.0/8", "198.51.100.0/24")
			}),
			dnat(func(r *DNATRule) { r.Ingress = 7 }),
			dnat(func(r *DNATRule) { r.Destination = addr("127.0.0.1") }),
			dnat(func(r *DNATRule) {
				r.Destination, r.Ports, r.ToPorts = addr("203.0.113.2"), PortRange{1, 65535}, SinglePort(80)
			}),
			dnat(func(r *DNATRule) { r.To, r.Allow = addr("fd00::2"), prefixes("2000::/3") }),
			dnat(func(r *DNATRule) {
				r.Protocol, r.To, r.Destination = UDP, addr("fd00::2"), addr("2001:db8::1")
				r.Ports, r.ToPorts = PortRange{100, 199}, PortRange{1100, 1199}
			}),
		},
	}
}

// withoutIDs is a copy of rules with ids of 0.
func withoutIDs(rules Rules) Rules {
	out := rules.clone()
	for i := range out.SNAT {
		out.SNAT[i].ID = 0
	}
	for i := range out.DNAT {
		out.DNAT[i].ID = 0
		out.DNAT[i].Backends = slices.Clone(out.DNAT[i].Backends)
		for j := range out.DNAT[i].Backends {
			out.DNAT[i].Backends[j].ID = 0
		}
	}
	return out
}

// ids are the ids of the rules by their words, each id once.
func ids(t *testing.T, rules Rules) map[string]uint32 {
	t.Helper()

	out, seen := map[string]uint32{}, map[uint32]string{0: "no rule"}
	add := func(id uint32, words string) {
		if other, ok := seen[id]; ok {
			t.Errorf("id %d stands for %s and %s", id, words, other)
		}
		seen[id], out[words] = words, id
	}
	for _, r := range rules.SNAT {
		add(r.ID, r.String())
	}
	for _, r := range rules.DNAT {
		add(r.ID, r.String())
	}
	return out
}

// generations are those that have ever been raised.
func generations(t *testing.T, s *State) map[uint32]uint32 {
	t.Helper()

	out := map[uint32]uint32{}
	err := readAll(s.m.Generations, func(id, generation uint32) {
		if generation != 0 {
			out[id] = generation
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func set(t *testing.T, s *State, rules Rules) Rules {
	t.Helper()

	if err := s.SetRules(rules); err != nil {
		t.Fatal(err)
	}
	return must[Rules](t)(s.Rules())
}

func TestRulesRoundTrip(t *testing.T) {
	s := newState(t)
	if d := diff(Rules{}, must[Rules](t)(s.Rules())); d != "" {
		t.Error("before the first SetRules:", d)
	}
	// Turned around, to see that they come out sorted.
	want := sample()
	given := Rules{}
	for i := range want.SNAT {
		given.SNAT = append(given.SNAT, want.SNAT[len(want.SNAT)-1-i])
	}
	for i := range want.DNAT {
		given.DNAT = append(given.DNAT, want.DNAT[len(want.DNAT)-1-i])
	}
	got := set(t, s, given)
	if d := diff(want, withoutIDs(got)); d != "" {
		t.Error(d)
	}
	ids(t, got)
	if d := diff(Rules{}, set(t, s, Rules{})); d != "" {
		t.Error("after the last:", d)
	}
}

func TestSetRulesRefusesWhole(t *testing.T) {
	for name, test := range map[string]struct {
		add  Rules
		kind error
	}{
		"invalid":      {Rules{DNAT: []DNATRule{dnat(func(r *DNATRule) { r.Ports = PortRange{} })}}, ErrInvalidRule},
		"invalid SNAT": {Rules{SNAT: []SNATRule{{}}}, ErrInvalidRule},
		"overlap":      {Rules{DNAT: []DNATRule{dnat(func(r *DNATRule) { r.Ports = PortRange{3000, 4000} })}}, ErrRuleOverlap},
		"overlap SNAT": {Rules{SNAT: []SNATRule{snat(toSource("203.0.113.2", ""))}}, ErrRuleOverlap},
	} {
		t.Run(name, func(t *testing.T) {
			s := newState(t)
			before := set(t, s, sample())
			err := s.SetRules(Rules{SNAT: append(before.clone().SNAT, test.add.SNAT...), DNAT: append(before.clone().DNAT, test.add.DNAT...)})
			if !errors.Is(err, test.kind) {
				t.Errorf("got %v, want %v", err, test.kind)
			}
			if d := diff(before, must[Rules](t)(s.Rules())); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestSameRuleTwiceIsOne(t *testing.T) {
	s := newState(t)
	got := set(t, s, Rules{SNAT: []SNATRule{snat(), snat()}, DNAT: []DNATRule{dnat(), dnat()}})
	if d := diff(Rules{SNAT: []SNATRule{snat()}, DNAT: []DNATRule{dnat()}}, withoutIDs(got)); d != "" {
		t.Error(d)
	}
}

func TestIDsAndGenerations(t *testing.T) {
	s := newState(t)
	first := set(t, s, sample())
	before := ids(t, first)
	// The SNAT rules are new, and flows without a rule may get one of them.
	if d := diff(map[uint32]uint32{0: 1}, generations(t, s)); d != "" {
		t.Fatal("new rules:", d)
	}
	slot := must[uint32](t)(s.slotInForce())
	if d := diff(first, set(t, s, first)); d != "" {
		t.Error("the same again:", d)
	}
	if now := must[uint32](t)(s.slotInForce()); now != slot {
		t.Error("setting the same rules switched the set in force")
	}

	// A DNAT rule goes, one gets another target, one is new; the SNAT rules stay.
	next := first.clone()
	gone, changed := next.DNAT[0], next.DNAT[1]
	next.DNAT[1].To = addr("172.17.0.9")
	next.DNAT[0] = dnat(func(r *DNATRule) { r.Ports = SinglePort(1) })
	second := set(t, s, next)
	after := ids(t, second)
	for words, id := range after {
		switch old, known := before[words]; {
		case known && id != old:
			t.Errorf("%s had id %d, has %d", words, old, id)
		case !known && (id == gone.ID || id == changed.ID):
			t.Errorf("%s has id %d of a rule that is just gone", words, id)
		}
	}
	if d := diff(map[uint32]uint32{0: 1, gone.ID: 1, changed.ID: 1}, generations(t, s)); d != "" {
		t.Error("a rule gone and one changed:", d)
	}

	// An SNAT rule goes.
	next = second.clone()
	source := next.SNAT[0].ID
	next.SNAT = next.SNAT[1:]
	third := set(t, s, next)
	if d := diff(map[uint32]uint32{0: 2, gone.ID: 1, changed.ID: 1, source: 1}, generations(t, s)); d != "" {
		t.Error("an SNAT rule gone:", d)
	}

	// A list changes: that is another rule. What attach or a written port says is not.
	next = third.clone()
	listed, was := next.DNAT[2], generations(t, s)
	next.DNAT[2].Allow = prefixes("10.0.0.0/8")
	next.DNAT[1].ToPorts = next.DNAT[1].Ports
	next.SNAT[0].Attach = !next.SNAT[0].Attach
	fourth := set(t, s, next)
	if d := diff(map[uint32]uint32{0: 2, gone.ID: 1, changed.ID: 1, source: 1, listed.ID: was[listed.ID] + 1}, generations(t, s)); d != "" {
		t.Error("a list changed:", d)
	}
	if fourth.DNAT[1].ToPorts != next.DNAT[1].Ports || fourth.DNAT[1].ID != third.DNAT[1].ID {
		t.Errorf("written port: was %+v, is %+v", third.DNAT[1], fourth.DNAT[1])
	}
	if fourth.SNAT[0].Attach == third.SNAT[0].Attach || fourth.SNAT[0].ID != third.SNAT[0].ID {
		t.Errorf("attach's mark: was %+v, is %+v", third.SNAT[0], fourth.SNAT[0])
	}
}

func TestNewRuleTakesCurrentGeneration(t *testing.T) {
	s := newState(t)
	for range 5 {
		rules := set(t, s, Rules{DNAT: []DNATRule{dnat()}})
		carried := must[slotRules](t)(s.readSlot(must[uint32](t)(s.slotInForce()))).generations
		id := rules.DNAT[0].ID
		if now := must[uint32](t)(s.generation(id)); carried.generation(id) != now {
			t.Errorf("rule %d carries generation %d, current is %d", id, carried.generation(id), now)
		}
		set(t, s, Rules{})
	}
	if got := generations(t, s); got[1] != 5 || len(got) != 1 {
		t.Errorf("generations are %v, want 5 of id 1", got)
	}
}

// other puts rules, of generation 0, into the slot that is not in force.
func other(t *testing.T, s *State, rules Rules) *content {
	t.Helper()

	have := must[slotRules](t)(s.readSlot(must[uint32](t)(s.slotInForce())))
	var generations carried
	for _, id := range rules.ids() {
		generations.set(id, 0)
	}
	content := newContent(rules, generations)
	if err := s.fill(1-have.slot, have, content); err != nil {
		t.Fatal(err)
	}
	return content
}

// A SetRules that is killed after the switch leaves flows of rules that are gone; the next
// one ends them, also when it has nothing else to do.
func TestKilledAfterSwitch(t *testing.T) {
	s := newState(t)
	old := set(t, s, Rules{DNAT: []DNATRule{dnat()}}).DNAT[0]
	rules := Rules{DNAT: []DNATRule{dnat(func(r *DNATRule) { r.ID, r.Ports = 2, SinglePort(1) })}}
	content := other(t, s, rules)
	word := must[rulesWord](t)(s.word())
	if err := s.switchRules(word, content.kinds()|rulesWord(1-word.slot())|wordSwitched); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		set(t, s, rules)
		if d := diff(map[uint32]uint32{old.ID: 1}, generations(t, s)); d != "" {
			t.Error(d)
		}
	}
}

// One that is killed before it leaves the old rules in force.
func TestKilledBeforeSwitch(t *testing.T) {
	s := newState(t)
	want := set(t, s, sample())
	other(t, s, Rules{DNAT: []DNATRule{dnat(func(r *DNATRule) { r.ID, r.Ports = 100, SinglePort(1) })}})
	if d := diff(want, must[Rules](t)(s.Rules())); d != "" {
		t.Error(d)
	}
	if d := diff(want, set(t, s, want)); d != "" {
		t.Error(d)
	}
}

func TestTooManyRules(t *testing.T) {
	want := Rules{DNAT: make([]DNATRule, 4)}
	for i := range want.DNAT {
		want.DNAT[i] = dnat(func(r *DNATRule) { r.Ports = SinglePort(uint16(i + 1)) })
	}
	have := Rules{DNAT: []DNATRule{dnat(func(r *DNATRule) { r.ID = 3 })}}
	if err := assignIDs(&want, have, 6); err != nil {
		t.Errorf("4 new rules beside one, with ids 1 to 5: %v", err)
	}
	if err := assignIDs(&want, have, 5); !errors.Is(err, ErrTooManyRules) {
		t.Errorf("4 new rules beside one, with ids 1 to 4: %v", err)
	}
}

func TestTenThousandRules(t *testing.T) {
	s := newState(t)
	var rules Rules
	for i := range 10000 {
		rules.DNAT = append(rules.DNAT, dnat(func(r *DNATRule) {
			r.Destination = netip.AddrFrom4([4]byte{203, 0, 113, byte(i % 2)})
			r.Ports, r.ToPorts = SinglePort(uint16(1+i/2)), SinglePort(uint16(1+i))
			if i%10 == 0 {
				r.Allow = prefixes("10.0.0.0/8")
			}
		}))
	}
	began := time.Now()
	if err := s.SetRules(rules); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	t.Logf("10,000 rules in %s", took)
	if took > 3*time.Second {
		t.Errorf("10,000 rules took %s", took)
	}
	got := must[Rules](t)(s.Rules())
	if len(got.DNAT) != 10000 {
		t.Fatalf("%d rules in force", len(got.DNAT))
	}
	began = time.Now()
	if err := s.SetRules(Rules{DNAT: got.DNAT[1:]}); err != nil {
		t.Fatal(err)
	}
	t.Logf("one rule less in %s", time.Since(began))
	if d := diff(map[uint32]uint32{got.DNAT[0].ID: 1}, generations(t, s)); d != "" {
		t.Error(d)
	}
}

// More elements than a batch takes, and hash buckets that collide.
func TestReadAllFindsEverything(t *testing.T) {
	for _, kind := range []ebpf.MapType{ebpf.Hash, ebpf.LPMTrie, ebpf.Array} {
		spec := &ebpf.MapSpec{Type: kind, KeySize: 4, ValueSize: 4, MaxEntries: 3 * batchSize}
		if kind == ebpf.LPMTrie {
			spec.KeySize, spec.Flags = 8, 1 // BPF_F_NO_PREALLOC
		}
		m, err := ebpf.NewMap(spec)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		seen := map[uint32]int{}
		want := 2*batchSize + 17
		if kind == ebpf.LPMTrie {
			keys, values := make([][2]uint32, want), make([]uint32, want)
			for i := range keys {
				keys[i] = [2]uint32{32, uint32(i)}
			}
			if err := writeAll(m, keys, values); err != nil {
				t.Fatal(err)
			}
			err = readAll(m, func(k [2]uint32, _ uint32) { seen[k[1]]++ })
		} else {
			keys, values := make([]uint32, want), make([]uint32, want)
			for i := range keys {
				keys[i] = uint32(i)
			}
			if err := writeAll(m, keys, values); err != nil {
				t.Fatal(err)
			}
			err = readAll(m, func(k, _ uint32) { seen[k]++ })
		}
		if err != nil {
			t.Fatal(err)
		}
		if kind == ebpf.Array {
			want = int(m.MaxEntries())
		}
		if len(seen) != want {
			t.Errorf("%s: %d elements of %d", kind, len(seen), want)
		}
		for k, n := range seen {
			if n != 1 {
				t.Errorf("%s: element %d seen %d times", kind, k, n)
			}
		}
	}
}
