/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* fragment.h - fragments of datagrams. Only the first has the ports, so at each hook it is treated like a
 * whole packet, and leaves in the map fragments what the others lack. Those are then treated like packets
 * of that tuple, of which only the addresses are written: the transport checksum is in the first, and its
 * change is known there.
 *
 * A later fragment that comes before its first is held: TC cannot keep a packet, so it is copied
 * to held_fragments. When the first has been through, the program turns its own packet into each of
 * the held ones, sends a clone to the hook that it is on, where it is an ordinary later fragment, and
 * turns the packet back. On egress this program runs within itself then.
 *
 * Two CPUs may have the first and a later one at the same time. Each writes what it has and looks for
 * the other's then, so one of them sees both.
 */
#pragma once

#include "packet.h"
#include "parse.h"
#include "tuple.h"

/* RFC 6146 section 4: FRAGMENT_MIN is 2 seconds. */
#define FRAGMENT_STAMPS (2000000000ULL >> STAMP_SHIFT)
#define HELD_SWEEP	(250000000ULL >> STAMP_SHIFT)

struct fragment_scratch {
	struct held_key key; /* key.datagram: of the fragment at hand */
	struct datagram entry;
	__u32 taken; /* for the full barrier */
	struct held_fragment held;
	__u8 first[HELD_BYTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct fragment_scratch);
} fragment_scratches SEC(".maps");

static __always_inline struct fragment_scratch *fragment_scratch_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&fragment_scratches, &zero);
}

/* Fills in the key of the fragment's datagram. */
static __always_inline bool fragment_name(struct __sk_buff *skb, const struct headers *h,
					  __u32 hook, struct datagram_key *key, struct part *part)
{
	if (!parse_part(skb, h, part))
		return false;
	key->src = h->tuple.src;
	key->dst = h->tuple.dst;
	key->id = part->id;
	key->ifindex = hook == HOOK_UPLINK ? 0 : skb->ifindex;
	key->hook = hook;
	key->family = h->tuple.family;
	key->proto = h->tuple.family == FAMILY_IPV4 ? h->tuple.proto : 0;
	key->pad = 0;
	return true;
}

static __always_inline __u32 fragment_guard(const struct datagram_key *key, __u64 word)
{
	const __u64 *k = (const void *)key;
	__u64 hash = word;

	for (int i = 0; i < (int)(sizeof(*key) / sizeof(*k)); i++)
		hash = mix(hash, k[i]);
	return hash >> 32;
}

/* Copies what the datagram's first fragment has shown; false: it has not come, or long ago. */
static __always_inline bool fragment_read(const struct datagram_key *key, struct datagram *to,
					  __u32 now)
{
	struct datagram *e = bpf_map_lookup_elem(&fragments, key);

	if (!e)
		return false;
	*(__u64 *)to = *(volatile __u64 *)e;
	if (*(volatile __u32 *)&e->guard != fragment_guard(key, *(__u64 *)to) ||
	    !is_within(now, e->stamp, FRAGMENT_STAMPS))
		return false;
	e->stamp = now;
	return true;
}

/* What becomes of a later fragment. scratch->entry has the rest. */
__noinline enum fragment_fate fragment_find(struct __sk_buff *skb, const struct headers *h,
					    __u32 hook, __u32 now)
{
	struct fragment_scratch *s = fragment_scratch_get();
	struct part part;

	if (!h || !s || !fragment_name(skb, h, hook, &s->key.datagram, &part))
		return FATE_REFUSED;
	if (!fragment_read(&s->key.datagram, &s->entry, now))
		return FATE_UNKNOWN;
	/* RFC 3128, RFC 5722: it would replace what has been looked at in the first */
	if (part.offset < s->entry.length)
		return FATE_REFUSED;
	return s->entry.fate;
}

/* Notes what a first fragment has shown, and what became of it. */
__noinline int fragment_note(struct __sk_buff *skb, const struct headers *h, __u32 hook, __u32 now,
			     enum fragment_fate fate)
{
	struct fragment_scratch *s = fragment_scratch_get();
	struct part part;

	if (!h || !s || !fragment_name(skb, h, hook, &s->key.datagram, &part))
		return 0;
	s->entry.sport = h->tuple.sport;
	s->entry.dport = h->tuple.dport;
	s->entry.length = part.length;
	s->entry.proto = h->tuple.proto;
	s->entry.fate = fate;
	s->entry.guard = fragment_guard(&s->key.datagram, *(__u64 *)&s->entry);
	s->entry.stamp = now;
	bpf_map_update_elem(&fragments, &s->key.datagram, &s->entry, 0);
	return 0;
}

