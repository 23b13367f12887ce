package bpf_test

import (
	"errors"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
)

// id answers the id of the path's flow.
func (c path) id(inbound bool) uint32 {
	c.Helper()
	original, _ := c.tuples(inbound)
	return c.mustHalf(original).Standing.Id
}

// turn answers who asks and who answers on a path.
func (c path) turn(inbound bool) (asks, answers func(flags, payload string)) {
	if inbound {
		return c.receives, c.sends
	}
	return c.sends, c.receives
}

// bothWays runs a test on an open TCP connection, and an SCTP association, made by a container and on
// one made by the world.
func bothWays(t *testing.T, test func(c path, inbound bool)) {
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{tcp, sctp} {
			for i, name := range []string{"snat", "dnat"} {
				d.each(f.name+"/"+p.name+"/"+name, func(d *datapath) {
					test(translated[i].open(d, f, p), i == 1)
				})
			}
		}
	}
}

// A SYN on a closed connection's tuple begins a new one at once.
func TestSYNTakesOver(t *testing.T) {
	for name, closing := range map[string]func(asks, answers func(string, string)){
		"fin":            func(asks, answers func(string, string)) { asks("FA", ""); answers("FA", ""); asks("A", "") },
		"rst":            func(asks, answers func(string, string)) { answers("R", "") },
		"rst-of-asker":   func(asks, answers func(string, string)) { asks("RA", "") },
		"half-open-fins": func(asks, answers func(string, string)) { answers("FA", ""); asks("A", ""); asks("FA", "") },
	} {
		t.Run(name, func(t *testing.T) {
			bothWays(t, func(c path, inbound bool) {
				asks, answers := c.turn(inbound)
				before := c.counts()
				closing(asks, answers)
				if n := c.counts().since(before); len(n) != 0 {
					c.Fatalf("closing counted %s", n)
				}
				asks("S", "")
				answers("SA", "")
				asks("A", "data")
				if n := c.counts().since(before); n[bpf.NATCounterFLOWS_TAKEN_OVER] != 1 || n[bpf.NATCounterFLOWS_CREATED] != 1 {
					c.Errorf("counted %s, want one flow created and one taken over", n)
				}
				original, _ := c.tuples(inbound)
				if n := c.mustHalf(original).Packets; n != 2 {
					c.Errorf("the new flow counts %d packets, want 2", n)
				}
				if n := c.halves(); n != 2 {
					c.Errorf("%d halves:\n%s", n, c.allFlows())
				}
			})
		})
	}
}

// A SYN on a connection that lives is a retransmission.
func TestSYNAgain(t *testing.T) {
	bothWays(t, func(c path, inbound bool) {
		asks, answers := c.turn(inbound)
		old := c.id(inbound)
		asks("S", "")
		answers("SA", "")
		asks("A", "")
		asks("FA", "")
		asks("S", "")
		if c.id(inbound) != old {
			c.Error("a SYN made another flow of a living one")
		}
	})
}

// An RST may be forged: the next segment of that direction takes it back (RFC 7857, 2.2).
func TestRSTTakenBack(t *testing.T) {
	bothWays(t, func(c path, inbound bool) {
		_, answers := c.turn(inbound)
		old := c.id(inbound)
		_, reply := c.tuples(inbound)
		answers("R", "")
		if h := c.mustHalf(reply); h.Tcp&sawRST == 0 {
			c.Errorf("RST was not noted: %d", h.Tcp)
		}
		answers("A", "data")
		if h := c.mustHalf(reply); h.Tcp&sawRST != 0 || h.Standing.Id != old {
			c.Errorf("RST is still noted: %d, id %d was %d", h.Tcp, h.Standing.Id, old)
		}
	})
}

// A connection that was there before tcnat goes on: its next segment opens a flow.
func TestMidStream(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		d.each(f.name, func(d *datapath) {
			masquerade(d, f)
			c := d.path(f, tcp).as(f.uplink, 0)
			c.sends("PA", "data of an old connection")
			c.receives("A", "")
		})
	}
}

