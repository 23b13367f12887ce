package e2e

import (
	"testing"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// By an uplink that has no programs nothing leaves with a container's address, and status
// names the device. Attached as well, it translates to its own address.
func TestSecondUplink(t *testing.T) {
	forEachMode(t, lab.Options{SecondUplink: true}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		c := r.Containers[0]
		r.attach(t, loader.AttachOptions{Mode: mode})
		leak := watch(t, r.Other, "eth0", leaks)
		for _, f := range lab.Families() {
			mustNotPing(t, c, r.Other.Loopback(f), lab.PingOptions{})
			for _, protocol := range protocols() {
				server := at(r.Other.Loopback(f), 7)
				call{protocol, c, r.Other, server, server}.mustFail(t)
			}
			mustPing(t, r.Host, r.Other.Loopback(f), lab.PingOptions{}) // the host's own is let alone
			mustPing(t, c, r.World.Loopback(f), lab.PingOptions{})
		}
		r.read(t, func(d *loader.Datapath) error {
			status, err := d.Status()
			if err != nil {
				return err
			}
			if len(status.Unmanaged) != 1 || status.Unmanaged[0].Name != lab.Uplink2 || status.Unmanaged[0].Packets < 6 {
				t.Errorf("unmanaged devices %+v, want %s with 6 packets or more", status.Unmanaged, lab.Uplink2)
			}
			return nil
		})
		if drops := r.drops(t); drops["no-uplink"] < 6 || len(drops) != 1 {
			t.Errorf("dropped: %v, want no-uplink alone, 6 or more", drops)
		}

		r.attach(t, loader.AttachOptions{Mode: mode, Uplinks: []string{lab.Uplink, lab.Uplink2}})
		for _, f := range lab.Families() {
			mustPing(t, c, r.Other.Loopback(f), lab.PingOptions{})
			for _, protocol := range protocols() {
				server := at(r.Other.Loopback(f), 7)
				call{protocol, c, r.Other, server, server}.mustSee(t, lab.Uplink2Addr(f))
				server = at(r.World.Loopback(f), 7)
				call{protocol, c, r.World, server, server}.mustSee(t, r.Host.Addr(f))
			}
		}
		mustSeeNothing(t, leak, "left by eth1 with a container's address")
	})
}

// An uplink without an Ethernet header works in both directions.
func TestTunUplink(t *testing.T) {
	forEachMode(t, lab.Options{TunUplink: true}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		c := r.Containers[0]
		r.attach(t, loader.AttachOptions{Mode: mode, Uplinks: []string{lab.Uplink, lab.TunUplink}})
		leak := watch(t, r.Far, lab.TunUplink, leaks)
		for _, f := range lab.Families() {
			t.Run(f.String(), func(t *testing.T) {
				mustPing(t, c, r.Far.Loopback(f), lab.PingOptions{})
				r.publish(t, maps.SinglePort(8080), c.Addr(f), maps.SinglePort(80))
				for _, protocol := range protocols() {
					server := at(r.Far.Loopback(f), 7)
					call{protocol, c, r.Far, server, server}.mustSee(t, lab.TunAddr(f))
					call{protocol, r.Far, c, at(c.Addr(f), 80), at(lab.TunAddr(f), 8080)}.mustSee(t, r.Far.Addr(f))
					call{protocol, r.World, c, at(c.Addr(f), 80), at(r.Host.Addr(f), 8080)}.mustSee(t, r.World.Addr(f))
				}
				out, err := lab.StartServer(t.Context(), r.Far, at(r.Far.Loopback(f), 5001))
				if err != nil {
					t.Fatal(err)
				}
				defer out.Close()
				mustTransfer(t, c, out.Addr, 2<<20, 2<<20)
				in, err := lab.StartServer(t.Context(), c, at(c.Addr(f), 80))
				if err != nil {
					t.Fatal(err)
				}
				defer in.Close()
				mustTransfer(t, r.Far, at(lab.TunAddr(f), 8080), 2<<20, 2<<20)
			})
		}
		mustSeeNothing(t, leak, "left by tun0 with a container's address")
		r.mustNotDrop(t)
	})
}
