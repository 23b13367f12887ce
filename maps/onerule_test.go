package maps

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
)

// change is one call: what it does to the maps, and by the plain methods to a set of rules.
type change struct {
	words string
	state func(*State) (bool, error)
	rules func(*Rules) (bool, error)
}

// change picks one; most of them are of single rules, and of those most find something to do.
func (w world) change(rules Rules) change {
	r := w.dnat()
	if w.IntN(2) == 0 {
		r.Ports = SinglePort(r.Ports.First)
		if r.ToPorts != (PortRange{}) {
			r.ToPorts = SinglePort(r.ToPorts.First)
		}
	}
	n := w.snat()
	if len(rules.DNAT) > 0 && w.IntN(2) == 0 {
		r = w.nearDNAT(pick(w, rules.DNAT))
	}
	if len(rules.SNAT) > 0 && w.IntN(2) == 0 {
		n = w.nearSNAT(pick(w, rules.SNAT))
	}
	switch w.IntN(9) {
	case 0, 1, 2:
		return change{"dnat add " + r.String(),
			func(s *State) (bool, error) { return s.AddDNAT(r) },
			func(rules *Rules) (bool, error) { return rules.AddDNAT(r) }}
	case 3, 4:
		return change{"dnat del " + r.String(),
			func(s *State) (bool, error) { return s.DeleteDNAT(r) },
			func(rules *Rules) (bool, error) { return rules.DeleteDNAT(r) }}
	case 5, 6:
		return change{"snat add " + n.String(),
			func(s *State) (bool, error) { return s.AddSNAT(n) },
			func(rules *Rules) (bool, error) { return rules.AddSNAT(n) }}
	case 7:
		return change{"snat del " + n.String(),
			func(s *State) (bool, error) { return s.DeleteSNAT(n) },
			func(rules *Rules) (bool, error) { return rules.DeleteSNAT(n) }}
	}
	var drop []bool
	for range len(rules.DNAT) + len(rules.SNAT) {
		drop = append(drop, w.IntN(8) == 0)
	}
	some := func(rules *Rules) (bool, error) {
		i := 0
		rules.DNAT = slices.DeleteFunc(slices.Clone(rules.DNAT), func(DNATRule) bool { i++; return drop[i-1] })
		rules.SNAT = slices.DeleteFunc(slices.Clone(rules.SNAT), func(SNATRule) bool { i++; return drop[i-1] })
		return true, nil
	}
	return change{"a set without some", func(s *State) (bool, error) { return s.ChangeRules(some) }, some}
}

// nearDNAT is a rule like one that is there: the same, or a little different.
func (w world) nearDNAT(r DNATRule) DNATRule {
	switch w.IntN(7) {
	case 0:
		r.To, r.Backends, r.Balance, r.Affinity = netip.Addr{}, nil, 0, 0 // deleted by what it matches alone
	case 1:
		r.Allow = nil
	case 2:
		r.Allow = w.prefixes(r.To)
	case 3:
		r.To = pick(w, w.addresses())
		r.Backends, r.Balance, r.Affinity = nil, 0, 0
	case 4:
		r.Ports = SinglePort(r.Ports.First)
		r.ToPorts = PortRange{}
		r.Backends, r.Balance, r.Affinity = nil, 0, 0
	case 5:
		if r.hasBackends() { // one more or one less
			r.Backends = slices.Clone(r.Backends)
			if more := r.Backends[len(r.Backends)-1]; w.IntN(2) == 0 && more.To.Next().Is4() == more.To.Is4() {
				more.To = more.To.Next()
				r.Backends = append(r.Backends, more)
			} else {
				r.setTargets(r.Backends[1:])
			}
		}
	}
	return r
}

func (w world) nearSNAT(r SNATRule) SNATRule {
	switch w.IntN(6) {
	case 0:
		r.Masquerade, r.ToFirst, r.ToLast, r.Ports = false, netip.Addr{}, netip.Addr{}, PortRange{}
	case 1:
		r.Except = nil
	case 2:
		r.Except = w.prefixes(r.Source.Addr())
	case 3:
		r.Attach = !r.Attach
	case 4:
		r.Uplink = w.device()
	}
	return r
}