// A rule that goes takes its flows with it; others stay.
func TestRuleDeleted(t *testing.T) {
	bothWays(t, func(c path, inbound bool) {
		id := snatID(0)
		if inbound {
			id = dnatID(0)
		}
		c.setRules(ruleSet{})
		c.receives("A", "rules are only asked by new flows") // until the generation says otherwise
		c.endRule(id)
		wire, seen := c.in("A", "")
		sent, _ := c.out("A", "")
		c.untouched(fromUplink(), wire)
		c.drops(toBridge(), seen.between(bridgeMAC, containerMAC), bpf.NATCounterDROP_NO_FLOW)
		c.drops(toUplink(), sent, bpf.NATCounterDROP_NO_RULE)
		// nor do errors about it go on
		m := icmpErrors[c.family.name][0]
		c.untouched(fromUplink(), c.error(m, c.router, c.outside.Addr(), wire.addrs(c.outside, c.world), 0).between(gatewayMAC, uplinkMAC))
	})
}

// A rule that changes its target is another rule: the next packet has the new translation.
func TestRuleChanged(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, sctp} {
			d.each(f.name+"/"+p.name+"/snat", func(d *datapath) {
				d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, first: f.second, last: f.second}}})
				c := d.path(f, p).as(f.second, 0)
				c.sends("S", "")
				c.receives("SA", "")
				d.endRule(snatID(0))
				d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, first: f.poolFirst, last: f.poolFirst}}})
				late, _ := c.in("A", "")
				d.untouched(fromUplink(), late)
				c = c.as(f.poolFirst, 0)
				c.sends("A", "x")
				c.receives("A", "y")
				d.untouched(fromUplink(), late)
			})
			d.each(f.name+"/"+p.name+"/dnat", func(d *datapath) {
				d.setRules(ruleSet{dnat: []dnatRule{publish(f, p.number(f), one(3005), one(80))}})
				c := d.path(f, p)
				c.inside, c.outside = at(f.container, 80), at(f.uplink, 3005)
				c.receives("S", "")
				c.sends("SA", "")
				d.endRule(dnatID(0))
				moved := publish(f, p.number(f), one(3005), one(81))
				moved.to = f.other
				d.setRules(ruleSet{dnat: []dnatRule{moved}})
				c.inside = at(f.other, 81)
				c.receives("S", "")
				c.sends("SA", "")
			})
		}
	}
}

// What changes beside a rule does not touch its flows.
func TestRuleAdded(t *testing.T) {
	bothWays(t, func(c path, inbound bool) {
		old := c.id(inbound)
		rules := c.rules
		rules.dnat = append(rules.dnat[:len(rules.dnat):len(rules.dnat)], publish(c.family, protoTCP, one(9999), one(9999)))
		for range 3 {
			c.setRules(rules)
			c.sends("A", "x")
			c.receives("A", "y")
		}
		if c.id(inbound) != old {
			c.Error("a new rule made another flow of an old one")
		}
	})
}

// end_flow ends one flow by its claim and id, and nothing else.
func TestEndFlow(t *testing.T) {
	bothWays(t, func(c path, inbound bool) {
		original, reply := c.tuples(inbound)
		id := c.id(inbound)
		if c.endFlow(reply, id+1) || c.endFlow(original, id+1) || c.endFlow(reply.inverse(), id) {
			c.Error("ended what is not there")
		}
		asks, answers := c.turn(inbound)
		asks("A", "")
		answers("A", "")
		if c.id(inbound) != id {
			c.Fatal("the flow is another one")
		}
		if !c.endFlow(reply, id) {
			c.Fatal("did not end the flow")
		}
		before := c.counts()
		asks("S", "the next packet of the asker opens a new one")
		answers("SA", "")
		if n := c.counts().since(before)[bpf.NATCounterFLOWS_CREATED]; n != 1 {
			c.Errorf("%d flows created after the end, want 1", n)
		}
		if n := c.mustHalf(original).Packets; n != 1 {
			c.Errorf("the new flow counts %d packets, want 1", n)
		}
	})
}

