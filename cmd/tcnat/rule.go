package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"tcnat/loader"
	"tcnat/maps"
)

// writeRules runs work on the attached instance with its lock held, for a change of a rule. unchanged
// is what to say when there was nothing to do: that is done, not failed.
func (e *env) writeRules(unchanged string, work func(*maps.State) (changed bool, err error)) error {
	return e.with(loader.OpenRules, func(datapath *loader.Datapath) error {
		changed, err := work(datapath.State())
		if err == nil && !changed {
			e.notef("%s: nothing changed", unchanged)
		}
		if err != nil || !changed {
			return err
		}
		if _, err := datapath.EndHostSockets(); err != nil {
			e.warnf("done, but connections of the host itself by the rule that has gone stay: %v", err)
		}
		return nil
	})
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
		if device.Class == maps.Port {
			continue // no rule is about a port: its packets are the bridge's
		}
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
