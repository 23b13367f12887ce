package loader

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
	state "tcnat/maps"
)

// tool executes a tool in the network namespace of the test's thread.
func tool(t *testing.T, name string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed", name)
	}
	if output, err := exec.Command(path, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, output)
	}
}

func nft(t *testing.T, rules string) {
	t.Helper()
	tool(t, "nft", rules)
}

const trackingRules = "table ip t { chain f { type filter hook forward priority 0; ct state established,related accept; }; }"

func TestAuto(t *testing.T) {
	for name, c := range map[string]struct {
		rules func(t *testing.T)
		by    string // "": nothing tracks
	}{
		"no rules": {func(*testing.T) {}, ""},
		"stateless nft": {func(t *testing.T) {
			nft(t, "table ip t { counter c { }; chain f { type filter hook forward priority 0; ip saddr 10.0.0.1 counter name c drop; }; }")
		}, ""},
		"nft ct":      {func(t *testing.T) { nft(t, trackingRules) }, "nft table ip t, chain f, has a rule with ct"},
		"nft ct inet": {func(t *testing.T) { nft(t, strings.Replace(trackingRules, "table ip", "table inet", 1)) }, "nft table inet t, chain f, has a rule with ct"},
		"nft masquerade": {func(t *testing.T) {
			nft(t, "table ip6 n { chain p { type nat hook postrouting priority 100; oifname eth9 masquerade; }; }")
		}, "nft table ip6 n, chain p, has a rule with masq"},
		"iptables-nft": {func(t *testing.T) {
			tool(t, "iptables-nft", "-A", "FORWARD", "-m", "connbytes", "--connbytes", "1:2", "--connbytes-dir", "both", "--connbytes-mode", "packets", "-j", "ACCEPT")
		}, "nft table ip filter, chain FORWARD, has a rule with connbytes"},
		"stateless legacy": {func(t *testing.T) { tool(t, "iptables-legacy", "-A", "FORWARD", "-s", "10.0.0.1", "-j", "DROP") }, ""},
		"legacy state": {func(t *testing.T) {
			tool(t, "iptables-legacy", "-A", "FORWARD", "-m", "state", "--state", "ESTABLISHED", "-j", "ACCEPT")
		}, "iptables has the rule -A FORWARD -m state --state ESTABLISHED -j ACCEPT"},
		"legacy masquerade 6": {func(t *testing.T) {
			tool(t, "ip6tables-legacy", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
		}, "ip6tables has the rule -A POSTROUTING -j MASQUERADE"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			c.rules(t)
			got := h.attach(h.options(Auto))
			want := state.FastPathEstablished
			if c.by != "" {
				want = state.FastPathOff
			}
			if got.FastPath.Mode != want || got.Config.FastPath != want || !strings.Contains(got.FastPath.Reason, c.by) {
				t.Errorf("fast path %+v, want %s because of %q", got.FastPath, want, c.by)
			}
			if (got.Config.Mark == 0) != (want == state.FastPathOff) {
				t.Errorf("mark %#x with fast path %s", got.Config.Mark, want)
			}
			if c.by != "" && !strings.Contains(got.FastPath.Reason, "--fast-path established") {
				t.Errorf("reason %q does not say how to switch it on", got.FastPath.Reason)
			}
			h.detach()
		})
	}
}

