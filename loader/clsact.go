package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
)

const (
	// tailPriority lies behind those that the kernel gives out by itself, which count down
	// from 49152.
	tailPriority = 50000
	headPriority = 1

	// A filter's handle tells whether we made the qdisc: it outlives lost pins.
	handleForeignQdisc = 1
	handleOwnQdisc     = 2
)

func (h hook) parent() uint32 {
	if h.ingress {
		return netlink.HANDLE_MIN_INGRESS
	}
	return netlink.HANDLE_MIN_EGRESS
}

func (i Instance) filterName(program string) string {
	return "tcnat-" + i.withDefaults().Name + "-" + program
}

// ofFilter is the instance that a filter's name tells, if it is one of ours.
func (i Instance) ofFilter(name string) (Instance, bool) {
	rest, ok := strings.CutPrefix(name, "tcnat-")
	end := strings.LastIndex(rest, "-")
	if !ok || end <= 0 {
		return i, false
	}
	i.Name = rest[:end]
	return i, true
}

// clsact works on the clsact filters of one instance.
type clsact struct {
	nl   *netlink.Handle
	inst Instance
	pins pins
	// config is the id of the instance's config map, 0 when unknown: a filter whose program
	// uses it is ours too, as those attached by hand after tcnat load.
	config ebpf.MapID
	// programs are ids known to be ours.
	programs []ebpf.ProgramID
	// kinds are the ingress-side qdiscs by device, read at once: nil when not read yet.
	kinds map[int]string
}

// qdisc is the kind of the device's ingress-side qdisc: "clsact", "ingress" or "".
func (c *clsact) qdisc(ifindex int) (string, error) {
	if c.kinds != nil {
		return c.kinds[ifindex], nil
	}
	// The kernel lists those of all devices, whichever one is asked for.
	list, err := retryDump(func() ([]netlink.Qdisc, error) { return c.nl.QdiscList(nil) })
	if err != nil {
		return "", fmt.Errorf("list qdiscs: %w", known(err))
	}
	kinds := make(map[int]string)
	for _, q := range list {
		// The library's type of a clsact qdisc depends on its version; the kind does not.
		if kind := q.Type(); kind == "clsact" || kind == "ingress" {
			kinds[q.Attrs().LinkIndex] = kind
		}
	}
	c.kinds = kinds
	return kinds[ifindex], nil
}

// filters are all on one hook of the device.
func (c *clsact) filters(ifindex int, h hook) ([]netlink.Filter, error) {
	kind, err := c.qdisc(ifindex)
	// Asked for its egress, the ingress qdisc shows its ingress.
	if err != nil || kind == "" || kind == "ingress" && !h.ingress {
		return nil, err
	}
	device := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}
	list, err := retryDump(func() ([]netlink.Filter, error) { return c.nl.FilterList(device, h.parent()) })
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
		return nil, nil // the device or the qdisc has just gone
	}
	if err != nil {
		return nil, fmt.Errorf("list filters: %w", known(err))
	}
	return list, nil
}

// named says whether the filter has one of our names: ours even when the pins are lost.
func (c *clsact) named(f netlink.Filter) bool {
	b, ok := f.(*netlink.BpfFilter)
	if !ok {
		return false
	}
	for _, program := range hookPrograms() {
		if b.Name == c.inst.filterName(program) {
			return true
		}
	}
	return false
}

func hookPrograms() []string {
	return []string{
		bpf.NATProgFromBridge, bpf.NATProgToBridge, bpf.NATProgFromUplink, bpf.NATProgToUplink,
		bpf.NATProgFromUplinkL3, bpf.NATProgToUplinkL3, bpf.NATProgFromPort,
	}
}

// ours says whether the filter runs one of the instance's programs, under whatever name.
func (c *clsact) ours(f netlink.Filter) bool {
	if c.named(f) {
		return true
	}
	b, ok := f.(*netlink.BpfFilter)
	if !ok || b.Id == 0 {
		return false
	}
	if slices.Contains(c.programs, ebpf.ProgramID(b.Id)) {
		return true
	}
	if c.config == 0 {
		return false
	}
	program, err := ebpf.NewProgramFromID(ebpf.ProgramID(b.Id))
	if err != nil {
		return false
	}
	defer program.Close()
	info, err := program.Info()
	if err != nil {
		return false
	}
	used, _ := info.MapIDs()
	return slices.Contains(used, c.config)
}

// split sorts the filters of a hook into ours and foreign ones.
func (c *clsact) split(ifindex int, h hook) (ours []*netlink.BpfFilter, foreign []netlink.Filter, err error) {
	list, err := c.filters(ifindex, h)
	for _, f := range list {
		if c.ours(f) {
			ours = append(ours, f.(*netlink.BpfFilter))
		} else {
			foreign = append(foreign, f)
		}
	}
	return ours, foreign, err
}

