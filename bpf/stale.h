/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* stale.h - flows of containers whose way to the world has changed under them: the host has lost the
 * address that masquerade gave them, or routes them by another uplink, where another address is due. They
 * end, and the packet that shows it begins anew, as if it were a flow's first one. So does nf_nat
 * (masq_inet_event, nf_nat_oif_changed); of TCP the peer knows nothing of the new connection, and resets it.
 *
 * Nobody tells the programs, so they ask: a flow's uplink at every packet of the slow path, which costs one
 * comparison; its address when the host has been asked anew about the flow, by guard_flow().
 */
#pragma once

#include "flow.h"
#include "lease.h"
#include "open.h"

#define LOCAL_STAMPS (250000000ULL >> STAMP_SHIFT)

/* An address of masquerade's that the host had a moment ago. */
struct local {
	struct addr addr;
	__u32 stamp;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 16);
	__type(key, __u32);
	__type(value, struct local);
} locals SEC(".maps");

static __noinline bool is_still_local(const struct packet *p, const struct addr *addr)
{
	__u32 slot = bpf_ntohl(addr->word[3]) % 16;
	struct local *local = bpf_map_lookup_elem(&locals, &slot);
	struct bpf_fib_lookup fib;

	if (local && is_within(p->now, local->stamp, LOCAL_STAMPS) &&
	    addr_equal(&local->addr, addr))
		return true;
	if (!is_local(p->skb, &p->h, p->uplink, addr, &fib))
		return false;
	if (local) {
		local->addr = *addr;
		local->stamp = p->now;
	}
	return true;
}

/* Whether what leaves by p->uplink now would be given the same as the flow has: port is its outside
 * one. uplink becomes what the flow's standing says from now on.
 */
static __noinline bool is_same_way(const struct packet *p, const struct half *half,
				   const struct addr *outside, __u16 *uplink)
{
	__u16 port = bpf_ntohs(half->other.dport);
	const struct snat_rule *rule;
	struct addr to;

	*uplink = uplink_index(p->uplink);
	rule = snat_find(p->config, &p->h.tuple.src, p->uplink);
	if (!rule && !(p->config->flags & CONFIG_ROUTED))
		return false;
	if (!rule ||
	    (rule->flags & SNAT_EXCEPT && rule_lists(p->config, rule->id, &p->h.tuple.dst)))
		return half->translation == TRANSLATION_IDENTITY;
	if (half->translation != TRANSLATION_SNAT)
		return false;
	if (rule->flags & SNAT_MASQUERADE) {
		*uplink |= UPLINK_MASQUERADE;
		if (!masquerade_address(p, &to) || !addr_equal(&to, outside))
			return false;
	} else if (!has_address(rule, outside)) {
		return false;
	}
	return !rule->port_first || (port >= rule->port_first && port <= rule->port_last);
}

/* The slow path: asks, notes the answer, or ends the flow. */
static __noinline bool check_way(const struct packet *p, struct half *half, __u32 id)
{
	struct standing was = standing_of(half), is;
	struct addr outside = half->other.dst;
	struct lease lease = lease_of(half);
	__u16 uplink = was.uplink;
	struct half *other;
	bool holds;

	if ((uplink & UPLINK_INDEX) == uplink_index(p->uplink))
		holds = is_still_local(p, &outside);
	else
		holds = is_same_way(p, half, &outside, &uplink);
	if (was.id != id)
		return true; /* the half was another's by now: this is its last packet */
	if (!holds) {
		forget_source(p);
		other = other_half(half, id);
		if (other)
			end_half(other, id);
		if (end_half(half, id))
			count(FLOWS_STALE);
		return false;
	}
	if (uplink != was.uplink) {
		is = was;
		is.uplink = uplink;
		__sync_val_compare_and_swap((__u64 *)&half->standing, *(__u64 *)&was,
					    *(__u64 *)&is);
	}
	/* or else lease_outward() notes that the host was asked */
	if (lease.out == UNLEASED && (!p->config->fast_path || !is_plain(&p->h) || !lease.in))
		lease_set(half, id, lease, UNLEASED_CHECKED, lease.in,
			  lease.in ? lease.stamp : p->now);
	return true;
}

/* Whether the flow, which has the packet's tuple, may go on by p->uplink. */
static __always_inline bool way_holds(const struct packet *p, struct half *half, __u32 id)
{
	__u16 uplink = half->standing.uplink;
	struct lease lease;

	if (!uplink)
		return true;
	if ((uplink & UPLINK_INDEX) == uplink_index(p->uplink)) {
		if (!(uplink & UPLINK_MASQUERADE))
			return true;
		lease = lease_of(half);
		if (lease.out != UNLEASED && lease_is_fresh(p, lease))
			return true;
	}
	return check_way(p, half, id);
}

/* The same of p->half, which is NULL where the packet begins anew. Apart, since the stack is short where
 * this is asked.
 */
static __noinline void leave_stale(struct packet *p)
{
	if (!p->half || way_holds(p, p->half, p->id))
		return;
	p->half = NULL;
	p->absent = false;
}
