package e2e

import (
	"errors"
	"testing"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// A hop of MTU 1400 on the way, all other MTUs 1500: the container is told, and TCP works
// across it in both directions.
func TestPathMTU(t *testing.T) {
	const hop, bytes = 1400, 2 << 20
	forEachMode(t, lab.Options{Containers: 2, HopMTU: hop}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		r.attach(t, loader.AttachOptions{Mode: mode})
		for _, f := range lab.Families() {
			t.Run(f.String(), func(t *testing.T) {
				c, server := r.Containers[0], r.Containers[1]
				to := r.World.Loopback(f)
				_, err := lab.Ping(t.Context(), c, to, lab.PingOptions{Size: 1440, DontFragment: true})
				var icmp *lab.ICMPError
				if !errors.As(err, &icmp) || !icmp.TooBig() || icmp.MTU != hop || icmp.From != r.Router.Addr(f) {
					t.Fatalf("ping of 1440 bytes: %v, want too big, mtu %d, from %s", err, hop, r.Router.Addr(f))
				}
				if icmp.QuotedSrc != c.Addr(f) || icmp.QuotedDst != to {
					t.Errorf("the error quotes %s > %s, the container sent %s > %s", icmp.QuotedSrc, icmp.QuotedDst, c.Addr(f), to)
				}
				mustKnowPathMTU(t, c, to.String(), hop, func() (int, error) { return c.PathMTU(to) })
				mustPing(t, c, to, lab.PingOptions{Size: 1340, DontFragment: true})

				// TCP to an address of which the container has learnt nothing yet. The server sends
				// nothing back: so that it has nothing to learn, and offers full segments below.
				out, err := lab.StartServer(t.Context(), r.World, at(r.World.Addr(f), 5001))
				if err != nil {
					t.Fatal(err)
				}
				defer out.Close()
				if got := mustTransfer(t, c, out.Addr, bytes, 0); got.MaxSegment > hop-40 {
					t.Errorf("segments of %d bytes through a hop of %d", got.MaxSegment, hop)
				}
				mustKnowPathMTU(t, c, "the transfer's server", hop, func() (int, error) { return c.PathMTU(r.World.Addr(f)) })

				// A published port: the other container learns it by what it answers.
				in, err := lab.StartServer(t.Context(), server, at(server.Addr(f), 80))
				if err != nil {
					t.Fatal(err)
				}
				defer in.Close()
				r.publish(t, maps.SinglePort(8080), server.Addr(f), maps.SinglePort(80))
				mustTransfer(t, r.World, at(r.Host.Addr(f), 8080), bytes, bytes)
				mustKnowPathMTU(t, server, "the published port's client", hop, func() (int, error) { return server.PathMTU(r.World.Addr(f)) })
			})
		}
		r.mustNotDrop(t)
	})
}

func mustKnowPathMTU(t *testing.T, n *lab.Node, to string, want int, ask func() (int, error)) {
	t.Helper()
	if mtu, err := ask(); err != nil || mtu != want {
		t.Errorf("%s has a route cache of mtu %d to %s (%v), want %d", n.Role, mtu, to, err, want)
	}
}
