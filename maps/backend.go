package maps

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
)

// Backend is one of several containers that a published port goes to.
type Backend struct {
	// ID is given by SetRules and read back by Rules. Flows to the backend name it as their rule.
	ID uint32

	// To and ToPorts are as in DNATRule.
	To      netip.Addr
	ToPorts PortRange

	// Weight is how many new flows it gets for those of the others: 1 to 256, 0 stands for 1.
	Weight int
}

// Balance is how the backend of a new flow is chosen.
type Balance uint8

const (
	// BalanceRandom chooses at random.
	BalanceRandom Balance = iota
	// BalanceSource chooses by the client's address: the same one always, while the backends are the same.
	BalanceSource
)

// String returns "random" or "source".
func (b Balance) String() string {
	switch b {
	case BalanceRandom:
		return "random"
	case BalanceSource:
		return "source"
	}
	return fmt.Sprintf("balance %d", uint8(b))
}

// The bounds of a rule with several backends.
const (
	MaxBackends = 64
	MaxWeight   = 256
	MaxAffinity = 7 * 24 * time.Hour

	maxSlots = 256
)

// affinityClients is how many clients are remembered, for all rules together.
const affinityClients = 16384

// Targets are the backends of the rule, of which one without Backends has one.
func (r DNATRule) Targets() []Backend {
	if len(r.Backends) > 0 {
		return r.Backends
	}
	return []Backend{{ID: r.ID, To: r.To, ToPorts: r.ToPorts, Weight: 1}}
}

// hasBackends tells whether the rule has several targets.
func (r *DNATRule) hasBackends() bool { return len(r.Backends) > 0 }

// setTargets makes the rule one to these backends.
func (r *DNATRule) setTargets(targets []Backend) {
	r.To, r.ToPorts, r.Backends = targets[0].To, targets[0].ToPorts, targets
	if len(targets) == 1 {
		r.Backends, r.Balance, r.Affinity = nil, BalanceRandom, 0
	}
}

// normalizeTargets validates what the rule says of its targets, and returns it with their one form.
func (r DNATRule) normalizeTargets() (DNATRule, error) {
	several := len(r.Backends) > 1
	switch {
	case len(r.Backends) > MaxBackends:
		return r, invalid("%d targets: a rule has %d at most", len(r.Backends), MaxBackends)
	case r.Balance > BalanceSource:
		return r, invalid("%s: balance by random or source", r.Balance)
	case !several && r.Balance != BalanceRandom:
		return r, invalid("balance %s: of a rule with one target: name several", r.Balance)
	case !several && r.Affinity != 0:
		return r, invalid("affinity %s: of a rule with one target: name several", r.Affinity)
	case r.Affinity < 0 || r.Affinity > MaxAffinity || r.Affinity%time.Second != 0:
		return r, invalid("affinity %s: takes whole seconds, 0s to %s", r.Affinity, MaxAffinity)
	}
	targets := slices.Clone(r.Targets())
	for i := range targets {
		t := &targets[i]
		t.ID = 0
		if err := checkTarget(t.To, "target"); err != nil {
			return r, err
		}
		if !sameFamily(t.To, targets[0].To) {
			return r, invalid("targets %s and %s: mixed families: use one family a rule", targets[0].To, t.To)
		}
		if err := r.checkToPorts(t.ToPorts); err != nil {
			return r, err
		}
		if t.Weight == 0 {
			t.Weight = 1
		}
		if t.Weight < 0 || t.Weight > MaxWeight {
			return r, invalid("target %s: weight %d: takes 1 to %d", r.endpoint(*t), t.Weight, MaxWeight)
		}
	}
	slices.SortFunc(targets, r.compareTargets)
	for i := 1; i < len(targets); i++ {
		if r.compareTargets(targets[i-1], targets[i]) == 0 {
			return r, invalid("target %s: named twice: give it a weight instead", r.endpoint(targets[i]))
		}
	}
	r.setTargets(targets)
	return r, nil
}

func (r DNATRule) checkToPorts(ports PortRange) error {
	if ports.isZero() {
		return nil
	}
	if err := ports.check("target port"); err != nil {
		return err
	}
	if n := ports.length(); n != 1 && n != r.Ports.length() {
		return invalid("target ports %s: %d for the %d of %s: name one, as many, or none",
			ports, n, r.Ports.length(), r.Ports)
	}
	return nil
}

// endpoint is a target in the words of the command line.
func (r DNATRule) endpoint(t Backend) string { return endpoint(t.To.String(), t.To.Is6(), t.ToPorts) }

// effective are the target's ports with "kept" written out.
func (t Backend) effective(published PortRange) PortRange {
	if t.ToPorts.isZero() {
		return published
	}
	return t.ToPorts
}

