/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* tuple.h - addresses and tuples: building, inverting, hashing. */
#pragma once

#include <stdbool.h>

#include "abi.h"

#include <bpf/bpf_endian.h>

static __always_inline void addr_from_ipv4(struct addr *a, __be32 ip)
{
	a->word[0] = 0;
	a->word[1] = 0;
	a->word[2] = bpf_htonl(0xffff);
	a->word[3] = ip;
}

static __always_inline bool addr_is_v4_mapped(const struct addr *a)
{
	return !a->word[0] && !a->word[1] && a->word[2] == bpf_htonl(0xffff);
}

static __always_inline bool addr_equal(const struct addr *a, const struct addr *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] &&
	       a->word[3] == b->word[3];
}

/* 127.0.0.0/8 and ::1 */
static __always_inline bool addr_is_loopback(const struct addr *a, enum family family)
{
	if (family == FAMILY_IPV4)
		return (a->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !a->word[0] && !a->word[1] && !a->word[2] && a->word[3] == bpf_htonl(1);
}

/* Addresses that stay on their link: unspecified, multicast, broadcast, and IPv6 link-local. Not
 * 169.254.0.0/16, which Linux forwards: a cloud's metadata service is reached that way.
 */
static __always_inline bool addr_is_local_scope(const struct addr *a, enum family family)
{
	if (family == FAMILY_IPV4) {
		__u32 ip = bpf_ntohl(a->word[3]);

		return !ip || ip == 0xffffffff || ip >> 28 == 0xe;
	}
	if (!a->word[0] && !a->word[1] && !a->word[2] && !a->word[3])
		return true;
	return (a->word[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000) ||
	       (a->word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

static __always_inline void tuple_invert(struct tuple *to, const struct tuple *from)
{
	to->src = from->dst;
	to->dst = from->src;
	to->sport = from->dport;
	to->dport = from->sport;
	to->family = from->family;
	to->proto = from->proto;
	to->pad = 0;
}

static __always_inline bool tuple_equal(const struct tuple *a, const struct tuple *b)
{
	const __u64 *x = (const void *)a, *y = (const void *)b;

	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2] && x[3] == y[3] && x[4] == y[4];
}

static __always_inline __u64 mix(__u64 hash, __u64 value)
{
	hash = (hash ^ value) * 0x9e3779b97f4a7c15ULL;
	return hash ^ hash >> 29;
}

#define SIPROUND                          \
	do {                              \
		v0 += v1;                 \
		v1 = v1 << 13 | v1 >> 51; \
		v1 ^= v0;                 \
		v0 = v0 << 32 | v0 >> 32; \
		v2 += v3;                 \
		v3 = v3 << 16 | v3 >> 48; \
		v3 ^= v2;                 \
		v0 += v3;                 \
		v3 = v3 << 21 | v3 >> 43; \
		v3 ^= v0;                 \
		v2 += v1;                 \
		v1 = v1 << 17 | v1 >> 47; \
		v1 ^= v2;                 \
		v2 = v2 << 32 | v2 >> 32; \
	} while (0)

/* SipHash-1-3 of up to five words: the choice of ports must not be guessed from ports that
 * an outsider has seen (RFC 6056 section 3.3), so the hash has a key that never leaves the
 * host. bpf_get_prandom_u32 would not do: its state follows from a few outputs.
 */
static __always_inline __u64 keyed_hash(const __u64 key[2], const __u64 *words, int n)
{
	__u64 v0 = key[0] ^ 0x736f6d6570736575ULL, v1 = key[1] ^ 0x646f72616e646f6dULL;
	__u64 v2 = key[0] ^ 0x6c7967656e657261ULL, v3 = key[1] ^ 0x7465646279746573ULL;
	__u64 length = (__u64)n << 59;

	for (int i = 0; i < n; i++) {
		v3 ^= words[i];
		SIPROUND;
		v0 ^= words[i];
	}
	v3 ^= length;
	SIPROUND;
	v0 ^= length;
	v2 ^= 0xff;
	SIPROUND;
	SIPROUND;
	SIPROUND;
	return v0 ^ v1 ^ v2 ^ v3;
}
