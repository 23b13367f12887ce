package main

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tcnat/internal/lab"
)

// list reads the JSON of a command.
func list[T any](h *host, args ...string) T {
	h.t.Helper()
	var value T
	text := h.must(append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(text), &value); err != nil {
		h.t.Fatalf("%v: %v in %s", args, err, text)
	}
	return value
}

func (h *host) dnat() []string {
	h.t.Helper()
	var rules []string
	for _, rule := range list[[]dnatEntry](h, "dnat", "list") {
		rules = append(rules, strings.TrimSpace(strings.Join([]string{
			rule.Protocol, rule.Destination, rule.InInterface, rule.Dport, ">", rule.ToDestination, strings.Join(rule.Source, ","),
		}, " ")))
	}
	return rules
}

func (h *host) snat() []string {
	h.t.Helper()
	var rules []string
	for _, rule := range list[[]snatEntry](h, "snat", "list") {
		words := []string{rule.Source, rule.OutInterface, rule.ToSource, strings.Join(rule.Except, ",")}
		if rule.Masquerade {
			words = append(words, "masquerade")
		}
		if rule.MadeByAttach {
			words = append(words, "(attach)")
		}
		rules = append(rules, strings.Join(slices.DeleteFunc(words, func(w string) bool { return w == "" }), " "))
	}
	return rules
}

func (h *host) expect(what string, got []string, want ...string) {
	h.t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		h.t.Errorf("%s (-want +got)\n%s", what, diff)
	}
}

func TestRules(t *testing.T) {
	h := newHost(t, lab.Options{})
	if out := h.must("attach", "--bridge", lab.Bridge, "--uplink", lab.Uplink, "--attach", "tcx"); out != "bridge docker0: attached (tcx)\nuplink eth0: attached (tcx)\n1 port: attached\n"+
		"fast path: established: no connections are tracked\n" {
		t.Errorf("attach printed %q", out)
	}
	h.expect("no DNAT", h.dnat())
	h.expect("rules of attach", h.snat(), "172.17.0.0/16 masquerade (attach)", "fd00:17::/64 masquerade (attach)")

	h.must("dnat", "add", "-p", "tcp", "--dport", "3005", "--to-destination", "172.17.0.2:3005")
	h.must("dnat", "add", "-p", "udp", "-d", "203.0.113.2", "-i", "eth0", "--dport", "8000-8999",
		"--to-destination", "172.17.0.2", "-s", "198.51.100.0/24", "-s", "192.0.2.1")
	h.must("dnat", "add", "-p", "tcp", "--dport", "80", "--to-destination", "[fd00:17::2]:8080")
	h.expect("three added", h.dnat(),
		"tcp   3005 > 172.17.0.2:3005",
		"tcp   80 > [fd00:17::2]:8080",
		"udp 203.0.113.2 eth0 8000-8999 > 172.17.0.2 192.0.2.1/32,198.51.100.0/24")

	h.must("dnat", "del", "-p", "udp", "-d", "203.0.113.2", "-i", "eth0", "--dport", "8000-8999")
	h.must("dnat", "del", "-p", "tcp", "--dport", "3005", "--to-destination", "172.17.0.2:3005")
	h.expect("two deleted", h.dnat(), "tcp   80 > [fd00:17::2]:8080")
	h.must("dnat", "add", "-p", "sctp", "--dport", "3868-3870", "--to-destination", "172.17.0.2:4868-4870")
	h.expect("SCTP added", h.dnat(), "tcp   80 > [fd00:17::2]:8080", "sctp   3868-3870 > 172.17.0.2:4868-4870")
	h.must("flows", "list", "-p", "sctp")
	h.must("dnat", "del", "-p", "sctp", "--dport", "3868-3870")
	h.expect("SCTP deleted", h.dnat(), "tcp   80 > [fd00:17::2]:8080")

	h.must("snat", "add", "-s", "172.17.0.0/24", "-o", "eth0", "--to-source", "203.0.113.2-203.0.113.4:20000-29999", "--except", "10.0.0.0/8")
	h.must("snat", "del", "-s", "fd00:17::/64")
	h.expect("one added, attach's deleted", h.snat(),
		"172.17.0.0/16 masquerade (attach)",
		"172.17.0.0/24 eth0 203.0.113.2-203.0.113.4:20000-29999 10.0.0.0/8")
	h.must("attach", "--no-masquerade")
	h.expect("the user's stay", h.snat(), "172.17.0.0/24 eth0 203.0.113.2-203.0.113.4:20000-29999 10.0.0.0/8")

	r := h.tcnat("snat", "add", "-s", "10.9.0.0/16", "-o", "vethc1", "--masquerade")
	if r.code != exitDone || !strings.Contains(r.stderr, "warning: -o vethc1: not attached, so the rule is not used until it is (attached: docker0, eth0)\n") ||
		!strings.Contains(r.stderr, "warning: 10.9.0.0/16: on no managed bridge, so the rule is never used (managed: docker0 172.17.0.0/16, docker0 fd00:17::/64)\n") {
		t.Errorf("a rule that never holds: exit code %d, stderr\n%s", r.code, r.stderr)
	}
}

