/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* create.h - making a flow from a plan.
 *
 *  1. an ended flow on the same original tuple: own its end, or give up;
 *  2. claim the reply tuple (port.h) with the reply half;
 *  3. queue the claim for the expiry: from now on it will be cleaned up;
 *  4. of a hairpin flow, insert the transit halves;
 *  5. insert the original half with BPF_NOEXIST.
 * When another CPU makes the same flow at that moment, the slower one finds either the claim
 * taken, and helps to finish the other's flow, or the original half: then it gives back its
 * own claim, which no packet has seen yet. So neither packet is lost, while there is room.
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

/* The tuple is the reply's of a flow that is over: now its other side begins one. If it comes to that,
 * the old reply half, by which the expiry would find the flow, becomes our original one: see end_reversed().
 */
__noinline enum created own_ended_reply(void)
{
	struct plan *plan = plan_get();
	struct half *original, *reply;
	struct standing was;
	struct tuple *key;
	bool hairpin;

	if (!plan)
		return CREATED_NOT;
	reply = bpf_map_lookup_elem(&flows, &plan->original);
	if (!reply || reply->role != ROLE_REPLY)
		return CREATED_NOT;
	was = standing_of(reply);
	hairpin = reply->translation == TRANSLATION_HAIRPIN;
	key = &plan->old_original;
	*key = reply->other;
	original = bpf_map_lookup_elem(&flows, key);
	if (original && original->standing.id != was.id)
		original = NULL;
	if (was.life > LIFE_ENDING)
		return CREATED_NOT; /* somebody else owns its end */
	if (rule_current(reply->rule, reply->generation) &&
	    !(original && flow_closed(original, reply)))
		return CREATED_NOT;
	if (!swap_life(reply, was, LIFE_DEAD))
		return CREATED_NOT;
	if (original)
		bpf_map_delete_elem(&flows, key);
	if (hairpin)
		transits_delete(key, &plan->original, was.id);
	plan->takeover = true;
	plan->reversed = true;
	plan->old_claim = plan->original;
	plan->old_id = was.id;
	plan->old_held = was.held;
	count(FLOWS_TAKEN_OVER);
	return CREATED;
}

/* What the expiry does for other flows that end. */
static __always_inline void end_reversed(struct plan *plan)
{
	mappings_drop(plan->old_held, &plan->old_original, &plan->original);
	count(FLOWS_ENDED);
}

/* A half with our tuple that half_find() did not accept: a flow that has ended and was not
 * deleted yet, or one that another CPU made just now. Swapping its life to DEAD makes us the
 * one who may replace it.
 */
static __always_inline enum created own_ended(struct plan *plan)
{
	struct half *half, *reply;
	struct standing was;

	if (plan->absent)
		return CREATED;
	half = bpf_map_lookup_elem(&flows, &plan->original);
	if (!half)
		return CREATED;
	if (half->role == ROLE_REPLY)
		return own_ended_reply();
	if (half->role != ROLE_ORIGINAL)
		return CREATED_NOT;
	plan->old_claim = half->other;
	plan->old_id = half->standing.id;
	reply = bpf_map_lookup_elem(&flows, &plan->old_claim);
	if (reply)
		was = standing_of(reply);
	if (!reply || was.id != plan->old_id) {
		/* being deleted; or, if it stays, a half that nobody else would ever delete */
		if (plan->now - half->seen < 2 * EXPIRY_PERIOD)
			return CREATED_NOT;
		bpf_map_delete_elem(&flows, &plan->original);
		return CREATED;
	}
	if (was.life > LIFE_ENDING)
		return CREATED_NOT; /* somebody else owns its end */
	if (rule_current(half->rule, half->generation) && !flow_closed(half, reply)) {
		if (half_accepts(half, plan->original_class, plan->original_ifindex))
			return CREATED_BY_OTHERS;
		plan->reason = DROP_SPOOFED_ADDRESS;
		return CREATED_NOT;
	}
	if (!swap_life(reply, was, LIFE_DEAD))
		return CREATED_NOT;
	plan->takeover = true;
	plan->old_held = was.held;
	count(FLOWS_TAKEN_OVER);
	return CREATED;
}

static __always_inline void fill_half(struct plan *plan, enum role role)
{
	struct half *half = &plan->half;
	bool original = role != ROLE_REPLY;

	__builtin_memset(half, 0, sizeof(*half));
	half->other = original ? plan->entry.claim : plan->original;
	half->standing.id = plan->entry.id;
	half->standing.life = original ? LIFE_ORIGINAL : LIFE_LIVE;
	half->standing.held = original ? 0 : plan_holds(plan);
	half->standing.uplink = role == ROLE_ORIGINAL ? plan->leaves : 0;
	half->rule = plan->rule;
	half->generation = plan->generation;
	half->seen = plan->now;
	half->translation = plan->translation;
	half->role = role;
	half->class = original ? plan->original_class : plan->reply_class;
	half->ifindex = original ? plan->original_ifindex : plan->reply_ifindex;
	half->lease.stamp = plan->now;
	if (!original)
		return;
	if (role == ROLE_TRANSIT)
		return;
	half->lease = plan->lease;
	half->packets = plan->packets;
	half->bytes = plan->bytes;
	half->tcp = plan->tcp;
}

/* One direction's transit half. It may be there: of a flow that this one takes the place of, made by the CPU
 * that is making the same flow, or left by one that is no more.
 */
