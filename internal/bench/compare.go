package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"time"
)

// trial is a case to be measured.
type trial struct {
	name     string
	unit     string
	lower    bool     // lower values are better
	baseline string   // whom each contender is paired with
	against  []string // the contenders
	pairs    int
	run      func(ctx context.Context, c *contender) (float64, error)
}

// field is the contenders of a scene, by name.
type field map[string]*contender

// compare measures each contender in pairs with the baseline, in an order that is shuffled
// each round. A contender that fails is out, and its row says why; an error is only that of
// the context, or of a baseline that fails.
func (b *bench) compare(ctx context.Context, f field, t trial) (Case, error) {
	result := Case{Name: t.name, Unit: t.unit, LowerIsBetter: t.lower, Baseline: t.baseline}
	base := Row{Contender: t.baseline}
	rows := make([]Row, len(t.against))
	for i, name := range t.against {
		rows[i].Contender = name
	}
	for round := range t.pairs {
		for turn, i := range b.random.Perm(len(t.against)) {
			row := &rows[i]
			if row.Failure != "" || row.Note != "" {
				continue
			}
			if missing, ok := b.missing[row.Contender]; ok {
				row.Note = "skipped: " + missing
				continue
			}
			b.say("%s: pair %d of %d: %s", t.name, round+1, t.pairs, row.Contender)
			order := []string{t.baseline, row.Contender}
			if (round+turn)%2 == 1 {
				slices.Reverse(order)
			}
			values, err := b.pair(ctx, f, order, t)
			switch {
			case ctx.Err() != nil:
				return result, ctx.Err()
			case errors.Is(err, errBaseline):
				return result, err
			case err != nil:
				row.Failure = err.Error()
				b.say("%s: %s: FAILED: %s", t.name, row.Contender, err)
				continue
			}
			base.Values = append(base.Values, values[t.baseline])
			row.Values = append(row.Values, values[row.Contender])
			row.Pairs = append(row.Pairs, result.ratio(values[row.Contender], values[t.baseline]))
		}
	}
	result.Rows = append([]Row{base}, rows...)
	result.settle()
	return result, nil
}

// errBaseline indicates that what others are compared with could not be measured.
var errBaseline = errors.New("the baseline fails")

func (b *bench) pair(ctx context.Context, f field, order []string, t trial) (map[string]float64, error) {
	values := map[string]float64{}
	for _, name := range order {
		c, ok := f[name]
		if !ok {
			return nil, fmt.Errorf("%s: not in this scene", name)
		}
		runtime.GC() // not while a run is under way
		value, err := t.run(ctx, c)
		if err != nil {
			err = fmt.Errorf("%s: %w", name, err)
			if name == t.baseline {
				err = errors.Join(errBaseline, err)
			}
			return nil, err
		}
		values[name] = value
	}
	return values, nil
}

// alone measures one contender without a pair, as often as given.
func (b *bench) alone(ctx context.Context, what string, times int, run func(context.Context) (float64, error)) ([]float64, error) {
	var values []float64
	for i := range times {
		b.say("%s: %d of %d", what, i+1, times)
		value, err := run(ctx)
		if err != nil {
			return values, fmt.Errorf("%s: %w", what, err)
		}
		values = append(values, value)
	}
	return values, nil
}

// bench is one run.
type bench struct {
	Options
	scale
	random  *rand.Rand
	missing map[string]string // contenders that cannot be had here, and why
	cpus    int
	report  *Report
	started time.Time
}

func (b *bench) say(format string, args ...any) {
	if b.Progress != nil {
		b.Progress(fmt.Sprintf("[%s] ", time.Since(b.started).Round(time.Second)) + fmt.Sprintf(format, args...))
	}
}
