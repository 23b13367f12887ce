/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* bridge.h - the hooks of a container bridge and of its ports. In the slow path they rewrite nothing
 * but hairpin packets: they decide what containers may send, and what may reach them.
 */
#pragma once

#include "always.h"
#include "fast.h"
#include "flow.h"
#include "fragment.h"
#include "guard.h"
#include "hairpin.h"
#include "icmp.h"
#include "lease.h"
#include "parse.h"
#include "sender.h"

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

/* The packet of a flow that was looked at less than a second ago. */
static __always_inline bool is_known(const struct packet *p)
{
	struct lease lease;

	if (!p->half || p->half->ifindex != p->skb->ifindex)
		return false;
	lease = lease_of(p->half);
	return lease.in && lease_is_fresh(p, lease) && !is_other_sender(p, lease.in);
}

static __noinline void find_outward(struct packet *p)
{
	struct found f;

	p->half = NULL;
	if (p->absent)
		return;
	if (p->h.kind == KIND_FLOW && half_find(&p->h.tuple, &f, false) &&
	    half_accepts(f.half, CLASS_BRIDGE, p->bridge)) {
		p->half = f.half;
		p->id = f.id;
	}
}

/* A later fragment to the host itself. GO_ON: of a hairpin flow. What there is no room for is the host's, as all
 * of it would be without us.
 */
static __noinline enum verdict later_to_host(struct packet *p)
{
	enum verdict v = PASS;

	if (is_early(p))
		v = fragment_wait(p, HOOK_INGRESS, PASS);
	if (v == GO_ON)
		find_outward(p);
	return v != GO_ON || (p->half && is_hairpin(p->half)) ? v : PASS;
}

/* What was turned comes to this hook once more, and on another CPU the rest of a datagram may do so before its
 * first fragment, which therefore is noted as it is then, too.
 */
static __noinline enum verdict first_turned(struct packet *p, __u32 l3)
{
	struct plan *plan = plan_get();

	if (!plan)
		return drop(p, DROP_NO_MEMORY);
	plan->transit = p->h.tuple;
	if (parse(p, l3) != PARSED)
		return drop(p, DROP_REWRITE);
	fragment_note(p->skb, &p->h, HOOK_INGRESS, p->now, FATE_CARRIED);
	p->h.tuple = plan->transit;
	return AGAIN;
}

/* first: see to a flow's first packet, too (--fast-path always). */
static __always_inline enum verdict bridge_ingress(struct packet *p, __u32 l3, bool first)
{
	enum verdict v;

	if (p->skb->pkt_type != PACKET_HOST || is_vlan(p->skb))
		return PASS;
	packet_clock(p);
	v = fast_from_bridge(p);
	if (v != GO_ON)
		return v;
	if (!first && is_known(p))
		return PASS;
	v = parse_inside(p, l3);
	if (v != GO_ON)
		return v;
	p->bridge = p->skb->ifindex;
	if (is_loopback(&p->h))
		return drop(p, DROP_LOOPBACK);
	v = check_sender(p);
	if (v != GO_ON)
		return v;
	if (__builtin_expect(p->h.fragment != FRAGMENT_NONE, 0)) {
		v = fragment_begin(p, HOOK_INGRESS);
		if (v != GO_ON)
			return v;
	} else if (p->h.kind == KIND_ICMP_ERROR) {
		v = hairpin_error_turn(p);
		if (v != GO_ON)
			return v;
	}
	find_outward(p);
	if (first) {
		v = forward_at_once(p, p->in);
		if (v != GO_ON)
			return v;
	}
	if (p->half && is_hairpin(p->half)) {
		v = hairpin_turn(p);
	} else {
		if (p->half && p->h.fragment == FRAGMENT_NONE)
			v = guard_flow(p);
		else
			v = guard_route(p);
		if (v == PASS && !guards_datagram(p))
			v = DROP;
		if (v != GO_ON)
			return v;
	}
	if (v == GO_ON) {
		v = p->h.fragment == FRAGMENT_LATER ? later_to_host(p) : hairpin_create(p);
		if (v == GO_ON)
			v = hairpin_turn(p);
	}
	if (p->h.fragment != FRAGMENT_FIRST)
		return v;
	if (v == AGAIN)
		v = first_turned(p, l3);
	return fragment_end(p, v, HOOK_INGRESS);
}

/* Whether a frame's source address is another port's. Dropped here, before the bridge sees it, it
 * cannot lead the bridge's own table astray.
 */
static __always_inline bool is_stolen_mac(const struct packet *p)
{
	const struct device *port;
	struct port_key key = {};
	__u32 *owner, ifindex = p->skb->ifindex;

	port = bpf_map_lookup_elem(&devices, &ifindex);
	if (!port || bpf_skb_load_bytes(p->skb, 6, key.mac, sizeof(key.mac)))
		return false;
	if (mac_equal(key.mac, port->mac))
		return false;
	key.bridge = port->bridge;
	owner = bpf_map_lookup_elem(&ports, &key);
	return owner && *owner != ifindex;
}

/* At a port only what its own container sends to the host may be forwarded at once: the bridge, which
 * knows whom a frame is for, comes later.
 */
