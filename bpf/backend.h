/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* backend.h - which of a rule's several targets a new flow goes to. Rules with one never come here. Whether
 * a target lives is not known: who watches that changes the rule.
 */
#pragma once

#include "packet.h"
#include "rule.h"
#include "tuple.h"

/* The one that the client's last new flow went to, if that is not too long ago and it is still one. */
static __always_inline const struct backend *
backend_again(void *inner, const struct dnat_rule *rule, const struct affinity *last, __u32 now)
{
	struct backend_key key = {.slot = BACKEND_BY_ID};
	const struct backend *b;

	if (!last || !is_within(now, last->stamp, rule->affinity))
		return NULL;
	key.rule = last->backend;
	b = bpf_map_lookup_elem(inner, &key);
	return b && b->rule == rule->id && b->generation == last->generation ? b : NULL;
}

/* Makes m speak of one of its rule's targets. client is all zero for the host itself; chance says which
 * where the rule does not go by the client's address.
 */
static __always_inline bool backend_choose(struct dnat_match *m, const struct addr *client,
					   __u64 chance)
{
	struct affinity_key who = {};
	struct dnat_rule *rule = &m->rule;
	struct affinity note, *last = NULL;
	const struct backend *b = NULL;
	void *inner, *clients = NULL;
	struct backend_key key = {};
	const struct config *c;
	__u32 zero = 0, set = m->set & RULES_SET;
	__u64 words[3];

	c = bpf_map_lookup_elem(&config, &zero);
	inner = bpf_map_lookup_elem(&backends, &set);
	if (!c || !inner || !rule->slots)
		return false;
	note.stamp = stamp_now();
	if (rule->affinity) {
		who.client = *client;
		who.rule = rule->id;
		clients = bpf_map_lookup_elem(&affinities, &zero);
		if (clients)
			last = bpf_map_lookup_elem(clients, &who);
		b = backend_again(inner, rule, last, note.stamp);
	}
	if (!b) {
		if (rule->flags & DNAT_SOURCE) {
			words[0] = (__u64)client->word[0] << 32 | client->word[1];
			words[1] = (__u64)client->word[2] << 32 | client->word[3];
			words[2] = rule->port_first;
			chance = keyed_hash(c->secret, words, 3);
		}
		key.rule = rule->id;
		key.slot = (chance & 0xffffffff) % rule->slots;
		b = bpf_map_lookup_elem(inner, &key);
	}
	if (!b)
		return false;
	rule->to = b->to;
	rule->to_first = b->to_first;
	rule->to_last = b->to_last;
	rule->generation = b->generation;
	rule->flags &= ~DNAT_KEEP_PORT;
	if (b->keep_port)
		rule->flags |= DNAT_KEEP_PORT;
	m->maker = b->id;
	if (clients) {
		note.backend = b->id;
		note.generation = b->generation;
		bpf_map_update_elem(clients, &who, &note, BPF_ANY);
	}
	return true;
}
