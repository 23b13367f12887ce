package maps

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
)

// ruleSet is one of the two sets of inner maps that hold rules. SetRules makes the one not in
// force anew and switches; a kind of rules that stays as it is shares its map with the set
// before. What one update can do is done in the set in force.
type ruleSet struct {
	ports    *ebpf.Map // NATDnatKey -> NATDnatRule
	ranges   *ebpf.Map // NATDnatRangeKey -> NATDnatRule
	sources  *ebpf.Map // NATSnatKey -> NATSnatRule
	prefixes *ebpf.Map // NATRulePrefixKey -> 1
	backends *ebpf.Map // NATBackendKey -> NATBackend
}

// kindsOfMaps is the number of those.
const kindsOfMaps = 5

func (set *ruleSet) Close() {
	for _, m := range []*ebpf.Map{set.ports, set.ranges, set.sources, set.prefixes, set.backends} {
		if m != nil {
			m.Close()
		}
	}
}

// outer is one kind of rule map: where its two inner maps are, and where a set keeps it.
type outer struct {
	name string
	maps *ebpf.Map
	set  func(*ruleSet) **ebpf.Map
}

func (s *State) outers() []outer {
	return []outer{
		{bpf.NATMapDnatPorts, s.m.DnatPorts, func(set *ruleSet) **ebpf.Map { return &set.ports }},
		{bpf.NATMapDnatRanges, s.m.DnatRanges, func(set *ruleSet) **ebpf.Map { return &set.ranges }},
		{bpf.NATMapSnatSources, s.m.SnatSources, func(set *ruleSet) **ebpf.Map { return &set.sources }},
		{bpf.NATMapRulePrefixes, s.m.RulePrefixes, func(set *ruleSet) **ebpf.Map { return &set.prefixes }},
		{bpf.NATMapBackends, s.m.Backends, func(set *ruleSet) **ebpf.Map { return &set.backends }},
	}
}

// openSet opens the inner maps of a slot, 0 or 1. Close them.
func (s *State) openSet(slot uint32) (*ruleSet, error) {
	set := &ruleSet{}
	for _, o := range s.outers() {
		if err := o.maps.Lookup(slot, o.set(set)); err != nil {
			set.Close()
			return nil, fmt.Errorf("open %s of rule set %d: %w", o.name, slot, err)
		}
	}
	return set, nil
}

// content is what the inner maps of a set hold, ready for batch updates.
type content struct {
	portKeys    []bpf.NATDnatKey
	ports       []bpf.NATDnatRule
	rangeKeys   []bpf.NATDnatRangeKey
	ranges      []bpf.NATDnatRule
	sourceKeys  []bpf.NATSnatKey
	sources     []bpf.NATSnatRule
	prefixKeys  []bpf.NATRulePrefixKey
	prefixes    []uint8
	backendKeys []bpf.NATBackendKey
	backends    []bpf.NATBackend
	generations carried
}

// newContent lays out rules, which have their ids, with the generations of those.
func newContent(rules Rules, generations carried) *content {
	c := &content{
		portKeys:    make([]bpf.NATDnatKey, 0, len(rules.DNAT)),
		ports:       make([]bpf.NATDnatRule, 0, len(rules.DNAT)),
		generations: generations,
	}
	for i := range rules.DNAT {
		c.addDNAT(&rules.DNAT[i])
	}
	for i := range rules.SNAT {
		r := &rules.SNAT[i]
		c.sourceKeys = append(c.sourceKeys, r.mapKey())
		c.sources = append(c.sources, r.value(generations.generation(r.ID)))
		c.addPrefixes(r.ID, r.Except)
	}
	return c
}

func (c *content) addDNAT(r *DNATRule) {
	value := r.value(c.generations.generation(r.ID))
	if r.Ports.length() == 1 {
		c.portKeys = append(c.portKeys, r.portKey())
		c.ports = append(c.ports, value)
	} else {
		for _, k := range r.rangeKeys() {
			c.rangeKeys = append(c.rangeKeys, k)
			c.ranges = append(c.ranges, value)
		}
	}
	c.addPrefixes(r.ID, r.Allow)
	c.addBackends(r)
}

func (c *content) addPrefixes(id uint32, list []netip.Prefix) {
	for _, p := range list {
		bits, addr := toPrefix(p)
		c.prefixKeys = append(c.prefixKeys, bpf.NATRulePrefixKey{Prefixlen: 32 + bits, Rule: id, Addr: addr})
		c.prefixes = append(c.prefixes, 1)
	}
}

// kinds is what config.rules says of the content: which kinds of rules there are.
func (c *content) kinds() (kinds rulesWord) {
	for i := range c.portKeys {
		kinds |= portKind(&c.portKeys[i])
	}
	for i := range c.rangeKeys {
		kinds |= rangeKind(&c.rangeKeys[i])
	}
	for i := range c.sourceKeys {
		kinds |= sourceKind(&c.sourceKeys[i])
	}
	return kinds
}

