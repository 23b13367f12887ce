/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* abi.h - every structure that a map holds, shared by the programs and by Go.
 *
 * Go reads these layouts from BTF (bpf2go), so a field has one definition. Padding
 * is explicit: the compiler does not zero what it inserts, and a key with stray
 * bytes matches nothing. A change of any layout here needs a new ABI_VERSION: pinned
 * maps are found by it, and layout_test.go compares with testdata/abi.golden.
 */
#pragma once

#include <linux/types.h>

#include <bpf/bpf_helpers.h>

#define ABI_VERSION 3

/* Times of flows are stamps: nanoseconds since boot >> STAMP_SHIFT, so 1.05 ms each,
 * in 32 bits that wrap after 52 days. Only differences are compared.
 */
#define STAMP_SHIFT 20

/* Rule ids index the generations map. Id 0 stands for "no rule" (identity flows). */
#define MAX_RULES 131072

/* No rule has this generation: a half with it belongs to a flow that was ended by hand. */
#define GENERATION_ENDED 0xffffffff

/* An address: 16 bytes in network order, IPv4 as ::ffff:a.b.c.d, so that one code path
 * serves both families. Packets that carry such an IPv6 address are dropped by parse.h.
 */
struct addr {
	__be32 word[4];
};

enum family {
	FAMILY_IPV4 = 4,
	FAMILY_IPV6 = 6,
} __attribute__((packed));

/* One direction of a conversation. ICMP echo: the request carries its id as sport (dport
 * 0), the reply as dport (sport 0), so that inversion works as for ports.
 */
struct tuple {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
	enum family family;
	__u8 proto; /* IPPROTO_* */
	__u16 pad;
};

enum device_class {
	CLASS_BRIDGE = 1,
	CLASS_UPLINK = 2,
	CLASS_PORT = 3, /* of a bridge; never a half's class: its packets are the bridge's */
} __attribute__((packed));

enum role {
	ROLE_ORIGINAL = 1,
	ROLE_REPLY = 2,
	ROLE_TRANSIT = 3, /* of a hairpin flow: what a direction looks like between the two hooks */
} __attribute__((packed));

enum translation {
	TRANSLATION_IDENTITY = 0,
	TRANSLATION_SNAT = 1,
	TRANSLATION_DNAT = 2,
	TRANSLATION_HAIRPIN = 3, /* both: a container speaks to a published port */
} __attribute__((packed));

/* What a direction has seen of TCP, in half.tcp. */
enum tcp_seen {
	TCP_SEEN_SYN = 1,
	TCP_SEEN_FIN = 2,
	TCP_SEEN_RST = 4, /* and nothing but RST since */
	TCP_SEEN_ACK = 8, /* a segment without SYN: the handshake is over */
} __attribute__((packed));

/* Life of a flow, in the reply half alone. LIVE -> ENDING (by the expiry) -> LIVE (a packet
 * revived it) or DEAD. Whoever swaps to DEAD owns the flow's end: nobody else deletes or
 * replaces its halves. A packet that needs the tuple takes over that way, in one step from
 * LIVE or ENDING; what it leaves is BURIED at the expiry's next visit and deleted at the
 * one after. An original half has lives of its own, which only say whether its packets have
 * to look at the reply half.
 */
enum life {
	LIFE_LIVE = 0,
	LIFE_ENDING = 1,
	LIFE_DEAD = 2,
	LIFE_BURIED = 3,
	LIFE_ORIGINAL = 4,
	LIFE_ORIGINAL_ENDING = 5,
} __attribute__((packed));

/* Mappings that a flow holds. */
enum held {
	HELD_SOURCE = 1, /* of the endpoint that began it */
	HELD_TARGET = 2, /* of the endpoint that it was begun to, by that endpoint's outside port */
} __attribute__((packed));

/* Changed as a whole, by compare-and-swap only: an element's memory may become another half's
 * between a look at it and the swap, and then the id differs, or the life of an original.
 */
