package loader

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"

	"tcnat/bpf"
	state "tcnat/maps"
)

func TestAttachDetach(t *testing.T) {
	for _, mode := range []AttachMode{Auto, TCX, Clsact} {
		t.Run(mode.String(), func(t *testing.T) {
			h := newHost(t)
			h.wantNothing()
			opts := h.options(mode)
			opts.Spec = nil // the real one
			status := h.attach(opts)
			if !status.Live {
				t.Error("not live")
			}
			kind := automatic(t)
			if mode == Clsact {
				kind = state.AttachClsact
			}
			want := []DeviceStatus{
				{Name: "docker0", Class: state.Bridge, Attach: kind, OwnQdisc: kind == state.AttachClsact,
					Ingress: HookStatus{Program: bpf.NATProgFromBridge}, Egress: HookStatus{Program: bpf.NATProgToBridge}},
				{Name: "eth0", Class: state.Uplink, Attach: kind, OwnQdisc: kind == state.AttachClsact,
					Ingress: HookStatus{Program: bpf.NATProgFromUplink}, Egress: HookStatus{Program: bpf.NATProgToUplink}},
			}
			ids := cmpopts.IgnoreFields(HookStatus{}, "ID", "Pinned", "Tag")
			if diff := cmp.Diff(want, status.Devices, ids, cmpopts.IgnoreFields(DeviceStatus{}, "Ifindex")); diff != "" {
				t.Error(diff)
			}
			h.detach()
			if found, err := Detach(context.Background(), h.inst); found || err != nil {
				t.Errorf("second detach: found %v, error %v", found, err)
			}
			if _, err := Open(h.inst); !errors.Is(err, ErrNotAttached) {
				t.Errorf("open after detach: %v", err)
			}
		})
	}
}

// ids are what the kernel calls the instance's pinned maps and programs.
func (h *host) ids() (tables map[string]ebpf.MapID, progs map[string]ebpf.ProgramID) {
	h.t.Helper()
	d, err := Open(h.inst)
	must(h.t, err)
	defer d.Close()
	tables = make(map[string]ebpf.MapID)
	for name, m := range d.tables.maps {
		tables[name], err = mapID(m)
		must(h.t, err)
	}
	progs, err = programIDs(d.progs.progs)
	must(h.t, err)
	return tables, progs
}

func TestAttachTwiceChangesNothing(t *testing.T) {
	for _, mode := range []AttachMode{TCX, Clsact} {
		t.Run(mode.String(), func(t *testing.T) {
			h := newHost(t)
			first := h.attach(h.options(mode))
			tables, progs := h.ids()
			second := h.attach(h.options(mode))
			if diff := cmp.Diff(first, second); diff != "" {
				t.Error(diff)
			}
			tables2, progs2 := h.ids()
			if !maps.Equal(tables, tables2) || !maps.Equal(progs, progs2) {
				t.Errorf("programs went from %v to %v, maps from %v to %v", progs, progs2, tables, tables2)
			}
		})
	}
}

func TestUpgrade(t *testing.T) {
	rule := state.DNATRule{
		Protocol: 6, Ports: state.PortRange{First: 3005, Last: 3005},
		To: netip.MustParseAddr("172.17.0.2"), ToPorts: state.PortRange{First: 3005, Last: 3005},
	}
	for _, mode := range []AttachMode{TCX, Clsact} {
		t.Run(mode.String(), func(t *testing.T) {
			h := newHost(t)
			h.attach(h.options(mode))
			h.changeRules(func(rules *state.Rules) {
				_, err := rules.AddDNAT(rule)
				must(t, err)
			})
			wantRules := h.rules()
			tables, progs := h.ids()
			for version := range int32(3) {
				opts := h.options(mode)
				opts.Spec = rebuilt(version + 1)
				status := h.attach(opts) // fails on a hook that does not run the pinned program
				tables2, progs2 := h.ids()
				if !maps.Equal(tables, tables2) {
					t.Fatalf("maps went from %v to %v", tables, tables2)
				}
				for _, name := range hookPrograms() {
					if slices.Contains(l3Programs(), name) {
						continue // no device needs it
					}
					if id := progs2[name]; id == progs[name] {
						t.Fatalf("%s is still program %d", name, id)
					}
				}
				progs = progs2
				if !status.Live {
					t.Fatal("not live")
				}
				if diff := cmp.Diff(wantRules.DNAT, h.rules().DNAT, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
					t.Fatal(diff)
				}
				h.wantExpiryOf(progs)
			}
			h.detach()
		})
	}
}

