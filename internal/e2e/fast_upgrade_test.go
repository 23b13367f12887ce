package e2e

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// Upgrades to other builds and changes of the mode, while streams and a connection are on the fast path,
// lose nothing: each datagram arrives once, and each segment.
func TestFastUpgradeLosesNothing(t *testing.T) {
	const (
		outRate = 5_000
		inRate  = 5_000
	)
	t.Parallel()
	for _, mode := range []loader.AttachMode{loader.TCX, loader.Clsact} {
		t.Run(mode.String(), func(t *testing.T) {
			if mode == loader.TCX {
				needTCX(t)
			}
			t.Parallel()
			r := newRig(t, lab.Options{Containers: 2, SecondUplink: true})
			options := loader.AttachOptions{
				Mode: mode, FastPath: loader.FastPathEstablished, Uplinks: []string{lab.Uplink, lab.Uplink2},
			}
			status := r.attach(t, options)
			tcp := newMeter(t, r.Containers[0], r.World, unix.IPPROTO_TCP)
			conversation := r.ways(t, r.Containers[0], lab.IPv4, talkPort)[0].start(t, "tcp")
			conversation.client.goOn()
			conversation.server.goOn()
			second := r.Containers[1]
			r.publish(t, maps.SinglePort(8080), second.Addr(lab.IPv6), maps.SinglePort(80))
			out := r.startStream(t, second, r.Other, at(r.Other.Loopback(lab.IPv4), 6001), at(r.Other.Loopback(lab.IPv4), 6001), outRate)
			in := r.startStream(t, r.Other, second, at(second.Addr(lab.IPv6), 80), at(lab.Uplink2Addr(lab.IPv6), 8080), inRate)
			// The streams have one direction each, which is on the fast path.
			fast := func(want bool) {
				t.Helper()
				poll(t, "the fast path is taken, or not", func() bool {
					before := r.redirected(t)
					time.Sleep(50 * time.Millisecond)
					return r.redirected(t)-before > (outRate+inRate)/40 == want
				})
			}
			fast(true)
			build := 0
			for _, next := range []struct {
				fast    loader.FastPath
				noPorts bool
				other   bool // build
			}{
				{loader.FastPathEstablished, false, true},
				{loader.FastPathEstablished, false, true},
				{loader.FastPathOff, false, false},
				{loader.FastPathOff, true, false},
				{loader.FastPathOff, false, false},
				{loader.FastPathOff, true, false},
				{loader.FastPathOff, false, false},
				{loader.FastPathAlways, false, false},
				{loader.FastPathAlways, false, true},
				{loader.FastPathEstablished, true, false},
				{loader.FastPathAlways, true, true},
				{loader.FastPathOff, false, true},
				{loader.FastPathEstablished, false, false},
			} {
				options.FastPath, options.NoPorts = next.fast, next.noPorts
				if next.other {
					build++
					options.Spec = otherBuild(build)
				}
				now := r.attach(t, options)
				if next.other && status.FastPath.Mode == now.FastPath.Mode {
					mustBeOtherBuild(t, status, now)
				}
				status = now
				fast(next.fast != loader.FastPathOff)
			}
			conversation.client.pause()
			conversation.server.pause()
			out.mustArrive(t, lab.Uplink2Addr(lab.IPv4))
			in.mustArrive(t, r.Other.Addr(lab.IPv6))
			tcp.mustMatch(t)
			if failed := conversation.client.failed.Load(); failed != nil {
				t.Error(*failed)
			}
			r.mustNotDrop(t)
		})
	}
}

// Detach while all kinds of flows are on the fast path leaves nothing, no packet with a mark or a lease that
// still leads anywhere; attached again, the datagrams go on, translated.
func TestFastDetach(t *testing.T) {
	forEachFast(t, fastVariants(), lab.Options{}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		r.attach(t, attach)
		talks := r.talkAll(t, r.Containers[0], talkPort)
		goOn(talks, false)
		r.mustBeFast(t, talks)
		r.detach(t)
		// As without tcnat: what a container sends leaves as it is.
		bare := watchArrivals(t, r.Router, "eth0", leaks)
		bare.mustStart(t, "untranslated packets", time.Now().Add(changeTime))
		r.attach(t, attach)
		leaked := watch(t, r.Router, "eth0", leaks)
		var again []*talk
		for _, f := range lab.Families() {
			r.ways(t, r.Containers[0], f, talkPort) // publishes again
			for _, k := range talks {
				if k.protocol == maps.UDP && lab.FamilyOf(k.callee.Addr()) == f {
					again = append(again, k)
				}
			}
		}
		mustGoOn(t, again, changeTime)
		for _, k := range talks {
			if k.protocol == maps.TCP {
				k.client.pause()
			}
		}
		r.mustBeFast(t, again)
		mustSeeNothing(t, leaked, "left with a container's address")
	})
}
