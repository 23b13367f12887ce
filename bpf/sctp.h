/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* sctp.h - SCTP (RFC 9260): what a packet's chunks say of its association, and its checksum.
 *
 * Chunks are told as the flags of TCP that mean the same, so that everything that asks for these serves
 * SCTP as well: INIT is a SYN, INIT ACK a SYN with ACK, the three SHUTDOWNs a FIN, ABORT an RST, anything
 * else an ACK. As with TCP's numbers, nobody compares verification tags: a forged ABORT shortens a
 * flow's life, and its next packet undoes that.
 *
 * The checksum is a CRC32c of the whole packet, and of no pseudo header: addresses do not change it,
 * ports do. A CRC is linear, so what it changes by follows from what the ports change by and from how far
 * they are from the packet's end; the bytes between are not looked at. The rest of a fragmented packet
 * is not known, so its ports cannot change.
 */
#pragma once

#include <stddef.h>

#include "packet.h"

struct sctp_header {
	__be16 sport;
	__be16 dport;
	__be32 tag;
	__u32 checksum; /* the one field that is little-endian (RFC 9260 appendix A) */
};

struct sctp_chunk {
	__u8 type;
	__u8 flags;
	__be16 length; /* with these 4 bytes, without padding */
};

enum sctp_type {
	SCTP_DATA = 0,
	SCTP_INIT = 1,
	SCTP_INIT_ACK = 2,
	SCTP_ABORT = 6,
	SCTP_SHUTDOWN = 7,
	SCTP_SHUTDOWN_ACK = 8,
	SCTP_COOKIE_ACK = 11,
	SCTP_SHUTDOWN_COMPLETE = 14,
	SCTP_I_DATA = 64,
};

#define SCTP_BIT(type) (1ULL << (type))

/* In a packet of their own, or every receiver discards it (RFC 9260 section 6.10). */
#define SCTP_ALONE \
	(SCTP_BIT(SCTP_INIT) | SCTP_BIT(SCTP_INIT_ACK) | SCTP_BIT(SCTP_SHUTDOWN_COMPLETE))
#define SCTP_ENDS \
	(SCTP_BIT(SCTP_SHUTDOWN) | SCTP_BIT(SCTP_SHUTDOWN_ACK) | SCTP_BIT(SCTP_SHUTDOWN_COMPLETE))

/* Out of the blue these are discarded (section 8.4), so they begin nothing. */
#define SCTP_STRAYS \
	(SCTP_BIT(SCTP_ABORT) | SCTP_BIT(SCTP_SHUTDOWN_COMPLETE) | SCTP_BIT(SCTP_COOKIE_ACK))

/* A flag beside TCP's: one of the strays. TCP's own bit is URG, so it is for SCTP alone to ask for. */
#define SCTP_STRAY 0x20

/* Chunks looked at. Control chunks come before DATA (section 6.10), and no sender has more of them. */
#define SCTP_CHUNKS_MAX 8

#define SCTP_MALFORMED -1

/* The flags of the packet whose SCTP header is at l4, or SCTP_MALFORMED: without a chunk, or such that
 * every receiver discards it. The rest of a first fragment's chunks is not asked for.
 */
__noinline int sctp_flags(struct __sk_buff *skb, __u32 l4, __u32 end)
{
	__u32 at = l4 + sizeof(struct sctp_header), second = 0;
	struct sctp_header header;
	/* by type; flags would make each way through one of its own, for the verifier */
	__u64 seen = 0;
	int flags = 0;

	if (bpf_skb_load_bytes(skb, l4, &header, sizeof(header)))
		return SCTP_MALFORMED;
	for (int i = 0; i < SCTP_CHUNKS_MAX; i++) {
		struct sctp_chunk chunk;
		__u16 length;

		if (at + sizeof(chunk) > end || bpf_skb_load_bytes(skb, at, &chunk, sizeof(chunk)))
			break;
		length = bpf_ntohs(chunk.length);
		if (length < sizeof(chunk))
			return SCTP_MALFORMED;
		at += (length + 3) & ~3;
		if (!i)
			second = at;
		/* types from 63 on are of later documents: none begins or ends an association */
		seen |= chunk.type < 63 ? SCTP_BIT(chunk.type) : SCTP_BIT(63);
		if (chunk.type == SCTP_DATA || chunk.type == SCTP_I_DATA)
			break;
	}
	if (!seen || (seen & SCTP_ALONE && second + sizeof(struct sctp_chunk) <= end))
		return SCTP_MALFORMED;
	if (seen & SCTP_BIT(SCTP_INIT)) /* who begins has no tag yet (section 8.5.1) */
		return header.tag ? SCTP_MALFORMED : TCP_SYN;
	if (seen & SCTP_BIT(SCTP_INIT_ACK))
		return TCP_SYN | TCP_ACK;
	if (seen & SCTP_STRAYS)
		flags |= SCTP_STRAY;
	if (seen & SCTP_BIT(SCTP_ABORT))
		return flags | TCP_RST;
	if (seen & SCTP_ENDS)
		flags |= TCP_FIN;
	return flags | TCP_ACK;
}

