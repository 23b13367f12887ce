package e2e

import (
	"net/netip"
	"testing"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// Bulk transfers through SNAT and through DNAT arrive intact, with segmentation offload
// and without.
func TestTransfers(t *testing.T) {
	for _, segmentation := range []bool{true, false} {
		offload := "gso=on"
		if !segmentation {
			offload = "gso=off"
		}
		t.Run(offload, func(t *testing.T) {
			forEachMode(t, lab.Options{NoSegmentation: !segmentation}, func(t *testing.T, r *rig, mode loader.AttachMode) {
				r.attach(t, loader.AttachOptions{Mode: mode})
				// Proof that the option does what it says.
				var big *lab.Capture
				if !segmentation {
					big = watch(t, r.Router, "eth0", func(p lab.Packet) bool { return p.Length > 1500 })
				}
				for _, f := range lab.Families() {
					t.Run(name(f, "snat"), func(t *testing.T) { r.transferOut(t, f) })
					t.Run(name(f, "dnat"), func(t *testing.T) { r.transferIn(t, f) })
				}
				if big != nil {
					mustSeeNothing(t, big, "over the MTU")
				}
				r.mustNotDrop(t)
			})
		})
	}
}

// Packets that carry their checksum in full from the start are translated right too.
func TestTransfersWithoutChecksumOffload(t *testing.T) {
	forEachMode(t, lab.Options{}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		if err := r.SetChecksumOffload(false); err != nil {
			t.Fatal(err)
		}
		r.attach(t, loader.AttachOptions{Mode: mode})
		for _, f := range lab.Families() {
			mustPing(t, r.Containers[0], r.World.Loopback(f), lab.PingOptions{})
			for _, protocol := range protocols() {
				server := at(r.World.Loopback(f), 7)
				call{protocol, r.Containers[0], r.World, server, server}.mustSee(t, r.Host.Addr(f))
			}
			server, err := lab.StartServer(t.Context(), r.World, at(r.World.Addr(f), 5001))
			if err != nil {
				t.Fatal(err)
			}
			mustTransfer(t, r.Containers[0], server.Addr, 1<<20, 1<<20)
			server.Close()
		}
		r.mustNotDrop(t)
	})
}

func (r *rig) transferOut(t *testing.T, f lab.Family) {
	server, err := lab.StartServer(t.Context(), r.World, at(r.World.Loopback(f), 5001))
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	got, err := lab.RunTransfer(t.Context(), r.Containers[0], server.Addr, size(), size()/16, 0)
	if err != nil {
		t.Fatal(err)
	}
	if got.ClientAsSeen.Addr() != r.Host.Addr(f) {
		t.Errorf("client was seen as %s, want %s", got.ClientAsSeen, r.Host.Addr(f))
	}
	report(t, got)
}

func (r *rig) transferIn(t *testing.T, f lab.Family) {
	c := r.Containers[0]
	server, err := lab.StartServer(t.Context(), c, at(c.Addr(f), 80))
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	r.publish(t, maps.SinglePort(8080), c.Addr(f), maps.SinglePort(80))
	got, err := lab.RunTransfer(t.Context(), r.World, at(r.Host.Addr(f), 8080), size()/16, size(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if got.ClientAsSeen != got.Client {
		t.Errorf("client %s was seen as %s", got.Client, got.ClientAsSeen)
	}
	report(t, got)
}

// mustTransfer sends up bytes to a server and gets down bytes from it.
func mustTransfer(t *testing.T, from *lab.Node, to netip.AddrPort, up, down int64) lab.Transfer {
	t.Helper()
	got, err := lab.RunTransfer(t.Context(), from, to, up, down, 0)
	if err != nil {
		t.Error(err)
	}
	return got
}

func report(t *testing.T, got lab.Transfer) {
	t.Helper()
	bytes := got.Up.Bytes + got.Down.Bytes
	t.Logf("%d bytes in %s, %.0f MB/s, %d segments sent again",
		bytes, got.Duration, float64(bytes)/got.Duration.Seconds()/1e6, got.Retransmitted)
}
