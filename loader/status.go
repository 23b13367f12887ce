package loader

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"tcnat/maps"
)

// Status is what is attached where, and how.
type Status struct {
	Instance    string
	Pins        string // directory
	Live        bool   // false: an attach or detach was interrupted, the programs pass every packet on
	NetnsCookie uint64
	Config      maps.Config
	Devices     []DeviceStatus // bridges first, then by name
	Unmanaged   []UnmanagedDevice
	Problems    []string // one line each: what is wrong and what to do
}

// DeviceStatus is one device that has programs.
type DeviceStatus struct {
	Name     string
	Ifindex  uint32
	Class    maps.DeviceClass
	Attach   maps.AttachKind
	L3       bool
	OwnQdisc bool
	Ingress  HookStatus
	Egress   HookStatus
}

// HookStatus is one place on a device where a program runs.
type HookStatus struct {
	Program string   // name
	Pinned  uint32   // id of the program that should run
	ID      uint32   // id of the one that runs, 0: none does
	Tag     string   // of the one that runs
	Before  []string // programs and filters of others that run before ours, in order
	After   []string // and after it
}

// UnmanagedDevice is one without programs that container traffic would have left by.
type UnmanagedDevice struct {
	Name    string
	Ifindex uint32
	Packets uint64 // dropped
}

// Status tells what is attached, and what is not as it should be.
func (d *Datapath) Status() (Status, error) {
	s := Status{Instance: d.inst.Name, Pins: string(pinsIn(d.inst.Dir()))}
	config, err := d.state.Config()
	if err != nil {
		return s, err
	}
	s.Config, s.Live, s.NetnsCookie = config, config.Live, config.NetnsCookie
	if !s.Live {
		s.Problems = append(s.Problems, "not in effect, since an attach or a detach was interrupted: run it again")
	}
	nl, err := newNetlink()
	if err != nil {
		return s, err
	}
	defer nl.Close()
	links, err := listLinks(nl)
	if err != nil {
		return s, err
	}
	names := ifnames(links)
	if err := d.deviceStatus(&s, nl, names); err != nil {
		return s, err
	}
	unmanaged, err := d.state.Unmanaged()
	if err != nil {
		return s, err
	}
	for ifindex, packets := range unmanaged {
		s.Unmanaged = append(s.Unmanaged, UnmanagedDevice{ifname(names, ifindex), ifindex, packets})
	}
	slices.SortFunc(s.Unmanaged, func(a, b UnmanagedDevice) int { return cmp.Compare(a.Name, b.Name) })
	return s, nil
}

func (d *Datapath) deviceStatus(s *Status, nl *netlink.Handle, names map[uint32]string) error {
	entries, err := d.state.Devices()
	if err != nil {
		return err
	}
	ids, err := programIDs(d.progs.progs)
	if err != nil {
		return err
	}
	c := &clsact{nl: nl, inst: d.inst, pins: pinsIn(d.inst.Dir())}
	c.know()
	for _, entry := range entries {
		dev := device{entry, ifname(names, entry.Ifindex)}
		status := DeviceStatus{
			Name: dev.name, Ifindex: dev.Ifindex, Class: dev.Class, Attach: dev.Attach,
			L3: dev.L3, OwnQdisc: dev.OwnQdisc,
		}
		if _, exists := names[entry.Ifindex]; !exists {
			s.Problems = append(s.Problems, fmt.Sprintf("%s is gone: attach the one that replaces it", dev))
			s.Devices = append(s.Devices, status)
			continue
		}
		for _, h := range dev.hooks() {
			hs, err := c.hookStatus(dev, h, uint32(ids[h.program]))
			if err != nil {
				return err
			}
			if problem := hs.problem(dev, h); problem != "" {
				s.Problems = append(s.Problems, problem)
			}
			if h.ingress {
				status.Ingress = hs
			} else {
				status.Egress = hs
			}
		}
		s.Devices = append(s.Devices, status)
	}
	slices.SortFunc(s.Devices, func(a, b DeviceStatus) int {
		return cmp.Or(cmp.Compare(a.Class, b.Class), cmp.Compare(a.Name, b.Name))
	})
	return nil
}

func (h HookStatus) problem(d device, at hook) string {
	switch {
	case h.ID == 0 && d.Attach == maps.AttachManual:
		return fmt.Sprintf("%s %s has no program: run the commands that tcnat load prints", d, at)
	case h.ID == 0:
		return fmt.Sprintf("%s %s has no program: run tcnat attach again", d, at)
	case h.ID != h.Pinned:
		return fmt.Sprintf("%s %s runs another build of the program, since an upgrade was interrupted: run tcnat attach again", d, at)
	}
	return ""
}

// hookStatus lists TCX programs before clsact filters, as the kernel runs them.
func (c *clsact) hookStatus(d device, h hook, pinned uint32) (HookStatus, error) {
	s := HookStatus{Program: h.program, Pinned: pinned}
	var mine ebpf.ProgramID
	if l, err := link.LoadPinnedLink(c.pins.tcxPin(d.Ifindex, h), nil); err == nil {
		if info, err := l.Info(); err == nil && attachedTCX(l) {
			mine = info.Program
		}
		l.Close()
	}
	other := func(name string) {
		if s.ID == 0 {
			s.Before = append(s.Before, name)
		} else {
			s.After = append(s.After, name)
		}
	}
	// A kernel without TCX knows no such attach type.
	query, err := link.QueryPrograms(link.QueryOptions{Target: d.index(), Attach: h.tcxType()})
	if err == nil {
		for _, program := range query.Programs {
			if program.ID == mine {
				s.ID, s.Tag = uint32(mine), programTag(mine)
			} else {
				other("tcx " + programName(program.ID))
			}
		}
	}
	filters, err := c.filters(d.index(), h)
	if err != nil {
		return s, fmt.Errorf("%s: %w", d, err)
	}
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok && c.ours(f) {
			s.ID, s.Tag = uint32(b.Id), b.Tag
		} else if ok {
			other("clsact " + b.Name)
		} else {
			other("clsact " + f.Type())
		}
	}
	return s, nil
}

func programTag(id ebpf.ProgramID) string {
	info := programInfo(id)
	if info == nil {
		return ""
	}
	return info.Tag
}

func programName(id ebpf.ProgramID) string {
	if info := programInfo(id); info != nil && info.Name != "" {
		return info.Name
	}
	return fmt.Sprintf("program %d", id)
}

func programInfo(id ebpf.ProgramID) *ebpf.ProgramInfo {
	program, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return nil
	}
	defer program.Close()
	info, err := program.Info()
	if err != nil {
		return nil
	}
	return info
}