// foreign says whether somebody else has filters on either hook of the device.
func (c *clsact) foreign(d device) (bool, error) {
	for _, h := range d.hooks() {
		_, foreign, err := c.split(d.index(), h)
		if err != nil {
			return false, fmt.Errorf("%s: %w", d, err)
		}
		if len(foreign) > 0 {
			return true, nil
		}
	}
	return false, nil
}

func (p pins) qdiscMark(ifindex uint32) string {
	return filepath.Join(p.qdiscs(), strconv.FormatUint(uint64(ifindex), 10))
}

// ownQdisc says whether we made the device's clsact qdisc.
func (p pins) ownQdisc(ifindex uint32) bool {
	_, err := os.Lstat(p.qdiscMark(ifindex))
	return err == nil
}

// forgetQdiscs removes the marks of devices that no longer exist; names are those that do.
func (p pins) forgetQdiscs(names map[uint32]string) error {
	entries, err := os.ReadDir(p.qdiscs())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("read marks of qdiscs: %w", known(err))
	}
	for _, entry := range entries {
		ifindex, err := strconv.ParseUint(entry.Name(), 10, 32)
		if _, exists := names[uint32(ifindex)]; err != nil || exists {
			continue
		}
		if err := os.Remove(p.qdiscMark(uint32(ifindex))); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove mark of qdisc: %w", known(err))
		}
	}
	return nil
}

// ensureQdisc makes the clsact qdisc where it is missing. Ours are marked before they exist,
// so that a killed attach leaves none behind.
func (c *clsact) ensureQdisc(d device) (own bool, err error) {
	kind, err := c.qdisc(d.index())
	if err != nil {
		return false, fmt.Errorf("%s: %w", d, err)
	}
	mark := c.pins.qdiscMark(d.Ifindex)
	switch kind {
	case "clsact":
		return c.pins.ownQdisc(d.Ifindex), nil
	case "ingress":
		return false, fmt.Errorf("%s: %w: its ingress qdisc leaves no room for clsact: "+
			"remove that (tc qdisc del dev %s ingress), or attach with --attach tcx", d, ErrConflict, d.name)
	}
	if err := os.Mkdir(mark, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return false, fmt.Errorf("%s: mark the qdisc as ours: %w", d, known(err))
	}
	err = c.nl.QdiscAdd(clsactQdisc(d.index()))
	if errors.Is(err, unix.EEXIST) { // somebody was faster: then it is theirs
		c.kinds = nil
		_ = os.Remove(mark)
		return false, nil
	}
	if err != nil {
		_ = os.Remove(mark)
		return false, fmt.Errorf("%s: add clsact qdisc: %w", d, known(err))
	}
	c.kinds[d.index()] = "clsact"
	return true, nil
}

func clsactQdisc(ifindex int) netlink.Qdisc {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ifindex,
		Handle:    netlink.MakeHandle(0xffff, 0),
		Parent:    netlink.HANDLE_CLSACT,
	}}
}

// ensureFilter makes the hook run the program: our filter is replaced in place, or added.
// undo takes a replacement back, nil when there was none.
func (c *clsact) ensureFilter(d device, h hook, program *ebpf.Program, id ebpf.ProgramID) (undo func() error, err error) {
	ours, foreign, err := c.split(d.index(), h)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d, err)
	}
	if len(ours) == 0 {
		return nil, c.addFilter(d, h, program, foreign)
	}
	return c.swap(d, h, ours, program, id)
}

// swapFilters is ensureFilter for filters that the user attached by hand: none is added.
func (c *clsact) swapFilters(d device, h hook, program *ebpf.Program, id ebpf.ProgramID) (undo func() error, err error) {
	ours, _, err := c.split(d.index(), h)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d, err)
	}
	return c.swap(d, h, ours, program, id)
}

func (c *clsact) swap(d device, h hook, ours []*netlink.BpfFilter, program *ebpf.Program, id ebpf.ProgramID) (undo func() error, err error) {
	var undos []func() error
	undo = func() error { return runAll(undos) }
	for _, have := range ours {
		if have.Id == int(id) {
			continue
		}
		if err := c.replaceFilter(have, program); err != nil {
			return undo, fmt.Errorf("%s: swap %s on clsact %s: %w", d, h.program, h, known(err))
		}
		undos = append(undos, func() error {
			old, err := ebpf.NewProgramFromID(ebpf.ProgramID(have.Id))
			if err != nil {
				return fmt.Errorf("%s: go back to program %d: %w", d, have.Id, err)
			}
			defer old.Close()
			return c.replaceFilter(have, old)
		})
	}
	return undo, nil
}

