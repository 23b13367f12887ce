package loader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
	"tcnat/maps"
)

// Attach loads the datapath and attaches it to the devices of the options, or upgrades in place
// what is attached already. Doing it twice changes nothing. On failure what was there stays.
//
// Errors wrap ErrNotPermitted, ErrNoBTF, ErrNoBPFFS, ErrNoDevice, ErrBadDevice, ErrLocked,
// ErrOtherNetns, ErrOtherABI, ErrCorrupt, ErrConflict, ErrMarkUsed or ErrNotSupported. log may be nil.
func Attach(ctx context.Context, inst Instance, opts AttachOptions, log *slog.Logger) (*Status, error) {
	return run(ctx, inst, opts, log, false)
}

// Load does what Attach does, but leaves attaching to the user: it returns the tc commands that
// do it. Detach takes the filters away again; a qdisc that those commands made stays.
func Load(ctx context.Context, inst Instance, opts AttachOptions) (commands []string, err error) {
	status, err := run(ctx, inst, opts, nil, true)
	if err != nil {
		return nil, err
	}
	return byHand(inst, status)
}

func run(ctx context.Context, inst Instance, opts AttachOptions, log *slog.Logger, manual bool) (*Status, error) {
	inst = inst.withDefaults()
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	for _, check := range []func() error{inst.Validate, opts.validate, checkRights, checkBTF} {
		if err := check(); err != nil {
			return nil, err
		}
	}
	nl, err := newNetlink()
	if err != nil {
		return nil, err
	}
	defer nl.Close()
	a := &attachment{inst: inst, opts: opts, log: log.With("instance", inst.Name), manual: manual, nl: nl}
	if a.links, err = listLinks(nl); err != nil {
		return nil, err
	}
	if a.named, err = resolveDevices(a.links, opts.Bridges, opts.Uplinks); err != nil {
		return nil, err
	}
	if a.cookie, err = netnsCookie(); err != nil {
		return nil, err
	}
	if err := inst.ensureBPFFS(); err != nil {
		return nil, err
	}
	held, err := inst.acquire(ctx, true)
	if err != nil {
		return nil, err
	}
	defer held.release()
	if err := a.run(); err != nil {
		return nil, err
	}
	d, err := open(inst)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	a.endGoneHostSockets(d)
	status, err := d.Status()
	if err != nil {
		return nil, err
	}
	return &status, nil
}

// attachment is one run of Attach or Load, under the exclusive lock.
type attachment struct {
	inst   Instance
	opts   AttachOptions
	log    *slog.Logger
	nl     *netlink.Handle
	links  []netlink.Link
	named  []device // those of the options
	manual bool
	cookie uint64

	cgroup   string // where the host's own sockets are seen, "": nowhere
	cgroupID uint64

	tracked tracking
	fast    maps.FastPath // what the options come to
}

// prepare decides about the cgroup and the fast path, before anything changes.
func (a *attachment) prepare() error {
	if err := a.findCgroup(); err != nil {
		return err
	}
	a.tracked = findTracking()
	a.fast = a.opts.decideFastPath(a.tracked)
	if a.fast == maps.FastPathOff {
		return nil
	}
	return a.checkMark()
}

// adaptSysctls gives conntrack what it needs beside a fast path. undo may be nil.
func (a *attachment) adaptSysctls() (undo func() error, err error) {
	if a.fast == maps.FastPathOff || !a.tracked.active() {
		return nil, nil
	}
	return a.setSysctls()
}

// dropSysctls takes back what is not needed any more, once the new configuration is in force.
func (a *attachment) dropSysctls() error {
	if a.fast != maps.FastPathOff && a.tracked.active() {
		return nil
	}
	_, err := a.inst.restoreSysctls(a.cookie)
	return err
}

func (a *attachment) run() error {
	present, err := a.inst.present()
	if err != nil {
		return err
	}
	if err := a.prepare(); err != nil {
		return err
	}
	if present {
		err = a.upgrade()
	} else {
		err = a.install()
	}
	if err != nil {
		return err
	}
	return a.dropSysctls()
}

