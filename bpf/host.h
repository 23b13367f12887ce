/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* host.h - the host's own sockets and published ports. Packets of the host to itself pass no device
 * of ours, so the translation is done where a socket is told whom to talk to: from there on it
 * talks to the container, and its packets need none. The kernel picks a source address for the
 * container's bridge, since routing comes after.
 *
 * A cgroup has sockets of every network namespace in it; only those of the instance's own count.
 */
#pragma once

#include "backend.h"
#include "rule.h"

#define AF_INET 2

/* What an application named, and where that leads. */
struct host_call {
	struct tuple to; /* its source is what the socket is bound to, zero where to nothing */
	struct dnat_match match;
	struct host_peer_key key;
	struct host_peer peer;
};

/* False for sockets that are none of the instance's. */
static __always_inline bool host_begin(struct bpf_sock_addr *ctx)
{
	const struct config *c;
	__u32 zero = 0;

	c = bpf_map_lookup_elem(&config, &zero);
	return c && c->live && bpf_get_netns_cookie(ctx) == c->netns_cookie;
}

/* The last word of 127.0.0.1 or ::1. */
static __always_inline __be32 localhost(enum family family)
{
	return family == FAMILY_IPV4 ? bpf_htonl(0x7f000001) : bpf_htonl(1);
}

static __always_inline bool addr_is_unspecified(const struct addr *a, enum family family)
{
	return !a->word[3] && !a->word[0] && !a->word[1] && (family == FAMILY_IPV4 || !a->word[2]);
}

/* Of 127.0.0.0/8 the first address alone: at others, such as 127.0.0.53, resolvers listen that a
 * rule for port 53 of every address is not to hide.
 */
static __always_inline bool is_host_address(const struct addr *a, enum family family)
{
	if (addr_is_loopback(a, family) && a->word[3] == localhost(family))
		return true;
	return bpf_map_lookup_elem(&host_addresses, a);
}

/* A socket that is bound to a loopback address, or to another device, cannot reach the container:
 * it is left to what listens on the host, as if the port were not published.
 */
static __always_inline bool host_can_reach(struct bpf_sock_addr *ctx, const struct tuple *to,
					   const struct addr *target)
{
	enum family family = addr_is_v4_mapped(target) ? FAMILY_IPV4 : FAMILY_IPV6;
	struct bpf_sock *sk = ctx->sk;

	if (!sk || (sk->bound_dev_if && sk->bound_dev_if != bridge_of(target)))
		return false;
	if (addr_is_unspecified(&to->src, FAMILY_IPV6))
		return true;
	return addr_is_v4_mapped(&to->src) == (family == FAMILY_IPV4) &&
	       (addr_is_unspecified(&to->src, family) || !addr_is_loopback(&to->src, family));
}

/* The rule for what the socket names. An IPv6 address of the host leads to containers that have
 * IPv4 alone, too: by v4-mapped addresses, which a socket can only be connected to.
 */
static __always_inline bool host_rule(struct host_call *call, bool connects)
{
	struct tuple *to = &call->to;

	if (addr_is_unspecified(&to->dst, to->family)) /* the kernel takes it for loopback */
		to->dst.word[3] = localhost(to->family);
	call->peer.published = to->dst;
	if (dnat_find(to, 0, &call->match))
		return !call->match.any || is_host_address(&to->dst, to->family);
	if (to->family == FAMILY_IPV4 || !connects || !is_host_address(&to->dst, FAMILY_IPV6))
		return false;
	to->family = FAMILY_IPV4;
	addr_from_ipv4(&to->dst, 0);
	return dnat_find(to, 0, &call->match);
}

/* Notes what the container's address stands for to this socket. */
static __always_inline bool host_note(struct host_call *call)
{
	struct host_peer *have = bpf_map_lookup_elem(&host_peers, &call->key);

	if (have && have->rule == call->peer.rule && have->generation == call->peer.generation &&
	    have->port == call->peer.port && addr_equal(&have->published, &call->peer.published)) {
		if (call->peer.connected)
			have->connected = 1;
		return true;
	}
	return !bpf_map_update_elem(&host_peers, &call->key, &call->peer, BPF_ANY);
}

/* Fills in call->key with the container's address and port where the socket is to go there. The
 * caller has filled in call->to.
 */
static __always_inline bool host_translate(struct bpf_sock_addr *ctx, struct host_call *call,
					   bool connects)
{
	const struct dnat_rule *rule = &call->match.rule;
	__u64 cookie = bpf_get_socket_cookie(ctx);

	if ((call->to.proto != IPPROTO_TCP && call->to.proto != IPPROTO_UDP) ||
	    !host_rule(call, connects))
		return false;
	/* a socket keeps to one backend, whatever it sends */
	if (rule->flags & DNAT_BACKENDS &&
	    !backend_choose(&call->match, &call->key.addr, mix(0, cookie) >> 32))
		return false;
	if (!host_can_reach(ctx, &call->to, &rule->to))
		return false;
	call->peer.port = call->to.dport;
	call->peer.connected = connects;
	call->peer.rule = call->match.maker;
	call->peer.generation = rule->generation;
	call->key.addr = rule->to;
	call->key.port = dnat_port(rule, call->to.dport);
	call->key.cookie = cookie;
	return host_note(call);
}

static __always_inline void host_call_ipv4(struct bpf_sock_addr *ctx, struct host_call *call)
{
	addr_from_ipv4(&call->to.dst, ctx->user_ip4);
	call->to.dport = ctx->user_port;
	call->to.family = FAMILY_IPV4;
	call->to.proto = ctx->protocol;
}

