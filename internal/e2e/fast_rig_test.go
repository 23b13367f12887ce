package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// fastVariants are the ways to have a fast path: by TCX where there is one, and by clsact.
func fastVariants() []loader.AttachOptions {
	return []loader.AttachOptions{
		{FastPath: loader.FastPathEstablished, Mode: loader.Auto},
		{FastPath: loader.FastPathEstablished, Mode: loader.Clsact, NoPorts: true},
		{FastPath: loader.FastPathAlways, Mode: loader.Auto},
	}
}

func variantName(o loader.AttachOptions) string {
	if o.NoPorts {
		return o.FastPath.String() + ",no-ports"
	}
	return o.FastPath.String()
}

// forEachFast runs a test for each of the variants, in a lab of its own, beside others.
func forEachFast(t *testing.T, variants []loader.AttachOptions, o lab.Options, test func(t *testing.T, r *rig, attach loader.AttachOptions)) {
	t.Helper()
	t.Parallel()
	for _, variant := range variants {
		t.Run(variantName(variant), func(t *testing.T) {
			t.Parallel()
			test(t, newRig(t, o), variant)
		})
	}
}

// counter reads one counter of the datapath.
func (r *rig) counter(t *testing.T, counter string) (packets uint64) {
	t.Helper()
	r.read(t, func(d *loader.Datapath) error {
		counts, err := d.State().Counters()
		for _, count := range counts {
			if count.Name == counter {
				packets = count.Packets
				return err
			}
		}
		return fmt.Errorf("no counter %s: %w", counter, err)
	})
	return packets
}

func (r *rig) redirected(t *testing.T) uint64 {
	t.Helper()
	return r.counter(t, maps.PacketsRedirected)
}

func (r *rig) flows(t *testing.T) (flows []maps.Flow) {
	t.Helper()
	r.read(t, func(d *loader.Datapath) (err error) {
		flows, _, err = d.State().Flows()
		return err
	})
	return flows
}

func (r *rig) status(t *testing.T) (status loader.Status) {
	t.Helper()
	r.read(t, func(d *loader.Datapath) (err error) {
		status, err = d.Status()
		return err
	})
	return status
}

// flowOf reads a talk's flow.
func (r *rig) flowOf(t *testing.T, k *talk) maps.Flow {
	t.Helper()
	flow, err := k.flow(r.flows(t))
	if err != nil {
		t.Fatal(err)
	}
	return flow
}

// mustBeFast checks that talks, all that go on in the lab, are on the fast path in both directions:
// their flows say so, and of the packets that they exchange nearly all are redirected.
func (r *rig) mustBeFast(t *testing.T, talks []*talk) {
	t.Helper()
	for _, k := range talks {
		poll(t, k.name+" is on the fast path both ways", func() bool {
			flow, err := k.flow(r.flows(t))
			return err == nil && flow.FastOut == maps.LeaseFast && flow.FastIn == maps.LeaseFast
		})
	}
	var share float64
	poll(t, "nearly all packets are redirected", func() bool {
		before, redirected := r.carried(t, talks), r.redirected(t)
		time.Sleep(slowly(300 * time.Millisecond))
		packets := r.carried(t, talks) - before // in the same order: to read takes time
		redirected = r.redirected(t) - redirected
		share = float64(redirected) / float64(packets)
		return packets >= uint64(4*len(talks)) && share > 0.9
	})
	if t.Failed() {
		for _, flow := range r.flows(t) {
			t.Logf("%s %s: out %s, in %s, %+v %+v", flow.Translation, flow.Original, flow.FastOut, flow.FastIn, flow.Out, flow.In)
		}
		t.Fatalf("%.0f %% of the packets are redirected", 100*share)
	}
}

// carried is the number of packets that the flows of all talks have seen.
func (r *rig) carried(t *testing.T, talks []*talk) (packets uint64) {
	t.Helper()
	flows := r.flows(t)
	for _, k := range talks {
		flow, err := k.flow(flows)
		if err != nil {
			t.Fatal(err)
		}
		packets += flow.Out.Packets + flow.In.Packets
	}
	return packets
}

// nft runs a script of nft in a node.
func nft(t *testing.T, n *lab.Node, script string) string {
	t.Helper()
	return tool(t, n, "nft", script)
}

// ip runs the command in a node, once for every argument.
func ip(t *testing.T, n *lab.Node, commands ...string) {
	t.Helper()
	for _, command := range commands {
		tool(t, n, "ip", strings.Fields(command)...)
	}
}