func (c *clsact) addFilter(d device, h hook, program *ebpf.Program, foreign []netlink.Filter) error {
	own, err := c.ensureQdisc(d)
	if err != nil {
		return err
	}
	handle := uint32(handleForeignQdisc)
	if own {
		handle = handleOwnQdisc
	}
	priority, err := freePriority(h, foreign)
	if err != nil {
		return fmt.Errorf("%s: clsact %s: %w", d, h, err)
	}
	err = c.nl.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: d.index(),
			Parent:    h.parent(),
			Handle:    handle,
			Protocol:  unix.ETH_P_ALL,
			Priority:  priority,
		},
		Fd:           program.FD(),
		Name:         c.inst.filterName(h.program),
		DirectAction: true,
	})
	if err != nil {
		return fmt.Errorf("%s: add %s to clsact %s: %w", d, h.program, h, known(err))
	}
	return nil
}

// freePriority is behind all foreign filters on ingress. On egress it is before them, or the
// first that is free where somebody has taken that place.
func freePriority(h hook, foreign []netlink.Filter) (uint16, error) {
	taken := make(map[int]bool)
	last := 0
	for _, f := range foreign {
		priority := int(f.Attrs().Priority)
		taken[priority] = true
		last = max(last, priority)
	}
	priority := headPriority
	if h.ingress {
		priority = max(tailPriority, last+1)
	}
	for taken[priority] {
		priority++
	}
	if priority > 0xffff {
		return 0, fmt.Errorf("%w: no filter priority behind %d is left", ErrConflict, last)
	}
	return uint16(priority), nil
}

func (c *clsact) replaceFilter(have *netlink.BpfFilter, program *ebpf.Program) error {
	return c.nl.FilterReplace(&netlink.BpfFilter{
		FilterAttrs:  have.FilterAttrs,
		Fd:           program.FD(),
		Name:         have.Name,
		DirectAction: true,
	})
}

// remove takes our filters off the device and then its qdisc, if that is ours and empty.
func (c *clsact) remove(ifindex int) (found bool, err error) {
	mark := c.pins.qdiscMark(uint32(ifindex))
	found, own, err := c.removeFilters(ifindex)
	if err != nil {
		return found, err
	}
	if own || c.pins.ownQdisc(uint32(ifindex)) {
		found = true
		if err := c.removeQdisc(ifindex); err != nil {
			return found, err
		}
	}
	if err := os.Remove(mark); err != nil && !errors.Is(err, os.ErrNotExist) {
		return found, fmt.Errorf("remove mark of qdisc: %w", known(err))
	}
	return found, nil
}

// removeFilters takes our filters off the device. The qdisc stays, for later or for detach: the
// kernel drops what a device is to send while a clsact qdisc comes or goes (qdisc_graft takes its
// queues away for that time). own is whether a filter says that the qdisc is ours.
func (c *clsact) removeFilters(ifindex int) (found, own bool, err error) {
	for _, h := range []hook{{ingress: true}, {ingress: false}} {
		ours, _, err := c.split(ifindex, h)
		if err != nil {
			return found, own, err
		}
		for _, f := range ours {
			own = own || c.named(f) && f.Handle == handleOwnQdisc
			found = true
			f.Fd = -1
			if err := c.nl.FilterDel(f); err != nil && !gone(err) {
				return found, own, fmt.Errorf("remove filter %s: %w", f.Name, known(err))
			}
		}
	}
	return found, own, nil
}

func (c *clsact) removeQdisc(ifindex int) error {
	kind, err := c.qdisc(ifindex)
	if err != nil || kind != "clsact" {
		return err
	}
	for _, h := range []hook{{ingress: true}, {ingress: false}} {
		left, err := c.filters(ifindex, h)
		if err != nil {
			return err
		}
		if len(left) > 0 { // somebody else uses it now
			return c.handOver(ifindex, left)
		}
	}
	delete(c.kinds, ifindex)
	if err := c.nl.QdiscDel(clsactQdisc(ifindex)); err != nil && !gone(err) {
		return fmt.Errorf("remove clsact qdisc: %w", known(err))
	}
	return nil
}

// handOver leaves our qdisc to another instance that has filters on it, if there is one: it goes with that.
func (c *clsact) handOver(ifindex int, filters []netlink.Filter) error {
	for _, f := range filters {
		filter, ok := f.(*netlink.BpfFilter)
		if !ok {
			continue
		}
		other, ok := c.inst.ofFilter(filter.Name)
		if !ok {
			continue
		}
		err := os.Mkdir(pinsIn(other.Dir()).qdiscMark(uint32(ifindex)), 0o700)
		switch {
		case err == nil, errors.Is(err, os.ErrExist):
			return nil
		case !errors.Is(err, os.ErrNotExist): // else it is going, or of another ABI
			return fmt.Errorf("leave the qdisc to %s: %w", other, known(err))
		}
	}
	return nil
}

func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL)
}

func runAll(steps []func() error) error {
	var errs []error
	for _, step := range slices.Backward(steps) {
		errs = append(errs, step())
	}
	return errors.Join(errs...)
}
