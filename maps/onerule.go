package maps

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
)

// This file changes one rule without reading the others. A rule that is one element comes and
// goes by one update of the map in force, which a packet sees whole or not at all. Before it,
// the rule's list is written under an id that nothing else has, and config.rules says
// what is left to do after it, should this process be killed in between. A list of a rule that
// is gone stays, under an id that no rule gets, until the next change as a whole.
//
// What is not that simple is done by ChangeRules, on the whole set: ranges, a rule that may be
// another one with the same list, a full map, and used-up ids.

// errWhole indicates that a change has to be made on the whole set. No packet has seen any of
// it yet.
var errWhole = errors.New("change the whole set")

// AddDNAT adds a rule to those in force, as Rules.AddDNAT does, and SetRules.
func (s *State) AddDNAT(r DNATRule) (changed bool, err error) {
	n, err := r.normalize()
	if err != nil {
		return false, err
	}
	return s.changeOne(
		func(word rulesWord) (bool, error) { return s.addPort(word, n) },
		func(rules *Rules) (bool, error) { return rules.AddDNAT(r) })
}

// DeleteDNAT deletes a rule from those in force, as Rules.DeleteDNAT does, and SetRules.
func (s *State) DeleteDNAT(r DNATRule) (changed bool, err error) {
	n, err := r.normalizeToDelete()
	if err != nil {
		return false, err
	}
	return s.changeOne(
		func(word rulesWord) (bool, error) { return s.deletePort(word, n) },
		func(rules *Rules) (bool, error) { return rules.DeleteDNAT(r) })
}

// AddSNAT adds a rule to those in force, as Rules.AddSNAT does, and SetRules.
func (s *State) AddSNAT(r SNATRule) (changed bool, err error) {
	n, err := r.normalize()
	if err != nil {
		return false, err
	}
	return s.changeOne(
		func(word rulesWord) (bool, error) { return s.addSource(word, n) },
		func(rules *Rules) (bool, error) { return rules.AddSNAT(r) })
}

// DeleteSNAT deletes a rule from those in force, as Rules.DeleteSNAT does, and SetRules.
func (s *State) DeleteSNAT(r SNATRule) (changed bool, err error) {
	n, err := r.normalizeToDelete()
	if err != nil {
		return false, err
	}
	return s.changeOne(
		func(word rulesWord) (bool, error) { return s.deleteSource(word, n) },
		func(rules *Rules) (bool, error) { return rules.DeleteSNAT(r) })
}

// changeOne makes a change by one, which may refuse with errWhole, or else by whole.
func (s *State) changeOne(one func(rulesWord) (bool, error), whole func(*Rules) (bool, error)) (changed bool, err error) {
	word, err := s.rulesToChange()
	if err != nil {
		return false, err
	}
	changed, err = one(word)
	if !errors.Is(err, errWhole) {
		return changed, err
	}
	return s.ChangeRules(whole)
}

// addPort adds a rule for a single port.
func (s *State) addPort(word rulesWord, r DNATRule) (changed bool, err error) {
	if r.Ports.length() != 1 || r.hasBackends() {
		return false, errWhole
	}
	ports, err := s.openInner(s.m.DnatPorts, word)
	if err != nil {
		return false, err
	}
	defer ports.Close()
	key := r.portKey()
	other, err := lookup[bpf.NATDnatRule](ports, key)
	if err == nil && other == nil {
		other, err = s.rangeOver(word, key)
	}
	if err != nil {
		return false, err
	}
	if other != nil {
		if other.Flags&(bpf.NATDnatFlagDNAT_ALLOW_LIST|bpf.NATDnatFlagDNAT_BACKENDS) != 0 {
			return false, errWhole // what its lists have, to compare or to name it
		}
		o := dnatFromValue(key.Dst, key.Ifindex, key.Proto, *other)
		if r.same(o) {
			return false, nil
		}
		return false, r.clash(o)
	}
	word, r.ID = word.takeID()
	if r.ID == 0 {
		return false, errWhole
	}
	generation, err := s.generation(r.ID)
	if err != nil {
		return false, err
	}
	if err := s.putWord(word | portKind(&key)); err != nil {
		return false, err
	}
	if err := s.putPrefixes(word, r.ID, r.Allow); err != nil {
		return false, err
	}
	if err := putNew(ports, key, r.value(generation)); err != nil {
		return false, fmt.Errorf("add %s: %w", r, err)
	}
	return true, nil
}