func portKind(k *bpf.NATDnatKey) rulesWord {
	return rulesWord(bpf.NATRulesWordRULES_DNAT_PORTS) << dnatKind(k.Dst, k.Ifindex)
}

func rangeKind(k *bpf.NATDnatRangeKey) rulesWord {
	return rulesWord(bpf.NATRulesWordRULES_DNAT_RANGES) << dnatKind(k.Dst, k.Ifindex)
}

func sourceKind(k *bpf.NATSnatKey) rulesWord {
	if k.Ifindex == 0 {
		return 0
	}
	return rulesWord(bpf.NATRulesWordRULES_SNAT_DEVICE)
}

// The destinations of rules for every address of the host.
var anyDestination = [2]bpf.NATAddr{toAddr(anyIPv4), toAddr(anyIPv6)}

func dnatKind(dst bpf.NATAddr, ifindex uint32) bpf.NATDnatKind {
	any := dst == anyDestination[0] || dst == anyDestination[1]
	switch {
	case any && ifindex != 0:
		return bpf.NATDnatKindDNAT_ANY_DEVICE
	case any:
		return bpf.NATDnatKindDNAT_ANY
	case ifindex != 0:
		return bpf.NATDnatKindDNAT_ADDRESS_DEVICE
	}
	return bpf.NATDnatKindDNAT_ADDRESS
}

// elements are the numbers of elements, by outers.
func (c *content) elements() [kindsOfMaps]int {
	return [kindsOfMaps]int{len(c.portKeys), len(c.rangeKeys), len(c.sourceKeys), len(c.prefixKeys), len(c.backendKeys)}
}

// sameElements tells, by outers, where two contents are the same.
func (c *content) sameElements(o *content) [kindsOfMaps]bool {
	return [kindsOfMaps]bool{
		slices.Equal(c.portKeys, o.portKeys) && slices.Equal(c.ports, o.ports),
		slices.Equal(c.rangeKeys, o.rangeKeys) && slices.Equal(c.ranges, o.ranges),
		slices.Equal(c.sourceKeys, o.sourceKeys) && slices.Equal(c.sources, o.sources),
		slices.Equal(c.prefixKeys, o.prefixKeys),
		slices.Equal(c.backendKeys, o.backendKeys) && slices.Equal(c.backends, o.backends),
	}
}

// fill puts the content into a slot, which must not be the one in force: have is. Where they
// are the same, and there is room for more, the slot gets the map in force, else one that is made
// for it. On an error the slot may hold some of the content.
func (s *State) fill(slot uint32, have slotRules, c *content) error {
	current, err := s.openSet(have.slot)
	if err != nil {
		return err
	}
	defer current.Close()

	// An inner map with more elements than the rules tell of has what a killed call left.
	old := newContent(have.rules, have.generations)
	sizes, was, same := c.elements(), old.elements(), c.sameElements(old)
	fresh := &ruleSet{}
	defer fresh.Close()
	outers := s.outers()
	tasks := make([]func() error, 0, 2*len(outers))
	for i, o := range outers {
		inner := *o.set(current)
		roomy := int(inner.MaxEntries()) >= sizes[i]+innerRoom/2
		if !same[i] || have.elements[i] != was[i] || !roomy {
			if inner, err = newInner(o.name, inner, sizes[i]); err != nil {
				return fmt.Errorf("make %s for %d elements: %w", o.name, sizes[i], err)
			}
			*o.set(fresh) = inner
		} else if shared, err := o.shared(); err != nil {
			return err
		} else if shared {
			continue
		}
		tasks = append(tasks, func() error {
			if err := o.maps.Put(slot, inner); err != nil {
				return fmt.Errorf("put %s into rule set %d: %w", o.name, slot, err)
			}
			return nil
		})
	}
	// A slot that is not in force may be filled after its maps are in it. Putting one there
	// waits until no program reads the one before; meanwhile all else can be done.
	return together(append(tasks, fresh.writes(c)...))
}

// together runs tasks at the same time.
func together(tasks []func() error) error {
	errs := make([]error, len(tasks))
	var wait sync.WaitGroup
	for i, task := range tasks {
		wait.Go(func() { errs[i] = task() })
	}
	wait.Wait()
	return errors.Join(errs...)
}

// shared tells whether both slots have the same inner map.
func (o outer) shared() (bool, error) {
	var ids [2]ebpf.MapID

	for slot := range ids {
		if err := o.maps.Lookup(uint32(slot), &ids[slot]); err != nil {
			return false, fmt.Errorf("read %s of rule set %d: %w", o.name, slot, err)
		}
	}
	return ids[0] == ids[1], nil
}

