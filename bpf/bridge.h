/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* bridge.h - the two hooks of a container bridge. Neither rewrites: they decide what containers
 * may send, and what may reach them.
 */
#pragma once

#include "flow.h"
#include "guard.h"
#include "icmp.h"
#include "parse.h"

/* A malformed packet of a container ends here: nobody could say later whose it is. */
static __always_inline enum verdict parse_inside(struct packet *p, __u32 l3)
{
	switch (parse(p, l3)) {
	case PARSED_NOT_IP:
		return PASS;
	case PARSED_V4_MAPPED:
		return drop(p, DROP_V4_MAPPED);
	case PARSED_MALFORMED:
		return drop(p, DROP_MALFORMED);
	case PARSED:
		break;
	}
	return is_local_scope(&p->h) ? PASS : GO_ON;
}

static __always_inline enum verdict bridge_ingress(struct packet *p, __u32 l3)
{
	struct found f;
	enum verdict v;

	if (p->skb->pkt_type != PACKET_HOST || is_vlan(p->skb))
		return PASS;
	v = parse_inside(p, l3);
	if (v != GO_ON)
		return v;
	if (is_loopback(&p->h))
		return drop(p, DROP_LOOPBACK);
	if (bridge_of(&p->h.tuple.src) != p->skb->ifindex)
		return drop(p, DROP_SPOOFED_ADDRESS);
	if (p->h.kind != KIND_FLOW || p->h.fragment != FRAGMENT_NONE ||
	    !half_find(&p->h.tuple, &f, false) ||
	    !half_accepts(f.half, CLASS_BRIDGE, p->skb->ifindex)) {
		if (is_foreign_mac(p))
			return drop(p, DROP_SPOOFED_MAC);
		return guard_route(p);
	}
	if (p->now - f.half->routed < ROUTE_CHECK_STAMPS)
		return PASS;
	v = guard_route(p);
	if (v == PASS)
		f.half->routed = p->now;
	return v;
}

/* A forwarded packet may enter as part of a flow: what from_uplink sent on is the inverse of
 * what the container answers with.
 */
static __always_inline bool belongs(struct packet *p)
{
	struct tuple key;
	struct found f;

	if (p->h.kind == KIND_ICMP_ERROR) {
		struct headers quoted = {};

		/* from_uplink has put the container's own packet into the quote */
		if (parse_quoted(p, &quoted) != PARSED || quoted.kind != KIND_FLOW)
			return false;
		return addr_equal(&p->h.tuple.dst, &quoted.tuple.src) &&
		       half_find(&quoted.tuple, &f, true) &&
		       half_accepts(f.half, CLASS_BRIDGE, p->skb->ifindex);
	}
	tuple_invert(&key, &p->h.tuple);
	return half_find(&key, &f, true) && half_accepts(f.half, CLASS_BRIDGE, p->skb->ifindex);
}

static __always_inline enum verdict bridge_egress(struct packet *p, __u32 l3)
{
	__u32 ifindex = p->skb->ingress_ifindex;
	enum verdict v;

	if (!ifindex || is_vlan(p->skb))
		return PASS; /* the host's own */
	v = parse_inside(p, l3);
	if (v != GO_ON)
		return v;
	if (ifindex == p->skb->ifindex)
		return PASS; /* from this bridge, by the host: a route back */
	if (p->h.fragment == FRAGMENT_NONE && p->h.kind != KIND_OTHER && belongs(p))
		return PASS;
	if (is_bridge(ifindex))
		return p->config->flags & CONFIG_NO_ISOLATION ? PASS : drop(p, DROP_ISOLATED);
	if (p->h.fragment != FRAGMENT_NONE)
		return drop(p, DROP_FRAGMENT);
	return drop(p, DROP_NO_FLOW);
}
