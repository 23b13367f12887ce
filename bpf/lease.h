/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* lease.h - who may take the fast path, and for how long.
 *
 * The host's routing, neighbours and firewall decide about a flow's packets as if there were no
 * fast path: to_uplink and to_bridge see what they let through, and grant that direction a
 * lease of a second and a half. When it has run out, one packet goes the long way again. So
 * whatever changes takes effect within two seconds, at the price of one slow packet in that
 * time and direction. A redirected packet grants nothing, or a lease would outlive the firewall rule
 * that should end it: the mark tells.
 */
#pragma once

#include "adjacency.h"
#include "dst.h"
#include "flow.h"
#include "guard.h"
#include "parse.h"
#include "plan.h"
#include "recent.h"

#define LEASE_STAMPS (1500000000ULL >> STAMP_SHIFT)

static __always_inline struct lease lease_of(const struct half *half)
{
	__u64 word = *(const volatile __u64 *)&half->lease;

	return *(struct lease *)&word;
}

/* The half's memory may have become another's since it was looked up, and routes are asked in
 * between: that other one's packets must not go where this lease leads.
 */
static __always_inline void lease_set(struct half *half, __u32 id, struct lease was, __u16 out,
				      __u16 in, __u32 stamp)
{
	struct lease lease = {.out = out, .in = in, .stamp = stamp};
	__u64 from = *(__u64 *)&was, to = *(__u64 *)&lease, *word = (__u64 *)&half->lease;

	if (__sync_val_compare_and_swap(word, from, to) == from &&
	    *(volatile __u32 *)&half->standing.id != id)
		__sync_val_compare_and_swap(word, to, 0);
}

static __always_inline bool lease_is_fresh(const struct packet *p, struct lease lease)
{
	return is_within(p->now, lease.stamp, LEASE_STAMPS);
}

static __always_inline bool lease_holds(const struct packet *p, struct lease lease)
{
	return lease.out >= ADJACENCY_FIRST && lease_is_fresh(p, lease);
}

/* The mark says that a program of ours has redirected the packet, so that its way is decided. But
 * anybody's rules may set marks, and whoever bears ours passes every guard; so there is a second
 * witness: the redirect happens on this CPU, before any other packet is seen.
 */
static __always_inline void note_redirect(const struct packet *p, __u32 length)
{
	struct plan *plan = plan_get();

	p->skb->mark |= p->config->mark;
	if (plan) {
		plan->redirected = p->output->ifindex;
		plan->length = length;
	}
}

static __always_inline bool is_redirected(const struct packet *p)
{
	struct plan *plan;

	if (!(p->skb->mark & p->config->mark))
		return false;
	plan = plan_get();
	if (!plan || plan->redirected != p->skb->ifindex || plan->length != p->skb->len)
		return false;
	plan->redirected = 0;
	p->skb->mark &= ~p->config->mark;
	return true;
}

/* Packets that may take the fast path: all else goes the long way, and grants nothing. Those that
 * begin or end a connection, since their flow's state and the host's firewall care; options,
 * extension headers and fragments, since the stack looks at them. SCTP, whose checksum takes longer
 * than the stack.
 */
static __always_inline bool is_plain(const struct headers *h)
{
	__u32 header = h->tuple.family == FAMILY_IPV4 ? sizeof(struct iphdr)
						      : sizeof(struct ipv6hdr);

	return h->kind == KIND_FLOW &&
	       (h->tuple.proto == IPPROTO_TCP || h->tuple.proto == IPPROTO_UDP) &&
	       h->fragment == FRAGMENT_NONE && h->l4 - h->l3 == header &&
	       !(h->tcp & (TCP_SYN | TCP_FIN | TCP_RST));
}

static __always_inline bool is_slow_device(const struct device *device)
{
	return !device || device->flags & DEVICE_SLOW;
}

/* Where the packet comes from, as seen by from_bridge: by the port that owns the sender's
 * address, where there is one with a program, else by the bridge.
 */
static __noinline __u32 lease_input(const struct packet *p)
{
	struct adjacency in = {.ifindex = p->skb->ifindex};
	struct port_key key = {.bridge = p->skb->ifindex};
	const struct device *device;
	__u32 *port, ifindex = p->skb->ifindex;

	device = bpf_map_lookup_elem(&devices, &ifindex);
	if (is_slow_device(device))
		return UNLEASED_DEVICE;
	if (bpf_skb_load_bytes(p->skb, 0, in.local, sizeof(in.local)) ||
	    bpf_skb_load_bytes(p->skb, 6, in.remote, sizeof(in.remote)))
		return UNLEASED_DEVICE;
	__builtin_memcpy(key.mac, in.remote, sizeof(key.mac));
	port = bpf_map_lookup_elem(&ports, &key);
	if (port) {
		in.ifindex = *port;
		device = bpf_map_lookup_elem(&devices, port);
		if (is_slow_device(device))
			return UNLEASED_DEVICE;
	}
	return adjacency_find(&in, p->now) ?: UNLEASED_NO_ROOM;
}

/* A neighbour that uses a container's address and ports must not ride on its flow's second. */
static __always_inline bool is_other_sender(const struct packet *p, __u32 in)
{
	const struct adjacency *input;
	__u8 mac[6];

	if (in < ADJACENCY_FIRST)
		return false;
	input = adjacency_get(in);
	return !input || bpf_skb_load_bytes(p->skb, 6, mac, sizeof(mac)) ||
	       !mac_equal(mac, input->remote);
}

/* Once a second a container's packet is looked at again: whether the host's routing still sends it
 * where it may go, and where it comes from.
 */
