/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* create.h - making a flow from a plan.
 *
 *  1. an ended flow on the same original tuple: own its end, or give up;
 *  2. claim the reply tuple (port.h) with the reply half;
 *  3. queue the claim for the expiry: from now on it will be cleaned up;
 *  4. insert the original half with BPF_NOEXIST. When another CPU was faster, give back the
 *     own claim, which no packet has seen yet, and use the winner's flow: no packet is
 *     lost to a race.
 */
#pragma once

#include "expiry.h"
#include "flow.h"
#include "plan.h"
#include "port.h"

enum created {
	CREATED,
	CREATED_BY_OTHERS, /* look it up */
	CREATED_NOT,	   /* plan->reason says why */
};

/* A half with our tuple that half_find() did not accept: a flow that has ended and was not
 * deleted yet, or one that another CPU made just now. Swapping its life to DEAD makes us the
 * one who may replace it.
 */
static __always_inline enum created own_ended(struct plan *plan)
{
	struct half *half = bpf_map_lookup_elem(&flows, &plan->original);
	struct half *reply;
	__u32 was, id;

	if (!half)
		return CREATED;
	plan->old_claim = half->other;
	id = half->id;
	reply = bpf_map_lookup_elem(&flows, &plan->old_claim);
	if (!reply || reply->id != id || half->id != id || half->role != ROLE_ORIGINAL)
		return CREATED_NOT; /* deleted at this moment */
	was = reply->life;
	if (was > LIFE_ENDING)
		return CREATED_NOT; /* somebody else owns its end */
	if (rule_current(half->rule, half->generation) && !flow_closed(half, reply)) {
		if (half_accepts(half, plan->original_class, plan->original_ifindex))
			return CREATED_BY_OTHERS;
		plan->reason = DROP_SPOOFED_ADDRESS;
		return CREATED_NOT;
	}
	if (__sync_val_compare_and_swap((__u32 *)&reply->life, was, LIFE_DEAD) != was)
		return CREATED_NOT;
	plan->takeover = true;
	plan->old_mapped = reply->flags & HALF_MAPPING;
	count(FLOWS_TAKEN_OVER);
	return CREATED;
}

static __always_inline void fill_half(struct plan *plan)
{
	struct half *half = &plan->half;

	__builtin_memset(half, 0, sizeof(*half));
	half->id = plan->entry.id;
	half->rule = plan->rule;
	half->generation = plan->generation;
	half->seen = plan->now;
	half->routed = plan->now;
	half->translation = plan->translation;
}

static __always_inline void give_back_claim(struct plan *plan)
{
	struct half *reply = bpf_map_lookup_elem(&flows, &plan->entry.claim);

	if (!reply || reply->id != plan->entry.id)
		return;
	bpf_map_delete_elem(&flows, &plan->entry.claim);
	if (plan->map)
		mapping_drop(&plan->original, &plan->entry.claim);
}

__noinline enum created flow_create(struct __sk_buff *skb)
{
	struct plan *plan = plan_get();
	enum created result;
	__u64 update = BPF_NOEXIST;
	long err;

	if (!plan)
		return CREATED_NOT;
	expiry_watch();
	result = own_ended(plan);
	if (result != CREATED)
		return result;

	plan->entry.id = bpf_get_prandom_u32();
	plan->entry.checked = plan->now;
	fill_half(plan);
	plan->half.other = plan->original;
	plan->half.role = ROLE_REPLY;
	plan->half.class = plan->reply_class;
	plan->half.ifindex = plan->reply_ifindex;
	if (plan->map)
		plan->half.flags = HALF_MAPPING;
	switch (claim(skb, plan)) {
	case CLAIM_DONE:
		break;
	case CLAIM_FULL:
		plan->reason = DROP_TABLE_FULL;
		return CREATED_NOT;
	case CLAIM_NO_MEMORY:
		plan->reason = DROP_NO_MEMORY;
		return CREATED_NOT;
	default:
		plan->reason = DROP_NO_PORT;
		return CREATED_NOT;
	}

	if (bpf_map_push_elem(&expiry_queue, &plan->entry, 0)) {
		give_back_claim(plan);
		plan->reason = DROP_TABLE_FULL;
		return CREATED_NOT;
	}

	fill_half(plan);
	plan->half.other = plan->entry.claim;
	plan->half.role = ROLE_ORIGINAL;
	plan->half.class = plan->original_class;
	plan->half.ifindex = plan->original_ifindex;
	plan->half.guard = new_guard(&plan->original, &plan->entry.claim, plan->entry.id);
	if (plan->takeover)
		update = BPF_EXIST;
	err = bpf_map_update_elem(&flows, &plan->original, &plan->half, update);
	if (err) {
		give_back_claim(plan);
		if (err == -17 /* EEXIST */) {
			count(FLOWS_RACED);
			return CREATED_BY_OTHERS;
		}
		plan->reason = claim_error(err) == CLAIM_NO_MEMORY ? DROP_NO_MEMORY
								   : DROP_TABLE_FULL;
		return CREATED_NOT;
	}
	count(FLOWS_CREATED);
	return CREATED;
}