// until polls for a condition.
func (d *datapath) until(what string, limit time.Duration, condition func() bool) {
	d.Helper()
	for end := time.Now().Add(limit); !condition(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			d.Fatalf("%s: not within %s\nflows:\n%s", what, limit, d.allFlows())
		}
	}
}

// startExpiry arms the expiry's timer.
func (d *datapath) startExpiry() {
	d.Helper()
	// under load the kernel may have no memory for a timer for a moment
	d.until("the expiry starts", 5*time.Second, func() bool {
		ret, err := d.programs[bpf.NATProgStartExpiry].Run(&ebpf.RunOptions{Data: make([]byte, 64)})
		d.check(err)
		return ret == 0
	})
}

// mappings are the outside ports that endpoints have, by place.
func (d *datapath) mappings() map[uint32]bpf.NATMapping {
	d.Helper()
	var (
		cursor ebpf.MapBatchCursor
		places = int(d.Mappings.MaxEntries())
		keys   = make([]uint32, places)
		values = make([]bpf.NATMapping, places)
	)
	n, err := d.Mappings.BatchLookup(&cursor, keys, values, nil)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) || n != places {
		d.Fatalf("%d mappings read: %v", n, err)
	}
	used := make(map[uint32]bpf.NATMapping)
	for i, m := range values {
		if uint32(m.Hold) != 0 {
			used[keys[i]] = m
		}
	}
	return used
}

// moved are the endpoints that have another port than their own.
func (d *datapath) moved() int {
	d.Helper()
	return len(elements[bpf.NATEndpoint, bpf.NATMovedPort](d, d.MovedPorts))
}

// queued answers whether the expiry's queue has an element.
func (d *datapath) queued() bool {
	d.Helper()
	var e bpf.NATExpiryEntry
	err := d.ExpiryQueue.Lookup(nil, &e)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		d.Fatal(err)
	}
	return err == nil
}

// emptied lets every flow end of age, and expects every table to be empty then.
func (d *datapath) emptied() {
	d.Helper()
	d.configure(func(c *bpf.NATConfig) { c.Timeout = [8]uint32{} })
	d.startExpiry()
	d.until("all flows end", time.Minute, func() bool { return d.halves() == 0 })
	d.until("all mappings end", 20*time.Second, func() bool { return len(d.mappings()) == 0 && d.moved() == 0 })
	d.until("the queue empties", 20*time.Second, func() bool { return !d.queued() })
}

// Flows that idle past their time go, with their mappings and their place in the queue;
// the others stay.
func TestExpiry(t *testing.T) {
	d := load(t, 4096)
	masquerade4 := ruleSet{}
	for _, f := range families {
		masquerade4.snat = append(masquerade4.snat, snatRule{source: f.subnet, masquerade: true})
		masquerade4.dnat = append(masquerade4.dnat, publish(f, protoTCP, one(3005), one(80)))
	}
	d.setRules(masquerade4)
	d.configure(func(c *bpf.NATConfig) {
		c.Timeout[bpf.NATTimeoutTIMEOUT_UDP_NEW], c.Timeout[bpf.NATTimeoutTIMEOUT_UDP_WELL_KNOWN], c.Timeout[bpf.NATTimeoutTIMEOUT_ICMP] = 1, 1, 1
	})
	d.startExpiry()
	const each = 500
	var stay []path
	for _, f := range families {
		for _, p := range []protocol{tcp, udp, echo} {
			for i := range uint16(each) {
				c := d.path(f, p).as(f.uplink, 0).by(f.container, 20000+i).open()
				if p.name == tcp.name && i%50 == 0 {
					stay = append(stay, c)
				}
			}
		}
		c := d.path(f, tcp)
		c.inside, c.outside = at(f.container, 80), at(f.uplink, 3005)
		c.receives("S", "")
		stay = append(stay, c)
	}
	if n := len(d.mappings()); n == 0 {
		t.Error("no mappings")
	}
	d.until("UDP and ICMP flows end", 20*time.Second, func() bool { return d.halves() == 2*(2*each+2) })
	if n := len(d.mappings()); n != 0 {
		t.Errorf("%d mappings stay", n)
	}
	for _, c := range stay {
		c.receives("A", "")
		c.sends("A", "")
	}
	d.emptied()
	counted := d.counts()
	if n := uint64(2 * (3*each + 1)); counted[bpf.NATCounterFLOWS_CREATED] != n || counted[bpf.NATCounterFLOWS_ENDED] != n {
		t.Errorf("counted %s, want %d flows created and ended", counted, n)
	}
	if made, ended := counted[bpf.NATCounterMAPPINGS_CREATED], counted[bpf.NATCounterMAPPINGS_ENDED]; made != ended {
		t.Errorf("%d mappings created, %d ended", made, ended)
	}
	var e bpf.NATExpiry
	d.check(d.Expiry.Lookup(uint32(0), &e))
	t.Logf("%d ticks, the longest %s, %d entries checked", e.Ticks, time.Duration(e.Longest), e.Checked)
}

