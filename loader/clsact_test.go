package loader

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	state "tcnat/maps"
)

// passing is somebody else's program.
func passing(t *testing.T) *ebpf.Program {
	t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "foreign", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	must(t, err)
	t.Cleanup(func() { program.Close() })
	return program
}

func (h *host) addQdisc(device string, q netlink.Qdisc) {
	h.t.Helper()
	q.Attrs().LinkIndex = h.index(device)
	must(h.t, h.nl.QdiscAdd(q))
}

func foreignClsact() netlink.Qdisc {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
}

func (h *host) addFilter(device string, at hook, priority uint16, program *ebpf.Program) {
	h.t.Helper()
	must(h.t, h.nl.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: h.index(device), Parent: at.parent(), Handle: 1,
			Protocol: unix.ETH_P_ALL, Priority: priority},
		Fd: program.FD(), Name: "foreign", DirectAction: true,
	}))
}

// others are the filters on the device's clsact qdisc, "none" without a qdisc.
func (h *host) others(device string) string {
	h.t.Helper()
	c := &clsact{nl: h.nl, inst: h.inst}
	kind, err := c.qdisc(h.index(device))
	must(h.t, err)
	if kind == "" {
		return "none"
	}
	words := []string{kind}
	for _, at := range []hook{{ingress: true}, {ingress: false}} {
		list, err := c.filters(h.index(device), at)
		must(h.t, err)
		for _, f := range list {
			words = append(words, at.String()+" "+f.(*netlink.BpfFilter).Name)
		}
	}
	return strings.Join(words, ", ")
}

func TestForeignFilterBefore(t *testing.T) {
	h := newHost(t)
	program := passing(t)
	h.addQdisc("eth0", foreignClsact())
	h.addFilter("eth0", hook{ingress: true}, 49152, program)
	h.addFilter("eth0", hook{ingress: false}, 49152, program)
	status := h.attach(h.options(Auto))
	bridge, uplink := status.Devices[0], status.Devices[1]
	if bridge.Attach != automatic(t) || uplink.Attach != state.AttachClsact || uplink.OwnQdisc {
		t.Errorf("attached to %s by %s, to %s by %s (own qdisc: %v); want the usual way, and clsact on the foreign qdisc",
			bridge.Name, bridge.Attach, uplink.Name, uplink.Attach, uplink.OwnQdisc)
	}
	theirs := []string{"clsact foreign"}
	if diff := cmp.Diff(theirs, uplink.Ingress.Before); diff != "" || uplink.Ingress.After != nil {
		t.Errorf("ingress: before %q, after %q", uplink.Ingress.Before, uplink.Ingress.After)
	}
	if diff := cmp.Diff(theirs, uplink.Egress.After); diff != "" || uplink.Egress.Before != nil {
		t.Errorf("egress: before %q, after %q", uplink.Egress.Before, uplink.Egress.After)
	}
	opts := h.options(Auto)
	opts.Spec = small(1)
	upgraded := h.attach(opts).Devices[1]
	if diff := cmp.Diff(theirs, upgraded.Ingress.Before); diff != "" {
		t.Error("after an upgrade", diff)
	}
	_, err := Detach(context.Background(), h.inst)
	must(t, err)
	if got, want := h.others("eth0"), "clsact, ingress foreign, egress foreign"; got != want {
		t.Errorf("after detach: %s, want %s", got, want)
	}
}

func TestForeignFilterDuring(t *testing.T) {
	h := newHost(t)
	h.attach(h.options(Clsact))
	h.addFilter("eth0", hook{ingress: true}, 7, passing(t))
	h.attach(h.options(Clsact))
	_, err := Detach(context.Background(), h.inst)
	must(t, err)
	if got, want := h.others("eth0"), "clsact, ingress foreign"; got != want {
		t.Errorf("eth0 after detach: %s, want %s", got, want)
	}
	if got := h.others("docker0"); got != "none" {
		t.Errorf("docker0 after detach: %s, want none", got)
	}
}

func TestForeignQdiscSurvives(t *testing.T) {
	h := newHost(t)
	h.addQdisc("eth0", foreignClsact())
	if device := h.attach(h.options(Clsact)).Devices[1]; device.OwnQdisc {
		t.Error("the foreign qdisc passes for ours")
	}
	_, err := Detach(context.Background(), h.inst)
	must(t, err)
	if got := h.others("eth0"); got != "clsact" {
		t.Errorf("after detach: %s, want clsact", got)
	}
}

func TestIngressQdisc(t *testing.T) {
	needTCX(t)
	h := newHost(t)
	h.addQdisc("eth0", &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}})
	h.addFilter("eth0", hook{ingress: true}, 7, passing(t))
	if _, err := Attach(context.Background(), h.inst, h.options(Clsact), nil); !errors.Is(err, ErrConflict) {
		t.Errorf("clsact: %v, want ErrConflict", err)
	}
	h.wantNothing()
	uplink := h.attach(h.options(Auto)).Devices[1]
	if uplink.Attach != state.AttachTCX {
		t.Errorf("auto: attached by %s, want tcx", uplink.Attach)
	}
	if diff := cmp.Diff([]string{"clsact foreign"}, uplink.Ingress.After); diff != "" {
		t.Error(diff)
	}
	h.detach()
	if got, want := h.others("eth0"), "ingress, ingress foreign"; got != want {
		t.Errorf("after detach: %s, want %s", got, want)
	}
}

