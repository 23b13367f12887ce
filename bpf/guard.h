/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* guard.h - what may leave a bridge, and what may enter it. */
#pragma once

#include "packet.h"
#include "plan.h"
#include "recent.h"
#include "route.h"
#include "rule.h"

static __always_inline bool is_bridge(__u32 ifindex)
{
	const struct device *device = bpf_map_lookup_elem(&devices, &ifindex);

	return device && device->class == CLASS_BRIDGE;
}

static __always_inline void note_unmanaged(__u32 ifindex)
{
	__u64 one = 1, *n = bpf_map_lookup_elem(&unmanaged, &ifindex);

	if (n)
		__sync_fetch_and_add(n, 1);
	else
		bpf_map_update_elem(&unmanaged, &ifindex, &one, BPF_NOEXIST);
}

/* Devices come and go without us, and one that has no programs would let a container's address
 * out. So the question is asked where every packet of a container passes: where will the
 * host send it? GO_ON: to itself.
 */
static __noinline enum verdict guard_route(struct packet *p)
{
	const struct device *device;
	__u32 ifindex = 0;

	switch (route_of(p, &ifindex)) {
	case ROUTE_LOCAL:
		return GO_ON;
	case ROUTE_NONE:
		return PASS;
	case ROUTE_FORWARD:
		break;
	}
	if (ifindex == p->skb->ifindex)
		return PASS;
	device = bpf_map_lookup_elem(&devices, &ifindex);
	if (!device) {
		if (p->config->flags & CONFIG_PASS_UNMANAGED)
			return PASS;
		if (ifindex)
			note_unmanaged(ifindex);
		return drop(p, DROP_NO_UPLINK);
	}
	if (device->class == CLASS_BRIDGE && !(p->config->flags & CONFIG_NO_ISOLATION))
		return drop(p, DROP_ISOLATED);
	return PASS;
}

/* The host routes a fragment without looking at ports or, where it tracks connections, the datagram: then
 * the first, without which there is none, must be allowed to go both ways.
 */
static __always_inline bool guards_datagram(struct packet *p)
{
	enum verdict v;

	if (p->h.fragment != FRAGMENT_FIRST)
		return true;
	p->h.fragment = FRAGMENT_NONE;
	v = guard_route(p);
	p->h.fragment = FRAGMENT_FIRST;
	return v != DROP;
}

/* What a device without from_uplink let in was translated by nobody. */
static __always_inline bool came_translated(const struct packet *p, const struct half *half)
{
	__u32 ifindex = p->skb->ingress_ifindex;
	const struct device *device;

	if (half->translation == TRANSLATION_IDENTITY)
		return true;
	device = bpf_map_lookup_elem(&devices, &ifindex);
	return device && device->class == CLASS_UPLINK;
}

/* What is of no flow, and not for the host, may not reach a container by its own address. At to_bridge
 * it could not be told from what was translated here.
 */
static __noinline enum verdict guard_inside(struct packet *p)
{
	__u32 ifindex;

	if (is_outside(p, &p->h.tuple.dst) ||
	    bpf_map_lookup_elem(&host_addresses, &p->h.tuple.dst) ||
	    route_of(p, &ifindex) == ROUTE_LOCAL)
		return PASS; /* the host's own, or forwarded for somebody else */
	return drop(p, DROP_NO_FLOW);
}
