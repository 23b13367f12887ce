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

func newSNAT(e *env) *cobra.Command {
	add := &cobra.Command{
		Use:   "add -s CIDR [-o IF] --masquerade|--to-source ADDR[-ADDR][:PORT-PORT] [--except CIDR]...",
		Short: "translate the source of what containers send",
		Long: `Adds a rule for what containers send to the world: their source becomes the uplink's
own address (--masquerade) or a fixed one. attach adds a masquerade rule for each subnet of
a bridge by itself; the rule with the longest prefix wins, and one with -o before one without.`,
		Example: `  tcnat snat add -s 172.17.0.0/16 --masquerade
  # A fixed address and ports, but the office sees the containers' own addresses:
  tcnat snat add -s 172.17.0.0/16 -o eth0 --to-source 203.0.113.2:20000-29999 --except 10.0.0.0/8`,
		Args: noArgs,
	}
	bindSNATVerb(e, add, true, e.addSNAT)
	del := &cobra.Command{
		Use:   "del -s CIDR [-o IF] [--masquerade|--to-source ADDR[-ADDR][:PORT-PORT]] [--except CIDR]...",
		Short: "delete such a rule; its flows end",
		Long: `Deletes the rule that these words added; source and uplink are enough to name it. Its
flows end at once. A rule that is not there is done, and changes nothing. What attach made
for a bridge's subnet it makes again at the next attach, unless that has --no-masquerade.`,
		Example: `  tcnat snat del -s 172.17.0.0/16 -o eth0`,
		Args:    noArgs,
	}
	bindSNATVerb(e, del, false, e.deleteSNAT)

	var output outputFlag
	list := &cobra.Command{
		Use:     "list",
		Short:   "list rules for what containers send",
		Example: "  tcnat snat list\n  tcnat snat list -o json",
		Args:    noArgs,
		RunE: e.inNetns(func(*cobra.Command) error {
			return e.read(func(datapath *loader.Datapath) error {
				return e.listSNAT(datapath.State(), output.json())
			})
		}),
	}
	output.bind(list)
	return newNoun("snat", "rules for what containers send",
		"  tcnat snat add -s 172.17.0.0/16 --to-source 203.0.113.2", add, del, list)
}

func bindSNATVerb(e *env, cmd *cobra.Command, whole bool, verb func(maps.SNATRule) error) {
	var words snatWords
	words.bind(cmd.Flags())
	completeDevices(cmd, "out-interface")
	cmd.RunE = e.inNetns(func(*cobra.Command) error {
		rule, err := words.rule(whole, lookupDevice)
		if err != nil {
			return err
		}
		return verb(rule)
	})
}

func (e *env) addSNAT(rule maps.SNATRule) error {
	return e.writeRules("already there", func(state *maps.State) (bool, error) {
		have, err := listDevices()
		if err != nil {
			return false, err
		}
		if rule.Uplink != 0 {
			if err := e.checkAttached(state, have, "-o", rule.Uplink); err != nil {
				return false, err
			}
		}
		if err := e.warnUnmanaged(state, have, rule.Source); err != nil {
			return false, err
		}
		return state.AddSNAT(rule)
	})
}

func (e *env) deleteSNAT(rule maps.SNATRule) error {
	return e.writeRules("not there", func(state *maps.State) (bool, error) { return state.DeleteSNAT(rule) })
}

// warnUnmanaged tells of a rule for addresses that no managed bridge has: it never holds.
func (e *env) warnUnmanaged(state *maps.State, have devices, source netip.Prefix) error {
	subnets, err := state.Subnets()
	if err != nil {
		return err
	}
	for prefix := range subnets {
		if prefix.Overlaps(source) {
			return nil
		}
	}
	e.warnf("%s: on no managed bridge, so the rule is never used (%s)", source, managedText(subnets, have))
	return nil
}

// snatWords are the words of an SNAT rule on the command line.
type snatWords struct {
	source     once[netip.Prefix]
	out        once[string]
	masquerade bool
	to         once[endpoint]
	except     many[netip.Prefix]
}