func TestForeignTCX(t *testing.T) {
	needTCX(t)
	h := newHost(t)
	attach := func(at ebpf.AttachType) {
		l, err := link.AttachTCX(link.TCXOptions{Interface: h.index("eth0"), Program: passing(t), Attach: at})
		must(t, err)
		t.Cleanup(func() { l.Close() })
	}
	attach(ebpf.AttachTCXIngress)
	attach(ebpf.AttachTCXEgress)
	uplink := h.attach(h.options(TCX)).Devices[1]
	attach(ebpf.AttachTCXIngress)
	theirs := []string{"tcx foreign"}
	if cmp.Diff(theirs, uplink.Ingress.Before) != "" || cmp.Diff(theirs, uplink.Egress.After) != "" {
		t.Errorf("want last on ingress and first on egress: %+v", uplink)
	}
	opts := h.options(TCX)
	opts.Spec = small(1)
	uplink = h.attach(opts).Devices[1]
	if cmp.Diff(theirs, uplink.Ingress.Before) != "" || cmp.Diff(theirs, uplink.Ingress.After) != "" {
		t.Errorf("an upgrade keeps the place between the two: %+v", uplink.Ingress)
	}
	_, err := Detach(context.Background(), h.inst)
	must(t, err)
	left, err := link.QueryPrograms(link.QueryOptions{Target: h.index("eth0"), Attach: ebpf.AttachTCXIngress})
	must(t, err)
	if len(left.Programs) != 2 {
		t.Errorf("%d foreign programs are left of 2", len(left.Programs))
	}
}

// TestLoad runs the commands that Load prints, upgrades what they attached, and detaches it.
func TestLoad(t *testing.T) {
	if _, err := exec.LookPath("tc"); err != nil {
		t.Skip("no tc")
	}
	h := newHost(t)
	commands, err := Load(context.Background(), h.inst, h.options(Auto))
	must(t, err)
	status, err := h.status()
	must(t, err)
	if len(status.Problems) != 4 || !status.Live {
		t.Errorf("before the commands: live %v, problems %q", status.Live, status.Problems)
	}
	for _, command := range commands {
		if out, err := exec.Command("sh", "-c", command).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
	}
	status, err = h.status()
	must(t, err)
	if len(status.Problems) > 0 {
		t.Errorf("after the commands: %q", status.Problems)
	}
	again, err := Load(context.Background(), h.inst, h.options(Auto))
	must(t, err)
	filters := slices.DeleteFunc(slices.Clone(commands), func(c string) bool { return strings.HasPrefix(c, "tc qdisc add ") })
	if diff := cmp.Diff(filters, again); diff != "" || len(filters) == len(commands) {
		t.Errorf("once the qdiscs are there, the filters alone are to be added: %s", diff)
	}
	opts := h.options(Auto)
	opts.Spec = small(1)
	for _, device := range h.attach(opts).Devices {
		if device.Attach != state.AttachManual {
			t.Errorf("%s is attached by %s, want manual", device.Name, device.Attach)
		}
	}
	_, err = Detach(context.Background(), h.inst)
	must(t, err)
	if got := h.others("eth0"); got != "clsact" {
		t.Errorf("after detach: %s, want the user's clsact alone", got)
	}
}

func TestAttachAfterLoad(t *testing.T) {
	h := newHost(t)
	_, err := Load(context.Background(), h.inst, h.options(Auto))
	must(t, err)
	for _, device := range h.attach(h.options(Auto)).Devices {
		if device.Attach != automatic(t) {
			t.Errorf("%s is attached by %s, want %s", device.Name, device.Attach, automatic(t))
		}
	}
	h.detach()
}

// TestQdiscOfTwoInstances: who made the qdisc may go first; it goes with the last.
func TestQdiscOfTwoInstances(t *testing.T) {
	for _, makerFirst := range []bool{true, false} {
		t.Run(fmt.Sprintf("maker goes first %t", makerFirst), func(t *testing.T) {
			h := newHost(t)
			h.attach(h.options(Clsact))
			other := h.inst
			other.Name = "other-one"
			opts := h.options(Clsact)
			opts.Uplinks = []string{"eth1"}
			_, err := Attach(context.Background(), other, opts, nil)
			must(t, err)
			order := []Instance{h.inst, other}
			if !makerFirst {
				slices.Reverse(order)
			}
			for _, inst := range order {
				if !h.hasClsact("docker0") {
					t.Errorf("%s is still attached, and docker0 has no clsact qdisc", inst)
				}
				_, err := Detach(context.Background(), inst)
				must(t, err)
			}
			h.wantNothing()
		})
	}
}
