package maps

import (
	"bufio"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
)

// What a call notes before it changes anything is finished by the next one, whatever that does.
func TestKilledWhileTakingOut(t *testing.T) {
	for name, test := range map[string]struct {
		gone bool
		note func(rulesWord, uint32) rulesWord
		want map[uint32]uint32
	}{
		"before": {false, func(w rulesWord, id uint32) rulesWord { return w.withLeaving(id) }, map[uint32]uint32{0: 1}},
		"after":  {true, func(w rulesWord, id uint32) rulesWord { return w.withLeaving(id) }, map[uint32]uint32{0: 1, 2: 1}},
		"SNAT":   {false, func(w rulesWord, _ uint32) rulesWord { return w | wordUnruled }, map[uint32]uint32{0: 2}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newState(t)
			rules := set(t, s, Rules{SNAT: []SNATRule{snat()}, DNAT: []DNATRule{dnat()}})
			word := must[rulesWord](t)(s.word())
			if err := s.putWord(test.note(word, rules.DNAT[0].ID)); err != nil {
				t.Fatal(err)
			}
			if test.gone {
				ports := must[*ebpf.Map](t)(s.openInner(s.m.DnatPorts, word))
				defer ports.Close()
				if err := ports.Delete(rules.DNAT[0].portKey()); err != nil {
					t.Fatal(err)
				}
			}
			for range 2 {
				if changed, err := s.DeleteDNAT(dnat(func(r *DNATRule) { r.Ports = SinglePort(9) })); err != nil || changed {
					t.Fatal(changed, err)
				}
				if d := diff(test.want, generations(t, s)); d != "" {
					t.Error(d)
				}
			}
		})
	}
}

// What would be left to do is noted before the update, and no longer after it; an update that
// fails changes nothing.
func TestTakeOutNotes(t *testing.T) {
	s := newState(t)
	rule := set(t, s, Rules{DNAT: []DNATRule{dnat()}}).DNAT[0]
	word, raised := must[rulesWord](t)(s.word()), generations(t, s)
	for _, fail := range []error{ErrTooManyRules, nil} {
		err := s.takeOut(word, []uint32{0, rule.ID}, func() error {
			if now := must[rulesWord](t)(s.word()); now.leaving() != rule.ID || now&wordUnruled == 0 {
				t.Errorf("word %#x at the update", now)
			}
			if d := diff(raised, generations(t, s)); d != "" {
				t.Errorf("at the update: %s", d)
			}
			return fail
		})
		if !errors.Is(err, fail) {
			t.Errorf("error %v, want %v", err, fail)
		}
		if now := must[rulesWord](t)(s.word()); now != word {
			t.Errorf("word %#x, was %#x", now, word)
		}
		if fail == nil {
			raised[0]++
			raised[rule.ID]++
		}
		if d := diff(raised, generations(t, s)); d != "" {
			t.Errorf("after the update: %s", d)
		}
	}
}

// killed is what a child of TestKilledAnywhere tells after each change that is done.
type killed struct {
	Done  int
	Rules map[uint32]uint32 // generation by id
}

const (
	killedSeed  = "TCNAT_TEST_KILLED_SEED"
	killedBound = 40 // rules at most, so that a change takes most of the time
)

// killedWorld makes the changes that parent and child both know.
func killedWorld(seed uint64) world { return world{rand.New(rand.NewPCG(seed, 2))} }

// next is a change that keeps the set small, and what the rules are after it.
func (w world) next(t *testing.T, rules Rules) (change, Rules) {
	c := w.change(rules)
	if len(rules.DNAT)+len(rules.SNAT) > killedBound {
		none := func(rules *Rules) (bool, error) { *rules = Rules{}; return true, nil }
		c = change{"no rules", func(s *State) (bool, error) { return s.ChangeRules(none) }, none}
	}
	after := rules.clone()
	_, _ = c.rules(&after)
	after, err := after.normalize()
	if err != nil {
		t.Fatal(err)
	}
	return c, after
}

// sharedMaps are those that a child gets, in this order.
func (s *State) sharedMaps() []**ebpf.Map {
	return []**ebpf.Map{
		&s.m.Config, &s.m.Generations, &s.m.DnatPorts, &s.m.DnatRanges, &s.m.SnatSources, &s.m.RulePrefixes,
		&s.m.Backends, &s.m.Affinities,
	}
}

func carriedNow(t *testing.T, s *State) map[uint32]uint32 {
	t.Helper()

	read := must[slotRules](t)(s.readSlot(must[uint32](t)(s.slotInForce())))
	out := map[uint32]uint32{}
	for _, id := range read.rules.ids() {
		out[id] = read.generations.generation(id)
	}
	return out
}