// install is a first attach. All is built beside the place where it belongs, by programs that
// still pass every packet on; the rename makes it the instance, config.live makes it act.
func (a *attachment) install() (err error) {
	if len(a.opts.Bridges) == 0 {
		return fmt.Errorf("%s: name at least one bridge: %w yet", a.inst, ErrNotAttached)
	}
	if _, err := sweep(a.inst, a.nl, a.cookie); err != nil {
		return fmt.Errorf("remove what a killed run left: %w", err)
	}
	defer func() {
		if err != nil {
			_, failed := sweep(a.inst, a.nl, a.cookie)
			_, left := a.inst.restoreSysctls(a.cookie)
			err = errors.Join(err, failed, left)
		}
	}()
	spec, err := a.opts.spec()
	if err != nil {
		return err
	}
	keepNeeded(spec, slices.ContainsFunc(a.named, func(d device) bool { return d.L3 }), a.cgroup != "", a.fast)
	config := a.opts.config(maps.Config{NetnsCookie: a.cookie}, a.fast)
	loaded, err := loadNew(spec, config.MaxFlows, a.opts.Preallocate)
	if err != nil {
		return err
	}
	defer loaded.close()
	typed := loaded.typedMaps()
	// Whose it is must be known before anything can be left behind.
	state := maps.New(typed)
	if err := state.SetConfig(config); err != nil {
		return err
	}
	staged := pinsIn(a.inst.staged())
	if err := staged.make(); err != nil {
		return err
	}
	if err := pinAll(staged.maps(), loaded.maps); err != nil {
		return err
	}
	if err := pinAll(staged.progs(), loaded.progs); err != nil {
		return err
	}
	if err := writeBuild(staged.progs(), spec, loaded.progs); err != nil {
		return err
	}
	if err := staged.setAsked(a.opts.FastPath); err != nil {
		return err
	}
	if err := startExpiry(loaded.progs); err != nil {
		return err
	}
	if _, err := a.adaptSysctls(); err != nil {
		return err
	}
	c, err := a.connector(staged, loaded, typed, nil)
	if err != nil {
		return err
	}
	var devices []device
	for _, d := range a.named {
		d, err := c.connect(d)
		if err != nil {
			return err
		}
		devices = append(devices, d)
	}
	var undos []func() error // the sweep does that
	if err := c.judgeAll(devices, &undos); err != nil {
		return err
	}
	if err := c.reconcilePorts(devices, &undos); err != nil {
		return err
	}
	if err := a.sync(state, a.named); err != nil {
		return err
	}
	if err := c.attachHost(&undos); err != nil {
		return err
	}
	if err := c.dropHost(); err != nil { // what of it was attached and is done without
		return err
	}
	if err := unix.Renameat2(unix.AT_FDCWD, a.inst.staged(), unix.AT_FDCWD, a.inst.Dir(), unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("%s: put the pins in place: %w", a.inst, known(err))
	}
	if err := state.SetLive(true); err != nil {
		_, failed := dismantle(a.inst, a.nl, a.cookie)
		return errors.Join(err, failed)
	}
	return nil
}

// connector puts the current programs on devices.
type connector struct {
	*attachment
	pins   pins
	clsact *clsact
	state  *maps.State
	progs  map[string]*ebpf.Program
	ids    map[string]ebpf.ProgramID

	host    map[string]*ebpf.Program // of cgroup hooks
	hostIDs map[string]ebpf.ProgramID
}

// connector's old are the programs that may still be on the hooks, besides those of current.
func (a *attachment) connector(p pins, current *objects, typed *bpf.NATMaps, old map[string]*ebpf.Program) (*connector, error) {
	c := &connector{
		attachment: a,
		pins:       p,
		clsact:     &clsact{nl: a.nl, inst: a.inst, pins: p},
		state:      maps.New(typed),
		progs:      onHooks(current.progs, a.fast),
		host:       current.progs,
	}
	var err error
	if c.ids, err = programIDs(c.progs); err != nil {
		return nil, err
	}
	currents, err := programIDs(current.progs)
	if err != nil {
		return nil, err
	}
	c.hostIDs = currents
	olds, err := programIDs(old)
	if err != nil {
		return nil, err
	}
	for _, ids := range []map[string]ebpf.ProgramID{currents, olds} {
		for _, id := range ids {
			c.clsact.programs = append(c.clsact.programs, id)
		}
	}
	c.clsact.config, err = mapID(typed.Config)
	return c, err
}

func programIDs(progs map[string]*ebpf.Program) (map[string]ebpf.ProgramID, error) {
	ids := make(map[string]ebpf.ProgramID, len(progs))
	for name, program := range progs {
		info, err := program.Info()
		if err != nil {
			return nil, fmt.Errorf("program %s: %w", name, known(err))
		}
		id, ok := info.ID()
		if !ok {
			return nil, fmt.Errorf("program %s: %w: its id cannot be read", name, ErrNotSupported)
		}
		ids[name] = id
	}
	return ids, nil
}

func mapID(m *ebpf.Map) (ebpf.MapID, error) {
	info, err := m.Info()
	if err != nil {
		return 0, fmt.Errorf("map: %w", known(err))
	}
	id, _ := info.ID()
	return id, nil
}

