package main

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tcnat/loader"
	"tcnat/maps"
)

func newDNAT(e *env) *cobra.Command {
	add := &cobra.Command{
		Use:   "add -p tcp|udp|sctp [-d ADDR] [-i IF] --dport N[-M] --to-destination ADDR[:PORT[-PORT]] [-s CIDR]...",
		Short: "publish a port of a container",
		Long: `Publishes a port, or a range of them, of a container on a managed bridge. The same
rule twice is done and changes nothing; a rule whose ports intersect those of another one
for the same destination is refused. The host itself always may come in, by each of its
addresses that the rule is for, and by 127.0.0.1 and ::1.`,
		Example: `  # Port 3005 of every address of the host goes to a container:
  tcnat dnat add -p tcp --dport 3005 --to-destination 172.17.0.2:3005
  # To the host itself alone:
  tcnat dnat add -p tcp -d 127.0.0.1 --dport 5432 --to-destination 172.17.0.5
  # Only these sources may come in, to another port:
  tcnat dnat add -p tcp --dport 8443 --to-destination 172.17.0.3:443 -s 198.51.100.0/24
  # A range keeps its ports; IPv6 with a port is in brackets:
  tcnat dnat add -p udp --dport 8000-8999 --to-destination 172.17.0.4
  tcnat dnat add -p tcp --dport 80 --to-destination [fd00:17::2]:8080`,
		Args: noArgs,
	}
	bindDNATVerb(e, add, true, e.addDNAT)
	del := &cobra.Command{
		Use:   "del -p tcp|udp|sctp [-d ADDR] [-i IF] --dport N[-M] [--to-destination ADDR[:PORT[-PORT]]] [-s CIDR]...",
		Short: "unpublish a port; its flows end",
		Long: `Deletes the rule that these words added; what it matches is enough to name it. The
rule's flows end at once. A rule that is not there is done, and changes nothing.`,
		Example: `  tcnat dnat del -p tcp --dport 3005`,
		Args:    noArgs,
	}
	bindDNATVerb(e, del, false, e.deleteDNAT)

	var output outputFlag
	list := &cobra.Command{
		Use:     "list",
		Short:   "list published ports",
		Example: "  tcnat dnat list\n  tcnat dnat list -o json",
		Args:    noArgs,
		RunE: e.inNetns(func(*cobra.Command) error {
			return e.read(func(datapath *loader.Datapath) error {
				return e.listDNAT(datapath.State(), output.json())
			})
		}),
	}
	output.bind(list)
	return newNoun("dnat", "publish ports of containers",
		"  tcnat dnat add -p tcp --dport 3005 --to-destination 172.17.0.2:3005", add, del, list)
}

func bindDNATVerb(e *env, cmd *cobra.Command, whole bool, verb func(maps.DNATRule) error) {
	var words dnatWords
	words.bind(cmd.Flags())
	completeWords(cmd, "protocol", "tcp", "udp", "sctp")
	completeDevices(cmd, "in-interface")
	cmd.RunE = e.inNetns(func(*cobra.Command) error {
		rule, err := words.rule(whole, lookupDevice)
		if err != nil {
			return err
		}
		return verb(rule)
	})
}

func (e *env) addDNAT(rule maps.DNATRule) error {
	return e.writeRules("already there", func(state *maps.State) (bool, error) {
		have, err := listDevices()
		if err != nil {
			return false, err
		}
		if err := checkTarget(state, have, rule.To); err != nil {
			return false, err
		}
		if rule.Ingress != 0 {
			if err := e.checkAttached(state, have, "-i", rule.Ingress); err != nil {
				return false, err
			}
		}
		if rule.Destination.IsLoopback() && !e.instance.HasHostAccess() {
			e.warnf("-d %s: the host's own access is not attached, so nothing reaches the port by it: run tcnat attach with --cgroup", rule.Destination)
		}
		return state.AddDNAT(rule)
	})
}

func (e *env) deleteDNAT(rule maps.DNATRule) error {
	return e.writeRules("not there", func(state *maps.State) (bool, error) { return state.DeleteDNAT(rule) })
}

// checkTarget refuses a DNAT target that no managed bridge has on its subnet: it would
// never be reached through our programs.
func checkTarget(state *maps.State, have devices, to netip.Addr) error {
	subnets, err := state.Subnets()
	if err != nil {
		return err
	}
	for prefix := range subnets {
		if prefix.Contains(to) {
			return nil
		}
	}
	return fmt.Errorf("%s: on no managed bridge (%s)", to, managedText(subnets, have))
}

// dnatWords are the words of a DNAT rule on the command line.
type dnatWords struct {
	protocol    once[maps.Protocol]
	destination once[netip.Addr]
	in          once[string]
	dport       once[maps.PortRange]
	to          once[endpoint]
	allow       many[netip.Prefix]
}

