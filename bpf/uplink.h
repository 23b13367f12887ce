/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* uplink.h - the two hooks of an uplink: here packets are translated and flows are made. */
#pragma once

#include "always.h"
#include "create.h"
#include "fast.h"
#include "flow.h"
#include "fragment.h"
#include "guard.h"
#include "icmp.h"
#include "lease.h"
#include "open.h"
#include "parse.h"
#include "sender.h"
#include "stale.h"

static __always_inline enum verdict translate(struct packet *p, const struct found *f)
{
	if (f->half)
		half_see(p, f->half);
	return rewrite(p, &f->to);
}

/* Makes the flow that open_*() has planned. The first packet is counted by the way: f->half is NULL
 * then. Or else it is one of the flow like any other.
 */
static __always_inline enum verdict begin(struct packet *p, enum verdict planned, struct found *f)
{
	struct plan *plan = plan_get();

	if (planned != GO_ON)
		return planned;
	if (!plan)
		return drop(p, DROP_NO_MEMORY);
	if (!is_always(p)) {
		plan->packets = p->skb->gso_segs ?: 1;
		plan->bytes = p->skb->len;
		if (has_states(p->h.tuple.proto))
			plan->tcp = tcp_see(0, p->h.tcp);
	}
	switch (flow_create(p->skb)) {
	case CREATED_NOT:
		return drop(p, plan->reason);
	case CREATED:
		f->half = NULL;
		tuple_invert(&f->to, &plan->entry.claim);
		if (plan->packets)
			return GO_ON;
		break;
	case CREATED_BY_OTHERS:
		break;
	}
	if (!half_find(&p->h.tuple, f, false) ||
	    !half_accepts(f->half, plan->original_class, plan->original_ifindex))
		return drop(p, DROP_ENDING);
	return GO_ON;
}

/* An error from a container, from a router behind it, or from the host about a packet that it
 * could not deliver: outside it must speak of the addresses that outside knows.
 */
static __noinline enum verdict error_outward(struct packet *p, __u32 bridge)
{
	struct plan *plan = plan_get();
	struct quote *q;
	struct found f;

	if (!plan)
		return drop(p, DROP_NO_MEMORY);
	q = &plan->quote;
	if (!quote_find(p, q, &f) || f.half->class != CLASS_BRIDGE)
		return bridge || bridge_of(&q->h.tuple.dst) ? drop(p, DROP_ICMP_UNRELATED) : PASS;
	/* a container speaks of what was sent to itself, not to its neighbours, and to who sent it */
	if ((bridge && !addr_equal(&p->h.tuple.src, &q->h.tuple.dst)) ||
	    !addr_equal(&p->h.tuple.dst, &q->h.tuple.src))
		return drop(p, DROP_ICMP_UNRELATED);
	if (rewrite_quote(p, q, &f.to) ||
	    rewrite_addrs(p, bridge ? &f.to.src : &p->h.tuple.src, &p->h.tuple.dst))
		return drop(p, DROP_REWRITE);
	return PASS;
}

/* TCP and UDP of the host's own, which most of its traffic is. Not with a bridge's address, which the
 * world does not know.
 */
static __always_inline bool is_own(struct packet *p, __u32 l3)
{
	void *data = (void *)(long)p->skb->data, *end = (void *)(long)p->skb->data_end;
	struct addr src;
	__u8 proto;

	if (p->bridge)
		return false;
	if (p->skb->protocol == bpf_htons(ETH_P_IP)) {
		const struct iphdr *ip = data + l3;

		if ((void *)(ip + 1) > end)
			return false;
		addr_from_ipv4(&src, ip->saddr);
		proto = ip->protocol;
	} else if (p->skb->protocol == bpf_htons(ETH_P_IPV6)) {
		const struct ipv6hdr *ip = data + l3;

		if ((void *)(ip + 1) > end)
			return false;
		__builtin_memcpy(&src, &ip->saddr, sizeof(src));
		if (addr_is_v4_mapped(&src))
			return false;
		proto = ip->nexthdr;
	} else {
		return false;
	}
	return (proto == IPPROTO_TCP || proto == IPPROTO_UDP) && is_outside(p, &src);
}