// wantExpiryOf fails unless the pinned start_expiry of these programs is the one that armed
// the timer last, as far as that shows: it runs without error.
func (h *host) wantExpiryOf(progs map[string]ebpf.ProgramID) {
	h.t.Helper()
	program, err := ebpf.NewProgramFromID(progs[bpf.NATProgStartExpiry])
	must(h.t, err)
	defer program.Close()
	must(h.t, startExpiry(map[string]*ebpf.Program{bpf.NATProgStartExpiry: program}))
}

func (h *host) changeRules(change func(*state.Rules)) {
	h.t.Helper()
	d, err := OpenForWrite(h.inst)
	must(h.t, err)
	defer d.Close()
	rules, err := d.State().Rules()
	must(h.t, err)
	change(&rules)
	must(h.t, d.State().SetRules(rules))
}

func (h *host) rules() state.Rules {
	h.t.Helper()
	d, err := Open(h.inst)
	must(h.t, err)
	defer d.Close()
	rules, err := d.State().Rules()
	must(h.t, err)
	return rules
}

// brokenBuild is the datapath with one program replaced.
func brokenBuild(name string, instructions asm.Instructions) func() (*ebpf.CollectionSpec, error) {
	return func() (*ebpf.CollectionSpec, error) {
		spec, err := small(77)()
		if err != nil {
			return nil, err
		}
		spec.Programs[name] = &ebpf.ProgramSpec{
			Name: name, Type: ebpf.SchedCLS, License: "Dual BSD/GPL", Instructions: instructions,
		}
		return spec, nil
	}
}

func TestFailureLeavesWhatWasThere(t *testing.T) {
	builds := map[string]func() (*ebpf.CollectionSpec, error){
		"verifier": brokenBuild(bpf.NATProgToUplink, asm.Instructions{asm.Return()}),
		"expiry":   brokenBuild(bpf.NATProgStartExpiry, asm.Instructions{asm.Mov.Imm(asm.R0, -22), asm.Return()}),
		"missing": func() (*ebpf.CollectionSpec, error) {
			spec, err := small(78)()
			delete(spec.Programs, bpf.NATProgFromUplink)
			return spec, err
		},
	}
	for name, build := range builds {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			opts := h.options(Auto)
			opts.Spec = build
			if _, err := Attach(context.Background(), h.inst, opts, nil); err == nil {
				t.Fatal("first attach: no error")
			} else if name == "verifier" && VerifierLog(err, 2) == "" {
				t.Errorf("no verifier log in %v", err)
			}
			h.wantNothing()
			before := h.attach(h.options(Auto))
			tables, progs := h.ids()
			if _, err := Attach(context.Background(), h.inst, opts, nil); err == nil {
				t.Fatal("upgrade: no error")
			}
			after, err := h.status()
			must(t, err)
			if diff := cmp.Diff(*before, after); diff != "" {
				t.Error(diff)
			}
			tables2, progs2 := h.ids()
			if !maps.Equal(tables, tables2) || !maps.Equal(progs, progs2) {
				t.Errorf("programs went from %v to %v", progs, progs2)
			}
			h.detach()
		})
	}
}

// TestFailureOnTheLastHook: what was swapped before it goes back, what was new goes away.
func TestFailureOnTheLastHook(t *testing.T) {
	h := newHost(t)
	h.attach(h.options(Clsact))
	before, err := h.status()
	must(t, err)
	must(t, h.nl.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: h.index("eth1"), Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS,
	}}))
	opts := h.options(Clsact)
	opts.Uplinks = []string{"eth0", "eth1"} // the second has no room for clsact
	opts.Spec = small(5)
	if _, err := Attach(context.Background(), h.inst, opts, nil); !errors.Is(err, ErrConflict) || strings.Contains(err.Error(), "going back failed") {
		t.Fatalf("attach: %v, want ErrConflict, and all taken back", err)
	}
	after, err := h.status()
	must(t, err)
	if diff := cmp.Diff(before, after); diff != "" {
		t.Error(diff)
	}
	if automatic(t) == state.AttachTCX { // which has room
		opts.Mode = Auto
		h.attach(opts)
	}
	h.detach()
}