static __always_inline bool transit_insert(struct plan *plan, const struct tuple *key,
					   const struct tuple *other)
{
	struct half *half, *reply;
	__u32 id;

	plan->half.other = *other;
	plan->half.guard = new_guard(key, other, plan->entry.id);
	if (!bpf_map_update_elem(&flows, key, &plan->half, BPF_NOEXIST))
		return true;
	half = bpf_map_lookup_elem(&flows, key);
	if (!half || half->role != ROLE_TRANSIT)
		return false;
	id = half->standing.id;
	if (!plan->takeover || id != plan->old_id) {
		if (id == plan->entry.id)
			return true;
		reply = bpf_map_lookup_elem(&flows, &half->other);
		if (reply && reply->standing.id == id &&
		    rule_current(reply->rule, reply->generation))
			return false;
	}
	return !bpf_map_update_elem(&flows, key, &plan->half, BPF_EXIST);
}

/* What a hairpin flow looks like between its two hooks, in both directions. */
__noinline bool transits_insert(void)
{
	struct plan *plan = plan_get();
	struct tuple *transit;

	if (!plan)
		return false;
	transit = &plan->transit;
	fill_half(plan, ROLE_TRANSIT);
	transit_of(transit, &plan->original, &plan->entry.claim);
	if (!transit_insert(plan, transit, &plan->entry.claim))
		return false;
	plan->half.class = plan->reply_class;
	plan->half.ifindex = plan->reply_ifindex;
	transit_of(transit, &plan->entry.claim, &plan->original);
	return transit_insert(plan, transit, &plan->original);
}

/* An atomic operation with a result orders all memory accesses around it. */
static __always_inline void full_barrier(struct plan *plan)
{
	asm volatile("" ::"r"(__sync_fetch_and_add(&plan->now, 0)) : "memory");
}

/* What we have claimed, and then an original half that would be left alone: that of the flow
 * whose end we own, or one that another CPU has made to help us.
 */
static __always_inline void give_back_claim(struct plan *plan)
{
	struct half *original;

	if (plan->translation == TRANSLATION_HAIRPIN)
		transits_delete(&plan->original, &plan->entry.claim, plan->entry.id);
	bpf_map_delete_elem(&flows, &plan->entry.claim);
	mappings_drop(plan_holds(plan), &plan->original, &plan->entry.claim);
	full_barrier(plan);
	original = bpf_map_lookup_elem(&flows, &plan->original);
	if (original &&
	    (original->standing.id == plan->entry.id ||
	     (plan->takeover && !plan->reversed && original->standing.id == plan->old_id)))
		bpf_map_delete_elem(&flows, &plan->original);
}

/* We have finished another CPU's flow; it may have given up its claim just before. Each of the
 * two writes first and looks then, so one of them sees what the other did.
 */
static __always_inline bool helped(struct plan *plan)
{
	struct half *reply, *original;

	full_barrier(plan);
	reply = bpf_map_lookup_elem(&flows, &plan->entry.claim);
	if (reply && reply->standing.id == plan->entry.id)
		return true;
	original = bpf_map_lookup_elem(&flows, &plan->original);
	if (original && original->standing.id == plan->entry.id)
		bpf_map_delete_elem(&flows, &plan->original);
	return false;
}

__noinline enum created flow_create(struct __sk_buff *skb)
{
	struct plan *plan = plan_get();
	enum created result;
	enum claimed claimed;
	struct half *other;
	long err;

	if (!plan)
		return CREATED_NOT;
	expiry_watch();
	result = own_ended(plan);
	if (result != CREATED)
		return result;

	plan->entry.id = bpf_get_prandom_u32();
	plan->entry.checked = plan->now;
	fill_half(plan, ROLE_REPLY);
	if (plan->target && !mapping_hold(&plan->entry.claim, &plan->original))
		return CREATED_NOT;
	claimed = claim(skb, plan);
	if (plan->target && claimed != CLAIM_DONE)
		mapping_drop(&plan->entry.claim, &plan->original);
	if (claimed != CLAIM_DONE && claimed != CLAIM_SAME) {
		plan->reason = claimed == CLAIM_FULL	    ? DROP_TABLE_FULL
			       : claimed == CLAIM_NO_MEMORY ? DROP_NO_MEMORY
							    : DROP_NO_PORT;
		return CREATED_NOT;
	}
	if (claimed == CLAIM_DONE && !plan->queued &&
	    bpf_map_push_elem(&expiry_queue, &plan->entry, 0)) {
		give_back_claim(plan);
		plan->reason = DROP_TABLE_FULL;
		return CREATED_NOT;
	}

	if (plan->translation == TRANSLATION_HAIRPIN && !transits_insert()) {
		if (claimed == CLAIM_DONE)
			give_back_claim(plan);
		plan->reason = DROP_HAIRPIN;
		return CREATED_NOT;
	}
	fill_half(plan, ROLE_ORIGINAL);
	plan->half.guard = new_guard(&plan->original, &plan->entry.claim, plan->entry.id);
	err = bpf_map_update_elem(&flows, &plan->original, &plan->half,
				  plan->takeover ? BPF_EXIST : BPF_NOEXIST);
	if (!err && plan->reversed)
		end_reversed(plan);
	if (!err && claimed == CLAIM_SAME && !helped(plan))
		return CREATED_NOT;
	if (!err) {
		count(FLOWS_CREATED);
		return CREATED;
	}
	if (err == -17 /* EEXIST */) {
		count(FLOWS_RACED);
		other = bpf_map_lookup_elem(&flows, &plan->original);
		/* unless it is the same flow, which both have helped to make */
		if (claimed == CLAIM_DONE && (!other || other->standing.id != plan->entry.id))
			give_back_claim(plan);
		return CREATED_BY_OTHERS;
	}
	if (claimed == CLAIM_DONE)
		give_back_claim(plan);
	plan->reason = claim_error(err) == CLAIM_NO_MEMORY ? DROP_NO_MEMORY : DROP_TABLE_FULL;
	return CREATED_NOT;
}