// compareTargets orders targets by where they lead.
func (r DNATRule) compareTargets(a, b Backend) int {
	x, y := a.effective(r.Ports), b.effective(r.Ports)
	return cmp.Or(a.To.Compare(b.To), cmp.Compare(x.First, y.First), cmp.Compare(x.Last, y.Last))
}

// sameTargets tells whether two normalized rules for the same ports lead to the same.
func (r DNATRule) sameTargets(o DNATRule) bool {
	return r.Balance == o.Balance && r.Affinity == o.Affinity &&
		slices.EqualFunc(r.Targets(), o.Targets(), func(a, b Backend) bool {
			return a.Weight == b.Weight && r.compareTargets(a, b) == 0
		})
}

// sharesTarget tells whether two rules for the same ports have a target in common.
func (r DNATRule) sharesTarget(o DNATRule) bool {
	return slices.ContainsFunc(r.Targets(), func(t Backend) bool { return o.target(t) != nil })
}

// target is the one of the rule's that leads to the same, or nil.
func (r DNATRule) target(t Backend) *Backend {
	targets := r.Targets()
	i := slices.IndexFunc(targets, func(o Backend) bool { return r.compareTargets(t, o) == 0 })
	if i < 0 {
		return nil
	}
	return &targets[i]
}

// without is the rule without those of its targets that are among these, how many were, and the rule
// itself where none is left.
func (r DNATRule) without(targets []Backend) (rest DNATRule, gone int) {
	var left []Backend

	for _, t := range r.Targets() {
		if slices.ContainsFunc(targets, func(o Backend) bool { return r.compareTargets(t, o) == 0 }) {
			gone++
		} else {
			left = append(left, t)
		}
	}
	if gone > 0 && len(left) > 0 {
		r.setTargets(left)
	}
	return r, gone
}

func (w *words) addTargets(r DNATRule) {
	weighted := false
	for _, t := range r.Targets() {
		w.add("--to-destination", r.endpoint(t))
		weighted = weighted || t.Weight > 1
	}
	if !r.hasBackends() {
		return
	}
	if weighted {
		for _, t := range r.Backends {
			w.add("--weight", strconv.Itoa(max(t.Weight, 1)))
		}
	}
	if r.Balance != BalanceRandom {
		w.add("--balance", r.Balance.String())
	}
	if r.Affinity != 0 {
		w.add("--affinity", r.Affinity.String())
	}
}

// slots has the index of a backend for each slot, each as often as its weight says. Each backend prefers
// slots in an order of its own (as in Maglev), so that one that comes or goes moves few of the others.
func (r *DNATRule) slots() []int {
	quotas := r.quotas()
	n := 0
	for _, q := range quotas {
		n += q
	}
	preferred := make([][]int, len(quotas))
	for i, t := range r.Backends {
		name := fmt.Sprint(t.To, t.effective(r.Ports))
		rank := make([]uint64, n)
		for slot := range n {
			h := fnv.New64a()
			fmt.Fprint(h, name, "/", slot)
			rank[slot] = h.Sum64() * 0x9e3779b97f4a7c15 >> 16
			preferred[i] = append(preferred[i], slot)
		}
		slices.SortFunc(preferred[i], func(a, b int) int { return cmp.Or(cmp.Compare(rank[a], rank[b]), a-b) })
	}
	slots := slices.Repeat([]int{-1}, n)
	for left := n; left > 0; {
		for i := range quotas {
			if quotas[i] == 0 {
				continue
			}
			for slots[preferred[i][0]] >= 0 {
				preferred[i] = preferred[i][1:]
			}
			slots[preferred[i][0]] = i
			quotas[i]--
			left--
		}
	}
	return slots
}

// quotas are the numbers of slots of the backends: their weights, made smaller by what divides all of them,
// or in proportion. By source there are as many slots as there can be, so that few change.
func (r *DNATRule) quotas() []int {
	sum, divisor := 0, 0
	for _, t := range r.Backends {
		sum += t.Weight
		a, b := divisor, t.Weight
		for b != 0 {
			a, b = b, a%b
		}
		divisor = a
	}
	quotas := make([]int, len(r.Backends))
	if sum/divisor <= maxSlots && r.Balance != BalanceSource {
		for i, t := range r.Backends {
			quotas[i] = t.Weight / divisor
		}
		return quotas
	}
	left := maxSlots
	for i, t := range r.Backends {
		quotas[i] = max(1, t.Weight*maxSlots/sum)
		left -= quotas[i]
	}
	for ; left != 0; left -= cmp.Compare(left, 0) { // to who is furthest from its share
		best := 0
		off := func(i int) int { return r.Backends[i].Weight*maxSlots - quotas[i]*sum }
		for i := range quotas {
			if left > 0 && off(i) > off(best) || left < 0 && quotas[i] > 1 && (quotas[best] == 1 || off(i) < off(best)) {
				best = i
			}
		}
		quotas[best] += cmp.Compare(left, 0)
	}
	return quotas
}

// backendByID is BACKEND_BY_ID of abi.h.
const backendByID = 0xffffffff

// addBackends lays out a rule's slots, and each of its backends by its id.
func (c *content) addBackends(r *DNATRule) {
	if !r.hasBackends() {
		return
	}
	values := make([]bpf.NATBackend, len(r.Backends))
	for i, t := range r.Backends {
		ports := t.effective(r.Ports)
		values[i] = bpf.NATBackend{
			To: toAddr(t.To), ToFirst: ports.First, ToLast: ports.Last,
			Rule: r.ID, Id: t.ID, Generation: c.generations.generation(t.ID), Weight: uint16(t.Weight),
		}
		if t.ToPorts.isZero() {
			values[i].KeepPort = 1
		}
		c.backendKeys = append(c.backendKeys, bpf.NATBackendKey{Rule: t.ID, Slot: backendByID})
		c.backends = append(c.backends, values[i])
	}
	for slot, i := range r.slots() {
		c.backendKeys = append(c.backendKeys, bpf.NATBackendKey{Rule: r.ID, Slot: uint32(slot)})
		c.backends = append(c.backends, values[i])
	}
}

// readBackends gives rules their backends, and counts the elements.
func (set *ruleSet) readBackends(rules Rules, generations *carried) (elements int, err error) {
	targets := map[uint32][]Backend{}
	err = readAll(set.backends, func(k bpf.NATBackendKey, v bpf.NATBackend) {
		elements++
		if k.Slot != backendByID {
			return
		}
		t := Backend{ID: v.Id, To: fromAddr(v.To), ToPorts: PortRange{v.ToFirst, v.ToLast}, Weight: int(v.Weight)}
		if v.KeepPort != 0 {
			t.ToPorts = PortRange{}
		}
		targets[v.Rule] = append(targets[v.Rule], t)
		generations.set(v.Id, v.Generation)
	})
	if err != nil || elements == 0 {
		return 0, err
	}
	for i := range rules.DNAT {
		r := &rules.DNAT[i]
		if list := targets[r.ID]; len(list) > 0 {
			slices.SortFunc(list, r.compareTargets)
			r.To, r.ToPorts, r.Backends = list[0].To, list[0].ToPorts, list
		}
	}
	return elements, nil
}

// prepareAffinities makes room for the clients of rules with affinity, where there is none and a
// rule asks for it.
func (s *State) prepareAffinities(want Rules) error {
	if !slices.ContainsFunc(want.DNAT, func(r DNATRule) bool { return r.Affinity != 0 }) {
		return nil
	}
	inner, err := s.openAffinities()
	if err != nil {
		return err
	}
	defer inner.Close()
	if inner.MaxEntries() > 1 {
		return nil
	}
	return s.putAffinities(affinityClients)
}

// dropAffinities takes the clients away when no rule asks for them. It is about memory alone, after the rules are in
// force: what fails is done by the next change.
func (s *State) dropAffinities(want Rules) {
	if slices.ContainsFunc(want.DNAT, func(r DNATRule) bool { return r.Affinity != 0 }) {
		return
	}
	inner, err := s.openAffinities()
	if err != nil {
		return
	}
	defer inner.Close()
	if inner.MaxEntries() > 1 {
		_ = s.putAffinities(1)
	}
}

func (s *State) openAffinities() (*ebpf.Map, error) {
	var inner *ebpf.Map

	if err := s.m.Affinities.Lookup(uint32(0), &inner); err != nil {
		return nil, fmt.Errorf("open the table of clients: %w", err)
	}
	return inner, nil
}

func (s *State) putAffinities(clients uint32) error {
	before, err := s.openAffinities()
	if err != nil {
		return err
	}
	defer before.Close()
	inner, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: bpf.NATMapAffinities, Type: before.Type(), KeySize: before.KeySize(), ValueSize: before.ValueSize(),
		Flags: before.Flags(), MaxEntries: clients,
	})
	if err != nil {
		return fmt.Errorf("make a table for %d clients: %w", clients, err)
	}
	defer inner.Close()
	if err := s.m.Affinities.Put(uint32(0), inner); err != nil {
		return fmt.Errorf("put the table of clients: %w", err)
	}
	return nil
}
