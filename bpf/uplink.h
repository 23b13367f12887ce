/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* uplink.h - the two hooks of an uplink: here packets are translated and flows are made. */
#pragma once

#include "create.h"
#include "flow.h"
#include "guard.h"
#include "icmp.h"
#include "parse.h"

static __always_inline enum verdict translate(struct packet *p, const struct found *f)
{
	half_see(p, f->half);
	return rewrite(p, &f->to);
}

/* Makes the flow that open_*() has planned; then the packet is one of it like any other. */
static __always_inline enum verdict translate_first(struct packet *p, enum verdict planned,
						    struct found *f)
{
	struct plan *plan = plan_get();

	if (planned != GO_ON)
		return planned;
	if (!plan)
		return drop(p, DROP_NO_MEMORY);
	if (flow_create(p->skb) == CREATED_NOT)
		return drop(p, plan->reason);
	if (!half_find(&p->h.tuple, f, false) ||
	    !half_accepts(f->half, plan->original_class, plan->original_ifindex))
		return drop(p, DROP_ENDING);
	return translate(p, f);
}

/* SNAT: a container, or the host with a bridge's address, speaks to the world. */
static __noinline enum verdict open_outward(struct packet *p)
{
	struct plan *plan = plan_get();
	const struct snat_rule *rule;
	struct tuple *t = &p->h.tuple;

	if (!plan)
		return drop(p, DROP_NO_MEMORY);
	plan_begin(p, plan);
	/* before the rules are read: when they change now, this flow is of the old ones */
	plan->generation = generation_of(0);
	plan->original_class = CLASS_BRIDGE;
	plan->original_ifindex = p->skb->ingress_ifindex;
	plan->reply_class = CLASS_UPLINK;
	plan->reply_ifindex = 0;
	rule = snat_find(p->config, &t->src, p->skb->ifindex);
	if (!rule && !(p->config->flags & CONFIG_ROUTED))
		return drop(p, DROP_NO_RULE);
	if (!rule || (rule->flags & SNAT_EXCEPT && rule_lists(p->config, rule->id, &t->dst)))
		return GO_ON;

	plan->translation = TRANSLATION_SNAT;
	plan->outside = true;
	plan->map = t->proto == IPPROTO_UDP;
	plan->rule = rule->id;
	plan->generation = rule->generation;
	if (rule->flags & SNAT_MASQUERADE) {
		if (!source_address(p, p->skb->ifindex, &plan->entry.claim.dst))
			return drop(p, DROP_NO_ADDRESS);
	} else {
		plan->entry.claim.dst = rule->to;
		if (rule->to_count > 1) {
			/* an inside address always gets the same outside one (RFC 4787 REQ-2) */
			__u64 words[2] = {
				(__u64)t->src.word[0] << 32 | t->src.word[1],
				(__u64)t->src.word[2] << 32 | t->src.word[3],
			};
			__u32 nth = keyed_hash(p->config->secret, words, 2) % rule->to_count;

			plan->entry.claim.dst.word[3] =
				bpf_htonl(bpf_ntohl(rule->to.word[3]) + nth);
		}
	}
	if (rule->port_first && t->proto != IPPROTO_ICMP && t->proto != IPPROTO_ICMPV6) {
		plan->first = rule->port_first;
		plan->last = rule->port_last;
	} else {
		plan_ports(plan);
	}
	return GO_ON;
}

/* An error from a container, from a router behind it, or from the host about a packet that it
 * could not deliver: outside it must speak of the addresses that outside knows.
 */
static __noinline enum verdict error_outward(struct packet *p, __u32 bridge)
{
	struct quote q = {};
	struct found f;

	if (!quote_find(p, &q, &f) || f.half->class != CLASS_BRIDGE)
		return bridge || bridge_of(&q.h.tuple.dst) ? drop(p, DROP_ICMP_UNRELATED) : PASS;
	/* a container speaks of what was sent to itself, not to its neighbours */
	if (bridge && !addr_equal(&p->h.tuple.src, &q.h.tuple.dst))
		return drop(p, DROP_ICMP_UNRELATED);
	if (rewrite_quote(p, &q, &f.to) ||
	    rewrite_addrs(p, bridge ? &f.to.src : &p->h.tuple.src, &p->h.tuple.dst))
		return drop(p, DROP_REWRITE);
	return PASS;
}

static __always_inline enum verdict uplink_egress(struct packet *p, __u32 l3)
{
	__u32 from = p->skb->ingress_ifindex, bridge;
	enum parsed parsed = parse(p, l3);
	struct found f;

	if (parsed == PARSED_NOT_IP || is_vlan(p->skb))
		return PASS;
	if (parsed == PARSED_V4_MAPPED)
		return drop(p, DROP_V4_MAPPED);
	if (parsed == PARSED_MALFORMED)
		return is_bridge(from) ? drop(p, DROP_MALFORMED) : PASS;
	bridge = bridge_of(&p->h.tuple.src);
	if (is_local_scope(&p->h)) /* multicast that the host routes, with a container's address */
		return bridge && from ? drop(p, DROP_MULTICAST) : PASS;
	if (bridge && from && from != bridge)
		return drop(p, DROP_SPOOFED_ADDRESS);
	if (p->h.kind == KIND_ICMP_ERROR && p->h.fragment == FRAGMENT_NONE)
		return error_outward(p, bridge);
	if (!bridge)
		return PASS; /* the host's own, or forwarded for somebody else */

	/* from here on a container's address is in the packet: it must not leave */
	if (p->h.fragment != FRAGMENT_NONE)
		return drop(p, DROP_FRAGMENT);
	if (p->h.kind != KIND_FLOW)
		return drop(p, DROP_PROTOCOL);
	if (half_find(&p->h.tuple, &f, false) && half_accepts(f.half, CLASS_BRIDGE, from) &&
	    !opens_anew(p, &f))
		return translate(p, &f);
	if (p->h.tcp & TCP_RST)
		return drop(p, DROP_TCP_UNEXPECTED);
	if (is_echo(&p->h) && !is_echo_request(&p->h))
		return drop(p, DROP_ICMP_UNRELATED);
	return translate_first(p, open_outward(p), &f);
}

