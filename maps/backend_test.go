package maps

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// balanced is a rule to several backends, each by its address alone.
func balanced(to ...string) DNATRule {
	return dnat(func(r *DNATRule) {
		r.ToPorts = PortRange{}
		for _, a := range to {
			r.Backends = append(r.Backends, Backend{To: addr(a)})
		}
	})
}

func weights(r DNATRule, weights ...int) DNATRule {
	r.Backends = slices.Clone(r.Backends)
	for i, w := range weights {
		r.Backends[i].Weight = w
	}
	return r
}

// Each backend has as many slots as its weight says, and one that comes or goes moves few others.
func TestBackendSlots(t *testing.T) {
	count := func(slots []int, n int) []int {
		counts := make([]int, n)
		for _, i := range slots {
			counts[i]++
		}
		return counts
	}
	two := balanced("172.17.0.2", "172.17.0.3")
	for _, test := range []struct {
		rule    DNATRule
		balance Balance
		want    []int
	}{
		{two, BalanceRandom, []int{1, 1}},
		{weights(two, 200, 100), BalanceRandom, []int{2, 1}},
		{weights(two, 255, 1), BalanceRandom, []int{255, 1}},
		{weights(two, 256, 1), BalanceRandom, []int{255, 1}},
		{two, BalanceSource, []int{128, 128}},
		{weights(two, 3, 1), BalanceSource, []int{192, 64}},
		{weights(balanced("172.17.0.2", "172.17.0.3", "172.17.0.4"), 256, 256, 1), BalanceRandom, []int{128, 127, 1}},
	} {
		rule, err := test.rule.normalize()
		if err != nil {
			t.Fatal(err)
		}
		rule.Balance = test.balance
		if d := diff(test.want, count(rule.slots(), len(rule.Backends))); d != "" {
			t.Errorf("%s: %s", rule, d)
		}
	}

	seed := rand.Uint64()
	t.Log("seed", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	for range 50 {
		var rule DNATRule
		for i := range 2 + random.IntN(MaxBackends-1) {
			rule.Backends = append(rule.Backends, Backend{To: addr("172.17.1.0"), ToPorts: SinglePort(uint16(i + 1)), Weight: 1 + random.IntN(MaxWeight)})
		}
		rule.Balance = BalanceSource
		before := rule.slots()
		if len(before) != maxSlots {
			t.Fatalf("%d slots", len(before))
		}
		for i, n := range count(before, len(rule.Backends)) {
			sum := 0
			for _, b := range rule.Backends {
				sum += b.Weight
			}
			if share := float64(rule.Backends[i].Weight) * maxSlots / float64(sum); n < 1 || float64(n) > share+2 || float64(n) < share-2 && len(rule.Backends) < 20 {
				t.Errorf("%d of %d backends has %d slots, its share is %.1f", i, len(rule.Backends), n, share)
			}
		}
	}
	for i := range uint16(8) {
		two.Backends = append(two.Backends, Backend{To: addr("172.17.0.9"), ToPorts: SinglePort(i + 1)})
	}
	two, err := two.normalize()
	if err != nil {
		t.Fatal(err)
	}
	two.Balance = BalanceSource
	nine := two
	nine.Backends = two.Backends[:9]
	before, after := two.slots(), nine.slots()
	moved := 0
	for slot, i := range before {
		if i != 9 && after[slot] != i {
			moved++
		}
	}
	t.Logf("%d of %d slots moved", moved, maxSlots)
	if moved > maxSlots/4 {
		t.Errorf("%d of %d slots of others moved", moved, maxSlots)
	}
}

// What goes in comes out, whichever way a rule changes; who stays keeps its id and generation, and
// who goes has its generation raised.
func TestBackendsChange(t *testing.T) {
	s := newState(t)
	a, b, c := "172.17.0.2", "172.17.0.3", "172.17.0.4"
	ids := func(r DNATRule) map[string]uint32 {
		out := map[string]uint32{}
		for _, target := range r.Targets() {
			out[target.To.String()] = target.ID
		}
		return out
	}
	other := dnat(func(r *DNATRule) { r.Ports = SinglePort(9) })
	last := map[string]uint32{}
	var affine DNATRule
	for i, rule := range []DNATRule{
		balanced(a), balanced(a, b), balanced(b, a, c), weights(balanced(a, b, c), 3, 1, 1), balanced(b, c), balanced(b), balanced(a, b),
		func() DNATRule { affine = balanced(a, b); affine.Affinity = 10 * time.Minute; return affine }(),
		func() DNATRule { r := affine; r.Balance = BalanceSource; return r }(),
		func() DNATRule {
			r := balanced(a, b, c)
			r.Ports = PortRange{3005, 3104}
			r.Allow = prefixes("10.0.0.0/8")
			return r
		}(),
	} {
		before := generations(t, s)
		rules := set(t, s, Rules{DNAT: []DNATRule{rule, other}})
		want, err := rule.normalize()
		if err != nil {
			t.Fatal(err)
		}
		got := withoutIDs(rules).DNAT[slices.IndexFunc(rules.DNAT, func(r DNATRule) bool { return r.Ports == rule.Ports })]
		if d := diff(want, got); d != "" {
			t.Errorf("%d: %s", i, d)
		}
		now := ids(rules.DNAT[slices.IndexFunc(rules.DNAT, func(r DNATRule) bool { return r.Ports == rule.Ports })])
		raised := generations(t, s)
		moved := rule.Ports != dnat().Ports // then all is new
		for to, id := range last {
			switch is, stays := now[to]; {
			case stays && !moved && (is != id || raised[id] != before[id]):
				t.Errorf("%d: %s stays: id %d became %d, generation %d became %d", i, to, id, is, before[id], raised[id])
			case (!stays || moved) && raised[id] != before[id]+1:
				t.Errorf("%d: %s goes: generation %d of id %d became %d", i, to, before[id], id, raised[id])
			}
		}
		last = now
		inner := must[interface{ MaxEntries() uint32 }](t)(s.openAffinities())
		if clients := inner.MaxEntries(); clients != map[bool]uint32{true: affinityClients, false: 1}[rule.Affinity != 0] {
			t.Errorf("%d: room for %d clients", i, clients)
		}
	}
}

// By one rule: adding other targets beside one that stays changes the list, deleting some takes them out.
func TestBackendsOneRule(t *testing.T) {
	s := newState(t)
	a, b, c := "172.17.0.2", "172.17.0.3", "172.17.0.4"
	for i, step := range []struct {
		change  func(DNATRule) (bool, error)
		rule    DNATRule
		changed bool
		want    []DNATRule
	}{
		{s.AddDNAT, balanced(a, b), true, []DNATRule{balanced(a, b)}},
		{s.AddDNAT, balanced(b, a), false, []DNATRule{balanced(a, b)}},
		{s.AddDNAT, weights(balanced(a, b), 2, 1), true, []DNATRule{weights(balanced(a, b), 2, 1)}},
		{s.AddDNAT, balanced(a, b, c), true, []DNATRule{balanced(a, b, c)}},
		{s.DeleteDNAT, balanced("172.17.0.9"), false, []DNATRule{balanced(a, b, c)}},
		{s.DeleteDNAT, balanced(b, "172.17.0.9"), true, []DNATRule{balanced(a, c)}},
		{s.DeleteDNAT, balanced(b, "172.17.0.9"), false, []DNATRule{balanced(a, c)}},
		{s.DeleteDNAT, balanced(a), true, []DNATRule{balanced(c)}},
		{s.DeleteDNAT, balanced(a, c), true, nil},
		{s.DeleteDNAT, balanced(a, c), false, nil},
		{s.AddDNAT, balanced(a, c), true, []DNATRule{balanced(a, c)}},
		{s.DeleteDNAT, balanced(a, c), true, nil},
		{s.AddDNAT, balanced(a, c), true, []DNATRule{balanced(a, c)}},
		{s.DeleteDNAT, dnat(func(r *DNATRule) { r.To, r.ToPorts = addr(a), PortRange{} }), true, []DNATRule{balanced(c)}},
		{s.AddDNAT, balanced(b, c), true, []DNATRule{balanced(b, c)}},
		{s.DeleteDNAT, DNATRule{Protocol: TCP, Ports: dnat().Ports}, true, nil},
	} {
		changed, err := step.change(step.rule)
		if err != nil || changed != step.changed {
			t.Errorf("%d: %s: changed %t, error %v", i, step.rule, changed, err)
		}
		want, err := Rules{DNAT: step.want}.normalize()
		if err != nil {
			t.Fatal(err)
		}
		if d := diff(want.DNAT, withoutIDs(must[Rules](t)(s.Rules())).DNAT); d != "" {
			t.Errorf("%d: %s: %s", i, step.rule, d)
		}
	}
	if _, err := s.AddDNAT(balanced(a)); err != nil {
		t.Fatal(err)
	}
	for _, r := range []DNATRule{balanced(b), balanced(b, c)} { // none of what is there
		if changed, err := s.AddDNAT(r); changed || err == nil {
			t.Errorf("%s: changed %t, error %v, want an overlap", r, changed, err)
		}
	}
}

// A process that has rules with backends to change is killed before it has ended the flows of one that
// goes: the next call does.
func TestBackendsKilled(t *testing.T) {
	s := newState(t)
	rules := set(t, s, Rules{DNAT: []DNATRule{balanced("172.17.0.2", "172.17.0.3", "172.17.0.4")}})
	gone, stays := rules.DNAT[0].Backends[1].ID, rules.DNAT[0].Backends[2].ID
	before := generations(t, s)
	set(t, s, Rules{DNAT: []DNATRule{balanced("172.17.0.2", "172.17.0.4")}})
	word := must[rulesWord](t)(s.word())
	if err := s.m.Generations.Put(gone, before[gone]); err != nil {
		t.Fatal(err)
	}
	if err := s.putWord(word | wordSwitched); err != nil {
		t.Fatal(err)
	}
	if _, err := s.DeleteDNAT(dnat(func(r *DNATRule) { r.Ports = SinglePort(9) })); err != nil {
		t.Fatal(err)
	}
	if now := generations(t, s); now[gone] != before[gone]+1 || now[stays] != before[stays] {
		t.Errorf("generations %v became %v: %d has gone, %d stays", before, now, gone, stays)
	}
}