// connect attaches to a device that has no programs yet, and then enters it as one that has:
// this is the commit for the device. On failure the device is left as it was.
func (c *connector) connect(d device) (device, error) {
	if c.manual {
		d.Attach = maps.AttachManual
		return d, c.state.SetDevice(d.Device)
	}
	kind, err := c.kind(d)
	if err == nil {
		d.Attach = kind
		err = c.attach(d)
	}
	if c.opts.Mode == Auto && d.Attach == maps.AttachTCX && errors.Is(err, ErrNotSupported) {
		c.log.Info("the kernel has no TCX, using clsact", "device", d.name)
		d.Attach = maps.AttachClsact
		err = c.attach(d)
	}
	if err == nil {
		d.OwnQdisc = c.pins.ownQdisc(d.Ifindex)
		err = c.state.SetDevice(d.Device)
	}
	if err != nil {
		return d, errors.Join(err, c.disconnect(d))
	}
	c.log.Info("attached", "device", d.name, "class", d.Class.String(), "by", d.Attach.String())
	return d, nil
}

// kind chooses between TCX and clsact for a device.
func (c *connector) kind(d device) (maps.AttachKind, error) {
	switch c.opts.Mode {
	case TCX:
		return maps.AttachTCX, nil
	case Clsact:
		return maps.AttachClsact, nil
	}
	foreign, err := c.clsact.foreign(d)
	if err != nil || !foreign {
		return maps.AttachTCX, err
	}
	if qdisc, err := c.clsact.qdisc(d.index()); err != nil || qdisc != "clsact" {
		// The ingress qdisc has no egress for us.
		c.log.Warn("filters of others run after ours", "device", d.name)
		return maps.AttachTCX, err
	}
	c.log.Info("clsact filters of others are there, using clsact", "device", d.name)
	return maps.AttachClsact, nil
}

func (c *connector) attach(d device) error {
	for _, h := range d.hooks() {
		if _, err := c.ensure(d, h); err != nil {
			return err
		}
	}
	return nil
}

// ensure makes one hook of an attached device run the current program.
func (c *connector) ensure(d device, h hook) (undo func() error, err error) {
	program, id := c.progs[h.program], c.ids[h.program]
	if program == nil {
		return nil, fmt.Errorf("%s: no program %s", d, h.program)
	}
	switch d.Attach {
	case maps.AttachTCX:
		return c.pins.ensureTCX(d, h, program, id)
	case maps.AttachClsact:
		return c.clsact.ensureFilter(d, h, program, id)
	default:
		return c.clsact.swapFilters(d, h, program, id)
	}
}

// disconnect takes our programs off a device and forgets it.
func (c *connector) disconnect(d device) error {
	_, filters := c.clsact.remove(d.index())
	return errors.Join(c.state.DeleteDevice(d.Ifindex), filters, c.pins.detachTCX(d.Ifindex))
}

// withdraw is disconnect for a port. One that still is a port, now without a program, loses no
// packet by it.
func (c *connector) withdraw(d device) error {
	if c.vanished(d) {
		return c.disconnect(d)
	}
	_, _, filters := c.clsact.removeFilters(d.index())
	return errors.Join(c.state.DeleteDevice(d.Ifindex), filters, c.pins.detachTCX(d.Ifindex))
}

// byHand are the tc commands that attach the devices that are left to the user.
func byHand(inst Instance, status *Status) (commands []string, err error) {
	nl, err := newNetlink()
	if err != nil {
		return nil, err
	}
	defer nl.Close()
	own, err := ownSpec()
	if err != nil {
		return nil, fmt.Errorf("read datapath: %w", err)
	}
	filters := &clsact{nl: nl, inst: inst, pins: pinsIn(inst.Dir())}
	devices := status.Devices
	for _, p := range status.Ports {
		if p.Ingress.Pinned != 0 {
			devices = append(devices, DeviceStatus{Name: p.Name, Ifindex: p.Ifindex, Class: maps.Port, Attach: p.Attach})
		}
	}
	for _, s := range devices {
		if s.Attach != maps.AttachManual {
			continue
		}
		kind, err := filters.qdisc(int(s.Ifindex))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.Name, err)
		}
		if kind != "clsact" {
			commands = append(commands, fmt.Sprintf("tc qdisc add dev %s clsact", s.Name))
		}
		d := device{Device: maps.Device{Ifindex: s.Ifindex, Class: s.Class, L3: s.L3}, name: s.Name}
		for _, h := range d.hooks() {
			priority := headPriority
			if h.ingress {
				priority = tailPriority
			}
			pinned := variant(own.Programs, h.program, status.Config.FastPath)
			commands = append(commands, fmt.Sprintf("tc filter add dev %s %s protocol all prio %d handle %d bpf direct-action object-pinned %s/%s",
				s.Name, h, priority, handleForeignQdisc, pinsIn(inst.Dir()).progs(), pinned))
		}
	}
	return commands, nil
}
