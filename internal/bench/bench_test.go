package bench

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"tcnat/loader"
	"tcnat/maps"
)

const shortRun = 20 * time.Millisecond

// needRoot skips, unless TCNAT_TEST_REQUIRE forbids it.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("TCNAT_TEST_REQUIRE") != "" {
		t.Fatal("needs root, for network namespaces and BPF")
	}
	t.Skip("needs root, for network namespaces and BPF")
}

// startContender builds a contender that is gone when the test ends.
func startContender(t *testing.T, name string, containers int) *contender {
	t.Helper()
	needRoot(t)
	c, err := newContender(t.Context(), name, rigOptions{containers: containers, bridgeNF: true}, installOptions{}, nil)
	if errors.Is(err, errMissing) && os.Getenv("TCNAT_TEST_REQUIRE") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
		for _, n := range []string{c.rig.Name} {
			left, _ := filepath.Glob("/run/netns/tcnat-" + n + "-*")
			pins, _ := filepath.Glob("/sys/fs/bpf/tcnat/bench-" + n + "*")
			if len(left)+len(pins) > 0 {
				t.Errorf("left behind: %v %v", left, pins)
			}
		}
	})
	return c
}

// TestContendersCarry sends flows each way through every contender that can.
func TestContendersCarry(t *testing.T) {
	for _, impl := range implementations() {
		if impl.name == dockerProxy {
			continue
		}
		t.Run(impl.name, func(t *testing.T) {
			c := startContender(t, impl.name, 2)
			for _, tc := range []struct {
				name string
				o    trafficOptions
			}{
				{"out", trafficOptions{flows: 500, containers: 1}},
				{"out, partial", trafficOptions{flows: 500, containers: 1, partial: true}},
				{"out, two containers", trafficOptions{flows: 500, containers: 2, first: manySources}},
				{"in", trafficOptions{flows: 500, inbound: true}},
				{"in, partial", trafficOptions{flows: 500, inbound: true, partial: true}},
			} {
				rate, err := c.established(t.Context(), tc.o, shortRun)
				if err != nil || rate < 1000 {
					t.Errorf("%s: %.0f packets/s, %v", tc.name, rate, err)
				}
			}
		})
	}
}

// TestBrokenNATFails takes the rules away from under a measurement.
func TestBrokenNATFails(t *testing.T) {
	broken := map[string]func(context.Context, *contender) error{
		iptables: func(ctx context.Context, c *contender) error {
			_, err := runTimed(ctx, c.rig.Host, "", "iptables-nft", "-t", "nat", "-F")
			return errors.Join(err, c.rig.flushConntrack(ctx))
		},
		nftables: func(ctx context.Context, c *contender) error {
			_, err := runTimed(ctx, c.rig.Host, "", "nft", "flush", "ruleset")
			return errors.Join(err, c.rig.flushConntrack(ctx))
		},
		tcnatLeased: func(_ context.Context, c *contender) error {
			return c.rig.Host.Do(func() error {
				d, err := loader.OpenForWrite(loader.Instance{Name: "bench-" + c.rig.Name})
				if err != nil {
					return err
				}
				return errors.Join(d.State().SetRules(maps.Rules{}), d.Close())
			})
		},
	}
	for name, breakIt := range broken {
		t.Run(name, func(t *testing.T) {
			c := startContender(t, name, 1)
			if err := breakIt(t.Context(), c); err != nil {
				t.Fatal(err)
			}
			for _, inbound := range []bool{false, true} {
				rate, err := c.established(t.Context(), trafficOptions{flows: 100, inbound: inbound}, shortRun)
				if !errors.Is(err, errNotTranslated) {
					t.Errorf("inbound %v: %.0f packets/s, %v", inbound, rate, err)
				}
				if rate, err := c.opened(t.Context(), trafficOptions{flows: 100, inbound: inbound}, time.Second); !errors.Is(err, errNotTranslated) {
					t.Errorf("inbound %v: %.0f new flows/s, %v", inbound, rate, err)
				}
			}
		})
	}
}

