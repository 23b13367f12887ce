package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"
)

// Options choose what a run measures.
type Options struct {
	// Short measures everything a little, for CI: see the table of scales.
	Short bool
	// Pairs is how many runs of plain forwarding and of a contender are compared; 0: 5, and
	// 1 with Short. TCP streams take streamPairs at least, unless Short.
	Pairs int
	// Only are the measurements to make, of those that Names lists; empty: all.
	Only []string
	// NoBridgeNF sets bridge-nf-call-iptables to 0; a Docker host has 1.
	NoBridgeNF bool
	// Seed shuffles the contenders; 0: another one each time. It is in the report.
	Seed uint64
	// Binary is the tcnat command, for what is measured as a whole command; empty: the
	// program that runs.
	Binary string
	// RunTime is how long each run takes; 0: 2 s, and 200 ms with Short.
	RunTime time.Duration
	// Progress gets a line for each step; may be nil.
	Progress func(line string)
}

const (
	defaultPairs = 5
	streamPairs  = 9
)

// scale is how much of everything a run measures.
type scale struct {
	runTime    time.Duration
	containers int
	flows      []int // answered flows
	opened     []int // flows of a pass in which every packet opens one
	rules      []int
	ruleFlows  int // new flows of a pass by a rule
	remembered int // flows whose memory is measured
	attaches   int
}

func (o Options) scale() scale {
	s := scale{
		runTime: 2 * time.Second, containers: 16,
		flows:  []int{1, 10_000, 100_000, 500_000, 1_000_000},
		opened: []int{60_000, 500_000}, rules: []int{1, 1000, 10_000, 100_000}, ruleFlows: 50_000, remembered: 200_000, attaches: 5,
	}
	if o.Short {
		s = scale{
			runTime: 200 * time.Millisecond, containers: 2,
			flows: []int{1, 10_000}, opened: []int{60_000}, rules: []int{1, 1000}, ruleFlows: 10_000, remembered: 20_000, attaches: 3,
		}
	}
	if o.RunTime != 0 {
		s.runTime = o.RunTime
	}
	return s
}

// ErrUnknownMeasurement indicates a name that Names does not list.
var ErrUnknownMeasurement = errors.New("no such measurement")

// ErrNeedsRoot indicates that namespaces and BPF are out of reach.
var ErrNeedsRoot = errors.New("needs root, for network namespaces and BPF (try sudo)")

// measurement is one question.
type measurement struct {
	name, title string
	contenders  []string // of the scene that measurements share
	run         func(ctx context.Context, b *bench, f field, m *Measurement) error
}

func measurements() []measurement {
	packets := []string{plain, floor, iptables, nftables, redirect, redirectNeigh, tcnatOff, tcnatLeased, tcnatAlways, tcnatNoPorts}
	inward := without(packets, redirectNeigh)
	states := []string{plain, iptables, nftables, tcnatOff, tcnatLeased, tcnatAlways, tcnatNoPorts}
	grounded := append(slices.Clone(states), floor)
	opening := append(slices.Clone(grounded), tcnatLeasedPre, tcnatAlwaysPre)
	tcp := append(slices.Clone(states), dockerProxy)
	return []measurement{
		{"out", "established packets/s, container to world", packets, establishedRun(false, false, packets)},
		{"in", "established packets/s, world to container", inward, establishedRun(true, false, inward)},
		{"out-partial", "established packets/s, container to world, checksums left to the device", packets, establishedRun(false, true, packets)},
		{"in-partial", "established packets/s, world to container, checksums left to the device", inward, establishedRun(true, true, inward)},
		{"flows", "packets/s by the number of answered flows, container to world", grounded, flowsRun(grounded)},
		{"new", "new flows/s, container to world", opening, newRun(opening)},
		{"crr", "TCP connect, request, close: connections/s to a published port", tcp, connectionsRun(tcp)},
		{"stream", "TCP stream by a published port", tcp, streamRun(tcp)},
		{"rtt", "round trip of a datagram, container to world and back", states, latencyRun(states)},
		{"twocpu", "scaling of established packets/s from one sender to two on two CPUs, container to world", without(packets, floor), twoCPURun(without(packets, floor))},
		{"rules", "DNAT rules: new flows/s with the matching rule last, loading, adding one", nil, rulesRun},
		{"memory", "memory of flows", nil, memoryRun},
		{"attach", "attaching, by the whole command", nil, attachRun},
		{"host", "the host's own traffic through the uplink", states, hostRun},
		{"firewall", "established packets/s with a conntrack firewall in FORWARD", nil, firewallRun},
		{"brnf", "established packets/s with the other setting of bridge-nf-call-iptables", nil, bridgeNFRun},
	}
}

