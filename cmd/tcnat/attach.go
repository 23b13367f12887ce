package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"tcnat/loader"
	"tcnat/maps"
)

func newAttach(e *env) *cobra.Command {
	var words attachWords
	cmd := &cobra.Command{
		Use:   "attach [--bridge IF]... [--uplink IF]... [flags]",
		Short: "load (or upgrade in place), attach, masquerade the bridges' subnets",
		Long: `Loads the programs, attaches them to the bridges and the uplinks, and adds a masquerade
rule for each subnet of a bridge. On an instance that is attached already it upgrades the
programs in place and takes up the devices given: devices, flows and rules stay, no packet is
lost; all other flags hold as given now.
What stands in the way on this host, such as ip_forward=0, is printed as a warning.`,
		Example: `  tcnat attach --bridge docker0 --uplink eth0
  # Two bridges, two uplinks, and no rule but those that "tcnat snat add" adds:
  tcnat attach --bridge docker0 --bridge br-web --uplink eth0 --uplink wg0 --no-masquerade`,
		Args: noArgs,
	}
	words.bind(cmd)
	bindOnce(cmd.Flags(), &words.mode, "attach", "", "HOW", "HOW to attach: auto, tcx, clsact (default: tcx where the kernel has it)",
		word("attach", map[string]loader.AttachMode{"auto": loader.Auto, "tcx": loader.TCX, "clsact": loader.Clsact}, "auto", "tcx", "clsact"))
	completeWords(cmd, "attach", "auto", "tcx", "clsact")
	bindOnce(cmd.Flags(), &words.cgroup, "cgroup", "", "PATH",
		"the cgroup PATH (of version 2) whose processes reach published ports by the host's own addresses, auto for that of all, or none (default auto)", parseCgroup)
	cmd.RunE = e.inNetns(func(cmd *cobra.Command) error {
		options, err := words.options()
		if err != nil {
			return err
		}
		options.Cgroup = loader.CgroupAuto
		if words.cgroup.isSet {
			options.Cgroup = words.cgroup.value
		}
		status, err := e.attach(cmd.Context(), e.instance, options, e.logger())
		if err != nil {
			return err
		}
		e.printAttached(status)
		return e.warnFindings(namesOf(status, maps.Bridge), namesOf(status, maps.Uplink))
	})
	return cmd
}

func newLoad(e *env) *cobra.Command {
	var words attachWords
	cmd := &cobra.Command{
		Use:   "load --bridge IF... --uplink IF... [flags]",
		Short: "load and pin, attach nothing; prints the tc commands that attach by hand",
		Long: `Loads and pins the programs and their maps, set up for these devices, and attaches
nothing. It prints the tc commands that attach them: run those, and the NAT works as after
attach. detach removes all of it.`,
		Example: `  tcnat load --bridge docker0 --uplink eth0
  tcnat load --bridge docker0 --uplink eth0 | sh -ex`,
		Args: noArgs,
	}
	words.bind(cmd)
	cmd.RunE = e.inNetns(func(cmd *cobra.Command) error {
		options, err := words.options()
		if err != nil {
			return err
		}
		if len(options.Bridges) == 0 || len(options.Uplinks) == 0 {
			return usagef("--bridge and --uplink are needed: the containers' bridge and the device that leads to the world")
		}
		commands, err := loader.Load(cmd.Context(), e.instance, options)
		if err != nil {
			return err
		}
		for _, command := range commands {
			fmt.Fprintln(e.stdout, command)
		}
		return e.warnFindings(options.Bridges, options.Uplinks)
	})
	return cmd
}

// attachWords are the words of attach and of load.
type attachWords struct {
	bridges      many[string]
	uplinks      many[string]
	mode         once[loader.AttachMode]
	noMasquerade bool
	maxFlows     once[uint32]
	preallocate  bool
	isolate      bool
	allowDirect  bool
	unmanaged    once[bool]
	filtering    once[bool] // endpoint-independent
	fastPath     once[loader.FastPath]
	mark         once[uint8]
	cgroup       once[string] // of attach alone
}

