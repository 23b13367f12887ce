package main

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"tcnat/loader"
	"tcnat/maps"
)

var goldenDevices = devices{1: "lo", 2: "docker0", 3: "eth0"}

func goldenSNAT() []maps.SNATRule {
	return []maps.SNATRule{
		{ID: 1, Source: netip.MustParsePrefix("172.17.0.0/16"), Masquerade: true, Attach: true},
		{
			ID: 7, Source: netip.MustParsePrefix("172.17.0.0/24"), Uplink: 3,
			ToFirst: netip.MustParseAddr("203.0.113.2"), ToLast: netip.MustParseAddr("203.0.113.9"),
			Ports:  maps.PortRange{First: 20000, Last: 29999},
			Except: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.168.0.0/16")},
		},
		{
			ID: 9, Source: netip.MustParsePrefix("fd00:17::/64"), Uplink: 99, // a device that is gone
			ToFirst: netip.MustParseAddr("2001:db8::1"), ToLast: netip.MustParseAddr("2001:db8::1"),
			Ports: maps.PortRange{First: 1024, Last: 2047},
		},
	}
}

func goldenDNAT() []maps.DNATRule {
	return []maps.DNATRule{
		{
			ID: 2, Protocol: maps.TCP, Ports: maps.SinglePort(3005),
			To: netip.MustParseAddr("172.17.0.2"), ToPorts: maps.SinglePort(3005),
		},
		{
			ID: 3, Protocol: maps.UDP, Destination: netip.MustParseAddr("203.0.113.2"), Ingress: 3,
			Ports: maps.PortRange{First: 8000, Last: 8999}, To: netip.MustParseAddr("172.17.0.4"),
			Allow: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("192.0.2.1/32")},
		},
		{
			ID: 4, Protocol: maps.TCP, Ports: maps.SinglePort(80),
			To: netip.MustParseAddr("fd00:17::2"), ToPorts: maps.SinglePort(8080),
		},
	}
}

func goldenFlows() []maps.Flow {
	end := netip.MustParseAddrPort
	return []maps.Flow{
		{
			ID: 11, Translation: maps.SNAT, State: maps.FlowAnswered, Ifindex: 2, Rule: 1,
			Original: maps.Tuple{Protocol: maps.TCP, Src: end("172.17.0.2:40000"), Dst: end("1.1.1.1:443")},
			Reply:    maps.Tuple{Protocol: maps.TCP, Src: end("1.1.1.1:443"), Dst: end("203.0.113.2:40000")},
			Out:      maps.Traffic{Packets: 12, Bytes: 999}, In: maps.Traffic{Packets: 3456, Bytes: 5_000_000},
			FastOut: maps.LeaseFast, FastIn: maps.LeaseIdle,
			Idle: 1500 * time.Millisecond, Timeout: 2*time.Hour + 3*time.Minute + 58500*time.Millisecond,
		},
		{
			ID: 12, Translation: maps.DNAT, State: maps.FlowNew, Ifindex: 3, Rule: 4,
			Original: maps.Tuple{Protocol: maps.TCP, Src: end("[2001:db8:51::2]:50000"), Dst: end("[2001:db8:113::2]:80")},
			Reply:    maps.Tuple{Protocol: maps.TCP, Src: end("[fd00:17::2]:8080"), Dst: end("[2001:db8:51::2]:50000")},
			Out:      maps.Traffic{Packets: 1, Bytes: 80}, Timeout: 4 * time.Minute,
			FastOut: maps.LeaseHandshake, FastIn: maps.LeaseHandshake,
		},
		{
			ID: 13, Translation: maps.SNAT, State: maps.FlowAnswered, Ifindex: 2, Rule: 1,
			Original: maps.Tuple{Protocol: maps.ICMP, Src: end("172.17.0.2:77"), Dst: end("1.1.1.1:0")},
			Reply:    maps.Tuple{Protocol: maps.ICMP, Src: end("1.1.1.1:0"), Dst: end("203.0.113.2:77")},
			Out:      maps.Traffic{Packets: 1, Bytes: 98}, In: maps.Traffic{Packets: 1, Bytes: 98},
			FastOut: maps.LeaseProtocol, FastIn: maps.LeaseProtocol,
			Idle: 20 * time.Second, Timeout: 40 * time.Second,
		},
	}
}

func goldenFeatures() []loader.Feature {
	return []loader.Feature{
		{Name: "bpf_timer", Since: "5.15", Have: true, Required: true, Use: "flows expire with no process running"},
		{Name: "bpf_loop", Since: "5.17", Required: true, Use: "the search for a free port"},
		{Name: "TCX", Since: "6.6", Use: "attaches by links", Fallback: "clsact filters"},
	}
}

