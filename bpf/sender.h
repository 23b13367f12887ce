/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* sender.h - who a container's packet is from: whether its addresses are its own, and which adjacency
 * a lease would have to name for it. The answers are kept as recent.h says.
 */
#pragma once

#include "lease.h"
#include "recent.h"

/* A container's address, with the Ethernet address that may use it. */
struct sender {
	struct addr addr;
	__u8 mac[6];
	__u16 in; /* adjacency, or enum unleased */
	__u32 bridge;
	__u32 stamp;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, RECENT);
	__type(key, __u32);
	__type(value, struct sender);
} senders SEC(".maps");

static __always_inline __u32 sender_input(const struct packet *p)
{
	return p->config->fast_path ? lease_input(p) : UNLEASED_DEVICE;
}

static __always_inline struct sender *sender_slot(const struct addr *addr)
{
	__u32 slot = (addr_hash(addr, 0) >> 32) % RECENT;

	return bpf_map_lookup_elem(&senders, &slot);
}

static __always_inline bool is_recent_sender(const struct packet *p, const struct sender *s,
					     const struct addr *addr, __u32 bridge)
{
	return s->bridge == bridge && is_within(p->now, s->stamp, RECENT_STAMPS) &&
	       addr_equal(&s->addr, addr);
}

/* The bridge whose container has the address, as bridge_of(), when the packet came by from. */
static __always_inline __u32 bridge_of_sender(const struct packet *p, const struct addr *addr,
					      __u32 from)
{
	const struct sender *s = from ? sender_slot(addr) : NULL;

	return s && is_recent_sender(p, s, addr, from) ? from : bridge_of(addr);
}

/* GO_ON when a container of p->bridge may send with the packet's source address, from the frame's: it
 * is in the bridge's subnets, and the host's neighbour table knows no other owner. p->in is then
 * set.
 */
static __noinline enum verdict check_sender(struct packet *p)
{
	const struct addr *addr = &p->h.tuple.src;
	struct sender *s = sender_slot(addr);
	__u8 mac[6];

	if (bpf_skb_load_bytes(p->skb, 6, mac, sizeof(mac)))
		return drop(p, DROP_MALFORMED);
	if (s && is_recent_sender(p, s, addr, p->bridge) && mac_equal(s->mac, mac)) {
		/* why it has none is not kept: the fast path may be on by now */
		p->in = adjacency_again(s->in, p->now) ? s->in : sender_input(p);
		return GO_ON;
	}
	if (bridge_of(addr) != p->bridge)
		return drop(p, DROP_SPOOFED_ADDRESS);
	if (is_foreign_mac(p, p->bridge, mac))
		return drop(p, DROP_SPOOFED_MAC);
	p->in = sender_input(p);
	if (s) {
		s->addr = *addr;
		__builtin_memcpy(s->mac, mac, sizeof(s->mac));
		s->in = p->in;
		s->bridge = p->bridge;
		s->stamp = p->now;
	}
	return GO_ON;
}
