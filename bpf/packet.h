/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* packet.h - one packet in flight: what parse.h found, and how a stage ends it. */
#pragma once

#include <stdbool.h>

#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"
#include "maps.h"

/* What a stage says of a packet. Only finish() knows TC's numbers. */
enum verdict {
	GO_ON,	  /* the next stage decides */
	PASS,	  /* hand it on, translated or not */
	DROP,	  /* packet->reason says why */
	REDIRECT, /* to packet->output */
	AGAIN,	  /* into this hook's device once more, as if it had come just now */
};

enum packet_kind {
	KIND_FLOW,	 /* TCP, UDP, UDP-Lite, SCTP, ICMP echo: the tuple is complete */
	KIND_ICMP_ERROR, /* quotes a packet of a flow */
	KIND_OTHER,	 /* a protocol without ports, another ICMP message */
};

enum fragment {
	FRAGMENT_NONE,
	FRAGMENT_FIRST, /* has the ports */
	FRAGMENT_LATER,
};

/* Headers of one IP packet, the outer or the one that an ICMP error quotes. */
struct headers {
	struct tuple tuple;
	__u32 l3;      /* offset of the IP header */
	__u32 l4;      /* offset of the header behind it and its options or extensions */
	__u32 end;     /* offset behind the packet */
	__u8 kind;     /* enum packet_kind */
	__u8 fragment; /* enum fragment */
	__u8 tcp;      /* flags byte of the TCP header, or what is like it in SCTP: sctp.h */
	__u8 icmp;     /* type of the ICMP message */
	__u8 tos;      /* of IPv4 */
	__u8 part; /* of a fragment: where its part of the datagram begins, in 4 bytes from l3 */
	__u8 fate; /* enum fragment_fate: what the first fragment has met, or meets */
	__u8 pad;
	__be32 flow; /* class and label of IPv6 */
};

/* The packet that an ICMP error quotes. */
struct quote {
	struct headers h;
	__s64 diff; /* what its checksum changes by, as it is rewritten */
};

struct packet {
	struct __sk_buff *skb;
	const struct config *config;
	__u32 now; /* stamp */
	enum counter reason;
	__u32 bridge;	   /* that the container is on; 0: the packet is none of a container's */
	__u32 uplink;	   /* that it leaves by, or came in by */
	struct half *half; /* of its direction, where it has one */
	__u32 id;	   /* of the flow */
	__u16 in;    /* the adjacency that a container's packet comes from, or enum unleased */
	bool absent; /* flows has nothing under its tuple */
	const struct adjacency *output;
	struct headers h;
};

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* UDP-Lite (RFC 3828) has UDP's header with what the checksum covers in place of the length: always the
 * ports, and always a pseudo header.
 */
static __always_inline bool is_udp(__u8 proto)
{
	return proto == IPPROTO_UDP || proto == IPPROTO_UDPLITE;
}

static __always_inline bool has_ports(__u8 proto)
{
	return proto == IPPROTO_TCP || is_udp(proto) || proto == IPPROTO_SCTP;
}

/* Whether the protocol has connections, whose states tcp_seen tells. */
static __always_inline bool has_states(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_SCTP;
}

static __always_inline void count(enum counter which)
{
	__u32 key = which;
	__u64 *n = bpf_map_lookup_elem(&counters, &key);

	if (n)
		*n += 1;
}

static __always_inline enum verdict drop(struct packet *p, enum counter reason)
{
	p->reason = reason;
	return DROP;
}

/* What is not ours and what we translated go on with UNSPEC, so that other programs on the
 * hook run as well; OK would hide the packet from them.
 */
static __always_inline int finish(struct packet *p, enum verdict v)
{
	switch (v) {
	case DROP:
		count(p->reason);
		return TC_ACT_SHOT;
	case REDIRECT:
		count(PACKETS_REDIRECTED);
		if (p->output->flags & ADJACENCY_PEER)
			return bpf_redirect_peer(p->output->ifindex, 0);
		return bpf_redirect(p->output->ifindex, 0);
	case AGAIN:
		return bpf_redirect(p->skb->ifindex, BPF_F_INGRESS);
	default:
		return TC_ACT_UNSPEC;
	}
}

static __always_inline __u32 stamp_now(void)
{
	return bpf_ktime_get_coarse_ns() >> STAMP_SHIFT;
}

static __always_inline bool mac_equal(const __u8 *a, const __u8 *b)
{
	const __u16 *x = (const void *)a, *y = (const void *)b;

	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2];
}

/* Whether then is less than so many stamps ago. Another CPU's now may be a little later. */
static __always_inline bool is_within(__u32 now, __u32 then, __u32 stamps)
{
	const __u32 ahead = 64;

	return now - then + ahead < stamps + ahead;
}

/* False while the instance is not live: then the programs do nothing at all. */
static __always_inline bool packet_begin(struct packet *p, struct __sk_buff *skb)
{
	__u32 zero = 0;

	p->skb = skb;
	p->config = bpf_map_lookup_elem(&config, &zero);
	if (!p->config || !p->config->live)
		return false;
	p->reason = DROP_MALFORMED;
	return true;
}

/* Apart, since what was redirected needs no clock where it leaves. */
static __always_inline void packet_clock(struct packet *p)
{
	p->now = stamp_now();
}
