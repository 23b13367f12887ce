//go:build ignore

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* nat.bpf.c - the entry programs, and nothing else. Each is named for what it sees: from_ is
 * TC ingress of the device, to_ is TC egress.
 *
 * In the host's stack a hook before routing (from_) changes destinations only, a hook after
 * routing (to_) sources only: a packet with a source address of the host's own would be a
 * martian to the routing in between (fib_validate_source).
 *
 * local_ are cgroup hooks of the host's own sockets.
 */
#include "bridge.h"
#include "expiry.h"
#include "host.h"
#include "uplink.h"

SEC("tc") int from_port(struct __sk_buff *skb)
{
	struct packet p = {};

	if (!packet_begin(&p, skb))
		return TC_ACT_UNSPEC;
	return finish(&p, port_ingress(&p, ETHERNET, false));
}

SEC("tc") int from_bridge(struct __sk_buff *skb)
{
	struct packet p = {};

	if (!packet_begin(&p, skb))
		return TC_ACT_UNSPEC;
	return finish(&p, bridge_ingress(&p, ETHERNET, false));
}

/* The same two for --fast-path always. */
SEC("tc") int from_port_first(struct __sk_buff *skb)
{
	struct packet p = {};

	if (!packet_begin(&p, skb))
		return TC_ACT_UNSPEC;
	return finish(&p, port_ingress(&p, ETHERNET, true));
}

SEC("tc") int from_bridge_first(struct __sk_buff *skb)
{
	struct packet p = {};

	if (!packet_begin(&p, skb))
		return TC_ACT_UNSPEC;
	return finish(&p, bridge_ingress(&p, ETHERNET, true));
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

/* The host's own sockets, by cgroup: whom they are told to talk to, and whom they hear from. */
SEC("cgroup/connect4") int local_connect4(struct bpf_sock_addr *ctx)
{
	host_connect_ipv4(ctx);
	return 1;
}

SEC("cgroup/connect6") int local_connect6(struct bpf_sock_addr *ctx)
{
	host_connect_ipv6(ctx);
	return 1;
}

SEC("cgroup/sendmsg4") int local_sendmsg4(struct bpf_sock_addr *ctx)
{
	host_send_ipv4(ctx);
	return 1;
}

SEC("cgroup/sendmsg6") int local_sendmsg6(struct bpf_sock_addr *ctx)
{
	host_send_ipv6(ctx);
	return 1;
}

SEC("cgroup/recvmsg4") int local_recvmsg4(struct bpf_sock_addr *ctx)
{
	host_read_ipv4(ctx);
	return 1;
}

SEC("cgroup/recvmsg6") int local_recvmsg6(struct bpf_sock_addr *ctx)
{
	host_read_ipv6(ctx);
	return 1;
}

SEC("cgroup/getpeername4") int local_getpeername4(struct bpf_sock_addr *ctx)
{
	host_read_ipv4(ctx);
	return 1;
}

SEC("cgroup/getpeername6") int local_getpeername6(struct bpf_sock_addr *ctx)
{
	host_read_ipv6(ctx);
	return 1;
}

SEC("cgroup/sock_release") int local_release(struct bpf_sock *sk)
{
	host_close(sk);
	return 1;
}

/* Run once by the loader, after each load and upgrade: 0 when the timer runs. */
SEC("tc") int start_expiry(struct __sk_buff *skb)
{
	(void)skb;
	return expiry_start() ? 0 : 1;
}

/* Run by the loader to end one flow at once: 0 ended, 1 not there. */
SEC("syscall") int end_flow(struct expiry_entry *which)
{
	struct tuple key = which->claim;
	struct half *half = bpf_map_lookup_elem(&flows, &key);

	if (!half || !end_half(half, which->id))
		return 1;
	key = half->other;
	half = bpf_map_lookup_elem(&flows, &key);
	if (half)
		end_half(half, which->id);
	return 0;
}

/* bpf2go makes Go constants of the enums that BTF has: these are no field's type. */
#define EMIT(type) asm volatile("" ::"r"(__builtin_btf_type_id(*(type *)0, 0)))

SEC("syscall") int abi(void *context)
{
	(void)context;
	EMIT(enum counter);
	EMIT(enum timeout);
	EMIT(enum unleased);
	EMIT(enum rules_word);
	EMIT(enum dnat_kind);
	EMIT(enum mapping_bits);
	EMIT(enum uplink_bits);
	return ABI_VERSION;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