// TestAutoChanges: rules that come after attach are a problem until it runs again.
func TestAutoChanges(t *testing.T) {
	h := newHost(t)
	h.attach(h.options(Auto))
	nft(t, trackingRules)
	status, err := h.status()
	must(t, err)
	if len(status.Problems) != 1 || !strings.Contains(status.Problems[0], "connections are tracked since attach ran") {
		t.Errorf("problems %q", status.Problems)
	}
	if got := h.attach(h.options(Auto)).FastPath.Mode; got != state.FastPathOff {
		t.Errorf("fast path %s after attach, want off", got)
	}
	nft(t, "flush ruleset")
	// The kernel gives conntrack's hooks back by a work item (nf_tables_trans_destroy_work), and keeps
	// what was tracked meanwhile, such as the link's own multicast.
	for end := time.Now().Add(patience); !strings.Contains(status.FastPath.Reason, "are no more"); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still tracked without rules: %q", status.FastPath.Reason)
		}
		must(t, h.nl.ConntrackTableFlush(netlink.ConntrackTable))
		status, err = h.status()
		must(t, err)
	}
	if got := h.attach(h.options(Auto)).FastPath.Mode; got != state.FastPathEstablished {
		t.Errorf("fast path %s without rules, want established", got)
	}
	h.detach()
}

// hook is a netfilter hook as the kernel lists it: one attribute, the name of its function.
func hookMessage(function string) []byte {
	value := append([]byte(function), 0)
	message := make([]byte, nfnlHeader+unix.SizeofRtAttr, 64)
	binary.NativeEndian.PutUint16(message[nfnlHeader:], uint16(unix.SizeofRtAttr+len(value)))
	binary.NativeEndian.PutUint16(message[nfnlHeader+2:], nfnlaHookFunction)
	message = append(message, value...)
	return append(message, make([]byte, -len(message)&3)...)
}

// This machine's kernel need not list its hooks.
func TestTrackingHook(t *testing.T) {
	for function, want := range map[string]string{
		"ipv4_conntrack_in":      "netfilter's hook ipv4_conntrack_in",
		"nf_ct_bridge_pre":       "netfilter's hook nf_ct_bridge_pre",
		"nft_do_chain_ipv4":      "",
		"ipv4_conntrack_defrag":  "",
		"nf_ct_defrag_something": "",
	} {
		got, err := trackingHook([][]byte{hookMessage("other"), hookMessage(function)})
		if err != nil || got != want {
			t.Errorf("%s: %q, error %v, want %q", function, got, err, want)
		}
	}
	if _, err := trackingHook([][]byte{{1, 2, 3, 4}}); err == nil {
		t.Error("a hook without name: no error")
	}
}

func sysctls(t *testing.T) [2]string {
	t.Helper()
	var values [2]string
	for i, s := range conntrackSettings() {
		value, err := readSysctl(s.path)
		must(t, err)
		values[i] = value
	}
	return values
}

