//go:build ignore

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* nat.bpf.c - the entry programs, and nothing else. Each is named for what it sees: from_ is
 * TC ingress of the device, to_ is TC egress.
 *
 * In the host's stack a hook before routing (from_) changes destinations only, a hook after
 * routing (to_) sources only: a packet with a source address of the host's own would be a
 * martian to the routing in between (fib_validate_source).
 */
#include "bridge.h"
#include "expiry.h"
#include "uplink.h"

#define ETHERNET       14
#define NO_LINK_HEADER 0

SEC("tc") int from_bridge(struct __sk_buff *skb)
{
	struct packet p = {};

	if (!packet_begin(&p, skb))
		return TC_ACT_UNSPEC;
	return finish(&p, bridge_ingress(&p, ETHERNET));
}

SEC("tc") int to_bridge(struct __sk_buff *skb)
{
	struct packet p = {};

	if (!packet_begin(&p, skb))
		return TC_ACT_UNSPEC;
	return finish(&p, bridge_egress(&p, ETHERNET));
}

SEC("tc") int from_uplink(struct __sk_buff *skb)
{
	struct packet p = {};

	if (!packet_begin(&p, skb))
		return TC_ACT_UNSPEC;
	return finish(&p, uplink_ingress(&p, ETHERNET));
}

SEC("tc") int to_uplink(struct __sk_buff *skb)
{
	struct packet p = {};

	if (!packet_begin(&p, skb))
		return TC_ACT_UNSPEC;
	return finish(&p, uplink_egress(&p, ETHERNET));
}

/* Uplinks without a link header: tun, WireGuard, PPP. */
SEC("tc") int from_uplink_l3(struct __sk_buff *skb)
{
	struct packet p = {};

	if (!packet_begin(&p, skb))
		return TC_ACT_UNSPEC;
	return finish(&p, uplink_ingress(&p, NO_LINK_HEADER));
}

SEC("tc") int to_uplink_l3(struct __sk_buff *skb)
{
	struct packet p = {};

	if (!packet_begin(&p, skb))
		return TC_ACT_UNSPEC;
	return finish(&p, uplink_egress(&p, NO_LINK_HEADER));
}

/* Run once by the loader, after each load and upgrade: 0 when the timer runs. */
SEC("tc") int start_expiry(struct __sk_buff *skb)
{
	(void)skb;
	return expiry_start() ? 0 : 1;
}

/* Run by the loader to end one flow at once: 0 ended, 1 not there. A generation that no rule
 * has makes every packet, and the expiry, take the flow for over.
 */
SEC("syscall") int end_flow(struct expiry_entry *which)
{
	struct half *reply, *original;
	struct tuple key = which->claim;

	reply = bpf_map_lookup_elem(&flows, &key);
	if (!reply || reply->id != which->id)
		return 1;
	key = reply->other;
	reply->generation = GENERATION_ENDED;
	original = bpf_map_lookup_elem(&flows, &key);
	if (original && original->id == which->id)
		original->generation = GENERATION_ENDED;
	return 0;
}

/* bpf2go makes Go constants of the enums that BTF has: these two are no field's type. */
#define EMIT(type) asm volatile("" ::"r"(__builtin_btf_type_id(*(type *)0, 0)))

SEC("syscall") int abi(void *context)
{
	(void)context;
	EMIT(enum counter);
	EMIT(enum timeout);
	return ABI_VERSION;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
