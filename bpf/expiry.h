/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* expiry.h - flows end here, in the kernel, with no process running.
 *
 * Every flow's claim is in a queue. One timer looks at the queue's head as long as that was
 * not looked at for the period, and puts back what goes on living: the head is always
 * the longest unchecked, so an idle host costs one peek a tick. bpf_for_each_map_elem has
 * no cursor and would walk the whole table in one go (41 ms for 200,000 elements).
 *
 * Where hardly a flow is over, the period grows: a look at a large table is three cache misses, and a
 * million flows every two seconds would be a tenth of a CPU. It shrinks at once when flows end.
 *
 * A flow ends in two visits. The first marks it ENDING: a packet that comes meanwhile revives
 * it. The second swaps ENDING to DEAD, which no packet undoes, and deletes the original half,
 * then transit halves and the reply half: the claim goes last, or another flow could take the port while this
 * one's original half still leads packets to it.
 */
#pragma once

#include "flow_state.h"
#include "fragment.h"
#include "mapping.h"
#include "packet.h"
#include "transit.h"

#define EXPIRY_PERIOD	  ((2ULL * 1000 * 1000 * 1000) >> STAMP_SHIFT)
#define EXPIRY_PERIOD_MAX (8 * EXPIRY_PERIOD)
#define EXPIRY_LOOKS	  4096

/* A tick holds its CPU for the budget at most, and for no more entries than that. The next
 * one comes the sooner the further the queue's head is behind.
 */
#define EXPIRY_BUDGET_NS  (300 * 1000)
#define EXPIRY_MAX	  1024
#define EXPIRY_SLOW_NS	  (500 * 1000)
#define EXPIRY_LATE_NS	  (2 * 1000 * 1000)
#define EXPIRY_BUSY_NS	  (10 * 1000 * 1000)
#define EXPIRY_IDLE_NS	  (100 * 1000 * 1000)
#define EXPIRY_OVERDUE_NS (10ULL * EXPIRY_IDLE_NS)

#define EXPIRY_CLOCK 1 /* CLOCK_MONOTONIC */

struct tick {
	const struct config *config;
	__u64 began;
	__u32 now;
	__u32 checked;
	__u32 over;
	__u32 period;
	__u32 age; /* stamps since the head was looked at; below the period: caught up */
};

static __always_inline void mark_original(struct half *original, __u32 id, enum life from,
					  enum life to)
{
	struct standing was = standing_of(original);

	if (was.id == id && was.life == from)
		swap_life(original, was, to);
}

/* original is NULL when that half is gone, or of another flow by now. */
static __always_inline void delete_flow(const struct tuple *key, const struct half *original,
					const struct expiry_entry *entry,
					enum translation translation, enum held held)
{
	const struct tuple *claim = &entry->claim;

	if (original)
		bpf_map_delete_elem(&flows, key);
	if (translation == TRANSLATION_HAIRPIN)
		transits_delete(key, claim, entry->id);
	bpf_map_delete_elem(&flows, claim);
	mappings_drop(held, key, claim);
	count(FLOWS_ENDED);
}

/* True: the entry goes back into the queue. */
static __always_inline bool check_flow(struct tick *tick, const struct expiry_entry *entry)
{
	struct half *reply = bpf_map_lookup_elem(&flows, &entry->claim);
	enum translation translation;
	struct half *original;
	struct standing was;
	struct tuple key;
	bool over;

	/* twice, since the first element may have been replaced and recycled as we looked */
	if (!reply || reply->standing.id != entry->id)
		reply = bpf_map_lookup_elem(&flows, &entry->claim);
	if (!reply)
		return false; /* given back */
	was = standing_of(reply);
	if (was.id != entry->id)
		return false; /* replaced by a flow with an entry of its own */
	key = reply->other;
	translation = reply->translation;
	original = bpf_map_lookup_elem(&flows, &key);
	if (original && original->standing.id != entry->id)
		original = NULL;
	if (was.life == LIFE_BURIED) {
		delete_flow(&key, original, entry, translation, was.held);
		return false;
	}
	if (was.life == LIFE_DEAD) {
		/* taken over by a packet that may still be at it */
		swap_life(reply, was, LIFE_BURIED);
		return true;
	}
	/* without an original half it is being made just now, or its maker lost a race */
	over = flow_over(tick->config, &key, original ? original : reply, reply, tick->now);
	tick->over += over;
	if (!original) {
		if (over)
			swap_life(reply, was, LIFE_BURIED);
		return true;
	}
	if (!over) {
		if (was.life == LIFE_ENDING && swap_life(reply, was, LIFE_LIVE))
			mark_original(original, entry->id, LIFE_ORIGINAL_ENDING, LIFE_ORIGINAL);
		return true;
	}
	if (was.life == LIFE_LIVE) {
		if (swap_life(reply, was, LIFE_ENDING))
			mark_original(original, entry->id, LIFE_ORIGINAL, LIFE_ORIGINAL_ENDING);
		return true;
	}
	if (!swap_life(reply, was, LIFE_DEAD))
		return true; /* revived */
	delete_flow(&key, original, entry, translation, was.held);
	return false;
}

