package main

import (
	"cmp"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"tcnat/loader"
	"tcnat/maps"
)

// write prints the report for people: what there is, where it is attached, what was
// dropped, and what should be looked at.
func (r *report) write(w io.Writer) error {
	for _, part := range []func(io.Writer) error{r.writeSummary, r.writeDevices, r.writePorts, r.writeDrops, r.writeUnmanaged, r.writeWarnings} {
		if err := part(w); err != nil {
			return err
		}
	}
	return nil
}

func (r *report) writeSummary(w io.Writer) error {
	state := "in effect"
	if !r.Live {
		state = "NOT in effect"
	}
	expiry := "has not run yet"
	if r.expiry.Ticks > 0 {
		expiry = fmt.Sprintf("last ran %s ago, longest %s", age(r.expiry.LastTick), age(r.expiry.Longest))
	}
	tabs := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, line := range [][2]string{
		{"instance", r.Instance + ", " + state},
		{"pins", r.Pins},
		{"rules", fmt.Sprintf("%d snat, %d dnat", r.snat, r.dnat)},
		{"flows", r.flowsText()},
		{"fast path", r.fastPathText()},
		{"localhost", hostAccessText(&r.Status)},
		{"expiry", expiry},
		{"options", r.optionsText()},
	} {
		fmt.Fprintf(tabs, "%s\t%s\n", line[0], line[1])
	}
	return tabs.Flush()
}

func (r *report) fastPathText() string {
	text := fastPathText(&r.Status)
	if r.FastPath.Mode == maps.FastPathOff {
		return text
	}
	return fmt.Sprintf("%s; flows on it: %d out, %d in; so far %s redirected, %s granted",
		text, r.usage.FastOut, r.usage.FastIn, count(int(r.FastPath.Redirected), "packet"), count(int(r.FastPath.Granted), "lease"))
}

func (r *report) flowsText() string {
	text := fmt.Sprintf("%d of at most %d", r.usage.Flows, r.Config.MaxFlows)
	if r.Preallocated {
		text += ", their memory is taken already"
	}
	return text
}

func (r *report) optionsText() string {
	words := []string{"bridges isolated"}
	if r.Config.NoIsolation {
		words[0] = "bridges not isolated"
	}
	if r.Config.AllowDirect {
		words = append(words, "direct access allowed")
	}
	if r.Config.Routed {
		words = append(words, "no masquerade")
	}
	if r.Config.AnySender {
		words = append(words, filteringText(r.Config)+" filtering")
	}
	return strings.Join(append(words, "unmanaged devices: "+unmanagedText(r.Config)), ", ")
}

func (r *report) writeDevices(w io.Writer) error {
	fmt.Fprintln(w)
	rows := table{heads: []string{"DEVICE", "CLASS", "ATTACHED", "HOOK", "PROGRAM", "ID", "TAG", "OTHERS", "FAST PATH"}}
	for _, device := range r.Devices {
		fast := cmp.Or(device.Slow, "yes")
		for _, hook := range []struct {
			name string
			loader.HookStatus
		}{{"ingress", device.Ingress}, {"egress", device.Egress}} {
			id := "missing"
			if hook.ID != 0 {
				id = strconv.FormatUint(uint64(hook.ID), 10)
			}
			rows.add(device.Name, device.Class.String(), device.Attach.String(), hook.name,
				orDash(hook.Program), id, orDash(hook.Tag), othersText(hook.HookStatus), fast)
			fast = "" // of the device: said once
		}
	}
	return rows.write(w)
}

// writePorts tells of each container's port whether it takes the fast path, and into it.
func (r *report) writePorts(w io.Writer) error {
	if len(r.Ports) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	rows := table{heads: []string{"PORT", "BRIDGE", "ATTACHED", "CONTAINER", "FAST PATH", "STRAIGHT IN"}}
	for _, port := range r.Ports {
		attached, peer := "-", orDash(port.NoPeer)
		if port.Ingress.ID != 0 {
			attached = port.Attach.String()
		}
		if port.Peer && port.NoPeer == "" {
			peer = "yes"
		}
		rows.add(port.Name, port.Bridge, attached, orDash(port.MAC.String()), cmp.Or(port.Slow, "yes"), peer)
	}
	return rows.write(w)
}

// othersText names other people's programs on a hook, in the order in which they run.
func othersText(hook loader.HookStatus) string {
	var others []string
	if len(hook.Before) > 0 {
		others = append(others, "before: "+strings.Join(hook.Before, ", "))
	}
	if len(hook.After) > 0 {
		others = append(others, "after: "+strings.Join(hook.After, ", "))
	}
	return orDash(strings.Join(others, "; "))
}

func (r *report) writeDrops(w io.Writer) error {
	rows := table{heads: []string{"DROPPED", "REASON", "WHAT IT MEANS"}}
	for _, counter := range r.counters {
		if counter.Drop && counter.Packets > 0 {
			rows.add(strconv.FormatUint(counter.Packets, 10), counter.Name, counter.Text)
		}
	}
	fmt.Fprintln(w)
	if len(rows.rows) == 0 {
		_, err := fmt.Fprintln(w, "Nothing was dropped.")
		return err
	}
	return rows.write(w)
}

func (r *report) writeUnmanaged(w io.Writer) error {
	if len(r.Unmanaged) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	rows := table{heads: []string{"DEVICE WITHOUT PROGRAMS", "PACKETS"}}
	for _, device := range r.Unmanaged {
		rows.add(device.Name, strconv.FormatUint(device.Packets, 10))
	}
	return rows.write(w)
}

func (r *report) writeWarnings(w io.Writer) error {
	warnings := r.warnings()
	if len(warnings) > 0 {
		fmt.Fprintln(w)
	}
	for _, line := range warnings {
		fmt.Fprintf(w, "warning: %s\n", oneLine(line))
	}
	return nil
}

// shortDuration is 2h4m where Go says 2h4m0s.
func shortDuration(d time.Duration) string {
	text := d.Round(time.Second).String()
	if short, ok := strings.CutSuffix(text, "m0s"); ok {
		text = short + "m"
	}
	if short, ok := strings.CutSuffix(text, "h0m"); ok {
		text = short + "h"
	}
	return text
}
