package loader

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
)

const (
	minQueue    = 1024
	minMappings = 1 << 17 // each outside address has 65,536 ports
)

// ownSpec is what this binary would load, to compare with: not to be changed. Reading it takes
// longer than all else that most commands do.
var ownSpec = sync.OnceValues(bpf.LoadNAT)

// sizes are the entries of the maps that grow with the number of flows.
func sizes(maxFlows uint32) map[string]uint32 {
	return map[string]uint32{
		bpf.NATMapFlows:       2 * maxFlows,
		bpf.NATMapMappings:    powerOfTwo(max(minMappings, maxFlows)),
		bpf.NATMapMovedPorts:  max(1, maxFlows/4),
		bpf.NATMapExpiryQueue: max(minQueue, maxFlows+maxFlows/4),
	}
}

// powerOfTwo is the smallest one that is not below n, or the largest there is.
func powerOfTwo(n uint32) uint32 {
	return 1 << min(31, bits.Len32(n-1))
}

// objects are the maps and programs of one load, by the names in the object file.
type objects struct {
	maps  map[string]*ebpf.Map
	progs map[string]*ebpf.Program
}

func (o *objects) close() {
	for _, m := range o.maps {
		m.Close()
	}
	for _, p := range o.progs {
		p.Close()
	}
}

// typedMaps are the maps as the fields of bpf.NATMaps; those of private maps may be nil. They
// still belong to o.
func (o *objects) typedMaps() *bpf.NATMaps {
	typed := new(bpf.NATMaps)
	fill(typed, o.maps)
	return typed
}

func (o *objects) typedPrograms() *bpf.NATPrograms {
	typed := new(bpf.NATPrograms)
	fill(typed, o.progs)
	return typed
}

// fill sets the fields of a struct that bpf2go made from what goes by the name in their tag.
func fill[T any](typed any, objects map[string]*T) {
	fields := reflect.ValueOf(typed).Elem()
	for i := range fields.NumField() {
		name := fields.Type().Field(i).Tag.Get("ebpf")
		if object, ok := objects[name]; ok {
			fields.Field(i).Set(reflect.ValueOf(object))
		}
	}
}

// names are those in the tags of a struct that bpf2go made.
func names(typed any) []string {
	var list []string
	for _, field := range reflect.VisibleFields(reflect.TypeOf(typed)) {
		if name := field.Tag.Get("ebpf"); name != "" {
			list = append(list, name)
		}
	}
	return list
}

// private says whether a map belongs to one load of the programs and holds nothing that lasts:
// the scratch space of a packet, and the types of inner maps.
func private(name string) bool {
	switch name {
	case bpf.NATMapFragmentScratches, bpf.NATMapLocals, bpf.NATMapOutputs, bpf.NATMapOwns, bpf.NATMapPlans, bpf.NATMapSenders, bpf.NATMapSources:
		return true
	}
	return strings.HasPrefix(name, "no_")
}

// loadNew loads maps and programs for maxFlows flows, whose memory is there from the beginning if
// preallocate says so.
func loadNew(spec *ebpf.CollectionSpec, maxFlows uint32, preallocate bool) (*objects, error) {
	if err := rlimit.RemoveMemlock(); err != nil { // kernels before 5.11 account there
		return nil, fmt.Errorf("memlock limit: %w", known(err))
	}
	for name, entries := range sizes(maxFlows) {
		m, ok := spec.Maps[name]
		if !ok {
			return nil, fmt.Errorf("datapath: no map %s", name)
		}
		m.MaxEntries = entries
	}
	if preallocate {
		spec.Maps[bpf.NATMapFlows].Flags &^= unix.BPF_F_NO_PREALLOC
	}
	withoutInnerTypes(spec)
	return load(spec, nil)
}

// withoutInnerTypes lets later inner maps, which are made without BTF, take the place of the first ones:
// before 6.3 the kernel takes a map without BTF for another kind than one with it (bpf_map_meta_equal).
func withoutInnerTypes(spec *ebpf.CollectionSpec) {
	for name, m := range spec.Maps {
		if strings.HasPrefix(name, "no_") {
			m.Key, m.Value = nil, nil
		}
		if m.InnerMap != nil {
			m.InnerMap.Key, m.InnerMap.Value = nil, nil
		}
	}
}

func preallocated(flows *ebpf.Map) bool { return flows.Flags()&unix.BPF_F_NO_PREALLOC == 0 }

// loadOnto loads the programs onto the maps that are there.
func loadOnto(spec *ebpf.CollectionSpec, have map[string]*ebpf.Map) (*objects, error) {
	for name, m := range spec.Maps {
		if have[name] == nil && !private(name) {
			return nil, fmt.Errorf("load: %w: no map %s: run tcnat detach first", ErrOtherABI, name)
		}
		if _, sized := sizes(0)[name]; sized {
			m.MaxEntries = have[name].MaxEntries()
		}
	}
	spec.Maps[bpf.NATMapFlows].Flags = have[bpf.NATMapFlows].Flags()
	return load(spec, have)
}