// A packet that comes between the two passes of the expiry revives its flow.
func TestExpiryRevived(t *testing.T) {
	d := load(t, 64)
	f := families[0]
	masquerade(d, f)
	short := func(c *bpf.NATConfig) {
		c.Timeout[bpf.NATTimeoutTIMEOUT_UDP_NEW], c.Timeout[bpf.NATTimeoutTIMEOUT_UDP] = 1, 1
	}
	c := d.path(f, udp).as(f.uplink, 0).toward(at(f.world, 4433))
	c.sends("", "x")
	id := c.id(false)
	d.configure(short)
	d.startExpiry()
	original, reply := c.tuples(false)
	d.until("the flow is being ended", 10*time.Second, func() bool {
		h, ok := d.half(original)
		if !ok {
			d.Fatal("the flow went in one pass")
		}
		return h.Standing.Life == bpf.NATLifeLIFE_ORIGINAL_ENDING
	})
	d.configure(nil)
	c.receives("", "y")
	c.sends("", "z")
	lives := map[bpf.NATRole]bpf.NATLife{bpf.NATRoleROLE_ORIGINAL: bpf.NATLifeLIFE_ORIGINAL, bpf.NATRoleROLE_REPLY: bpf.NATLifeLIFE_LIVE}
	for _, key := range []tuple{original, reply} {
		if h := d.mustHalf(key); h.Standing.Id != id || h.Standing.Life != lives[h.Role] {
			t.Errorf("%s: id %d (was %d), life %d", key, h.Standing.Id, id, h.Standing.Life)
		}
	}
	if n := d.counts()[bpf.NATCounterFLOWS_REVIVED]; n != 1 {
		t.Errorf("%d flows revived, want 1", n)
	}
}

// A full queue loses no entry, and does not stop the expiry.
func TestExpiryQueueFull(t *testing.T) {
	d := load(t, 64)
	f := families[0]
	masquerade(d, f)
	d.path(f, tcp).as(f.uplink, 0).sends("S", "")
	var entry bpf.NATExpiryEntry
	d.check(d.ExpiryQueue.LookupAndDelete(nil, &entry))
	entry.Checked -= 10000 // stamps: more than the expiry's period ago
	room := int(d.ExpiryQueue.MaxEntries())
	fill := func() {
		for range room {
			entry.Checked++ // no two are the same
			d.check(d.ExpiryQueue.Put(nil, entry))
		}
	}
	fill()
	checked := func() uint64 {
		var e bpf.NATExpiry
		d.check(d.Expiry.Lookup(uint32(0), &e))
		return e.Checked
	}
	before := checked()
	d.configure(nil)
	d.startExpiry()
	d.until("every entry was looked at", 10*time.Second, func() bool { return checked()-before >= uint64(room) })
	d.stopExpiry() // which has an entry in its hands now and then
	left := 0
	for d.ExpiryQueue.LookupAndDelete(nil, &entry) == nil {
		left++
	}
	if left != room {
		t.Errorf("%d entries are left of %d", left, room)
	}
	entry.Checked -= 10000
	fill()
	d.configure(func(c *bpf.NATConfig) { c.Timeout = [8]uint32{} })
	d.emptied()
}