static __always_inline enum verdict guard_flow(struct packet *p)
{
	struct lease lease = lease_of(p->half);
	enum verdict v;

	if (lease.in && lease_is_fresh(p, lease) && !is_other_sender(p, lease.in))
		return PASS;
	v = guard_route(p);
	if (v == PASS)
		lease_set(p->half, p->id, lease, UNLEASED, p->in, p->now);
	return v;
}

/* The device's, or what the route to the destination says where that is less. */
static __always_inline __u32 output_mtu(const struct packet *p)
{
	const struct tuple *t = &p->h.tuple;
	struct bpf_fib_lookup fib;
	__u32 mtu = 0, route;

	/* asked for a packet of no length, it answers with the device's */
	bpf_check_mtu(p->skb, 0, &mtu, -(__s32)p->skb->len, 0);
	if (fib_lookup(p, &t->src, &t->dst, p->skb->ifindex, 1, &fib, BPF_FIB_LOOKUP_OUTPUT) ==
		    BPF_FIB_LKUP_RET_SUCCESS &&
	    fib.mtu_result && fib.mtu_result < mtu)
		mtu = fib.mtu_result;
	route = dst_mtu(p->skb);
	return route && route < mtu ? route : mtu;
}

/* The port that owns the address that the kernel has just put into the frame, as the bridge's own
 * table has it: packets go there straight, past the bridge. Not one that is gone: the kernel
 * would drop what is redirected to it, and nobody would know.
 */
static __always_inline __u32 output_port(const struct packet *p, __u32 bridge, const __u8 *mac)
{
	struct port_key key = {.bridge = bridge};
	const struct device *device;
	__u32 *port, mtu = 0;

	__builtin_memcpy(key.mac, mac, sizeof(key.mac));
	port = bpf_map_lookup_elem(&ports, &key);
	if (!port)
		return 0;
	device = bpf_map_lookup_elem(&devices, port);
	if (is_slow_device(device) || !(device->flags & DEVICE_PEER))
		return 0;
	return bpf_check_mtu(p->skb, *port, &mtu, -(__s32)p->skb->len, 0) < 0 ? 0 : *port;
}

/* Where this packet, which the host is about to send, goes. from: the device it came in by. */
static __noinline __u32 lease_output(const struct packet *p, __u32 from)
{
	struct adjacency out = {.ifindex = p->skb->ifindex, .flags = ADJACENCY_MARK};
	const struct device *device, *input;
	struct output *recent = output_slot(&p->h.tuple.dst);
	const struct adjacency *known;
	__u32 port, found;

	if (!p->h.l3)
		out.flags |= ADJACENCY_L3;
	else if (bpf_skb_load_bytes(p->skb, 0, out.remote, sizeof(out.remote)) ||
		 bpf_skb_load_bytes(p->skb, 6, out.local, sizeof(out.local)))
		return UNLEASED_DEVICE;
	if (recent && output_is_recent(p, recent)) {
		known = adjacency_again(recent->adjacency, p->now);
		if (known && mac_equal(known->remote, out.remote) &&
		    mac_equal(known->local, out.local))
			return recent->adjacency;
	}
	device = bpf_map_lookup_elem(&devices, &out.ifindex);
	input = bpf_map_lookup_elem(&devices, &from);
	if (is_slow_device(device) || is_slow_device(input) || !p->config->mark)
		return UNLEASED_DEVICE;
	out.mtu = output_mtu(p);
	if (p->h.l3)
		out.protocol = p->skb->protocol;
	/* what comes without a link header cannot go past the bridge */
	if (device->class == CLASS_BRIDGE && !(input->flags & DEVICE_L3)) {
		port = output_port(p, out.ifindex, out.remote);
		if (port) {
			out.ifindex = port;
			out.flags = ADJACENCY_PEER;
		}
	}
	found = adjacency_find(&out, p->now);
	if (!found)
		return UNLEASED_NO_ROOM;
	if (recent && device->class == CLASS_UPLINK)
		output_note(p, recent, found);
	return found;
}

/* At to_uplink, for a container's packet: from_bridge has noted where it comes from. */
static __always_inline void lease_outward(const struct packet *p, const struct found *f)
{
	struct lease lease = lease_of(f->half);
	__u32 out = lease.in;

	if (!p->config->fast_path || !is_plain(&p->h) || !lease.in ||
	    (lease.out != UNLEASED && lease.out != UNLEASED_CHECKED) || !lease_is_fresh(p, lease))
		return;
	if (lease.in >= ADJACENCY_FIRST)
		out = lease_output(p, p->skb->ingress_ifindex);
	lease_set(f->half, f->id, lease, out, lease.in, lease.stamp);
	if (out >= ADJACENCY_FIRST)
		count(LEASES_GRANTED);
}

/* At to_bridge, for a packet to a container; inside is the container's half. */
static __always_inline void lease_inward(const struct packet *p, const struct found *inside)
{
	struct adjacency in = {.ifindex = p->skb->ingress_ifindex};
	struct lease lease;
	struct half *half;
	__u32 out, from;

	if (!p->config->fast_path || !is_plain(&p->h))
		return;
	half = other_half(inside->half, inside->id);
	if (!half || half->class != CLASS_UPLINK)
		return;
	lease = lease_of(half);
	if (lease.out && lease_is_fresh(p, lease))
		return;
	out = lease_output(p, in.ifindex);
	from = out >= ADJACENCY_FIRST ? adjacency_find(&in, p->now) : 0;
	if (!from && out >= ADJACENCY_FIRST)
		out = UNLEASED_NO_ROOM;
	lease_set(half, inside->id, lease, out, from, p->now);
	if (out >= ADJACENCY_FIRST)
		count(LEASES_GRANTED);
}
