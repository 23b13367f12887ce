/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* transit.h - what packets of a hairpin flow look like between its two hooks (hairpin.h): a key of its own for
 * each direction. create.h inserts them, whoever ends the flow deletes them.
 */
#pragma once

#include "maps.h"

/* What a packet of a hairpin flow looks like between its two hooks: it has its source still, and its
 * destination already. from is the tuple that it came with, back that of the other direction.
 */
static __always_inline void transit_of(struct tuple *transit, const struct tuple *from,
				       const struct tuple *back)
{
	*transit = *from;
	transit->dst = back->src;
	transit->dport = back->sport;
}

static __always_inline void transit_delete(const struct tuple *transit, __u32 id)
{
	struct half *half = bpf_map_lookup_elem(&flows, transit);

	if (half && half->role == ROLE_TRANSIT && half->standing.id == id)
		bpf_map_delete_elem(&flows, transit);
}

__noinline int transits_delete(const struct tuple *original, const struct tuple *reply, __u32 id)
{
	struct tuple transit; /* what a global function is handed is no map's key before kernel 6.2 */

	if (!original || !reply)
		return 0;
	transit_of(&transit, original, reply);
	transit_delete(&transit, id);
	transit_of(&transit, reply, original);
	transit_delete(&transit, id);
	return 0;
}