func (w *attachWords) bind(cmd *cobra.Command) {
	fs := cmd.Flags()
	bindMany(fs, &w.bridges, "bridge", "", "IF", "the container bridge IF; repeats", parseDevice)
	bindMany(fs, &w.uplinks, "uplink", "", "IF", "the device IF by which containers' traffic leaves the host; repeats", parseDevice)
	fs.BoolVar(&w.noMasquerade, "no-masquerade", false, "add no rules: what no rule translates keeps its address")
	bindOnce(fs, &w.maxFlows, "max-flows", "", "N", "room for N flows (default 131072)", parseMaxFlows)
	fs.BoolVar(&w.preallocate, "preallocate", false, "take the flows' memory at once, not as they come: new flows are made faster")
	fs.BoolVar(&w.isolate, "isolate", true, "keep managed bridges apart from each other")
	fs.BoolVar(&w.allowDirect, "allow-direct", false, "let the world reach containers by their own addresses")
	bindOnce(fs, &w.unmanaged, "unmanaged-devices", "", "drop|pass",
		"what containers send by a device without programs: drop|pass (default drop)",
		word("unmanaged-devices", map[string]bool{"drop": false, "pass": true}, "drop", "pass"))
	bindOnce(fs, &w.fastPath, "fast-path", "", "WHO",
		"WHO may pass by the host's stack: auto, established, always, off (default auto: established where no connections are tracked, else off)",
		word("fast-path", fastPathWords(), "auto", "established", "always", "off"))
	bindOnce(fs, &w.mark, "mark", "", "BIT", fmt.Sprintf("the BIT of the packet mark that the fast path uses, 0 to 31 (default %d)", loader.DefaultMark), parseMark)
	bindOnce(fs, &w.filtering, "filtering", "", "WHO",
		"WHO reaches the outside port of a container's UDP endpoint: endpoint-dependent (whom it has sent to), endpoint-independent (all) (default endpoint-dependent)",
		word("filtering", filteringWords(), "endpoint-dependent", "endpoint-independent"))
	bindUnbuilt(fs, "max-new", "max-flows-per-source", "internal", "protocols")
	completeDevices(cmd, "bridge", "uplink")
	completeWords(cmd, "fast-path", "auto", "established", "always", "off")
	completeWords(cmd, "unmanaged-devices", "drop", "pass")
	completeWords(cmd, "filtering", "endpoint-dependent", "endpoint-independent")
}

func (w *attachWords) options() (loader.AttachOptions, error) {
	for _, bridge := range w.bridges.values {
		for _, uplink := range w.uplinks.values {
			if bridge == uplink {
				return loader.AttachOptions{}, usagef("%s: cannot be both bridge and uplink", bridge)
			}
		}
	}
	options := loader.AttachOptions{
		Bridges:       w.bridges.values,
		Uplinks:       w.uplinks.values,
		Mode:          w.mode.value,
		NoMasquerade:  w.noMasquerade,
		MaxFlows:      w.maxFlows.value,
		Preallocate:   w.preallocate,
		AllowDirect:   w.allowDirect,
		NoIsolation:   !w.isolate,
		PassUnmanaged: w.unmanaged.value,
		AnySender:     w.filtering.value,
		FastPath:      w.fastPath.value,
	}
	if w.mark.isSet {
		options.Mark = &w.mark.value
	}
	return options, nil
}

// filteringWords tell whether any sender may use a UDP endpoint's outside port.
func filteringWords() map[string]bool {
	return map[string]bool{"endpoint-dependent": false, "endpoint-independent": true}
}

func fastPathWords() map[string]loader.FastPath {
	words := make(map[string]loader.FastPath)
	for _, fast := range []loader.FastPath{loader.FastPathAuto, loader.FastPathEstablished, loader.FastPathAlways, loader.FastPathOff} {
		words[fast.String()] = fast
	}
	return words
}

