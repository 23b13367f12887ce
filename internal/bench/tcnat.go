package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

const (
	// flushPatience is how long the expiry may take to delete flows that have ended.
	flushPatience = 60 * time.Second
	flushPoll     = 250 * time.Millisecond
)

// tcnatImplementations are tcnat in each mode of the fast path, and without port programs.
func tcnatImplementations() []implementation {
	modes := []struct {
		name, about string
		options     loader.AttachOptions
	}{
		{tcnatOff, "tcnat, fast path off", loader.AttachOptions{FastPath: loader.FastPathOff}},
		{tcnatLeased, "tcnat, fast path for established flows", loader.AttachOptions{FastPath: loader.FastPathEstablished}},
		{tcnatAlways, "tcnat, fast path from the first packet", loader.AttachOptions{FastPath: loader.FastPathAlways}},
		{tcnatNoPorts, "tcnat, fast path for established flows, no programs on the bridge's ports",
			loader.AttachOptions{FastPath: loader.FastPathEstablished, NoPorts: true}},
		{tcnatLeasedPre, "tcnat-established with the flows' memory taken at attach (--preallocate)",
			loader.AttachOptions{FastPath: loader.FastPathEstablished, Preallocate: true}},
		{tcnatAlwaysPre, "tcnat-always with the flows' memory taken at attach (--preallocate)",
			loader.AttachOptions{FastPath: loader.FastPathAlways, Preallocate: true}},
	}
	var all []implementation
	for _, mode := range modes {
		all = append(all, implementation{
			name: mode.name, about: mode.about, nat: true,
			install: func(ctx context.Context, r *rig, o installOptions) (installed, error) {
				return installTcnat(ctx, r, mode.options, o)
			},
		})
	}
	return all
}

// instance is tcnat at work in a rig.
type instance struct {
	loader.Instance
	rig    *rig
	binary string
}

func newInstance(r *rig, binary string) (instance, error) {
	dir, err := os.MkdirTemp("", "tcnat-bench-")
	if err != nil {
		return instance{}, fmt.Errorf("directory for the lock: %w", err)
	}
	return instance{Instance: loader.Instance{Name: "bench-" + r.Name, RunDir: dir}, rig: r, binary: binary}, nil
}

// installTcnat attaches an instance of its own and publishes the port.
func installTcnat(ctx context.Context, r *rig, attach loader.AttachOptions, o installOptions) (installed, error) {
	inst, err := newInstance(r, o.binary)
	if err != nil {
		return installed{}, err
	}
	i := installed{pins: inst.Dir(), flush: inst.flush, rules: inst.publish, add: inst.addByCommand, remove: inst.remove}
	attach.Bridges, attach.Uplinks, attach.MaxFlows = []string{lab.Bridge}, []string{lab.Uplink}, o.maxFlows
	err = r.Host.Do(func() error {
		_, err := loader.Attach(ctx, inst.Instance, attach, slog.New(slog.DiscardHandler))
		return err
	})
	if err != nil {
		return i, err
	}
	_, err = inst.publish(ctx, publishing{tcpToo: true, match: publishedPort, rules: 1})
	return i, err
}

// remove detaches the instance.
func (i instance) remove(ctx context.Context) error {
	err := i.rig.Host.Do(func() error {
		_, err := loader.Detach(ctx, i.Instance)
		return err
	})
	return errors.Join(err, os.RemoveAll(i.RunDir))
}

// with runs fn on the opened instance.
func (i instance) with(open func(loader.Instance) (*loader.Datapath, error), fn func(*loader.Datapath) error) error {
	return i.rig.Host.Do(func() error {
		d, err := open(i.Instance)
		if err != nil {
			return err
		}
		return errors.Join(fn(d), d.Close())
	})
}

// publish puts DNAT rules in force instead of those there are, and returns how long that took.
func (i instance) publish(_ context.Context, p publishing) (took time.Duration, err error) {
	var dnat []maps.DNATRule
	for _, rule := range p.list() {
		protocol := maps.UDP
		if rule.protocol == wordTCP {
			protocol = maps.TCP
		}
		dnat = append(dnat, maps.DNATRule{
			Protocol: protocol, Destination: rule.destination,
			Ports: maps.PortRange{First: rule.first, Last: rule.last}, To: i.rig.containerAddr(0),
		})
	}
	start := time.Now()
	err = i.with(loader.OpenRules, func(d *loader.Datapath) error {
		_, err := d.State().ChangeRules(func(rules *maps.Rules) (bool, error) {
			rules.DNAT = dnat
			return true, nil
		})
		return err
	})
	return time.Since(start), err
}

// flush ends all flows by taking all rules away and putting them back, and waits until the
// expiry has deleted every one.
func (i instance) flush(ctx context.Context) error {
	err := i.with(loader.OpenRules, func(d *loader.Datapath) error {
		have, err := d.State().Rules()
		if err != nil {
			return err
		}
		if err := d.State().SetRules(maps.Rules{}); err != nil {
			return err
		}
		return d.State().SetRules(have)
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, flushPatience)
	defer cancel()
	for {
		left, err := i.elements()
		if err != nil {
			return err
		}
		if left == 0 {
			return nil
		}
		select {
		case <-time.After(flushPoll):
		case <-ctx.Done():
			return fmt.Errorf("%d elements are left: %w", left, ctx.Err())
		}
	}
}

// elements counts what is in the tables that packets fill.
func (i instance) elements() (n int, err error) {
	err = i.with(loader.Open, func(d *loader.Datapath) error {
		elements, err := d.State().Elements()
		for _, count := range elements {
			n += count
		}
		return err
	})
	return n, err
}

// command runs the command line on the instance, and returns how long that took.
func (i instance) command(ctx context.Context, args ...string) (time.Duration, error) {
	global := []string{"--instance", i.Name, "--run-dir", i.RunDir}
	return runTimed(ctx, i.rig.Host, "", i.binary, append(global, args...)...)
}

func (i instance) addByCommand(ctx context.Context, port uint16) error {
	_, err := i.command(ctx, "dnat", "add", "-p", "udp", "--dport", fmt.Sprint(port),
		"--to-destination", fmt.Sprintf("%s:%d", i.rig.containerAddr(0), port))
	return err
}
