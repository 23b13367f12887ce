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
	const __u64 *k = (const void *)key, *t = (const void *)to;
	/* Multilinear: nothing waits for the product before it, as in a chain it would. The
	 * factors are odd and have no meaning; nobody gains by choosing tuples that collide.
	 */
	__u64 hash = id * 0x9e3779b97f4a7c15ULL + k[0] * 0xbf58476d1ce4e5b9ULL +
		     k[1] * 0x94d049bb133111ebULL + k[2] * 0xd6e8feb86659fd93ULL +
		     k[3] * 0xff51afd7ed558ccdULL + k[4] * 0xc4ceb9fe1a85ec53ULL +
		     t[0] * 0x87c37b91114253d5ULL + t[1] * 0x4cf5ad432745937fULL +
		     t[2] * 0xe7037ed1a0b428dbULL + t[3] * 0x8ebc6af09c88c6e3ULL +
		     t[4] * 0x589965cc75374cc3ULL;

	return hash ^ hash >> 32;
}

static __always_inline __u32 new_guard(const struct tuple *key, const struct tuple *other, __u32 id)
{
	struct tuple to;

	tuple_invert(&to, other);
	return half_guard(key, &to, id);
}

struct found {
	struct half *half;
	struct tuple to; /* what a packet of this direction leaves as: the inverse of half->other */
	__u32 id;
	bool absent; /* there is no element at all */
};

static __always_inline struct half *other_half(struct half *half, __u32 id)
{
	struct half *other = bpf_map_lookup_elem(&flows, &half->other);

	return other && other->standing.id == id ? other : NULL;
}

/* The expiry thought that the flow is over, and this packet came before the second look. */
static __always_inline bool flow_revive(struct half *half, __u32 id)
{
	struct half *reply = half->role == ROLE_REPLY ? half : other_half(half, id);
	struct standing was;

	if (!reply)
		return false;
	was = standing_of(reply);
	if (was.life == LIFE_ENDING && was.id == id) {
		if (swap_life(reply, was, LIFE_LIVE))
			count(FLOWS_REVIVED);
		was = standing_of(reply); /* another packet may have been faster */
	}
	if (was.life != LIFE_LIVE || was.id != id)
		return false;
	was = standing_of(half);
	if (was.life == LIFE_ORIGINAL_ENDING && was.id == id)
		swap_life(half, was, LIFE_ORIGINAL);
	return true;
}

static __always_inline bool half_is_live(const struct half *half)
{
	return half->standing.life == LIFE_ORIGINAL || half->standing.life == LIFE_LIVE;
}

/* The half that a packet with this tuple belongs to, or false. peek: only look, the packet is
 * not one of the flow (an ICMP error neither refreshes nor revives: RFC 5508 REQ-6).
 */
static __always_inline bool half_find(const struct tuple *key, struct found *f, bool peek)
{
	struct half *half = bpf_map_lookup_elem(&flows, key);
	__u32 guard;

	f->half = NULL;
	f->absent = !half;
	if (!half)
		return false;
	tuple_invert(&f->to, &half->other);
	f->id = half->standing.id;
	guard = half->guard;
	if (guard != half_guard(key, &f->to, f->id))
		return false;
	if (!rule_current(half->rule, half->generation))
		return false;
	if (!peek && !half_is_live(half) && !flow_revive(half, f->id))
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

	if (!has_states(p->h.tuple.proto) || (p->h.tcp & (TCP_SYN | TCP_ACK)) != TCP_SYN)
		return false;
	other = other_half(f->half, f->id);
	return other && flow_closed(f->half, other);
}

/* What a segment shows, beside what its direction has shown so far. */
static __always_inline __u8 tcp_see(__u8 seen, __u8 flags)
{
	if (flags & TCP_RST)
		seen |= TCP_SEEN_RST;
	else
		seen &= ~TCP_SEEN_RST;
	if (flags & TCP_SYN)
		seen |= TCP_SEEN_SYN;
	else
		seen |= TCP_SEEN_ACK;
	if (flags & TCP_FIN)
		seen |= TCP_SEEN_FIN;
	return seen;
}

/* Several CPUs may carry packets of one direction: the sums are atomic, the rest is written
 * only when it changes, which is seldom enough.
 */
static __always_inline void half_count(const struct packet *p, struct half *half, __u32 length)
{
	__u32 segments = p->skb->gso_segs;

	__sync_fetch_and_add(&half->packets, segments ? segments : 1);
	__sync_fetch_and_add(&half->bytes, length);
	if (half->seen != p->now)
		half->seen = p->now;
}

static __always_inline void half_see(const struct packet *p, struct half *half)
{
	__u8 tcp;

	half_count(p, half, p->skb->len);
	if (!has_states(p->h.tuple.proto) || p->h.fragment == FRAGMENT_LATER)
		return;
	tcp = tcp_see(half->tcp, p->h.tcp);
	if (tcp != half->tcp)
		half->tcp = tcp;
}