func goldenReport() *report {
	hook := func(program string, id uint32, tag string) loader.HookStatus {
		return loader.HookStatus{Program: program, Pinned: id, ID: id, Tag: tag}
	}
	fromUplink := hook("from_uplink", 63, "8c29e89f04cf00c8")
	fromUplink.Before, fromUplink.After = []string{"tcx firewall"}, []string{"clsact meter", "clsact shaper"}
	return &report{
		Status: loader.Status{
			Instance: "default", Pins: "/sys/fs/bpf/tcnat/default/v1", Live: true, NetnsCookie: 4711,
			Config:     maps.Config{Live: true, NetnsCookie: 4711, MaxFlows: 262144, Timeouts: maps.DefaultTimeouts(), FastPath: maps.FastPathEstablished, Mark: 1 << 12},
			FastPath:   loader.FastPathStatus{Mode: maps.FastPathEstablished, Reason: "no connections are tracked", Granted: 2, Redirected: 3456},
			HostAccess: loader.HostAccess{Attached: true, Cgroup: "/sys/fs/cgroup"},
			Ports: []loader.PortStatus{
				{
					Name: "veth1", Ifindex: 5, Bridge: "docker0", Attach: maps.AttachTCX, Peer: true,
					MAC: maps.MAC{2, 0x42, 0xac, 0x11, 0, 2}, Ingress: hook("from_port", 65, "74d8fddcc940061f"),
				},
				{
					Name: "veth2", Ifindex: 6, Bridge: "docker0", Attach: maps.AttachClsact, NoPeer: "its egress has the qdisc tbf",
					MAC: maps.MAC{2, 0x42, 0xac, 0x11, 0, 3}, Ingress: hook("from_port", 65, "74d8fddcc940061f"),
				},
				{Name: "veth3", Ifindex: 7, Bridge: "docker0", Slow: "it has no program: run tcnat attach again"},
			},
			Devices: []loader.DeviceStatus{
				{
					Name: "docker0", Ifindex: 2, Class: maps.Bridge, Attach: maps.AttachTCX,
					Ingress: hook("from_bridge", 61, "74d8fddcc940061f"), Egress: hook("to_bridge", 62, "a4aa2b1f9d265826"),
				},
				{
					Name: "eth0", Ifindex: 3, Class: maps.Uplink, Attach: maps.AttachClsact,
					Slow:    "packets would go past clsact meter, clsact shaper",
					Ingress: fromUplink, Egress: loader.HookStatus{Program: "to_uplink", Pinned: 64},
				},
			},
			Unmanaged: []loader.UnmanagedDevice{{Name: "wg0", Ifindex: 9, Packets: 12}},
			Problems:  []string{"uplink eth0 egress has no program: run tcnat attach again"},
		},
		snat: 1, dnat: 2, usage: maps.Usage{Flows: 3, Mappings: 1, FastOut: 1},
		expiry: maps.ExpiryStats{LastTick: 1700 * time.Millisecond, Ticks: 1234, Longest: 380 * time.Microsecond, Checked: 99},
		counters: []maps.Count{
			{Name: "fragment", Text: "A fragment came.", Drop: true},
			{Name: "no-flow", Text: "A packet belongs to no flow.", Drop: true, Packets: 7},
			{Name: "flows-created", Text: "A flow was made.", Packets: 3},
		},
		findings: []loader.Finding{{
			Setting: "net.ipv4.ip_forward", Value: "0",
			Problem: "the host forwards nothing", Remedy: "sysctl -w net.ipv4.ip_forward=1",
		}},
	}
}

func TestGoldenLists(t *testing.T) {
	for name, list := range map[string]func(*env) error{
		"snat-list.txt":   func(e *env) error { return e.printSNAT(goldenSNAT(), goldenDevices, false) },
		"snat-list.json":  func(e *env) error { return e.printSNAT(goldenSNAT(), goldenDevices, true) },
		"dnat-list.txt":   func(e *env) error { return e.printDNAT(goldenDNAT(), goldenDevices, false) },
		"dnat-list.json":  func(e *env) error { return e.printDNAT(goldenDNAT(), goldenDevices, true) },
		"flows-list.txt":  func(e *env) error { return e.printFlows(goldenFlows(), goldenDevices, false) },
		"flows-list.json": func(e *env) error { return e.printFlows(goldenFlows(), goldenDevices, true) },
		"empty-list.json": func(e *env) error { return e.printDNAT(nil, goldenDevices, true) },
		"features.txt":    func(e *env) error { return e.printFeatures(goldenFeatures(), false) },
		"features.json":   func(e *env) error { return e.printFeatures(goldenFeatures(), true) },
		"status.txt":      func(e *env) error { return goldenReport().write(e.stdout) },
		"status.json":     func(e *env) error { return writeJSON(e.stdout, goldenReport().entry()) },
	} {
		t.Run(name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			if err := list(newEnv(&stdout, &stderr)); err != nil {
				t.Fatal(err)
			}
			golden(t, name, stdout.String())
		})
	}
}

// Every command's help is in one file, and has an example.
func TestGoldenHelp(t *testing.T) {
	var all strings.Builder
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Hidden || cmd.Name() == "help" || cmd.Name() == "completion" {
			return
		}
		if cmd.Example == "" {
			t.Errorf("%s: no example", cmd.CommandPath())
		}
		args := append(strings.Fields(cmd.CommandPath())[1:], "--help")
		r := tcnat(t, args...)
		if r.code != exitDone || r.stderr != "" {
			t.Errorf("%s: exit code %d, stderr %q", args, r.code, r.stderr)
		}
		all.WriteString("$ tcnat " + strings.Join(args, " ") + "\n" + r.stdout + "\n")
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(newRoot(newEnv(nil, nil)))
	golden(t, "help.txt", all.String())
}