// Every change of one rule does what the plain methods do to the set, to the words of its
// error, and leaves ids, generations and lookups as a change of the whole set does.
func TestSingleChangesAgreeWithModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	w := world{rand.New(rand.NewPCG(seed, 1))}
	s := newState(t)
	var model Rules
	hits, done := map[string]int{}, map[bool]int{}
	before, raised := Rules{}, map[uint32]uint32{}
	for i := range 1500 {
		slot := must[uint32](t)(s.slotInForce())
		c := w.change(model)
		want, wantErr := c.rules(&model)
		got, err := c.state(s)
		if got != want && c.words != "a set without some" || fmt.Sprint(err) != fmt.Sprint(wantErr) ||
			errors.Is(err, ErrRuleOverlap) != errors.Is(wantErr, ErrRuleOverlap) {
			t.Fatalf("%s: changed %v, error %v; want %v, %v", c.words, got, err, want, wantErr)
		}
		if got {
			done[slot == must[uint32](t)(s.slotInForce())]++
		}
		var normErr error
		if model, normErr = model.normalize(); normErr != nil {
			t.Fatal(normErr)
		}
		now := must[Rules](t)(s.Rules())
		if d := diff(model, withoutIDs(now)); d != "" {
			t.Fatalf("%s: rules in force: %s", c.words, d)
		}
		raisedNow := lowGenerations(t, s)
		checkGenerations(t, before, now, raised, raisedNow)
		checkUnruled(t, before, now, raised[0], raisedNow[0])
		before, raised = now, raisedNow
		checkNotes(t, s, now)
		if i%50 == 0 {
			checkLookups(t, w, s, now, hits)
		}
	}
	t.Logf("%d rules at the end; changed in the set in force: %d, by a new set: %d", len(model.DNAT)+len(model.SNAT), done[true], done[false])
	if done[true] < 200 || done[false] < 100 {
		t.Error("one of the two ways is hardly ever taken")
	}
}

// lowGenerations are those of the first ids that have ever been raised: all take long to read.
func lowGenerations(t *testing.T, s *State) map[uint32]uint32 {
	t.Helper()

	var cursor ebpf.MapBatchCursor
	ids, values := make([]uint32, 4096), make([]uint32, 4096)
	n := must[int](t)(s.m.Generations.BatchLookup(&cursor, ids, values, nil))
	out := map[uint32]uint32{}
	for i, id := range ids[:n] {
		if values[i] != 0 {
			out[id] = values[i]
		}
	}
	return out
}

// checkUnruled insists that flows without a rule are decided anew when SNAT rules differ, and
// only then.
func checkUnruled(t *testing.T, before, after Rules, was, is uint32) {
	t.Helper()

	if same := slices.EqualFunc(before.SNAT, after.SNAT, SNATRule.same); same != (was == is) {
		t.Fatalf("SNAT rules stayed: %v, but the generation of no rule went from %d to %d", same, was, is)
	}
}

// checkNotes insists that the rules carry current generations, that their kinds are told to the
// programs, that no free id is in use and no element but theirs has it, and that nothing is to be finished.
func checkNotes(t *testing.T, s *State, rules Rules) {
	t.Helper()

	word := must[rulesWord](t)(s.word())
	read := must[slotRules](t)(s.readSlot(word.slot()))
	for _, id := range rules.ids() {
		if now := must[uint32](t)(s.generation(id)); read.generations.generation(id) != now {
			t.Fatalf("rule %d carries generation %d, current is %d", id, read.generations.generation(id), now)
		}
	}
	if kinds := newContent(read.rules, read.generations).kinds(); kinds&^word != 0 {
		t.Fatalf("kinds are %#x, the programs know of %#x", kinds, word.kinds())
	}
	if word.unfinished() {
		t.Fatalf("word %#x: something is unfinished", word)
	}
	used := read.generations
	set := must[*ruleSet](t)(s.openSet(word.slot()))
	defer set.Close()
	err := readAll(set.prefixes, func(k bpf.NATRulePrefixKey, _ uint8) { used.set(k.Rule, 0) })
	if err != nil {
		t.Fatal(err)
	}
	for range bpfMaxID {
		var id uint32
		if word, id = word.takeID(); id == 0 {
			break
		}
		if used.has(id) {
			t.Fatalf("id %d is free, and in use", id)
		}
	}
}

