package bench

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

const payloadSize = frameSize - atPorts - 8 // bytes of data of a datagram in a 64-byte frame

// hostRun measures the traffic of the host's own sockets, which no NAT has anything to do with.
func hostRun(ctx context.Context, b *bench, f field, m *Measurement) error {
	names := []string{plain, iptables, tcnatOff, tcnatLeased, tcnatAlways, tcnatNoPorts}
	err := b.add(ctx, f, m, trial{
		name: "datagrams sent", unit: unitPackets, against: names,
		run: func(ctx context.Context, c *contender) (float64, error) { return c.hostSends(ctx, b.runTime) },
	})
	if err != nil {
		return err
	}
	return b.add(ctx, f, m, trial{
		name: "TCP stream sent", unit: unitGigabits, against: names, pairs: b.streams(),
		run: func(ctx context.Context, c *contender) (float64, error) {
			at := netip.AddrPortFrom(c.rig.worldAddr(), firstTarget)
			return streamBetween(ctx, b.cpus, true, b.runTime, c.rig.Host, c.rig.World, at, at)
		},
	})
}

// hostSends returns the datagrams a second of a socket of the host that arrive at the world.
func (c *contender) hostSends(ctx context.Context, d time.Duration) (rate float64, err error) {
	to := netip.AddrPortFrom(c.rig.worldAddr(), firstTarget)
	want := expectation{
		src: single(c.rig.hostAddr()), dst: single(to.Addr()),
		sports: [2]uint16{1, 65535}, dports: [2]uint16{to.Port(), to.Port()},
	}
	s, err := openSocket(c.rig.Host, unix.SOCK_DGRAM)
	if err != nil {
		return 0, err
	}
	defer s.close()
	if err := s.connect(to); err != nil {
		return 0, err
	}
	count, err := startCounter(want, c.rig.atWorld()...)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, count.close()) }()

	var result carried
	if err := onCPU(0, func() (err error) {
		result.blastResult, err = s.flood(ctx, min(d, maxBlast))
		return err
	}); err != nil {
		return 0, err
	}
	if result.tally, err = count.settle(uint64(result.sent)); err != nil {
		return 0, err
	}
	return result.rate(), result.judge(want)
}

// flood sends datagrams to the socket's peer.
func (s socket) flood(ctx context.Context, d time.Duration) (r blastResult, err error) {
	payload := make([]byte, payloadSize)
	iovec := unix.Iovec{Base: &payload[0]}
	iovec.SetLen(len(payload))
	var messages [batchSize]mmsghdr
	for i := range messages {
		messages[i].hdr.Iov = &iovec
		messages[i].hdr.SetIovlen(1)
	}
	for start, turn := time.Now(), 0; ; turn++ {
		if err := sendMessages(int(s), messages[:]); err != nil {
			return r, err
		}
		r.sent += batchSize
		if r.took = time.Since(start); r.took >= d {
			return r, nil
		}
		if turn%checkEvery == 0 && ctx.Err() != nil {
			return r, ctx.Err()
		}
	}
}
