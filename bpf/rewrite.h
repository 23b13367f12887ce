/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* rewrite.h - gives a packet another tuple; what an ICMP error quotes is written by icmp.h.
 *
 * The helpers pull and unshare what they write, so non-linear and cloned packets are fine,
 * and they know what ip_summed asks for:
 *  - CHECKSUM_PARTIAL: the field holds the pseudo header's sum; addresses change it, ports
 *    do not. Hence one call for the addresses (BPF_F_PSEUDO_HDR) and one for the ports.
 *  - CHECKSUM_COMPLETE: skb->csum must follow. BPF_F_PSEUDO_HDR corrects it as if an IPv4
 *    header checksum took up the address change. IPv6 has none, so its addresses are
 *    stored with BPF_F_RECOMPUTE_CSUM, which makes the sum right again on every kernel
 *    (BPF_F_IPV6 says the same since 6.16).
 */
#pragma once

#include <stddef.h>

#include "packet.h"
#include "sctp.h"
#include "tuple.h"

/* Offset of the transport checksum that is a sum, as SCTP's is not; 0: there is none. */
static __always_inline __u32 checksum_offset(const struct tuple *t)
{
	switch (t->proto) {
	case IPPROTO_TCP:
		return offsetof(struct tcphdr, check);
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
		return 6;
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return 2;
	}
	return 0;
}

static __always_inline __s64 addr_diff(const struct addr *from, const struct addr *to, __s64 seed)
{
	return bpf_csum_diff((__be32 *)from, sizeof(*from), (__be32 *)to, sizeof(*to), seed);
}

static __always_inline long store_addr(struct __sk_buff *skb, const struct headers *h, bool source,
				       const struct addr *to)
{
	if (h->tuple.family == FAMILY_IPV4)
		return bpf_skb_store_bytes(skb,
					   h->l3 + (source ? offsetof(struct iphdr, saddr)
							   : offsetof(struct iphdr, daddr)),
					   &to->word[3], 4, 0);
	return bpf_skb_store_bytes(skb,
				   h->l3 + (source ? offsetof(struct ipv6hdr, saddr)
						   : offsetof(struct ipv6hdr, daddr)),
				   to, sizeof(*to), BPF_F_RECOMPUTE_CSUM);
}

/* Addresses of the outer header, with every checksum that covers them. */
static __always_inline long write_addrs(struct __sk_buff *skb, const struct headers *h,
					const struct addr *src, const struct addr *dst)
{
	const struct tuple *from = &h->tuple;
	bool source = !addr_equal(&from->src, src);
	bool destination = !addr_equal(&from->dst, dst);
	__u32 check = checksum_offset(from);
	__u64 flags = BPF_F_PSEUDO_HDR;
	__s64 diff = 0;
	long err = 0;

	if (!source && !destination)
		return 0;
	if (source)
		diff = addr_diff(&from->src, src, diff);
	if (destination)
		diff = addr_diff(&from->dst, dst, diff);
	if (is_udp(from->proto))
		flags |= BPF_F_MARK_MANGLED_0; /* 0 is "none" and stays, a sum of 0 is ffff */
	/* a later fragment has no transport header; ICMP of IPv4 no pseudo header */
	if (check && h->fragment != FRAGMENT_LATER && from->proto != IPPROTO_ICMP)
		err |= bpf_l4_csum_replace(skb, h->l4 + check, 0, diff, flags);
	if (from->family == FAMILY_IPV4)
		err |= bpf_l3_csum_replace(skb, h->l3 + offsetof(struct iphdr, check), 0, diff, 0);
	if (source)
		err |= store_addr(skb, h, true, src);
	if (destination)
		err |= store_addr(skb, h, false, dst);
	return err;
}

/* The same for who needs no more: apart, and with what a function can be handed that is verified but once. */
__noinline long rewrite_headers_addrs(struct __sk_buff *skb, const struct headers *h,
				      const struct addr *src, const struct addr *dst)
{
	return h && src && dst ? write_addrs(skb, h, src, dst) : -1;
}

