package loader

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"tcnat/bpf"
	"tcnat/maps"
)

// Status is what is attached where, and how.
type Status struct {
	Instance     string
	Pins         string // directory
	Live         bool   // false: an attach or detach was interrupted, the programs pass every packet on
	NetnsCookie  uint64
	Config       maps.Config
	Preallocated bool // the flows' memory is taken already, whether there are any or not
	FastPath     FastPathStatus
	HostAccess   HostAccess
	Devices      []DeviceStatus // bridges first, then by name
	Ports        []PortStatus   // of the bridges, by bridge and name
	Unmanaged    []UnmanagedDevice
	Problems     []string // one line each: what is wrong and what to do
}

// DeviceStatus is one device that has programs.
type DeviceStatus struct {
	Name     string
	Ifindex  uint32
	Class    maps.DeviceClass
	Attach   maps.AttachKind
	L3       bool
	OwnQdisc bool
	Slow     string // why it has no fast path, "" if it has
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
	s.Preallocated = preallocated(d.tables.maps[bpf.NATMapFlows])
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
	c, ids, err := d.hookReader(nl)
	if err != nil {
		return s, err
	}
	if err := d.deviceStatus(&s, c, ids, names); err != nil {
		return s, err
	}
	if err := d.portStatus(&s, c, ids, links); err != nil {
		return s, err
	}
	if err := d.fastPathStatus(&s); err != nil {
		return s, err
	}
	if err := d.hostStatus(&s, &attachment{nl: nl}); err != nil {
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

// hookReader is what reads hooks, and the programs that should be there by name.
func (d *Datapath) hookReader(nl *netlink.Handle) (*clsact, map[string]uint32, error) {
	c := &clsact{nl: nl, inst: d.inst, pins: pinsIn(d.inst.Dir())}
	c.know()
	config, err := d.state.Config()
	if err != nil {
		return nil, nil, err
	}
	pinned, err := programIDs(onHooks(d.progs.progs, config.FastPath))
	if err != nil {
		return nil, nil, err
	}
	ids := make(map[string]uint32, len(pinned))
	for name, id := range pinned {
		ids[name] = uint32(id)
	}
	return c, ids, nil
}

func (d *Datapath) deviceStatus(s *Status, c *clsact, ids map[string]uint32, names map[uint32]string) error {
	entries, err := d.state.Devices()
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.Class == maps.Port {
			continue
		}
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
		status.Ingress, status.Egress, err = c.judge(dev, ids)
		if err != nil {
			return err
		}
		for _, h := range dev.hooks() {
			hs := status.Egress
			if h.ingress {
				hs = status.Ingress
			}
			if problem := hs.problem(dev, h); problem != "" {
				s.Problems = append(s.Problems, problem)
			}
		}
		status.Slow = skippedText(dev, status.Ingress, status.Egress)
		switch {
		case dev.Slow && status.Slow == "":
			status.Slow = "others were on its hooks when attach ran, and have gone: run tcnat attach again"
		case !dev.Slow && status.Slow != "" && s.Config.FastPath != maps.FastPathOff:
			s.Problems = append(s.Problems, fmt.Sprintf("%s: since attach ran: %s: run tcnat attach again", dev, status.Slow))
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
