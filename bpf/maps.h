/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* maps.h - every map, with who writes and who reads it. None evicts, but for LRU ones that
 * hold no flow: a full map refuses.
 */
#pragma once

#include "abi.h"
#include "abi_backend.h"
#include "abi_datagram.h"

/* Written by Go; read by every program, once a packet. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct config);
} config SEC(".maps");

/* Both halves of every flow. Programs insert, the expiry deletes, Go marks. The loader
 * sets max_entries to two a flow.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct tuple);
	__type(value, struct half);
} flows SEC(".maps");

/* Endpoint-independent mappings, by outside port: an array, since a new flow's time goes into
 * hash elements and their memory. Written by programs and the expiry. The loader sets
 * max_entries, a power of two.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct mapping);
} mappings SEC(".maps");

/* What few endpoints need. Written as mappings are; the loader sets max_entries. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct endpoint);
	__type(value, struct moved_port);
} moved_ports SEC(".maps");

/* Claims in the order they were last checked. A program pushes a flow's claim, the
 * expiry pops and pushes back. The loader sets max_entries.
 */
struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, 1);
	__type(value, struct expiry_entry);
} expiry_queue SEC(".maps");

/* The expiry's timer and what it has done. The timer lives as long as this map is pinned. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct expiry);
} expiry SEC(".maps");

/* What the first fragments of datagrams have shown to a hook, for two seconds. Written by programs. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 2048);
	__type(key, struct datagram_key);
	__type(value, struct datagram);
} fragments SEC(".maps");

/* Fragments whose first has not come. Written by programs, deleted by them and the expiry. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 256);
	__type(key, struct held_key);
	__type(value, struct held_fragment);
} held_fragments SEC(".maps");

/* By enum counter. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTER_COUNT);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* [n] counts the flows that got the port of try n, 0 being the one they asked for. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PORT_TRIES + 1);
	__type(key, __u32);
	__type(value, __u64);
} port_tries SEC(".maps");

/* The devices that have programs; an entry is written after its programs are attached. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct device);
} devices SEC(".maps");

/* (bridge, Ethernet address) -> ifindex of the port that owns it. Written by Go from the
 * containers' own devices, not learned: a frame's source address is what its sender claims.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct port_key);
	__type(value, __u32);
} ports SEC(".maps");

/* What leases speak of. Written by the programs. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, ADJACENCIES);
	__type(key, __u32);
	__type(value, struct adjacency);
} adjacencies SEC(".maps");

/* Devices without programs that container traffic would have left by: packets dropped. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 64);
	__type(key, __u32);
	__type(value, __u64);
} unmanaged SEC(".maps");

/* Subnets of the managed bridges -> ifindex of the bridge. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, struct subnet_key);
	__type(value, __u32);
} subnets SEC(".maps");

/* The addresses of the host's own that a rule without address holds for, where the routing table cannot
 * be asked (a socket has no packet) or does not tell (a container's packet without a route looks local);
 * value: the device. 127.0.0.1 and ::1 need not be in it. Written by Go.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct addr);
	__type(value, __u32);
} host_addresses SEC(".maps");

/* What the host's own sockets were led to. Written by connect and sendmsg; read by recvmsg and
 * getpeername, which name the published address again, and by Go, which ends the connected
 * ones of a rule that goes. An entry goes when its connected socket is closed. Not a flow: the one
 * that is unused longest may go, and its socket sees the container's address from then on.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct host_peer_key);
	__type(value, struct host_peer);
} host_peers SEC(".maps");

/* Masquerade addresses for kernels before 6.7. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct address_key);
	__type(value, struct addr);
} addresses SEC(".maps");

/* Current generation of each rule id. Raised when a rule goes: its flows end with it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_RULES);
	__type(key, __u32);
	__type(value, __u32);
} generations SEC(".maps");

/* The rules, in two sets: Go fills the one not in force and switches by config.rules, so a
 * packet sees the old rules or the new ones. Both begin with the empty set; Go makes the
 * later ones with the size they need.
 */
struct dnat_ports_set {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct dnat_key);
	__type(value, struct dnat_rule);
} no_dnat_ports SEC(".maps");

struct dnat_ranges_set {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct dnat_range_key);
	__type(value, struct dnat_rule);
} no_dnat_ranges SEC(".maps");

struct snat_sources_set {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct snat_key);
	__type(value, struct snat_rule);
} no_snat_sources SEC(".maps");

struct rule_prefixes_set {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct rule_prefix_key);
	__type(value, __u8);
} no_rule_prefixes SEC(".maps");

struct backends_set {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct backend_key);
	__type(value, struct backend);
} no_backends SEC(".maps");

struct affinities_table {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
} no_affinities SEC(".maps");

/* Published single ports. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct dnat_ports_set);
} dnat_ports SEC(".maps") = {
	.values = {&no_dnat_ports, &no_dnat_ports},
};

/* Published port ranges, each as the port prefixes that cover it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct dnat_ranges_set);
} dnat_ranges SEC(".maps") = {
	.values = {&no_dnat_ranges, &no_dnat_ranges},
};

/* SNAT rules by source prefix. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct snat_sources_set);
} snat_sources SEC(".maps") = {
	.values = {&no_snat_sources, &no_snat_sources},
};

/* Who may come in by a DNAT rule; what an SNAT rule leaves alone. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct rule_prefixes_set);
} rule_prefixes SEC(".maps") = {
	.values = {&no_rule_prefixes, &no_rule_prefixes},
};

/* The targets of DNAT rules that have several. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct backends_set);
} backends SEC(".maps") = {
	.values = {&no_backends, &no_backends},
};

/* Clients of such rules, where a rule asks for it: then Go puts a larger table there, of which the
 * one unused longest may go.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct affinities_table);
} affinities SEC(".maps") = {
	.values = {&no_affinities},
};