// Names lists the measurements in the order in which they are made.
func Names() []string {
	var names []string
	for _, m := range measurements() {
		names = append(names, m.name)
	}
	return names
}

func (o Options) chosen() ([]measurement, error) {
	all := measurements()
	for _, name := range o.Only {
		if !slices.Contains(Names(), name) {
			return nil, fmt.Errorf("%s: %w (have: %s)", name, ErrUnknownMeasurement, strings.Join(Names(), ", "))
		}
	}
	if len(o.Only) == 0 {
		return all, nil
	}
	return slices.DeleteFunc(all, func(m measurement) bool { return !slices.Contains(o.Only, m.name) }), nil
}

// Run makes the measurements. The report holds what failed as well, see [Report.Failed]; an
// error is that nothing could be measured, or that the context has ended. Namespaces, pins,
// processes and sysctls are as before when it returns.
//
// Errors wrap ErrUnknownMeasurement or ErrNeedsRoot.
func Run(ctx context.Context, o Options) (_ *Report, err error) {
	chosen, err := o.chosen()
	if err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, ErrNeedsRoot
	}
	b, err := newBench(o)
	if err != nil {
		return nil, err
	}
	restore, err := b.tuneConntrack(chosen)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, restore()) }()
	b.describe()

	var names []string
	for _, m := range chosen {
		for _, name := range m.contenders {
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	shared, err := b.scene(ctx, names, b.rigOptions(), nil)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, shared.close(ctx)) }()
	for _, m := range chosen {
		b.say("%s: %s", m.name, m.title)
		result := Measurement{Name: m.name, Title: m.title}
		if err := m.run(ctx, b, shared, &result); err != nil {
			if ctx.Err() != nil {
				return nil, fmt.Errorf("%s: %w", m.name, ctx.Err())
			}
			b.say("%s: FAILED: %s", m.name, err)
			result.Failure = err.Error()
		}
		b.report.Measurements = append(b.report.Measurements, result)
	}
	b.report.Duration = time.Since(b.started)
	b.report.Goals = b.report.judge()
	return b.report, nil
}

func newBench(o Options) (*bench, error) {
	if o.Pairs == 0 {
		o.Pairs = defaultPairs
		if o.Short {
			o.Pairs = 1
		}
	}
	for o.Seed == 0 {
		o.Seed = rand.Uint64()
	}
	if o.Binary == "" {
		path, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("find the tcnat command: %w", err)
		}
		o.Binary = path
	}
	b := &bench{
		Options: o, scale: o.scale(), random: rand.New(rand.NewPCG(o.Seed, 0)), missing: map[string]string{},
		cpus: runtime.NumCPU(), report: &Report{}, started: time.Now(),
	}
	return b, nil
}

func (b *bench) rigOptions() rigOptions {
	return rigOptions{containers: b.containers, bridgeNF: !b.NoBridgeNF}
}

// streams is how many pairs TCP streams take.
func (b *bench) streams() int {
	if b.Short {
		return b.Pairs
	}
	return max(b.Pairs, streamPairs)
}

// scene builds the contenders, each with a rig. Those that need what is not installed are
// left out, and noted.
func (b *bench) scene(ctx context.Context, names []string, o rigOptions, before func(context.Context, *rig) error) (f field, err error) {
	f = field{}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.close(ctx))
		}
	}()
	for i, name := range names {
		b.say("building rig %d of %d: %s", i+1, len(names), name)
		c, err := newContender(ctx, name, o, b.installOptions(), before)
		if errors.Is(err, errMissing) {
			b.missing[name] = err.Error()
			continue
		}
		if err != nil {
			return f, err
		}
		f[name] = c
		if err := ctx.Err(); err != nil {
			return f, err
		}
	}
	return f, nil
}

func (b *bench) installOptions() installOptions {
	return installOptions{maxFlows: b.maxFlows(), binary: b.Binary}
}

// maxFlows is the room in the tables that are measured: tcnat's own default in a short run.
func (b *bench) maxFlows() uint32 {
	if b.Short {
		return 0
	}
	return measuredMaxFlows
}

func (f field) close(ctx context.Context) error {
	var errs []error
	for name, c := range f {
		if err := c.close(ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

func without(names []string, name string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == name })
}
