package loader

import (
	"errors"
	"fmt"
	"math"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Feature is something that the kernel may offer.
type Feature struct {
	Name     string
	Since    string // the kernel version that brought it
	Have     bool
	Required bool   // without it tcnat does not work
	Use      string // what tcnat does with it
	Fallback string // what it does instead, "" when required
}

// probe is a feature and the question whether it is there.
type probe struct {
	Feature
	have func() (bool, error)
}

// probes are in the order of importance.
func probes() []probe {
	helper := func(fn asm.BuiltinFunc) func() (bool, error) {
		return func() (bool, error) { return supported(features.HaveProgramHelper(ebpf.SchedCLS, fn)) }
	}
	mapType := func(kind ebpf.MapType) func() (bool, error) {
		return func() (bool, error) { return supported(features.HaveMapType(kind)) }
	}
	return []probe{
		{Feature{Name: "BTF of the kernel", Since: "5.2", Required: true, Use: "timers and typed maps need it"}, haveBTF},
		{Feature{Name: "TC programs", Since: "4.1", Required: true, Use: "the datapath"},
			func() (bool, error) { return supported(features.HaveProgramType(ebpf.SchedCLS)) }},
		{Feature{Name: "maps in arrays", Since: "4.12", Required: true, Use: "rules that change as a whole"}, mapType(ebpf.ArrayOfMaps)},
		{Feature{Name: "queue maps", Since: "4.20", Required: true, Use: "the order in which flows are checked for expiry"}, mapType(ebpf.Queue)},
		{Feature{Name: "bpf_fib_lookup", Since: "4.18", Required: true, Use: "where a packet will leave the host"}, helper(asm.FnFibLookup)},
		{Feature{Name: "bpf_timer", Since: "5.15", Required: true, Use: "flows expire with no process running"}, helper(asm.FnTimerInit)},
		{Feature{Name: "bpf_loop", Since: "5.17", Required: true, Use: "the search for a free port, the expiry's round"}, helper(asm.FnLoop)},
		{Feature{Name: "TCX", Since: "6.6", Use: "attaches by links, swapped in place",
			Fallback: "clsact filters"}, haveTCX},
		{Feature{Name: "BPF_FIB_LOOKUP_SRC", Since: "6.7", Use: "masquerade takes the address that the host itself would",
			Fallback: "a table of the uplinks' addresses, made at attach"}, haveFIBLookupSrc},
		{Feature{Name: "cgroup socket hooks", Since: "5.9", Use: "the host itself reaches published ports",
			Fallback: "docker-proxy, or nothing"},
			func() (bool, error) { return supported(features.HaveProgramType(ebpf.CGroupSockAddr)) }},
		{Feature{Name: "SOCK_DESTROY", Since: "4.9", Use: "the host's connections end with the rule that led them",
			Fallback: "they stay until somebody closes them"}, haveSocketDestroy},
		{Feature{Name: "JIT compiler", Since: "3.18", Use: "programs run as machine code",
			Fallback: "the interpreter, many times slower (sysctl net.core.bpf_jit_enable=1)"}, haveJIT},
	}
}

// Features tells what this kernel offers, what tcnat uses of it and what it does without. The
// error wraps ErrNotPermitted where asking takes more rights.
func Features() ([]Feature, error) {
	if err := checkRights(); err != nil {
		return nil, err
	}
	var list []Feature
	for _, p := range probes() {
		have, err := p.have()
		if err != nil {
			return nil, fmt.Errorf("feature %s: %w", p.Name, known(err))
		}
		p.Have = have
		list = append(list, p.Feature)
	}
	return list, nil
}

func supported(err error) (bool, error) {
	if errors.Is(err, ebpf.ErrNotSupported) {
		return false, nil
	}
	return err == nil, err
}

func haveBTF() (bool, error) {
	err := checkBTF()
	return err == nil, nil
}

// haveJIT takes a kernel that always compiles for one without the sysctl.
func haveJIT() (bool, error) {
	value, err := readSysctl("net/core/bpf_jit_enable")
	return err != nil || value != "0", nil
}

// haveTCX asks for a device that cannot exist: a kernel with TCX looks for it.
func haveTCX() (bool, error) {
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.SchedCLS,
		License:      "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	if err != nil {
		return false, err
	}
	defer program.Close()
	l, err := link.AttachTCX(link.TCXOptions{Interface: math.MaxInt32, Program: program, Attach: ebpf.AttachTCXIngress})
	switch {
	case err == nil:
		return true, l.Close()
	case errors.Is(err, unix.ENODEV):
		return true, nil
	default:
		return supported(err)
	}
}

// haveFIBLookupSrc looks from a device that cannot exist: a flag that the kernel does not know
// is EINVAL, before it looks for the device.
func haveFIBLookupSrc() (bool, error) {
	const (
		lookupSrc = 1 << 4
		size      = 64 // of struct bpf_fib_lookup
	)
	instructions := asm.Instructions{asm.Mov.Imm(asm.R6, 0)}
	for offset := int16(-size); offset < 0; offset += 8 {
		instructions = append(instructions, asm.StoreMem(asm.RFP, offset, asm.R6, asm.DWord))
	}
	instructions = append(instructions,
		asm.StoreImm(asm.RFP, -size, unix.AF_INET, asm.Byte),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -size),
		asm.Mov.Imm(asm.R3, size),
		asm.Mov.Imm(asm.R4, lookupSrc),
		asm.FnFibLookup.Call(),
		asm.Return(),
	)
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "Dual BSD/GPL", Instructions: instructions,
	})
	if err != nil {
		return false, err
	}
	defer program.Close()
	result, err := program.Run(&ebpf.RunOptions{Data: make([]byte, 64)})
	if err != nil {
		return false, err
	}
	return int32(result) != -int32(unix.EINVAL), nil
}
