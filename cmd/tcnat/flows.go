package main

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tcnat/loader"
	"tcnat/maps"
)

func newFlows(e *env) *cobra.Command {
	var listed flowWords
	var output outputFlag
	list := &cobra.Command{
		Use:   "list [flags]",
		Short: "list flows",
		Long: `Lists the flows: who talks to whom, how it is translated, what each direction has
carried, and how long the flow has left when nothing more comes.

FAST says which directions take the fast path: both, out, in; or why not: idle (no packet in the
last second), slow (not yet), handshake, closing, device (one on the way may not: see status),
protocol (TCP and UDP alone can), no-room, off.`,
		Example: "  tcnat flows list\n  tcnat flows list -p tcp --container 172.17.0.2\n  tcnat flows list --dport 443 -o json",
		Args:    noArgs,
		RunE: e.inNetns(func(*cobra.Command) error {
			return e.read(func(datapath *loader.Datapath) error {
				return e.listFlows(datapath.State(), listed.filter(), output.json())
			})
		}),
	}
	listed.bind(list.Flags())
	output.bind(list)

	var flushed flowWords
	flush := &cobra.Command{
		Use:   "flush [flags]",
		Short: "end flows, all of them or those that match",
		Example: `  tcnat flows flush
  tcnat flows flush --container 172.17.0.2`,
		Args: noArgs,
		RunE: e.inNetns(func(*cobra.Command) error {
			return e.write(func(datapath *loader.Datapath) error {
				ended, err := datapath.FlushFlows(flushed.filter())
				if err != nil {
					return err
				}
				fmt.Fprintf(e.stdout, "%s ended\n", count(ended, "flow"))
				return nil
			})
		}),
	}
	flushed.bind(flush.Flags())
	completeWords(list, "protocol", "tcp", "udp", "udplite", "sctp", "icmp", "icmpv6")
	completeWords(flush, "protocol", "tcp", "udp", "udplite", "sctp", "icmp", "icmpv6")
	noun := newNoun("flows", "the conversations that are translated", "  tcnat flows list", list, flush)
	noun.AddCommand(newUnbuilt("watch")...)
	return noun
}

// flowWords choose flows on the command line. All that are given must match.
type flowWords struct {
	protocol    once[maps.Protocol]
	source      once[netip.Prefix]
	destination once[netip.Prefix]
	dport       once[uint16]
	container   once[netip.Addr]
}

func (w *flowWords) bind(fs *pflag.FlagSet) {
	bindOnce(fs, &w.protocol, "protocol", "p", "PROTO", "only PROTO: tcp, udp, udplite, sctp, icmp, icmpv6", parseFlowProtocol)
	bindOnce(fs, &w.source, "source", "s", "CIDR", "only flows that a host in CIDR began", parsePrefix)
	bindOnce(fs, &w.destination, "destination", "d", "CIDR", "only flows to a host in CIDR, as their first packet had it", parsePrefix)
	bindOnce(fs, &w.dport, "dport", "", "PORT", "only flows to PORT, as their first packet had it", named("--dport", parsePort))
	bindOnce(fs, &w.container, "container", "", "ADDR", "only flows from or to the container ADDR", parseHost)
}

func (w *flowWords) filter() maps.FlowFilter {
	return maps.FlowFilter{
		Protocol:        w.protocol.value,
		Source:          w.source.value,
		Destination:     w.destination.value,
		DestinationPort: w.dport.value,
		Container:       w.container.value,
	}
}

func parseFlowProtocol(text string) (maps.Protocol, error) {
	protocol, err := maps.ParseProtocol(text)
	if err != nil {
		return 0, fmt.Errorf("-p %s: not a protocol that has flows (tcp, udp, udplite, sctp, icmp, icmpv6)", quoteEmpty(text))
	}
	return protocol, nil
}

func selectFlows(flows []maps.Flow, filter maps.FlowFilter) []maps.Flow {
	var selected []maps.Flow
	for _, flow := range flows {
		if filter.Match(flow) {
			selected = append(selected, flow)
		}
	}
	return selected
}

// flowEntry is a flow of the JSON list. Original and reply are what the first and the
// answering packet have on their way in; a packet leaves as the inverse of the other one.
type flowEntry struct {
	ID          uint32       `json:"id"`
	Translation string       `json:"translation"`
	State       string       `json:"state"`
	Protocol    string       `json:"protocol"`
	Original    tupleEntry   `json:"original"`
	Reply       tupleEntry   `json:"reply"`
	Device      string       `json:"device,omitempty"`
	Rule        uint32       `json:"rule,omitempty"`
	Out         trafficEntry `json:"out"`
	In          trafficEntry `json:"in"`
	FastOut     string       `json:"fast_out"`
	FastIn      string       `json:"fast_in"`
	IdleSeconds float64      `json:"idle_seconds"`
	LeftSeconds float64      `json:"left_seconds"`
}