static __always_inline void host_call_ipv6(struct bpf_sock_addr *ctx, struct host_call *call)
{
	call->to.dst.word[0] = ctx->user_ip6[0];
	call->to.dst.word[1] = ctx->user_ip6[1];
	call->to.dst.word[2] = ctx->user_ip6[2];
	call->to.dst.word[3] = ctx->user_ip6[3];
	call->to.dport = ctx->user_port;
	call->to.family = addr_is_v4_mapped(&call->to.dst) ? FAMILY_IPV4 : FAMILY_IPV6;
	call->to.proto = ctx->protocol;
}

static __always_inline void host_name_ipv4(struct bpf_sock_addr *ctx, const struct addr *addr,
					   __be16 port)
{
	ctx->user_ip4 = addr->word[3];
	ctx->user_port = port;
}

static __always_inline void host_name_ipv6(struct bpf_sock_addr *ctx, const struct addr *addr,
					   __be16 port)
{
	ctx->user_ip6[0] = addr->word[0];
	ctx->user_ip6[1] = addr->word[1];
	ctx->user_ip6[2] = addr->word[2];
	ctx->user_ip6[3] = addr->word[3];
	ctx->user_port = port;
}

static __always_inline void host_connect_ipv4(struct bpf_sock_addr *ctx)
{
	struct host_call call = {};

	if (!host_begin(ctx) || !ctx->sk)
		return;
	host_call_ipv4(ctx, &call);
	addr_from_ipv4(&call.to.src, ctx->sk->src_ip4);
	if (host_translate(ctx, &call, true))
		host_name_ipv4(ctx, &call.key.addr, call.key.port);
}

static __always_inline void host_connect_ipv6(struct bpf_sock_addr *ctx)
{
	struct host_call call = {};

	if (!host_begin(ctx) || !ctx->sk)
		return;
	host_call_ipv6(ctx, &call);
	call.to.src.word[0] = ctx->sk->src_ip6[0];
	call.to.src.word[1] = ctx->sk->src_ip6[1];
	call.to.src.word[2] = ctx->sk->src_ip6[2];
	call.to.src.word[3] = ctx->sk->src_ip6[3];
	if (host_translate(ctx, &call, true))
		host_name_ipv6(ctx, &call.key.addr, call.key.port);
}

/* A datagram's source may be named with it, else it is what the socket is bound to. */
static __always_inline void host_send_ipv4(struct bpf_sock_addr *ctx)
{
	struct host_call call = {};

	if (!host_begin(ctx))
		return;
	host_call_ipv4(ctx, &call);
	addr_from_ipv4(&call.to.src, ctx->msg_src_ip4);
	if (host_translate(ctx, &call, false))
		host_name_ipv4(ctx, &call.key.addr, call.key.port);
}

static __always_inline void host_send_ipv6(struct bpf_sock_addr *ctx)
{
	struct host_call call = {};

	if (!host_begin(ctx))
		return;
	host_call_ipv6(ctx, &call);
	call.to.src.word[0] = ctx->msg_src_ip6[0];
	call.to.src.word[1] = ctx->msg_src_ip6[1];
	call.to.src.word[2] = ctx->msg_src_ip6[2];
	call.to.src.word[3] = ctx->msg_src_ip6[3];
	if (host_translate(ctx, &call, false))
		host_name_ipv6(ctx, &call.key.addr, call.key.port);
}

/* The published address that the socket named, where it reads of the container's: the source of a
 * datagram, or its peer.
 */
static __always_inline const struct host_peer *host_published(struct bpf_sock_addr *ctx,
							      const struct host_call *call)
{
	struct host_peer_key key = {
		.cookie = bpf_get_socket_cookie(ctx),
		.addr = call->to.dst,
		.port = call->to.dport,
	};

	return bpf_map_lookup_elem(&host_peers, &key);
}

static __always_inline void host_read_ipv4(struct bpf_sock_addr *ctx)
{
	const struct host_peer *peer;
	struct host_call call = {};

	if (!host_begin(ctx))
		return;
	host_call_ipv4(ctx, &call);
	peer = host_published(ctx, &call);
	if (peer)
		host_name_ipv4(ctx, &peer->published, peer->port);
}

static __always_inline void host_read_ipv6(struct bpf_sock_addr *ctx)
{
	const struct host_peer *peer;
	struct host_call call = {};

	if (!host_begin(ctx))
		return;
	host_call_ipv6(ctx, &call);
	peer = host_published(ctx, &call);
	if (peer)
		host_name_ipv6(ctx, &peer->published, peer->port);
}

/* A connected socket's entry goes with it, so that the table holds the live ones. */
static __always_inline void host_close(struct bpf_sock *sk)
{
	struct host_peer_key key = {};
	const struct config *c;
	__u32 zero = 0;

	key.port = sk->dst_port;
	c = bpf_map_lookup_elem(&config, &zero);
	if (!key.port || !c || !c->live || bpf_get_netns_cookie(sk) != c->netns_cookie)
		return;
	if (sk->family == AF_INET) {
		addr_from_ipv4(&key.addr, sk->dst_ip4);
	} else {
		key.addr.word[0] = sk->dst_ip6[0];
		key.addr.word[1] = sk->dst_ip6[1];
		key.addr.word[2] = sk->dst_ip6[2];
		key.addr.word[3] = sk->dst_ip6[3];
	}
	key.cookie = bpf_get_socket_cookie(sk);
	bpf_map_delete_elem(&host_peers, &key);
}