func (h *host) status() (Status, error) {
	d, err := Open(h.inst)
	if err != nil {
		return Status{}, err
	}
	defer d.Close()
	return d.Status()
}

func TestDevicesComeAndGo(t *testing.T) {
	for _, mode := range []AttachMode{TCX, Clsact} {
		t.Run(mode.String(), func(t *testing.T) {
			h := newHost(t)
			h.attach(h.options(mode))
			opts := h.options(mode)
			opts.Bridges, opts.Uplinks = nil, []string{"eth1"}
			want := []string{"docker0", "eth0", "eth1"}
			if got := deviceNames(h.attach(opts)); !slices.Equal(got, want) {
				t.Fatalf("attached to %v, want %v", got, want)
			}
			must(t, h.nl.LinkDel(h.link("eth1")))
			status, err := h.status()
			must(t, err)
			if len(status.Problems) != 1 {
				t.Errorf("problems %q, want one about the device that is gone", status.Problems)
			}
			if got := deviceNames(h.attach(h.options(mode))); !slices.Equal(got, want[:2]) {
				t.Errorf("attached to %v, want %v", got, want[:2])
			}
			must(t, h.nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth1"}, PeerName: "eth1p"}))
			if got := deviceNames(h.attach(opts)); !slices.Equal(got, want) {
				t.Errorf("attached to %v, want %v", got, want)
			}
			h.detach()
		})
	}
}

func deviceNames(s *Status) []string {
	var names []string
	for _, d := range s.Devices {
		names = append(names, d.Name)
	}
	return names
}

func TestConflicts(t *testing.T) {
	h := newHost(t)
	h.attach(h.options(TCX))
	for name, change := range map[string]func(*AttachOptions){
		"other mode":       func(o *AttachOptions) { o.Mode = Clsact },
		"bridge as uplink": func(o *AttachOptions) { o.Bridges, o.Uplinks = nil, []string{"docker0"} },
		"more flows":       func(o *AttachOptions) { o.MaxFlows = 1 << 20 },
	} {
		opts := h.options(Auto)
		change(&opts)
		if _, err := Attach(context.Background(), h.inst, opts, nil); !errors.Is(err, ErrConflict) {
			t.Errorf("%s: %v, want ErrConflict", name, err)
		}
	}
	status, err := h.status()
	must(t, err)
	if len(status.Problems) > 0 || status.Config.MaxFlows != 4096 {
		t.Errorf("after conflicts: %+v", status)
	}
}

// TestSync: what attach makes of addresses, and what it leaves alone.
func TestSync(t *testing.T) {
	h := newHost(t)
	h.attach(h.options(Auto))
	user := state.SNATRule{Source: netip.MustParsePrefix("192.168.9.0/24"), Masquerade: true}
	h.changeRules(func(rules *state.Rules) {
		_, err := rules.AddSNAT(user)
		must(t, err)
	})
	type view struct {
		Attach, User []string
		Subnets      []string
	}
	look := func() view {
		d, err := Open(h.inst)
		must(t, err)
		defer d.Close()
		rules, err := d.State().Rules()
		must(t, err)
		subnets, err := d.State().Subnets()
		must(t, err)
		var v view
		for _, rule := range rules.SNAT {
			if rule.Attach {
				v.Attach = append(v.Attach, rule.Source.String())
			} else {
				v.User = append(v.User, rule.Source.String())
			}
		}
		for prefix, ifindex := range subnets {
			if int(ifindex) != h.index("docker0") {
				t.Errorf("%s is on device %d", prefix, ifindex)
			}
			v.Subnets = append(v.Subnets, prefix.String())
		}
		slices.Sort(v.Attach)
		slices.Sort(v.Subnets)
		return v
	}
	both := []string{"172.17.0.0/16", "fd17::/64"}
	if diff := cmp.Diff(view{both, []string{"192.168.9.0/24"}, both}, look()); diff != "" {
		t.Error("after attach", diff)
	}
	old, err := netlink.ParseAddr("172.17.0.1/16")
	must(t, err)
	must(t, h.nl.AddrDel(h.link("docker0"), old))
	h.address("docker0", "10.88.0.1/24")
	h.attach(h.options(Auto))
	both = []string{"10.88.0.0/24", "fd17::/64"}
	if diff := cmp.Diff(view{both, []string{"192.168.9.0/24"}, both}, look()); diff != "" {
		t.Error("after another address", diff)
	}
	opts := h.options(Auto)
	opts.NoMasquerade = true
	if status := h.attach(opts); !status.Config.Routed {
		t.Error("not routed without masquerade")
	}
	if diff := cmp.Diff(view{nil, []string{"192.168.9.0/24"}, both}, look()); diff != "" {
		t.Error("without masquerade", diff)
	}
	h.changeRules(func(rules *state.Rules) {
		_, err := rules.AddSNAT(state.SNATRule{Source: netip.MustParsePrefix("10.88.0.0/24"),
			ToFirst: netip.MustParseAddr("203.0.113.2"), ToLast: netip.MustParseAddr("203.0.113.2")})
		must(t, err)
	})
	h.attach(h.options(Auto))
	if diff := cmp.Diff(view{[]string{"fd17::/64"}, []string{"10.88.0.0/24", "192.168.9.0/24"}, both}, look()); diff != "" {
		t.Error("with the user's own rule", diff)
	}
}

func TestConfigFollowsOptions(t *testing.T) {
	h := newHost(t)
	timeouts := state.DefaultTimeouts()
	timeouts.UDP *= 2
	opts := h.options(Auto)
	opts.AllowDirect, opts.NoIsolation, opts.PassUnmanaged, opts.AnySender, opts.Timeouts = true, true, true, true, &timeouts
	got := h.attach(opts).Config
	cookie, err := netnsCookie()
	must(t, err)
	want := state.Config{Live: true, NetnsCookie: cookie, MaxFlows: 4096, AllowDirect: true, NoIsolation: true,
		PassUnmanaged: true, AnySender: true, FastPath: state.FastPathEstablished, Mark: 1 << DefaultMark, Timeouts: timeouts}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	opts.Timeouts.ICMP = -1
	if _, err := Attach(context.Background(), h.inst, opts, nil); err == nil {
		t.Error("negative timeout: no error")
	}
	want.AllowDirect, want.NoIsolation, want.PassUnmanaged, want.AnySender = false, false, false, false
	if diff := cmp.Diff(want, h.attach(AttachOptions{Spec: small(0)}).Config); diff != "" {
		t.Error("plain attach keeps sizes and timeouts alone:", diff)
	}
}

// TestL3UplinkLater: programs that were not loaded at first come when a device needs them.
func TestL3UplinkLater(t *testing.T) {
	h := newHost(t)
	h.attach(h.options(Auto))
	if _, progs := h.ids(); progs[bpf.NATProgToUplinkL3] != 0 {
		t.Error("programs are loaded that no device needs")
	}
	must(t, h.nl.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tun0"}, Mode: netlink.TUNTAP_MODE_TUN}))
	opts := h.options(Auto)
	opts.Uplinks = []string{"tun0"}
	if tun := h.attach(opts).Devices[2]; tun.Ingress.Program != bpf.NATProgFromUplinkL3 || tun.Ingress.ID == 0 {
		t.Errorf("%+v", tun)
	}
	_, progs := h.ids()
	h.attach(h.options(Auto)) // does not name it
	if _, again := h.ids(); !maps.Equal(progs, again) {
		t.Errorf("programs went from %v to %v", progs, again)
	}
	must(t, os.Remove(filepath.Join(pinsIn(h.inst.Dir()).progs(), bpf.NATProgToUplinkL3)))
	if _, err := h.status(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("status without the program of an attached device: %v", err)
	}
	h.attach(h.options(Auto))
	h.detach()
}

func TestL3Uplink(t *testing.T) {
	h := newHost(t)
	must(t, h.nl.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tun0"}, Mode: netlink.TUNTAP_MODE_TUN}))
	for _, mode := range []AttachMode{TCX, Clsact} {
		opts := h.options(mode)
		opts.Uplinks = []string{"tun0"}
		tun := h.attach(opts).Devices[1]
		if !tun.L3 || tun.Ingress.Program != bpf.NATProgFromUplinkL3 || tun.Egress.Program != bpf.NATProgToUplinkL3 {
			t.Errorf("%s: %+v", mode, tun)
		}
		h.detach()
	}
}
