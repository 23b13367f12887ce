/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* open.h - what flow a first packet begins, by the rules. Each function fills in a plan (GO_ON), or says
 * what becomes of the packet without one.
 */
#pragma once

#include "backend.h"
#include "mapping.h"
#include "packet.h"
#include "plan.h"
#include "recent.h"
#include "route.h"
#include "rule.h"

/* The outside address that a rule without masquerade gives: an inside address always gets the same one
 * (RFC 4787 REQ-2) and another one only when that has no port left (port.h).
 */
static __always_inline void fixed_address(const struct packet *p, const struct snat_rule *rule,
					  struct plan *plan)
{
	const struct tuple *t = &p->h.tuple;
	__u64 words[2] = {
		(__u64)t->src.word[0] << 32 | t->src.word[1],
		(__u64)t->src.word[2] << 32 | t->src.word[3],
	};

	plan->entry.claim.dst = rule->to;
	if (rule->to_count <= 1)
		return;
	plan->pool = rule->to_count;
	plan->pool_first = rule->to.word[3];
	plan->nth = keyed_hash(p->config->secret, words, 2) % rule->to_count;
	pool_address(plan, plan->nth);
}

static __always_inline bool has_address(const struct snat_rule *rule, const struct addr *addr)
{
	return addr->word[0] == rule->to.word[0] && addr->word[1] == rule->to.word[1] &&
	       addr->word[2] == rule->to.word[2] &&
	       bpf_ntohl(addr->word[3]) - bpf_ntohl(rule->to.word[3]) < rule->to_count;
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
	plan->original_ifindex = p->bridge;
	plan->reply_class = CLASS_UPLINK;
	plan->reply_ifindex = 0;
	plan->leaves = uplink_index(p->uplink);
	rule = snat_find(p->config, &t->src, p->uplink);
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
		plan->leaves |= UPLINK_MASQUERADE;
		if (!masquerade_address(p, &plan->entry.claim.dst))
			return drop(p, DROP_NO_ADDRESS);
	} else {
		fixed_address(p, rule, plan);
	}
	if (rule->port_first && has_ports(t->proto)) {
		plan->first = rule->port_first;
		plan->last = rule->port_last;
	} else {
		plan_ports(plan);
	}
	return GO_ON;
}

/* Which of several targets plan->published speaks of, for who comes in by a packet. */
__noinline bool published_choose(const struct addr *client)
{
	struct plan *plan = plan_get();

	return plan && client && backend_choose(&plan->published, client, bpf_get_prandom_u32());
}

static __always_inline bool is_published(struct packet *p, struct dnat_match *m)
{
	const struct tuple *t = &p->h.tuple;
	__u32 ifindex;

	if (!has_ports(t->proto) || !dnat_find(t, p->uplink, m))
		return false;
	return !m->any || route_of(p, &ifindex) == ROUTE_LOCAL;
}

/* To a published port, which plan->published has found: what holds for who comes from the world, and for
 * a container (hairpin.h).
 */
static __always_inline enum verdict open_published(struct packet *p, struct plan *plan,
						   bool hairpin)
{
	const struct dnat_rule *rule = &plan->published.rule;
	const struct tuple *t = &p->h.tuple;
	/* an unconnected UDP socket of the host's may be what a container answers */
	enum socket_kind owner = hairpin && t->proto == IPPROTO_UDP ? SOCKET_ANY : SOCKET_CONNECTED;
	__u32 bridge;

	if (is_stray(&p->h))
		return PASS;
	if (!hairpin && bridge_of(&t->src))
		return drop(p, DROP_SPOOFED_ADDRESS);
	/* what docker-proxy carries already stays with it, and so do answers to the host's own */
	if ((p->h.tcp & (TCP_SYN | TCP_ACK)) != TCP_SYN && host_has_socket(p->skb, t, owner))
		return PASS;
	if (rule->flags & DNAT_ALLOW_LIST && !rule_lists(p->config, rule->id, &t->src))
		return drop(p, DROP_NOT_ALLOWED);
	if (rule->flags & DNAT_BACKENDS && !published_choose(&t->src))
		return PASS;
	bridge = bridge_of(&rule->to);
	if (!bridge)
		return PASS; /* the bridge of its target is gone */
	plan_begin(p, plan);
	plan->reply_class = CLASS_BRIDGE;
	plan->reply_ifindex = bridge;
	plan->rule = plan->published.maker;
	plan->generation = rule->generation;
	plan->entry.claim.src = rule->to;
	plan->entry.claim.sport = dnat_port(rule, t->dport);
	/* two connections of one client port to two published ports of one server would have
	 * the same reply tuple: then the client's port changes, as nf_nat does it
	 */
	plan_ports(plan);
	return GO_ON;
}

