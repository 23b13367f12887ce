/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* parse.h - from bytes to struct headers; the only file that knows header layouts.
 *
 * Headers are copied by bpf_skb_load_bytes, which reads non-linear packets too, and no
 * packet pointer is kept: nothing dangles after a later write.
 */
#pragma once

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>

#include "packet.h"
#include "sctp.h"
#include "tuple.h"

/* linux/icmp.h would bring in the C library. */
enum icmp_type {
	ICMP_ECHOREPLY = 0,
	ICMP_DEST_UNREACH = 3,
	ICMP_SOURCE_QUENCH = 4,
	ICMP_REDIRECT = 5,
	ICMP_ECHO = 8,
	ICMP_TIME_EXCEEDED = 11,
	ICMP_PARAMETERPROB = 12,
	ICMPV6_DEST_UNREACH = 1,
	ICMPV6_PARAMPROB = 4,
	ICMPV6_ECHO_REQUEST = 128,
	ICMPV6_ECHO_REPLY = 129,
	ICMPV6_REDIRECT = 137,
};

enum parsed {
	PARSED,
	PARSED_MALFORMED,
	PARSED_V4_MAPPED,
	PARSED_NOT_IP,
};

/* Extension headers that are walked before a packet counts as malformed. The kernel has no
 * such limit; RFC 8200 lets each occur once, destination options twice.
 */
#define EXTENSIONS_MAX 7

/* A quoted packet is cut short, by RFC 792 to 8 bytes behind its IP header: enough for the
 * ports and for an echo's id. Its lengths say nothing about what is there.
 */
static __always_inline enum parsed parse_transport(struct __sk_buff *skb, struct headers *h,
						   bool quoted)
{
	struct tuple *t = &h->tuple;

	h->kind = KIND_OTHER;
	h->tcp = 0;
	h->icmp = 0;
	t->sport = 0;
	t->dport = 0;
	if (h->fragment == FRAGMENT_LATER)
		return PARSED;

	if (has_ports(t->proto)) {
		struct {
			__be16 sport;
			__be16 dport;
		} ports;

		if (h->l4 + sizeof(ports) > h->end ||
		    bpf_skb_load_bytes(skb, h->l4, &ports, sizeof(ports)) < 0)
			return PARSED_MALFORMED;
		t->sport = ports.sport;
		t->dport = ports.dport;
		h->kind = KIND_FLOW;
		if (quoted)
			return PARSED;
		if (is_udp(t->proto))
			return h->l4 + 8 > h->end ? PARSED_MALFORMED : PARSED;
		if (t->proto == IPPROTO_SCTP) {
			int flags = sctp_flags(skb, h->l4, h->end);

			h->tcp = flags;
			return flags < 0 ? PARSED_MALFORMED : PARSED;
		}

		/* doff and the flags are bytes 12 and 13 */
		__u8 bits[2];

		if (h->l4 + sizeof(struct tcphdr) > h->end ||
		    bpf_skb_load_bytes(skb, h->l4 + 12, bits, sizeof(bits)) < 0)
			return PARSED_MALFORMED;
		/* a first fragment may end within the options, but not before the checksum and the
		 * flags (RFC 1858 section 3)
		 */
		if (bits[0] >> 4 < 5 ||
		    (h->fragment == FRAGMENT_NONE && h->l4 + (bits[0] >> 4) * 4 > h->end))
			return PARSED_MALFORMED;
		h->tcp = bits[1];
		return PARSED;
	}

	if ((t->family == FAMILY_IPV4 && t->proto == IPPROTO_ICMP) ||
	    (t->family == FAMILY_IPV6 && t->proto == IPPROTO_ICMPV6)) {
		struct {
			__u8 type;
			__u8 code;
			__sum16 checksum;
			__be16 id;
			__be16 sequence;
		} icmp;
		bool request, reply, error;

		if (h->l4 + sizeof(icmp) > h->end ||
		    bpf_skb_load_bytes(skb, h->l4, &icmp, sizeof(icmp)) < 0)
			return PARSED_MALFORMED;
		h->icmp = icmp.type;
		if (t->family == FAMILY_IPV4) {
			request = icmp.type == ICMP_ECHO;
			reply = icmp.type == ICMP_ECHOREPLY;
			error = icmp.type == ICMP_DEST_UNREACH || icmp.type == ICMP_SOURCE_QUENCH ||
				icmp.type == ICMP_TIME_EXCEEDED || icmp.type == ICMP_PARAMETERPROB;
		} else {
			request = icmp.type == ICMPV6_ECHO_REQUEST;
			reply = icmp.type == ICMPV6_ECHO_REPLY;
			error = icmp.type >= ICMPV6_DEST_UNREACH && icmp.type <= ICMPV6_PARAMPROB;
		}
		if (request || reply) {
			h->kind = KIND_FLOW;
			if (request)
				t->sport = icmp.id;
			else
				t->dport = icmp.id;
		} else if (error) {
			h->kind = KIND_ICMP_ERROR;
		}
	}
	return PARSED;
}

