package bench

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	echoPort = 7
	// maxEchoes bounds the round trips of one run, for which room is made before it.
	maxEchoes = 1 << 20
)

// latency is what round trips took, in microseconds.
type latency struct{ median, p99 float64 }

// roundTrips measures how long a datagram from the first container takes to the world and back.
func (c *contender) roundTrips(ctx context.Context, cpus int, d time.Duration) (latency, error) {
	r := c.rig
	at := netip.AddrPortFrom(r.worldAddr(), echoPort)
	server, err := listen(r.World, unix.SOCK_DGRAM, at)
	if err != nil {
		return latency{}, err
	}
	defer server.close()
	client, err := openSocket(r.Containers[0], unix.SOCK_DGRAM)
	if err != nil {
		return latency{}, err
	}
	defer client.close()
	if err := client.connect(at); err != nil {
		return latency{}, err
	}
	took := make([]float64, 0, maxEchoes)
	err = serve(ctx, cpus, server, server.echo, func(ctx context.Context) error {
		var message [messageSize]byte
		for start := time.Now(); time.Since(start) < d && len(took) < cap(took) && ctx.Err() == nil; {
			sent := time.Now()
			if err := client.write(message[:]); err != nil {
				return err
			}
			if _, err := client.read(message[:]); err != nil {
				return fmt.Errorf("no answer after %d: %w", len(took), err)
			}
			took = append(took, float64(time.Since(sent).Nanoseconds())/1e3)
		}
		return ctx.Err()
	})
	if err != nil {
		return latency{}, err
	}
	slices.Sort(took)
	return latency{median: quantile(took, 0.5), p99: quantile(took, 0.99)}, nil
}

// echo sends datagrams back until the context ends.
func (s socket) echo(ctx context.Context) error {
	message := make([]byte, messageSize)
	for {
		n, from, err := unix.Recvfrom(int(s), message, 0)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case retry(err):
			continue
		case err != nil:
			return fmt.Errorf("receive: %w", err)
		}
		if err := unix.Sendto(int(s), message[:n], 0, from); err != nil && !retry(err) {
			return fmt.Errorf("answer: %w", err)
		}
	}
}
