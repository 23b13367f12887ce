/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* adjacency.h - the table of devices and Ethernet addresses that leases point into: a half has
 * eight bytes to spare, and a thousand flows of one container go to the same place.
 */
#pragma once

#include "packet.h"
#include "tuple.h"

/* Ten seconds: several times as long as a lease. */
#define ADJACENCY_STAMPS (10 * 1000000000ULL >> STAMP_SHIFT)
#define ADJACENCY_PROBES 8

static __always_inline struct adjacency *adjacency_get(__u32 index)
{
	return bpf_map_lookup_elem(&adjacencies, &index);
}

/* used and state in one word, as they are swapped. */
struct adjacency_word {
	__u32 used;
	enum adjacency_state state;
} __attribute__((aligned(8)));

static __always_inline bool adjacency_swap(struct adjacency *a, struct adjacency_word was,
					   __u32 used, enum adjacency_state state)
{
	struct adjacency_word is = {.used = used, .state = state};
	__u64 from = *(__u64 *)&was, to = *(__u64 *)&is;

	return __sync_val_compare_and_swap((__u64 *)a, from, to) == from;
}

/* From ifindex on, to the end: what makes an adjacency this one and no other. */
static __always_inline const __u64 *adjacency_body(const struct adjacency *a)
{
	return (const __u64 *)a + 1;
}

static __always_inline bool adjacency_equal(const struct adjacency *a, const struct adjacency *b)
{
	const __u64 *x = adjacency_body(a), *y = adjacency_body(b);

	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2] && x[3] == y[3];
}

static __always_inline struct adjacency_word adjacency_word(const struct adjacency *a)
{
	__u64 word = *(const volatile __u64 *)a;

	return *(struct adjacency_word *)&word;
}

static __always_inline bool adjacency_in_use(struct adjacency_word was, __u32 now)
{
	return was.state != ADJACENCY_FREE && is_within(now, was.used, ADJACENCY_STAMPS);
}

/* Its time of use is renewed before the lease is granted, by compare-and-swap, so that nobody
 * takes it for something else in between. Another CPU may just have done so.
 */
static __always_inline bool adjacency_use(struct adjacency *a, struct adjacency_word was,
					  const struct adjacency *want, __u32 now)
{
	if (was.used == now || adjacency_swap(a, was, now, ADJACENCY_READY))
		return true;
	was = adjacency_word(a);
	return was.state == ADJACENCY_READY && adjacency_in_use(was, now) &&
	       adjacency_equal(a, want);
}

/* The index of the adjacency like want, made where there is none; 0: there is no room. */
__noinline __u32 adjacency_find(const struct adjacency *want, __u32 now)
{
	struct adjacency_word was;
	struct adjacency *a;
	const __u64 *x;
	__u32 first, free = 0;
	__u64 hash;

	if (!want)
		return 0;
	x = adjacency_body(want);
	hash = mix(mix(mix(mix(0, x[0]), x[1]), x[2]), x[3]);
	first = hash >> 32;
	for (__u32 i = 0; i < ADJACENCY_PROBES; i++) {
		__u32 index = ADJACENCY_FIRST + (first + i) % (ADJACENCIES - ADJACENCY_FIRST);

		a = adjacency_get(index);
		if (!a)
			return 0;
		was = adjacency_word(a);
		if (!adjacency_in_use(was, now)) {
			if (!free)
				free = index;
			if (was.state == ADJACENCY_FREE)
				break; /* behind it there never was one */
			continue;
		}
		if (was.state == ADJACENCY_READY && adjacency_equal(a, want))
			return adjacency_use(a, was, want, now) ? index : 0;
	}
	if (!free)
		return 0;
	a = adjacency_get(free);
	if (!a)
		return 0;
	was = adjacency_word(a);
	if (adjacency_in_use(was, now) || !adjacency_swap(a, was, now, ADJACENCY_BUSY))
		return 0;
	a->ifindex = want->ifindex;
	a->mtu = want->mtu;
	__builtin_memcpy(a->remote, want->remote, sizeof(a->remote));
	__builtin_memcpy(a->local, want->local, sizeof(a->local));
	a->protocol = want->protocol;
	a->pad = 0;
	a->flags = want->flags;
	a->pad2 = 0;
	was.used = now;
	was.state = ADJACENCY_BUSY;
	return adjacency_swap(a, was, now, ADJACENCY_READY) ? free : 0;
}

/* The adjacency with an index that was found a second ago at most, if it is still the one: NULL when
 * it had better be looked for again.
 */
static __always_inline const struct adjacency *adjacency_again(__u32 index, __u32 now)
{
	const struct adjacency *a = adjacency_get(index);

	return a && a->state == ADJACENCY_READY && is_within(now, a->used, ADJACENCY_STAMPS / 2)
		       ? a
		       : NULL;
}
