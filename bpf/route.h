/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* route.h - what the host's routing says of a packet, and of an address. */
#pragma once

#include "packet.h"
#include "plan.h"

/* linux/bpf.h since 6.7; older kernels answer -EINVAL */
#define FIB_LOOKUP_SRC (1U << 4)

#define FIB_FAMILY_IPV4 2
#define FIB_FAMILY_IPV6 10

/* The loopback device: its own forwarding flag follows conf.all. */
#define LOOPBACK_IFINDEX 1

/* What the packet itself brings to a lookup: a function of its own, which is verified but once. */
__noinline int fib_fill(const struct headers *h, const struct addr *src, const struct addr *dst,
			struct bpf_fib_lookup *fib)
{
	if (!h || !src || !dst || !fib)
		return 0;
	fib->l4_protocol = h->tuple.proto;
	/* the kernel does not look for ports in fragments */
	if (has_ports(h->tuple.proto) && h->fragment == FRAGMENT_NONE) {
		fib->sport = h->tuple.sport;
		fib->dport = h->tuple.dport;
	}
	if (h->tuple.family == FAMILY_IPV4) {
		fib->family = FIB_FAMILY_IPV4;
		fib->tos = h->tos;
		fib->ipv4_src = src->word[3];
		fib->ipv4_dst = dst->word[3];
	} else {
		fib->family = FIB_FAMILY_IPV6;
		fib->flowinfo = h->flow; /* rules by class, multipath by label */
		__builtin_memcpy(fib->ipv6_src, src, sizeof(*src));
		__builtin_memcpy(fib->ipv6_dst, dst, sizeof(*dst));
	}
	return 0;
}

/* Looks up where the host sends what goes from src to dst, policy rules included. ifindex is the
 * device it came in by or, with BPF_FIB_LOOKUP_OUTPUT, leaves by. A length of 0 leaves the
 * MTU to whoever forwards; with another the route's is in mtu_result.
 */
static __always_inline long fib_ask(struct __sk_buff *skb, const struct headers *h,
				    const struct addr *src, const struct addr *dst, __u32 ifindex,
				    __u16 length, struct bpf_fib_lookup *fib, __u32 flags)
{
	__builtin_memset(fib, 0, sizeof(*fib));
	fib_fill(h, src, dst, fib);
	fib->ifindex = ifindex;
	fib->tot_len = length;
	return bpf_fib_lookup(skb, fib, sizeof(*fib), flags);
}

static __always_inline long fib_lookup(const struct packet *p, const struct addr *src,
				       const struct addr *dst, __u32 ifindex, __u16 length,
				       struct bpf_fib_lookup *fib, __u32 flags)
{
	return fib_ask(p->skb, &p->h, src, dst, ifindex, length, fib, flags);
}

enum route {
	ROUTE_LOCAL,   /* to the host itself, or the host knows no route */
	ROUTE_FORWARD, /* by *ifindex, 0 when the route does not name a device */
	ROUTE_NONE,    /* refused by a route, or forwarding is off: the kernel says so */
};

/* Where the host will send a packet that came in by this hook's device. The answer for a local
 * address is "not forwarded" (net/core/filter.c, bpf_ipv4_fib_lookup and
 * bpf_ipv6_fib_lookup: whatever is not RTN_UNICAST). What is not understood counts as
 * forwarded by an unknown device, so that guards fail closed. Not seen here: rules by
 * fwmark, since netfilter sets marks only later, and IPsec policies.
 */
__noinline enum route route_of_headers(struct __sk_buff *skb, const struct headers *h,
				       __u32 *ifindex)
{
	struct bpf_fib_lookup fib;
	const struct tuple *t;
	long result;

	if (!h || !ifindex)
		return ROUTE_NONE;
	t = &h->tuple;
	result = fib_ask(skb, h, &t->src, &t->dst, skb->ifindex, 0, &fib, 0);
	*ifindex = 0;
	if (result == BPF_FIB_LKUP_RET_FWD_DISABLED && t->family == FAMILY_IPV6) {
		/* IPv6 forwards by conf.all.forwarding, the helper asks the device's own flag.
		 * Asked for another device it tells what is local; which way the kernel
		 * would go it need not know, for want of the rules for this device.
		 */
		result = fib_ask(skb, h, &t->src, &t->dst, LOOPBACK_IFINDEX, 0, &fib, 0);
		fib.ifindex = 0;
	}
	switch (result) {
	case BPF_FIB_LKUP_RET_SUCCESS:
	case BPF_FIB_LKUP_RET_NO_NEIGH:
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		*ifindex = fib.ifindex;
		return ROUTE_FORWARD;
	case BPF_FIB_LKUP_RET_NOT_FWDED:
		return ROUTE_LOCAL;
	case BPF_FIB_LKUP_RET_BLACKHOLE:
	case BPF_FIB_LKUP_RET_UNREACHABLE:
	case BPF_FIB_LKUP_RET_PROHIBIT:
	case BPF_FIB_LKUP_RET_FWD_DISABLED:
		return ROUTE_NONE;
	default: /* an encapsulating route, among others */
		return ROUTE_FORWARD;
	}
}

static __always_inline enum route route_of(const struct packet *p, __u32 *ifindex)
{
	return route_of_headers(p->skb, &p->h, ifindex);
}

