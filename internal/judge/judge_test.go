package judge

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"tcnat/loader"
	natmaps "tcnat/maps"
)

var (
	seedFlag          = flag.Uint64("seed", 0, "draw conversations from this seed; 0: from a fixed one and from a random one")
	conversationFlag  = flag.Int("conversation", -1, "hold this conversation only, and tell each step")
	conversationsFlag = flag.Int("conversations", 0, "how many to hold of each seed; 0: 100,000 with TCNAT_TEST_LONG, else some thousand")
	strictFlag        = flag.String("strict", "", "fail also for this known difference: its name, a bug as \"judge 1\", or all")
)

const (
	fixedSeed = 20261123
	longRun   = 100_000
	shortRun  = 4000
	// Differences that are told in full. Of the others a line says what they are, and after so many
	// there are no more.
	maxReports, maxFindings = 3, 200
)

// TestJudge holds the same conversations in both worlds: with the fast path, with every packet
// through the host's stack, and with the fast path from the first packet on.
func TestJudge(t *testing.T) {
	for _, mode := range []loader.FastPath{loader.FastPathEstablished, loader.FastPathOff, loader.FastPathAlways} {
		t.Run(mode.String(), func(t *testing.T) {
			j := newJudge(t, loader.AttachOptions{FastPath: mode}, nil)
			j.strict = *strictFlag
			n := conversations()
			if mode != loader.FastPathEstablished {
				n = (n + 3) / 4 // the default has most
			}
			for _, seed := range seeds() {
				if judgeSeed(t, j, seed, n); t.Failed() {
					break
				}
			}
		})
	}
}

func seeds() []uint64 {
	if *seedFlag != 0 {
		return []uint64{*seedFlag}
	}
	if os.Getenv("TCNAT_TEST_LONG") == "" {
		// The known ones: what a change brings should not depend on the day. New ones are for the long run.
		return []uint64{fixedSeed, fixedSeed + 1}
	}
	return []uint64{fixedSeed, rand.Uint64N(1<<32) + 1}
}

func conversations() int {
	switch {
	case *conversationsFlag > 0:
		return *conversationsFlag
	case os.Getenv("TCNAT_TEST_LONG") != "":
		return longRun
	}
	return shortRun
}

// judgeSeed holds the first n conversations of a seed, or the one that a flag asks for.
func judgeSeed(t *testing.T, j *judge, seed uint64, n int) {
	t.Helper()
	var numbers []int
	for i := range n {
		numbers = append(numbers, i)
	}
	if *conversationFlag >= 0 {
		numbers = []int{*conversationFlag}
		j.tell = t.Log
	}
	start := time.Now()
	findings, err := j.hold(seed, numbers)
	t.Logf("seed %d: %d conversations, %d packets in each world, %s; known differences: %v",
		seed, len(numbers), j.packets, time.Since(start).Round(time.Millisecond), sorted(j.known))
	for i, d := range findings {
		if i < maxReports {
			t.Errorf("%s\nagain: go test ./internal/judge -v -run '%s' -seed %d -conversation %d -strict %q",
				d, t.Name(), seed, d.number, *strictFlag)
		} else {
			t.Errorf("-seed %d -conversation %d: %s", seed, d.number, d.line())
		}
	}
	if err != nil {
		t.Errorf("seed %d: %v", seed, err)
	}
	if t.Failed() {
		t.Logf("tcnat counted: %s", j.counters())
	}
}

// sorted lists counts, the highest first.
func sorted(counts map[string]int) []string {
	names := slices.SortedFunc(maps.Keys(counts), func(a, b string) int { return counts[b] - counts[a] })
	for i, name := range names {
		names[i] = fmt.Sprintf("%s: %d", name, counts[name])
	}
	return names
}

// TestJudgeSees checks that worlds which do differ are told apart.
func TestJudgeSees(t *testing.T) {
	const few = 400
	for _, tc := range []struct {
		name    string
		options loader.AttachOptions
		change  func(*natmaps.Rules)
	}{
		{"a published port that leads elsewhere", loader.AttachOptions{}, func(rules *natmaps.Rules) {
			for i := range rules.DNAT {
				if rule := &rules.DNAT[i]; rule.Ports.First == 3005 {
					rule.ToPorts.First, rule.ToPorts.Last = 3006, 3006
				}
			}
		}},
		{"a published port that is not", loader.AttachOptions{}, func(rules *natmaps.Rules) {
			rules.DNAT = slices.DeleteFunc(rules.DNAT, func(r natmaps.DNATRule) bool { return r.Ports.First == 3080 })
		}},
		{"another source address", loader.AttachOptions{}, func(rules *natmaps.Rules) {
			rules.SNAT = slices.DeleteFunc(rules.SNAT, func(r natmaps.SNATRule) bool { return !r.Masquerade })
		}},
		{"containers reached by their own address", loader.AttachOptions{AllowDirect: true}, nil},
		{"containers that are routed", loader.AttachOptions{NoMasquerade: true}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			j := newJudge(t, tc.options, tc.change)
			var numbers []int
			for i := range few {
				numbers = append(numbers, i)
			}
			findings, err := j.hold(fixedSeed, numbers)
			if err == nil && len(findings) == 0 {
				t.Errorf("%d conversations, and no difference", few)
			}
		})
	}
}
