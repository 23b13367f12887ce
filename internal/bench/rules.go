package bench

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	rulesLoads = 3 // how often a set of rules is loaded
	rulesAdds  = 5 // how often one more is added
	// rulesPatience bounds loading a set: who takes longer is left out.
	rulesPatience = 20 * time.Second
	// rulesPass bounds a pass of new flows: a long list of rules takes milliseconds for each.
	rulesPass = 2 * time.Second
	rangeCase = "a range of 60,000 ports"
)

// rulesRun measures, for each number of rules, loading them, new inbound flows that the last
// one is for, and adding one more.
func rulesRun(ctx context.Context, b *bench, _ field, m *Measurement) (err error) {
	names := []string{plain, iptables, nftables, tcnatLeased, tcnatAlways}
	o := b.rigOptions()
	o.containers = 1
	f, err := b.scene(ctx, names, o, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close(ctx)) }()
	m.Notes = append(m.Notes,
		"loading: iptables-nft-restore, nft -f, tcnat through its library; adding: the whole command, in each case",
		fmt.Sprintf("beyond %d rules, rules name a destination address too", fillerPorts))
	for _, rules := range b.rules {
		if err := b.rulesCase(ctx, f, m, names, publishing{rules: rules, match: matchPort}); err != nil {
			return err
		}
	}
	return b.rulesCase(ctx, f, m, names, publishing{})
}

func (b *bench) rulesCase(ctx context.Context, f field, m *Measurement, names []string, p publishing) error {
	name := rangeCase
	if p.rules > 0 {
		name = ruleCount(p.rules)
	}
	load := Case{Name: "load " + name, Unit: unitMillis, LowerIsBetter: true}
	usable := []string{plain}
	for _, who := range names {
		c := f[who]
		if c == nil || c.rules == nil {
			continue
		}
		row := Row{Contender: who}
		for i := range rulesLoads {
			b.say("%s, %s: %d of %d: %s", m.Name, load.Name, i+1, rulesLoads, who)
			took, err := loadRules(ctx, c, p)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if errors.Is(err, context.DeadlineExceeded) {
				row.Note = fmt.Sprintf("skipped: loading takes more than %s", rulesPatience)
				break
			}
			if err != nil {
				row.Failure = err.Error()
				break
			}
			row.Values = append(row.Values, millis(took))
		}
		if row.Note == "" && row.Failure == "" {
			usable = append(usable, who)
		}
		load.Rows = append(load.Rows, row)
	}
	load.settle()
	m.Cases = append(m.Cases, load)

	traffic := trafficOptions{inbound: true, sources: portSet{first: 4000, step: 1, n: b.ruleFlows}, targets: onePort(matchPort)}
	if p.rules == 0 {
		traffic.sources, traffic.targets = onePort(40000), portSet{first: rangeFirst, step: 1, n: min(rangePorts, b.ruleFlows)}
	}
	err := b.add(ctx, f, m, trial{
		name: "new flows, " + name, unit: unitFlows, against: usable,
		run: func(ctx context.Context, c *contender) (float64, error) { return c.opened(ctx, traffic, rulesPass) },
	})
	if err != nil || p.rules == 0 {
		return err
	}
	return b.addRules(ctx, f, m, usable, name)
}

// loadRules publishes, for rulesPatience at most.
func loadRules(ctx context.Context, c *contender, p publishing) (time.Duration, error) {
	bounded, cancel := context.WithTimeout(ctx, rulesPatience)
	defer cancel()
	took, err := c.rules(bounded, p)
	if err != nil && bounded.Err() != nil {
		err = errors.Join(err, bounded.Err())
	}
	return took, err
}

// addRules measures adding one rule to those there are.
func (b *bench) addRules(ctx context.Context, f field, m *Measurement, names []string, to string) error {
	add := Case{Name: "add one to " + to, Unit: unitMillis, LowerIsBetter: true}
	for _, who := range names {
		c := f[who]
		if c.installed.add == nil {
			continue
		}
		row := Row{Contender: who}
		port := uint16(addedPort)
		values, err := b.alone(ctx, fmt.Sprintf("%s, %s: %s", m.Name, add.Name, who), rulesAdds, func(ctx context.Context) (float64, error) {
			start := time.Now()
			err := c.installed.add(ctx, port)
			port++
			return millis(time.Since(start)), err
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		row.Values = values
		if err != nil {
			row.Failure = err.Error()
		}
		add.Rows = append(add.Rows, row)
	}
	add.settle()
	m.Cases = append(m.Cases, add)
	return nil
}

// ruleCount is a number of rules in words.
func ruleCount(n int) string {
	switch {
	case n == 1:
		return "1 rule"
	case n%1000 == 0:
		return fmt.Sprintf("%dk rules", n/1000)
	}
	return fmt.Sprintf("%d rules", n)
}