/* A container's address is in the packet: it must not leave. */
static __always_inline enum verdict leave(struct packet *p, __u32 from)
{
	struct found f;
	enum verdict v;

	if (p->h.kind != KIND_FLOW)
		return drop(p, p->h.fragment == FRAGMENT_NONE ? DROP_PROTOCOL : DROP_FRAGMENT);
	if (half_find(&p->h.tuple, &f, false) && f.half->role != ROLE_TRANSIT &&
	    half_accepts(f.half, CLASS_BRIDGE, from) && !opens_anew(p, &f) &&
	    (p->h.fragment == FRAGMENT_LATER || way_holds(p, f.half, f.id))) {
		lease_outward(p, &f);
		return translate(p, &f);
	}
	if (p->h.fragment == FRAGMENT_LATER)
		return drop(p, DROP_FRAGMENT);
	if (is_stray(&p->h))
		return drop(p, DROP_TCP_UNEXPECTED);
	if (is_echo(&p->h) && !is_echo_request(&p->h))
		return drop(p, DROP_ICMP_UNRELATED);
	p->absent = f.absent;
	v = begin(p, open_outward(p), &f);
	return v == GO_ON ? translate(p, &f) : v;
}

/* The device that a fragment came in by. The host that puts IPv6 datagrams together and cuts them again
 * (conntrack) forgets it (ip6_copy_metadata), or names the bridge's port where that was done on the
 * bridge.
 */
static __noinline __u32 fragment_input(struct packet *p, __u32 from)
{
	const struct device *device;

	if (p->h.tuple.family != FAMILY_IPV6)
		return from;
	if (!from)
		return bridge_of(&p->h.tuple.src);
	device = bpf_map_lookup_elem(&devices, &from);
	return device && device->class == CLASS_PORT ? device->bridge : from;
}

static __always_inline enum verdict uplink_egress(struct packet *p, __u32 l3)
{
	__u32 from = p->skb->ingress_ifindex, bridge;
	enum parsed parsed;
	enum verdict v;

	p->bridge = from;
	p->uplink = p->skb->ifindex;
	if (is_redirected(p))
		return PASS;
	packet_clock(p);
	if (is_own(p, l3))
		return PASS;
	parsed = parse(p, l3);
	if (parsed == PARSED_NOT_IP || is_vlan(p->skb))
		return PASS;
	if (parsed == PARSED_V4_MAPPED)
		return drop(p, DROP_V4_MAPPED);
	if (parsed == PARSED_MALFORMED)
		return is_bridge(from) ? drop(p, DROP_MALFORMED) : PASS;
	if (p->h.fragment != FRAGMENT_NONE)
		from = p->bridge = fragment_input(p, from);
	bridge = bridge_of_sender(p, &p->h.tuple.src, from);
	if (is_local_scope(&p->h)) /* multicast that the host routes, with a container's address */
		return bridge && from ? drop(p, DROP_MULTICAST) : PASS;
	if (bridge && from && from != bridge)
		return drop(p, DROP_SPOOFED_ADDRESS);
	if (p->h.kind == KIND_ICMP_ERROR && p->h.fragment == FRAGMENT_NONE)
		return error_outward(p, bridge);
	if (!bridge)
		return PASS; /* the host's own, or forwarded for somebody else */
	if (__builtin_expect(p->h.fragment != FRAGMENT_NONE, 0)) {
		v = fragment_begin(p, HOOK_EGRESS | from);
		if (v == GO_ON && is_early(p))
			v = fragment_wait(p, HOOK_EGRESS | from, DROP);
		if (v != GO_ON)
			return v;
	}
	v = leave(p, from);
	return p->h.fragment == FRAGMENT_FIRST ? fragment_end(p, v, HOOK_EGRESS | from) : v;
}

static __noinline enum verdict error_inward(struct packet *p)
{
	struct plan *plan = plan_get();
	struct quote *q;
	struct found f;

	if (!plan)
		return drop(p, DROP_NO_MEMORY);
	q = &plan->quote;
	if (!quote_find(p, q, &f) || f.half->class != CLASS_UPLINK ||
	    !addr_equal(&p->h.tuple.dst, &q->h.tuple.src))
		return guard_inside(p);
	if (rewrite_quote(p, q, &f.to) || rewrite_addrs(p, &p->h.tuple.src, &f.to.dst))
		return drop(p, DROP_REWRITE);
	return PASS;
}

