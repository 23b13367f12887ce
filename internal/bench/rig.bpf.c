//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* rig.bpf.c - what the benchmark's rig needs in the kernel: a counter that ends packets
 * where they are received, and the bare redirects that are the ceiling of any NAT.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/types.h>
#include <linux/udp.h>
#include <stdbool.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

char _license[] SEC("license") = "Dual BSD/GPL";

/* What a packet that was treated as it should be looks like. Addresses in network order,
 * ports in host order, both ends of the ranges included.
 */
struct pattern {
	__be32 src, src_mask;
	__be32 dst, dst_mask;
	__u16 sport_first, sport_last;
	__u16 dport_first, dport_last;
};

struct tally {
	__u64 expected;
	__u64 other;
	__u64 bad_sum; /* of the expected ones, where sums are checked */
};

/* Both addresses of an Ethernet header. */
struct frame_head {
	__u8 dst[ETH_ALEN];
	__u8 src[ETH_ALEN];
};

const volatile struct pattern want = {};
const volatile __u8 protocol = IPPROTO_UDP;
const volatile __u8 check_sums = 0;
const volatile __u8 partial_sums = 0; /* the field holds the pseudo header's sum alone */

const volatile struct frame_head head = {};
const volatile __u32 target = 0; /* ifindex */

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tally);
} tallies SEC(".maps");

static __always_inline bool in_range(__u16 port, __u16 first, __u16 last)
{
	return port >= first && port <= last;
}

static __always_inline __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

#define SUM_BYTES 32 /* covers the UDP part of a 64-byte frame */

static __always_inline bool sum_is_good(struct __sk_buff *skb, const struct iphdr *ip, __u16 field)
{
	__u16 length = bpf_ntohs(ip->tot_len) - sizeof(*ip);
	__u64 pseudo = (__u64)ip->saddr + ip->daddr + bpf_htons(length) + bpf_htons(ip->protocol);
	__be32 words[SUM_BYTES / 4] = {};

	if (partial_sums && field == fold(pseudo))
		return true;
	if (length < sizeof(struct udphdr) || length > SUM_BYTES)
		return false;
	/* A 64-byte frame ends two bytes before the words do. */
	if (bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(*ip), words, SUM_BYTES - 2))
		return false;
	for (int i = 0; i < SUM_BYTES / 4; i++)
		pseudo += words[i];
	return fold(pseudo) == 0xffff;
}

/* Counts the packets of one protocol and ends them; all others go on. */
SEC("tc")
int count(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);
	struct udphdr *udp = (void *)(ip + 1); /* TCP has its ports in the same place */
	struct tally *tally;
	__u32 key = 0;

	if ((void *)(udp + 1) > end || eth->h_proto != bpf_htons(ETH_P_IP) ||
	    ip->protocol != protocol)
		return TC_ACT_UNSPEC;
	tally = bpf_map_lookup_elem(&tallies, &key);
	if (!tally)
		return TC_ACT_SHOT;
	if ((ip->saddr & want.src_mask) != want.src || (ip->daddr & want.dst_mask) != want.dst ||
	    !in_range(bpf_ntohs(udp->source), want.sport_first, want.sport_last) ||
	    !in_range(bpf_ntohs(udp->dest), want.dport_first, want.dport_last)) {
		tally->other++;
		return TC_ACT_SHOT;
	}
	tally->expected++;
	if (check_sums && !sum_is_good(skb, ip, udp->check))
		tally->bad_sum++;
	return TC_ACT_SHOT;
}

/* Only UDP over IPv4 is redirected; ARP and what else there is takes the stack. */
static __always_inline bool write_head(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);

	if ((void *)(ip + 1) > end || eth->h_proto != bpf_htons(ETH_P_IP) ||
	    ip->protocol != IPPROTO_UDP)
		return false;
	__builtin_memcpy(eth->h_dest, (const void *)head.dst, ETH_ALEN);
	__builtin_memcpy(eth->h_source, (const void *)head.src, ETH_ALEN);
	return true;
}

SEC("tc")
int redirect(struct __sk_buff *skb)
{
	if (!write_head(skb))
		return TC_ACT_UNSPEC;
	return bpf_redirect(target, 0);
}

SEC("tc")
int redirect_peer(struct __sk_buff *skb)
{
	if (!write_head(skb))
		return TC_ACT_UNSPEC;
	return bpf_redirect_peer(target, 0);
}

SEC("tc")
int redirect_neigh(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);

	if ((void *)(ip + 1) > end || eth->h_proto != bpf_htons(ETH_P_IP) ||
	    ip->protocol != IPPROTO_UDP)
		return TC_ACT_UNSPEC;
	return bpf_redirect_neigh(target, 0, 0, 0);
}
