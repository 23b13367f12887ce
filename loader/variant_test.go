package loader

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
	state "tcnat/maps"
)

// withFirst is a datapath that has a program for first packets at the ports.
func withFirst() (*ebpf.CollectionSpec, error) {
	spec, err := small(3)()
	if err != nil {
		return nil, err
	}
	first := spec.Programs[bpf.NATProgFromPort].Copy()
	first.Name = bpf.NATProgFromPort + firstSuffix
	first.Instructions[1].Constant = 4 // other code
	spec.Programs[first.Name] = first
	return spec, nil
}

func TestKeepNeeded(t *testing.T) {
	var hostPrograms []string
	for _, h := range hostHooks() {
		hostPrograms = append(hostPrograms, h.program)
	}
	for _, c := range []struct {
		l3      bool
		host    bool
		fast    state.FastPath
		without []string
	}{
		{true, true, state.FastPathEstablished, []string{"from_port_first"}},
		{false, true, state.FastPathOff, []string{"from_port_first", bpf.NATProgFromUplinkL3, bpf.NATProgToUplinkL3}},
		{true, true, state.FastPathAlways, []string{"from_port"}},
		{true, false, state.FastPathEstablished, append(hostPrograms, "from_port_first")},
	} {
		all, err := withFirst()
		must(t, err)
		delete(all.Programs, bpf.NATProgFromBridge+firstSuffix)
		spec := all.Copy()
		keepNeeded(spec, c.l3, c.host, c.fast)
		for name := range all.Programs {
			if _, kept := spec.Programs[name]; kept == slices.Contains(c.without, name) {
				t.Errorf("l3 %v, host %v, %s: %s kept %v", c.l3, c.host, c.fast, name, kept)
			}
		}
	}
}

// TestModesSwapPrograms: always has programs of its own, where the datapath has them.
func TestModesSwapPrograms(t *testing.T) {
	for _, mode := range []AttachMode{TCX, Clsact} {
		t.Run(mode.String(), func(t *testing.T) {
			h := newHost(t)
			h.container("veth1", mac1)
			opts := h.options(mode)
			opts.Spec = withFirst
			tags := make(map[FastPath]string)
			for _, fast := range []FastPath{FastPathAuto, FastPathAlways, FastPathAlways, FastPathEstablished, FastPathAlways} {
				opts.FastPath = fast
				status := h.attach(opts)
				ingress := status.Ports[0].Ingress
				if ingress.ID == 0 || ingress.ID != ingress.Pinned {
					t.Fatalf("%s: %+v", fast, ingress)
				}
				tags[fast] = ingress.Tag
			}
			if tags[FastPathAuto] != tags[FastPathEstablished] || tags[FastPathAuto] == tags[FastPathAlways] {
				t.Errorf("tags of what runs on the port: %v", tags)
			}
			h.detach()
		})
	}
	h := newHost(t)
	opts := h.options(Auto)
	opts.FastPath = FastPathAlways
	commands, err := Load(context.Background(), h.inst, opts)
	must(t, err)
	own, err := ownSpec()
	must(t, err)
	want := "/" + variant(own.Programs, bpf.NATProgFromBridge, state.FastPathAlways)
	if !slices.ContainsFunc(commands, func(line string) bool { return strings.HasSuffix(line, want) }) {
		t.Errorf("commands %q: none pins %s", commands, want)
	}
}
