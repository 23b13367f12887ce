package loader

import (
	"context"
	"errors"

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
func Open(inst Instance) (*Datapath, error) { return openLocked(inst, false) }

// OpenForWrite is Open under the exclusive lock.
func OpenForWrite(inst Instance) (*Datapath, error) { return openLocked(inst, true) }

func openLocked(inst Instance, exclusive bool) (*Datapath, error) {
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
	if err := d.check(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (d *Datapath) check() error {
	d.state = maps.New(d.tables.typedMaps())
	d.programs = d.progs.typedPrograms()
	config, err := d.state.Config()
	if err != nil {
		return err
	}
	cookie, err := netnsCookie()
	if err != nil {
		return err
	}
	return sameNetns(d.inst, config.NetnsCookie, cookie)
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