func TestWord(t *testing.T) {
	w := rulesWord(1).withFree(5, 2*idBlock).withLeaving(bpfMaxID)
	if w.slot() != 1 || w.leaving() != bpfMaxID || w.kinds() != 0 || !w.unfinished() {
		t.Errorf("word %#x", w)
	}
	w = w.finished()
	for want := uint32(5); want < 2*idBlock; want++ {
		var id uint32
		if w, id = w.takeID(); id != want {
			t.Fatalf("id %d, want %d", id, want)
		}
	}
	if w, id := w.takeID(); id != 0 || w.finished() != w || w.slot() != 1 {
		t.Errorf("after the last: id %d, word %#x", id, w)
	}
	if _, id := w.withFree(bpfMaxID, bpfMaxID+1).takeID(); id != bpfMaxID {
		t.Errorf("the last of all: id %d", id)
	}

	var used carried
	if first, last := freeIDs(used, bpfMaxID+1); first != 1 || last != bpfMaxID+1 {
		t.Errorf("all free: from %d to %d", first, last)
	}
	for id := uint32(1); id <= bpfMaxID; id++ {
		if id < 3000 || id > 5500 {
			used.set(id, 0)
		}
	}
	if first, last := freeIDs(used, bpfMaxID+1); first != 3000 || last != 5*idBlock {
		t.Errorf("3000 to 5500 free: from %d to %d", first, last)
	}
	for id := uint32(3000); id <= 5500; id++ {
		used.set(id, 0)
	}
	if first, last := freeIDs(used, bpfMaxID+1); first != 0 || last != 0 {
		t.Errorf("none free: from %d to %d", first, last)
	}
}

// bpfMaxID is the last id: MAX_RULES is the number of generations.
const bpfMaxID = 1<<idBits - 1

func TestIDsFit(t *testing.T) {
	if n := newState(t).m.Generations.MaxEntries(); n != bpfMaxID+1 {
		t.Errorf("%d ids do not fit into %d bits", n, idBits)
	}
}

// many are rules for single ports.
func many(n int) Rules {
	var rules Rules
	for i := range n {
		rules.DNAT = append(rules.DNAT, dnat(func(r *DNATRule) {
			r.Destination = netip.AddrFrom4([4]byte{203, 0, 113, byte(i / 10000)})
			r.Ports, r.ToPorts = SinglePort(uint16(1+i%10000)), PortRange{}
		}))
	}
	return rules
}

func TestOneMoreOfTwentyThousand(t *testing.T) {
	s := newState(t)
	have := set(t, s, many(20000))
	more := dnat(func(r *DNATRule) { r.Allow = prefixes("10.0.0.0/8") })
	slot := must[uint32](t)(s.slotInForce())
	call := func(what string, want bool, call func(DNATRule) (bool, error), r DNATRule) {
		t.Helper()
		began := time.Now()
		changed, err := call(r)
		took := time.Since(began)
		if err != nil || changed != want {
			t.Fatalf("%s: changed %v, error %v", what, changed, err)
		}
		t.Logf("%s in %s", what, took)
		if now := must[uint32](t)(s.slotInForce()); now != slot {
			t.Errorf("%s: made the whole set anew", what)
		}
	}
	call("one more", true, s.AddDNAT, more)
	bare := more
	bare.Allow = nil
	if _, err := s.AddDNAT(bare); !errors.Is(err, ErrRuleOverlap) {
		t.Errorf("the same without its list: %v", err)
	}
	call("one that is there", false, s.AddDNAT, have.DNAT[7])
	rules := must[Rules](t)(s.Rules())
	if len(rules.DNAT) != 20001 {
		t.Errorf("%d rules", len(rules.DNAT))
	}
	ids(t, rules)
	call("one less", true, s.DeleteDNAT, have.DNAT[7])
	call("one that is gone", false, s.DeleteDNAT, have.DNAT[7])
	call("the new one", true, s.DeleteDNAT, bare)
	if d := diff(map[uint32]uint32{have.DNAT[7].ID: 1, 20001: 1}, generations(t, s)); d != "" {
		t.Error(d)
	}
	if d := diff(slices.Delete(slices.Clone(have.DNAT), 7, 8), must[Rules](t)(s.Rules()).DNAT); d != "" {
		t.Error(d)
	}
	checkNotes(t, s, must[Rules](t)(s.Rules()))
}

