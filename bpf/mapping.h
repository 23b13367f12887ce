/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* mapping.h - one outside port per inside endpoint, whatever the destination (RFC 4787 REQ-1:
 * endpoint-independent mapping), and no outside port for two endpoints (REQ-3).
 *
 * The outside entry is the claim of the port, and counts the flows that hold the mapping; whoever
 * lets the last one go deletes inside, then outside: the claim last. Most endpoints keep their
 * port, and need no inside entry.
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

/* Takes part in the mapping with that outside port, if it is the endpoint's and is not being deleted.
 *
 * The element may be deleted and its memory become another mapping's at any moment until we
 * hold it. The second lookup says that the word read before was ours, or else was of another
 * id; the swap then says that it still is.
 */
static __always_inline bool mapping_join(const struct mapping_key *outside,
					 const struct tuple *original)
{
	struct mapping *m;
	__u64 hold;

	for (int i = 0; i < MAPPING_HOLD_TRIES; i++) {
		m = bpf_map_lookup_elem(&mappings, outside);
		if (!m)
			return false;
		hold = *(volatile __u64 *)&m->hold;
		if (!(__u32)hold || m->port != original->sport ||
		    !addr_equal(&m->addr, &original->src) ||
		    bpf_map_lookup_elem(&mappings, outside) != m)
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
	struct mapping_key key;
	struct mapping *m;
	__be16 port;

	if (!original || !reply)
		return false;
	mapping_outside(&key, &reply->dst, original->sport, original->proto);
	if (mapping_join(&key, original)) {
		reply->dport = original->sport;
		return true;
	}
	mapping_inside(&key, original, &reply->dst);
	m = bpf_map_lookup_elem(&mappings, &key);
	if (!m)
		return false;
	port = *(volatile __be16 *)&m->port;
	mapping_outside(&key, &reply->dst, port, original->proto);
	if (!mapping_join(&key, original))
		return false;
	reply->dport = port;
	return true;
}

__noinline int mapping_drop(const struct tuple *original, const struct tuple *reply)
{
	struct mapping_key key;
	struct mapping *m;

	if (!original || !reply)
		return 0;
	mapping_outside(&key, &reply->dst, reply->dport, reply->proto);
	m = bpf_map_lookup_elem(&mappings, &key);
	if (!m || m->port != original->sport || !addr_equal(&m->addr, &original->src) ||
	    (__u32)__sync_fetch_and_add(&m->hold, -1) != 1)
		return 0;
	if (reply->dport != original->sport) {
		mapping_inside(&key, original, &reply->dst);
		m = bpf_map_lookup_elem(&mappings, &key);
		if (m && m->port == reply->dport)
			bpf_map_delete_elem(&mappings, &key);
		mapping_outside(&key, &reply->dst, reply->dport, reply->proto);
	}
	bpf_map_delete_elem(&mappings, &key);
	count(MAPPINGS_ENDED);
	return 0;
}

enum mapped {
	MAPPED,	       /* held, by the port asked for */
	MAPPED_TAKEN,  /* another endpoint has the port */
	MAPPED_OTHERS, /* held, but another CPU has just given the endpoint another port */
	MAPPED_HALF,   /* held, but there is no room for its inside entry */
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
	m.hold = (__u64)bpf_get_prandom_u32() << 32 | 1;
	err = bpf_map_update_elem(&mappings, &key, &m, BPF_NOEXIST);
	if (err == -17 /* EEXIST */)
		return mapping_join(&key, original) ? MAPPED : MAPPED_TAKEN;
	if (err)
		return MAPPED_FULL;
	if (reply->dport != original->sport) {
		mapping_inside(&key, original, &reply->dst);
		m.addr = reply->dst;
		m.port = reply->dport;
		m.hold = 0;
		err = bpf_map_update_elem(&mappings, &key, &m, BPF_NOEXIST);
	}
	count(MAPPINGS_CREATED);
	if (!err)
		return MAPPED;
	return err == -17 ? MAPPED_OTHERS : MAPPED_HALF;
}