/* Makes the caller the one who deletes the element. It may have been recycled since it was
 * looked up, and be another fragment's.
 */
static __always_inline bool held_take(struct held_fragment *held, const struct held_key *key)
{
	__u32 token = bpf_get_prandom_u32() | 1;
	struct held_fragment *is;

	if (__sync_val_compare_and_swap(&held->taken, 0, token))
		return false;
	is = bpf_map_lookup_elem(&held_fragments, key);
	if (is && *(volatile __u32 *)&is->taken == token)
		return true;
	*(volatile __u32 *)&held->taken = 0;
	return false;
}

enum hold {
	HOLD_DONE,
	HOLD_NO_ROOM,
	HOLD_LATE, /* the first has come meanwhile */
};

/* Copies the packet from its IP header on. The bounds are looked at where they are used: the compiler may
 * not do it earlier or both at once, or the verifier of 6.1 does not see it.
 */
static __always_inline long fragment_load(struct __sk_buff *skb, __u32 l3, __u8 *to, __u32 length)
{
	asm volatile("" : "+r"(length));
	if (length > HELD_BYTES)
		return -1;
	asm volatile("" : "+r"(length));
	if (length < sizeof(struct iphdr))
		return -1;
	return bpf_skb_load_bytes(skb, l3, to, length);
}

/* Holds the fragment that fragment_find() has just named. */
__noinline enum hold fragment_hold(struct __sk_buff *skb, const struct headers *h, __u32 now)
{
	struct fragment_scratch *s = fragment_scratch_get();
	struct held_fragment *held;
	__u32 length;
	long err = -1;

	if (!h || !s)
		return HOLD_NO_ROOM;
	length = h->end - h->l3;
	if (fragment_load(skb, h->l3, s->held.packet, length))
		return HOLD_NO_ROOM;
	s->held.taken = 0;
	s->held.stamp = now;
	s->held.length = length;
	for (__u32 slot = 0; slot < HELD_SLOTS && err; slot++) {
		s->key.slot = slot;
		err = bpf_map_update_elem(&held_fragments, &s->key, &s->held, BPF_NOEXIST);
	}
	if (err)
		return HOLD_NO_ROOM;
	/* an atomic operation with a result orders all memory accesses around it */
	asm volatile("" ::"r"(__sync_fetch_and_add(&s->taken, 0)) : "memory");
	if (!fragment_read(&s->key.datagram, &s->entry, now))
		return HOLD_DONE;
	held = bpf_map_lookup_elem(&held_fragments, &s->key);
	if (!held || !held_take(held, &s->key))
		return HOLD_DONE; /* its first has taken it along */
	bpf_map_delete_elem(&held_fragments, &s->key);
	return HOLD_LATE;
}

/* Makes the packet another one, from its IP header on. */
static __always_inline long fragment_turn(struct __sk_buff *skb, __u32 l3, const __u8 *packet,
					  __u32 length)
{
	if (skb->len != l3 + length && bpf_skb_change_tail(skb, l3 + length, 0))
		return -1;
	asm volatile("" : "+r"(length));
	if (length > HELD_BYTES)
		return -1;
	asm volatile("" : "+r"(length));
	if (length < sizeof(struct iphdr))
		return -1;
	return bpf_skb_store_bytes(skb, l3, packet, length, 0);
}

/* Sends on what waits for the first fragment that fragment_note() has just noted. Not 0: the packet
 * is not what it was.
 */
__noinline long fragment_release(struct __sk_buff *skb, __u32 l3, __u32 hook)
{
	struct fragment_scratch *s = fragment_scratch_get();
	__u32 length = skb->len - l3;
	bool turned = false;
	struct held_fragment *held;
	long err;

	if (!s)
		return 0;
	asm volatile("" ::"r"(__sync_fetch_and_add(&s->taken, 0)) : "memory");
	for (__u32 slot = 0; slot < HELD_SLOTS; slot++) {
		s->key.slot = slot;
		held = bpf_map_lookup_elem(&held_fragments, &s->key);
		if (!held || !held_take(held, &s->key))
			continue;
		err = 0;
		if (!turned) {
			err = fragment_load(skb, l3, s->first, length);
			/* what the device says of the first's checksum does not hold for others: this
			 * makes the kernel forget it, CHECKSUM_COMPLETE by the cut
			 */
			if (!err)
				bpf_csum_level(skb, BPF_CSUM_LEVEL_RESET);
			if (!err)
				err = bpf_skb_change_tail(skb, l3 + length - 1, 0);
			turned = !err;
		}
		if (!err)
			err = fragment_turn(skb, l3, held->packet, held->length);
		bpf_map_delete_elem(&held_fragments, &s->key);
		if (!err)
			err = bpf_clone_redirect(skb, skb->ifindex,
						 hook & HOOK_EGRESS ? 0 : BPF_F_INGRESS);
		count(err < 0 ? DROP_FRAGMENT_NO_ROOM : FRAGMENTS_RELEASED);
	}
	return turned ? fragment_turn(skb, l3, s->first, length) : 0;
}