// writes are what fills the maps that there are.
func (set *ruleSet) writes(c *content) []func() error {
	half := len(c.portKeys) / 2 // the largest map is written by two at once
	return []func() error{
		func() error { return named("published ports", writeAll(set.ports, c.portKeys[:half], c.ports[:half])) },
		func() error { return named("published ports", writeAll(set.ports, c.portKeys[half:], c.ports[half:])) },
		func() error { return named("published port ranges", writeAll(set.ranges, c.rangeKeys, c.ranges)) },
		func() error { return named("SNAT rules", writeAll(set.sources, c.sourceKeys, c.sources)) },
		func() error { return named("the rules' prefixes", writeAll(set.prefixes, c.prefixKeys, c.prefixes)) },
		func() error { return named("the rules' backends", writeAll(set.backends, c.backendKeys, c.backends)) },
	}
}

// named says what could not be written.
func named(what string, err error) error {
	if err != nil {
		return fmt.Errorf("write %s: %w", what, err)
	}
	return nil
}

// innerRoom is how many elements more than it has an inner map can take at least, one by one.
const innerRoom = 1024

// newInner makes an inner map of the template's kind for n elements and some more.
func newInner(name string, template *ebpf.Map, n int) (*ebpf.Map, error) {
	room := max(innerRoom, n/4)
	return ebpf.NewMap(&ebpf.MapSpec{
		Name:       name,
		Type:       template.Type(),
		KeySize:    template.KeySize(),
		ValueSize:  template.ValueSize(),
		Flags:      template.Flags(),
		MaxEntries: uint32(n + room),
	})
}

// read returns the rules of the set, sorted, and the generation that each id carries.
func (set *ruleSet) read() (slotRules, error) {
	var (
		out   slotRules
		rules = &out.rules
		bad   error
	)
	// Most of what a map has room for is there.
	rules.DNAT = make([]DNATRule, 0, set.ports.MaxEntries())
	out.generations = make(carried, 0, set.ports.MaxEntries())
	err := readAll(set.ports, func(k bpf.NATDnatKey, v bpf.NATDnatRule) {
		rules.DNAT = append(rules.DNAT, dnatFromValue(k.Dst, k.Ifindex, k.Proto, v))
		out.generations.set(v.Id, v.Generation)
		out.elements[0]++
	})
	if err != nil {
		return slotRules{}, fmt.Errorf("read published ports: %w", err)
	}
	err = readAll(set.ranges, func(k bpf.NATDnatRangeKey, v bpf.NATDnatRule) {
		out.elements[1]++
		if out.generations.has(v.Id) {
			return // another prefix of the same range
		}
		rules.DNAT = append(rules.DNAT, dnatFromValue(k.Dst, k.Ifindex, k.Proto, v))
		out.generations.set(v.Id, v.Generation)
	})
	if err != nil {
		return slotRules{}, fmt.Errorf("read published port ranges: %w", err)
	}
	err = readAll(set.sources, func(k bpf.NATSnatKey, v bpf.NATSnatRule) {
		out.elements[2]++
		r, err := snatFromValue(k, v)
		if err != nil {
			bad = err
			return
		}
		rules.SNAT = append(rules.SNAT, r)
		out.generations.set(v.Id, v.Generation)
	})
	if err == nil {
		err = bad
	}
	if err != nil {
		return slotRules{}, fmt.Errorf("read SNAT rules: %w", err)
	}
	if out.elements[3], err = set.readPrefixes(*rules); err != nil {
		return slotRules{}, fmt.Errorf("read the rules' prefixes: %w", err)
	}
	if out.elements[4], err = set.readBackends(*rules, &out.generations); err != nil {
		return slotRules{}, fmt.Errorf("read the rules' backends: %w", err)
	}
	rules.sort()
	return out, nil
}

// readPrefixes gives each of the rules its allow or except list and counts the elements.
func (set *ruleSet) readPrefixes(rules Rules) (elements int, err error) {
	var (
		lists = map[uint32][]netip.Prefix{}
		bad   error
	)
	err = readAll(set.prefixes, func(k bpf.NATRulePrefixKey, _ uint8) {
		elements++
		p, err := fromPrefix(k.Prefixlen-32, k.Addr)
		if err != nil {
			bad = err
			return
		}
		lists[k.Rule] = append(lists[k.Rule], p)
	})
	if err == nil {
		err = bad
	}
	if err != nil || elements == 0 {
		return 0, err
	}
	for _, list := range lists {
		slices.SortFunc(list, comparePrefix)
	}
	for i := range rules.DNAT {
		rules.DNAT[i].Allow = lists[rules.DNAT[i].ID]
	}
	for i := range rules.SNAT {
		rules.SNAT[i].Except = lists[rules.SNAT[i].ID]
	}
	return elements, nil
}

// equalRules tells whether two normalized sets are the same to the last word.
func equalRules(a, b Rules) bool {
	return slices.EqualFunc(a.SNAT, b.SNAT, func(a, b SNATRule) bool {
		return a.ID == b.ID && a.Attach == b.Attach && a.same(b)
	}) && slices.EqualFunc(a.DNAT, b.DNAT, func(a, b DNATRule) bool {
		return a.ID == b.ID && a.ToPorts == b.ToPorts && a.same(b) && slices.Equal(a.Backends, b.Backends)
	})
}
