package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"tcnat/loader"
	"tcnat/maps"
)

// expiryLate is ten of the expiry's slowest ticks: later than that, nobody ends flows.
const expiryLate = 10 * 100 * time.Millisecond

func newStatus(e *env) *cobra.Command {
	var output outputFlag
	cmd := &cobra.Command{
		Use:   "status",
		Short: "what is attached where and how, rules, flows, drops by reason",
		Long: `Shows where the programs are attached and how, how many rules and flows there are, what
was dropped and why, devices without programs that containers' traffic would have left by,
when the expiry last ran, and what stands in the way on this host, each with its remedy.`,
		Example: "  tcnat status\n  tcnat status -o json",
		Args:    noArgs,
		RunE: e.inNetns(func(*cobra.Command) error {
			return e.read(func(datapath *loader.Datapath) error {
				report, err := newReport(datapath)
				if err != nil {
					return err
				}
				if output.json() {
					return writeJSON(e.stdout, report.entry())
				}
				return report.write(e.stdout)
			})
		}),
	}
	output.bind(cmd)
	return cmd
}

// report is all that status shows.
type report struct {
	loader.Status
	snat, dnat int
	usage      maps.Usage
	expiry     maps.ExpiryStats
	counters   []maps.Count
	findings   []loader.Finding
}

func newReport(datapath *loader.Datapath) (*report, error) {
	status, err := datapath.Status()
	if err != nil {
		return nil, err
	}
	r := &report{Status: status}
	state := datapath.State()
	rules, err := state.Rules()
	if err != nil {
		return nil, err
	}
	r.snat, r.dnat = len(rules.SNAT), len(rules.DNAT)
	if r.usage, err = state.Usage(); err != nil {
		return nil, err
	}
	if r.expiry, err = state.Expiry(); err != nil {
		return nil, err
	}
	if r.counters, err = state.Counters(); err != nil {
		return nil, err
	}
	r.findings, err = loader.Preflight(namesOf(&status, maps.Bridge), namesOf(&status, maps.Uplink))
	return r, err
}

// warnings are what should be looked at, a line each.
func (r *report) warnings() []string {
	var lines []string
	lines = append(lines, r.Problems...)
	switch {
	case r.expiry.Ticks == 0 && r.expiry.LastTick > expiryLate:
		lines = append(lines, "the expiry has never run, so flows do not end: run tcnat attach again")
	case r.expiry.LastTick > expiryLate:
		lines = append(lines, fmt.Sprintf("the expiry last ran %s ago, so flows do not end: run tcnat attach again", age(r.expiry.LastTick)))
	}
	for _, finding := range r.findings {
		lines = append(lines, findingText(finding))
	}
	return lines
}

// age is a time span for people, of three digits or so.
func age(d time.Duration) string {
	for _, unit := range []time.Duration{time.Hour, time.Minute, time.Second, time.Millisecond} {
		if d >= 10*unit {
			return d.Round(unit).String()
		}
		if d >= unit {
			return d.Round(unit / 10).String()
		}
	}
	return d.Round(time.Microsecond).String()
}

// The JSON of status.
type (
	statusEntry struct {
		Instance    string           `json:"instance"`
		Live        bool             `json:"live"`
		Pins        string           `json:"pins"`
		NetnsCookie uint64           `json:"netns_cookie"`
		FastPath    fastPathEntry    `json:"fast_path"`
		HostAccess  hostAccessEntry  `json:"host_access"`
		Devices     []deviceEntry    `json:"devices"`
		Ports       []portEntry      `json:"ports"`
		Options     optionsEntry     `json:"options"`
		Rules       rulesEntry       `json:"rules"`
		Flows       flowsEntry       `json:"flows"`
		Expiry      expiryEntry      `json:"expiry"`
		Drops       []counterEntry   `json:"drops"`
		Events      []counterEntry   `json:"events"`
		Unmanaged   []unmanagedEntry `json:"unmanaged_devices"`
		Warnings    []string         `json:"warnings"`
	}
	deviceEntry struct {
		Name    string    `json:"name"`
		Ifindex uint32    `json:"ifindex"`
		Class   string    `json:"class"`
		Attach  string    `json:"attach"`
		L3      bool      `json:"l3,omitempty"`
		Fast    bool      `json:"fast"`
		WhySlow string    `json:"why_slow,omitempty"`
		Ingress hookEntry `json:"ingress"`
		Egress  hookEntry `json:"egress"`
	}
	portEntry struct {
		Name      string     `json:"name"`
		Ifindex   uint32     `json:"ifindex"`
		Bridge    string     `json:"bridge"`
		Attach    string     `json:"attach,omitempty"`
		MAC       string     `json:"container_mac,omitempty"`
		Fast      bool       `json:"fast"`
		WhySlow   string     `json:"why_slow,omitempty"`
		Peer      bool       `json:"peer"`
		WhyNoPeer string     `json:"why_no_peer,omitempty"`
		Ingress   *hookEntry `json:"ingress,omitempty"`
	}
	fastPathEntry struct {
		Asked      string `json:"asked"`
		Mode       string `json:"mode"`
		Reason     string `json:"reason"`
		Mark       string `json:"mark,omitempty"`
		FlowsOut   int    `json:"flows_out"`
		FlowsIn    int    `json:"flows_in"`
		Granted    uint64 `json:"leases_granted"`
		Redirected uint64 `json:"packets_redirected"`
	}
	hostAccessEntry struct {
		Attached bool   `json:"attached"`
		Cgroup   string `json:"cgroup,omitempty"`
	}
	hookEntry struct {
		Program string   `json:"program"`
		ID      uint32   `json:"id"`
		Tag     string   `json:"tag"`
		Before  []string `json:"before,omitempty"`
		After   []string `json:"after,omitempty"`
	}
	optionsEntry struct {
		Masquerade       bool              `json:"masquerade"`
		Isolate          bool              `json:"isolate"`
		AllowDirect      bool              `json:"allow_direct"`
		Filtering        string            `json:"filtering"`
		UnmanagedDevices string            `json:"unmanaged_devices"`
		Timeouts         map[string]string `json:"timeouts"`
	}
	rulesEntry struct {
		SNAT int `json:"snat"`
		DNAT int `json:"dnat"`
	}
	flowsEntry struct {
		Count    int    `json:"count"`
		Max      uint32 `json:"max"`
		Mappings int    `json:"mappings"`

		Preallocated bool `json:"preallocated"`
	}
	expiryEntry struct {
		AgeSeconds     float64 `json:"age_seconds"`
		Ticks          uint64  `json:"ticks"`
		LongestSeconds float64 `json:"longest_seconds"`
		Checked        uint64  `json:"checked"`
	}
	counterEntry struct {
		Name  string `json:"name"`
		Text  string `json:"text"`
		Count uint64 `json:"count"`
	}
	unmanagedEntry struct {
		Name    string `json:"name"`
		Ifindex uint32 `json:"ifindex"`
		Packets uint64 `json:"packets"`
	}
)

