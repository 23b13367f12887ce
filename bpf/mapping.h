/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* mapping.h - one outside port per inside endpoint, whatever the destination (RFC 4787 REQ-1:
 * endpoint-independent mapping), and no outside port for two endpoints (REQ-3).
 *
 * A mapping's place in the table follows from its outside address and port, so that taking it is
 * one compare-and-swap. An outside address has a run of places of its own as long as there are not
 * many of them; where two ports meet in one place, the second counts as taken.
 *
 * hold says whose it is now: flows that hold it, and an incarnation, which changes whenever the
 * place is taken. A swap of hold that succeeds proves that all the rest is still what it was
 * when hold was read. Whoever lets the last flow go deletes the entry in moved_ports, then frees
 * the place: most endpoints keep their port, and have no such entry.
 */
#pragma once

#include "packet.h"
#include "tuple.h"

#define MAPPING_WAITS 8

static __always_inline __u32 outside_hash(const struct addr *outside, __u8 proto)
{
	const __u64 *x = (const void *)outside;

	return mix(mix(mix(0, x[0]), x[1]), proto) >> 32;
}

/* What the kernel lets programs read of a map. */
struct bpf_map {
	__u32 max_entries;
} __attribute__((preserve_access_index));

/* The place of the port that the reply tuple has. */
static __always_inline struct mapping *mapping_place(const struct tuple *reply, __u32 *outside)
{
	const struct bpf_map *table = (const void *)&mappings;
	__u32 index;

	*outside = outside_hash(&reply->dst, reply->proto);
	index = (*outside + bpf_ntohs(reply->dport)) & (table->max_entries - 1);
	return bpf_map_lookup_elem(&mappings, &index);
}

static __always_inline bool mapping_is(const struct mapping *m, const struct tuple *original,
				       const struct tuple *reply, __u32 outside)
{
	return m->outside_port == reply->dport && m->outside == outside &&
	       m->inside_port == original->sport && addr_equal(&m->inside, &original->src);
}

/* The rest is read after hold: an atomic operation with a result orders all accesses around it. */
static __always_inline __u64 mapping_read_hold(struct mapping *m)
{
	return __sync_fetch_and_add(&m->hold, 0);
}

static __always_inline void moved_key(struct endpoint *key, const struct tuple *original,
				      const struct addr *outside)
{
	key->inside = original->src;
	key->outside = *outside;
	key->port = original->sport;
	key->proto = original->proto;
	key->pad = 0;
}

static __always_inline void mapping_release(struct mapping *m, const struct tuple *original,
					    const struct tuple *reply)
{
	__u64 was = __sync_fetch_and_add(&m->hold, -1);
	struct moved_port *moved;
	struct endpoint key;

	if ((was & MAPPING_FLOWS) != 1)
		return;
	if (was & MAPPING_MOVED) {
		moved_key(&key, original, &reply->dst);
		moved = bpf_map_lookup_elem(&moved_ports, &key);
		if (moved && moved->port == reply->dport)
			bpf_map_delete_elem(&moved_ports, &key);
		__sync_fetch_and_and(&m->hold, ~(__u64)MAPPING_MOVED);
	}
	count(MAPPINGS_ENDED);
}

/* Takes part in the mapping, if it is the endpoint's and is not being deleted. */
static __always_inline bool mapping_join(struct mapping *m, const struct tuple *original,
					 const struct tuple *reply, __u32 outside)
{
	for (int i = 0; i < MAPPING_WAITS; i++) {
		__u64 hold = mapping_read_hold(m), flows = hold & MAPPING_FLOWS;

		if (hold & MAPPING_BUSY)
			continue;
		if (!flows || flows == MAPPING_FLOWS || !mapping_is(m, original, reply, outside))
			return false;
		if (__sync_val_compare_and_swap(&m->hold, hold, hold + 1) == hold)
			return true;
	}
	return false;
}