static __always_inline enum parsed parse_ipv4(struct __sk_buff *skb, struct headers *h, bool quoted)
{
	/* struct iphdr has bit fields, and the headers here are those of the build's host */
	struct {
		__u8 version; /* and length */
		__u8 tos;
		__be16 total;
		__be16 id;
		__be16 fragment;
		__u8 ttl;
		__u8 proto;
		__sum16 checksum;
		__be32 src;
		__be32 dst;
	} ip;
	__u32 total, header;
	__u16 fragment;

	if (bpf_skb_load_bytes(skb, h->l3, &ip, sizeof(ip)) < 0)
		return PARSED_MALFORMED;
	header = (ip.version & 15) * 4;
	total = bpf_ntohs(ip.total);
	if (ip.version >> 4 != 4 || header < sizeof(ip))
		return PARSED_MALFORMED;
	if (!quoted) {
		/* BIG TCP: a GSO packet over 64 KB has a length of 0 */
		if (!total && skb->gso_size)
			total = skb->len - h->l3;
		if (total < header || h->l3 + total > skb->len)
			return PARSED_MALFORMED;
		h->end = h->l3 + total;
	}
	addr_from_ipv4(&h->tuple.src, ip.src);
	addr_from_ipv4(&h->tuple.dst, ip.dst);
	h->tuple.family = FAMILY_IPV4;
	h->tuple.proto = ip.proto;
	h->tos = ip.tos;
	h->flow = 0;
	h->tuple.pad = 0;
	h->l4 = h->l3 + header;
	h->part = header / 4;
	fragment = bpf_ntohs(ip.fragment);
	h->fragment = fragment & 0x1fff	  ? FRAGMENT_LATER
		      : fragment & 0x2000 ? FRAGMENT_FIRST
					  : FRAGMENT_NONE;
	return parse_transport(skb, h, quoted);
}

static __always_inline enum parsed parse_ipv6(struct __sk_buff *skb, struct headers *h, bool quoted)
{
	struct {
		__be32 first; /* version, traffic class, flow label */
		__be16 payload;
		__u8 next;
		__u8 hops;
	} ip;
	__u8 next;
	__u32 at;

	if (bpf_skb_load_bytes(skb, h->l3, &ip, sizeof(ip)) < 0 || bpf_ntohl(ip.first) >> 28 != 6 ||
	    bpf_skb_load_bytes(skb, h->l3 + 8, &h->tuple.src, 2 * sizeof(struct addr)) < 0)
		return PARSED_MALFORMED;
	at = h->l3 + sizeof(struct ipv6hdr);
	if (!quoted) {
		__u32 payload = bpf_ntohs(ip.payload);

		/* BIG TCP has a length of 0, as in IPv4 */
		if (!payload && skb->gso_size)
			payload = skb->len - at;
		if (at + payload > skb->len)
			return PARSED_MALFORMED;
		h->end = at + payload;
	}
	if (addr_is_v4_mapped(&h->tuple.src) || addr_is_v4_mapped(&h->tuple.dst))
		return PARSED_V4_MAPPED;
	h->fragment = FRAGMENT_NONE;
	h->tos = 0;
	h->flow = ip.first & bpf_htonl(0x0fffffff);
	next = ip.next;
	for (int i = 0; i < EXTENSIONS_MAX; i++) {
		struct {
			__u8 next;
			__u8 length; /* in 8 bytes, the first not counted */
			__be16 offset;
		} extension;

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT)
			break;
		if (at + 8 > h->end ||
		    bpf_skb_load_bytes(skb, at, &extension, sizeof(extension)) < 0)
			return PARSED_MALFORMED;
		/* Segments left: the destination is not the last one, which the checksum of the
		 * transport header is made with (RFC 8200 section 8.1).
		 */
		if (next == IPPROTO_ROUTING && (extension.offset & bpf_htons(0x00ff)))
			return PARSED_MALFORMED;
		if (next == IPPROTO_FRAGMENT) {
			__u16 offset = bpf_ntohs(extension.offset);

			at += 8;
			/* a fragment of a fragment; or headers of a kilobyte before it */
			if (h->fragment != FRAGMENT_NONE || at - h->l3 > 4 * 0xff)
				return PARSED_MALFORMED;
			h->part = (at - h->l3) / 4;
			if (offset & 0xfff8)
				h->fragment = FRAGMENT_LATER;
			else if (offset & 1)
				h->fragment = FRAGMENT_FIRST;
		} else {
			at += (extension.length + 1) * 8;
		}
		next = extension.next;
		if (h->fragment == FRAGMENT_LATER)
			break;
	}
	if (next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS)
		if (h->fragment != FRAGMENT_LATER)
			return PARSED_MALFORMED;
	h->tuple.family = FAMILY_IPV6;
	h->tuple.proto = next;
	h->tuple.pad = 0;
	h->l4 = at;
	return parse_transport(skb, h, quoted);
}

