package e2e

import (
	"strings"
	"testing"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// Netfilter stays as empty as it was: no rule, no table, no chain.
func TestNetfilterStaysEmpty(t *testing.T) {
	for _, command := range [][]string{{"iptables-save"}, {"ip6tables-save"}, {"nft", "list", "ruleset"}} {
		t.Run(command[0], func(t *testing.T) {
			forEachMode(t, lab.Options{}, func(t *testing.T, r *rig, mode loader.AttachMode) {
				r.attach(t, loader.AttachOptions{Mode: mode})
				for _, f := range lab.Families() {
					r.publish(t, maps.SinglePort(3005), r.Containers[0].Addr(f), maps.PortRange{})
					mustPing(t, r.Containers[0], r.World.Loopback(f), lab.PingOptions{})
				}
				if out := tool(t, r.Host, command[0], command[1:]...); strings.TrimSpace(out) != "" {
					t.Errorf("%v printed:\n%s", command, out)
				}
			})
		})
	}
}

// Detach takes everything away while traffic goes on, and the container is cut off again.
func TestDetachLeavesNothing(t *testing.T) {
	forEachMode(t, lab.Options{}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		status := r.attach(t, loader.AttachOptions{Mode: mode})
		for _, device := range status.Devices {
			for _, hook := range []loader.HookStatus{device.Ingress, device.Egress} {
				if hook.ID == 0 || hook.ID != hook.Pinned {
					t.Errorf("%s: %s: program %d runs, %d is pinned", device.Name, hook.Program, hook.ID, hook.Pinned)
				}
			}
			if got := device.Attach.String(); got != mode.String() {
				t.Errorf("%s is attached by %s, want %s", device.Name, got, mode)
			}
		}
		for _, f := range lab.Families() {
			r.publish(t, maps.SinglePort(3005), r.Containers[0].Addr(f), maps.PortRange{})
			mustPing(t, r.Containers[0], r.World.Loopback(f), lab.PingOptions{})
		}
		if objects := r.pinned(t); len(objects) < 10 {
			t.Fatalf("only %d programs and maps are pinned: the check that they go would be empty", len(objects))
		}
		r.detach(t)
		for _, f := range lab.Families() {
			mustNotPing(t, r.Containers[0], r.World.Loopback(f), lab.PingOptions{})
			in := call{"udp", r.World, r.Containers[0], at(r.Containers[0].Addr(f), 3005), at(r.Host.Addr(f), 3005)}
			if _, seen, err := in.do(t.Context()); err == nil || seen.IsValid() {
				t.Errorf("%s: the published port outlived detach", f)
			}
		}
		r.detach(t) // of what is not attached is no error
	})
}
