package bpf_test

import (
	"testing"

	"tcnat/bpf"
)

// close ends the connection by FINs of both sides.
func (c path) close() {
	c.Helper()
	c.sends("FA", "")
	c.receives("FA", "")
	c.sends("A", "")
}

// When a connection is over, a SYN of the side that had not begun it begins another one at once, on the very
// same addresses and ports (RFC 5382 REQ-2: all valid exchanges).
func TestOtherSideBegins(t *testing.T) {
	t.Parallel() // most of it is waiting
	d := load(t, 64)
	for _, f := range families {
		for _, end := range []string{"closed", "rule-gone"} {
			d.each(f.name+"/"+end+"/server-calls-back", func(d *datapath) {
				rules := ruleSet{
					snat: []snatRule{{source: f.subnet, masquerade: true}},
					dnat: []dnatRule{publish(f, protoTCP, one(3005), one(80))},
				}
				d.setRules(rules)
				in := d.path(f, tcp)
				in.inside, in.outside = at(f.container, 80), at(f.uplink, 3005)
				in.peer, in.world = at(f.world, 50001), at(f.world, 50001)
				in.receives("S", "")
				in.sends("SA", "")
				in.receives("A", "x")
				// while it lasts, no SYN of the server is more than a segment of it
				in.sends("S", "")
				before := d.counts()
				if end == "closed" {
					in.receives("FA", "")
					in.sends("FA", "")
					in.receives("A", "")
				} else {
					d.setRules(ruleSet{snat: rules.snat})
					d.endRule(dnatID(0))
				}
				out := in
				out.outside = at(f.uplink, 80)
				out.sends("S", "")
				out.receives("SA", "")
				out.sends("A", "hello")
				if n := d.halves(); n != 2 {
					d.Errorf("%d halves, want those of one flow:\n%s", n, d.allFlows())
				}
				if n := d.counts().since(before)[bpf.NATCounterFLOWS_TAKEN_OVER]; n != 1 {
					d.Errorf("%d flows taken over, want 1", n)
				}
				if !d.complete { // it takes seconds
					d.emptied()
				}
			})
		}
		d.each(f.name+"/client-is-called", func(d *datapath) {
			d.setRules(ruleSet{
				snat: []snatRule{{source: f.subnet, masquerade: true}},
				dnat: []dnatRule{publish(f, protoTCP, one(3005), one(3005))},
			})
			c := d.path(f, tcp).as(f.uplink, 3005)
			c.inside = at(f.container, 3005)
			c.sends("S", "")
			c.receives("SA", "")
			c.close()
			c.receives("S", "")
			c.sends("SA", "")
			c.receives("A", "hello")
			if n := d.halves(); n != 2 {
				d.Errorf("%d halves, want those of one flow:\n%s", n, d.allFlows())
			}
			if !d.complete { // it takes seconds
				d.emptied()
			}
		})
	}
}