/* What waits for the first fragment that fragment_note() has just noted, and was refused. */
__noinline int fragment_discard(void)
{
	struct fragment_scratch *s = fragment_scratch_get();
	struct held_fragment *held;

	if (!s)
		return 0;
	asm volatile("" ::"r"(__sync_fetch_and_add(&s->taken, 0)) : "memory");
	for (__u32 slot = 0; slot < HELD_SLOTS; slot++) {
		s->key.slot = slot;
		held = bpf_map_lookup_elem(&held_fragments, &s->key);
		if (!held || !held_take(held, &s->key))
			continue;
		bpf_map_delete_elem(&held_fragments, &s->key);
		count(DROP_FRAGMENT);
	}
	return 0;
}

/* What the protocol field of a later fragment says, where we translate what is behind it. With
 * IPv6 that may be another extension header.
 */
static __always_inline bool is_carried(const struct headers *h)
{
	__u8 proto = h->tuple.proto;

	if (has_ports(proto))
		return true;
	return h->tuple.family == FAMILY_IPV4 ? proto == IPPROTO_ICMP
					      : proto == IPPROTO_ICMPV6 || proto == IPPROTO_DSTOPTS;
}

/* GO_ON: a later fragment whose first has been seen has the tuple of its datagram now. */
static __noinline enum verdict fragment_begin(struct packet *p, __u32 hook)
{
	struct fragment_scratch *s;

	if (p->h.fragment != FRAGMENT_LATER || !is_carried(&p->h))
		return GO_ON;
	p->h.fate = fragment_find(p->skb, &p->h, hook, p->now);
	if (p->h.fate == FATE_REFUSED)
		return drop(p, DROP_FRAGMENT);
	s = fragment_scratch_get();
	if (p->h.fate == FATE_UNKNOWN || !s)
		return GO_ON;
	p->h.tuple.sport = s->entry.sport;
	p->h.tuple.dport = s->entry.dport;
	p->h.tuple.proto = s->entry.proto;
	p->h.kind = KIND_FLOW;
	return GO_ON;
}

static __always_inline bool is_early(const struct packet *p)
{
	return p->h.fragment == FRAGMENT_LATER && p->h.fate == FATE_UNKNOWN && is_carried(&p->h);
}

/* A later fragment that fragment_begin() found nothing of waits for its first. spare: what becomes of it
 * when there is no room. GO_ON: the first has come meanwhile.
 */
static __noinline enum verdict fragment_wait(struct packet *p, __u32 hook, enum verdict spare)
{
	enum hold hold = fragment_hold(p->skb, &p->h, p->now);
	enum verdict v;

	if (hold == HOLD_DONE)
		return drop(p, FRAGMENTS_HELD); /* a copy goes on */
	if (hold == HOLD_LATE) {
		v = fragment_begin(p, hook);
		if (v != GO_ON || p->h.fate != FATE_UNKNOWN)
			return v;
	}
	return spare == DROP ? drop(p, DROP_FRAGMENT_NO_ROOM) : spare;
}

/* After a first fragment; v is what became of it. */
static __noinline enum verdict fragment_end(struct packet *p, enum verdict v, __u32 hook)
{
	enum fragment_fate fate = v == DROP ? FATE_REFUSED : p->h.fate ? p->h.fate : FATE_CARRIED;

	fragment_note(p->skb, &p->h, hook, p->now, fate);
	if (v == DROP) {
		fragment_discard();
		return v;
	}
	return fragment_release(p->skb, p->h.l3, hook) ? drop(p, DROP_REWRITE) : v;
}

/* Deletes what has waited in vain. */
static long held_sweep(void *map, const struct held_key *key, struct held_fragment *held,
		       __u32 *now)
{
	(void)map;
	if (is_within(*now, held->stamp, FRAGMENT_STAMPS) || !held_take(held, key))
		return 0;
	bpf_map_delete_elem(&held_fragments, key);
	count(DROP_FRAGMENT_ALONE);
	return 0;
}
