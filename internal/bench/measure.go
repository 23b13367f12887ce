package bench

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// measureFunc makes a measurement among the contenders of the shared scene.
type measureFunc = func(ctx context.Context, b *bench, f field, m *Measurement) error

const (
	unitPackets     = "packets/s"
	unitFlows       = "flows/s"
	unitConnections = "connections/s"
	unitGigabits    = "Gbit/s"
	unitMicros      = "us"
	unitMillis      = "ms"
	unitBytes       = "bytes"
	unitMegabytes   = "MB"
	unitScaling     = "x of one CPU"
	manyFlows       = 10_000
	// passLimit bounds a pass in which every packet opens a flow.
	passLimit = 10 * time.Second
)

// add measures a case and takes it up into the measurement.
func (b *bench) add(ctx context.Context, f field, m *Measurement, t trial) error {
	if t.baseline == "" {
		t.baseline = plain
	}
	t.against = without(t.against, t.baseline)
	if t.pairs == 0 {
		t.pairs = b.Pairs
	}
	name := t.name
	t.name = m.Name + ", " + name
	c, err := b.compare(ctx, f, t)
	c.Name = name
	m.Cases = append(m.Cases, c)
	return err
}

// flowCount is a number of flows in words.
func flowCount(n int) string {
	switch {
	case n == 1:
		return "1 flow"
	case n%1_000_000 == 0:
		return fmt.Sprintf("%dM flows", n/1_000_000)
	case n%1000 == 0:
		return fmt.Sprintf("%dk flows", n/1000)
	}
	return fmt.Sprintf("%d flows", n)
}

func establishedRun(inbound, partial bool, names []string) measureFunc {
	return func(ctx context.Context, b *bench, f field, m *Measurement) error {
		counts := []int{1, manyFlows}
		if partial {
			counts = []int{manyFlows}
		}
		for _, flows := range counts {
			err := b.add(ctx, f, m, trial{
				name: flowCount(flows), unit: unitPackets, against: names,
				run: func(ctx context.Context, c *contender) (float64, error) {
					return c.established(ctx, trafficOptions{inbound: inbound, flows: flows, partial: partial}, b.runTime)
				},
			})
			if err != nil {
				return err
			}
		}
		return nil
	}
}

func flowsRun(names []string) measureFunc {
	return func(ctx context.Context, b *bench, f field, m *Measurement) error {
		if err := f.makeRoom(ctx); err != nil {
			return err
		}
		for _, flows := range b.flows {
			err := b.add(ctx, f, m, trial{
				name: flowCount(flows), unit: unitPackets, against: names,
				run: func(ctx context.Context, c *contender) (float64, error) {
					return c.established(ctx, trafficOptions{flows: flows, containers: b.containers, first: manySources}, b.runTime)
				},
			})
			if err != nil {
				return err
			}
		}
		m.Notes = append(m.Notes, fmt.Sprintf("from %d containers; every flow is answered once before each run", b.containers))
		return nil
	}
}

// makeRoom ends the flows of those whose flows hold ports that others are to have.
func (f field) makeRoom(ctx context.Context) error {
	crowded := field{}
	for name, c := range f {
		if c.crowded {
			crowded[name] = c
		}
	}
	return crowded.flush(ctx)
}

// flush empties all tables at the same time: that takes tcnat's expiry seconds.
func (f field) flush(ctx context.Context) error {
	errs := make(chan error, len(f))
	for name, c := range f {
		go func() {
			err := c.flush(ctx)
			if err != nil {
				err = fmt.Errorf("%s: %w", name, err)
			}
			errs <- err
		}()
	}
	var err error
	for range f {
		err = errors.Join(err, <-errs)
	}
	return err
}

func newRun(names []string) measureFunc {
	return func(ctx context.Context, b *bench, f field, m *Measurement) error {
		if err := f.flush(ctx); err != nil {
			return err
		}
		for _, flows := range b.opened {
			o := trafficOptions{flows: flows, containers: b.containers, first: manySources}
			name := flowCount(flows)
			if flows <= 60_000 {
				o.sources = portSet{first: 4000, step: 1, n: flows}
				name += " to one destination"
			}
			err := b.add(ctx, f, m, trial{
				name: name, unit: unitFlows, against: names,
				run: func(ctx context.Context, c *contender) (float64, error) { return c.opened(ctx, o, passLimit) },
			})
			if err != nil {
				return err
			}
		}
		return nil
	}
}

func connectionsRun(names []string) measureFunc {
	return func(ctx context.Context, b *bench, f field, m *Measurement) error {
		return b.add(ctx, f, m, trial{
			name: "serial client", unit: unitConnections, against: names,
			run: func(ctx context.Context, c *contender) (float64, error) {
				return c.connections(ctx, b.cpus, b.runTime)
			},
		})
	}
}