struct standing {
	__u32 id; /* of the flow, the same in both halves */
	enum life life;
	enum held held; /* reply half only */
	__u16 uplink;	/* enum uplink_bits, of an original half that leaves by one; or 0 */
} __attribute__((aligned(8)));

/* By which uplink a container's flow leaves, in standing.uplink: see stale.h. */
enum uplink_bits {
	UPLINK_INDEX = 0x7fff, /* what uplink_index() makes of its ifindex, never 0 */
	UPLINK_MASQUERADE = 0x8000,
};

/* Why a half has no lease, in lease.out; adjacencies have the numbers from there on. */
enum unleased {
	UNLEASED = 0,	      /* no packet since it ran out has been seen through */
	UNLEASED_DEVICE = 1,  /* a device that it would be for may have none */
	UNLEASED_NO_ROOM = 2, /* no adjacency was free */
	UNLEASED_CHECKED = 3, /* as UNLEASED, but stale.h has looked at the flow's way */
	ADJACENCY_FIRST = 16,
} __attribute__((packed));

/* The right of one direction to the fast path, for LEASE_STAMPS from stamp: for packets that
 * come in as adjacency in says, and go out as adjacency out says. Read and written at once.
 */
struct lease {
	__u16 out;
	__u16 in;    /* 0: not known yet */
	__u32 stamp; /* when the host was last seen, or asked, to let such a packet through */
} __attribute__((aligned(8)));

/* One direction of a flow; the map's key is this direction's tuple. Only packets of
 * this direction write seen, packets, bytes, tcp and lease.
 */
struct half {
	struct tuple other; /* the other half's key; a packet leaves as its inverse */
	__u64 packets;
	__u64 bytes;
	struct standing standing;
	struct lease lease;
	__u32 guard;	  /* binds id, own key and other: half_guard() in flow.h */
	__u32 ifindex;	  /* only packets that came in by it belong; 0: any of the class */
	__u32 rule;	  /* id of the rule that made the flow, 0: none */
	__u32 generation; /* of that rule; a differing one ends the flow */
	__u32 seen;	  /* stamp of the last packet */
	enum role role;
	enum device_class class; /* of the device that may present it */
	enum translation translation;
	enum tcp_seen tcp;
};

enum adjacency_state {
	ADJACENCY_FREE = 0,
	ADJACENCY_BUSY = 1, /* being filled in */
	ADJACENCY_READY = 2,
};

enum adjacency_flag {
	ADJACENCY_L3 = 1,   /* the device has no Ethernet header */
	ADJACENCY_PEER = 2, /* a port: straight to the other end of the veth */
	ADJACENCY_MARK = 4, /* our program is on the device's egress: mark what is redirected */
};

/* Where packets go, or come from: a device, and the Ethernet addresses on it. Many leases share
 * one. It is used again for another after ADJACENCY_STAMPS without a new lease, by when
 * the last lease has long run out.
 */
struct adjacency {
	__u32 used; /* stamp; with state, changed at once by compare-and-swap */
	enum adjacency_state state;
	__u32 ifindex;
	__u32 mtu;	 /* of what goes out, in bytes of IP; 0 where packets come from */
	__u8 remote[6];	 /* the neighbour's address */
	__u8 local[6];	 /* the host's own */
	__be16 protocol; /* the three are the link header of what goes out, but for the order */
	__u16 pad;
	enum adjacency_flag flags;
	__u32 pad2;
} __attribute__((aligned(8)));

/* Who owns an Ethernet address on a bridge. */
struct port_key {
	__u32 bridge;
	__u8 mac[6];
	__u16 pad;
};

/* An outside port, and the inside endpoint that has it (RFC 4787, REQ-1 and REQ-3). The table has two
 * places for each outside port: where these are follows from its address and number.
 */