func (r *report) entry() statusEntry {
	entry := statusEntry{
		Instance:    r.Instance,
		Live:        r.Live,
		Pins:        r.Pins,
		NetnsCookie: r.NetnsCookie,
		FastPath: fastPathEntry{
			Asked:      r.FastPath.Asked.String(),
			Mode:       r.FastPath.Mode.String(),
			Reason:     r.FastPath.Reason,
			FlowsOut:   r.usage.FastOut,
			FlowsIn:    r.usage.FastIn,
			Granted:    r.FastPath.Granted,
			Redirected: r.FastPath.Redirected,
		},
		HostAccess: hostAccessEntry(r.HostAccess),
		Devices:    []deviceEntry{},
		Ports:      []portEntry{},
		Options: optionsEntry{
			Masquerade:       !r.Config.Routed,
			Isolate:          !r.Config.NoIsolation,
			AllowDirect:      r.Config.AllowDirect,
			Filtering:        filteringText(r.Config),
			UnmanagedDevices: unmanagedText(r.Config),
			Timeouts:         timeoutTexts(r.Config.Timeouts),
		},
		Rules: rulesEntry{SNAT: r.snat, DNAT: r.dnat},
		Flows: flowsEntry{Count: r.usage.Flows, Max: r.Config.MaxFlows, Mappings: r.usage.Mappings, Preallocated: r.Preallocated},
		Expiry: expiryEntry{
			AgeSeconds:     r.expiry.LastTick.Seconds(),
			Ticks:          r.expiry.Ticks,
			LongestSeconds: r.expiry.Longest.Seconds(),
			Checked:        r.expiry.Checked,
		},
		Drops:     []counterEntry{},
		Events:    []counterEntry{},
		Unmanaged: []unmanagedEntry{},
		Warnings:  append([]string{}, r.warnings()...),
	}
	if r.Config.Mark != 0 {
		entry.FastPath.Mark = fmt.Sprintf("%#x", r.Config.Mark)
	}
	for _, port := range r.Ports {
		entry.Ports = append(entry.Ports, newPortEntry(port))
	}
	for _, device := range r.Devices {
		entry.Devices = append(entry.Devices, deviceEntry{
			Name: device.Name, Ifindex: device.Ifindex, Class: device.Class.String(), Attach: device.Attach.String(), L3: device.L3,
			Fast: device.Slow == "", WhySlow: device.Slow,
			Ingress: newHookEntry(device.Ingress), Egress: newHookEntry(device.Egress),
		})
	}
	for _, counter := range r.counters {
		c := counterEntry{Name: counter.Name, Text: counter.Text, Count: counter.Packets}
		if counter.Drop {
			entry.Drops = append(entry.Drops, c)
		} else {
			entry.Events = append(entry.Events, c)
		}
	}
	for _, device := range r.Unmanaged {
		entry.Unmanaged = append(entry.Unmanaged, unmanagedEntry(device))
	}
	return entry
}

func newPortEntry(port loader.PortStatus) portEntry {
	entry := portEntry{
		Name: port.Name, Ifindex: port.Ifindex, Bridge: port.Bridge, MAC: port.MAC.String(),
		Fast: port.Slow == "", WhySlow: port.Slow, Peer: port.Peer, WhyNoPeer: port.NoPeer,
	}
	if port.Attach != 0 {
		entry.Attach = port.Attach.String()
		ingress := newHookEntry(port.Ingress)
		entry.Ingress = &ingress
	}
	return entry
}

func newHookEntry(hook loader.HookStatus) hookEntry {
	return hookEntry{Program: hook.Program, ID: hook.ID, Tag: hook.Tag, Before: hook.Before, After: hook.After}
}

func unmanagedText(config maps.Config) string {
	if config.PassUnmanaged {
		return "pass"
	}
	return "drop"
}

func filteringText(config maps.Config) string {
	if config.AnySender {
		return "endpoint-independent"
	}
	return "endpoint-dependent"
}

func timeoutTexts(timeouts maps.Timeouts) map[string]string {
	return map[string]string{
		"tcp-established": shortDuration(timeouts.TCPEstablished),
		"tcp-transitory":  shortDuration(timeouts.TCPTransitory),
		"tcp-closed":      shortDuration(timeouts.TCPClosed),
		"udp":             shortDuration(timeouts.UDP),
		"udp-new":         shortDuration(timeouts.UDPNew),
		"udp-well-known":  shortDuration(timeouts.UDPWellKnown),
		"icmp":            shortDuration(timeouts.ICMP),
	}
}