func streamRun(names []string) measureFunc {
	return func(ctx context.Context, b *bench, f field, m *Measurement) error {
		for _, way := range []struct {
			name   string
			inward bool
		}{{"world to container", true}, {"container to world", false}} {
			err := b.add(ctx, f, m, trial{
				name: way.name, unit: unitGigabits, against: names, pairs: b.streams(),
				run: func(ctx context.Context, c *contender) (float64, error) {
					return c.throughput(ctx, b.cpus, way.inward, b.runTime)
				},
			})
			if err != nil {
				return err
			}
		}
		return nil
	}
}

func latencyRun(names []string) measureFunc {
	return func(ctx context.Context, b *bench, f field, m *Measurement) error {
		var taken = map[*contender][]float64{} // the p99 of each run, which the medians' runs give as well
		err := b.add(ctx, f, m, trial{
			name: "median", unit: unitMicros, lower: true, against: names,
			run: func(ctx context.Context, c *contender) (float64, error) {
				l, err := c.roundTrips(ctx, b.cpus, b.runTime)
				if err == nil {
					taken[c] = append(taken[c], l.p99)
				}
				return l.median, err
			},
		})
		if err != nil {
			return err
		}
		tail := m.Cases[0].sameRuns("p99", func(name string) []float64 { return taken[f[name]] })
		m.Cases = append(m.Cases, tail)
		return nil
	}
}

// sameRuns makes a case of other values that the same runs gave. The baseline has one for each
// of all pairs, so the others are compared with its median.
func (c Case) sameRuns(name string, values func(contender string) []float64) Case {
	other := Case{Name: name, Unit: c.Unit, LowerIsBetter: c.LowerIsBetter, Baseline: c.Baseline}
	base := median(values(c.Baseline))
	for _, row := range c.Rows {
		next := Row{Contender: row.Contender, Note: row.Note, Failure: row.Failure, Values: values(row.Contender)}
		if row.Contender != c.Baseline {
			for _, value := range next.Values {
				next.Pairs = append(next.Pairs, other.ratio(value, base))
			}
		}
		other.Rows = append(other.Rows, next)
	}
	other.settle()
	return other
}

func twoCPURun(names []string) measureFunc {
	return func(ctx context.Context, b *bench, f field, m *Measurement) error {
		if b.cpus < 2 {
			m.Notes = append(m.Notes, "skipped: there is one CPU")
			return nil
		}
		if err := f.makeRoom(ctx); err != nil {
			return err
		}
		o := trafficOptions{flows: 2, containers: 2, first: twoSources}
		return b.add(ctx, f, m, trial{
			name: "two containers", unit: unitScaling, against: names,
			run: func(ctx context.Context, c *contender) (float64, error) {
				one, err := c.established(ctx, o, b.runTime)
				if err != nil {
					return 0, err
				}
				two, err := c.established(ctx, o, b.runTime, 0, 1)
				return two / one, err
			},
		})
	}
}

// besides measures out and in among contenders of a scene of its own.
func (b *bench) besides(ctx context.Context, m *Measurement, names []string, o rigOptions, before func(context.Context, *rig) error) (err error) {
	f, err := b.scene(ctx, names, o, before)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close(ctx)) }()
	for _, way := range []struct {
		name    string
		inbound bool
	}{{"out", false}, {"in", true}} {
		err := b.add(ctx, f, m, trial{
			name: way.name + ", " + flowCount(manyFlows), unit: unitPackets, against: names,
			run: func(ctx context.Context, c *contender) (float64, error) {
				return c.established(ctx, trafficOptions{inbound: way.inbound, flows: manyFlows}, b.runTime)
			},
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func firewallRun(ctx context.Context, b *bench, _ field, m *Measurement) error {
	m.Notes = append(m.Notes, "nft: policy drop, ct state established,related accept, new ones from the bridge and to the published port")
	o := b.rigOptions()
	o.containers = 1
	return b.besides(ctx, m, []string{plain, floor, iptables, tcnatOff, tcnatLeased, tcnatAlways, tcnatNoPorts}, o, firewall)
}

func bridgeNFRun(ctx context.Context, b *bench, _ field, m *Measurement) error {
	o := b.rigOptions()
	o.containers = 1
	o.bridgeNF = !o.bridgeNF
	m.Notes = append(m.Notes, fmt.Sprintf("bridge-nf-call-iptables=%d", toByte(o.bridgeNF)))
	return b.besides(ctx, m, []string{plain, floor, iptables, nftables, redirect, tcnatOff, tcnatLeased, tcnatAlways, tcnatNoPorts}, o, nil)
}
