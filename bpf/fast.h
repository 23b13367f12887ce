/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* fast.h - the fast path: a packet whose direction has a lease is translated, given the link
 * header of its lease, and redirected, in one program, past the host's stack.
 *
 * Here each nanosecond counts, so unlike elsewhere headers are read and written in place. That
 * needs them in the linear part of the packet, and the verifier's prologue unshares it
 * (bpf_unclone_prologue). What does not look plain at once goes the long way, where it is
 * looked at properly: this file refuses nothing and reports nothing.
 */
#pragma once

#include "lease.h"
#include "rewrite.h"

struct fast {
	struct tuple from;
	struct tuple to; /* what the packet leaves as */
	struct lease lease;
	__u32 length; /* what must not be over the MTU: the packet's or, if it is cut, a segment's */
};

static __always_inline __u64 sum_add(__u64 sum, __u32 from, __u32 to)
{
	return sum + (__u32)~from + to;
}

static __always_inline __u32 sum_fold32(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (sum & 0xffffffff) + (sum >> 32);
}

static __always_inline __sum16 sum_fold16(__u64 sum)
{
	__u32 folded = sum_fold32(sum);

	folded = (folded & 0xffff) + (folded >> 16);
	return ~((folded & 0xffff) + (folded >> 16));
}

/* Over a header without options: a good one folds to 0 (RFC 1812 section 5.2.2). */
static __always_inline __u64 sum_ipv4(const struct iphdr *ip)
{
	const __u32 *word = (const void *)ip;

	return (__u64)word[0] + word[1] + word[2] + word[3] + word[4];
}

static __always_inline __u64 sum_addr(__u64 sum, const struct addr *from, const struct addr *to,
				      bool v4)
{
	if (!v4) {
		sum = sum_add(sum, from->word[0], to->word[0]);
		sum = sum_add(sum, from->word[1], to->word[1]);
		sum = sum_add(sum, from->word[2], to->word[2]);
	}
	return sum_add(sum, from->word[3], to->word[3]);
}

/* The packet's tuple, if it is as plain as is_plain() has it. */
static __always_inline bool fast_parse(struct packet *p, struct fast *fast, __u32 l3, bool v4)
{
	struct tuple *key = &fast->from;
	struct __sk_buff *skb = p->skb;
	const __u32 l4 = l3 + (v4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr));
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	const __be16 *port;
	__u32 header = 8;

	if (data + l4 + 8 > end) {
		/* some drivers leave the headers in fragments of the packet */
		if (bpf_skb_pull_data(skb, l4 + sizeof(struct tcphdr)))
			return false;
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
		if (data + l4 + 8 > end)
			return false;
	}
	port = data + l4;
	if (v4) {
		const struct iphdr *ip = data + l3;

		if (*(__u8 *)ip != 0x45 || ip->frag_off & bpf_htons(0x3fff) || ip->ttl <= 1 ||
		    sum_fold16(sum_ipv4(ip)))
			return false;
		fast->length = bpf_ntohs(ip->tot_len);
		addr_from_ipv4(&key->src, ip->saddr);
		addr_from_ipv4(&key->dst, ip->daddr);
		key->family = FAMILY_IPV4;
		key->proto = ip->protocol;
	} else {
		const struct ipv6hdr *ip = data + l3;

		if ((*(__u8 *)ip >> 4) != 6 || ip->hop_limit <= 1)
			return false;
		fast->length = sizeof(*ip) + bpf_ntohs(ip->payload_len);
		__builtin_memcpy(&key->src, &ip->saddr, sizeof(key->src));
		__builtin_memcpy(&key->dst, &ip->daddr, sizeof(key->dst));
		key->family = FAMILY_IPV6;
		key->proto = ip->nexthdr;
	}
	if (l3 + fast->length > skb->len)
		return false;
	key->sport = port[0];
	key->dport = port[1];
	key->pad = 0;
	if (key->proto == IPPROTO_TCP) {
		const __u8 *bits = data + l4 + 12;

		if (data + l4 + sizeof(struct tcphdr) > end ||
		    bits[1] & (TCP_SYN | TCP_FIN | TCP_RST))
			return false;
		header = (bits[0] >> 4) * 4;
		if (header < sizeof(struct tcphdr))
			return false;
	} else if (key->proto != IPPROTO_UDP) {
		return false;
	}
	if (fast->length < l4 - l3 + header)
		return false;
	if (skb->gso_size)
		fast->length = l4 - l3 + header + skb->gso_size;
	return true;
}