/* An outside port that an endpoint has is published to it while it has it: for its neighbours (RFC 4787 REQ-9)
 * and, where filtering is endpoint-independent, for the world (REQ-8). What comes that way belongs to the
 * SNAT rule of the endpoint. plan->published becomes a rule that says so.
 */
__noinline bool is_mapped(const struct tuple *t, __u32 uplink)
{
	struct plan *plan = plan_get();
	const struct snat_rule *snat;
	const struct config *c;
	struct dnat_rule *rule;
	struct addr dst;
	__be16 port = 0;
	__u32 zero = 0;

	c = bpf_map_lookup_elem(&config, &zero);
	if (!plan || !c || !t)
		return false;
	rule = &plan->published.rule;
	if (t->proto != IPPROTO_UDP || !mapping_find(t, &rule->to, &port))
		return false;
	if (port == t->sport && addr_equal(&rule->to, &t->src))
		return false; /* to itself */
	snat = snat_find(c, &rule->to, uplink);
	if (!snat || (snat->flags & SNAT_EXCEPT && rule_lists(c, snat->id, &t->src)))
		return false;
	/* not what an address of yesterday, or of another rule, had */
	if (snat->flags & SNAT_MASQUERADE) {
		dst = t->dst; /* what a function is handed is no key before 6.2 */
		if (!bpf_map_lookup_elem(&host_addresses, &dst))
			return false;
	} else if (!has_address(snat, &t->dst)) {
		return false;
	}
	plan->published.any = false;
	rule->port_first = rule->port_last = bpf_ntohs(t->dport);
	rule->to_first = rule->to_last = bpf_ntohs(port);
	rule->id = plan->published.maker = snat->id;
	rule->generation = snat->generation;
	rule->flags = 0;
	return true;
}

/* DNAT: the world comes to a published port, or to a mapping. PASS when it is none. */
static __noinline enum verdict open_inward(struct packet *p)
{
	struct plan *plan = plan_get();
	bool mapped = false;
	enum verdict v;

	if (!plan)
		return drop(p, DROP_NO_MEMORY);
	if (!is_published(p, &plan->published)) {
		mapped = p->config->flags & CONFIG_ANY_SENDER && is_mapped(&p->h.tuple, p->uplink);
		/* a socket of the host's own that took the port later is what the world speaks to */
		if (!mapped || host_has_socket(p->skb, &p->h.tuple, SOCKET_ANY))
			return PASS;
	}
	v = open_published(p, plan, false);
	if (v != GO_ON)
		return v;
	plan->target = mapped;
	plan->original_class = CLASS_UPLINK;
	plan->original_ifindex = 0;
	plan->translation = TRANSLATION_DNAT;
	return GO_ON;
}

/* --allow-direct: a container spoken to by its own address has a flow too, or its answers
 * would be taken for something new and be given another source.
 */
static __noinline enum verdict open_direct(struct packet *p)
{
	struct plan *plan = plan_get();
	__u32 bridge, generation = generation_of(0);

	/* the generation first: when the flag goes now, this flow goes with it */
	if (!(*(volatile enum config_flag *)&p->config->flags & CONFIG_ALLOW_DIRECT))
		return PASS;
	bridge = bridge_of(&p->h.tuple.dst);
	if (!bridge)
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
