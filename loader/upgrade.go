package loader

import (
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"tcnat/bpf"
	"tcnat/maps"
)

// upgrade brings an instance up to date: programs, devices, addresses, configuration. Maps stay.
// It also finishes what a killed attach or upgrade began, and mends what is missing.
func (a *attachment) upgrade() (err error) {
	p := pinsIn(a.inst.Dir())
	tables, err := openMaps(a.inst, p)
	if err != nil {
		return err
	}
	defer tables.close()
	typed := tables.typedMaps()
	state := maps.New(typed)
	config, err := state.Config()
	if err != nil {
		return err
	}
	if err := sameNetns(a.inst, config.NetnsCookie, a.cookie); err != nil {
		return err
	}
	before := config
	config = a.opts.config(config, a.fast)
	if 2*config.MaxFlows != typed.Flows.MaxEntries() {
		return fmt.Errorf("%s: max flows %d: %w: its tables were made for %d: run tcnat detach first",
			a.inst, config.MaxFlows, ErrConflict, typed.Flows.MaxEntries()/2)
	}
	if a.opts.Preallocate && !preallocated(typed.Flows) {
		return fmt.Errorf("%s: preallocate: %w: its tables take memory as flows come: run tcnat detach first", a.inst, ErrConflict)
	}
	if err := p.make(); err != nil { // an empty directory that somebody removed
		return err
	}

	var b *build
	defer func() {
		if b != nil { // after what goes back, which needs the old programs
			b.close()
		}
	}()
	var undos []func() error
	defer func() {
		if err == nil {
			return
		}
		if failed := runAll(undos); failed != nil {
			err = fmt.Errorf("%w (going back failed: %w)", err, failed)
		}
	}()

	undo, err := a.adaptSysctls()
	if undo != nil {
		undos = append(undos, undo)
	}
	if err != nil {
		return err
	}
	undos = append(undos, func() error { return state.SetConfig(before) })
	if err := state.SetConfig(config); err != nil {
		return err
	}
	if b, err = a.upgradePrograms(p, tables, state); err != nil {
		return err
	}
	if err := b.start(&undos); err != nil {
		return err
	}
	c, err := a.connector(p, b.current, typed, b.old.progs)
	if err != nil {
		return err
	}
	have, added, err := c.reconcile(&undos)
	if err != nil {
		return err
	}
	devices := slices.Concat(have, added)
	if err := c.judgeAll(devices, &undos); err != nil {
		return err
	}
	if err := c.reconcilePorts(devices, &undos); err != nil {
		return err
	}
	undos = append(undos, func() error { return a.sync(state, have) })
	if err := a.sync(state, devices); err != nil {
		return err
	}
	if err := c.attachHost(&undos); err != nil {
		return err
	}
	if err := p.setAsked(a.opts.FastPath); err != nil {
		return err
	}
	if err := b.commit(); err != nil {
		return err
	}
	undos = nil // the new state is the one that a later run would mend
	if err := c.dropHost(); err != nil {
		return err
	}
	return state.SetLive(true)
}

func sameNetns(i Instance, theirs, ours uint64) error {
	switch {
	case theirs == ours:
		return nil
	case netnsExists(theirs):
		return fmt.Errorf("%s: %w: use --netns, or another --instance here", i, ErrOtherNetns)
	default:
		return fmt.Errorf("%s: %w, which is gone: run tcnat detach first", i, ErrOtherNetns)
	}
}

// build is the choice between the programs that are pinned and those of this binary.
type build struct {
	pins    pins
	current *objects // the ones to run from now on
	old     *objects // the pinned ones
	same    bool     // current is old
}

// upgradePrograms loads this binary's programs. Where they are what is pinned already, those
// stay.
func (a *attachment) upgradePrograms(p pins, tables *objects, state *maps.State) (*build, error) {
	l3, err := a.needsL3(state)
	if err != nil {
		return nil, err
	}
	old, missing, err := openPrograms(a.inst, p)
	if err != nil {
		return nil, err
	}
	b := &build{pins: p, old: old}
	spec, err := a.opts.spec()
	if err != nil {
		b.close()
		return nil, err
	}
	keepNeeded(spec, l3, a.cgroup != "", a.fast)
	if missing == nil && readBuild(p.progs()).isOf(spec, old.progs) {
		b.current, b.same = old, true
		return b, nil
	}
	b.current, err = loadOnto(spec, tables.maps)
	if err != nil {
		b.close()
		return nil, err
	}
	if err := removeTree(b.staged()); err != nil {
		b.close()
		return nil, err
	}
	if err := os.Mkdir(b.staged(), 0o700); err != nil {
		b.close()
		return nil, fmt.Errorf("make pin directory: %w", known(err))
	}
	if err := pinAll(b.staged(), b.current.progs); err != nil {
		_ = removeTree(b.staged())
		b.close()
		return nil, err
	}
	if err := writeBuild(b.staged(), spec, b.current.progs); err != nil {
		_ = removeTree(b.staged())
		b.close()
		return nil, err
	}
	a.log.Info("upgrading programs")
	return b, nil
}

func (b *build) staged() string { return b.pins.progs() + "+new" }

func (b *build) close() {
	if b.current != nil && !b.same {
		b.current.close()
	}
	b.old.close()
}

// start arms the expiry with the program to run from now on: a timer keeps the program that
// armed it. Before the swap, since programs of one ABI work side by side.
func (b *build) start(undos *[]func() error) error {
	if !b.same {
		*undos = append(*undos, func() error { return removeTree(b.staged()) })
	}
	if err := startExpiry(b.current.progs); err != nil {
		return err
	}
	if !b.same && b.old.progs[bpf.NATProgStartExpiry] != nil {
		*undos = append(*undos, func() error { return startExpiry(b.old.progs) })
	}
	return nil
}