struct mapping {
	__u64 hold; /* incarnation << 32 | enum mapping_bits */
	struct addr inside;
	__be16 inside_port;
	__be16 outside_port;
	__u32 outside; /* outside_hash() of address and protocol */
};

/* The lower half of mapping.hold; all zero but for the lock: the place is free. */
enum mapping_bits {
	MAPPING_FLOWS = 0x00ffffff,  /* that hold it */
	MAPPING_MOVED = 0x01000000,  /* the endpoint has not kept its own port: see moved_ports */
	MAPPING_LOCKED = 0x02000000, /* of a pair's first place: one of the two is being taken */
};

/* Endpoints that have not kept their own port -> their outside port. */
struct endpoint {
	struct addr inside;
	struct addr outside;
	__be16 port; /* inside */
	__u8 proto;
	__u8 pad;
};

struct moved_port {
	__be16 port;
	__u16 pad;
};

/* An element of the expiry queue: the reply tuple of a flow, which is its claim. */
struct expiry_entry {
	struct tuple claim;
	__u32 id;
	__u32 checked; /* stamp: the queue's head is the one longest unchecked */
};

struct expiry {
	struct bpf_timer timer;
	__u64 last_tick; /* ns since boot */
	__u64 ticks;
	__u64 longest; /* ns of the longest tick, pauses of the machine included */
	__u64 slow;    /* ticks of more than EXPIRY_SLOW_NS */
	__u64 checked; /* entries looked at so far */
	__u32 period;  /* stamps between two looks at a flow; 0: EXPIRY_PERIOD */
	__u32 looks;   /* since the period was last thought over */
	__u32 over;    /* of these, flows that were over */
	__u32 swept;   /* stamp: held fragments were looked through */
};

/* Rules. An any-address destination is all zero behind the IPv4 prefix or 16 zero bytes. */
struct dnat_key {
	struct addr dst;
	__u32 ifindex; /* -i, or 0 */
	__be16 port;
	__u8 proto;
	__u8 pad;
};

/* Ranges: the trie matches everything before the port exactly, then a prefix of the port. */
struct dnat_range_key {
	__u32 prefixlen;
	struct addr dst;
	__u32 ifindex;
	__u8 proto;
	__u8 pad;
	__be16 port;
};

enum dnat_flag {
	DNAT_ALLOW_LIST = 1, /* only sources in the allow map may come in */
	DNAT_KEEP_PORT = 2,  /* no port in --to-destination */
	DNAT_BACKENDS = 4,   /* several --to-destination: see struct backend */
	DNAT_SOURCE = 8,     /* which of them follows from the client's address */
};

struct dnat_rule {
	struct addr to;
	__u16 port_first; /* the published ports, host order, both ends included */
	__u16 port_last;
	__u16 to_first; /* to_first == to_last: all to one port, else shifted */
	__u16 to_last;
	__u32 id;
	__u32 generation;
	enum dnat_flag flags;
	__u32 affinity; /* stamps; 0: none */
	__u16 slots;	/* of backends, 0 where there is one target */
	__u16 pad;
};

/* (rule, prefix): sources a DNAT rule lets in, destinations an SNAT rule leaves alone. */
struct rule_prefix_key {
	__u32 prefixlen; /* 32 + bits of addr */
	__u32 rule;
	struct addr addr;
};

struct snat_key {
	__u32 prefixlen; /* 32 + bits of source */
	__u32 ifindex;	 /* -o, or 0; exact, so it comes first */
	struct addr source;
};

enum snat_flag {
	SNAT_MASQUERADE = 1,
	SNAT_EXCEPT = 2, /* the except map has destinations for it */
	SNAT_ATTACH = 4, /* made by attach for a bridge's subnet */
};

struct snat_rule {
	struct addr to;	  /* first address; unused by masquerade */
	__u32 to_count;	  /* consecutive addresses, within the last 32 bits */
	__u16 port_first; /* 0-0: same port where free, else same class */
	__u16 port_last;
	__u32 id;
	__u32 generation;
	enum snat_flag flags;
};

