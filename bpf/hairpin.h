/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* hairpin.h - a container speaks to a published port by an address of the host, be it its own port or that
 * of a neighbour, on its bridge or another managed one.
 *
 * Both addresses change, and not in one place: before routing only the destination may (a source of
 * the host's own would be a martian), after routing the source. So from_bridge does the one, to_bridge
 * the other, and the tuple that the packet has in between is a key of its own, a transit half:
 *
 *	original	A:sp -> H:3005	(from_bridge)	A:sp -> C:80	(to_bridge)	X:np -> C:80
 *	reply		C:80 -> X:np			C:80 -> A:sp			H:3005 -> A:sp
 *
 * X is H, the address that A spoke to, or what a rule maps A to: outside addresses, as RFC 4787 REQ-9a
 * has it, where H is one. The host sends the packet out by the bridge itself, so no port
 * needs hairpin mode, and bridge filters see nothing special.
 *
 * With bridge-nf-call-iptables netfilter has seen the packet before from_bridge, as it was then, and does not look
 * at it again in the host's stack (ip_sabotage_in). So what was turned enters the bridge's device once more, which
 * makes the stack forget (skb_scrub_packet): conntrack sees transit tuples alone, both directions of one
 * connection.
 *
 * An outside port that an endpoint has, X:np, is a published port in this, too (RFC 4787 REQ-9): for containers
 * on its bridge always, since they can speak to it directly; for those of other bridges where these are
 * not isolated, or where any sender may use it.
 *
 * Two flows with one transit tuple cannot be told apart at to_bridge: from one port of A to two published
 * ports that lead to one port of C. The second is refused.
 */
#pragma once

#include "create.h"
#include "flow.h"
#include "icmp.h"
#include "open.h"

static __always_inline bool is_hairpin(const struct half *half)
{
	return half->translation == TRANSLATION_HAIRPIN;
}

/* At from_bridge: a packet of a hairpin flow. Its source stays until to_bridge. GO_ON: it begins another
 * flow.
 */
static __noinline enum verdict hairpin_turn(struct packet *p)
{
	struct found f;
	enum verdict v;

	if (!half_find(&p->h.tuple, &f, false) || !half_accepts(f.half, CLASS_BRIDGE, p->bridge))
		return drop(p, DROP_ENDING);
	if (f.half->role == ROLE_TRANSIT)
		return PASS; /* turned already */
	if (opens_anew(p, &f))
		return GO_ON;
	if (!bridge_of(&f.to.dst))
		return drop(p, DROP_ENDING); /* the server's bridge is gone: who knows where to */
	half_see(p, f.half);
	f.to.src = p->h.tuple.src;
	f.to.sport = p->h.tuple.sport;
	v = rewrite(p, &f.to);
	return v == PASS ? AGAIN : v;
}

static __always_inline bool is_neighbour(const struct packet *p, const struct addr *inside)
{
	return p->config->flags & (CONFIG_NO_ISOLATION | CONFIG_ANY_SENDER) ||
	       bridge_of(inside) == p->bridge;
}

/* At from_bridge: to an address of the host, of no flow. PASS where it is no published port. */
static __noinline enum verdict open_hairpin(struct packet *p)
{
	struct plan *plan = plan_get();
	struct tuple *t = &p->h.tuple;
	const struct snat_rule *snat;
	bool mapped;
	enum verdict v;

	if (!plan)
		return drop(p, DROP_NO_MEMORY);
	if (p->h.kind != KIND_FLOW || !has_ports(t->proto))
		return PASS;
	mapped = !dnat_find(t, p->bridge, &plan->published);
	if (mapped && !(is_mapped(t, p->uplink) && is_neighbour(p, &plan->published.rule.to)))
		return PASS;
	/* no route to it looks like an address of the host's own: see route_of() */
	if (plan->published.any && !bpf_map_lookup_elem(&host_addresses, &t->dst))
		return PASS;
	v = open_published(p, plan, true);
	if (v != GO_ON)
		return v;
	plan->target = mapped;
	plan->original_class = CLASS_BRIDGE;
	plan->original_ifindex = p->bridge;
	plan->translation = TRANSLATION_HAIRPIN;
	plan->outside = true;
	plan->uplink = p->bridge;
	plan->map = t->proto == IPPROTO_UDP;
	plan->entry.claim.dst = t->dst;
	snat = snat_find(p->config, &t->src, 0);
	if (snat && !(snat->flags & SNAT_MASQUERADE))
		fixed_address(p, snat, plan);
	return GO_ON;
}

/* At from_bridge: what a container sends to the host itself, of no flow so far. GO_ON: of one now. */
static __noinline enum verdict hairpin_create(struct packet *p)
{
	struct plan *plan = plan_get();
	enum verdict v = open_hairpin(p);

	if (v != GO_ON || !plan)
		return v;
	return flow_create(p->skb) == CREATED_NOT ? drop(p, plan->reason) : GO_ON;
}

/* ICMP errors about packets of hairpin flows (RFC 5508 REQ-7, 7a) change in the same two places: at
 * from_bridge the destination, at to_bridge the source. What they quote is the transit tuple in between, so that
 * they belong to the flow for conntrack too, and like what the host itself says of such a packet.
 *
 * GO_ON: the error is about none.
 */
static __noinline enum verdict hairpin_error_turn(struct packet *p)
{
	struct plan *plan = plan_get();
	struct quote *q;
	struct found f;

	if (!plan)
		return drop(p, DROP_NO_MEMORY);
	q = &plan->quote;
	if (!quote_find(p, q, &f) || !is_hairpin(f.half) ||
	    !half_accepts(f.half, CLASS_BRIDGE, p->bridge) || !bridge_of(&f.to.dst))
		return GO_ON;
	/* as everywhere, a container speaks of what was sent to itself, and to who sent it */
	if (!addr_equal(&p->h.tuple.src, &q->h.tuple.dst) ||
	    !addr_equal(&p->h.tuple.dst, &q->h.tuple.src))
		return drop(p, DROP_ICMP_UNRELATED);
	if (f.half->role == ROLE_TRANSIT)
		return PASS; /* turned already */
	f.to.src = q->h.tuple.dst;
	f.to.sport = q->h.tuple.dport;
	if (rewrite_quote(p, q, &f.to) || rewrite_addrs(p, &p->h.tuple.src, &f.to.dst))
		return drop(p, DROP_REWRITE);
	return AGAIN;
}

/* At to_bridge, from a container or from the host itself: the quote becomes what the container that gets the error
 * had sent. GO_ON: it is about no hairpin flow.
 */
static __noinline enum verdict hairpin_error_leave(struct packet *p)
{
	struct plan *plan = plan_get();
	const struct addr *from;
	struct half *back;
	struct tuple *key;
	struct quote *q;
	struct found f;

	if (!plan)
		return drop(p, DROP_NO_MEMORY);
	q = &plan->quote;
	key = &plan->transit;
	if (parse_quoted(p, &q->h) != PARSED || q->h.kind != KIND_FLOW ||
	    !addr_equal(&p->h.tuple.dst, &q->h.tuple.src) || !half_find(&q->h.tuple, &f, true) ||
	    f.half->role != ROLE_TRANSIT || !half_accepts(f.half, CLASS_BRIDGE, p->skb->ifindex))
		return GO_ON;
	tuple_invert(key, &f.to);
	back = bpf_map_lookup_elem(&flows, key);
	if (!back || back->standing.id != f.id)
		return GO_ON;
	tuple_invert(key, &back->other);
	/* who got the packet is known by another address to who sent it */
	from = addr_equal(&p->h.tuple.src, &q->h.tuple.dst) ? &key->src : &p->h.tuple.src;
	if (rewrite_quote(p, q, key) || rewrite_addrs(p, from, &p->h.tuple.dst))
		return drop(p, DROP_REWRITE);
	return PASS;
}

/* At to_bridge: the second half of the way. GO_ON when the packet is of no hairpin flow. */
static __noinline enum verdict hairpin_leave(struct packet *p)
{
	struct found f;

	if (p->h.kind != KIND_FLOW || !half_find(&p->h.tuple, &f, true) ||
	    f.half->role != ROLE_TRANSIT ||
	    !half_accepts(f.half, CLASS_BRIDGE, p->skb->ingress_ifindex))
		return GO_ON;
	return rewrite(p, &f.to);
}

/* At to_bridge: by which the host tells a container that the server is its neighbour (ip_rt_send_redirect,
 * ndisc_send_redirect: the packet leaves where it came in). The container spoke to the host.
 */
static __noinline bool is_hairpin_redirect(struct packet *p, __u32 l3)
{
	struct addr about;
	__be32 about4;
	__u8 type;

	if (p->skb->protocol == bpf_htons(ETH_P_IP)) {
		/* the kernel's own has no options */
		const __u32 icmp = l3 + sizeof(struct iphdr);

		if (bpf_skb_load_bytes(p->skb, icmp, &type, 1) || type != ICMP_REDIRECT ||
		    bpf_skb_load_bytes(p->skb, icmp + 8 + offsetof(struct iphdr, daddr), &about4,
				       sizeof(about4)))
			return false;
		addr_from_ipv4(&about, about4);
	} else {
		const __u32 icmp = l3 + sizeof(struct ipv6hdr);

		if (bpf_skb_load_bytes(p->skb, icmp, &type, 1) || type != ICMPV6_REDIRECT ||
		    bpf_skb_load_bytes(p->skb, icmp + 24, &about, sizeof(about)))
			return false;
	}
	return bridge_of(&about) == p->skb->ifindex;
}

static __always_inline bool is_icmp(struct packet *p, __u32 l3)
{
	const __u8 *data = (void *)(long)p->skb->data;

	if ((void *)data + l3 + sizeof(struct iphdr) > (void *)(long)p->skb->data_end)
		return false;
	if (p->skb->protocol == bpf_htons(ETH_P_IP))
		return data[l3 + offsetof(struct iphdr, protocol)] == IPPROTO_ICMP;
	return p->skb->protocol == bpf_htons(ETH_P_IPV6) &&
	       data[l3 + offsetof(struct ipv6hdr, nexthdr)] == IPPROTO_ICMPV6;
}