// Room and ids that are used up give way to a new set, which has them again.
func TestRoomUsedUp(t *testing.T) {
	for name, list := range map[string][]netip.Prefix{"ports": nil, "prefixes": prefixes("10.0.0.0/8", "192.0.2.0/24")} {
		t.Run(name, func(t *testing.T) {
			s := newState(t)
			set(t, s, Rules{})
			anew := 0
			slot := must[uint32](t)(s.slotInForce())
			rules := many(3 * innerRoom)
			for i, r := range rules.DNAT {
				r.Allow = list
				if changed, err := s.AddDNAT(r); err != nil || !changed {
					t.Fatalf("rule %d: changed %v, error %v", i, changed, err)
				}
				rules.DNAT[i] = r
				if now := must[uint32](t)(s.slotInForce()); now != slot {
					anew, slot = anew+1, now
				}
			}
			got := must[Rules](t)(s.Rules())
			if d := diff(rules, withoutIDs(got)); d != "" {
				t.Error(d)
			}
			ids(t, got)
			checkNotes(t, s, got)
			t.Logf("%d sets were made for %d rules", anew, len(rules.DNAT))
			if anew == 0 || anew > 10 {
				t.Errorf("%d sets were made anew", anew)
			}
		})
	}
}

// Lists of rules that are gone stay in the map until it is full, and are nobody's.
func TestListsOfGoneRules(t *testing.T) {
	s := newState(t)
	for i := range 2 * innerRoom {
		r := dnat(func(r *DNATRule) { r.Allow = prefixes("10.0.0.0/8") })
		if i%2 == 1 {
			r.Allow = prefixes("192.0.2.0/24")
		}
		if changed, err := s.AddDNAT(r); err != nil || !changed {
			t.Fatalf("round %d: changed %v, error %v", i, changed, err)
		}
		if i%64 == 0 {
			got := must[Rules](t)(s.Rules())
			if d := diff(Rules{DNAT: []DNATRule{r}}, withoutIDs(got)); d != "" {
				t.Fatalf("round %d: %s", i, d)
			}
			checkNotes(t, s, got)
		}
		if changed, err := s.DeleteDNAT(dnat()); err != nil || !changed {
			t.Fatalf("round %d: changed %v, error %v", i, changed, err)
		}
	}
}

func TestIDsUsedUp(t *testing.T) {
	s := newState(t)
	first := set(t, s, Rules{DNAT: []DNATRule{dnat()}})
	word := must[rulesWord](t)(s.word())
	if err := s.putWord(word.withFree(bpfMaxID, bpfMaxID+1)); err != nil {
		t.Fatal(err)
	}
	for port := range uint16(3) {
		if _, err := s.AddDNAT(dnat(func(r *DNATRule) { r.Ports = SinglePort(port + 1) })); err != nil {
			t.Fatal(err)
		}
	}
	var got []uint32
	for _, r := range must[Rules](t)(s.Rules()).DNAT {
		got = append(got, r.ID)
	}
	if d := diff([]uint32{bpfMaxID, 2, 3, first.DNAT[0].ID}, got); d != "" {
		t.Error(d)
	}
	checkNotes(t, s, must[Rules](t)(s.Rules()))
}
