// Package lab builds throw-away network namespaces: containers on a bridge, their
// host, and an outside that knows nothing of the containers' addresses.
//
//	c1 172.17.0.2 ─┐
//	c2 172.17.0.3 ─┤ docker0 172.17.0.1 [host] eth0 203.0.113.2
//	               ┘                      │            │
//	   optional: eth1 192.0.2.2 ──────────┤   203.0.113.1 [router] 198.18.0.1
//	   [other] 192.0.2.1, lo 9.9.9.9      │                           │ Options.HopMTU
//	                                      │   198.51.100.1 [isp] 198.18.0.2
//	   optional: tun0 10.8.0.2 ───────────┘            │
//	   [far] 10.8.0.1, lo 8.8.8.8             198.51.100.2 [world], lo 1.1.1.1
//
// Every device has an IPv6 address too, see topology.go. Nobody outside the host has a
// route to 172.17.0.0/16 or fd00:17::/64, and no one filters: a packet that leaves with
// a container's address can be seen on its way, and is never answered.
//
// The namespaces stand under /run/netns as tcnat-NAME-ROLE, so that `ip netns` and
// nsenter enter them. Everything is made over netlink, nothing has to be installed.
// Close removes all of it, also after a failure half-way through New.
package lab
