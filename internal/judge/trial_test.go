package judge

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// The two worlds, by number.
const (
	netfilter = iota
	tcnat
	worldCount
)

// trial is a conversation that is held in both worlds at once.
type trial struct {
	*script
	views [worldCount]*view
	over  bool

	// of the step that is being done
	sent    [worldCount][]byte
	arrived [worldCount][endCount][][]byte
}

// difference is what a step came to, where that is not the same in both worlds.
type difference struct {
	*trial
	at     int // step
	step   step
	normal [worldCount][endCount][][]byte // what arrived, normalized
	faults [worldCount][]string
}

// begin makes the step's packets, one for each world; nil where there is none to send.
func (c *trial) begin(at int) error {
	s := c.steps[at]
	for i, v := range c.views {
		c.sent[i] = s.act.packet(v, s)
		c.arrived[i] = [endCount][][]byte{}
	}
	if (c.sent[0] == nil) != (c.sent[1] == nil) {
		return fmt.Errorf("conversation %d, step %d: one world has a packet to send, the other has none", c.number, at)
	}
	return nil
}

// finish looks at what the step came to. The difference is nil where there is none.
func (c *trial) finish(at int) *difference {
	s := c.steps[at]
	f := c.flows[s.flow]
	d := &difference{trial: c, at: at, step: s}
	same := true
	for i, v := range c.views {
		if c.sent[i] == nil {
			return nil
		}
		v.sent[speaker{s.flow, s.from}] = c.sent[i]
		for end, packets := range c.arrived[i] {
			for _, ip := range packets {
				if s.from == f.initiator() && end == f.endOf(s.from.other()) {
					v.ports.learn(c.sent[i], ip)
				}
				v.hear(end, ip, s)
				d.normal[i][end] = append(d.normal[i][end], v.ports.normalize(ip, end == f.endOf(s.from)))
				for _, fault := range faults(end, ip, c.sent[i]) {
					d.faults[i] = append(d.faults[i], fmt.Sprintf("%s: %s", v.world.ends[end].name, fault))
				}
			}
		}
		same = same && len(d.faults[i]) == 0
	}
	for end := range endCount {
		same = same && slices.EqualFunc(d.normal[netfilter][end], d.normal[tcnat][end], bytes.Equal)
	}
	if same {
		return nil
	}
	return d
}

// count is how many packets arrived at an end of a world.
func (d *difference) count(world, end int) int { return len(d.normal[world][end]) }

// total is how many packets arrived anywhere in a world.
func (d *difference) total(world int) (n int) {
	for _, packets := range d.normal[world] {
		n += len(packets)
	}
	return n
}

// header parses what was sent in the netfilter world.
func (d *difference) header() header {
	h, _ := parse(d.sent[netfilter])
	return h
}

// String tells all that is known of it.
func (d *difference) String() string {
	var b strings.Builder
	b.WriteString(d.script.String())
	fmt.Fprintf(&b, "step %d differs: flow %d, %s: %s%s\n", d.at, d.step.flow, d.step.from, d.step.act, d.step.shape)
	for i, v := range d.views {
		fmt.Fprintf(&b, "  %s:\n    sent %s\n", v.world.name, describe(d.sent[i]))
		for end := range endCount {
			for n, ip := range d.arrived[i][end] {
				fmt.Fprintf(&b, "    at %s arrived %s\n", v.world.ends[end].name, describe(ip))
				if normal := d.normal[i][end][n]; !bytes.Equal(normal, ip) {
					fmt.Fprintf(&b, "      normalized %s\n", describe(normal))
				}
			}
		}
		if d.total(i) == 0 {
			b.WriteString("    nothing arrived\n")
		}
		for _, fault := range d.faults[i] {
			fmt.Fprintf(&b, "    FAULT: %s\n", fault)
		}
	}
	return b.String()
}