static __always_inline enum verdict translate_inward(struct packet *p, struct found *f, __u32 l3)
{
	enum verdict v;

	if (f->half && lease_at_once_inward(p, f)) {
		v = l3 ? fast_from_uplink(p) : fast_from_l3(p);
		if (v != GO_ON)
			return v;
	}
	return translate(p, f);
}

/* What comes from the world, to one of its flows or to begin one. */
static __always_inline enum verdict arrive(struct packet *p, __u32 l3)
{
	struct found f;
	enum verdict v;

	if (p->h.kind != KIND_FLOW) {
		p->h.fate = FATE_UNTOUCHED;
		return PASS;
	}
	if (!p->absent && half_find(&p->h.tuple, &f, false) &&
	    half_accepts(f.half, CLASS_UPLINK, p->skb->ifindex) && !opens_anew(p, &f))
		return translate_inward(p, &f, l3);
	if (p->h.fragment == FRAGMENT_LATER)
		return p->h.fate == FATE_UNTOUCHED ? guard_inside(p) : drop(p, DROP_FRAGMENT);
	p->absent = p->absent || f.absent;
	v = open_inward(p);
	if (v == PASS)
		v = open_direct(p);
	if (v == PASS) {
		p->h.fate = FATE_UNTOUCHED;
		return guard_inside(p);
	}
	v = begin(p, v, &f);
	return v == GO_ON ? translate_inward(p, &f, l3) : v;
}

/* A later fragment of a datagram that nothing is known of: for a container perhaps, or the host's own, or
 * one that it forwards for somebody else. What there is no room for is the host's, as all of it would
 * be without us.
 */
static __noinline enum verdict early_from_uplink(struct packet *p)
{
	__u32 ifindex;

	if (bridge_of(&p->h.tuple.dst))
		return fragment_wait(p, HOOK_UPLINK, DROP);
	if (route_of(p, &ifindex) == ROUTE_FORWARD && ifindex &&
	    !bpf_map_lookup_elem(&devices, &ifindex))
		return PASS;
	return fragment_wait(p, HOOK_UPLINK, PASS);
}

static __always_inline enum verdict uplink_ingress(struct packet *p, __u32 l3)
{
	enum verdict v;

	if (p->skb->pkt_type != PACKET_HOST || is_vlan(p->skb))
		return PASS;
	p->uplink = p->skb->ifindex;
	packet_clock(p);
	v = l3 ? fast_from_uplink(p) : fast_from_l3(p);
	if (v != GO_ON)
		return v;
	switch (parse(p, l3)) {
	case PARSED_V4_MAPPED:
		return drop(p, DROP_V4_MAPPED);
	case PARSED:
		break;
	case PARSED_MALFORMED:
		/* the kernel drops what is malformed, but for a first fragment that is too short
		 * for its header (RFC 1858)
		 */
		return p->h.fragment == FRAGMENT_FIRST ? drop(p, DROP_MALFORMED) : PASS;
	default:
		return PASS;
	}
	if (is_local_scope(&p->h))
		return PASS;
	if (is_loopback(&p->h))
		return drop(p, DROP_LOOPBACK);
	if (p->h.kind == KIND_ICMP_ERROR && p->h.fragment == FRAGMENT_NONE)
		return error_inward(p);
	if (__builtin_expect(p->h.fragment != FRAGMENT_NONE, 0)) {
		/* at to_uplink the device that it came by may not be known: see fragment_input() */
		if (bridge_of(&p->h.tuple.src))
			return drop(p, DROP_SPOOFED_ADDRESS);
		v = fragment_begin(p, HOOK_UPLINK);
		if (v == GO_ON && is_early(p))
			v = early_from_uplink(p);
		if (v != GO_ON)
			return v;
	}
	v = arrive(p, l3);
	return p->h.fragment == FRAGMENT_FIRST ? fragment_end(p, v, HOOK_UPLINK) : v;
}
