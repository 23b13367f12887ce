/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* rule.h - which rule speaks of a packet. Only a flow's first packet comes here. */
#pragma once

#include "packet.h"
#include "tuple.h"

#define PREFIX_ALL(type) ((sizeof(type) - sizeof(__u32)) * 8)

struct dnat_match {
	struct dnat_rule rule; /* a copy */
	__u32 maker;	       /* id that the flow's halves get: the rule's, or its backend's */
	__u32 set;	       /* of rules that it is in */
	__u32 any;	       /* the rule names no address: it holds for those of the host */
};

static __always_inline const struct dnat_rule *dnat_lookup(__u64 rules, const struct tuple *t,
							   enum dnat_kind kind, __u32 ifindex)
{
	union {
		struct dnat_key port;
		struct dnat_range_key range;
	} key;
	bool any = kind >= DNAT_ANY_DEVICE;
	const struct dnat_rule *rule = NULL;
	__u32 set = rules & RULES_SET;
	void *inner;

	if (kind & 1)
		ifindex = 0;
	__builtin_memset(&key, 0, sizeof(key));
	if (rules & RULES_DNAT_PORTS << kind) {
		inner = bpf_map_lookup_elem(&dnat_ports, &set);
		if (!any)
			key.port.dst = t->dst;
		else if (t->family == FAMILY_IPV4)
			addr_from_ipv4(&key.port.dst, 0);
		key.port.ifindex = ifindex;
		key.port.port = t->dport;
		key.port.proto = t->proto;
		if (inner)
			rule = bpf_map_lookup_elem(inner, &key.port);
		if (rule)
			return rule;
	}
	if (!(rules & RULES_DNAT_RANGES << kind))
		return NULL;
	inner = bpf_map_lookup_elem(&dnat_ranges, &set);
	__builtin_memset(&key, 0, sizeof(key));
	key.range.prefixlen = PREFIX_ALL(struct dnat_range_key);
	if (!any)
		key.range.dst = t->dst;
	else if (t->family == FAMILY_IPV4)
		addr_from_ipv4(&key.range.dst, 0);
	key.range.ifindex = ifindex;
	key.range.proto = t->proto;
	key.range.port = t->dport;
	return inner ? bpf_map_lookup_elem(inner, &key.range) : NULL;
}

/* The rule that publishes the tuple's destination on a device. */
__noinline bool dnat_find(const struct tuple *t, __u32 ifindex, struct dnat_match *m)
{
	const struct dnat_rule *rule = NULL;
	const struct config *c;
	__u32 zero = 0;

	c = bpf_map_lookup_elem(&config, &zero);
	if (!c || !t || !m)
		return false;
	for (__u32 kind = 0; kind < DNAT_KINDS && !rule; kind++) {
		m->any = kind >= DNAT_ANY_DEVICE;
		rule = dnat_lookup(c->rules, t, kind, ifindex);
	}
	if (!rule)
		return false;
	m->rule = *rule;
	m->maker = rule->id;
	m->set = c->rules & RULES_SET;
	return true;
}

/* The inside port, network order, that a rule leads a published one to. */
static __always_inline __be16 dnat_port(const struct dnat_rule *rule, __be16 port)
{
	__u16 shift = bpf_ntohs(port) - rule->port_first;

	if (rule->flags & DNAT_KEEP_PORT)
		return port;
	if (rule->to_first == rule->to_last)
		return bpf_htons(rule->to_first);
	return bpf_htons(rule->to_first + shift);
}

/* Whether the rule's list (allow of DNAT, except of SNAT) names the address. */
__noinline bool rule_lists(const struct config *config, __u32 rule, const struct addr *addr)
{
	struct rule_prefix_key key = {
		.prefixlen = PREFIX_ALL(struct rule_prefix_key),
		.rule = rule,
	};
	void *inner;
	__u32 set;

	if (!config || !addr)
		return false;
	key.addr = *addr;
	set = config->rules & RULES_SET;
	inner = bpf_map_lookup_elem(&rule_prefixes, &set);
	return inner && bpf_map_lookup_elem(inner, &key);
}

/* The SNAT rule for a source that leaves by a device: the device's own rules first, in them
 * the longest prefix.
 */
static __always_inline const struct snat_rule *snat_find(const struct config *config,
							 const struct addr *source, __u32 ifindex)
{
	struct snat_key key = {
		.prefixlen = PREFIX_ALL(struct snat_key),
		.ifindex = ifindex,
		.source = *source,
	};
	__u32 set = config->rules & RULES_SET;
	void *inner = bpf_map_lookup_elem(&snat_sources, &set);
	const struct snat_rule *rule;

	if (!inner)
		return NULL;
	if (config->rules & RULES_SNAT_DEVICE) {
		rule = bpf_map_lookup_elem(inner, &key);
		if (rule)
			return rule;
	}
	key.ifindex = 0;
	return bpf_map_lookup_elem(inner, &key);
}

/* The managed bridge whose subnet holds the address, or 0. */
__noinline __u32 bridge_of(const struct addr *addr)
{
	struct subnet_key key = {
		.prefixlen = PREFIX_ALL(struct subnet_key),
	};
	__u32 *bridge;

	if (!addr)
		return 0;
	key.addr = *addr;
	bridge = bpf_map_lookup_elem(&subnets, &key);
	return bridge ? *bridge : 0;
}