func TestFlows(t *testing.T) {
	h := newHost(t, lab.Options{})
	h.must("attach", "--bridge", lab.Bridge, "--uplink", lab.Uplink)
	world := h.World.Loopback(lab.IPv4)
	for _, f := range lab.Families() {
		if _, err := lab.Ping(t.Context(), h.Containers[0], h.World.Loopback(f), lab.PingOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for args, want := range map[string]int{
		"":                       2,
		"-p icmp":                1,
		"-p tcp":                 0,
		"-s 172.17.0.0/16":       1,
		"-d " + world.String():   1,
		"--container fd00:17::2": 1,
		"--container 172.17.0.3": 0,
		"-p icmpv6 --container fd00:17::2 -s ::/0": 1,
		"--dport 53": 0,
	} {
		words := append([]string{"flows", "list"}, strings.Fields(args)...)
		if flows := list[[]flowEntry](h, words...); len(flows) != want {
			t.Errorf("flows list %s: %d flows, want %d: %+v", args, len(flows), want, flows)
		}
	}
	flow := list[[]flowEntry](h, "flows", "list", "-p", "icmp")[0]
	if flow.Translation != "snat" || flow.State != "answered" || flow.Device != lab.Bridge || flow.Out.Packets != 1 || flow.In.Packets != 1 ||
		flow.Original.Source != "172.17.0.2" || flow.Reply.Destination != "203.0.113.2" || flow.Original.Destination != world.String() {
		t.Errorf("flow of a ping: %+v", flow)
	}
	if out := h.must("flows", "flush", "--container", "172.17.0.2"); out != "1 flow ended\n" {
		t.Errorf("flush of one printed %q", out)
	}
	for _, flow := range list[[]flowEntry](h, "flows", "list") {
		// What is flushed is listed until the expiry comes by.
		if ending := flow.State == "ending"; ending != (flow.Protocol == "icmp") {
			t.Errorf("after flush of the icmp one: %+v", flow)
		}
	}
	if out := h.must("flows", "flush"); out != "1 flow ended\n" {
		t.Errorf("flush of all printed %q", out)
	}
	if out := h.must("flows", "flush"); out != "0 flows ended\n" {
		t.Errorf("flush of none printed %q", out)
	}
}

func TestStatus(t *testing.T) {
	h := newHost(t, lab.Options{SecondUplink: true, HostSysctls: map[string]string{"net/ipv6/conf/all/forwarding": "0"}})
	r := h.tcnat("attach", "--bridge", lab.Bridge, "--uplink", lab.Uplink, "--attach", "clsact")
	if r.code != exitDone || !strings.Contains(r.stderr, "warning: net.ipv6.conf.all.forwarding = 0: ") {
		t.Errorf("attach on a host that does not forward IPv6: exit code %d, stderr %q", r.code, r.stderr)
	}
	// By the route to it, this leaves by the uplink that has no programs.
	if _, err := lab.Ping(t.Context(), h.Containers[0], h.Other.Loopback(lab.IPv4), lab.PingOptions{Timeout: 200 * time.Millisecond}); err == nil {
		t.Error("a container reached the world by a device without programs")
	}
	status := list[statusEntry](h, "status")
	if !status.Live || status.Instance != h.instance.Name || len(status.Devices) != 2 || status.Rules.SNAT != 2 || status.Flows.Max == 0 {
		t.Errorf("status: %+v", status)
	}
	for i, want := range []string{"docker0 bridge clsact from_bridge to_bridge", "eth0 uplink clsact from_uplink to_uplink"} {
		d := status.Devices[i]
		if got := strings.Join([]string{d.Name, d.Class, d.Attach, d.Ingress.Program, d.Egress.Program}, " "); got != want {
			t.Errorf("device %d: %s, want %s", i, got, want)
		}
		if d.Ingress.ID == 0 || d.Egress.ID == 0 || d.Ingress.Tag == "" || d.Egress.Tag == "" {
			t.Errorf("%s: %+v", d.Name, d)
		}
	}
	if len(status.Ports) != 1 || !status.Ports[0].Fast || !status.Ports[0].Peer || status.Ports[0].MAC == "" || status.Ports[0].Bridge != lab.Bridge {
		t.Errorf("ports: %+v", status.Ports)
	}
	if status.FastPath.Mode != "established" || status.FastPath.Asked != "auto" || status.FastPath.Mark != "0x1000" {
		t.Errorf("fast path: %+v", status.FastPath)
	}
	if len(status.Unmanaged) != 1 || status.Unmanaged[0].Name != lab.Uplink2 || status.Unmanaged[0].Packets != 1 {
		t.Errorf("devices without programs: %+v", status.Unmanaged)
	}
	if !slices.ContainsFunc(status.Drops, func(c counterEntry) bool { return c.Name == "no-uplink" && c.Count == 1 && c.Text != "" }) {
		t.Errorf("drops: %+v", status.Drops)
	}
	if !slices.ContainsFunc(status.Warnings, func(line string) bool { return strings.HasPrefix(line, "net.ipv6.conf.all.forwarding = 0: ") }) {
		t.Errorf("warnings: %q", status.Warnings)
	}
	text := h.must("status")
	for _, want := range []string{"in effect", "no-uplink", "eth1", "\nwarning: net.ipv6.conf.all.forwarding = 0: ", "rules      2 snat, 0 dnat\n", "fast path  established: "} {
		if !strings.Contains(text, want) {
			t.Errorf("status does not show %q:\n%s", want, text)
		}
	}
	h.waitForExpiry()
}

// waitForExpiry polls until the expiry has run.
func (h *host) waitForExpiry() {
	h.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		if status := list[statusEntry](h, "status"); status.Expiry.Ticks > 0 && status.Expiry.AgeSeconds < 1 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	h.t.Error("status shows no tick of the expiry")
}

func TestLoadPrintsCommands(t *testing.T) {
	h := newHost(t, lab.Options{})
	lines := strings.Split(strings.TrimSpace(h.must("load", "--bridge", lab.Bridge, "--uplink", lab.Uplink)), "\n")
	for _, want := range []string{"tc qdisc add dev docker0 clsact", "tc qdisc add dev eth0 clsact"} {
		if !slices.Contains(lines, want) {
			t.Errorf("%q is not printed: %q", want, lines)
		}
	}
	var filters int
	for _, line := range lines {
		if strings.HasPrefix(line, "tc filter add dev ") && strings.Contains(line, " bpf direct-action object-pinned "+h.instance.Dir()+"/") {
			filters++
		}
	}
	if filters != 5 { // one is the port's
		t.Errorf("%d filters are printed, want 5: %q", filters, lines)
	}
	for _, device := range []string{lab.Bridge, lab.Uplink} {
		if attached, err := h.Host.Attached(device); err != nil || len(attached) > 0 {
			t.Errorf("load attached something: %v, %v", attached, err)
		}
	}
}

func TestFeatures(t *testing.T) {
	h := newHost(t, lab.Options{})
	features := list[[]featureEntry](h, "features")
	if !slices.ContainsFunc(features, func(f featureEntry) bool { return f.Name == "bpf_timer" && f.Have && f.Required }) {
		t.Errorf("features: %+v", features)
	}
}

func TestLabUpAndDown(t *testing.T) {
	newHost(t, lab.Options{}) // for its checks
	t.Cleanup(func() { _ = lab.Down("cli-up") })
	r := tcnat(t, "lab", "up", "--name", "cli-up", "--containers", "2", "--second-uplink")
	if r.code != exitDone || !strings.Contains(r.stdout, "tcnat-cli-up-host") || !strings.Contains(r.stdout, "tcnat-cli-up-c2") {
		t.Fatalf("lab up: %+v", r)
	}
	if r := tcnat(t, "lab", "up", "--name", "cli-up"); r.code != exitFailed || strings.Count(r.stderr, "\n") != 1 {
		t.Errorf("lab up twice: %+v", r)
	}
	if r := tcnat(t, "--netns", "tcnat-cli-up-host", "--instance", "cli-up", "attach", "--bridge", lab.Bridge, "--uplink", lab.Uplink); r.code != exitDone {
		t.Errorf("attach: %+v", r)
	}
	if r := tcnat(t, "--netns", "tcnat-cli-up-host", "--instance", "cli-up", "detach"); r.code != exitDone {
		t.Errorf("detach: %+v", r)
	}
	if r := tcnat(t, "lab", "down", "--name", "cli-up"); r.code != exitDone {
		t.Errorf("lab down: %+v", r)
	}
	if r := tcnat(t, "lab", "down", "--name", "cli-up"); r.code != exitDone || r.stderr != "lab cli-up: no such lab: nothing changed\n" {
		t.Errorf("lab down twice: %+v", r)
	}
}

func TestLabDemo(t *testing.T) {
	newHost(t, lab.Options{}) // for its checks
	r := tcnat(t, "lab", "demo")
	if r.code != exitDone || strings.Contains(r.stdout, "FAILED") || strings.Count(r.stdout, "\nok ") < 15 {
		t.Errorf("exit code %d\n%s\n%s", r.code, r.stdout, r.stderr)
	}
}
