/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* port.h - choosing the port of the reply tuple, and claiming the tuple.
 *
 *  1. an endpoint that has a mapping keeps its port;
 *  2. else the original's own source port, where it is allowed and free;
 *  3. else ports from a start that a keyed hash gives, PORT_TRIES at most: a search of the
 *     whole range in softirq would hold the CPU (nf_nat_l4proto_unique_tuple says the same);
 *  4. UDP only: when no port is free for one endpoint alone, one shared by destination
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
	CLAIM_OTHERS, /* another CPU gave the endpoint a mapping meanwhile */
	CLAIM_FULL,
	CLAIM_NO_MEMORY,
};

struct probe {
	struct __sk_buff *skb;
	struct plan *plan;
	__u32 start;
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

/* A claim that the flow which we take over still holds is replaced, not inserted. */
__noinline long claim_insert(void)
{
	struct plan *plan = plan_get();
	struct tuple *claim;

	if (!plan)
		return -1;
	claim = &plan->entry.claim;

	plan->half.guard = new_guard(claim, &plan->original, plan->entry.id);
	if (plan->takeover && tuple_equal(claim, &plan->old_claim)) {
		long err = bpf_map_update_elem(&flows, claim, &plan->half, BPF_EXIST);

		if (!err) {
			if (plan->old_mapped)
				mapping_drop(&plan->original, &plan->old_claim);
			return 0;
		}
	}
	return bpf_map_update_elem(&flows, claim, &plan->half, BPF_NOEXIST);
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
	if (claim->proto != IPPROTO_TCP && claim->proto != IPPROTO_UDP)
		return false;
	if (dnat_find(claim, skb->ifindex, m) &&
	    !(addr_equal(&m->rule.to, &plan->original.src) &&
	      dnat_port(&m->rule, claim->dport) == plan->original.sport))
		return true;
	return host_has_socket(skb, claim, false);
}

static long try_port(__u32 i, void *context)
{
	struct probe *probe = context;
	struct plan *plan = probe->plan;
	struct tuple *claim = &plan->entry.claim;
	__u16 wanted = bpf_ntohs(plan->original.sport);
	__u32 port;
	long err;

	if (!i) {
		if (wanted < plan->first || wanted > plan->last)
			return 0;
		port = wanted;
	} else {
		if (i > probe->size)
			return 1;
		port = plan->first + (probe->start + i - 1) % probe->size;
	}
	probe->tries = i;
	claim->dport = bpf_htons(port);
	if (plan->outside && port_is_used(probe->skb))
		return 0;
	if (plan->map) {
		switch (mapping_make(&plan->original, claim)) {
		case MAPPED:
			break;
		case MAPPED_TAKEN:
			return 0;
		case MAPPED_OTHERS:
			probe->result = CLAIM_OTHERS;
			return 1;
		case MAPPED_FULL:
			probe->result = CLAIM_FULL;
			return 1;
		}
	}
	err = claim_insert();
	if (!err) {
		probe->result = CLAIM_DONE;
		return 1;
	}
	if (plan->map)
		mapping_drop(&plan->original, claim);
	probe->result = claim_error(err);
	return probe->result != CLAIM_NONE;
}

static __always_inline enum claimed claim_mapped(struct plan *plan)
{
	struct tuple *claim = &plan->entry.claim;
	__u16 port;
	long err;

	if (!mapping_hold(&plan->original, claim))
		return CLAIM_NONE;
	port = bpf_ntohs(claim->dport);
	if (port >= plan->first && port <= plan->last) {
		err = claim_insert();
		if (!err)
			return CLAIM_DONE;
	} else {
		/* the rule's range has changed since */
		err = -17;
	}
	mapping_drop(&plan->original, &plan->entry.claim);
	plan->map = false;
	return claim_error(err);
}

static __always_inline enum claimed claim_probe(struct __sk_buff *skb, struct plan *plan)
{
	const struct config *c;
	struct probe probe = {
		.skb = skb,
		.plan = plan,
		.size = plan->last - plan->first + 1,
		.result = CLAIM_NONE,
	};
	__u32 tries, zero = 0;
	__u64 *n;

	c = bpf_map_lookup_elem(&config, &zero);
	if (!c || !probe.size)
		return CLAIM_NONE;
	probe.start = keyed_hash(c->secret, (const __u64 *)&plan->original, 5) % probe.size;
	bpf_loop(PORT_TRIES + 1, try_port, &probe, 0);
	if (probe.result == CLAIM_DONE) {
		tries = probe.tries;
		n = bpf_map_lookup_elem(&port_tries, &tries);
		if (n)
			*n += 1;
	}
	return probe.result;
}

static __always_inline void half_shared_by_destination(struct plan *plan)
{
	plan->map = false;
	plan->half.flags = 0;
}

/* Finds a port and claims the reply tuple, with plan->half as the reply half. */
static __always_inline enum claimed claim(struct __sk_buff *skb, struct plan *plan)
{
	enum claimed result;

	if (plan->map) {
		result = claim_mapped(plan);
		if (result != CLAIM_NONE)
			return result;
	}
	if (plan->map) {
		result = claim_probe(skb, plan);
		if (result == CLAIM_OTHERS) {
			result = claim_mapped(plan);
			if (result == CLAIM_DONE)
				return result;
		} else if (result != CLAIM_NONE) {
			return result;
		}
	}
	if (plan->half.flags & HALF_MAPPING) {
		half_shared_by_destination(plan);
		result = claim_probe(skb, plan);
		if (result == CLAIM_DONE)
			count(PORTS_SHARED);
		return result;
	}
	return claim_probe(skb, plan);
}