func (w *dnatWords) bind(fs *pflag.FlagSet) {
	w.to.again = "--to-destination: several targets: not built yet"
	bindOnce(fs, &w.protocol, "protocol", "p", "PROTO", "PROTO of the port: tcp, udp or sctp", parseDNATProtocol)
	bindOnce(fs, &w.destination, "destination", "d", "ADDR", "ADDR of the host that is published, 127.0.0.1 or ::1 for the host alone (default: every one)", parseDestination)
	bindOnce(fs, &w.in, "in-interface", "i", "IF", "only what comes in by the device IF", parseDevice)
	bindOnce(fs, &w.dport, "dport", "", "N[-M]", "published port N, or N[-M] for a range", named("--dport", parsePorts))
	bindOnce(fs, &w.to, "to-destination", "", "ADDR[:PORT[-PORT]]", "container: ADDR[:PORT[-PORT]], IPv6 as [ADDR]:PORT (default port: the published one)", parseTarget)
	bindMany(fs, &w.allow, "source", "s", "CIDR", "only sources in CIDR may come in; repeats", parsePrefix)
}

// rule makes the rule of the words. Device names are looked up only when all else is right.
//
// whole says that the rule is for adding. To delete one, what it matches is enough.
func (w *dnatWords) rule(whole bool, lookup func(string) (uint32, error)) (maps.DNATRule, error) {
	switch {
	case !w.protocol.isSet:
		return maps.DNATRule{}, usagef("-p is missing: tcp, udp or sctp")
	case !w.dport.isSet:
		return maps.DNATRule{}, usagef("--dport is missing: the port to publish")
	case w.in.isSet && w.destination.value.IsLoopback():
		return maps.DNATRule{}, usagef("-d %s: is reached from the host alone, so by no device: leave -i out", w.destination.value)
	case whole && !w.to.isSet:
		return maps.DNATRule{}, usagef("--to-destination is missing: the container's address and port")
	}
	rule := maps.DNATRule{
		Protocol:    w.protocol.value,
		Destination: w.destination.value,
		Ports:       w.dport.value,
		To:          w.to.value.First,
		ToPorts:     w.to.value.Ports,
		Allow:       w.allow.values,
	}
	var alone maps.Rules
	check := alone.DeleteDNAT
	if whole {
		check = alone.AddDNAT
	}
	if _, err := check(rule); err != nil {
		return maps.DNATRule{}, asUsage(err)
	}
	if w.in.isSet {
		var err error
		if rule.Ingress, err = lookup(w.in.value); err != nil {
			return maps.DNATRule{}, fmt.Errorf("-i %w", err)
		}
	}
	return rule, nil
}

func parseDNATProtocol(text string) (maps.Protocol, error) {
	protocol, err := maps.ParseProtocol(text)
	if err != nil || protocol != maps.TCP && protocol != maps.UDP && protocol != maps.SCTP {
		return 0, fmt.Errorf("-p %s: a published port is tcp, udp or sctp", quoteEmpty(text))
	}
	return protocol, nil
}

// parseDestination reads the -d of DNAT: one address of the host, which may be a loopback one.
func parseDestination(text string) (netip.Addr, error) {
	addr, err := parseHost(text)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("-d %w", err)
	}
	return addr, nil
}

// dnatEntry is a rule of the JSON list, in the words of the command line.
type dnatEntry struct {
	ID            uint32   `json:"id"`
	Protocol      string   `json:"protocol"`
	Destination   string   `json:"destination,omitempty"`
	InInterface   string   `json:"in_interface,omitempty"`
	Dport         string   `json:"dport"`
	ToDestination string   `json:"to_destination"`
	Source        []string `json:"source,omitempty"`
}

func (e *env) listDNAT(state *maps.State, asJSON bool) error {
	have, err := listDevices()
	if err != nil {
		return err
	}
	rules, err := state.Rules()
	if err != nil {
		return err
	}
	return e.printDNAT(rules.DNAT, have, asJSON)
}

func (e *env) printDNAT(rules []maps.DNATRule, have devices, asJSON bool) error {
	entries := make([]dnatEntry, 0, len(rules))
	rows := table{heads: []string{"ID", "PROTO", "DESTINATION", "IN", "DPORT", "TO-DESTINATION", "SOURCE"}}
	for _, rule := range rules {
		entry := dnatEntry{
			ID:            rule.ID,
			Protocol:      rule.Protocol.String(),
			Dport:         rule.Ports.String(),
			ToDestination: endpoint{First: rule.To, Last: rule.To, Ports: rule.ToPorts}.String(),
			Source:        texts(rule.Allow),
		}
		if rule.Destination.IsValid() {
			entry.Destination = rule.Destination.String()
		}
		if rule.Ingress != 0 {
			entry.InInterface = have.name(rule.Ingress)
		}
		entries = append(entries, entry)
		rows.add(fmt.Sprint(entry.ID), entry.Protocol, orAny(entry.Destination), orAny(entry.InInterface),
			entry.Dport, entry.ToDestination, orAny(strings.Join(entry.Source, ",")))
	}
	if asJSON {
		return writeJSON(e.stdout, entries)
	}
	return rows.write(e.stdout)
}