// rangeOver is the range that has a port, or nil.
func (s *State) rangeOver(word rulesWord, port bpf.NATDnatKey) (*bpf.NATDnatRule, error) {
	key := bpf.NATDnatRangeKey{
		Prefixlen: rangeKeyBits + 16,
		Dst:       port.Dst, Ifindex: port.Ifindex, Proto: port.Proto, Port: port.Port,
	}
	if word&rangeKind(&key) == 0 {
		return nil, nil
	}
	ranges, err := s.openInner(s.m.DnatRanges, word)
	if err != nil {
		return nil, err
	}
	defer ranges.Close()
	return lookup[bpf.NATDnatRule](ranges, key)
}

// deletePort deletes a rule for a single port. r is normalized to be deleted.
func (s *State) deletePort(word rulesWord, r DNATRule) (changed bool, err error) {
	if r.Ports.length() != 1 || r.hasBackends() {
		return false, errWhole
	}
	ports, err := s.openInner(s.m.DnatPorts, word)
	if err != nil {
		return false, err
	}
	defer ports.Close()
	keys := []bpf.NATDnatKey{r.portKey()}
	if !r.Destination.IsValid() && !r.To.IsValid() {
		keys = append(keys, keys[0])
		keys[0].Dst, keys[1].Dst = anyDestination[0], anyDestination[1]
	}
	var ids []uint32
	for _, k := range keys {
		v, err := lookup[bpf.NATDnatRule](ports, k)
		if err != nil {
			return false, err
		}
		if v == nil {
			continue
		}
		if len(r.Allow) > 0 && v.Flags&bpf.NATDnatFlagDNAT_ALLOW_LIST != 0 || v.Flags&bpf.NATDnatFlagDNAT_BACKENDS != 0 {
			return false, errWhole // whether the lists are the same
		}
		if !r.means(dnatFromValue(k.Dst, k.Ifindex, k.Proto, *v)) {
			continue
		}
		keys[len(ids)] = k
		ids = append(ids, v.Id)
	}
	switch len(ids) {
	case 0:
		return false, nil
	case 1:
		return true, s.takeOut(word, ids, func() error { return ports.Delete(keys[0]) })
	}
	return false, errWhole // one of each family: they go at once
}

// addSource adds an SNAT rule.
func (s *State) addSource(word rulesWord, r SNATRule) (changed bool, err error) {
	sources, err := s.openInner(s.m.SnatSources, word)
	if err != nil {
		return false, err
	}
	defer sources.Close()
	key := r.mapKey()
	other, err := lookupSource(sources, key)
	if err != nil {
		return false, err
	}
	if other != nil {
		return s.replaceSource(word, sources, r, *other)
	}
	return true, s.putSource(word, sources, r, []uint32{0}, ebpf.UpdateNoExist)
}

// replaceSource adds an SNAT rule where another one has its source and uplink.
func (s *State) replaceSource(word rulesWord, sources *ebpf.Map, r SNATRule, other bpf.NATSnatRule) (changed bool, err error) {
	key := r.mapKey()
	o, err := snatFromValue(key, other)
	if err != nil {
		return false, err
	}
	listed := other.Flags&bpf.NATSnatFlagSNAT_EXCEPT != 0
	same := r.same(o) && !listed
	switch {
	case listed && (len(r.Except) > 0 || r.Attach == o.Attach):
		return false, errWhole // what its list has, to compare or to name it
	case r.Attach && !o.Attach, r.Attach == o.Attach && same:
		return false, nil
	case r.Attach == o.Attach:
		return false, r.clash(o)
	case same:
		r.ID = o.ID
		if err := sources.Update(key, r.value(other.Generation), ebpf.UpdateExist); err != nil {
			return false, fmt.Errorf("change %s: %w", r, err)
		}
		return true, nil
	}
	return true, s.putSource(word, sources, r, []uint32{0, other.Id}, ebpf.UpdateExist)
}

