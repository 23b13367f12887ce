package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"tcnat/loader"
	"tcnat/maps"
)

// changeRules changes the rules in force, all at once or not at all. unchanged is what to
// say when there was nothing to do: that is done, not failed.
func (e *env) changeRules(datapath *loader.Datapath, unchanged string, change func(*maps.Rules) (bool, error)) error {
	rules, err := datapath.State().Rules()
	if err != nil {
		return err
	}
	changed, err := change(&rules)
	if err != nil {
		return err
	}
	if !changed {
		e.notef("%s: nothing changed", unchanged)
		return nil
	}
	return datapath.State().SetRules(rules)
}

// checkAttached refuses a device that is not there, and tells of one without programs: a rule
// for it never holds.
func (e *env) checkAttached(state *maps.State, have devices, flag string, ifindex uint32) error {
	if _, ok := have[ifindex]; !ok {
		return fmt.Errorf("%s %s: no such device (have: %s)", flag, have.name(ifindex), have)
	}
	attached, err := state.Devices()
	if err != nil {
		return err
	}
	var names []string
	for _, device := range attached {
		if device.Ifindex == ifindex {
			return nil
		}
		names = append(names, have.name(device.Ifindex))
	}
	e.warnf("%s %s: not attached, so the rule is not used until it is (attached: %s)",
		flag, have.name(ifindex), strings.Join(names, ", "))
	return nil
}

// managedText names the managed bridges with their subnets.
func managedText(subnets map[netip.Prefix]uint32, have devices) string {
	if len(subnets) == 0 {
		return "no managed bridge has a subnet: give the bridge its address, then attach again"
	}
	var managed []string
	for prefix, ifindex := range subnets {
		managed = append(managed, have.name(ifindex)+" "+prefix.String())
	}
	slices.Sort(managed)
	return "managed: " + strings.Join(managed, ", ")
}

func texts[T fmt.Stringer](values []T) []string {
	var all []string
	for _, value := range values {
		all = append(all, value.String())
	}
	return all
}

func orAny(text string) string {
	if text == "" {
		return "any"
	}
	return text
}
