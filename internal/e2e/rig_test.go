package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// patience is how long a condition may take to come to hold.
var patience = slowly(20 * time.Second)

// rig is a lab with an instance of the datapath in its host.
type rig struct {
	*lab.Lab
	inst    loader.Instance
	sysctls map[string]string // of the host, before anything was attached
	owned   []string          // devices of the host that the test has made
}

// newRig builds a lab. When the test ends the instance is detached, and all of it gone.
func newRig(t *testing.T, o lab.Options) *rig {
	t.Helper()
	needRoot(t)
	l, err := lab.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	r := &rig{Lab: l, inst: loader.Instance{Name: "e2e-" + l.Name, RunDir: t.TempDir()}}
	if r.sysctls, err = l.Host.Sysctls(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.detach(t)
		if t.Failed() && len(l.Nodes()) > 0 {
			t.Logf("lab was %s", l.Name)
		}
	})
	return r
}

// attach attaches to docker0 and to eth0, where the options name no others.
func (r *rig) attach(t *testing.T, o loader.AttachOptions) loader.Status {
	t.Helper()
	if o.Bridges == nil {
		o.Bridges = []string{lab.Bridge}
	}
	if o.Uplinks == nil {
		o.Uplinks = []string{lab.Uplink}
	}
	var status *loader.Status
	err := r.Host.Do(func() (err error) {
		status, err = loader.Attach(t.Context(), r.inst, o, slog.New(slog.DiscardHandler))
		return err
	})
	if err != nil {
		t.Fatalf("attach: %+v", err)
	}
	return *status
}

// detach takes the instance away, if it is attached, and checks that nothing is left.
func (r *rig) detach(t *testing.T) {
	t.Helper()
	pinned := r.pinned(t)
	err := r.Host.Do(func() error {
		_, err := loader.Detach(context.WithoutCancel(t.Context()), r.inst)
		return err
	})
	if err != nil {
		t.Errorf("detach: %v", err)
	}
	r.mustBeBare(t)
	for name, exists := range pinned {
		poll(t, name+" is gone", func() bool { return !exists() })
	}
}

// mustBeBare checks that the host has no trace of an instance.
func (r *rig) mustBeBare(t *testing.T) {
	t.Helper()
	devices := append([]string{lab.Bridge, lab.Uplink}, r.owned...)
	if r.Other != nil {
		devices = append(devices, lab.Uplink2)
	}
	if r.Far != nil {
		devices = append(devices, lab.TunUplink)
	}
	for _, device := range devices {
		attached, err := r.Host.Attached(device)
		if err != nil {
			t.Error(err)
		}
		for _, found := range attached {
			t.Errorf("still attached: %s", found)
		}
	}
	for _, suffix := range []string{"", "+new", "+old"} {
		if _, err := os.Stat(r.inst.Dir() + suffix); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("pins at %s%s: %v", r.inst.Dir(), suffix, err)
		}
	}
	now, err := r.Host.Sysctls()
	if err != nil {
		t.Error(err)
	}
	for key, was := range r.sysctls {
		if now[key] != was {
			t.Errorf("sysctl %s: was %q, is %q", key, was, now[key])
		}
	}
}

// pinned returns, for every program and map that the instance pins, how to ask whether the
// kernel still has it.
func (r *rig) pinned(t *testing.T) map[string]func() bool {
	t.Helper()
	objects := make(map[string]func() bool)
	err := filepath.WalkDir(r.inst.Dir(), func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || entry.IsDir() {
			return err
		}
		name := filepath.Base(filepath.Dir(path)) + "/" + entry.Name()
		switch filepath.Base(filepath.Dir(path)) {
		case "progs":
			objects[name], err = programExists(path)
		case "maps":
			objects[name], err = mapExists(path)
		}
		return err
	})
	if err != nil {
		t.Errorf("pins: %v", err)
	}
	return objects
}

func programExists(path string) (func() bool, error) {
	program, err := ebpf.LoadPinnedProgram(path, nil)
	if err != nil {
		return nil, err
	}
	defer program.Close()
	info, err := program.Info()
	if err != nil {
		return nil, err
	}
	id, _ := info.ID()
	return func() bool {
		program, err := ebpf.NewProgramFromID(id)
		if err != nil {
			return !errors.Is(err, fs.ErrNotExist)
		}
		_ = program.Close()
		return true
	}, nil
}

func mapExists(path string) (func() bool, error) {
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		return nil, err
	}
	id, _ := info.ID()
	return func() bool {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			return !errors.Is(err, fs.ErrNotExist)
		}
		_ = m.Close()
		return true
	}, nil
}

// read opens the instance for reading.
func (r *rig) read(t *testing.T, fn func(*loader.Datapath) error) {
	t.Helper()
	r.with(t, loader.Open, fn)
}

func (r *rig) with(t *testing.T, open func(loader.Instance) (*loader.Datapath, error), fn func(*loader.Datapath) error) {
	t.Helper()
	err := r.Host.Do(func() error {
		datapath, err := open(r.inst)
		if err != nil {
			return err
		}
		return errors.Join(fn(datapath), datapath.Close())
	})
	if err != nil {
		t.Fatal(err)
	}
}

