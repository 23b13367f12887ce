/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* abi_datagram.h - what maps hold of datagrams that come in fragments; part of the layout that abi.h tells of. */
#pragma once

#include "abi.h"

#define HOOK_INGRESS 0
#define HOOK_UPLINK  1 /* ingress of any uplink: a datagram may come by several */
#define HOOK_EGRESS  0x80000000

/* What a later fragment shows of its datagram, at one hook. */
struct datagram_key {
	struct addr src; /* as it comes to the hook */
	struct addr dst;
	__be32 id;
	__u32 ifindex; /* the hook's device */
	__u32 hook; /* HOOK_INGRESS, HOOK_UPLINK; egress: HOOK_EGRESS and the device that it came in by */
	enum family family;
	__u8 proto; /* 0 with IPv6, where only the first fragment's counts */
	__u16 pad;
};

/* What becomes of later fragments, since their first was treated like that. */
enum fragment_fate {
	FATE_UNKNOWN = 0, /* the first has not come */
	FATE_CARRIED = 1, /* as their flow */
	FATE_UNTOUCHED = 2,
	FATE_REFUSED = 3,
} __attribute__((packed));

/* What only the first fragment of a datagram shows. The first 8 bytes are read at once. */
struct datagram {
	__be16 sport;
	__be16 dport;
	__u16 length; /* of the first's part, in bytes: nothing may overlap it */
	__u8 proto;
	enum fragment_fate fate;
	__u32 guard; /* binds them to the key: the map recycles its elements */
	__u32 stamp; /* of the last fragment */
} __attribute__((aligned(8)));

#define HELD_SLOTS 4	/* fragments of a datagram that wait for its first */
#define HELD_BYTES 1792 /* of one, at most */

struct held_key {
	struct datagram_key datagram;
	__u32 slot;
};

/* A fragment that has come before its first. */
struct held_fragment {
	__u32 taken; /* not 0: whoever set it owns the element, and deletes it */
	__u32 stamp;
	__u32 length; /* of the packet, which begins with its IP header */
	__u8 packet[HELD_BYTES];
};

_Static_assert(sizeof(struct datagram_key) == 48, "datagram_key");
_Static_assert(sizeof(struct datagram) == 16, "datagram");
_Static_assert(sizeof(struct held_key) == 52, "held_key");
_Static_assert(48 + 8 + 56 + sizeof(struct held_fragment) + 4 <= 2048, "held: kmalloc-2k");
