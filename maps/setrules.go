package maps

import (
	"fmt"
	"maps"
	"slices"
)

// Rules reads the rules in force, sorted by what they match, with their ids. A writer at
// the same time may change them under the reader: hold the instance's lock, shared.
func (s *State) Rules() (Rules, error) {
	slot, err := s.slotInForce()
	if err != nil {
		return Rules{}, err
	}
	rules, _, err := s.readSlot(slot)
	return rules, err
}

// SetRules puts a set of rules in force, all at once: a packet sees the old rules or the new
// ones. Flows of rules that are gone or changed end; when an SNAT rule is, or is new, flows
// that no rule translates are decided anew. An unchanged rule keeps its id and its flows.
//
// The error is an ErrInvalidRule, ErrNotBuilt, ErrRuleOverlap or ErrTooManyRules, or says
// which map refused; the old rules are then in force still.
func (s *State) SetRules(want Rules) error {
	want, err := want.normalize()
	if err != nil {
		return err
	}
	slot, err := s.slotInForce()
	if err != nil {
		return err
	}
	have, carried, err := s.readSlot(slot)
	if err != nil {
		return err
	}
	if err := s.endLeftOver(1-slot, carried); err != nil {
		return err
	}
	if err := assignIDs(&want, have, s.m.Generations.MaxEntries()); err != nil {
		return err
	}
	generations, err := s.generationsOf(want)
	if err != nil {
		return err
	}
	if equalRules(have, want) && maps.Equal(carried, generations) {
		return nil
	}
	if err := s.fill(1-slot, newContent(want, generations)); err != nil {
		return fmt.Errorf("set rules: %w", err)
	}
	if err := s.switchRules(1 - slot); err != nil {
		return err
	}
	return s.raise(goneIDs(have, want))
}

// slotInForce is the slot of the rule set in force, 0 or 1.
func (s *State) slotInForce() (uint32, error) {
	raw, err := s.rawConfig()
	if err != nil {
		return 0, err
	}
	return uint32(raw.Rules & 1), nil
}

// switchRules puts the set of a slot in force. It is the commit of SetRules.
func (s *State) switchRules(slot uint32) error {
	raw, err := s.rawConfig()
	if err != nil {
		return err
	}
	raw.Rules = uint64(slot)
	return s.putConfig(raw)
}

func (s *State) readSlot(slot uint32) (Rules, map[uint32]uint32, error) {
	set, err := s.openSet(slot)
	if err != nil {
		return Rules{}, nil, err
	}
	defer set.Close()
	return set.read()
}

// endLeftOver ends the flows of rules that a SetRules took out of force and was killed
// before it could end them: the set before is still in the other slot. carried are the ids
// in force. What never was in force has no flows, so raising it harms nobody.
func (s *State) endLeftOver(other uint32, carried map[uint32]uint32) error {
	_, old, err := s.readSlot(other)
	if err != nil {
		return err
	}
	var left []uint32
	for id, generation := range old {
		if _, inForce := carried[id]; inForce {
			continue
		}
		now, err := s.generation(id)
		if err != nil {
			return err
		}
		if now == generation {
			left = append(left, id)
		}
	}
	return s.raise(left)
}

// assignIDs gives each wanted rule the id that it has already, or one that is free: neither
// in force nor assigned, so that an id never stands for two rules at the moment of the switch.
func assignIDs(want *Rules, have Rules, limit uint32) error {
	used := map[uint32]bool{0: true}
	snat := map[snatKey]SNATRule{}
	for _, r := range have.SNAT {
		snat[r.key()] = r
		used[r.ID] = true
	}
	dnat := map[dnatKey]DNATRule{}
	for _, r := range have.DNAT {
		dnat[r.key()] = r
		used[r.ID] = true
	}

	next := uint32(1)
	free := func() (uint32, error) {
		for used[next] {
			next++
		}
		if next >= limit {
			return 0, faultf(ErrTooManyRules, "%d rules: no id is free (there are %d, and the rules in force keep theirs): delete some first",
				len(want.SNAT)+len(want.DNAT), limit-1)
		}
		used[next] = true
		return next, nil
	}
	for i := range want.SNAT {
		r := &want.SNAT[i]
		if old, ok := snat[r.key()]; ok && r.same(old) {
			r.ID = old.ID
			continue
		}
		id, err := free()
		if err != nil {
			return err
		}
		r.ID = id
	}
	for i := range want.DNAT {
		r := &want.DNAT[i]
		if old, ok := dnat[r.key()]; ok && r.same(old) {
			r.ID = old.ID
			continue
		}
		id, err := free()
		if err != nil {
			return err
		}
		r.ID = id
	}
	return nil
}

// goneIDs are the ids in have that want has no more, and 0 when SNAT rules differ.
func goneIDs(have, want Rules) []uint32 {
	kept := map[uint32]bool{}
	for _, r := range want.SNAT {
		kept[r.ID] = true
	}
	for _, r := range want.DNAT {
		kept[r.ID] = true
	}
	var gone []uint32
	if !slices.EqualFunc(have.SNAT, want.SNAT, SNATRule.same) {
		gone = append(gone, 0)
	}
	for _, r := range have.SNAT {
		if !kept[r.ID] {
			gone = append(gone, r.ID)
		}
	}
	for _, r := range have.DNAT {
		if !kept[r.ID] {
			gone = append(gone, r.ID)
		}
	}
	return gone
}

// generation is the current generation of a rule id.
func (s *State) generation(id uint32) (uint32, error) {
	var generation uint32

	if err := s.m.Generations.Lookup(id, &generation); err != nil {
		return 0, fmt.Errorf("read generation of rule %d: %w", id, err)
	}
	return generation, nil
}

func (s *State) generationsOf(rules Rules) (map[uint32]uint32, error) {
	out := map[uint32]uint32{}
	for _, r := range rules.SNAT {
		out[r.ID] = 0
	}
	for _, r := range rules.DNAT {
		out[r.ID] = 0
	}
	for id := range out {
		generation, err := s.generation(id)
		if err != nil {
			return nil, err
		}
		out[id] = generation
	}
	return out, nil
}

// raise raises the generations of ids, which ends their flows, in as few calls as possible:
// a process is not killed within one.
func (s *State) raise(ids []uint32) error {
	generations := make([]uint32, len(ids))
	for i, id := range ids {
		generation, err := s.generation(id)
		if err != nil {
			return err
		}
		generations[i] = generation + 1
	}
	if err := writeAll(s.m.Generations, ids, generations); err != nil {
		return fmt.Errorf("end the flows of %d rules: %w", len(ids), err)
	}
	return nil
}