// commit makes the new programs the pinned ones.
func (b *build) commit() error {
	if b.same {
		return nil
	}
	err := unix.Renameat2(unix.AT_FDCWD, b.staged(), unix.AT_FDCWD, b.pins.progs(), unix.RENAME_EXCHANGE)
	if err != nil {
		return fmt.Errorf("exchange the pinned programs: %w", known(err))
	}
	return removeTree(b.staged())
}

// needsL3 says whether a device has no link header, of the named and the attached ones.
func (a *attachment) needsL3(state *maps.State) (bool, error) {
	entries, err := state.Devices()
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(a.named, func(d device) bool { return d.L3 }) ||
		slices.ContainsFunc(entries, func(d maps.Device) bool { return d.L3 }), nil
}

// reconcile makes every hook of every device run the current programs, attaches to the devices
// that are new and forgets those that are gone. have are those that were attached, added the
// new ones.
func (c *connector) reconcile(undos *[]func() error) (have, added []device, err error) {
	attached, err := c.attached()
	if err != nil {
		return nil, nil, err
	}
	if err := c.compatible(attached); err != nil {
		return nil, nil, err
	}
	for _, d := range c.named {
		if known, ok := attached[d.Ifindex]; ok && known.Attach == maps.AttachManual && !c.manual {
			byHand, err := c.attachedByHand(known)
			if err != nil {
				return nil, nil, err
			}
			if !byHand { // loaded only, so far
				delete(attached, d.Ifindex)
				*undos = append(*undos, func() error { return c.state.SetDevice(known.Device) })
			}
		}
	}
	for _, d := range attached {
		for _, h := range d.hooks() {
			undo, err := c.ensure(d, h)
			if undo != nil {
				*undos = append(*undos, undo)
			}
			if err != nil {
				return nil, nil, err
			}
		}
		have = append(have, d)
	}
	for _, d := range c.named {
		if _, ok := attached[d.Ifindex]; ok {
			continue
		}
		d, err := c.connect(d)
		if err != nil {
			return nil, nil, err
		}
		*undos = append(*undos, func() error { return c.disconnect(d) })
		added = append(added, d)
	}
	return have, added, nil
}

// attached are the bridges and uplinks that have programs, without those that no longer exist.
func (c *connector) attached() (map[uint32]device, error) {
	entries, err := c.state.Devices()
	if err != nil {
		return nil, err
	}
	names := ifnames(c.links)
	attached := make(map[uint32]device)
	for _, entry := range entries {
		if entry.Class == maps.Port {
			continue
		}
		d := device{entry, ifname(names, entry.Ifindex)}
		if _, exists := names[entry.Ifindex]; exists {
			attached[d.Ifindex] = d
			continue
		}
		c.log.Info("device is gone", "device", d.name)
		if err := c.forget(d); err != nil {
			return nil, err
		}
	}
	return attached, nil
}

// compatible refuses what would need a detach first: it is said before anything changes.
func (c *connector) compatible(attached map[uint32]device) error {
	for _, d := range c.named {
		have, ok := attached[d.Ifindex]
		if !ok {
			continue
		}
		if have.Class != d.Class {
			return fmt.Errorf("%s: %w: it is attached as %s: run tcnat detach first", d, ErrConflict, have.Class)
		}
		forced := map[AttachMode]maps.AttachKind{TCX: maps.AttachTCX, Clsact: maps.AttachClsact}
		if kind, ok := forced[c.opts.Mode]; ok && have.Attach != kind && have.Attach != maps.AttachManual {
			return fmt.Errorf("%s: %w: it is attached by %s: run tcnat detach first", d, ErrConflict, have.Attach)
		}
	}
	return nil
}

func (c *connector) attachedByHand(d device) (bool, error) {
	for _, h := range d.hooks() {
		ours, _, err := c.clsact.split(d.index(), h)
		if err != nil {
			return false, fmt.Errorf("%s: %w", d, err)
		}
		if len(ours) > 0 {
			return true, nil
		}
	}
	return false, nil
}

// forget removes what is left of a device that no longer exists.
func (c *connector) forget(d device) error {
	if err := c.disconnect(d); err != nil {
		return err
	}
	return c.state.SetAddresses(d.Ifindex, nil)
}

// judgeAll switches the fast path of a device off where others are on its hooks that it would
// pass by, and on again where they have gone. It notes the address of a bridge, by which its
// ports know what is for the host.
func (c *connector) judgeAll(devices []device, undos *[]func() error) error {
	addresses := bridgeMACs(c.links)
	for _, d := range devices {
		ingress, egress, err := c.clsact.judge(d, nil)
		if err != nil {
			return err
		}
		slow := skippedText(d, ingress, egress)
		mac := d.MAC
		if d.Class == maps.Bridge {
			mac = addresses[d.Ifindex]
		}
		if d.Slow == (slow != "") && d.MAC == mac {
			continue
		}
		before := d.Device
		d.Slow, d.MAC = slow != "", mac
		*undos = append(*undos, func() error { return c.state.SetDevice(before) })
		if err := c.state.SetDevice(d.Device); err != nil {
			return err
		}
		if d.Slow != before.Slow {
			c.log.Info("fast path of a device", "device", d.name, "slow", d.Slow, "why", slow)
		}
	}
	return nil
}
