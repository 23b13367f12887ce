// Package bench compares NATs in throw-away network namespaces.
//
// Every contender has a rig of its own, all built up front and idle while another is measured:
//
//	c1 172.17.0.2 ─┐
//	c2 172.17.0.3 ─┤ docker0 172.17.0.1 [host] eth0 203.0.113.2 ── 203.0.113.1 eth0 [world]
//	...            ┘
//
// A sender pinned to one CPU puts frames into the container's (or the world's) device by
// AF_PACKET. The host's whole path and the receiver's run in softirq on that CPU, so a rate is
// what one core does. A TC program counts and ends the packets where they are received, by
// whether they are translated as they should be: a rate is packets that arrived translated,
// and a run in which more than a few do not is an error.
//
// Values are compared in pairs: plain forwarding without NAT and a contender, one right after
// the other, in alternating order; the result is the median of the pairs' ratios.
package bench
