package loader

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"tcnat/bpf"
	"tcnat/maps"
)

// Detach removes the instance: programs, filters, qdiscs that we made, pins, and with them
// rules and flows. found is false when there was nothing. It also removes pins that are
// damaged, what killed runs left, and clsact filters whose pins are lost.
//
// Errors wrap ErrNotPermitted, ErrLocked or ErrOtherNetns.
func Detach(ctx context.Context, inst Instance) (found bool, err error) {
	inst = inst.withDefaults()
	if err := inst.Validate(); err != nil {
		return false, err
	}
	if err := checkRights(); err != nil {
		return false, err
	}
	nl, err := newNetlink()
	if err != nil {
		return false, err
	}
	defer nl.Close()
	cookie, err := netnsCookie()
	if err != nil {
		return false, err
	}
	held, err := inst.acquire(ctx, true)
	if err != nil {
		return false, err
	}
	defer held.release()
	found, err = dismantle(inst, nl, cookie)
	if err != nil {
		return found, fmt.Errorf("%s: %w", inst, err)
	}
	changed, err := inst.restoreSysctls(cookie)
	if err != nil {
		return found, fmt.Errorf("%s: %w", inst, err)
	}
	return found || changed, nil
}

// dismantle makes the instance pass every packet on, which is the commit, and takes it apart.
func dismantle(inst Instance, nl *netlink.Handle, cookie uint64) (found bool, err error) {
	if _, err := os.Lstat(inst.Dir()); errors.Is(err, os.ErrNotExist) {
		return sweep(inst, nl, cookie)
	} else if err != nil {
		return false, known(err)
	}
	if err := mayRemove(inst.Dir(), cookie); err != nil {
		return false, err
	}
	if err := goDark(pinsIn(inst.Dir())); err != nil {
		return false, err
	}
	// What an earlier detach left goes first: its place is needed.
	if _, err := sweep(inst, nl, cookie); err != nil {
		return true, err
	}
	if err := os.Rename(inst.Dir(), inst.retired()); err != nil {
		return true, fmt.Errorf("retire the pins: %w", known(err))
	}
	_, err = sweep(inst, nl, cookie)
	return true, err
}

// goDark makes the programs pass every packet on. Pins too damaged for that do not matter.
func goDark(p pins) error {
	m, err := ebpf.LoadPinnedMap(filepath.Join(p.maps(), bpf.NATMapConfig), nil)
	if err != nil {
		return nil
	}
	defer m.Close()
	if !isConfig(m) {
		return nil
	}
	return maps.New(&bpf.NATMaps{Config: m}).SetLive(false)
}

func isConfig(m *ebpf.Map) bool {
	spec, err := ownSpec()
	if err != nil {
		return false
	}
	want := spec.Maps[bpf.NATMapConfig]
	return m.Type() == want.Type && m.KeySize() == want.KeySize && m.ValueSize() == want.ValueSize
}

// mayRemove refuses pins of a network namespace that still exists: the filters there would be
// left behind.
func mayRemove(dir string, cookie uint64) error {
	m, err := ebpf.LoadPinnedMap(filepath.Join(pinsIn(dir).maps(), bpf.NATMapConfig), nil)
	if err != nil {
		return nil
	}
	defer m.Close()
	if !isConfig(m) {
		return nil
	}
	config, err := maps.New(&bpf.NATMaps{Config: m}).Config()
	if err != nil || config.NetnsCookie == 0 || config.NetnsCookie == cookie || !netnsExists(config.NetnsCookie) {
		return nil
	}
	return fmt.Errorf("%w: use --netns", ErrOtherNetns)
}

// sweep removes all that is not the instance itself: what was staged or retired when a run was
// killed, and, where the instance has no pins, the filters that go by its name.
func sweep(inst Instance, nl *netlink.Handle, cookie uint64) (found bool, err error) {
	for _, dir := range []string{inst.staged(), inst.retired()} {
		if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) {
			continue
		}
		found = true
		if err := mayRemove(dir, cookie); err != nil {
			return found, err
		}
		if err := goDark(pinsIn(dir)); err != nil {
			return found, err
		}
		c := &clsact{nl: nl, inst: inst, pins: pinsIn(dir)}
		c.know()
		if _, err := c.removeAll(); err != nil {
			return found, err
		}
		if err := removeTree(dir); err != nil {
			return found, err
		}
	}
	if _, err := os.Lstat(inst.Dir()); err == nil {
		return found, nil
	}
	c := &clsact{nl: nl, inst: inst, pins: pinsIn(inst.Dir())}
	lost, err := c.removeAll()
	return found || lost, err
}

// know fills in what tells the instance's filters from others, as far as its pins tell.
func (c *clsact) know() {
	if m, err := ebpf.LoadPinnedMap(filepath.Join(c.pins.maps(), bpf.NATMapConfig), nil); err == nil {
		c.config, _ = mapID(m)
		m.Close()
	}
	entries, _ := os.ReadDir(c.pins.progs())
	for _, entry := range entries {
		program, err := ebpf.LoadPinnedProgram(filepath.Join(c.pins.progs(), entry.Name()), nil)
		if err != nil {
			continue
		}
		if info, err := program.Info(); err == nil {
			if id, ok := info.ID(); ok {
				c.programs = append(c.programs, id)
			}
		}
		program.Close()
	}
}

// removeAll takes the instance's filters off every device of the network namespace.
func (c *clsact) removeAll() (found bool, err error) {
	links, err := listLinks(c.nl)
	if err != nil {
		return false, err
	}
	for _, l := range links {
		some, err := c.remove(l.Attrs().Index)
		found = found || some
		if err != nil {
			return found, fmt.Errorf("%s: %w", l.Attrs().Name, err)
		}
	}
	return found, nil
}

// removeTree removes a directory on bpffs; links in it are detached first, whoever holds them.
func removeTree(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, os.ErrNotExist):
			return nil
		case err != nil:
			return err
		case entry.IsDir():
			dirs = append(dirs, path)
			return nil
		default:
			return removeLink(path)
		}
	})
	if err != nil {
		return fmt.Errorf("remove pins: %w", known(err))
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		if err := os.Remove(dirs[i]); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove pins: %w", known(err))
		}
	}
	return nil
}