static __always_inline enum verdict port_first(struct packet *p, __u32 l3)
{
	struct adjacency in = {.ifindex = p->skb->ifindex};
	const struct device *port, *bridge;

	port = bpf_map_lookup_elem(&devices, &in.ifindex);
	if (is_slow_device(port) || bpf_skb_load_bytes(p->skb, 0, in.local, sizeof(in.local)) ||
	    bpf_skb_load_bytes(p->skb, 6, in.remote, sizeof(in.remote)))
		return GO_ON;
	p->bridge = port->bridge;
	bridge = bpf_map_lookup_elem(&devices, &p->bridge);
	if (is_slow_device(bridge) || !mac_equal(in.local, bridge->mac) ||
	    !mac_equal(in.remote, port->mac) || parse_inside(p, l3) != GO_ON ||
	    is_loopback(&p->h) || !is_plain(&p->h) || check_sender(p) != GO_ON)
		return GO_ON;
	find_outward(p);
	return forward_at_once(p, adjacency_find(&in, p->now));
}

/* A port sees everything that its container sends, also to its neighbours. */
static __always_inline enum verdict port_ingress(struct packet *p, __u32 l3, bool first)
{
	enum verdict v;

	packet_clock(p);
	if (!is_vlan(p->skb)) {
		v = first ? fast_from_bridge(p) : fast_path(p, CLASS_BRIDGE, l3);
		if (v == GO_ON && first)
			v = port_first(p, l3);
		if (v != GO_ON)
			return v;
	}
	return is_stolen_mac(p) ? drop(p, DROP_SPOOFED_MAC) : PASS;
}

/* A forwarded packet may enter as part of a flow: what from_uplink sent on is the inverse of
 * what the container answers with.
 */
static __always_inline bool belongs(struct packet *p)
{
	struct tuple key;
	struct found f;

	if (p->h.kind == KIND_ICMP_ERROR) {
		struct plan *plan = plan_get();
		struct headers *quoted;

		/* from_uplink has put the container's own packet into the quote */
		if (!plan || p->h.fragment != FRAGMENT_NONE)
			return false;
		quoted = &plan->quote.h;
		if (parse_quoted(p, quoted) != PARSED || quoted->kind != KIND_FLOW)
			return false;
		return addr_equal(&p->h.tuple.dst, &quoted->tuple.src) &&
		       half_find(&quoted->tuple, &f, true) &&
		       half_accepts(f.half, CLASS_BRIDGE, p->skb->ifindex) &&
		       came_translated(p, f.half);
	}
	tuple_invert(&key, &p->h.tuple);
	if (!half_find(&key, &f, true) || !half_accepts(f.half, CLASS_BRIDGE, p->skb->ifindex) ||
	    !came_translated(p, f.half))
		return false;
	lease_inward(p, &f);
	return true;
}

/* Of what the host itself says to containers only ICMP about hairpin packets concerns us. */
static __noinline enum verdict host_icmp(struct packet *p, __u32 l3)
{
	if (is_hairpin_redirect(p, l3))
		return drop(p, DROP_HAIRPIN_REDIRECT);
	if (parse(p, l3) != PARSED || p->h.kind != KIND_ICMP_ERROR ||
	    p->h.fragment != FRAGMENT_NONE)
		return PASS;
	return hairpin_error_leave(p) == DROP ? DROP : PASS;
}

/* What a container sends to another one by the host. GO_ON: it is nothing of a hairpin flow's. */
static __noinline enum verdict leave_bridge(struct packet *p)
{
	if (p->h.kind == KIND_ICMP_ERROR && p->h.fragment == FRAGMENT_NONE)
		return hairpin_error_leave(p);
	return hairpin_leave(p);
}

/* What the host forwards to a container. */
static __always_inline enum verdict enter(struct packet *p)
{
	__u32 ifindex = p->skb->ingress_ifindex;
	enum verdict v;

	if (ifindex == p->skb->ifindex) {
		v = leave_bridge(p);
		return v == GO_ON ? PASS : v; /* by the host: a route back */
	}
	if (p->h.kind != KIND_OTHER && belongs(p))
		return PASS;
	if (is_bridge(ifindex)) {
		v = leave_bridge(p);
		if (v != GO_ON)
			return v;
		return p->config->flags & CONFIG_NO_ISOLATION ? PASS : drop(p, DROP_ISOLATED);
	}
	return drop(p, p->h.fragment != FRAGMENT_NONE && p->h.kind != KIND_FLOW ? DROP_FRAGMENT
										: DROP_NO_FLOW);
}

static __always_inline enum verdict bridge_egress(struct packet *p, __u32 l3)
{
	__u32 ifindex = p->skb->ingress_ifindex;
	enum verdict v;

	if (is_redirected(p))
		return PASS;
	if (is_vlan(p->skb))
		return PASS;
	if (!ifindex) /* the host's own */
		return is_icmp(p, l3) ? host_icmp(p, l3) : PASS;
	packet_clock(p);
	v = parse_inside(p, l3);
	if (v != GO_ON)
		return v;
	if (__builtin_expect(p->h.fragment != FRAGMENT_NONE, 0)) {
		v = fragment_begin(p, HOOK_EGRESS | ifindex);
		if (v == GO_ON && is_early(p))
			v = fragment_wait(p, HOOK_EGRESS | ifindex, DROP);
		if (v != GO_ON)
			return v;
	}
	v = enter(p);
	return p->h.fragment == FRAGMENT_FIRST ? fragment_end(p, v, HOOK_EGRESS | ifindex) : v;
}
