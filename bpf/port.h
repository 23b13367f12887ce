/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* port.h - choosing the port of the reply tuple, and claiming the tuple.
 *
 *  1. an endpoint that has a mapping at its outside address keeps its port;
 *  2. else the original's own source port, where it is allowed and free;
 *  3. else ports that a keyed hash gives, PORT_TRIES at most: a search of the whole range in
 *     softirq would hold the CPU (nf_nat_l4proto_unique_tuple says the same). Spread over the
 *     range, since hosts take their ports in runs;
 *  4. where the rule has several addresses and the endpoint's own one no port that was found, the
 *     last tries are for the others, the wanted port of each first;
 *  5. UDP only: when no port is free for one endpoint alone, one shared by destination
 *     (RFC 7857 section 3), counted.
 *
 * Inserting the reply half with BPF_NOEXIST is the claim: there is no other reservation.
 */
#pragma once

#include "mapping.h"
#include "plan.h"
#include "route.h"
#include "rule.h"

enum claimed {
	CLAIM_NONE, /* no try succeeded so far */
	CLAIM_DONE,
	CLAIM_SAME,   /* another CPU has claimed it for this very flow */
	CLAIM_OTHERS, /* the endpoint has a mapping with another port than its own */
	CLAIM_FULL,
	CLAIM_NO_MEMORY,
};

struct probe {
	struct __sk_buff *skb;
	struct plan *plan;
	__u64 hash;
	__u32 size;
	enum claimed result;
	__u32 tries;
};

static __always_inline enum claimed claim_error(long err)
{
	if (err == -7 /* E2BIG */)
		return CLAIM_FULL;
	if (err == -12 /* ENOMEM */)
		return CLAIM_NO_MEMORY;
	return CLAIM_NONE;
}

/* Two packets that begin one flow on two CPUs: who comes second finds its claim taken by the
 * first, and goes on with the first one's flow.
 */
static __always_inline bool claimed_for_us(struct plan *plan)
{
	struct half *reply = bpf_map_lookup_elem(&flows, &plan->entry.claim);

	if (!reply || reply->standing.life != LIFE_LIVE ||
	    !tuple_equal(&reply->other, &plan->original) ||
	    !rule_current(reply->rule, reply->generation))
		return false;
	plan->entry.id = reply->standing.id;
	return true;
}

/* A claim that the flow which we take over still holds is replaced, and keeps the flow's id:
 * its entry in the expiry queue stays good.
 */
__noinline enum claimed claim_insert(void)
{
	struct plan *plan = plan_get();
	struct tuple *claim;
	long err;

	if (!plan)
		return CLAIM_NO_MEMORY;
	claim = &plan->entry.claim;
	if (plan->takeover && tuple_equal(claim, &plan->old_claim)) {
		plan->half.standing.id = plan->old_id;
		plan->half.guard = new_guard(claim, &plan->original, plan->old_id);
		err = bpf_map_update_elem(&flows, claim, &plan->half, BPF_EXIST);
		if (err)
			return claim_error(err);
		plan->entry.id = plan->old_id;
		plan->queued = true;
		mappings_drop(plan->old_held, &plan->original, claim);
		return CLAIM_DONE;
	}
	plan->half.standing.id = plan->entry.id;
	plan->half.guard = new_guard(claim, &plan->original, plan->entry.id);
	err = bpf_map_update_elem(&flows, claim, &plan->half, BPF_NOEXIST);
	if (!err)
		return CLAIM_DONE;
	if (err == -17 /* EEXIST */ && !plan->takeover && claimed_for_us(plan))
		return CLAIM_SAME;
	return claim_error(err);
}

/* A port that the host's own traffic or a published port would be cut off from. The published
 * endpoint itself may use its published port for what it sends.
 */
__noinline bool port_is_used(struct __sk_buff *skb)
{
	struct plan *plan = plan_get();
	const struct tuple *claim;
	struct dnat_match *m;

	if (!plan)
		return true;
	claim = &plan->entry.claim;
	m = &plan->published;
	if (!has_ports(claim->proto))
		return false;
	if (dnat_find(claim, plan->uplink, m) &&
	    !(!(m->rule.flags & DNAT_BACKENDS) && addr_equal(&m->rule.to, &plan->original.src) &&
	      dnat_port(&m->rule, claim->dport) == plan->original.sport))
		return true;
	return host_has_socket(skb, claim, SOCKET_NOT_LISTENING);
}

/* Where the search begins. Most flows get the first port that is tried, and need none. */
__noinline __u64 probe_hash(void)
{
	struct plan *plan = plan_get();
	const struct config *c;
	__u32 zero = 0;

	c = bpf_map_lookup_elem(&config, &zero);
	if (!c || !plan)
		return 0;
	return keyed_hash(c->secret, (const __u64 *)&plan->original, 5);
}

