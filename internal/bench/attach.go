package bench

import (
	"context"
	"errors"
	"time"

	"tcnat/internal/lab"
)

// attachRun measures attaching a fresh instance and attaching once more, by the whole command.
func attachRun(ctx context.Context, b *bench, _ field, m *Measurement) (err error) {
	o := b.rigOptions()
	o.containers = 1
	r, err := newRig(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	inst, err := newInstance(r, b.Binary)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, inst.remove(context.WithoutCancel(ctx))) }()

	fresh := Case{Name: "fresh", Unit: unitMillis, LowerIsBetter: true, Rows: []Row{{Contender: tcnatLeased}}}
	again := Case{Name: "once more", Unit: unitMillis, LowerIsBetter: true, Rows: []Row{{Contender: tcnatLeased}}}
	for i := range b.attaches {
		b.say("%s: %d of %d", m.Name, i+1, b.attaches)
		for _, c := range []*Case{&fresh, &again} {
			took, err := inst.command(ctx, "attach", "--bridge", lab.Bridge, "--uplink", lab.Uplink, "--cgroup", "none")
			if err != nil {
				return err
			}
			c.Rows[0].Values = append(c.Rows[0].Values, millis(took))
		}
		if _, err := inst.command(ctx, "detach"); err != nil {
			return err
		}
	}
	for _, c := range []*Case{&fresh, &again} {
		c.settle()
		m.Cases = append(m.Cases, *c)
	}
	m.Notes = append(m.Notes, "wall time of the command, its start included; default flags, but for --cgroup none")
	return nil
}

func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }
