package bench

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const protocolTCP = unix.IPPROTO_TCP

// Shares of what was sent that may be missing, or may not be as it should: more than that is
// no measurement of a NAT.
const (
	maxLost  = 0.02
	maxWrong = 0.001
)

// errNotTranslated indicates that packets did not arrive, or not as they should.
var errNotTranslated = errors.New("packets do not arrive as they should")

// carried is what a flood came to where it is received.
type carried struct {
	blastResult
	tally rigTally
}

// rate is the packets a second that arrived as they should.
func (c carried) rate() float64 { return float64(c.tally.Expected) / c.took.Seconds() }

// judge fails where too many packets are missing or wrong.
func (c carried) judge(want expectation) error {
	sent := float64(c.sent)
	switch t := c.tally; {
	case c.sent == 0:
		return fmt.Errorf("%w: nothing was sent", errNotTranslated)
	case float64(t.Other) > maxWrong*sent:
		return fmt.Errorf("%w: %d of %d arrived otherwise than from %s to %s", errNotTranslated, t.Other, c.sent, want.src, want.dst)
	case t.BadSum != 0:
		return fmt.Errorf("%w: %d of %d have a wrong checksum", errNotTranslated, t.BadSum, c.sent)
	case float64(t.Expected) < (1-maxLost)*sent:
		return fmt.Errorf("%w: %d of %d arrived", errNotTranslated, t.Expected, c.sent)
	}
	return nil
}

// carry sends a leg's packets and counts them where they arrive. Several options: as many
// senders at once, each with its share of the streams.
func (l leg) carry(ctx context.Context, o ...blastOptions) (result carried, err error) {
	count, err := startCounter(l.want, l.at...)
	if err != nil {
		return result, err
	}
	defer func() { err = errors.Join(err, count.close()) }()

	results, errs := make(chan blastResult, len(o)), make(chan error, len(o))
	for i, each := range o {
		var mine []stream
		for at := i; at < len(l.streams); at += len(o) {
			mine = append(mine, l.streams[at])
		}
		go func() {
			r, err := blast(ctx, mine, each)
			results <- r
			errs <- err
		}()
	}
	for range o {
		r := <-results
		result.sent += r.sent
		result.took = max(result.took, r.took)
		err = errors.Join(err, <-errs)
	}
	if err != nil {
		return result, err
	}
	if result.tally, err = count.settle(uint64(result.sent)); err != nil {
		return result, err
	}
	return result, result.judge(l.want)
}

// answer opens the flows and answers each once. Every packet's checksum is looked at on the way.
func (t traffic) answer(ctx context.Context, cpu int) error {
	for _, step := range []struct {
		what string
		leg  leg
	}{{"open flows", t.forward}, {"answer flows", t.reply}} {
		step.leg.want.checkSums = step.leg.want.protocol == 0
		if _, err := step.leg.carry(ctx, blastOptions{cpu: cpu}); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return nil
}

// established returns the packets a second of flows that are all answered.
func (c *contender) established(ctx context.Context, o trafficOptions, d time.Duration, cpus ...int) (float64, error) {
	t, err := c.newTraffic(o)
	if err != nil {
		return 0, err
	}
	c.used = true
	if !c.stateless {
		if err := t.answer(ctx, 0); err != nil {
			return 0, err
		}
	} else if err := t.sample(ctx); err != nil {
		return 0, err
	}
	if len(cpus) == 0 {
		cpus = []int{0}
	}
	var senders []blastOptions
	for _, cpu := range cpus {
		senders = append(senders, blastOptions{cpu: cpu, duration: d})
	}
	result, err := t.forward.carry(ctx, senders...)
	return result.rate(), err
}

// sample sends a few packets whose checksums are looked at.
func (t traffic) sample(ctx context.Context) error {
	few := t.forward
	few.want.checkSums = true
	_, err := few.carry(ctx, blastOptions{duration: time.Microsecond}) // a batch
	return err
}

// opened returns the flows a second where every packet opens one.
func (c *contender) opened(ctx context.Context, o trafficOptions, limit time.Duration) (float64, error) {
	if err := c.flush(ctx); err != nil {
		return 0, err
	}
	t, err := c.newTraffic(o)
	if err != nil {
		return 0, err
	}
	c.used, c.crowded = true, true
	result, err := t.forward.carry(ctx, blastOptions{limit: limit})
	return result.rate(), err
}