// A process that changes rules is killed at any instant. The rules are those before the call
// or those after it; the next call works, and ends the flows of every rule that is gone.
func TestKilledAnywhere(t *testing.T) {
	if text := os.Getenv(killedSeed); text != "" {
		beKilled(t, text)
		return
	}
	s := newState(t)
	var model Rules
	history := map[[2]uint32]bool{} // id and generation that some rule has had
	halfway := 0
	for range 60 {
		seed := rand.Uint64()
		done := runKilled(t, s, seed, history)
		now := must[Rules](t)(s.Rules())
		for id, generation := range carriedNow(t, s) {
			history[[2]uint32{id, generation}] = true
		}
		if must[rulesWord](t)(s.word()).unfinished() {
			halfway++
		}
		w := killedWorld(seed)
		var words string
		for range done {
			_, model = w.next(t, model)
		}
		c, after := w.next(t, model)
		words = c.words
		if diff(after, withoutIDs(now)) == "" {
			model = after
		} else if d := diff(model, withoutIDs(now)); d != "" {
			t.Fatalf("seed %d, killed within change %d (%s): the rules are neither those before nor those after: %s", seed, done, words, d)
		}
		if _, err := s.DeleteDNAT(dnat(func(r *DNATRule) { r.Ports, r.To = SinglePort(65000), netip.Addr{} })); err != nil {
			t.Fatal(err)
		}
		if d := diff(now, must[Rules](t)(s.Rules())); d != "" {
			t.Fatal(d)
		}
		checkNotes(t, s, now)
		current := carriedNow(t, s)
		for had := range history {
			id, generation := had[0], had[1]
			if carries, ok := current[id]; ok && carries == generation {
				continue
			}
			if is := must[uint32](t)(s.generation(id)); is == generation {
				t.Fatalf("seed %d, killed within change %d (%s): a rule with id %d is gone, and flows of its generation %d live on", seed, done, words, id, is)
			}
		}
	}
	t.Logf("%d ids and generations; %d of 60 were killed with something to finish", len(history), halfway)
	if halfway == 0 {
		t.Error("no kill was between a change and the end of its flows")
	}
}

// runKilled runs a child on the maps, kills it and returns how many changes it had done.
func runKilled(t *testing.T, s *State, seed uint64, history map[[2]uint32]bool) (done int) {
	t.Helper()

	cmd := exec.Command(os.Args[0], "-test.run=^TestKilledAnywhere$")
	cmd.Env = append(os.Environ(), killedSeed+"="+strconv.FormatUint(seed, 10))
	cmd.Stderr = os.Stderr
	for _, m := range s.sharedMaps() {
		file := os.NewFile(uintptr(must[int](t)(unix.Dup((*m).FD()))), "map")
		defer file.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, file)
	}
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	patience := time.Duration(30+rand.IntN(60)) * time.Millisecond
	if seed%2 == 0 { // it does so itself
		patience = time.Second
	}
	time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	lines := bufio.NewScanner(pipe)
	for lines.Scan() {
		var told killed
		if json.Unmarshal(lines.Bytes(), &told) != nil {
			break // killed while it wrote, or what a test prints at its end
		}
		done = told.Done
		for id, generation := range told.Rules {
			history[[2]uint32{id, generation}] = true
		}
	}
	_ = cmd.Wait()
	return done
}

// killHalfway kills this process while another thread has flows to end, as the word notes it or
// because it has just switched: by chance alone that is rare.
func killHalfway(s *State) {
	last, _ := s.word()
	for spare := rand.IntN(4); ; {
		word, err := s.word()
		if err != nil || !word.unfinished() && word.slot() == last.slot() {
			continue
		}
		if spare == 0 {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		}
		for spare--; word.unfinished(); {
			word, _ = s.word()
		}
		last = word
	}
}

// beKilled makes changes until it is killed.
func beKilled(t *testing.T, text string) {
	seed, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	s := &State{m: &bpf.NATMaps{}}
	for i, m := range s.sharedMaps() {
		if *m, err = ebpf.NewMapFromFD(3 + i); err != nil {
			t.Fatal(err)
		}
	}
	rules := withoutIDs(must[Rules](t)(s.Rules()))
	w := killedWorld(seed)
	if seed%2 == 0 {
		go killHalfway(s)
	}
	for done := 1; ; done++ {
		c, after := w.next(t, rules)
		_, _ = c.state(s)
		rules = after
		line := must[[]byte](t)(json.Marshal(killed{done, carriedNow(t, s)}))
		if _, err := os.Stdout.Write(append(line, '\n')); err != nil {
			return
		}
	}
}