func TestSysctls(t *testing.T) {
	h := newHost(t)
	nft(t, trackingRules)
	before := sysctls(t)
	if before == [2]string{"1", "432000"} {
		t.Fatal("they are set already")
	}
	on := h.options(Auto)
	on.FastPath = FastPathEstablished
	want := func(what string, want [2]string) {
		t.Helper()
		if got := sysctls(t); got != want {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	h.attach(on)
	want("established", [2]string{"1", "432000"})
	h.attach(on)
	h.attach(h.options(Auto))
	want("auto again, which is off", before)
	h.attach(on)
	h.detach()
	want("detached", before)

	// Who changes one meanwhile keeps it.
	h.attach(on)
	must(t, writeSysctl(conntrackSettings()[1].path, "77"))
	status, err := h.status()
	must(t, err)
	if len(status.Problems) != 1 || !strings.Contains(status.Problems[0], "timeout_unacknowledged is 77") {
		t.Errorf("problems %q, want one about the sysctl", status.Problems)
	}
	h.detach()
	want("changed by somebody else", [2]string{before[0], "77"})
	must(t, writeSysctl(conntrackSettings()[1].path, before[1]))

	// Killed between noting and changing, or before the pins were there.
	h.attach(on)
	must(t, removePins(h.inst.Dir()))
	_, err = Detach(context.Background(), h.inst)
	must(t, err)
	want("pins lost", before)
	h.wantNothing()

	// A failed attach takes them back.
	bad := on
	bad.Spec = func() (*ebpf.CollectionSpec, error) {
		spec, err := small(78)()
		delete(spec.Programs, bpf.NATProgFromUplink)
		return spec, err
	}
	if _, err := Attach(context.Background(), h.inst, bad, nil); err == nil {
		t.Error("broken build: no error")
	}
	want("failed attach", before)
	h.wantNothing()

	// What cannot be noted is not changed.
	must(t, os.MkdirAll(h.inst.changesPath()+"+new", 0o700))
	if _, err := Attach(context.Background(), h.inst, on, nil); err == nil {
		t.Error("a note that cannot be written: no error")
	}
	must(t, os.Remove(h.inst.changesPath()+"+new"))
	want("not noted", before)
}

// TestSysctlsShared: the last of two instances restores them.
func TestSysctlsShared(t *testing.T) {
	h := newHost(t)
	nft(t, trackingRules)
	before := sysctls(t)
	on := h.options(Auto)
	on.FastPath = FastPathAlways
	if got := h.attach(on).FastPath.Mode; got != state.FastPathAlways {
		t.Errorf("fast path %s", got)
	}
	other := h.inst
	other.Name = "other"
	opts := on
	opts.Uplinks = []string{"eth1"}
	_, err := Attach(context.Background(), other, opts, nil)
	must(t, err)
	for _, inst := range []Instance{h.inst, other} {
		if got := sysctls(t); got != [2]string{"1", "432000"} {
			t.Errorf("%s attached: %v", inst, got)
		}
		_, err := Detach(context.Background(), inst)
		must(t, err)
	}
	if got := sysctls(t); got != before {
		t.Errorf("both detached: %v, want %v", got, before)
	}
	h.wantNothing()
}

func TestNoSysctlWithoutTracking(t *testing.T) {
	h := newHost(t)
	before := sysctls(t)
	on := h.options(Auto)
	on.FastPath = FastPathEstablished
	h.attach(on)
	if got := sysctls(t); got != before {
		t.Errorf("sysctls %v, want %v", got, before)
	}
	if _, err := os.Stat(h.inst.changesPath()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a note of changes is there: %v", err)
	}
	h.detach()
}

func TestMark(t *testing.T) {
	h := newHost(t)
	mask := uint32(0xf000)
	rule := netlink.NewRule()
	rule.Mark, rule.Mask, rule.Table, rule.Priority, rule.Family = 0x1000, &mask, 100, 500, netlink.FAMILY_V6
	must(t, h.nl.RuleAdd(rule))
	opts := h.options(Auto)
	_, err := Attach(context.Background(), h.inst, opts, nil)
	const want = "mark 12: bit is in use: the routing rule fwmark 0x1000/0xf000 lookup 100 (priority 500) looks at it: use --mark 16"
	if !errors.Is(err, ErrMarkUsed) || err.Error() != want {
		t.Errorf("attach: %v, want %s", err, want)
	}
	h.wantNothing()
	bit := uint8(16)
	opts.Mark = &bit
	if got := h.attach(opts).Config.Mark; got != 1<<16 {
		t.Errorf("mark %#x, want bit 16", got)
	}
	opts.Mark = nil
	if _, err := Attach(context.Background(), h.inst, opts, nil); !errors.Is(err, ErrMarkUsed) {
		t.Errorf("attach again: %v", err)
	}
	status, err := h.status()
	must(t, err)
	if status.Config.Mark != 1<<16 {
		t.Errorf("mark %#x after a refusal", status.Config.Mark)
	}
	opts.FastPath = FastPathOff // looks at no mark
	if got := h.attach(opts); got.Config.Mark != 0 || got.FastPath.Reason != "switched off" {
		t.Errorf("off: %+v, mark %#x", got.FastPath, got.Config.Mark)
	}
	bit = 32
	opts.Mark = &bit
	if _, err := Attach(context.Background(), h.inst, opts, nil); err == nil {
		t.Error("mark 32: no error")
	}
	h.detach()
}