/* Whether the packet, of no flow, begins none: it answers something, or means the end. */
static __always_inline bool is_stray(const struct headers *h)
{
	return h->tcp & TCP_RST || (h->tuple.proto == IPPROTO_SCTP && h->tcp & SCTP_STRAY);
}

/* The product of two polynomials over GF(2) modulo that of CRC32c; the highest bit is of x^0. */
__noinline __u32 crc32c_multiply(__u32 a, __u32 b)
{
	__u32 product = 0;

	for (int i = 0; i < 32; i++) {
		product ^= b & -(a >> 31);
		a <<= 1;
		b = b >> 1 ^ (0x82f63b78 & -(b & 1));
	}
	return product;
}

/* What a CRC changes by as so many zero bytes follow: by x^(8 * bytes), which power is. */
#define CRC32C_ZEROS(bytes, power)                             \
	do {                                                   \
		if (length & (bytes))                          \
			first = crc32c_multiply(first, power); \
	} while (0)

/* What the CRC of length bytes, less than 64 KB, changes by when the first four change by this,
 * read as little-endian.
 */
__noinline __u32 crc32c_change(__u32 first, __u32 length)
{
	CRC32C_ZEROS(1 << 0, 0x00800000);
	CRC32C_ZEROS(1 << 1, 0x00008000);
	CRC32C_ZEROS(1 << 2, 0x82f63b78);
	CRC32C_ZEROS(1 << 3, 0x6ea2d55c);
	CRC32C_ZEROS(1 << 4, 0x18b8ea18);
	CRC32C_ZEROS(1 << 5, 0x510ac59a);
	CRC32C_ZEROS(1 << 6, 0xb82be955);
	CRC32C_ZEROS(1 << 7, 0xb8fdb1e7);
	CRC32C_ZEROS(1 << 8, 0x88e56f72);
	CRC32C_ZEROS(1 << 9, 0x74c360a4);
	CRC32C_ZEROS(1 << 10, 0xe4172b16);
	CRC32C_ZEROS(1 << 11, 0x0d65762a);
	CRC32C_ZEROS(1 << 12, 0x35d73a62);
	CRC32C_ZEROS(1 << 13, 0x28461564);
	CRC32C_ZEROS(1 << 14, 0xbf455269);
	CRC32C_ZEROS(1 << 15, 0xe2ea32dc);
	return first;
}

static __always_inline __u32 little_endian(__u32 value)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
	return __builtin_bswap32(value);
#else
	return value;
#endif
}

/* The checksum of a packet of that length, as both ports change by this; all as it is in memory. */
static __always_inline __u32 sctp_checksum(__u32 checksum, __u32 change, __u32 length)
{
	return checksum ^ little_endian(crc32c_change(little_endian(change), length));
}

/* Changes the ports of a whole packet, length bytes from l4 on; both ports as they are in memory.
 *
 * A checksum of 0 is what a sender leaves to its device, which is told by the skb's metadata: then it
 * is made when the packet leaves a device that cannot (validate_xmit_skb), with the ports of then. No
 * helper tells that apart from a CRC that is 0, as one in 2^32 is: such a packet is lost
 * to its receiver, which its sender takes for loss on the way.
 */
__noinline long sctp_rewrite_ports(struct __sk_buff *skb, __u32 l4, __u32 length, __u32 from,
				   __u32 to)
{
	const __u32 at = l4 + offsetof(struct sctp_header, checksum);
	__u32 checksum;
	long err;

	err = bpf_skb_load_bytes(skb, at, &checksum, sizeof(checksum));
	if (err)
		return err;
	/* what skb->csum has summed up changes by more than these bytes cancel */
	err = bpf_skb_store_bytes(skb, l4, &to, sizeof(to), BPF_F_RECOMPUTE_CSUM);
	if (!checksum)
		return err;
	checksum = sctp_checksum(checksum, from ^ to, length);
	return err |
	       bpf_skb_store_bytes(skb, at, &checksum, sizeof(checksum), BPF_F_RECOMPUTE_CSUM);
}