/* What the flow's half says, besides its lease: as half_find() and half_accepts() have it. TCP
 * that has not seen the end of the handshake, or an RST, has states to change.
 */
static __always_inline bool fast_find(struct packet *p, struct fast *fast, enum device_class class)
{
	const struct tuple *key = &fast->from;
	struct half *half = bpf_map_lookup_elem(&flows, key);

	p->absent = !half;
	if (!half)
		return false;
	/* all that is used of the half is read before the guard says that it was ours */
	p->id = half->standing.id;
	fast->lease = lease_of(half);
	tuple_invert(&fast->to, &half->other);
	if (*(volatile __u32 *)&half->guard != half_guard(key, &fast->to, p->id) ||
	    !half_is_live(half) || half->class != class ||
	    !rule_current(half->rule, half->generation))
		return false;
	if (key->proto == IPPROTO_TCP &&
	    (half->tcp & (TCP_SEEN_ACK | TCP_SEEN_RST)) != TCP_SEEN_ACK)
		return false;
	p->half = half;
	return true;
}

/* Whether the packet came in where the lease says: a tuple is easily forged. */
static __always_inline bool fast_admits(const struct packet *p, __u32 in, enum device_class class)
{
	const struct adjacency *input = adjacency_get(in);
	const __u8 *data = (void *)(long)p->skb->data;

	if (!input || input->ifindex != p->skb->ifindex)
		return false;
	if (class == CLASS_UPLINK)
		return true;
	return (void *)data + ETHERNET <= (void *)(long)p->skb->data_end &&
	       mac_equal(data, input->local) && mac_equal(data + 6, input->remote);
}

/* Gives the packet its new tuple, one hop less and its link header, all in place. */
static __always_inline enum verdict fast_rewrite(struct packet *p, const struct fast *fast,
						 __u32 l3, bool v4)
{
	const struct tuple *from = &fast->from, *to = &fast->to;
	const struct adjacency *output = p->output;
	struct __sk_buff *skb = p->skb;
	const __u32 l4 = l3 + (v4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr));
	const bool udp = from->proto == IPPROTO_UDP;
	const __u32 check = l4 + (udp ? 6 : offsetof(struct tcphdr, check));
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__be32 old_ports, new_ports;
	__u64 addrs, flags = 0;
	__be32 *ports;
	long err;

	if (data + l4 + 8 > end)
		return GO_ON;
	ports = data + l4;
	old_ports = *ports;
	((__be16 *)&new_ports)[0] = to->sport;
	((__be16 *)&new_ports)[1] = to->dport;
	/* without a checksum nothing makes up for the ports in skb->csum */
	if (udp && old_ports != new_ports && !*(__sum16 *)(data + l4 + 6))
		return GO_ON;

	addrs = sum_addr(0, &from->src, &to->src, v4);
	addrs = sum_addr(addrs, &from->dst, &to->dst, v4);
	if (v4) {
		struct iphdr *ip = data + l3;
		__be16 *hops = (void *)&ip->ttl, was = *hops;

		ip->ttl--;
		ip->saddr = to->src.word[3];
		ip->daddr = to->dst.word[3];
		ip->check = sum_fold16(addrs + (__u16)~ip->check + (__u16)~was + *hops);
	} else {
		struct ipv6hdr *ip = data + l3;
		__be16 *hops = (void *)&ip->nexthdr, was = *hops;

		ip->hop_limit--;
		__builtin_memcpy(&ip->saddr, &to->src, sizeof(to->src));
		__builtin_memcpy(&ip->daddr, &to->dst, sizeof(to->dst));
		/* of what CHECKSUM_COMPLETE has summed up: see rewrite.h */
		bpf_csum_update(skb, sum_fold32(addrs + (__u16)~was + *hops));
	}
	*ports = new_ports;
	if (l3 && !(output->flags & ADJACENCY_L3)) {
		struct ethhdr *ethernet = data;

		__builtin_memcpy(ethernet->h_dest, output->remote, ETH_ALEN);
		__builtin_memcpy(ethernet->h_source, output->local, ETH_ALEN);
		ethernet->h_proto = output->protocol;
	}
	if (udp)
		flags = BPF_F_MARK_MANGLED_0;
	err = bpf_l4_csum_replace(skb, check, 0, sum_fold32(addrs), flags | BPF_F_PSEUDO_HDR);
	if (old_ports != new_ports)
		err |= bpf_l4_csum_replace(skb, check, old_ports, new_ports, flags | 4);
	return err ? drop(p, DROP_REWRITE) : REDIRECT;
}

