package judge

import "bytes"

func errorInFragments(d *difference) bool {
	_, isError := d.isError()
	_, isMessage := d.step.act.(messageAction)
	if !(isError || isMessage) || !d.inFragments() || len(d.faults[tcnat]) > 0 {
		return false
	}
	return d.total(tcnat) == 0
}

// hostsErrorAboutFragments: nothing but errors of the host to who sent the packet, in either world, and tcnat's
// quote fragments of what was sent. Where that is an error itself, which conntrack's host sees of the whole, it says nothing.
func hostsErrorAboutFragments(d *difference) bool {
	end := d.flows[d.step.flow].endOf(d.step.from)
	if !d.inFragments() || d.steps[d.at].shape.ttl > 1 && d.step.shape.ttl > 1 || len(d.faults[tcnat]) > 0 {
		return false
	}
	_, ofError := d.isError()
	for world := range worldCount {
		if d.total(world) == 0 && (world == tcnat || !ofError) || d.total(world) != d.count(world, end) {
			return false
		}
	}
	sentFrom, sentTo := addresses(d.sent[tcnat])
	for _, ip := range d.arrived[tcnat][end] {
		h, ok := parse(ip)
		if !ok || !isICMP(h.protocol) || !isError(h.protocol, ip[h.l4]) {
			return false
		}
		quote := ip[h.l4+icmpSize:]
		q, ok := parse(quote)
		if !ok || !q.fragment {
			return false
		}
		from, to := addresses(quote)
		if !bytes.Equal(from, sentFrom) || !bytes.Equal(to, sentTo) {
			return false
		}
	}
	return true
}
