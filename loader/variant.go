package loader

import (
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
	"tcnat/maps"
)

// firstSuffix marks the programs that stand in for others with FastPathAlways: they take first
// packets on the fast path too.
const firstSuffix = "_first"

// variant is the name of the program that runs on a hook of that program's name.
func variant[T any](progs map[string]T, name string, fast maps.FastPath) string {
	if _, have := progs[name+firstSuffix]; have && fast == maps.FastPathAlways {
		return name + firstSuffix
	}
	return name
}

// l3Programs are for devices without link header.
func l3Programs() []string { return []string{bpf.NATProgFromUplinkL3, bpf.NATProgToUplinkL3} }

// optional says whether a program is loaded only where it is needed.
func optional(progs map[string]bool, name string) bool {
	return progs[name+firstSuffix] || strings.HasSuffix(name, firstSuffix) || slices.Contains(l3Programs(), name) || isHostProgram(name)
}

// keepNeeded leaves out the programs that no device would run: to verify them takes longer than
// all else. l3 and host say whether devices without link header, and the host's own sockets, need
// theirs.
func keepNeeded(spec *ebpf.CollectionSpec, l3, host bool, fast maps.FastPath) {
	var idle []string
	for name := range spec.Programs {
		plain, first := strings.CutSuffix(name, firstSuffix)
		if !l3 && slices.Contains(l3Programs(), name) || !host && isHostProgram(name) || first && fast != maps.FastPathAlways ||
			variant(spec.Programs, plain, fast) != name && !first {
			idle = append(idle, name)
		}
	}
	for _, name := range idle {
		delete(spec.Programs, name)
	}
}

// onHooks are the programs by the names of those whose hooks they run on.
func onHooks(progs map[string]*ebpf.Program, fast maps.FastPath) map[string]*ebpf.Program {
	chosen := make(map[string]*ebpf.Program)
	for _, name := range hookPrograms() {
		program := progs[variant(progs, name, fast)]
		if program == nil { // a change of mode was interrupted: that one still runs
			program = progs[name+firstSuffix]
		}
		if program != nil {
			chosen[name] = program
		}
	}
	return chosen
}

// checkPrograms: programs that need not be there are, where a device runs them.
func (d *Datapath) checkPrograms(fast maps.FastPath) error {
	devices, err := d.state.Devices()
	if err != nil {
		return err
	}
	chosen := onHooks(d.progs.progs, fast)
	for _, entry := range devices {
		for _, h := range (device{Device: entry}).hooks() {
			if chosen[h.program] == nil {
				return noProgram(d.inst, h.program, os.ErrNotExist)
			}
		}
	}
	return nil
}
