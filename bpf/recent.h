/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* recent.h - what the host's tables have just said of an address. New flows come in runs, from one
 * container and to one destination, and a lookup in these tables costs as much as an insertion. An
 * answer holds for a second, on the CPU that asked.
 */
#pragma once

#include "packet.h"
#include "route.h"
#include "rule.h"
#include "tuple.h"

#define RECENT	      256
#define RECENT_STAMPS (1000000000ULL >> STAMP_SHIFT)

/* The address that masquerade takes from a container towards a destination. */
struct source {
	struct addr src;
	struct addr dst;
	struct addr to;
	__u32 uplink;
	__u32 stamp;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, RECENT);
	__type(key, __u32);
	__type(value, struct source);
} sources SEC(".maps");

static __always_inline __u64 addr_hash(const struct addr *a, __u64 hash)
{
	const __u64 *x = (const void *)a;

	return mix(mix(hash, x[0]), x[1]);
}

/* The adjacency that packets towards a destination leave by. */
struct output {
	struct addr dst;
	__u32 uplink;
	__u32 adjacency;
	__u32 stamp;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, RECENT);
	__type(key, __u32);
	__type(value, struct output);
} outputs SEC(".maps");

static __always_inline struct source *source_slot(const struct tuple *t)
{
	__u32 slot = (addr_hash(&t->dst, addr_hash(&t->src, 0)) >> 32) % RECENT;

	return bpf_map_lookup_elem(&sources, &slot);
}

/* The host has lost the address: the flow that begins now must not get it again. */
static __always_inline void forget_source(const struct packet *p)
{
	struct source *s = source_slot(&p->h.tuple);

	if (s)
		s->uplink = 0;
}

static __always_inline bool masquerade_address(const struct packet *p, struct addr *to)
{
	const struct tuple *t = &p->h.tuple;
	struct source *s = source_slot(t);

	if (s && s->uplink == p->uplink && is_within(p->now, s->stamp, RECENT_STAMPS) &&
	    addr_equal(&s->src, &t->src) && addr_equal(&s->dst, &t->dst)) {
		*to = s->to;
		return true;
	}
	if (!source_address(p, p->uplink, to))
		return false;
	if (s) {
		s->src = t->src;
		s->dst = t->dst;
		s->to = *to;
		s->uplink = p->uplink;
		s->stamp = p->now;
	}
	return true;
}

static __always_inline struct output *output_slot(const struct addr *dst)
{
	__u32 slot = (addr_hash(dst, 0) >> 32) % RECENT;

	return bpf_map_lookup_elem(&outputs, &slot);
}

static __always_inline bool output_is_recent(const struct packet *p, const struct output *o)
{
	return o->uplink == p->skb->ifindex && is_within(p->now, o->stamp, RECENT_STAMPS / 2) &&
	       addr_equal(&o->dst, &p->h.tuple.dst);
}

static __always_inline void output_note(const struct packet *p, struct output *o, __u32 adjacency)
{
	o->dst = p->h.tuple.dst;
	o->uplink = p->skb->ifindex;
	o->adjacency = adjacency;
	o->stamp = p->now;
}

/* An address of the host's own that is in no subnet of a bridge. */
struct own {
	struct addr addr;
	__u32 stamp;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 16);
	__type(key, __u32);
	__type(value, struct own);
} owns SEC(".maps");

/* Whether what the host sends with that address is none of a bridge's. */
static __always_inline bool is_outside(const struct packet *p, const struct addr *addr)
{
	__u32 slot = bpf_ntohl(addr->word[3]) % 16;
	struct own *own = bpf_map_lookup_elem(&owns, &slot);

	if (own && is_within(p->now, own->stamp, RECENT_STAMPS) && addr_equal(&own->addr, addr))
		return true;
	if (bridge_of(addr))
		return false;
	if (own) {
		own->addr = *addr;
		own->stamp = p->now;
	}
	return true;
}