struct subnet_key {
	__u32 prefixlen;
	struct addr addr;
};

/* Source address for masquerade on kernels whose FIB lookup does not tell (before 6.7). */
struct address_key {
	__u32 prefixlen; /* 32 + bits of dst */
	__u32 ifindex;
	struct addr dst;
};

/* A socket of the host and the container that it talks to, by what it was led to. */
struct host_peer_key {
	__u64 cookie; /* of the socket */
	struct addr addr;
	__be16 port;
	__u16 pad[3];
};

/* What it named instead, and by which rule. */
struct host_peer {
	struct addr published;
	__be16 port;
	__u8 connected; /* not only datagrams that were addressed one by one */
	__u8 pad;
	__u32 rule;
	__u32 generation;
};

enum attach_kind {
	ATTACH_TCX = 1,
	ATTACH_CLSACT = 2,
	ATTACH_MANUAL = 3, /* by hand, after load */
};

enum device_flag {
	DEVICE_OWN_QDISC = 1, /* attach made the clsact qdisc, detach removes it */
	DEVICE_L3 = 2,	      /* no Ethernet header */
	DEVICE_SLOW = 4,      /* no fast path: programs or filters of others are on its hooks */
	DEVICE_PEER = 8,      /* a port: packets may go straight to the other end of its veth */
};

struct device {
	enum device_class class;
	__u8 pad[3];
	enum attach_kind attach;
	enum device_flag flags;
	__u32 bridge; /* of a port */
	__u8 mac[6];  /* of a port: its container's; of a bridge: its own */
	__u16 pad2;
};

enum timeout {
	TIMEOUT_TCP_ESTABLISHED = 0,
	TIMEOUT_TCP_TRANSITORY,
	TIMEOUT_TCP_CLOSED,
	TIMEOUT_UDP,
	TIMEOUT_UDP_NEW,
	TIMEOUT_UDP_WELL_KNOWN,
	TIMEOUT_ICMP,
	TIMEOUT_COUNT,
};

enum config_flag {
	CONFIG_ALLOW_DIRECT = 1,   /* containers are reachable by their own address */
	CONFIG_NO_ISOLATION = 2,   /* managed bridges reach each other */
	CONFIG_PASS_UNMANAGED = 4, /* traffic may leave by devices without programs */
	CONFIG_ROUTED = 8,	   /* no masquerade: no rule means untranslated */
	CONFIG_ANY_SENDER = 16,	   /* a UDP mapping is open to all (RFC 4787 REQ-8) */
};

/* Which of the two sets of rule maps is in force, and what kinds of rules it has: a map that has none
 * need not be asked. The kinds of DNAT rules are shifted by enum dnat_kind. What is above is Go's
 * own (maps/rulesword.go).
 */
enum rules_word {
	RULES_SET = 1,
	RULES_DNAT_PORTS = 0x100,
	RULES_DNAT_RANGES = 0x1000,
	RULES_SNAT_DEVICE = 0x10000,
};

/* In the order in which they are asked: a specific address before any, within that a device's own
 * rule before one for all.
 */
enum dnat_kind {
	DNAT_ADDRESS_DEVICE = 0,
	DNAT_ADDRESS = 1,
	DNAT_ANY_DEVICE = 2,
	DNAT_ANY = 3,
	DNAT_KINDS = 4,
};

enum fast_path {
	FAST_PATH_OFF = 0,
	FAST_PATH_ESTABLISHED = 1, /* a lease is granted for what the host let through */
	FAST_PATH_ALWAYS = 2,	   /* the routing table is asked instead, the firewall is not */
} __attribute__((packed));

/* Written by Go as a whole, under the instance's lock. live and rules change in one byte, so
 * a program reads the old value or the new one: live is the commit of an attach.
 */