// parseMark reads which bit of the packet mark is ours.
func parseMark(text string) (uint8, error) {
	bit, err := strconv.ParseUint(text, 10, 8)
	if err != nil || bit > 31 {
		return 0, fmt.Errorf("--mark %s: takes a bit's number, 0 to 31", quoteEmpty(text))
	}
	return uint8(bit), nil
}

// parseCgroup reads a directory of cgroup v2; "" is what none comes to.
func parseCgroup(text string) (string, error) {
	switch {
	case text == "none":
		return "", nil
	case text == "auto":
		return loader.CgroupAuto, nil
	case !strings.HasPrefix(text, "/"):
		return "", fmt.Errorf("--cgroup %s: takes a path from / on, auto, or none", quoteEmpty(text))
	}
	return text, nil
}

// parseMaxFlows reads how many flows the tables are made for.
func parseMaxFlows(text string) (uint32, error) {
	flows, err := strconv.ParseUint(text, 10, 64)
	switch {
	case err != nil:
		return 0, fmt.Errorf("--max-flows %s: not a number of flows", quoteEmpty(text))
	case flows == 0:
		return 0, fmt.Errorf("--max-flows 0: no flow at all would fit")
	case flows > loader.FlowLimit:
		return 0, fmt.Errorf("--max-flows %s: over %d", text, loader.FlowLimit)
	}
	return uint32(flows), nil
}

// printAttached tells what attach came to.
func (e *env) printAttached(status *loader.Status) {
	for _, device := range status.Devices {
		fmt.Fprintf(e.stdout, "%s %s: attached (%s)\n", device.Class, device.Name, device.Attach)
	}
	if ports := attachedPorts(status); ports > 0 {
		fmt.Fprintf(e.stdout, "%s: attached\n", count(ports, "port"))
	}
	fmt.Fprintf(e.stdout, "fast path: %s\n", fastPathText(status))
	if status.HostAccess.Attached {
		fmt.Fprintf(e.stdout, "localhost: %s\n", hostAccessText(status))
	}
	for _, problem := range status.Problems {
		e.warnf("%s", problem)
	}
	if len(namesOf(status, maps.Uplink)) == 0 {
		e.warnf("no uplink is attached, so containers reach nothing outside: attach --uplink the device that leads there")
	}
}

func attachedPorts(status *loader.Status) int {
	n := 0
	for _, port := range status.Ports {
		if port.Ingress.ID != 0 {
			n++
		}
	}
	return n
}

// fastPathText is the fast path in force, and why it is that one.
func fastPathText(status *loader.Status) string {
	return fmt.Sprintf("%s: %s", status.FastPath.Mode, status.FastPath.Reason)
}

// hostAccessText tells whether the host's own sockets reach published ports, and which of them.
func hostAccessText(status *loader.Status) string {
	switch {
	case !status.HostAccess.Attached:
		return "not attached"
	case status.HostAccess.Cgroup == "":
		return "attached, to a cgroup that is mounted nowhere here"
	}
	return "attached, to cgroup " + status.HostAccess.Cgroup
}

// namesOf are those of the attached devices of a class that are still there.
func namesOf(status *loader.Status, class maps.DeviceClass) []string {
	var names []string
	for _, device := range status.Devices {
		if device.Class == class && device.Ingress.Program != "" {
			names = append(names, device.Name)
		}
	}
	return names
}

// warnFindings tells what on this host stands in the NAT's way.
func (e *env) warnFindings(bridges, uplinks []string) error {
	findings, err := loader.Preflight(bridges, uplinks)
	if err != nil {
		return fmt.Errorf("attached, but looking at the host's settings failed: %w", err)
	}
	for _, finding := range findings {
		e.warnf("%s", findingText(finding))
	}
	return nil
}

func findingText(finding loader.Finding) string {
	setting := finding.Setting
	if finding.Value != "" {
		setting += " = " + finding.Value
	}
	return fmt.Sprintf("%s: %s: %s", setting, finding.Problem, finding.Remedy)
}