// rules changes the rules in force.
func (r *rig) rules(t *testing.T, change func(*maps.Rules) error) {
	t.Helper()
	r.with(t, loader.OpenForWrite, func(d *loader.Datapath) error {
		rules, err := d.State().Rules()
		if err != nil {
			return err
		}
		if err := change(&rules); err != nil {
			return err
		}
		return d.State().SetRules(rules)
	})
}

// publish adds a DNAT rule for each of TCP and UDP, on every address of the host.
func (r *rig) publish(t *testing.T, ports maps.PortRange, to netip.Addr, toPorts maps.PortRange) {
	t.Helper()
	r.rules(t, func(rules *maps.Rules) error {
		for _, protocol := range []maps.Protocol{maps.TCP, maps.UDP} {
			rule := maps.DNATRule{Protocol: protocol, Ports: ports, To: to, ToPorts: toPorts}
			if _, err := rules.AddDNAT(rule); err != nil {
				return err
			}
		}
		return nil
	})
}

// drops returns the counters of drops that are not zero.
func (r *rig) drops(t *testing.T) map[string]uint64 {
	t.Helper()
	drops := make(map[string]uint64)
	r.read(t, func(d *loader.Datapath) error {
		counts, err := d.State().Counters()
		for _, count := range counts {
			if count.Drop && count.Packets > 0 {
				drops[count.Name] = count.Packets
			}
		}
		return err
	})
	return drops
}

// mustNotDrop fails the test if the datapath has dropped anything.
func (r *rig) mustNotDrop(t *testing.T) {
	t.Helper()
	if drops := r.drops(t); len(drops) > 0 {
		t.Errorf("dropped: %v", drops)
	}
}

// forEachMode runs a test once for each way to attach, in a lab of its own.
func forEachMode(t *testing.T, o lab.Options, test func(t *testing.T, r *rig, mode loader.AttachMode)) {
	t.Helper()
	for _, mode := range []loader.AttachMode{loader.TCX, loader.Clsact} {
		t.Run(mode.String(), func(t *testing.T) {
			if mode == loader.TCX {
				needTCX(t)
			}
			test(t, newRig(t, o), mode)
		})
	}
}

var features = sync.OnceValues(loader.Features)

// hasTCX tells whether this kernel has TCX, which 6.6 brought.
func hasTCX(t *testing.T) bool {
	t.Helper()
	list, err := features()
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(list, func(f loader.Feature) bool { return f.Name == "TCX" && f.Have })
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

func needTCX(t *testing.T) {
	t.Helper()
	needRoot(t)
	if !hasTCX(t) {
		t.Skip("this kernel has no TCX")
	}
}

// watch captures on a device until the test ends, and fails the test if packets were lost
// to the capture.
func watch(t *testing.T, n *lab.Node, device string, filter func(lab.Packet) bool) *lab.Capture {
	t.Helper()
	capture, err := lab.StartCapture(n, device, filter)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = capture.Close() })
	return capture
}

// mustSeeNothing ends a capture that was to stay empty.
func mustSeeNothing(t *testing.T, capture *lab.Capture, what string) {
	t.Helper()
	if err := capture.Close(); err != nil {
		t.Error(err)
	}
	if packets := capture.Packets(); len(packets) > 0 {
		t.Errorf("%s: %d packets, the first: %s", what, len(packets), packets[0])
	}
}

// inside tells whether an address is a container's or the bridge's.
func inside(addr netip.Addr) bool {
	return lab.BridgeSubnet(lab.FamilyOf(addr)).Contains(addr)
}

// leaks wants packets that show an address that nobody outside may see.
func leaks(p lab.Packet) bool { return inside(p.Src) }

// poll waits until the condition holds.
func poll(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !holds() {
		if time.Now().After(deadline) {
			t.Errorf("%s: not within %s", what, patience)
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// size returns how many bytes a transfer has: 1 GB in the long form, 100 MB by default.
func size() int64 {
	switch {
	case os.Getenv("TCNAT_TEST_LONG") != "":
		return 1 << 30
	case testing.Short():
		return 10 << 20
	}
	return 100 << 20
}

// tool runs a program in a node; the test is skipped where the program is missing, unless
// TCNAT_TEST_REQUIRE says that it must not be.
func tool(t *testing.T, n *lab.Node, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin", "/sbin"} { // not in everybody's PATH
		if err != nil {
			path, err = exec.LookPath(filepath.Join(dir, name))
		}
	}
	if err != nil {
		if os.Getenv("TCNAT_TEST_REQUIRE") != "" {
			t.Fatal(err)
		}
		t.Skipf("%s is not installed", name)
	}
	out, err := n.Command(t.Context(), path, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// at joins an address and a port.
func at(addr netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(addr, port) }

// name makes the name of a subtest.
func name(parts ...any) string {
	text := fmt.Sprint(parts[0])
	for _, part := range parts[1:] {
		text += fmt.Sprintf("/%v", part)
	}
	return text
}
