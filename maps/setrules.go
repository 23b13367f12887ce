package maps

import (
	"fmt"
	"slices"
)

// Rules reads the rules in force, sorted by what they match, with their ids. A writer at
// the same time may change them under the reader: hold the instance's lock, shared.
func (s *State) Rules() (Rules, error) {
	slot, err := s.slotInForce()
	if err != nil {
		return Rules{}, err
	}
	read, err := s.readSlot(slot)
	if err != nil {
		return Rules{}, err
	}
	return read.rules, nil
}

// SetRules puts a set of rules in force, all at once: a packet sees the old rules or the new
// ones. Flows of rules that are gone or changed end; when an SNAT rule is, or is new, flows
// that no rule translates are decided anew. An unchanged rule keeps its id and its flows.
//
// The error is an ErrInvalidRule, ErrRuleOverlap or ErrTooManyRules, or says
// which map refused; the old rules are then in force still.
func (s *State) SetRules(want Rules) error {
	want, err := want.normalize()
	if err != nil {
		return err
	}
	word, err := s.rulesToChange()
	if err != nil {
		return err
	}
	have, err := s.readSlot(word.slot())
	if err != nil {
		return err
	}
	return s.replaceRules(word, have, want)
}

// ChangeRules is SetRules of what change makes of the rules in force, which it reads once. When
// change says that it changed nothing, neither does ChangeRules.
func (s *State) ChangeRules(change func(*Rules) (changed bool, err error)) (changed bool, err error) {
	word, err := s.rulesToChange()
	if err != nil {
		return false, err
	}
	have, err := s.readSlot(word.slot())
	if err != nil {
		return false, err
	}
	want := have.rules.clone()
	if changed, err := change(&want); err != nil || !changed {
		return false, err
	}
	if want, err = want.normalize(); err != nil {
		return false, err
	}
	return true, s.replaceRules(word, have, want)
}

// replaceRules puts want, which is normalized, in force instead of have.
func (s *State) replaceRules(word rulesWord, have slotRules, want Rules) error {
	limit := s.m.Generations.MaxEntries()
	if err := assignIDs(&want, have.rules, limit); err != nil {
		return err
	}
	generations, err := s.generationsOf(want.ids())
	if err != nil {
		return err
	}
	if equalRules(have.rules, want) && slices.Equal(have.generations, generations) {
		return nil
	}
	// What is gone keeps its id until its flows have ended.
	used := slices.Clone(have.generations)
	for _, id := range want.ids() {
		used.set(id, 0)
	}
	if err := s.prepareAffinities(want); err != nil {
		return fmt.Errorf("set rules: %w", err)
	}
	content := newContent(want, generations)
	if err := s.fill(1-word.slot(), have, content); err != nil {
		return fmt.Errorf("set rules: %w", err)
	}
	next := (content.kinds() | rulesWord(1-word.slot())).withFree(freeIDs(used, limit))
	if err := s.switchRules(word, next|wordSwitched); err != nil {
		return err
	}
	if err := s.raise(goneIDs(have.rules, want)); err != nil {
		return err
	}
	if err := s.putWord(next); err != nil {
		return err
	}
	s.dropAffinities(want)
	return nil
}

func (s *State) word() (rulesWord, error) {
	raw, err := s.rawConfig()
	return rulesWord(raw.Rules), err
}

func (s *State) putWord(word rulesWord) error {
	raw, err := s.rawConfig()
	if err != nil {
		return err
	}
	if raw.Rules == uint64(word) {
		return nil
	}
	raw.Rules = uint64(word)
	return s.putConfig(raw)
}

// slotInForce is the slot of the rule set in force, 0 or 1.
func (s *State) slotInForce() (uint32, error) {
	word, err := s.word()
	return word.slot(), err
}

// switchRules puts the set that next names in force: the commit of SetRules. Programs may read
// some of the word's bytes before others, so the slot, which is in one of them, changes
// while the kinds are those of both sets.
func (s *State) switchRules(word, next rulesWord) error {
	if err := s.putWord(word | next.kinds()); err != nil {
		return err
	}
	return s.putWord(next | word.kinds())
}

// slotRules are the rules that a slot holds, as read from it.
type slotRules struct {
	rules       Rules // sorted
	generations carried
	elements    [kindsOfMaps]int // by outers
	slot        uint32
}

func (s *State) readSlot(slot uint32) (slotRules, error) {
	set, err := s.openSet(slot)
	if err != nil {
		return slotRules{}, err
	}
	defer set.Close()
	read, err := set.read()
	read.slot = slot
	return read, err
}

// rulesToChange is the word, with nothing left to finish: what a call that was killed had
// still to do is done.
func (s *State) rulesToChange() (rulesWord, error) {
	word, err := s.word()
	if err != nil || !word.unfinished() {
		return word, err
	}
	now, err := s.readSlot(word.slot())
	if err != nil {
		return 0, err
	}
	var left []uint32
	if id := word.leaving(); id != 0 && !now.generations.has(id) {
		left = append(left, id)
	}
	if word&wordUnruled != 0 {
		left = append(left, 0)
	}
	if word&wordSwitched != 0 {
		before, err := s.readSlot(1 - word.slot())
		if err != nil {
			return 0, err
		}
		left = append(left, goneIDs(before.rules, now.rules)...)
	}
	if err := s.raise(left); err != nil {
		return 0, err
	}
	word = word.finished()
	return word, s.putWord(word)
}