static __always_inline long rewrite_addrs(struct packet *p, const struct addr *src,
					  const struct addr *dst)
{
	return rewrite_headers_addrs(p->skb, &p->h, src, dst);
}

/* An echo's id is where its tuple has a port: the request's source, the reply's destination. */
static __always_inline __be16 echo_id(const struct tuple *t, bool request)
{
	return request ? t->sport : t->dport;
}

static __always_inline bool is_echo(const struct headers *h)
{
	return h->tuple.proto == IPPROTO_ICMP || h->tuple.proto == IPPROTO_ICMPV6;
}

static __always_inline bool is_echo_request(const struct headers *h)
{
	return h->icmp == (h->tuple.family == FAMILY_IPV4 ? ICMP_ECHO : ICMPV6_ECHO_REQUEST);
}

static __always_inline long write_ports(struct __sk_buff *skb, const struct headers *h,
					const struct tuple *to)
{
	const struct tuple *from = &h->tuple;
	__u32 check = h->l4 + checksum_offset(from);
	long err = 0;

	if (from->sport == to->sport && from->dport == to->dport)
		return 0;
	if (has_ports(from->proto)) {
		struct {
			__be16 sport;
			__be16 dport;
		} old = {from->sport, from->dport}, new = {to->sport, to->dport};
		__u64 flags = 0, store = 0;

		if (from->proto == IPPROTO_SCTP)
			return sctp_rewrite_ports(skb, h->l4, h->end - h->l4, *(__be32 *)&old,
						  *(__be32 *)&new);
		if (is_udp(from->proto)) {
			__be16 sum = 0;

			/* without a checksum nothing makes up for the ports in skb->csum */
			flags = BPF_F_MARK_MANGLED_0;
			err |= bpf_skb_load_bytes(skb, check, &sum, sizeof(sum));
			if (!sum)
				store = BPF_F_RECOMPUTE_CSUM;
		}

		err |= bpf_l4_csum_replace(skb, check, *(__be32 *)&old, *(__be32 *)&new, flags | 4);
		err |= bpf_skb_store_bytes(skb, h->l4, &new, sizeof(new), store);
	} else {
		bool request = is_echo_request(h);
		__be16 old = echo_id(from, request), new = echo_id(to, request);

		err |= bpf_l4_csum_replace(skb, check, old, new, 2);
		err |= bpf_skb_store_bytes(skb, h->l4 + 4, &new, sizeof(new), 0);
	}
	return err;
}

enum rewritten {
	REWRITTEN,
	REWRITTEN_NOT, /* a write failed: nobody knows what the packet looks like */
	REWRITTEN_CRC, /* what a CRC changes by depends on bytes that are in other fragments */
};

__noinline enum rewritten rewrite_headers(struct __sk_buff *skb, const struct headers *h,
					  const struct tuple *to)
{
	if (!h || !to)
		return REWRITTEN_NOT;
	if (h->tuple.proto == IPPROTO_SCTP && h->fragment != FRAGMENT_NONE &&
	    (h->tuple.sport != to->sport || h->tuple.dport != to->dport))
		return REWRITTEN_CRC;
	if (write_addrs(skb, h, &to->src, &to->dst) ||
	    (h->fragment != FRAGMENT_LATER && write_ports(skb, h, to)))
		return REWRITTEN_NOT;
	return REWRITTEN;
}

/* Gives the packet another tuple; a later fragment has no ports. */
static __noinline enum verdict rewrite(struct packet *p, const struct tuple *to)
{
	enum rewritten done = rewrite_headers(p->skb, &p->h, to);

	if (done == REWRITTEN)
		return PASS;
	return drop(p, done == REWRITTEN_CRC ? DROP_FRAGMENT : DROP_REWRITE);
}