#define ETHERNET       14
#define NO_LINK_HEADER 0

/* l3 is the length of the link header. */
__noinline enum parsed parse_headers(struct __sk_buff *skb, struct headers *h, __u32 l3)
{
	if (!h)
		return PARSED_MALFORMED;
	h->l3 = l3;
	h->fate = FATE_UNKNOWN;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return parse_ipv4(skb, h, false);
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return parse_ipv6(skb, h, false);
	return PARSED_NOT_IP;
}

static __always_inline enum parsed parse(struct packet *p, __u32 l3)
{
	return parse_headers(p->skb, &p->h, l3);
}

/* The packet that an ICMP error quotes. Behind its 8 bytes both families have it alike. */
__noinline enum parsed parse_quoted_headers(struct __sk_buff *skb, struct headers *quoted, bool v4)
{
	if (!quoted)
		return PARSED_MALFORMED;
	if (v4)
		return parse_ipv4(skb, quoted, true);
	return parse_ipv6(skb, quoted, true);
}

static __always_inline enum parsed parse_quoted(const struct packet *p, struct headers *quoted)
{
	quoted->l3 = p->h.l4 + 8;
	quoted->end = p->h.end;
	return parse_quoted_headers(p->skb, quoted, p->h.tuple.family == FAMILY_IPV4);
}

/* What a fragment is of its datagram. */
struct part {
	__be32 id;
	__u32 offset; /* in bytes */
	__u32 length;
};

static __always_inline bool parse_part(struct __sk_buff *skb, const struct headers *h,
				       struct part *part)
{
	__u32 begin = h->l3 + h->part * 4;
	struct {
		__be16 offset;
		__be32 id;
	} __attribute__((packed)) ipv6;
	struct {
		__be16 id;
		__be16 offset;
	} ipv4;

	if (h->end < begin)
		return false;
	part->length = h->end - begin;
	if (h->tuple.family == FAMILY_IPV4) {
		if (bpf_skb_load_bytes(skb, h->l3 + 4, &ipv4, sizeof(ipv4)))
			return false;
		part->id = ipv4.id;
		part->offset = (bpf_ntohs(ipv4.offset) & 0x1fff) * 8;
		return true;
	}
	if (bpf_skb_load_bytes(skb, begin - 6, &ipv6, sizeof(ipv6)))
		return false;
	part->id = ipv6.id;
	part->offset = bpf_ntohs(ipv6.offset) & 0xfff8;
	return true;
}

/* Neighbour discovery and multicast listener messages live on the link. */
static __always_inline bool is_link_icmp(const struct headers *h)
{
	return h->tuple.family == FAMILY_IPV6 && h->tuple.proto == IPPROTO_ICMPV6 &&
	       ((h->icmp >= 130 && h->icmp <= 137) || h->icmp == 143);
}

/* What stays on its link and is no business of a NAT (RFC 4291 section 2.5.6). */
static __always_inline bool is_local_scope(const struct headers *h)
{
	return addr_is_local_scope(&h->tuple.src, h->tuple.family) ||
	       addr_is_local_scope(&h->tuple.dst, h->tuple.family) || is_link_icmp(h);
}

static __always_inline bool is_loopback(const struct headers *h)
{
	return addr_is_loopback(&h->tuple.src, h->tuple.family) ||
	       addr_is_loopback(&h->tuple.dst, h->tuple.family);
}

/* A frame with a VLAN id belongs to a VLAN device; id 0 is a priority tag, which is ours. */
static __always_inline bool is_vlan(const struct __sk_buff *skb)
{
	return skb->vlan_present && (skb->vlan_tci & 0xfff);
}

#define PACKET_HOST 0