/* Whether the host still has an address that it had. fib is scratch. The answer for a local one is
 * "not forwarded", and so it is, on a host without a default route, where no route leads to it: then
 * it counts as there.
 */
static __always_inline bool is_local(struct __sk_buff *skb, const struct headers *h, __u32 uplink,
				     const struct addr *addr, struct bpf_fib_lookup *fib)
{
	long result = fib_ask(skb, h, &h->tuple.dst, addr, uplink, 0, fib, 0);

	if (result == BPF_FIB_LKUP_RET_FWD_DISABLED) /* as in route_of() */
		result = fib_ask(skb, h, &h->tuple.dst, addr, LOOPBACK_IFINDEX, 0, fib, 0);
	return result < 0 || result == BPF_FIB_LKUP_RET_NOT_FWDED ||
	       result == BPF_FIB_LKUP_RET_FWD_DISABLED;
}

/* The address that the host itself would use towards dst by the device (masquerade). The
 * kernel's own choice where it tells (6.7), so that new flows follow a changed address with no
 * process to notice it; before that the table that attach made, as long as the host has the address.
 */
__noinline bool source_address_of(struct __sk_buff *skb, const struct headers *h, __u32 ifindex,
				  struct addr *to)
{
	struct address_key key = {
		.prefixlen = sizeof(key) * 8 - 32,
		.ifindex = ifindex,
	};
	struct plan *plan = plan_get();
	struct bpf_fib_lookup *fib;
	const struct addr *address;
	long result;

	if (!plan || !h || !to)
		return false;
	key.dst = h->tuple.dst;
	fib = (void *)plan->fib; /* the stack is short where this is asked */
	result = fib_ask(skb, h, &h->tuple.src, &h->tuple.dst, ifindex, 0, fib,
			 BPF_FIB_LOOKUP_OUTPUT | FIB_LOOKUP_SRC);
	if (result == BPF_FIB_LKUP_RET_SUCCESS || result == BPF_FIB_LKUP_RET_NO_NEIGH ||
	    result == BPF_FIB_LKUP_RET_FRAG_NEEDED) {
		if (h->tuple.family == FAMILY_IPV4)
			addr_from_ipv4(to, fib->ipv4_src);
		else
			__builtin_memcpy(to, fib->ipv6_src, sizeof(*to));
		if (!addr_is_local_scope(to, h->tuple.family))
			return true;
	}
	address = bpf_map_lookup_elem(&addresses, &key);
	if (!address)
		return false;
	*to = *address;
	return is_local(skb, h, ifindex, to, fib);
}

static __always_inline bool source_address(const struct packet *p, __u32 ifindex, struct addr *to)
{
	return source_address_of(p->skb, &p->h, ifindex, to);
}

/* Whether the neighbour table knows another MAC for the packet's source than the frame has. */
static __always_inline bool is_foreign_mac(const struct packet *p, __u32 bridge, const __u8 *mac)
{
	struct bpf_fib_lookup fib;
	long result;

	/* past the policy rules, which may lead elsewhere: this asks who the neighbour is */
	result = fib_lookup(p, &p->h.tuple.dst, &p->h.tuple.src, bridge, 0, &fib,
			    BPF_FIB_LOOKUP_OUTPUT | BPF_FIB_LOOKUP_DIRECT);
	if ((result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_FRAG_NEEDED) ||
	    fib.ifindex != bridge)
		return false;
	return !mac_equal(mac, fib.dmac);
}

/* Which sockets of the host's own count. */
enum socket_kind {
	SOCKET_ANY,
	SOCKET_NOT_LISTENING, /* TCP: a connection that a container opens does not come their way */
	SOCKET_CONNECTED,     /* not a UDP socket that is only bound, either */
};

/* Whether a packet with this tuple is for a socket of the host's own. bpf_skc_lookup_tcp finds
 * connections in TIME_WAIT and half-open ones, too. For SCTP there is no such helper.
 */
__noinline bool host_has_socket(struct __sk_buff *skb, const struct tuple *t, enum socket_kind kind)
{
	struct bpf_sock_tuple tuple;
	struct bpf_sock *sock;
	__u32 size;
	bool has;

	if (!t)
		return false;
	if (t->family == FAMILY_IPV4) {
		tuple.ipv4.saddr = t->src.word[3];
		tuple.ipv4.daddr = t->dst.word[3];
		tuple.ipv4.sport = t->sport;
		tuple.ipv4.dport = t->dport;
		size = sizeof(tuple.ipv4);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, &t->src, sizeof(t->src));
		__builtin_memcpy(tuple.ipv6.daddr, &t->dst, sizeof(t->dst));
		tuple.ipv6.sport = t->sport;
		tuple.ipv6.dport = t->dport;
		size = sizeof(tuple.ipv6);
	}
	if (t->proto == IPPROTO_UDP) {
		sock = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
		if (!sock)
			return false;
		/* a connected UDP socket is in TCP's state of that name */
		has = kind != SOCKET_CONNECTED || sock->state == BPF_TCP_ESTABLISHED;
		bpf_sk_release(sock);
		return has;
	}
	if (t->proto != IPPROTO_TCP)
		return false;
	sock = bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!sock)
		return false;
	has = kind == SOCKET_ANY || sock->state != BPF_TCP_LISTEN;
	bpf_sk_release(sock);
	return has;
}
