package maps

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
)

// ruleSet is one of the two sets of inner maps that hold rules. A set in force is never
// written: SetRules makes the other one anew and switches.
type ruleSet struct {
	ports    *ebpf.Map // NATDnatKey -> NATDnatRule
	ranges   *ebpf.Map // NATDnatRangeKey -> NATDnatRule
	sources  *ebpf.Map // NATSnatKey -> NATSnatRule
	prefixes *ebpf.Map // NATRulePrefixKey -> 1
}

func (set *ruleSet) Close() {
	for _, m := range []*ebpf.Map{set.ports, set.ranges, set.sources, set.prefixes} {
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
	generations map[uint32]uint32
}

// newContent lays out rules, which have their ids, with the generations of those.
func newContent(rules Rules, generations map[uint32]uint32) *content {
	c := &content{generations: generations}
	for _, r := range rules.DNAT {
		c.addDNAT(r)
	}
	for _, r := range rules.SNAT {
		c.sourceKeys = append(c.sourceKeys, r.mapKey())
		c.sources = append(c.sources, r.value(generations[r.ID]))
		for _, p := range r.Except {
			c.addPrefix(r.ID, p)
		}
	}
	return c
}

func (c *content) addDNAT(r DNATRule) {
	value := r.value(c.generations[r.ID])
	if r.Ports.length() == 1 {
		c.portKeys = append(c.portKeys, r.portKey())
		c.ports = append(c.ports, value)
	} else {
		for _, k := range r.rangeKeys() {
			c.rangeKeys = append(c.rangeKeys, k)
			c.ranges = append(c.ranges, value)
		}
	}
	for _, p := range r.Allow {
		c.addPrefix(r.ID, p)
	}
}

func (c *content) addPrefix(id uint32, p netip.Prefix) {
	bits, addr := toPrefix(p)
	c.prefixKeys = append(c.prefixKeys, bpf.NATRulePrefixKey{Prefixlen: 32 + bits, Rule: id, Addr: addr})
	c.prefixes = append(c.prefixes, 1)
}

// fill makes new inner maps with the content and puts them into a slot. On an error the
// slot may hold some of them; it must not be the one in force.
func (s *State) fill(slot uint32, c *content) error {
	sizes := []int{len(c.portKeys), len(c.rangeKeys), len(c.sourceKeys), len(c.prefixKeys)}

	template, err := s.openSet(slot)
	if err != nil {
		return err
	}
	defer template.Close()

	set := &ruleSet{}
	defer set.Close()
	for i, o := range s.outers() {
		if *o.set(set), err = newInner(o.name, *o.set(template), sizes[i]); err != nil {
			return fmt.Errorf("make %s for %d elements: %w", o.name, sizes[i], err)
		}
	}
	if err := set.write(c); err != nil {
		return err
	}
	for _, o := range s.outers() {
		if err := o.maps.Put(slot, *o.set(set)); err != nil {
			return fmt.Errorf("put %s into rule set %d: %w", o.name, slot, err)
		}
	}
	return nil
}

func (set *ruleSet) write(c *content) error {
	if err := writeAll(set.ports, c.portKeys, c.ports); err != nil {
		return fmt.Errorf("write published ports: %w", err)
	}
	if err := writeAll(set.ranges, c.rangeKeys, c.ranges); err != nil {
		return fmt.Errorf("write published port ranges: %w", err)
	}
	if err := writeAll(set.sources, c.sourceKeys, c.sources); err != nil {
		return fmt.Errorf("write SNAT rules: %w", err)
	}
	if err := writeAll(set.prefixes, c.prefixKeys, c.prefixes); err != nil {
		return fmt.Errorf("write the rules' prefixes: %w", err)
	}
	return nil
}

// newInner makes an inner map of the template's kind with room for n elements.
func newInner(name string, template *ebpf.Map, n int) (*ebpf.Map, error) {
	return ebpf.NewMap(&ebpf.MapSpec{
		Name:       name,
		Type:       template.Type(),
		KeySize:    template.KeySize(),
		ValueSize:  template.ValueSize(),
		Flags:      template.Flags(),
		MaxEntries: uint32(max(n, 1)),
	})
}

// read returns the rules of the set, sorted, and the generation that each id carries.
func (set *ruleSet) read() (Rules, map[uint32]uint32, error) {
	var (
		rules       Rules
		generations = map[uint32]uint32{}
		bad         error
	)
	err := readAll(set.ports, func(k bpf.NATDnatKey, v bpf.NATDnatRule) {
		rules.DNAT = append(rules.DNAT, dnatFromValue(k.Dst, k.Ifindex, k.Proto, v))
		generations[v.Id] = v.Generation
	})
	if err != nil {
		return Rules{}, nil, fmt.Errorf("read published ports: %w", err)
	}
	err = readAll(set.ranges, func(k bpf.NATDnatRangeKey, v bpf.NATDnatRule) {
		if _, seen := generations[v.Id]; seen {
			return // another prefix of the same range
		}
		rules.DNAT = append(rules.DNAT, dnatFromValue(k.Dst, k.Ifindex, k.Proto, v))
		generations[v.Id] = v.Generation
	})
	if err != nil {
		return Rules{}, nil, fmt.Errorf("read published port ranges: %w", err)
	}
	err = readAll(set.sources, func(k bpf.NATSnatKey, v bpf.NATSnatRule) {
		r, err := snatFromValue(k, v)
		if err != nil {
			bad = err
			return
		}
		rules.SNAT = append(rules.SNAT, r)
		generations[v.Id] = v.Generation
	})
	if err == nil {
		err = bad
	}
	if err != nil {
		return Rules{}, nil, fmt.Errorf("read SNAT rules: %w", err)
	}
	if err := set.readPrefixes(rules); err != nil {
		return Rules{}, nil, fmt.Errorf("read the rules' prefixes: %w", err)
	}
	rules.sort()
	return rules, generations, nil
}

// readPrefixes gives each of the rules its allow or except list.
func (set *ruleSet) readPrefixes(rules Rules) error {
	var (
		lists = map[uint32][]netip.Prefix{}
		bad   error
	)
	err := readAll(set.prefixes, func(k bpf.NATRulePrefixKey, _ uint8) {
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
	if err != nil {
		return err
	}
	for _, list := range lists {
		slices.SortFunc(list, comparePrefix)
	}
	for i, r := range rules.DNAT {
		rules.DNAT[i].Allow = lists[r.ID]
	}
	for i, r := range rules.SNAT {
		rules.SNAT[i].Except = lists[r.ID]
	}
	return nil
}

// equalRules tells whether two normalized sets are the same to the last word.
func equalRules(a, b Rules) bool {
	return slices.EqualFunc(a.SNAT, b.SNAT, func(a, b SNATRule) bool {
		return a.ID == b.ID && a.Attach == b.Attach && a.same(b)
	}) && slices.EqualFunc(a.DNAT, b.DNAT, func(a, b DNATRule) bool {
		return a.ID == b.ID && a.ToPorts == b.ToPorts && a.same(b)
	})
}
