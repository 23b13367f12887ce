package judge

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tcnat/loader"
)

var (
	seedFlag          = flag.Uint64("seed", 0, "draw conversations from this seed; 0: from a fixed one and from a random one")
	conversationFlag  = flag.Int("conversation", -1, "hold this conversation only, and print it")
	conversationsFlag = flag.Int("conversations", 0, "how many to hold of each seed; 0: 100,000 with TCNAT_TEST_LONG, else some thousand")
)

const (
	fixedSeed   = 20261123
	longRun     = 100_000
	shortRun    = 2000
	batch       = 2000 // conversations that are held together
	maxReports  = 3    // differences that are told in full; of the others a line says what they are,
	maxFindings = 200  // and after so many there are no more
)

// errUnattributed indicates a packet that belongs to no conversation.
var errUnattributed = errors.New("a packet of no conversation")

// TestJudge holds the same conversations in both worlds: with every packet through the host's
// stack, and with the fast path.
func TestJudge(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, mode := range []loader.FastPath{loader.FastPathEstablished, loader.FastPathOff, loader.FastPathAlways} {
		t.Run(mode.String(), func(t *testing.T) { judgeMode(t, mode) })
	}
}

func judgeMode(t *testing.T, mode loader.FastPath) {
	j := newJudge(t, mode)
	seeds := []uint64{*seedFlag}
	if *seedFlag == 0 {
		seeds = []uint64{fixedSeed, rand.Uint64N(1<<32) + 1}
	}
	n := *conversationsFlag
	switch {
	case n > 0:
	case os.Getenv("TCNAT_TEST_LONG") != "":
		n = longRun
	default:
		n = shortRun
	}
	if mode != loader.FastPathEstablished {
		n = (n + 3) / 4 // the default has most
	}
	for _, seed := range seeds {
		numbers := make([]int, n)
		for i := range numbers {
			numbers[i] = i
		}
		if *conversationFlag >= 0 {
			numbers = []int{*conversationFlag}
		}
		start := time.Now()
		j.hold(t, seed, numbers)
		t.Logf("seed %d: %d conversations, %d packets in each world, %s; known differences: %v",
			seed, len(numbers), j.packets, time.Since(start).Round(time.Millisecond), sorted(j.known))
		if t.Failed() {
			break
		}
	}
	if t.Failed() {
		t.Logf("tcnat counted: %s", j.counters())
	}
}

// judge has the two worlds.
type judge struct {
	worlds   [worldCount]*world
	counters func() string
	mode     loader.FastPath
	packets  int
	known    map[string]int // conversations, by known difference
	findings int
}

func newJudge(t *testing.T, mode loader.FastPath) *judge {
	t.Helper()
	j := &judge{mode: mode, known: map[string]int{}}
	j.worlds[netfilter] = newWorld(t, "netfilter")
	j.worlds[tcnat] = newWorld(t, "tcnat")
	useNetfilter(t, j.worlds[netfilter])
	j.counters = useTcnat(t, j.worlds[tcnat], mode)
	stayOnOneCPU(t)
	return j
}

// stayOnOneCPU keeps the test's goroutine on one CPU: see barrier.
func stayOnOneCPU(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	var before, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		t.Fatal(err)
	}
	for cpu := range 1024 {
		if before.IsSet(cpu) {
			one.Set(cpu)
			break
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.SchedSetaffinity(0, &before)
		runtime.UnlockOSThread()
	})
}

// hold holds conversations, so many at a time.
func (j *judge) hold(t *testing.T, seed uint64, numbers []int) {
	t.Helper()
	j.packets = 0
	clear(j.known)
	for together := range slices.Chunk(numbers, batch) {
		for _, w := range j.worlds {
			if err := w.fresh(); err != nil {
				t.Fatal(err)
			}
		}
		trials := map[int]*trial{}
		steps := 0
		for _, number := range together {
			s := newScript(seed, number, features{})
			c := &trial{script: s, mode: j.mode}
			for i, w := range j.worlds {
				c.views[i] = newView(s, w)
			}
			trials[number%blocks] = c
			steps = max(steps, len(s.steps))
		}
		for at := range steps {
			if err := j.step(trials, at); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			for _, number := range together {
				c := trials[number%blocks]
				if c.over || at >= len(c.steps) {
					continue
				}
				d := c.finish(at)
				if *conversationFlag >= 0 {
					t.Log(c.report(at))
				}
				if d != nil {
					j.judge(t, seed, d)
				}
			}
			if j.findings >= maxFindings {
				return
			}
		}
	}
}

// step sends one packet of each conversation in both worlds, and collects what arrives.
func (j *judge) step(trials map[int]*trial, at int) error {
	order := slices.Sorted(maps.Keys(trials))
	for _, block := range order {
		c := trials[block]
		if c.over || at >= len(c.steps) {
			continue
		}
		if err := c.begin(at); err != nil {
			return err
		}
		s := c.steps[at]
		for i, w := range j.worlds {
			if c.sent[i] == nil {
				continue
			}
			if err := w.ends[c.flows[s.flow].endOf(s.from)].send(c.sent[i], s.shape.padding); err != nil {
				return err
			}
		}
		j.packets++
	}
	for i, w := range j.worlds {
		var stray error
		err := w.barrier(func(end int, ip []byte) {
			c := attribute(trials, ip)
			if c == nil {
				stray = fmt.Errorf("%s, at %s, step %d: %w: %s", w.name, w.ends[end].name, at, errUnattributed, describe(ip))
				return
			}
			if !c.over {
				c.arrived[i][end] = append(c.arrived[i][end], ip)
			}
		})
		if err := errors.Join(err, stray); err != nil {
			return err
		}
	}
	return nil
}

// attribute finds the conversation that a packet is of, by the outside address in it or in what it
// quotes.
func attribute(trials map[int]*trial, ip []byte) *trial {
	for range 2 {
		h, ok := parse(ip)
		if !ok {
			return nil
		}
		for _, a := range []netip.Addr{h.dst, h.src} {
			if block, ok := blockOf(a); ok {
				return trials[block]
			}
		}
		if !isICMP(h.protocol) || h.l4+icmpSize > len(ip) {
			return nil
		}
		ip = ip[h.l4+icmpSize:]
	}
	return nil
}

// judge says whether a difference is a known one, and fails the test if not. The conversation is
// over with it, unless nothing follows from it.
func (j *judge) judge(t *testing.T, seed uint64, d *difference) {
	t.Helper()
	for _, k := range knownDifferences() {
		if k.matches(d) {
			j.known[k.name]++
			d.over = !k.goesOn
			return
		}
	}
	d.over = true
	j.findings++
	if j.findings > maxReports {
		t.Errorf("-conversation %d: %s", d.number, d.line())
	} else {
		t.Errorf("fast path %s, seed %d: %s\nagain: go test ./internal/judge -run 'TestJudge/%s' -seed %d -conversation %d",
			j.mode, seed, d, j.mode, seed, d.number)
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
