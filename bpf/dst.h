/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* dst.h - the MTU of the route that the stack has chosen for a packet. bpf_fib_lookup tells it only where it
 * is locked, but forwarding honours it always (ip_dst_mtu_maybe_forward). It is read from the
 * packet's dst_entry, by functions that kernels have since 6.2; before that a route's MTU must be
 * locked to hold on the fast path.
 */
#pragma once

#include <linux/rtnetlink.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

struct sk_buff___dst {
	unsigned long _skb_refdst;
} __attribute__((preserve_access_index));

struct dst_entry___mtu {
	unsigned long _metrics;
} __attribute__((preserve_access_index));

extern void *bpf_cast_to_kern_ctx(void *context) __ksym __weak;
extern void *bpf_rdonly_cast(const void *object, __u32 type) __ksym __weak;

/* The low bits of both pointers are flags (SKB_DST_PTRMASK, DST_METRICS_FLAGS). 0: none is set. */
static __always_inline __u32 dst_mtu(struct __sk_buff *skb)
{
	const struct sk_buff___dst *kernel;
	const struct dst_entry___mtu *dst;
	const __u32 *metrics;
	__u32 mtu = 0;

	if (!bpf_cast_to_kern_ctx || !bpf_rdonly_cast)
		return 0;
	kernel = bpf_cast_to_kern_ctx(skb);
	dst = bpf_rdonly_cast((void *)(kernel->_skb_refdst & ~1UL),
			      bpf_core_type_id_kernel(struct dst_entry___mtu));
	metrics = (void *)(dst->_metrics & ~3UL);
	bpf_probe_read_kernel(&mtu, sizeof(mtu), metrics + RTAX_MTU - 1);
	return mtu;
}