// assignIDs gives each wanted rule the id that it has already, or one that is free: neither
// in force nor assigned, so that an id never stands for two rules at the moment of the switch.
// Both sets are sorted.
func assignIDs(want *Rules, have Rules, limit uint32) error {
	var used carried
	for _, id := range have.ids() {
		used.set(id, 0)
	}
	next := uint32(1)
	free := func() (uint32, error) {
		for used.has(next) {
			next++
		}
		if next >= limit {
			return 0, faultf(ErrTooManyRules, "%d rules: no id is free (there are %d, and the rules in force keep theirs): delete some first",
				len(want.SNAT)+len(want.DNAT), limit-1)
		}
		next++
		return next - 1, nil
	}
	snat := have.SNAT
	for i := range want.SNAT {
		r := &want.SNAT[i]
		if old := advance(&snat, r, compareSNAT); old != nil && r.same(*old) {
			r.ID = old.ID
			continue
		}
		id, err := free()
		if err != nil {
			return err
		}
		r.ID = id
	}
	dnat := have.DNAT
	for i := range want.DNAT {
		r := &want.DNAT[i]
		old := advance(&dnat, r, compareDNAT)
		if err := r.assignIDs(old, free); err != nil {
			return err
		}
	}
	return nil
}

// assignIDs gives a rule and its targets ids: those of old, the rule with the same ports so far, where it is the
// same. When they differ in targets alone, one that stays keeps its id, and so its flows; the id of a rule with one
// target is that of the target.
func (r *DNATRule) assignIDs(old *DNATRule, free func() (uint32, error)) (err error) {
	if old != nil && (r.key() != old.key() || !slices.Equal(r.Allow, old.Allow)) {
		old = nil
	}
	targets := slices.Clone(r.Targets())
	for i := range targets {
		if old != nil {
			if was := old.target(targets[i]); was != nil {
				targets[i].ID = was.ID
				continue
			}
		}
		if targets[i].ID, err = free(); err != nil {
			return err
		}
	}
	if !r.hasBackends() {
		r.ID = targets[0].ID
		return nil
	}
	r.Backends = targets
	if old != nil && old.hasBackends() {
		r.ID = old.ID
		return nil
	}
	r.ID, err = free()
	return err
}

// advance is the rule of a sorted list that is equal to r by compare, or nil. It cuts off those
// that come before.
func advance[R any](list *[]R, r *R, compare func(a, b *R) int) *R {
	for len(*list) > 0 {
		switch c := compare(&(*list)[0], r); {
		case c == 0:
			return &(*list)[0]
		case c > 0:
			return nil
		}
		*list = (*list)[1:]
	}
	return nil
}

// ids are the rules' ids.
func (rs Rules) ids() []uint32 {
	ids := make([]uint32, 0, len(rs.SNAT)+len(rs.DNAT))
	for i := range rs.SNAT {
		ids = append(ids, rs.SNAT[i].ID)
	}
	for i := range rs.DNAT {
		ids = append(ids, rs.DNAT[i].ID)
		for _, t := range rs.DNAT[i].Backends {
			ids = append(ids, t.ID)
		}
	}
	return ids
}

// goneIDs are the ids in have that want has no more, and 0 when SNAT rules differ.
func goneIDs(have, want Rules) []uint32 {
	var (
		kept carried
		gone []uint32
	)
	for _, id := range want.ids() {
		kept.set(id, 0)
	}
	if !slices.EqualFunc(have.SNAT, want.SNAT, SNATRule.same) {
		gone = append(gone, 0)
	}
	for _, id := range have.ids() {
		if !kept.has(id) {
			gone = append(gone, id)
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

// manyIDs is the number of ids from which reading all generations is faster.
const manyIDs = 4096

// generationsOf are the current generations of ids.
func (s *State) generationsOf(ids []uint32) (carried, error) {
	var out, all carried

	if len(ids) >= manyIDs {
		all = make(carried, 0, s.m.Generations.MaxEntries())
		if err := readAll(s.m.Generations, func(id, generation uint32) { all.set(id, generation) }); err != nil {
			return nil, fmt.Errorf("read generations: %w", err)
		}
	}
	for _, id := range ids {
		if all.has(id) {
			out.set(id, all.generation(id))
			continue
		}
		generation, err := s.generation(id)
		if err != nil {
			return nil, err
		}
		out.set(id, generation)
	}
	return out, nil
}

// raise raises the generations of ids, which ends their flows, in as few calls as possible:
// a process is not killed within one.
func (s *State) raise(ids []uint32) error {
	now, err := s.generationsOf(ids)
	if err != nil {
		return err
	}
	slices.Sort(ids)
	ids = slices.Compact(ids)
	generations := make([]uint32, len(ids))
	for i, id := range ids {
		generations[i] = now.generation(id) + 1
	}
	if err := writeAll(s.m.Generations, ids, generations); err != nil {
		return fmt.Errorf("end the flows of %d rules: %w", len(ids), err)
	}
	return nil
}