struct config {
	__u64 live;  /* 0: the programs pass every packet on */
	__u64 rules; /* enum rules_word */
	__u64 netns_cookie;
	__u64 secret[2]; /* key of the hash that picks ports */
	enum config_flag flags;
	__u32 max_flows;
	__u32 timeout[8]; /* stamps, by enum timeout */
	__u32 mark;	  /* one bit: the packet was redirected, its way is decided */
	enum fast_path fast_path;
	__u8 pad[3];
};

/* Counters: what is dropped and why, which helper failed, what happened. */
enum counter {
	DROP_MALFORMED = 0,
	DROP_V4_MAPPED,
	DROP_FRAGMENT,
	DROP_FRAGMENT_NO_ROOM,
	DROP_FRAGMENT_ALONE,
	DROP_PROTOCOL,
	DROP_LOOPBACK,
	DROP_SPOOFED_ADDRESS,
	DROP_SPOOFED_MAC,
	DROP_NO_UPLINK,
	DROP_MULTICAST,
	DROP_NO_RULE,
	DROP_NO_FLOW,
	DROP_ISOLATED,
	DROP_NOT_ALLOWED,
	DROP_HAIRPIN,
	DROP_HAIRPIN_REDIRECT,
	DROP_ICMP_UNRELATED,
	DROP_TCP_UNEXPECTED,
	DROP_NO_ADDRESS,
	DROP_NO_PORT,
	DROP_TABLE_FULL,
	DROP_NO_MEMORY,
	DROP_ENDING,
	DROP_REWRITE,
	DROP_END, /* drops come before, events after */
	FLOWS_CREATED,
	FLOWS_ENDED,
	FLOWS_REVIVED,
	FLOWS_TAKEN_OVER,
	FLOWS_RACED,
	MAPPINGS_CREATED,
	MAPPINGS_ENDED,
	PORTS_SHARED,
	LEASES_GRANTED,
	PACKETS_REDIRECTED,
	EXPIRY_OVERDUE,
	FLOWS_STALE,
	FRAGMENTS_HELD,
	FRAGMENTS_RELEASED,
	COUNTER_COUNT,
};

#define PORT_TRIES 64

/* Index 0 to ADJACENCY_FIRST - 1 are no adjacencies. */
#define ADJACENCIES 8192

_Static_assert(sizeof(struct addr) == 16, "addr");
_Static_assert(sizeof(struct tuple) == 40, "tuple");
_Static_assert(sizeof(struct half) == 96, "half: 8 + 48 + 40 + 96 = kmalloc-192");
_Static_assert(sizeof(struct standing) == 8, "standing: one compare-and-swap");
_Static_assert(sizeof(struct lease) == 8, "lease: one access");
_Static_assert(sizeof(struct adjacency) == 40, "adjacency");
_Static_assert(sizeof(struct port_key) == 12, "port_key");
_Static_assert(sizeof(struct device) == 24, "device");
_Static_assert(sizeof(struct mapping) == 32, "mapping: two a cache line");
_Static_assert(sizeof(struct endpoint) == 36, "endpoint");
_Static_assert(sizeof(struct moved_port) == 4, "moved_port");
_Static_assert(sizeof(struct expiry_entry) == 48, "expiry_entry");
_Static_assert(sizeof(struct dnat_key) == 24, "dnat_key");
_Static_assert(sizeof(struct dnat_range_key) == 28, "dnat_range_key");
_Static_assert(sizeof(struct dnat_rule) == 44, "dnat_rule: with its key, still of kmalloc-128");
_Static_assert(sizeof(struct rule_prefix_key) == 24, "rule_prefix_key");
_Static_assert(sizeof(struct snat_key) == 24, "snat_key");
_Static_assert(sizeof(struct snat_rule) == 36, "snat_rule");
_Static_assert(sizeof(struct host_peer_key) == 32, "host_peer_key");
_Static_assert(sizeof(struct host_peer) == 28, "host_peer");
_Static_assert(sizeof(struct config) == 88, "config");
