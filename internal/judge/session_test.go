package judge

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"tcnat/loader"
	natmaps "tcnat/maps"
)

// batch is how many conversations are held together.
const batch = 2000

// errUnattributed indicates a packet that belongs to no conversation.
var errUnattributed = errors.New("a packet of no conversation")

// judge has the two worlds.
type judge struct {
	worlds   [worldCount]*world
	counters func() string
	mode     loader.FastPath
	tell     func(...any) // nil, or told what each step came to
	strict   string       // a known difference that is a failure nevertheless
	on       features

	packets int            // in each world
	known   map[string]int // conversations, by known difference
}

// newJudge builds both worlds. change alters the rules of tcnat's, nil: not at all.
func newJudge(t *testing.T, o loader.AttachOptions, change func(*natmaps.Rules)) *judge {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	j := &judge{mode: o.FastPath, known: map[string]int{}}
	j.worlds[netfilter] = newWorld(t, "netfilter")
	j.worlds[tcnat] = newWorld(t, "tcnat")
	useNetfilter(t, j.worlds[netfilter])
	j.counters = useTcnat(t, j.worlds[tcnat], o, change)
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

// hold holds conversations, so many at a time, and returns the differences that are not known: the
// first of each conversation.
func (j *judge) hold(seed uint64, numbers []int) (findings []*difference, err error) {
	j.packets = 0
	clear(j.known)
	for together := range slices.Chunk(numbers, batch) {
		found, err := j.holdTogether(seed, together)
		findings = append(findings, found...)
		if err != nil || len(findings) >= maxFindings {
			return findings, err
		}
	}
	return findings, nil
}

func (j *judge) holdTogether(seed uint64, numbers []int) (findings []*difference, err error) {
	for _, w := range j.worlds {
		if err := w.fresh(); err != nil {
			return nil, err
		}
	}
	trials := map[int]*trial{}
	steps := 0
	for _, number := range numbers {
		c := &trial{script: newScript(seed, number, j.on), mode: j.mode}
		for i, w := range j.worlds {
			c.views[i] = newView(c.script, w)
		}
		trials[number%blocks] = c
		steps = max(steps, len(c.steps))
	}
	order := slices.Sorted(maps.Keys(trials))
	for at := range steps {
		if err := j.step(trials, order, at); err != nil {
			return findings, err
		}
		for _, block := range order {
			c := trials[block]
			if c.over || at >= len(c.steps) {
				continue
			}
			d := c.finish(at)
			if j.tell != nil {
				j.tell(c.report(at))
			}
			if d != nil && !j.knows(d) {
				findings = append(findings, d)
			}
		}
	}
	return findings, nil
}

// step sends one packet of each conversation in both worlds, and collects what arrives.
func (j *judge) step(trials map[int]*trial, order []int, at int) error {
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
			for _, ip := range s.shape.split(c.sent[i]) {
				if err := w.ends[c.flows[s.flow].endOf(s.from)].send(ip, s.shape.padding); err != nil {
					return err
				}
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

// knows tells whether a difference is a known one. The conversation is over with it, unless nothing
// follows from it.
func (j *judge) knows(d *difference) bool {
	d.over = true
	for _, k := range knownDifferences() {
		if k.matches(d) {
			if k.is(j.strict) {
				return false
			}
			j.known[k.name]++
			if k.goesOn {
				d.over = false
				d.note(d.step)
			}
			return true
		}
	}
	return false
}
