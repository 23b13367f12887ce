package main

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tcnat/loader"
	"tcnat/maps"
)

func newDNAT(e *env) *cobra.Command {
	add := &cobra.Command{
		Use:   "add -p tcp|udp|sctp [-d ADDR] [-i IF] --dport N[-M] --to-destination ADDR[:PORT[-PORT]]... [-s CIDR]...",
		Short: "publish a port of a container, or of several",
		Long: `Publishes a port, or a range of them, of a container on a managed bridge. The same
rule twice is done and changes nothing; a rule whose ports intersect those of another one
for the same destination is refused. The host itself always may come in, by each of its
addresses that the rule is for, and by 127.0.0.1 and ::1; to ports of SCTP it has no way.

Of several containers each new flow gets one, at random by their weights or by the client's
address. Whether one of them answers is not watched: health checks are for who changes the
rule. Several containers for a rule that is there, at least one of them among those that it
has, take the place of its list: flows to those that stay go on.`,
		Example: `  # Port 3005 of every address of the host goes to a container:
  tcnat dnat add -p tcp --dport 3005 --to-destination 172.17.0.2:3005
  # To the host itself alone:
  tcnat dnat add -p tcp -d 127.0.0.1 --dport 5432 --to-destination 172.17.0.5
  # Only these sources may come in, to another port:
  tcnat dnat add -p tcp --dport 8443 --to-destination 172.17.0.3:443 -s 198.51.100.0/24
  # A range keeps its ports; IPv6 with a port is in brackets:
  tcnat dnat add -p udp --dport 8000-8999 --to-destination 172.17.0.4
  tcnat dnat add -p tcp --dport 80 --to-destination [fd00:17::2]:8080
  # Two containers, of which the first gets three of four new flows, and a client for ten minutes the same:
  tcnat dnat add -p tcp --dport 8080 --to-destination 172.17.0.2 --weight 3 --to-destination 172.17.0.3 --weight 1 --affinity 10m`,
		Args: noArgs,
	}
	bindDNATVerb(e, add, true, e.addDNAT)
	del := &cobra.Command{
		Use:   "del -p tcp|udp|sctp [-d ADDR] [-i IF] --dport N[-M] [--to-destination ADDR[:PORT[-PORT]]]... [-s CIDR]...",
		Short: "unpublish a port; its flows end",
		Long: `Deletes the rule that these words added; what it matches is enough to name it. The
rule's flows end at once. A rule that is not there is done, and changes nothing. Some of several
containers are taken out of their rule, and flows to the others go on.`,
		Example: `  tcnat dnat del -p tcp --dport 3005
  tcnat dnat del -p tcp --dport 8080 --to-destination 172.17.0.3`,
		Args: noArgs,
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
		for _, target := range rule.Targets() {
			if err := checkTarget(state, have, target.To); err != nil {
				return false, err
			}
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
	to          many[endpoint]
	weight      many[int]
	balance     once[maps.Balance]
	affinity    once[time.Duration]
	allow       many[netip.Prefix]
}

func (w *dnatWords) bind(fs *pflag.FlagSet) {
	bindOnce(fs, &w.protocol, "protocol", "p", "PROTO", "PROTO of the port: tcp, udp or sctp", parseDNATProtocol)
	bindOnce(fs, &w.destination, "destination", "d", "ADDR", "ADDR of the host that is published, 127.0.0.1 or ::1 for the host alone (default: every one)", parseDestination)
	bindOnce(fs, &w.in, "in-interface", "i", "IF", "only what comes in by the device IF", parseDevice)
	bindOnce(fs, &w.dport, "dport", "", "N[-M]", "published port N, or N[-M] for a range", named("--dport", parsePorts))
	bindMany(fs, &w.to, "to-destination", "", "ADDR[:PORT[-PORT]]", "container: ADDR[:PORT[-PORT]], IPv6 as [ADDR]:PORT (default port: the published one); repeats", parseTarget)
	bindMany(fs, &w.weight, "weight", "", "N", "share N of new flows that each --to-destination gets, one for each, 1 to 256 (default: all alike)", parseWeight)
	bindOnce(fs, &w.balance, "balance", "", "HOW", "HOW to choose one of several: random, or by source, the client's address (default random)",
		word("balance", map[string]maps.Balance{"random": maps.BalanceRandom, "source": maps.BalanceSource}, "random", "source"))
	bindOnce(fs, &w.affinity, "affinity", "", "TIME", "TIME for which a client gets the same one of several, since its last new flow, like 10m (default 0s)", parseAffinity)
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
	case whole && len(w.to.values) == 0:
		return maps.DNATRule{}, usagef("--to-destination is missing: the container's address and port")
	case len(w.weight.values) > 0 && len(w.weight.values) != len(w.to.values):
		return maps.DNATRule{}, usagef("--weight: %d for %d of --to-destination: give one for each", len(w.weight.values), len(w.to.values))
	case len(w.to.values) < 2 && len(w.weight.values) > 0 && whole:
		return maps.DNATRule{}, usagef("--weight: is for several of --to-destination: leave it out")
	case len(w.to.values) < 2 && w.balance.isSet && whole:
		return maps.DNATRule{}, usagef("--balance: is for several of --to-destination: leave it out")
	case len(w.to.values) < 2 && w.affinity.isSet && whole:
		return maps.DNATRule{}, usagef("--affinity: is for several of --to-destination: leave it out")
	}
	rule := maps.DNATRule{
		Protocol:    w.protocol.value,
		Destination: w.destination.value,
		Ports:       w.dport.value,
		Allow:       w.allow.values,
	}
	w.setTargets(&rule)
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

func (w *dnatWords) setTargets(rule *maps.DNATRule) {
	switch len(w.to.values) {
	case 0:
	case 1:
		rule.To, rule.ToPorts = w.to.values[0].First, w.to.values[0].Ports
	default:
		for i, to := range w.to.values {
			backend := maps.Backend{To: to.First, ToPorts: to.Ports}
			if len(w.weight.values) > 0 {
				backend.Weight = w.weight.values[i]
			}
			rule.Backends = append(rule.Backends, backend)
		}
		rule.To, rule.ToPorts = rule.Backends[0].To, rule.Backends[0].ToPorts
		rule.Balance, rule.Affinity = w.balance.value, w.affinity.value
	}
}

func parseWeight(text string) (int, error) {
	weight, err := strconv.ParseUint(text, 10, 16)
	if err != nil || weight < 1 || weight > maps.MaxWeight {
		return 0, fmt.Errorf("--weight %s: takes 1 to %d", quoteEmpty(text), maps.MaxWeight)
	}
	return int(weight), nil
}

func parseAffinity(text string) (time.Duration, error) {
	affinity, err := time.ParseDuration(text)
	if err != nil || affinity < 0 || affinity > maps.MaxAffinity || affinity%time.Second != 0 {
		return 0, fmt.Errorf("--affinity %s: takes whole seconds, like 90s or 10m, up to %s", quoteEmpty(text), maps.MaxAffinity)
	}
	return affinity, nil
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
	ToDestination string   `json:"to_destination,omitempty"` // of a rule with one
	Source        []string `json:"source,omitempty"`

	// Of a rule with several.
	Backends []backendEntry `json:"backends,omitempty"`
	Balance  string         `json:"balance,omitempty"`
	Affinity string         `json:"affinity,omitempty"`
}

type backendEntry struct {
	ID            uint32 `json:"id"` // the rule of its flows
	ToDestination string `json:"to_destination"`
	Weight        int    `json:"weight"`
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
			ID:       rule.ID,
			Protocol: rule.Protocol.String(),
			Dport:    rule.Ports.String(),
			Source:   texts(rule.Allow),
		}
		to := entry.setTargets(rule)
		if rule.Destination.IsValid() {
			entry.Destination = rule.Destination.String()
		}
		if rule.Ingress != 0 {
			entry.InInterface = have.name(rule.Ingress)
		}
		entries = append(entries, entry)
		rows.add(fmt.Sprint(entry.ID), entry.Protocol, orAny(entry.Destination), orAny(entry.InInterface),
			entry.Dport, to, orAny(strings.Join(entry.Source, ",")))
	}
	if asJSON {
		return writeJSON(e.stdout, entries)
	}
	return rows.write(e.stdout)
}

// setTargets fills in where the rule leads, and answers what a table says of it.
func (entry *dnatEntry) setTargets(rule maps.DNATRule) string {
	text := func(t maps.Backend) string { return endpoint{First: t.To, Last: t.To, Ports: t.ToPorts}.String() }
	if len(rule.Backends) == 0 {
		entry.ToDestination = text(rule.Targets()[0])
		return entry.ToDestination
	}
	var all []string
	for _, t := range rule.Backends {
		entry.Backends = append(entry.Backends, backendEntry{t.ID, text(t), t.Weight})
		if t.Weight > 1 {
			all = append(all, fmt.Sprintf("%s (weight %d)", text(t), t.Weight))
		} else {
			all = append(all, text(t))
		}
	}
	entry.Balance = rule.Balance.String()
	how := entry.Balance
	if rule.Affinity != 0 {
		entry.Affinity = rule.Affinity.String()
		how += ", affinity " + entry.Affinity
	}
	return strings.Join(all, ", ") + "; " + how
}