// TestCounterSeesWhatIsWrong sends what is as it should be, what comes from another port, and
// what has a wrong checksum.
func TestCounterSeesWhatIsWrong(t *testing.T) {
	c := startContender(t, plain, 1)
	layout, err := c.newTraffic(trafficOptions{flows: 64})
	if err != nil {
		t.Fatal(err)
	}
	forward := layout.forward
	forward.want.checkSums = true
	count, err := startCounter(forward.want, forward.at...)
	if err != nil {
		t.Fatal(err)
	}
	defer count.close()
	for _, tc := range []struct {
		name   string
		change func(*batch)
		want   rigTally
	}{
		{"good", func(*batch) {}, rigTally{Expected: batchSize}},
		{"port", func(b *batch) { b.pairs = portPairs{src: onePort(1000), dst: onePort(firstTarget)} }, rigTally{Other: batchSize}},
		{"checksum", func(b *batch) { b.template.sum++ }, rigTally{Expected: batchSize, BadSum: batchSize}},
	} {
		before, err := count.read()
		if err != nil {
			t.Fatal(err)
		}
		b := newBatch(forward.streams[0])
		tc.change(b)
		if err := b.send(batchSize); err != nil {
			t.Fatal(err)
		}
		after, err := count.settle(before.Expected + before.Other + batchSize)
		if err != nil {
			t.Fatal(err)
		}
		got := rigTally{
			Expected: after.Expected - before.Expected, Other: after.Other - before.Other, BadSum: after.BadSum - before.BadSum,
		}
		if got != tc.want {
			t.Errorf("%s: %+v, want %+v", tc.name, got, tc.want)
		}
		judged := carried{blastResult: blastResult{sent: batchSize}, tally: got}.judge(forward.want)
		if (judged == nil) != (tc.name == "good") {
			t.Errorf("%s: %v", tc.name, judged)
		}
	}
}

func TestConnectionsAndStreams(t *testing.T) {
	for _, name := range []string{plain, iptables, nftables, dockerProxy, tcnatOff} {
		t.Run(name, func(t *testing.T) {
			c := startContender(t, name, 1)
			const d = 10 * shortRun
			if rate, err := c.connections(t.Context(), 2, d); err != nil || rate < 10 {
				t.Errorf("%.0f connections/s, %v", rate, err)
			}
			for _, inward := range []bool{true, false} {
				if rate, err := c.throughput(t.Context(), 2, inward, d); err != nil || rate < 0.01 {
					t.Errorf("inward %v: %.2f Gbit/s, %v", inward, rate, err)
				}
			}
		})
	}
}

// TestConnectionsFailWithoutNAT takes the rules away.
func TestConnectionsFailWithoutNAT(t *testing.T) {
	c := startContender(t, iptables, 1)
	if _, err := runTimed(t.Context(), c.rig.Host, "", "iptables-nft", "-t", "nat", "-F"); err != nil {
		t.Fatal(err)
	}
	if rate, err := c.connections(t.Context(), 2, shortRun); err == nil {
		t.Errorf("%.0f connections/s", rate)
	}
}

// TestRun makes a real run of some measurements, end to end.
func TestRun(t *testing.T) {
	needRoot(t)
	binary := filepath.Join(t.TempDir(), "tcnat")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, "tcnat/cmd/tcnat").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	report, err := Run(t.Context(), Options{
		Short: true, RunTime: shortRun, Binary: binary, Seed: 1, Only: []string{"out", "memory", "attach", "host"},
		Progress: func(line string) { t.Log(line) },
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range report.Measurements {
		if m.Failure != "" || len(m.Cases) == 0 {
			t.Errorf("%s: %d cases, %s", m.Name, len(m.Cases), m.Failure)
		}
		for _, c := range m.Cases {
			for _, row := range c.Rows {
				if row.Failure != "" || len(row.Values) == 0 && row.Note == "" {
					t.Errorf("%s, %s, %s: %d values, %s", m.Name, c.Name, row.Contender, len(row.Values), row.Failure)
				}
			}
		}
	}
	if report.Machine.Kernel == "" || report.Settings.Seed != 1 || len(report.Goals) == 0 {
		t.Errorf("%+v, %+v, %d goals", report.Machine, report.Settings, len(report.Goals))
	}
}

// TestRunStopsWithItsContext ends a run half-way.
func TestRunStopsWithItsContext(t *testing.T) {
	needRoot(t)
	ctx, cancel := context.WithCancel(t.Context())
	steps := 0
	start := time.Now()
	report, err := Run(ctx, Options{Short: true, Only: []string{"out"}, Progress: func(string) {
		if steps++; steps == 14 { // beyond the rigs
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) || report != nil {
		t.Errorf("%v, %v after %s", report, err, time.Since(start))
	}
}

func TestRunRefusesUnknownNames(t *testing.T) {
	if _, err := Run(t.Context(), Options{Only: []string{"nonsense"}}); !errors.Is(err, ErrUnknownMeasurement) {
		t.Errorf("%v", err)
	}
}

// TestRigIsGoneAfterAFailure builds a contender whose installation fails.
func TestRigIsGoneAfterAFailure(t *testing.T) {
	needRoot(t)
	var name string
	failed := errors.New("failed on purpose")
	_, err := newContender(t.Context(), plain, rigOptions{containers: 1}, installOptions{}, func(_ context.Context, r *rig) error {
		name = r.Name
		return failed
	})
	if !errors.Is(err, failed) {
		t.Fatal(err)
	}
	if _, err := os.Stat("/run/netns/tcnat-" + name + "-host"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
