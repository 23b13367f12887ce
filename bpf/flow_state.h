/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* flow_state.h - how old a flow may get. Judged from both halves, since each direction
 * writes only its own; package maps judges alike for its lists.
 */
#pragma once

#include <linux/in.h>

#include "packet.h"

/* FIN both ways, or RST (what that is of SCTP: sctp.h): a SYN on the tuple, or who needs its port, may take it over. */
static __always_inline bool flow_closed(const struct half *original, const struct half *reply)
{
	__u8 both = original->tcp & reply->tcp, any = original->tcp | reply->tcp;

	return both & TCP_SEEN_FIN || any & TCP_SEEN_RST;
}

/* RFC 5382 REQ-5: established at least 2 h 4 min, anything else at least 4 min. A connection
 * closed by FINs waits 30 s only, since a SYN takes it over at once. RFC 7857 section 2.2:
 * an RST may be forged, so it shortens the time to 4 min and the next segment undoes that.
 */
static __always_inline enum timeout tcp_timeout(const struct half *original,
						const struct half *reply)
{
	__u8 both = original->tcp & reply->tcp, any = original->tcp | reply->tcp;

	if (any & TCP_SEEN_RST)
		return TIMEOUT_TCP_TRANSITORY;
	if (both & TCP_SEEN_FIN)
		return TIMEOUT_TCP_CLOSED;
	if (any & TCP_SEEN_FIN)
		return TIMEOUT_TCP_TRANSITORY;
	if (reply->packets && original->tcp & TCP_SEEN_ACK)
		return TIMEOUT_TCP_ESTABLISHED;
	return TIMEOUT_TCP_TRANSITORY;
}

/* Queries that have one answer. Not all ports below 1024: QUIC and IKE idle for longer. */
static __always_inline bool is_well_known(__be16 port)
{
	return port == bpf_htons(53) || port == bpf_htons(123);
}

/* RFC 4787 REQ-5: at least 2 min, 5 min by default; 5a lets well-known ports have a time of
 * their own by application: DNS and NTP do. RFC 5508 REQ-2: ICMP queries at least 60 s.
 */
static __always_inline enum timeout
flow_timeout(const struct tuple *key, const struct half *original, const struct half *reply)
{
	if (has_states(key->proto))
		return tcp_timeout(original, reply);
	if (!is_udp(key->proto))
		return TIMEOUT_ICMP;
	if (original->translation < TRANSLATION_DNAT && is_well_known(key->dport))
		return TIMEOUT_UDP_WELL_KNOWN;
	return reply->packets ? TIMEOUT_UDP : TIMEOUT_UDP_NEW;
}

static __always_inline __u32 generation_of(__u32 rule)
{
	__u32 *generation = bpf_map_lookup_elem(&generations, &rule);

	return generation ? *generation : GENERATION_ENDED;
}

static __always_inline bool rule_current(__u32 rule, __u32 generation)
{
	__u32 *current = bpf_map_lookup_elem(&generations, &rule);

	return current && *current == generation;
}

/* A generation that no rule has makes every packet, and the expiry, take the flow for over. The swap
 * fails where the memory has become another flow's since the id was read.
 */
static __always_inline bool end_half(struct half *half, __u32 id)
{
	__u32 generation = *(volatile __u32 *)&half->generation;

	if (*(volatile __u32 *)&half->standing.id != id)
		return false;
	return __sync_val_compare_and_swap(&half->generation, generation, GENERATION_ENDED) ==
	       generation;
}

/* key is the original half's. Stamps wrap, so only differences count; seen may be newer
 * than now, which another CPU read: that is a difference of less than zero.
 */
static __always_inline bool flow_over(const struct config *config, const struct tuple *key,
				      const struct half *original, const struct half *reply,
				      __u32 now)
{
	__s32 idle = now - original->seen, idle_reply = now - reply->seen;
	__u32 which = flow_timeout(key, original, reply);

	if (!rule_current(reply->rule, reply->generation))
		return true;
	if (idle_reply < idle)
		idle = idle_reply;
	return which < TIMEOUT_COUNT && idle > (__s32)config->timeout[which];
}

static __always_inline struct standing standing_of(const struct half *half)
{
	__u64 word = *(const volatile __u64 *)&half->standing;

	return *(struct standing *)&word;
}

/* False when the half is not as it was any more: of another life, or of another flow. */
static __always_inline bool swap_life(struct half *half, struct standing was, enum life life)
{
	struct standing is = was;
	__u64 from = *(__u64 *)&was, to;

	is.life = life;
	to = *(__u64 *)&is;
	return __sync_val_compare_and_swap((__u64 *)&half->standing, from, to) == from;
}