/* Tries of the endpoint's own address, where there are others. */
#define POOL_TRIES (PORT_TRIES - 16)

/* The port of the nth try, counted from 1, of what the hash gives. A small range is gone through, so that its
 * last free port is found.
 */
static __always_inline __u32 probe_port(const struct probe *probe, __u32 nth)
{
	if (probe->size <= PORT_TRIES)
		return probe->plan->first + (probe->hash + nth) % probe->size;
	return probe->plan->first + mix(probe->hash, nth) % probe->size;
}

static long try_port(__u32 i, void *context)
{
	struct probe *probe = context;
	struct plan *plan = probe->plan;
	struct tuple *claim = &plan->entry.claim;
	__u16 wanted = bpf_ntohs(plan->original.sport);
	enum mapped mapped;
	__u32 port, own = PORT_TRIES, others;

	if (plan->pool)
		own = POOL_TRIES;
	if (probe->size < own)
		own = probe->size;
	if (!i) {
		if (plan->pool)
			pool_address(plan, plan->nth);
		if (wanted < plan->first || wanted > plan->last)
			return 0;
		port = wanted;
	} else {
		if (i > own && !plan->pool)
			return 1;
		if (i == 1) {
			if (plan->map && mapping_moved(&plan->original, &claim->dst)) {
				probe->result = CLAIM_OTHERS;
				return 1;
			}
			probe->hash = probe_hash();
		}
		if (i <= own) {
			port = probe_port(probe, i);
		} else {
			others = plan->pool - 1;
			pool_address(plan, plan->nth + 1 + (i - own - 1) % others);
			port = i - own > others ? probe_port(probe, (i - own - 1) / others)
						: wanted;
			if (port < plan->first || port > plan->last)
				return 0;
		}
	}
	probe->tries = i;
	claim->dport = bpf_htons(port);
	if (plan->outside && port_is_used(probe->skb))
		return 0;
	if (plan->map) {
		mapped = mapping_make(&plan->original, claim);
		if (mapped == MAPPED_MOVED) {
			mapped = mapping_enter(&plan->original, claim);
			if (mapped != MAPPED)
				mapping_drop(&plan->original, claim);
		}
		if (mapped == MAPPED_TAKEN)
			return 0;
		if (mapped == MAPPED_OTHERS)
			probe->result = CLAIM_OTHERS;
		if (mapped != MAPPED) /* for want of memory, without one */
			return 1;
	}
	probe->result = claim_insert();
	if (plan->map && probe->result != CLAIM_DONE)
		mapping_drop(&plan->original, claim);
	return probe->result != CLAIM_NONE;
}

/* By the mapping that the endpoint has with the port claim->dport. */
static __always_inline enum claimed claim_mapped(struct plan *plan)
{
	struct tuple *claim = &plan->entry.claim;
	enum claimed result = CLAIM_NONE;
	__u16 port = bpf_ntohs(claim->dport);

	/* a rule's range may have changed since */
	if (port < plan->first || port > plan->last || !mapping_hold(&plan->original, claim))
		return CLAIM_NONE;
	result = claim_insert();
	if (result != CLAIM_DONE)
		mapping_drop(&plan->original, claim);
	return result;
}

static __always_inline enum claimed claim_probe(struct __sk_buff *skb, struct plan *plan)
{
	struct probe probe = {
		.skb = skb,
		.plan = plan,
		.size = plan->last - plan->first + 1,
		.result = CLAIM_NONE,
	};
	__u32 tries;
	__u64 *n;

	if (!probe.size)
		return CLAIM_NONE;
	bpf_loop(PORT_TRIES + 1, try_port, &probe, 0);
	if (probe.result == CLAIM_DONE) {
		tries = probe.tries;
		n = bpf_map_lookup_elem(&port_tries, &tries);
		if (n)
			*n += 1;
	}
	return probe.result;
}

/* Finds a port and claims the reply tuple, with plan->half as the reply half. */
static __always_inline enum claimed claim(struct __sk_buff *skb, struct plan *plan)
{
	enum claimed result = CLAIM_NONE;
	bool share = plan->map;

	if (plan->map) {
		plan->entry.claim.dport = plan->original.sport;
		result = claim_mapped(plan);
		if (result == CLAIM_NONE)
			result = claim_probe(skb, plan);
		if (result == CLAIM_OTHERS) {
			plan->entry.claim.dport =
				mapping_moved(&plan->original, &plan->entry.claim.dst);
			result = claim_mapped(plan);
		}
	}
	if (result != CLAIM_NONE)
		return result;
	plan->map = false;
	plan->half.standing.held &= ~HELD_SOURCE;
	result = claim_probe(skb, plan);
	if (share && result == CLAIM_DONE)
		count(PORTS_SHARED);
	return result;
}
