/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* mapping.h - one outside port per inside endpoint, whatever the destination (RFC 4787 REQ-1:
 * endpoint-independent mapping), and no outside port for two endpoints (REQ-3).
 *
 * The outside entry is the claim of the port. The inside entry counts the flows that hold
 * the mapping; whoever lets the last one go deletes inside, then outside: the claim last.
 */
#pragma once

#include "packet.h"
#include "tuple.h"

static __always_inline void mapping_inside(struct mapping_key *key, const struct tuple *original,
					   const struct addr *outside)
{
	key->addr = original->src;
	key->outside = *outside;
	key->port = original->sport;
	key->proto = original->proto;
	key->side = MAPPING_INSIDE;
}

static __always_inline void mapping_outside(struct mapping_key *key, const struct addr *outside,
					    __be16 port, __u8 proto)
{
	key->addr = *outside;
	__builtin_memset(&key->outside, 0, sizeof(key->outside));
	key->port = port;
	key->proto = proto;
	key->side = MAPPING_OUTSIDE;
}

#define MAPPING_HOLD_TRIES 4

/* Takes part in the endpoint's mapping, if it has one that is not being deleted: reply->dst is
 * the outside address, reply->dport becomes the outside port.
 *
 * The element may be deleted and its memory become another mapping's at any moment until we
 * hold it. The second lookup says that the word read before was ours, or else was of another
 * id; the swap then says that it still is.
 */
__noinline bool mapping_hold(const struct tuple *original, struct tuple *reply)
{
	struct mapping_key inside;
	struct mapping *m;
	__u64 hold;

	if (!original || !reply)
		return false;
	mapping_inside(&inside, original, &reply->dst);
	for (int i = 0; i < MAPPING_HOLD_TRIES; i++) {
		m = bpf_map_lookup_elem(&mappings, &inside);
		if (!m)
			return false;
		hold = *(volatile __u64 *)&m->hold;
		if (!(__u32)hold || bpf_map_lookup_elem(&mappings, &inside) != m)
			return false;
		if (__sync_val_compare_and_swap(&m->hold, hold, hold + 1) == hold) {
			reply->dport = m->port;
			return true;
		}
	}
	return false;
}

__noinline int mapping_drop(const struct tuple *original, const struct tuple *reply)
{
	struct mapping_key key;
	struct mapping *m;

	if (!original || !reply)
		return 0;
	mapping_inside(&key, original, &reply->dst);
	m = bpf_map_lookup_elem(&mappings, &key);
	if (!m || (__u32)__sync_fetch_and_add(&m->hold, -1) != 1)
		return 0;
	bpf_map_delete_elem(&mappings, &key);
	mapping_outside(&key, &reply->dst, reply->dport, reply->proto);
	bpf_map_delete_elem(&mappings, &key);
	count(MAPPINGS_ENDED);
	return 0;
}

enum mapped {
	MAPPED,	       /* held, by the port asked for */
	MAPPED_TAKEN,  /* another endpoint has the port */
	MAPPED_OTHERS, /* another CPU was faster with this endpoint */
	MAPPED_FULL,   /* no memory, or no room */
};

/* Makes the endpoint's mapping with one port; reply->dport is that port. */
__noinline enum mapped mapping_make(const struct tuple *original, const struct tuple *reply)
{
	struct mapping m = {};
	struct mapping_key key;
	long err;

	if (!original || !reply)
		return MAPPED_FULL;
	mapping_outside(&key, &reply->dst, reply->dport, reply->proto);
	m.addr = original->src;
	m.port = original->sport;
	err = bpf_map_update_elem(&mappings, &key, &m, BPF_NOEXIST);
	if (err)
		return err == -17 /* EEXIST */ ? MAPPED_TAKEN : MAPPED_FULL;
	mapping_inside(&key, original, &reply->dst);
	m.addr = reply->dst;
	m.port = reply->dport;
	m.hold = (__u64)bpf_get_prandom_u32() << 32 | 1;
	err = bpf_map_update_elem(&mappings, &key, &m, BPF_NOEXIST);
	if (!err) {
		count(MAPPINGS_CREATED);
		return MAPPED;
	}
	mapping_outside(&key, &reply->dst, reply->dport, reply->proto);
	bpf_map_delete_elem(&mappings, &key);
	return err == -17 ? MAPPED_OTHERS : MAPPED_FULL;
}