/* A device without link headers leads to one that has them. */
static __always_inline bool fast_push_ethernet(struct packet *p, const struct adjacency *output)
{
	struct ethhdr header;

	__builtin_memcpy(header.h_dest, output->remote, ETH_ALEN);
	__builtin_memcpy(header.h_source, output->local, ETH_ALEN);
	header.h_proto = output->protocol;
	return !bpf_skb_change_head(p->skb, ETHERNET, 0) &&
	       !bpf_skb_store_bytes(p->skb, 0, &header, sizeof(header), 0);
}

static __always_inline enum verdict fast_forward(struct packet *p, enum device_class class,
						 __u32 l3, bool v4)
{
	__u32 length = p->skb->len;
	struct fast fast;
	enum verdict v;

	if (!fast_parse(p, &fast, l3, v4) || !fast_find(p, &fast, class) ||
	    !lease_holds(p, fast.lease) || !fast_admits(p, fast.lease.in, class))
		return GO_ON;
	p->output = adjacency_get(fast.lease.out);
	if (!p->output || fast.length > p->output->mtu)
		return GO_ON;
	v = fast_rewrite(p, &fast, l3, v4);
	if (v != REDIRECT)
		return v;
	if (p->output->flags & ADJACENCY_L3)
		length -= l3;
	half_count(p, p->half, length);
	if (!l3 && !(p->output->flags & ADJACENCY_L3)) {
		if (!fast_push_ethernet(p, p->output))
			return drop(p, DROP_REWRITE);
		length += ETHERNET;
	}
	if (p->output->flags & ADJACENCY_MARK)
		note_redirect(p, length);
	else
		p->skb->mark = 0; /* as on any other way into a namespace */
	return REDIRECT;
}

/* GO_ON: the packet is as it was. Whom the frame is for has been looked at, except at a port, where
 * the lease names the addresses.
 */
static __always_inline enum verdict fast_path(struct packet *p, enum device_class class, __u32 l3)
{
	p->half = NULL;
	/* the stack takes off a priority tag, a redirect would leave it on */
	if (!p->config->fast_path || p->skb->vlan_present)
		return GO_ON;
	if (p->skb->protocol == bpf_htons(ETH_P_IP))
		return fast_forward(p, class, l3, true);
	if (p->skb->protocol == bpf_htons(ETH_P_IPV6))
		return fast_forward(p, class, l3, false);
	return GO_ON;
}

/* Functions of their own, for the sake of the stack: 512 bytes for all that call each other. */
static __noinline enum verdict fast_from_bridge(struct packet *p)
{
	return fast_path(p, CLASS_BRIDGE, ETHERNET);
}

static __noinline enum verdict fast_from_uplink(struct packet *p)
{
	return fast_path(p, CLASS_UPLINK, ETHERNET);
}

static __noinline enum verdict fast_from_l3(struct packet *p)
{
	return fast_path(p, CLASS_UPLINK, NO_LINK_HEADER);
}
