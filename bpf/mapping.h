/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* mapping.h - one outside port per inside endpoint, whatever the destination (RFC 4787 REQ-1:
 * endpoint-independent mapping), and no outside port for two endpoints (REQ-3).
 *
 * A mapping's places in the table follow from its outside address and port, so that taking one is a
 * matter of two atomic operations. There are two, the home and its neighbour in the same pair; an
 * outside address has a run of homes of its own as long as there are not many addresses, and where
 * two ports have one home, the second one to come lives next door. A third port counts as taken.
 *
 * hold says whose a place is now: flows that hold it, and an incarnation, which changes whenever the
 * place is taken. A swap of hold that succeeds proves that all the rest is still what it was
 * when hold was read. Whoever lets the last flow go deletes the entry in moved_ports, then frees
 * the place: most endpoints keep their port, and have no such entry.
 *
 * What must hold, whatever the CPUs do:
 *  1. no outside port is in two places. A place is taken with its pair locked (MAPPING_LOCKED in the
 *     first one's hold), after a look at both: whoever takes sees what others have taken.
 *     Joining and letting go need no lock, since they only change who holds what is there;
 *  2. no endpoint has two ports of one outside address. It has its own port or an entry in
 *     moved_ports, never both: one is made with the pair of its own port locked, and when the
 *     other is not there;
 *  3. nobody waits for long. Who cannot have the lock gets no mapping (MAPPED_FULL), and so no second
 *     one; and locks do not nest.
 * Fields are written before the hold that publishes them, read after it, and a mapping that somebody
 * holds does not move: so who lets go finds his in one of the two places.
 */
#pragma once

#include "packet.h"
#include "tuple.h"

#define JOIN_WAITS 8
#define LOCK_WAITS 8192 /* some hundred microseconds: who has the lock may be in an interrupt */

static __always_inline __u32 outside_hash(const struct addr *outside, __u8 proto)
{
	const __u64 *x = (const void *)outside;

	return mix(mix(mix(0, x[0]), x[1]), proto) >> 32;
}

/* What the kernel lets programs read of a map. */
struct bpf_map {
	__u32 max_entries;
} __attribute__((preserve_access_index));

/* The two places of the port that a reply tuple has. */
struct places {
	struct mapping *home;
	struct mapping *next;
	struct mapping *first; /* of the two, which has the lock */
	__u32 outside;
	bool locked;
};

static __always_inline bool places_of(struct places *at, const struct addr *outside, __be16 port,
				      __u8 proto)
{
	const struct bpf_map *table = (const void *)&mappings;
	__u32 home, next;

	at->outside = outside_hash(outside, proto);
	home = (at->outside + bpf_ntohs(port)) & (table->max_entries - 1);
	next = home ^ 1;
	at->home = bpf_map_lookup_elem(&mappings, &home);
	at->next = bpf_map_lookup_elem(&mappings, &next);
	if (!at->home || !at->next)
		return false;
	at->first = home & 1 ? at->next : at->home;
	return true;
}

/* Reads what may change at any time: true only says that a closer look is worth it. */
static __always_inline bool mapping_has_port(const struct mapping *m, __be16 port, __u32 outside)
{
	return m->outside_port == port && m->outside == outside;
}

static __always_inline bool mapping_is(const struct mapping *m, const struct tuple *original,
				       __be16 port, __u32 outside)
{
	return mapping_has_port(m, port, outside) && m->inside_port == original->sport &&
	       addr_equal(&m->inside, &original->src);
}

/* The rest is read after hold: an atomic operation with a result orders all accesses around it. */
static __always_inline __u64 mapping_read_hold(struct mapping *m)
{
	return __sync_fetch_and_add(&m->hold, 0);
}

static __always_inline bool mapping_is_free(__u64 hold)
{
	return !((__u32)hold & ~MAPPING_LOCKED);
}

static __always_inline bool place_lock(struct mapping *first)
{
	__u64 hold = *(volatile __u64 *)&first->hold & ~(__u64)MAPPING_LOCKED;

	return __sync_val_compare_and_swap(&first->hold, hold, hold | MAPPING_LOCKED) == hold;
}

static long place_lock_again(__u32 i, void *context)
{
	struct places *at = context;

	(void)i;
	if (!at->first || !place_lock(at->first))
		return 0;
	at->locked = true;
	return 1;
}

static __always_inline bool places_lock(struct places *at)
{
	at->locked = place_lock(at->first);
	if (!at->locked)
		bpf_loop(LOCK_WAITS, place_lock_again, at, 0);
	return at->locked;
}

static __always_inline void places_unlock(struct places *at)
{
	__sync_fetch_and_and(&at->first->hold, ~(__u64)MAPPING_LOCKED);
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
					 __be16 port, __u32 outside)
{
	if (!mapping_has_port(m, port, outside))
		return false;
	for (int i = 0; i < JOIN_WAITS; i++) {
		__u64 hold = mapping_read_hold(m), flows = hold & MAPPING_FLOWS;

		if (!flows || flows == MAPPING_FLOWS || !mapping_is(m, original, port, outside))
			return false;
		if (__sync_val_compare_and_swap(&m->hold, hold, hold + 1) == hold)
			return true;
	}
	return false;
}

static __always_inline bool places_join(struct places *at, const struct tuple *original,
					__be16 port)
{
	return mapping_join(at->home, original, port, at->outside) ||
	       mapping_join(at->next, original, port, at->outside);
}

/* Takes part in the mapping that the endpoint has with a port: reply->dst and dport. */
__noinline bool mapping_hold(const struct tuple *original, const struct tuple *reply)
{
	struct places at;

	if (!original || !reply || !places_of(&at, &reply->dst, reply->dport, reply->proto))
		return false;
	return places_join(&at, original, reply->dport);
}

/* The port that the endpoint has instead of its own, or 0: most have kept theirs. */
__noinline __be16 mapping_moved(const struct tuple *original, const struct addr *outside)
{
	const struct moved_port *moved;
	struct endpoint key;

	if (!original || !outside)
		return 0;
	moved_key(&key, original, outside);
	moved = bpf_map_lookup_elem(&moved_ports, &key);
	return moved ? *(volatile __be16 *)&moved->port : 0;
}

/* One of the two has what the caller holds. The other may have the same, left from a time when it
 * was there; nobody holds that.
 */
static __always_inline bool mapping_is_held(struct mapping *m, const struct tuple *original,
					    const struct tuple *reply, __u32 outside)
{
	return mapping_read_hold(m) & MAPPING_FLOWS &&
	       mapping_is(m, original, reply->dport, outside);
}

/* Lets go of a mapping that the caller holds. */
__noinline int mapping_drop(const struct tuple *original, const struct tuple *reply)
{
	struct places at;

	if (!original || !reply || !places_of(&at, &reply->dst, reply->dport, reply->proto))
		return 0;
	if (mapping_is_held(at.home, original, reply, at.outside))
		mapping_release(at.home, original, reply);
	else if (mapping_is_held(at.next, original, reply, at.outside))
		mapping_release(at.next, original, reply);
	return 0;
}

/* Lets go of all that a flow holds. The outside port of the target is where the original goes to. */
static __always_inline void mappings_drop(enum held held, const struct tuple *original,
					  const struct tuple *reply)
{
	if (held & HELD_SOURCE)
		mapping_drop(original, reply);
	if (held & HELD_TARGET)
		mapping_drop(reply, original);
}

/* The endpoint whose mapping a place has, if that is a mapping with this port. */
static __always_inline bool mapping_reads(struct mapping *m, __be16 port, __u32 outside,
					  struct addr *inside, __be16 *inside_port)
{
	__u64 hold;

	if (!mapping_has_port(m, port, outside))
		return false;
	hold = mapping_read_hold(m);
	*inside = m->inside;
	*inside_port = m->inside_port;
	return hold & MAPPING_FLOWS && mapping_has_port(m, port, outside) &&
	       mapping_read_hold(m) >> 32 == hold >> 32;
}

/* The endpoint that has the outside port to which a packet goes. */
static __always_inline bool mapping_find(const struct tuple *to, struct addr *inside,
					 __be16 *inside_port)
{
	struct places at;

	return places_of(&at, &to->dst, to->dport, to->proto) &&
	       (mapping_reads(at.home, to->dport, at.outside, inside, inside_port) ||
		mapping_reads(at.next, to->dport, at.outside, inside, inside_port));
}

enum mapped {
	MAPPED_NOT,    /* not yet */
	MAPPED,	       /* held, by the port asked for */
	MAPPED_MOVED,  /* held, and to be entered in moved_ports: mapping_enter() */
	MAPPED_TAKEN,  /* another endpoint has the port, or others have its places */
	MAPPED_OTHERS, /* not held: the endpoint has another port */
	MAPPED_FULL,   /* not held: no memory, or no end of waiting */
};

/* What a place says to who wants the port; the pair is locked. */
static __always_inline enum mapped mapping_ask(struct mapping *m, const struct tuple *original,
					       __be16 port, __u32 outside)
{
	if (mapping_is_free(m->hold) || !mapping_has_port(m, port, outside))
		return MAPPED_NOT;
	if (mapping_join(m, original, port, outside))
		return MAPPED;
	return mapping_is(m, original, port, outside) ? MAPPED_FULL : MAPPED_TAKEN;
}

static __always_inline enum mapped mapping_take(struct places *at, const struct tuple *original,
						__be16 port)
{
	struct mapping *m = at->home;
	__u64 hold;

	if (!mapping_is_free(m->hold))
		m = at->next;
	hold = m->hold;
	if (!mapping_is_free(hold))
		return MAPPED_TAKEN;
	m->inside = original->src;
	m->inside_port = original->sport;
	m->outside_port = port;
	m->outside = at->outside;
	/* nobody else changes the hold of a free place; with a result, what is before it comes first */
	__sync_val_compare_and_swap(&m->hold, hold,
				    ((hold >> 32) + 1) << 32 | (hold & MAPPING_LOCKED) |
					    (port != original->sport ? MAPPING_MOVED : 0) | 1);
	count(MAPPINGS_CREATED);
	return port != original->sport ? MAPPED_MOVED : MAPPED;
}

/* Whether the endpoint has its own port. */
static __always_inline bool places_have(struct places *own, const struct tuple *original)
{
	return (mapping_is(own->home, original, original->sport, own->outside) &&
		own->home->hold & MAPPING_FLOWS) ||
	       (mapping_is(own->next, original, original->sport, own->outside) &&
		own->next->hold & MAPPING_FLOWS);
}

/* Makes the endpoint's mapping with one port; reply->dport is that port. */
__noinline enum mapped mapping_make(const struct tuple *original, const struct tuple *reply)
{
	enum mapped result;
	struct places at;
	__be16 port;

	if (!original || !reply)
		return MAPPED_FULL;
	port = reply->dport;
	if (!places_of(&at, &reply->dst, port, reply->proto) || !places_lock(&at))
		return MAPPED_FULL;
	result = mapping_ask(at.home, original, port, at.outside);
	if (result == MAPPED_NOT)
		result = mapping_ask(at.next, original, port, at.outside);
	if (result == MAPPED_NOT && port == original->sport && mapping_moved(original, &reply->dst))
		result = MAPPED_OTHERS;
	if (result == MAPPED_NOT)
		result = mapping_take(&at, original, port);
	places_unlock(&at);
	return result;
}

/* Enters the port that the endpoint gets instead of its own. */
__noinline enum mapped mapping_enter(const struct tuple *original, const struct tuple *reply)
{
	struct moved_port moved;
	enum mapped result;
	struct endpoint key;
	struct places own;
	long err;

	if (!original || !reply || !places_of(&own, &reply->dst, original->sport, reply->proto) ||
	    !places_lock(&own))
		return MAPPED_FULL;
	if (places_have(&own, original)) {
		result = MAPPED_OTHERS;
	} else {
		moved_key(&key, original, &reply->dst);
		moved = (struct moved_port){.port = reply->dport};
		err = bpf_map_update_elem(&moved_ports, &key, &moved, BPF_NOEXIST);
		result = !err ? MAPPED : err == -17 /* EEXIST */ ? MAPPED_OTHERS : MAPPED_FULL;
	}
	places_unlock(&own);
	return result;
}