// putSource writes an SNAT rule under a new id and ends the flows of ids.
func (s *State) putSource(word rulesWord, sources *ebpf.Map, r SNATRule, ids []uint32, how ebpf.MapUpdateFlags) error {
	key := r.mapKey()
	word, r.ID = word.takeID()
	if r.ID == 0 {
		return errWhole
	}
	generation, err := s.generation(r.ID)
	if err != nil {
		return err
	}
	word |= sourceKind(&key)
	if err := s.putWord(word); err != nil {
		return err
	}
	if err := s.putPrefixes(word, r.ID, r.Except); err != nil {
		return err
	}
	return s.takeOut(word, ids, func() error {
		if err := wholeIfFull(sources.Update(key, r.value(generation), how)); err != nil {
			return fmt.Errorf("add %s: %w", r, err)
		}
		return nil
	})
}

// deleteSource deletes an SNAT rule. r is normalized to be deleted.
func (s *State) deleteSource(word rulesWord, r SNATRule) (changed bool, err error) {
	sources, err := s.openInner(s.m.SnatSources, word)
	if err != nil {
		return false, err
	}
	defer sources.Close()
	key := r.mapKey()
	v, err := lookupSource(sources, key)
	if err != nil || v == nil {
		return false, err
	}
	o, err := snatFromValue(key, *v)
	if err != nil {
		return false, err
	}
	if len(r.Except) > 0 && v.Flags&bpf.NATSnatFlagSNAT_EXCEPT != 0 {
		return false, errWhole // whether the lists are the same
	}
	if !r.means(o) {
		return false, nil
	}
	return true, s.takeOut(word, []uint32{0, v.Id}, func() error { return sources.Delete(key) })
}

// takeOut makes an update that takes rules out of force, or brings an SNAT rule, and ends the
// flows of ids: 0 and the id of one rule at most. word is in force.
func (s *State) takeOut(word rulesWord, ids []uint32, update func() error) error {
	noted := word
	for _, id := range ids {
		if id == 0 {
			noted |= wordUnruled
		} else {
			noted = noted.withLeaving(id)
		}
	}
	if err := s.putWord(noted); err != nil {
		return err
	}
	if err := update(); err != nil {
		return errors.Join(err, s.putWord(word))
	}
	if err := s.raise(ids); err != nil {
		return err
	}
	return s.putWord(word)
}

// openInner opens the inner map of the slot in force. Close it.
func (s *State) openInner(maps *ebpf.Map, word rulesWord) (*ebpf.Map, error) {
	var inner *ebpf.Map

	if err := maps.Lookup(word.slot(), &inner); err != nil {
		return nil, fmt.Errorf("open the rules in force: %w", err)
	}
	return inner, nil
}

// putPrefixes writes the list of a rule that is not there yet.
func (s *State) putPrefixes(word rulesWord, id uint32, list []netip.Prefix) error {
	if len(list) == 0 {
		return nil
	}
	inner, err := s.openInner(s.m.RulePrefixes, word)
	if err != nil {
		return err
	}
	defer inner.Close()
	var c content
	c.addPrefixes(id, list)
	if err := wholeIfFull(writeAll(inner, c.prefixKeys, c.prefixes)); err != nil {
		return fmt.Errorf("write the rule's prefixes: %w", err)
	}
	return nil
}

// putNew adds an element that must not be there.
func putNew(m *ebpf.Map, key, value any) error {
	return wholeIfFull(m.Update(key, value, ebpf.UpdateNoExist))
}

// wholeIfFull turns a map's word for "full" into errWhole: made anew, it has room.
func wholeIfFull(err error) error {
	if errors.Is(err, syscall.E2BIG) || errors.Is(err, syscall.ENOSPC) {
		return errWhole
	}
	return err
}

// lookup is the element that a key finds, or nil.
func lookup[V any](m *ebpf.Map, key any) (*V, error) {
	value := new(V)
	err := m.Lookup(key, value)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look a rule up: %w", err)
	}
	return value, nil
}

// lookupSource is the element that has this very key, or nil. The trie answers with the longest
// prefix of the key; it is the key itself when the key without its last bit has another answer.
func lookupSource(sources *ebpf.Map, key bpf.NATSnatKey) (*bpf.NATSnatRule, error) {
	found, err := lookup[bpf.NATSnatRule](sources, key)
	if err != nil || found == nil {
		return nil, err
	}
	key.Prefixlen--
	shorter, err := lookup[bpf.NATSnatRule](sources, key)
	if err != nil || shorter != nil && shorter.Id == found.Id {
		return nil, err
	}
	return found, nil
}
