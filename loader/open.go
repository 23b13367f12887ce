package loader

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
	"tcnat/maps"
)

// Datapath is an instance that is attached, opened to be read or to have its rules changed.
// It holds the instance's lock until Close, so do not keep it for long.
type Datapath struct {
	inst     Instance
	held     *lock
	tables   *objects
	progs    *objects
	state    *maps.State
	programs *bpf.NATPrograms
}

// Open opens an instance under the shared lock, which others may hold at the same time.
//
// Errors wrap ErrNotAttached, ErrCorrupt, ErrOtherABI, ErrOtherNetns, ErrLocked or
// ErrNotPermitted.
func Open(inst Instance) (*Datapath, error) { return openLocked(inst, false, open) }

// OpenForWrite is Open under the exclusive lock.
func OpenForWrite(inst Instance) (*Datapath, error) { return openLocked(inst, true, open) }

// OpenRules is OpenForWrite for what rules, subnets, devices and the configuration need: other
// maps are not open, and no program is. It takes a tenth of the time.
func OpenRules(inst Instance) (*Datapath, error) { return openLocked(inst, true, openRules) }

func openLocked(inst Instance, exclusive bool, open func(Instance) (*Datapath, error)) (*Datapath, error) {
	inst = inst.withDefaults()
	if err := inst.Validate(); err != nil {
		return nil, err
	}
	if err := checkRights(); err != nil {
		return nil, err
	}
	have, err := inst.haveBPFFS()
	if err != nil {
		return nil, err
	}
	if !have {
		return nil, notAttached(inst)
	}
	// Ask first: the lock's file should not appear for an instance that is not there.
	if present, err := inst.present(); err != nil {
		return nil, err
	} else if !present {
		return nil, notAttached(inst)
	}
	held, err := inst.acquire(context.Background(), exclusive)
	if err != nil {
		return nil, err
	}
	d, err := open(inst)
	if err != nil {
		held.release()
		return nil, err
	}
	d.held = held
	return d, nil
}

// open wants the lock to be held.
func open(inst Instance) (*Datapath, error) {
	if present, err := inst.present(); err != nil {
		return nil, err
	} else if !present {
		return nil, notAttached(inst)
	}
	p := pinsIn(inst.Dir())
	tables, err := openMaps(inst, p)
	if err != nil {
		return nil, err
	}
	progs, missing, err := openPrograms(inst, p)
	if err == nil && missing != nil {
		progs.close()
		err = missing
	}
	if err != nil {
		tables.close()
		return nil, err
	}
	d := &Datapath{inst: inst, tables: tables, progs: progs}
	config, err := d.check()
	if err == nil {
		err = d.checkPrograms(config.FastPath)
	}
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// openRules wants the lock to be held. Whether all else is there it sees by the pins alone: to
// decode the object file, which says what must be, takes longer than all the rest.
func openRules(inst Instance) (*Datapath, error) {
	if present, err := inst.present(); err != nil {
		return nil, err
	} else if !present {
		return nil, notAttached(inst)
	}
	p := pinsIn(inst.Dir())
	d := &Datapath{inst: inst, tables: &objects{maps: make(map[string]*ebpf.Map)}, progs: &objects{}}
	for _, name := range names(bpf.NATMaps{}) {
		if private(name) {
			continue
		}
		if _, err := os.Lstat(filepath.Join(p.maps(), name)); err != nil {
			return nil, errors.Join(damagedOr(inst, fmt.Errorf("map %s: %w", name, err)), d.Close())
		}
	}
	for _, want := range rulesMaps {
		if err := d.tables.open(inst, p, want); err != nil {
			return nil, errors.Join(err, d.Close())
		}
	}
	programs := make(map[string]bool)
	for _, name := range names(bpf.NATPrograms{}) {
		programs[name] = true
	}
	for name := range programs {
		_, err := os.Lstat(filepath.Join(p.progs(), name))
		if err != nil && !(errors.Is(err, os.ErrNotExist) && optional(programs, name)) {
			return nil, errors.Join(noProgram(inst, name, err), d.Close())
		}
	}
	if _, err := d.check(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// rulesMaps are the maps that openRules opens, and what they must be.
var rulesMaps = []*ebpf.MapSpec{
	mapSpec[uint32, bpf.NATConfig](bpf.NATMapConfig, ebpf.Array),
	mapSpec[uint32, uint32](bpf.NATMapGenerations, ebpf.Array),
	mapSpec[uint32, bpf.NATDevice](bpf.NATMapDevices, ebpf.Hash),
	mapSpec[bpf.NATSubnetKey, uint32](bpf.NATMapSubnets, ebpf.LPMTrie),
	mapSpec[bpf.NATHostPeerKey, bpf.NATHostPeer](bpf.NATMapHostPeers, ebpf.LRUHash),
	mapSpec[uint32, uint32](bpf.NATMapDnatPorts, ebpf.ArrayOfMaps),
	mapSpec[uint32, uint32](bpf.NATMapDnatRanges, ebpf.ArrayOfMaps),
	mapSpec[uint32, uint32](bpf.NATMapSnatSources, ebpf.ArrayOfMaps),
	mapSpec[uint32, uint32](bpf.NATMapRulePrefixes, ebpf.ArrayOfMaps),
	mapSpec[uint32, uint32](bpf.NATMapBackends, ebpf.ArrayOfMaps),
	mapSpec[uint32, uint32](bpf.NATMapAffinities, ebpf.ArrayOfMaps),
}

func mapSpec[K, V any](name string, kind ebpf.MapType) *ebpf.MapSpec {
	return &ebpf.MapSpec{
		Name: name, Type: kind,
		KeySize: uint32(reflect.TypeFor[K]().Size()), ValueSize: uint32(reflect.TypeFor[V]().Size()),
	}
}

// check makes the typed views, and sees to it that this is the instance's network namespace.
func (d *Datapath) check() (maps.Config, error) {
	d.state = maps.New(d.tables.typedMaps())
	d.programs = d.progs.typedPrograms()
	config, err := d.state.Config()
	if err != nil {
		return config, err
	}
	cookie, err := netnsCookie()
	if err != nil {
		return config, err
	}
	return config, sameNetns(d.inst, config.NetnsCookie, cookie)
}

// State is the instance's maps.
func (d *Datapath) State() *maps.State { return d.state }

// Programs are the pinned programs. They belong to the Datapath.
func (d *Datapath) Programs() *bpf.NATPrograms { return d.programs }

// Close gives the lock back. What is attached stays.
func (d *Datapath) Close() error {
	d.tables.close()
	d.progs.close()
	if d.held != nil {
		d.held.release()
		d.held = nil
	}
	return nil
}

// FlushFlows ends the flows that match and says how many.
func (d *Datapath) FlushFlows(filter maps.FlowFilter) (int, error) {
	return d.state.FlushFlows(d.programs.EndFlow, filter)
}
