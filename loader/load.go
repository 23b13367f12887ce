package loader

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"

	"tcnat/bpf"
)

const minQueue = 1024

// sizes are the entries of the maps that grow with the number of flows.
func sizes(maxFlows uint32) map[string]uint32 {
	return map[string]uint32{
		bpf.NATMapFlows:       2 * maxFlows,
		bpf.NATMapMappings:    2 * maxFlows,
		bpf.NATMapExpiryQueue: max(minQueue, maxFlows+maxFlows/4),
	}
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

// private says whether a map belongs to one load of the programs and holds nothing that lasts:
// the scratch space of a packet, and the types of inner maps.
func private(name string) bool { return name == bpf.NATMapPlans || strings.HasPrefix(name, "no_") }

// loadNew loads maps and programs for maxFlows flows.
func loadNew(spec *ebpf.CollectionSpec, maxFlows uint32) (*objects, error) {
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
	return load(spec, nil)
}

// loadOnto loads the programs onto the maps that are there.
func loadOnto(spec *ebpf.CollectionSpec, have map[string]*ebpf.Map) (*objects, error) {
	for name, m := range spec.Maps {
		if have[name] == nil && !private(name) {
			return nil, fmt.Errorf("load: %w: no map %s: run tcnat detach first", ErrOtherABI, name)
		}
		if _, sized := sizes(0)[name]; sized {
			m.MaxEntries = have[name].MaxEntries()
		}
		if m.Type == ebpf.ArrayOfMaps {
			// The library would write these into the maps again: the first, empty, rules.
			m.Contents = nil
		}
	}
	return load(spec, have)
}

func load(spec *ebpf.CollectionSpec, have map[string]*ebpf.Map) (*objects, error) {
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: have})
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		return nil, fmt.Errorf("load: %w: %w: run tcnat detach first", ErrOtherABI, err)
	}
	if err != nil {
		return nil, fmt.Errorf("load: %w", known(err))
	}
	o := &objects{coll.Maps, coll.Programs}
	for name, m := range o.maps {
		if private(name) { // the programs and the outer maps hold it
			m.Close()
			delete(o.maps, name)
		}
	}
	return o, nil
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

// startExpiry arms the expiry's timer with the callback of this very program.
func startExpiry(progs map[string]*ebpf.Program) error {
	program, ok := progs[bpf.NATProgStartExpiry]
	if !ok {
		return fmt.Errorf("start expiry: no program %s", bpf.NATProgStartExpiry)
	}
	ret, err := program.Run(&ebpf.RunOptions{Data: make([]byte, 64)})
	if err != nil {
		return fmt.Errorf("start expiry: %w", known(err))
	}
	if ret != 0 {
		return fmt.Errorf("start expiry: the program returned %d", int32(ret))
	}
	return nil
}

// openMaps opens the pinned maps. A missing one, and one of another layout, is ErrCorrupt.
func openMaps(i Instance, p pins) (*objects, error) {
	spec, err := bpf.LoadNAT()
	if err != nil {
		return nil, fmt.Errorf("read datapath: %w", err)
	}
	o := &objects{maps: make(map[string]*ebpf.Map)}
	for _, name := range slices.Sorted(maps.Keys(spec.Maps)) {
		if private(name) {
			continue
		}
		want := spec.Maps[name]
		path := filepath.Join(p.maps(), name)
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			o.close()
			return nil, damagedOr(i, fmt.Errorf("map %s: %w", name, err))
		}
		o.maps[name] = m
		if m.Type() != want.Type || m.KeySize() != want.KeySize || m.ValueSize() != want.ValueSize {
			o.close()
			return nil, corrupt(i, fmt.Errorf("map %s is a %s of %d and %d bytes", name, m.Type(), m.KeySize(), m.ValueSize()))
		}
	}
	return o, nil
}

// openPrograms opens the pinned programs that are there. missing is the first one that is not:
// the instance was attached by another build, or its pins are damaged; attaching mends both.
func openPrograms(i Instance, p pins) (o *objects, missing error, err error) {
	spec, err := bpf.LoadNAT()
	if err != nil {
		return nil, nil, fmt.Errorf("read datapath: %w", err)
	}
	o = &objects{progs: make(map[string]*ebpf.Program)}
	for _, name := range slices.Backward(slices.Sorted(maps.Keys(spec.Programs))) {
		program, err := ebpf.LoadPinnedProgram(filepath.Join(p.progs(), name), nil)
		switch {
		case err == nil:
			o.progs[name] = program
		case errors.Is(err, os.ErrPermission):
			o.close()
			return nil, nil, fmt.Errorf("%s: %w", i, known(err))
		default:
			missing = fmt.Errorf("%s: %w: program %s: %w: run tcnat attach, which mends it", i, ErrCorrupt, name, err)
		}
	}
	return o, missing, nil
}

// damagedOr keeps a lack of rights apart from damage.
func damagedOr(i Instance, err error) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%s: %w", i, known(err))
	}
	return corrupt(i, err)
}