static __always_inline bool is_published(struct packet *p, struct dnat_match *m)
{
	const struct tuple *t = &p->h.tuple;
	__u32 ifindex;

	if ((t->proto != IPPROTO_TCP && t->proto != IPPROTO_UDP) ||
	    !dnat_find(t, p->skb->ifindex, m))
		return false;
	return !m->any || route_of(p, &ifindex) == ROUTE_LOCAL;
}

/* DNAT: the world comes to a published port. PASS when it is none. */
static __noinline enum verdict open_inward(struct packet *p)
{
	struct plan *plan = plan_get();
	struct tuple *t = &p->h.tuple;
	const struct dnat_rule *rule;
	__u32 bridge;

	if (!plan)
		return drop(p, DROP_NO_MEMORY);
	if (!is_published(p, &plan->published))
		return PASS;
	if (p->h.fragment != FRAGMENT_NONE)
		return drop(p, DROP_FRAGMENT);
	if (p->h.tcp & TCP_RST)
		return PASS;
	rule = &plan->published.rule;
	bridge = bridge_of(&rule->to);
	if (!bridge)
		return PASS; /* the bridge of its target is gone */
	if (bridge_of(&t->src))
		return drop(p, DROP_SPOOFED_ADDRESS);
	/* what docker-proxy carries already stays with it, and so do answers to the host's own */
	if ((p->h.tcp & (TCP_SYN | TCP_ACK)) != TCP_SYN &&
	    host_has_socket(p->skb, t, SOCKET_CONNECTED))
		return PASS;
	if (rule->flags & DNAT_ALLOW_LIST && !rule_lists(p->config, rule->id, &t->src))
		return drop(p, DROP_NOT_ALLOWED);
	plan_begin(p, plan);
	plan->original_class = CLASS_UPLINK;
	plan->original_ifindex = 0;
	plan->reply_class = CLASS_BRIDGE;
	plan->reply_ifindex = bridge;
	plan->translation = TRANSLATION_DNAT;
	plan->rule = rule->id;
	plan->generation = rule->generation;
	plan->entry.claim.src = rule->to;
	plan->entry.claim.sport = dnat_port(rule, t->dport);
	/* two connections of one client port to two published ports of one server would have
	 * the same reply tuple: then the client's port changes, as nf_nat does it
	 */
	plan_ports(plan);
	return GO_ON;
}

/* --allow-direct: a container spoken to by its own address has a flow too, or its answers
 * would be taken for something new and be given another source.
 */
static __noinline enum verdict open_direct(struct packet *p)
{
	struct plan *plan = plan_get();
	__u32 bridge = bridge_of(&p->h.tuple.dst), generation = generation_of(0);

	/* the generation first: when the flag goes now, this flow goes with it */
	if (!(*(volatile enum config_flag *)&p->config->flags & CONFIG_ALLOW_DIRECT))
		return PASS;
	if (!bridge || p->h.fragment != FRAGMENT_NONE)
		return PASS;
	if (!plan)
		return drop(p, DROP_NO_MEMORY);
	if (bridge_of(&p->h.tuple.src))
		return drop(p, DROP_SPOOFED_ADDRESS);
	plan_begin(p, plan);
	plan->original_class = CLASS_UPLINK;
	plan->original_ifindex = 0;
	plan->reply_class = CLASS_BRIDGE;
	plan->reply_ifindex = bridge;
	plan->generation = generation;
	return GO_ON;
}

static __noinline enum verdict error_inward(struct packet *p)
{
	struct quote q = {};
	struct found f;

	if (!quote_find(p, &q, &f) || f.half->class != CLASS_UPLINK ||
	    !addr_equal(&p->h.tuple.dst, &q.h.tuple.src))
		return PASS; /* the host's own, perhaps; to_bridge drops it otherwise */
	if (rewrite_quote(p, &q, &f.to) || rewrite_addrs(p, &p->h.tuple.src, &f.to.dst))
		return drop(p, DROP_REWRITE);
	return PASS;
}

static __always_inline enum verdict uplink_ingress(struct packet *p, __u32 l3)
{
	struct found f;
	enum verdict v;

	if (p->skb->pkt_type != PACKET_HOST || is_vlan(p->skb))
		return PASS;
	switch (parse(p, l3)) {
	case PARSED_V4_MAPPED:
		return drop(p, DROP_V4_MAPPED);
	case PARSED:
		break;
	default:
		return PASS; /* the kernel drops what is malformed */
	}
	if (is_local_scope(&p->h))
		return PASS;
	if (is_loopback(&p->h))
		return drop(p, DROP_LOOPBACK);
	if (p->h.kind == KIND_ICMP_ERROR && p->h.fragment == FRAGMENT_NONE)
		return error_inward(p);
	if (p->h.kind != KIND_FLOW)
		return PASS;

	if (half_find(&p->h.tuple, &f, false) &&
	    half_accepts(f.half, CLASS_UPLINK, p->skb->ifindex)) {
		if (p->h.fragment != FRAGMENT_NONE)
			return drop(p, DROP_FRAGMENT);
		if (!opens_anew(p, &f))
			return translate(p, &f);
	}
	v = open_inward(p);
	if (v == PASS)
		v = open_direct(p);
	return translate_first(p, v, &f);
}
