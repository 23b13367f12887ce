/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* always.h - the fast path from a flow's first packet on (--fast-path always). The lease is not granted for
 * what the host's stack let through, but by its routing and neighbour tables, so the host's firewall
 * has no say. Where these have no complete answer the packet goes the long way.
 */
#pragma once

#include "create.h"
#include "fast.h"
#include "lease.h"
#include "open.h"
#include "stale.h"

static __always_inline bool is_always(const struct packet *p)
{
	return p->config->fast_path == FAST_PATH_ALWAYS && is_plain(&p->h);
}

/* The adjacency by which the host would send what came in by from, if it is on a device of that
 * class; 0: it would not, or does not know.
 */
static __noinline __u32 output_by_route(const struct packet *p, const struct addr *src,
					const struct addr *dst, __u32 from, enum device_class class)
{
	struct adjacency out = {.flags = ADJACENCY_MARK};
	const struct device *device, *input;
	struct bpf_fib_lookup fib;
	long result;
	__u32 port;

	result = fib_lookup(p, src, dst, from, 1, &fib, 0);
	if (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH)
		return 0;
	out.ifindex = fib.ifindex;
	device = bpf_map_lookup_elem(&devices, &out.ifindex);
	input = bpf_map_lookup_elem(&devices, &from);
	if (is_slow_device(device) || is_slow_device(input) || device->class != class ||
	    !p->config->mark)
		return 0;
	out.mtu = fib.mtu_result;
	if (device->flags & DEVICE_L3) {
		/* without a neighbour the route's is not told */
		if (result != BPF_FIB_LKUP_RET_SUCCESS)
			bpf_check_mtu(p->skb, out.ifindex, &out.mtu, -(__s32)p->skb->len, 0);
		out.flags |= ADJACENCY_L3;
		return adjacency_find(&out, p->now);
	}
	if (result != BPF_FIB_LKUP_RET_SUCCESS)
		return 0;
	__builtin_memcpy(out.remote, fib.dmac, sizeof(out.remote));
	__builtin_memcpy(out.local, fib.smac, sizeof(out.local));
	out.protocol = p->skb->protocol;
	if (class == CLASS_BRIDGE && !(input->flags & DEVICE_L3)) {
		port = output_port(p, out.ifindex, out.remote);
		if (port) {
			out.ifindex = port;
			out.flags = ADJACENCY_PEER;
		}
	}
	return adjacency_find(&out, p->now);
}

/* Leases the direction of a packet from the world. */
static __always_inline bool lease_at_once_inward(const struct packet *p, const struct found *f)
{
	struct adjacency in = {.ifindex = p->uplink};
	struct lease lease;
	__u32 out, from;

	lease = lease_of(f->half);
	if (!is_always(p) || lease_holds(p, lease))
		return false;
	out = output_by_route(p, &f->to.src, &f->to.dst, p->uplink, CLASS_BRIDGE);
	from = out ? adjacency_find(&in, p->now) : 0;
	if (!from)
		return false;
	lease_set(f->half, f->id, lease, out, from, p->now);
	return true;
}

/* fast_parse() has refused it otherwise: then it is the stack's, which drops it. */
static __always_inline bool is_sound(const struct packet *p)
{
	void *data = (void *)(long)p->skb->data, *end = (void *)(long)p->skb->data_end;
	const struct iphdr *ip;
	__u32 l3 = p->h.l3;

	if (p->h.tuple.family != FAMILY_IPV4)
		return true;
	if (l3 > ETHERNET)
		return false;
	ip = data + l3;
	return (void *)(ip + 1) <= end && !sum_fold16(sum_ipv4(ip));
}

/* A container's packet, whose addresses have been looked at: makes its flow where it has none, leases
 * its direction, and sends it. A TCP connection begins with a SYN, which is not plain.
 */
static __noinline enum verdict forward_at_once(struct packet *p, __u32 in)
{
	struct plan *plan = plan_get();
	const struct adjacency *output;
	struct found f;
	__u32 out;

	if (!is_always(p) || in < ADJACENCY_FIRST || !plan ||
	    (p->half &&
	     (p->half->translation == TRANSLATION_HAIRPIN || lease_holds(p, lease_of(p->half)))) ||
	    !is_sound(p))
		return GO_ON;
	out = output_by_route(p, &p->h.tuple.src, &p->h.tuple.dst, p->bridge, CLASS_UPLINK);
	output = out ? adjacency_get(out) : NULL;
	if (!output)
		return GO_ON;
	p->uplink = output->ifindex;
	leave_stale(p);
	if (!p->half) {
		/* what fails here fails at to_uplink again, which says why */
		if (p->h.tuple.proto != IPPROTO_UDP || open_outward(p) != GO_ON)
			return GO_ON;
		plan->lease.out = out;
		plan->lease.in = in;
		switch (flow_create(p->skb)) {
		case CREATED:
			return fast_from_bridge(p);
		case CREATED_BY_OTHERS:
			break;
		case CREATED_NOT:
			return GO_ON;
		}
		if (!half_find(&p->h.tuple, &f, false) ||
		    !half_accepts(f.half, CLASS_BRIDGE, p->bridge))
			return GO_ON;
		p->half = f.half;
		p->id = f.id;
	}
	lease_set(p->half, p->id, lease_of(p->half), out, in, p->now);
	return fast_from_bridge(p);
}