/* Takes part in the endpoint's mapping, if it has one: reply->dst is the outside address,
 * reply->dport becomes the outside port. Most have kept their own.
 */
__noinline bool mapping_hold(const struct tuple *original, struct tuple *reply)
{
	struct moved_port *moved;
	struct endpoint key;
	struct mapping *m;
	__u32 outside;

	if (!original || !reply)
		return false;
	reply->dport = original->sport;
	m = mapping_place(reply, &outside);
	if (m && mapping_join(m, original, reply, outside))
		return true;
	moved_key(&key, original, &reply->dst);
	moved = bpf_map_lookup_elem(&moved_ports, &key);
	if (!moved)
		return false;
	reply->dport = *(volatile __be16 *)&moved->port;
	m = mapping_place(reply, &outside);
	return m && mapping_join(m, original, reply, outside);
}

/* Lets go of a mapping that the caller holds. */
__noinline int mapping_drop(const struct tuple *original, const struct tuple *reply)
{
	struct mapping *m;
	__u32 outside;

	if (!original || !reply)
		return 0;
	m = mapping_place(reply, &outside);
	if (m && mapping_is(m, original, reply, outside))
		mapping_release(m, original, reply);
	return 0;
}

enum mapped {
	MAPPED,	       /* held, by the port asked for */
	MAPPED_TAKEN,  /* another endpoint has the port */
	MAPPED_OTHERS, /* not held: another CPU has just given the endpoint another port */
	MAPPED_FULL,   /* not held: no memory, or no room */
};

/* Enters the port that the endpoint gets instead of its own. */
static __always_inline enum mapped moved_enter(const struct tuple *original,
					       const struct tuple *reply)
{
	struct moved_port moved = {.port = reply->dport};
	struct endpoint key;
	long err;

	moved_key(&key, original, &reply->dst);
	err = bpf_map_update_elem(&moved_ports, &key, &moved, BPF_NOEXIST);
	if (!err)
		return MAPPED;
	return err == -17 /* EEXIST */ ? MAPPED_OTHERS : MAPPED_FULL;
}

/* Takes the place if it is free, and says by which hold; 0: it is not. A CPU that is filling it in is
 * waited for, since that may be for this very endpoint.
 */
static __always_inline __u64 mapping_take(struct mapping *m)
{
	for (int i = 0; i < MAPPING_WAITS; i++) {
		__u64 hold = mapping_read_hold(m), mine = ((hold >> 32) + 1) << 32 | MAPPING_BUSY;

		if (hold & MAPPING_BUSY)
			continue;
		if ((__u32)hold)
			return 0;
		if (__sync_val_compare_and_swap(&m->hold, hold, mine) == hold)
			return mine;
	}
	return 0;
}

/* Makes the endpoint's mapping with one port; reply->dport is that port. */
__noinline enum mapped mapping_make(const struct tuple *original, const struct tuple *reply)
{
	enum mapped result = MAPPED;
	struct mapping *m;
	__u32 outside;
	__u64 mine;
	bool moved;

	if (!original || !reply)
		return MAPPED_FULL;
	m = mapping_place(reply, &outside);
	if (!m)
		return MAPPED_FULL;
	mine = mapping_take(m);
	if (!mine)
		return mapping_join(m, original, reply, outside) ? MAPPED : MAPPED_TAKEN;
	m->inside = original->src;
	m->inside_port = original->sport;
	m->outside_port = reply->dport;
	m->outside = outside;
	moved = reply->dport != original->sport;
	/* with the effect of a release: a swap orders what is before it */
	__sync_val_compare_and_swap(&m->hold, mine,
				    mine - MAPPING_BUSY + (moved ? MAPPING_MOVED : 0) + 1);
	count(MAPPINGS_CREATED);
	if (moved)
		result = moved_enter(original, reply);
	if (result != MAPPED)
		mapping_release(m, original, reply);
	return result;
}
