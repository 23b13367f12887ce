package judge

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"tcnat/loader"
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
	mode  loader.FastPath // of tcnat
	over  bool
	flow  map[int]*connection // by number

	// of the step that is being done
	sent    [worldCount][]byte
	arrived [worldCount][endCount][][]byte
}

// difference is what a step came to, where that is not the same in both worlds.
type difference struct {
	*trial
	at     int                            // step
	step   step                           // or that which it repeats
	again  bool                           // it does
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
	who := speaker{s.flow, s.from}
	if _, d.again = s.act.(repeatAction); d.again {
		d.step = c.views[netfilter].sent[who].step
	}
	same := true
	for i, v := range c.views {
		if c.sent[i] == nil {
			return nil
		}
		v.sent[who] = said{c.sent[i], d.step}
		for end := range c.arrived[i] {
			if s.shape.fragment > 0 {
				c.arrived[i][end] = join(c.arrived[i][end])
			}
			for _, ip := range c.arrived[i][end] {
				if (s.from == f.initiator() || ofItsOwn(d.step) || c.reversed(s)) && end == f.endOf(s.from.other()) {
					v.ports.learn(c.sent[i], ip)
				}
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
		c.hear(s)
		c.note(s)
		return nil
	}
	return d
}

// ofItsOwn tells whether a container answers from another port than it was spoken to at, which is a flow
// of its own.
func ofItsOwn(s step) bool {
	u, ok := s.act.(udpAction)
	return ok && s.from == within && u.otherPort != 0
}

// reversed tells whether a container speaks UDP where nothing has come to it yet: then the flow is its own,
// from a port that the NAT chooses, though the other was meant to begin. Once it has been spoken to, the port that
// it answers from is no choice.
func (c *trial) reversed(s step) bool {
	f := c.flows[s.flow]
	return f.protocol == unix.IPPROTO_UDP && s.from != f.initiator() && !c.connection(s.flow).spoken[0]
}

// hear lets the ends know what has arrived.
func (c *trial) hear(s step) {
	for i, v := range c.views {
		for end, packets := range c.arrived[i] {
			for _, ip := range packets {
				v.hear(end, ip, s)
			}
		}
	}
}

// note keeps track of a connection after a step that went alike in both worlds.
func (c *trial) note(s step) {
	f := c.flows[s.flow]
	h, ok := parse(c.sent[netfilter])
	if !ok || h.protocol != f.protocol || isICMP(h.protocol) {
		return
	}
	flow := c.connection(s.flow)
	arrived := len(c.arrived[netfilter][f.endOf(s.from.other())]) > 0
	switch {
	case h.protocol == unix.IPPROTO_TCP:
		flow.see(s.from == f.initiator(), c.sent[netfilter][h.l4+13], arrived)
	case arrived:
		flow.spoken[by(s.from == f.initiator())] = true
	default:
		flow.drop()
	}
}

// connection is where a flow is.
func (c *trial) connection(flow int) *connection {
	if c.flow[flow] == nil {
		if c.flow == nil {
			c.flow = map[int]*connection{}
		}
		c.flow[flow] = &connection{}
	}
	return c.flow[flow]
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

// line tells the most of it in a line.
func (d *difference) line() string {
	text := d.report(d.at)
	for i, v := range d.views {
		if len(d.faults[i]) > 0 {
			text += fmt.Sprintf("; faults of %s: %s", v.world.name, d.faults[i])
		}
	}
	return text
}

// report tells in a line what a step came to.
func (c *trial) report(at int) string {
	s := c.steps[at]
	text := fmt.Sprintf("step %d, flow %s, %s: %s%s", at, c.flows[s.flow], s.from, s.act, s.shape)
	for i, v := range c.views {
		text += fmt.Sprintf("; %s:", v.world.name)
		if c.sent[i] == nil {
			text += " nothing to say"
			continue
		}
		n := 0
		for end, packets := range c.arrived[i] {
			for _, ip := range packets {
				h, _ := parse(ip)
				text += fmt.Sprintf(" [%s: %s]", v.world.ends[end].name, headline(ip, h))
				n++
			}
		}
		if n == 0 {
			text += " nothing arrives"
		}
	}
	return text
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
