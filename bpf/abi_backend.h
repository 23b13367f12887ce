/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* abi_backend.h - the part of abi.h about DNAT rules with several targets. */
#pragma once

#include "abi.h"

/* A rule with several targets has one of them in each of its slots, as often as its weight says. */
struct backend_key {
	__u32 rule; /* id of the rule; with BACKEND_BY_ID, of the backend */
	__u32 slot;
};

#define BACKEND_BY_ID 0xffffffff

/* One of several targets of a rule. It has an id like a rule, so that its flows end with it alone. */
struct backend {
	struct addr to;
	__u16 to_first; /* as in dnat_rule */
	__u16 to_last;
	__u32 rule;
	__u32 id;
	__u32 generation;
	__u16 weight;
	__u8 keep_port;
	__u8 pad;
};

/* The backend that a client's new flows go to, as long as they come often enough. */
struct affinity_key {
	struct addr client; /* all zero: the host itself */
	__u32 rule;
};

struct affinity {
	__u32 backend;
	__u32 generation;
	__u32 stamp; /* of the last new flow */
};

_Static_assert(sizeof(struct backend_key) == 8, "backend_key");
_Static_assert(sizeof(struct backend) == 36, "backend");
_Static_assert(sizeof(struct affinity_key) == 20, "affinity_key");
_Static_assert(sizeof(struct affinity) == 12, "affinity");