/* The head is put back before it is taken away. Into a full queue BPF_EXIST does both at once:
 * it overwrites the oldest entry, which is the head. Creators push without it, and nobody
 * but this timer pops, so no entry is lost and the queue cannot jam.
 */
static __always_inline bool requeue(struct expiry_entry *head, __u32 now)
{
	__u32 id = head->id, checked = head->checked;

	head->checked = now;
	if (bpf_map_push_elem(&expiry_queue, head, BPF_EXIST))
		return false;
	if (bpf_map_peek_elem(&expiry_queue, head))
		return false;
	if (head->id == id && head->checked == checked)
		bpf_map_pop_elem(&expiry_queue, head);
	return true;
}

static long check_head(__u32 i, void *context)
{
	struct tick *tick = context;
	struct expiry_entry head;

	(void)i;
	tick->age = 0;
	if (bpf_map_peek_elem(&expiry_queue, &head))
		return 1;
	if ((__s32)(tick->now - head.checked) > 0)
		tick->age = tick->now - head.checked;
	if (tick->age < tick->period)
		return 1;
	tick->checked++;
	if (!check_flow(tick, &head))
		bpf_map_pop_elem(&expiry_queue, &head);
	else if (!requeue(&head, tick->now))
		return 1;
	return bpf_ktime_get_ns() - tick->began > EXPIRY_BUDGET_NS;
}

static __always_inline void think_over(struct expiry *e, const struct tick *tick)
{
	e->looks += tick->checked;
	e->over += tick->over;
	if (e->over > EXPIRY_LOOKS / 16) {
		e->period = EXPIRY_PERIOD;
	} else if (e->looks < EXPIRY_LOOKS) {
		return;
	} else {
		e->period = tick->period * 2;
		if (e->period > EXPIRY_PERIOD_MAX)
			e->period = EXPIRY_PERIOD_MAX;
	}
	e->looks = 0;
	e->over = 0;
}

static int expiry_tick(void *map, int *key, struct expiry *e)
{
	struct tick tick = {};
	__u64 took;
	__u32 zero = 0;

	(void)map;
	(void)key;
	tick.config = bpf_map_lookup_elem(&config, &zero);
	if (tick.config) {
		tick.began = bpf_ktime_get_ns();
		tick.now = tick.began >> STAMP_SHIFT;
		tick.period = e->period ?: EXPIRY_PERIOD;
		bpf_loop(EXPIRY_MAX, check_head, &tick, 0);
		if (!is_within(tick.now, e->swept, HELD_SWEEP)) {
			e->swept = tick.now;
			bpf_for_each_map_elem(&held_fragments, held_sweep, &tick.now, 0);
		}
		took = bpf_ktime_get_ns() - tick.began;
		e->last_tick = tick.began;
		e->ticks += 1;
		e->checked += tick.checked;
		think_over(e, &tick);
		if (took > e->longest)
			e->longest = took;
		if (took > EXPIRY_SLOW_NS)
			e->slow += 1;
	}
	bpf_timer_start(&e->timer,
			tick.age < tick.period	     ? EXPIRY_IDLE_NS
			: tick.age < 2 * tick.period ? EXPIRY_BUSY_NS
						     : EXPIRY_LATE_NS,
			0);
	return 0;
}

/* Arms the timer with this program's code: a timer keeps the program that armed it, so the
 * loader runs this after each load and upgrade.
 */
static __always_inline bool expiry_start(void)
{
	__u32 zero = 0;
	struct expiry *e = bpf_map_lookup_elem(&expiry, &zero);

	if (!e)
		return false;
	e->last_tick = bpf_ktime_get_ns(); /* not overdue before its first tick */
	/* EBUSY: it is there already */
	bpf_timer_init(&e->timer, &expiry, EXPIRY_CLOCK);
	return !bpf_timer_set_callback(&e->timer, expiry_tick) &&
	       !bpf_timer_start(&e->timer, EXPIRY_BUSY_NS, 0);
}

/* A new flow tells when nobody will end it. A timer dies with the last user of its map, a pin or a descriptor:
 * then no program can make it anew (bpf_timer_init refuses), only the loader with new pins.
 */
static __always_inline void expiry_watch(void)
{
	__u32 zero = 0;
	struct expiry *e = bpf_map_lookup_elem(&expiry, &zero);

	if (e && bpf_ktime_get_coarse_ns() > e->last_tick + EXPIRY_OVERDUE_NS)
		count(EXPIRY_OVERDUE);
}