// tupleEntry has the id of an ICMP echo as the port of whoever asked.
type tupleEntry struct {
	Source          string `json:"source"`
	SourcePort      uint16 `json:"source_port,omitempty"`
	Destination     string `json:"destination"`
	DestinationPort uint16 `json:"destination_port,omitempty"`
}

type trafficEntry struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

func (e *env) listFlows(state *maps.State, filter maps.FlowFilter, asJSON bool) error {
	have, err := listDevices()
	if err != nil {
		return err
	}
	flows, _, err := state.Flows()
	if err != nil {
		return err
	}
	return e.printFlows(selectFlows(flows, filter), have, asJSON)
}

func (e *env) printFlows(flows []maps.Flow, have devices, asJSON bool) error {
	if asJSON {
		entries := make([]flowEntry, 0, len(flows))
		for _, flow := range flows {
			entries = append(entries, newFlowEntry(flow, have))
		}
		return writeJSON(e.stdout, entries)
	}
	rows := table{heads: []string{"PROTO", "TRANSLATION", "STATE", "ORIGINAL", "REPLY", "OUT", "IN", "FAST", "IDLE", "LEFT"}}
	for _, flow := range flows {
		rows.add(flow.Original.Protocol.String(), flow.Translation.String(), flow.State.String(),
			tupleText(flow.Original), tupleText(flow.Reply),
			trafficText(flow.Out), trafficText(flow.In), fastText(flow), shortDuration(flow.Idle), shortDuration(flow.Timeout))
	}
	return rows.write(e.stdout)
}

func newFlowEntry(flow maps.Flow, have devices) flowEntry {
	entry := flowEntry{
		ID:          flow.ID,
		Translation: flow.Translation.String(),
		State:       flow.State.String(),
		Protocol:    flow.Original.Protocol.String(),
		Original:    newTupleEntry(flow.Original),
		Reply:       newTupleEntry(flow.Reply),
		Rule:        flow.Rule,
		Out:         trafficEntry(flow.Out),
		In:          trafficEntry(flow.In),
		FastOut:     flow.FastOut.String(),
		FastIn:      flow.FastIn.String(),
		IdleSeconds: flow.Idle.Round(time.Millisecond).Seconds(),
		LeftSeconds: flow.Timeout.Round(time.Millisecond).Seconds(),
	}
	if flow.Ifindex != 0 {
		entry.Device = have.name(flow.Ifindex)
	}
	return entry
}

func newTupleEntry(tuple maps.Tuple) tupleEntry {
	return tupleEntry{
		Source: tuple.Src.Addr().String(), SourcePort: tuple.Src.Port(),
		Destination: tuple.Dst.Addr().String(), DestinationPort: tuple.Dst.Port(),
	}
}

// tupleText leaves out the port of an end that has none.
func tupleText(tuple maps.Tuple) string {
	end := func(a netip.AddrPort) string {
		if a.Port() == 0 {
			return a.Addr().String()
		}
		return a.String()
	}
	return end(tuple.Src) + " > " + end(tuple.Dst)
}

func trafficText(traffic maps.Traffic) string {
	return fmt.Sprintf("%d/%s", traffic.Packets, bytesText(traffic.Bytes))
}

// fastText says which directions of a flow are on the fast path: both, the original one (out), the
// reply (in), or why neither is.
func fastText(flow maps.Flow) string {
	out, in := flow.FastOut == maps.LeaseFast, flow.FastIn == maps.LeaseFast
	switch {
	case out && in:
		return "both"
	case out:
		return "out"
	case in:
		return "in"
	case flow.FastOut == flow.FastIn:
		return flow.FastOut.String()
	}
	return flow.FastOut.String() + "/" + flow.FastIn.String()
}

// bytesText is a number of bytes for people: three digits and a binary unit.
func bytesText(bytes uint64) string {
	const units = "KMGTPE"
	value, unit := float64(bytes), -1
	for value >= 1000 && unit < len(units)-1 {
		value /= 1024
		unit++
	}
	if unit < 0 {
		return fmt.Sprintf("%dB", bytes)
	}
	return fmt.Sprintf("%.3g%ciB", value, units[unit])
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
