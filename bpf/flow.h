/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* flow.h - finding a packet's half, and noting that it was seen. */
#pragma once

#include "flow_state.h"
#include "packet.h"
#include "tuple.h"

/* A hash element's memory is recycled as soon as it is deleted (kernel/bpf/hashtab.c, since
 * 6.1 also without preallocation): between our lookup and our reads it may become another
 * flow's half. So a half carries a checksum of its own key, its id and what we are about to
 * rewrite with; a half that does not match the key that we asked for is not there.
 */
static __always_inline __u32 half_guard(const struct tuple *key, const struct tuple *to, __u32 id)
{
	__u64 hash = tuple_hash(to, tuple_hash(key, id));

	return hash ^ hash >> 32;
}

static __always_inline __u32 new_guard(const struct tuple *key, const struct tuple *other, __u32 id)
{
	struct tuple to;

	tuple_invert(&to, other);
	return half_guard(key, &to, id);
}

/* How often from_bridge asks where the host routes a flow: once a second. */
#define ROUTE_CHECK_STAMPS (1000000000ULL >> STAMP_SHIFT)

struct found {
	struct half *half;
	struct tuple to; /* what a packet of this direction leaves as: the inverse of half->other */
	__u32 id;
};

static __always_inline struct half *other_half(struct half *half, __u32 id)
{
	struct half *other = bpf_map_lookup_elem(&flows, &half->other);

	return other && other->id == id ? other : NULL;
}

/* The expiry thought that the flow is over, and this packet came before the second look. */
static __always_inline bool flow_revive(struct half *half, __u32 id)
{
	struct half *reply = half->role == ROLE_REPLY ? half : other_half(half, id);
	__u32 was;

	if (!reply)
		return false;
	was = swap_life(reply, LIFE_ENDING, LIFE_LIVE);
	if (was != LIFE_ENDING && was != LIFE_LIVE)
		return false;
	half->ending = false;
	if (was == LIFE_ENDING)
		count(FLOWS_REVIVED);
	return true;
}

/* The half that a packet with this tuple belongs to, or false. peek: only look, the packet is
 * not one of the flow (an ICMP error neither refreshes nor revives: RFC 5508 REQ-6).
 */
static __always_inline bool half_find(const struct tuple *key, struct found *f, bool peek)
{
	struct half *half = bpf_map_lookup_elem(&flows, key);
	__u32 guard;

	if (!half)
		return false;
	tuple_invert(&f->to, &half->other);
	f->id = half->id;
	guard = half->guard;
	if (guard != half_guard(key, &f->to, f->id))
		return false;
	if (!rule_current(half->rule, half->generation))
		return false;
	if (!peek && half->ending && !flow_revive(half, f->id))
		return false;
	f->half = half;
	return true;
}

/* Whether a packet that came in by that device may present the half's tuple: a tuple alone is
 * easily forged by another container, or from outside.
 */
static __always_inline bool half_accepts(const struct half *half, enum device_class class,
					 __u32 ifindex)
{
	return half->class == class && (!half->ifindex || half->ifindex == ifindex);
}

/* A SYN on a tuple whose connection is closed begins a new flow. */
static __always_inline bool opens_anew(const struct packet *p, const struct found *f)
{
	struct half *other;

	if (p->h.tuple.proto != IPPROTO_TCP || (p->h.tcp & (TCP_SYN | TCP_ACK)) != TCP_SYN)
		return false;
	other = other_half(f->half, f->id);
	return other && flow_closed(f->half, other);
}

/* Several CPUs may carry packets of one direction: the sums are atomic, the rest is written
 * only when it changes, which is seldom enough.
 */
static __always_inline void half_see(const struct packet *p, struct half *half)
{
	__u32 segments = p->skb->gso_segs;
	__u8 tcp;

	__sync_fetch_and_add(&half->packets, segments ? segments : 1);
	__sync_fetch_and_add(&half->bytes, p->skb->len);
	if (half->seen != p->now)
		half->seen = p->now;
	if (p->h.tuple.proto != IPPROTO_TCP)
		return;
	tcp = half->tcp;
	if (p->h.tcp & TCP_RST)
		tcp |= TCP_SEEN_RST;
	else
		tcp &= ~TCP_SEEN_RST;
	if (p->h.tcp & TCP_SYN)
		tcp |= TCP_SEEN_SYN;
	else
		tcp |= TCP_SEEN_ACK;
	if (p->h.tcp & TCP_FIN)
		tcp |= TCP_SEEN_FIN;
	if (tcp != half->tcp)
		half->tcp = tcp;
}
