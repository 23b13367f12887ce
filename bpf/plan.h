/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* plan.h - a flow about to be made: what the rules chose, and what will be inserted. And what else
 * of a packet is too large for the stack.
 *
 * SNAT, DNAT and untranslated flows differ in what rules fill in here, not in how they are
 * made: the port that can be chosen is always the destination port of the reply tuple
 * (X:np of SNAT, W:np of DNAT), the preferred one always the original's source port.
 *
 * It lives in a per-CPU map. The stack has 512 bytes, and global functions, which the
 * verifier checks once and not for each way that leads to them, find it there: memory that
 * is handed to them may not be a map's key before kernel 6.2. Programs run with softirqs
 * off, so none interrupts another on its CPU.
 */
#pragma once

#include "packet.h"
#include "rule.h"
#include "tuple.h"

struct plan {
	struct dnat_match published; /* what rule.h found last */
	struct quote quote;
	__u64 fib[8]; /* scratch of route.h: a struct bpf_fib_lookup, which bpf2go cannot render */
	__u32 redirected; /* ifindex of the device that a packet was just sent to */
	__u32 length;	  /* of that packet */
	struct tuple original;
	struct expiry_entry entry; /* entry.claim: the reply tuple */
	struct half half;
	__u32 rule;
	__u32 generation;
	enum translation translation;
	enum device_class original_class;
	enum device_class reply_class;
	__u8 map;    /* one outside port per inside endpoint */
	__u8 target; /* it is begun to the outside port of a mapping */
	__u32 original_ifindex;
	__u32 reply_ifindex;
	__u32 uplink;
	__u32 pool; /* addresses that the claim's destination may be, from pool_first on; 0: one */
	__u32 nth;  /* of these, the endpoint's own */
	__be32 pool_first;
	__u16 first; /* ports that may be chosen, host order */
	__u16 last;
	__u8 outside;  /* the claim's destination is an address of the host */
	__u8 takeover; /* an ended flow with the same original tuple is replaced */
	enum held old_held;
	__u8 queued;   /* the expiry queue has the flow's entry already */
	__u8 absent;   /* nothing was found under the original tuple just now */
	__u8 tcp;      /* what the first packet shows */
	__u8 reversed; /* replaced is a flow that the other side had begun */
	__u16 leaves;  /* standing.uplink of the original half */
	__u32 packets; /* it is, and how long; 0: it is counted later */
	__u32 bytes;
	struct lease lease;	   /* of the original half, from the beginning */
	struct tuple old_claim;	   /* of that flow */
	struct tuple old_original; /* of a flow whose reply tuple it was */
	struct tuple transit;	   /* scratch */
	__u32 old_id;
	enum counter reason; /* why no flow was made */
	__u32 now;
};

_Static_assert(sizeof(((struct plan *)0)->fib) == sizeof(struct bpf_fib_lookup), "plan.fib");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct plan);
} plans SEC(".maps");

static __always_inline struct plan *plan_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&plans, &zero);
}

/* Makes the nth address of the pool the claim's destination. */
static __always_inline void pool_address(struct plan *plan, __u32 nth)
{
	plan->entry.claim.dst.word[3] = bpf_htonl(bpf_ntohl(plan->pool_first) + nth % plan->pool);
}

static __always_inline __u16 uplink_index(__u32 ifindex)
{
	return ifindex % UPLINK_INDEX + 1;
}

/* What the flow will hold. */
static __always_inline enum held plan_holds(const struct plan *plan)
{
	return (plan->map ? HELD_SOURCE : 0) | (plan->target ? HELD_TARGET : 0);
}

static __always_inline void plan_begin(const struct packet *p, struct plan *plan)
{
	plan->original = p->h.tuple;
	tuple_invert(&plan->entry.claim, &p->h.tuple);
	plan->uplink = p->uplink;
	plan->rule = 0;
	plan->generation = 0;
	plan->translation = TRANSLATION_IDENTITY;
	plan->map = false;
	plan->target = false;
	plan->pool = 0;
	plan->outside = false;
	plan->takeover = false;
	plan->reversed = false;
	plan->leaves = 0;
	plan->queued = false;
	plan->absent = p->absent;
	plan->packets = 0;
	plan->bytes = 0;
	plan->tcp = 0;
	plan->lease = (struct lease){.stamp = p->now};
	plan->reason = DROP_ENDING;
	plan->now = p->now;
	plan->first = plan->last = bpf_ntohs(p->h.tuple.sport);
}

/* Ports of the same class as the wanted one: below 512, below 1024, above (RFC 4787 REQ-3a and
 * RFC 6056; nf_nat_l4proto_unique_tuple has the same three). Echo ids have no classes.
 */
static __always_inline void plan_ports(struct plan *plan)
{
	__u16 wanted = bpf_ntohs(plan->original.sport);

	if (!has_ports(plan->original.proto)) {
		plan->first = 0;
		plan->last = 65535;
	} else if (wanted < 512) {
		plan->first = 1;
		plan->last = 511;
	} else if (wanted < 1024) {
		plan->first = 512;
		plan->last = 1023;
	} else {
		plan->first = 1024;
		plan->last = 65535;
	}
}
