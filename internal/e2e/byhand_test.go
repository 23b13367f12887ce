package e2e

import (
	"strings"
	"testing"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// The tc commands that load prints attach the programs, and traffic passes.
func TestLoadAndAttachByHand(t *testing.T) {
	r := newRig(t, lab.Options{TunUplink: true})
	var commands []string
	err := r.Host.Do(func() (err error) {
		commands, err = loader.Load(t.Context(), r.inst, loader.AttachOptions{
			Bridges: []string{lab.Bridge}, Uplinks: []string{lab.Uplink, lab.TunUplink},
		})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	c := r.Containers[0]
	mustNotPing(t, c, r.World.Loopback(lab.IPv4), lab.PingOptions{})
	for _, command := range commands {
		words := strings.Fields(command)
		if out := tool(t, r.Host, words[0], words[1:]...); out != "" {
			t.Logf("%s\n%s", command, out)
		}
	}
	for _, f := range lab.Families() {
		r.publish(t, maps.SinglePort(8080), c.Addr(f), maps.SinglePort(80))
		for _, outside := range []*lab.Node{r.World, r.Far} {
			host := r.Host.Addr(f)
			if outside == r.Far {
				host = lab.TunAddr(f)
			}
			mustPing(t, c, outside.Loopback(f), lab.PingOptions{})
			for _, protocol := range protocols() {
				server := at(outside.Loopback(f), 7)
				call{protocol, c, outside, server, server}.mustSee(t, host)
				call{protocol, outside, c, at(c.Addr(f), 80), at(host, 8080)}.mustSee(t, outside.Addr(f))
			}
		}
	}
	r.mustNotDrop(t)
	r.read(t, func(d *loader.Datapath) error {
		status, err := d.Status()
		if len(status.Problems) > 0 {
			t.Errorf("problems: %v", status.Problems)
		}
		return err
	})
	// The qdiscs were made by hand, so they go by hand.
	for _, device := range []string{lab.Bridge, lab.Uplink, lab.TunUplink} {
		tool(t, r.Host, "tc", "qdisc", "del", "dev", device, "clsact")
	}
}
