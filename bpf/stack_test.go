package bpf_test

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
)

// Functions that call each other share 512 bytes of stack. Newer kernels count a frame in 16 bytes
// where the program is compiled to machine code, 6.1 always in 32: what loads here may not load there.
func TestStack(t *testing.T) {
	const limit, unit, frames = 512, 32, 8
	spec := natSpec()
	for _, name := range slices.Sorted(maps.Keys(spec.Programs)) {
		one := spec.Copy()
		maps.DeleteFunc(one.Programs, func(n string, _ *ebpf.ProgramSpec) bool { return n != name })
		c, err := ebpf.NewCollectionWithOptions(one, ebpf.CollectionOptions{Programs: ebpf.ProgramOptions{LogLevel: ebpf.LogLevelStats}})
		if err != nil {
			t.Fatal(err)
		}
		depths := stackDepths(t, c.Programs[name].VerifierLog)
		c.Close()

		// functions in the order of their code, with what each calls
		var order []string
		calls := make(map[string][]string)
		async := make(map[string]bool)
		for i, ins := range spec.Programs[name].Instructions {
			if symbol := ins.Symbol(); symbol != "" && (i == 0 || !slices.Contains(order, symbol)) {
				order = append(order, symbol)
			}
			if (ins.IsFunctionCall() || ins.IsLoadOfFunctionPointer()) && ins.Reference() != "" {
				at := order[len(order)-1]
				calls[at] = append(calls[at], ins.Reference())
				async[ins.Reference()] = async[ins.Reference()] || ins.Reference() == "expiry_tick" // a timer's
			}
		}
		if len(order) != len(depths) {
			t.Errorf("%s: %d functions %v, %d stack depths %v", name, len(order), order, len(depths), depths)
			continue
		}
		frame := make(map[string]int)
		for i, function := range order {
			frame[function] = (max(depths[i], 1) + unit - 1) / unit * unit
		}
		var deepest func(function string) (int, []string)
		deepest = func(function string) (most int, way []string) {
			for _, callee := range calls[function] {
				if async[callee] {
					continue
				}
				if n, w := deepest(callee); n > most {
					most, way = n, w
				}
			}
			return most + frame[function], append([]string{fmt.Sprintf("%s %d", function, frame[function])}, way...)
		}
		n, way := deepest(order[0])
		t.Logf("%-18s %d: %s", name, n, strings.Join(way, ", "))
		if n > limit || len(way) > frames {
			t.Errorf("%s: %d bytes in %d frames: %v", name, n, len(way), way)
		}
	}
}

// stackDepths reads the bytes of stack of each function from the verifier's log.
func stackDepths(t *testing.T, log string) (depths []int) {
	t.Helper()
	for line := range strings.Lines(log) {
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "stack depth ")
		if !ok {
			continue
		}
		for part := range strings.SplitSeq(rest, "+") {
			n, err := strconv.Atoi(part)
			if err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			depths = append(depths, n)
		}
	}
	return depths
}
