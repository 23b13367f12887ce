/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* icmp.h - ICMP errors travel with the flow of the packet that they quote (RFC 5508 section 4).
 *
 * The quoted packet is one that we sent on: its inverse is the tuple of the half that the
 * error travels with, and what it looked like to the one who sent it is that half's other
 * tuple. So the quote becomes half->other, whatever kind of translation the flow has.
 */
#pragma once

#include "flow.h"
#include "parse.h"
#include "rewrite.h"

/* The quote's transport checksum, when it is there, is made right; it is never verified (REQ-3:
 * it may be missing, or of a packet that was cut). Everything in the quote is covered by
 * the ICMP checksum, so all changes are added up in quote->diff and applied to it once.
 *
 * In all that follows, leaves is the tuple that packets of the error's direction leave with,
 * and the quote becomes its inverse.
 */
static __always_inline long quote_addrs(struct packet *p, struct quote *q,
					const struct tuple *leaves)
{
	__s64 diff = addr_diff(&q->h.tuple.src, &leaves->dst, 0);
	__u32 l3 = q->h.l3;
	long err = 0;

	diff = addr_diff(&q->h.tuple.dst, &leaves->src, diff);
	if (q->h.tuple.family == FAMILY_IPV4) {
		/* addresses and header checksum cancel in the ICMP checksum */
		err |= bpf_l3_csum_replace(p->skb, l3 + offsetof(struct iphdr, check), 0, diff, 0);
		err |= bpf_skb_store_bytes(p->skb, l3 + offsetof(struct iphdr, saddr),
					   &leaves->dst.word[3], 4, 0);
		err |= bpf_skb_store_bytes(p->skb, l3 + offsetof(struct iphdr, daddr),
					   &leaves->src.word[3], 4, 0);
		return err;
	}
	q->diff = diff;
	err |= bpf_skb_store_bytes(p->skb, l3 + offsetof(struct ipv6hdr, saddr), &leaves->dst, 16,
				   0);
	err |= bpf_skb_store_bytes(p->skb, l3 + offsetof(struct ipv6hdr, daddr), &leaves->src, 16,
				   0);
	return err;
}

static __always_inline __be16 checksum_add(__be16 checksum, __s64 diff)
{
	__u64 sum = (__u64)(__u16)~checksum + (__u32)diff; /* before 6.13 diff has 32 bits */

	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~(__u16)sum;
}

static __always_inline long quote_transport(struct packet *p, struct quote *q,
					    const struct tuple *leaves)
{
	const struct tuple *from = &q->h.tuple;
	bool echo = is_echo(&q->h);
	__u32 at = q->h.l4 + checksum_offset(from);
	__be16 old[2] = {from->sport, from->dport}, new[2] = {leaves->dport, leaves->sport};
	__be16 check[2] = {}, changed[2] = {};
	__s64 sum;
	long err;

	if (echo) {
		/* the id is the one port that an echo has */
		old[0] |= old[1];
		new[0] |= new[1];
		old[1] = new[1] = 0;
	}
	err = bpf_skb_store_bytes(p->skb, q->h.l4 + (echo ? 4 : 0), new, echo ? 2 : 4, 0);
	q->diff = bpf_csum_diff((__be32 *)old, 4, (__be32 *)new, 4, q->diff);

	if (from->proto == IPPROTO_SCTP)
		return err; /* see quote_sctp() */
	if (at + 2 > q->h.end || bpf_skb_load_bytes(p->skb, at, check, 2) < 0)
		return err; /* cut before it */
	if (is_udp(from->proto) && !check[0])
		return err; /* sent without */
	sum = bpf_csum_diff((__be32 *)old, 4, (__be32 *)new, 4, 0);
	if (from->proto != IPPROTO_ICMP) {
		sum = addr_diff(&from->src, &leaves->dst, sum);
		sum = addr_diff(&from->dst, &leaves->src, sum);
	}
	changed[0] = checksum_add(check[0], sum);
	if (is_udp(from->proto) && !changed[0])
		changed[0] = 0xffff;
	err |= bpf_skb_store_bytes(p->skb, at, changed, 2, 0);
	q->diff = bpf_csum_diff((__be32 *)check, 4, (__be32 *)changed, 4, q->diff);
	return err;
}

static __noinline long quote_headers(struct packet *p, struct quote *q, const struct tuple *leaves)
{
	long err;

	q->diff = 0;
	err = quote_addrs(p, q, leaves);
	return err | quote_transport(p, q, leaves);
}

/* SCTP's checksum, by the length that the quoted packet had, whatever of it is quoted. Its calls are many,
 * so it is on the stack by itself.
 */
static __noinline long quote_sctp(struct packet *p, struct quote *q, const struct tuple *leaves)
{
	const __u32 at = q->h.l4 + offsetof(struct sctp_header, checksum), l3 = q->h.l3;
	bool v4 = q->h.tuple.family == FAMILY_IPV4;
	const __be16 old[2] = {q->h.tuple.sport, q->h.tuple.dport},
		     new[2] = {leaves->dport, leaves->sport};
	__u32 check, changed, length, change = *(__u32 *)old ^ *(__u32 *)new;
	__be16 total;
	long err;

	if (at + sizeof(check) > q->h.end || bpf_skb_load_bytes(p->skb, at, &check, sizeof(check)))
		return 0; /* cut before its end */
	if (!check)
		return 0; /* left to a device */
	err = bpf_skb_load_bytes(p->skb,
				 l3 + (v4 ? offsetof(struct iphdr, tot_len)
					  : offsetof(struct ipv6hdr, payload_len)),
				 &total, sizeof(total));
	length = bpf_ntohs(total) + (v4 ? 0 : sizeof(struct ipv6hdr)) - (q->h.l4 - l3);
	changed = sctp_checksum(check, change, length);
	err |= bpf_skb_store_bytes(p->skb, at, &changed, sizeof(changed), 0);
	q->diff = bpf_csum_diff((__be32 *)&check, 4, (__be32 *)&changed, 4, q->diff);
	return err;
}

/* Only the inside of the error; the outer addresses are the caller's. */
static __always_inline long rewrite_quote(struct packet *p, struct quote *q,
					  const struct tuple *leaves)
{
	long err = quote_headers(p, q, leaves);

	if (q->h.tuple.proto == IPPROTO_SCTP)
		err |= quote_sctp(p, q, leaves);
	return err | bpf_l4_csum_replace(p->skb, p->h.l4 + 2, 0, q->diff, 0);
}

/* Reads the quote and finds the half that the error travels with. */
static __noinline bool quote_find(struct packet *p, struct quote *q, struct found *f)
{
	struct tuple key;

	/* what an earlier packet has left there says nothing of this one */
	__builtin_memset(&q->h.tuple, 0, sizeof(q->h.tuple));
	if (parse_quoted(p, &q->h) != PARSED || q->h.kind != KIND_FLOW)
		return false;
	tuple_invert(&key, &q->h.tuple);
	return half_find(&key, f, true);
}