func load(spec *ebpf.CollectionSpec, have map[string]*ebpf.Map) (*objects, error) {
	tables := spec.Copy()
	tables.Programs = nil
	for _, m := range tables.Maps {
		switch m.Type {
		case ebpf.ArrayOfMaps:
			m.Contents = nil
		case ebpf.Queue:
			// The kernel refuses types here, once it has made the map: then it makes it again.
			m.Key, m.Value = nil, nil
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(tables, ebpf.CollectionOptions{MapReplacements: have})
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		return nil, fmt.Errorf("load: %w: %w: run tcnat detach first", ErrOtherABI, err)
	}
	if err != nil {
		return nil, fmt.Errorf("load: %w", known(err))
	}
	o := &objects{maps: coll.Maps}
	var wait sync.WaitGroup
	var unfilled error
	if have == nil {
		wait.Go(func() { unfilled = fillOuter(spec, coll.Maps) })
	}
	o.progs, err = loadPrograms(spec.Programs, coll.Maps)
	wait.Wait()
	if err := cmp.Or(err, unfilled); err != nil {
		o.close()
		return nil, fmt.Errorf("load: %w", known(err))
	}
	for name, m := range o.maps {
		if private(name) { // the programs and the outer maps hold it
			m.Close()
			delete(o.maps, name)
		}
	}
	return o, nil
}

// fillOuter puts the first, empty, rules into the maps of maps. Each update waits until no program
// uses what it replaces: so they wait together, and while the programs are verified.
func fillOuter(spec *ebpf.CollectionSpec, tables map[string]*ebpf.Map) error {
	var wait sync.WaitGroup
	var mutex sync.Mutex
	var errs []error
	for name, m := range spec.Maps {
		if m.Type != ebpf.ArrayOfMaps {
			continue
		}
		for _, entry := range m.Contents {
			inner, _ := entry.Value.(string)
			wait.Go(func() {
				if err := tables[name].Put(entry.Key, tables[inner]); err != nil {
					mutex.Lock()
					errs = append(errs, fmt.Errorf("map %s: put %s: %w", name, inner, err))
					mutex.Unlock()
				}
			})
		}
	}
	wait.Wait()
	return errors.Join(errs...)
}

// VerifierLog is the last lines of the verifier's log in err's chain, all of it when lines is
// 0 or less, "" when it has none.
func VerifierLog(err error, lines int) string {
	var rejected *ebpf.VerifierError
	if !errors.As(err, &rejected) {
		return ""
	}
	if lines <= 0 {
		return fmt.Sprintf("%+v", rejected)
	}
	return fmt.Sprintf("%-*v", lines, rejected)
}

// pinner is what maps and programs have in common.
type pinner interface{ Pin(path string) error }

func pinAll[T pinner](dir string, list map[string]T) error {
	for name, object := range list {
		if err := object.Pin(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("pin %s: %w", name, known(err))
		}
	}
	return nil
}

// startExpiry arms the expiry's timer with the callback of this very program. The kernel takes the
// memory for a timer without waiting, so under load it may have none for a moment.
func startExpiry(progs map[string]*ebpf.Program) error {
	program, ok := progs[bpf.NATProgStartExpiry]
	if !ok {
		return fmt.Errorf("start expiry: no program %s", bpf.NATProgStartExpiry)
	}
	const tries, pause = 50, 10 * time.Millisecond
	for range tries {
		ret, err := program.Run(&ebpf.RunOptions{Data: make([]byte, 64)})
		if err != nil {
			return fmt.Errorf("start expiry: %w", known(err))
		}
		if ret == 0 {
			return nil
		}
		time.Sleep(pause)
	}
	return fmt.Errorf("start expiry: the kernel has no memory for a timer: try again, or free some")
}

// openMaps opens the pinned maps. A missing one, and one of another layout, is ErrCorrupt.
func openMaps(i Instance, p pins) (*objects, error) {
	spec, err := ownSpec()
	if err != nil {
		return nil, fmt.Errorf("read datapath: %w", err)
	}
	o := &objects{maps: make(map[string]*ebpf.Map)}
	for _, name := range slices.Sorted(maps.Keys(spec.Maps)) {
		if private(name) {
			continue
		}
		if err := o.open(i, p, spec.Maps[name]); err != nil {
			o.close()
			return nil, err
		}
	}
	return o, nil
}

// open adds the pinned map that goes by want's name.
func (o *objects) open(i Instance, p pins, want *ebpf.MapSpec) error {
	m, err := ebpf.LoadPinnedMap(filepath.Join(p.maps(), want.Name), nil)
	if err != nil {
		return damagedOr(i, fmt.Errorf("map %s: %w", want.Name, err))
	}
	o.maps[want.Name] = m
	if m.Type() != want.Type || m.KeySize() != want.KeySize || m.ValueSize() != want.ValueSize {
		return corrupt(i, fmt.Errorf("map %s is a %s of %d and %d bytes", want.Name, m.Type(), m.KeySize(), m.ValueSize()))
	}
	return nil
}

// damagedOr keeps a lack of rights apart from damage.
func damagedOr(i Instance, err error) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%s: %w", i, known(err))
	}
	return corrupt(i, err)
}