func (w *snatWords) bind(fs *pflag.FlagSet) {
	bindOnce(fs, &w.source, "source", "s", "CIDR", "containers' addresses, as CIDR", parsePrefix)
	bindOnce(fs, &w.out, "out-interface", "o", "IF", "only what leaves by the uplink IF (default: every one)", parseDevice)
	fs.BoolVar(&w.masquerade, "masquerade", false, "the uplink's own address becomes the source")
	bindOnce(fs, &w.to, "to-source", "", "ADDR[-ADDR][:PORT-PORT]", "what becomes the source: ADDR[-ADDR][:PORT-PORT], IPv6 with ports as [ADDR]:PORT-PORT", parseSource)
	bindMany(fs, &w.except, "except", "", "CIDR", "destinations in CIDR see the container's own address; repeats", parsePrefix)
}

// rule makes the rule of the words. Device names are looked up only when all else is right.
//
// whole says that the rule is for adding. To delete one, what it matches is enough.
func (w *snatWords) rule(whole bool, lookup func(string) (uint32, error)) (maps.SNATRule, error) {
	switch {
	case !w.source.isSet:
		return maps.SNATRule{}, usagef("-s is missing: the containers' addresses")
	case w.masquerade && w.to.isSet:
		return maps.SNATRule{}, usagef("--masquerade and --to-source: only one of them")
	case whole && !w.masquerade && !w.to.isSet:
		return maps.SNATRule{}, usagef("--masquerade or --to-source is missing")
	}
	rule := maps.SNATRule{
		Source:     w.source.value,
		Masquerade: w.masquerade,
		ToFirst:    w.to.value.First,
		ToLast:     w.to.value.Last,
		Ports:      w.to.value.Ports,
		Except:     w.except.values,
	}
	var alone maps.Rules
	check := alone.DeleteSNAT
	if whole {
		check = alone.AddSNAT
	}
	if _, err := check(rule); err != nil {
		return maps.SNATRule{}, asUsage(err)
	}
	if w.out.isSet {
		var err error
		if rule.Uplink, err = lookup(w.out.value); err != nil {
			return maps.SNATRule{}, fmt.Errorf("-o %w", err)
		}
	}
	return rule, nil
}

// snatEntry is a rule of the JSON list, in the words of the command line.
type snatEntry struct {
	ID           uint32   `json:"id"`
	Source       string   `json:"source"`
	OutInterface string   `json:"out_interface,omitempty"`
	Masquerade   bool     `json:"masquerade,omitempty"`
	ToSource     string   `json:"to_source,omitempty"`
	Except       []string `json:"except,omitempty"`
	MadeByAttach bool     `json:"made_by_attach,omitempty"`
}

func (e *env) listSNAT(state *maps.State, asJSON bool) error {
	have, err := listDevices()
	if err != nil {
		return err
	}
	rules, err := state.Rules()
	if err != nil {
		return err
	}
	return e.printSNAT(rules.SNAT, have, asJSON)
}

func (e *env) printSNAT(rules []maps.SNATRule, have devices, asJSON bool) error {
	entries := make([]snatEntry, 0, len(rules))
	rows := table{heads: []string{"ID", "SOURCE", "OUT", "TO-SOURCE", "EXCEPT", "MADE BY"}}
	for _, rule := range rules {
		entry := snatEntry{
			ID:           rule.ID,
			Source:       rule.Source.String(),
			Masquerade:   rule.Masquerade,
			Except:       texts(rule.Except),
			MadeByAttach: rule.Attach,
		}
		if rule.Uplink != 0 {
			entry.OutInterface = have.name(rule.Uplink)
		}
		to, maker := "masquerade", "user"
		if !rule.Masquerade {
			entry.ToSource = endpoint{First: rule.ToFirst, Last: rule.ToLast, Ports: rule.Ports}.String()
			to = entry.ToSource
		}
		if rule.Attach {
			maker = "attach"
		}
		entries = append(entries, entry)
		rows.add(fmt.Sprint(entry.ID), entry.Source, orAny(entry.OutInterface), to,
			orDash(strings.Join(entry.Except, ",")), maker)
	}
	if asJSON {
		return writeJSON(e.stdout, entries)
	}
	return rows.write(e.stdout)
}
