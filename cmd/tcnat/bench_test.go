package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tcnat/internal/bench"
)

func TestBenchUsage(t *testing.T) {
	for line, want := range map[string]string{
		"bench now":                   "tcnat bench: now: unexpected word (see --help)",
		"bench --only nonsense":       "tcnat bench: --only nonsense: no such measurement (have: out, in, ",
		"bench --only out,":           `tcnat bench: --only "": no such measurement`,
		"bench --pairs 0":             "tcnat bench: --pairs 0: takes a number from 1 to 1000",
		"bench --pairs many":          "tcnat bench: --pairs many: takes a number from 1 to 1000",
		"bench --run-time 1h":         "tcnat bench: --run-time 1h: takes a time from 50ms to 1m",
		"bench --pairs 3 --pairs 4":   "tcnat bench: --pairs: given twice",
		"bench --bridge-nf 2":         "tcnat bench: --bridge-nf 2: takes 0, 1",
		"bench --seed 0":              "tcnat bench: --seed 0: takes a number from 1 on",
		"bench -o svg":                "tcnat bench: --output svg: takes table, json, markdown",
		"bench --fast-path off":       "tcnat bench: --fast-path: no such flag (see --help)",
		"bench --json":                "tcnat bench: --json: its value is missing",
		"bench --short --plots":       "tcnat bench: --plots: its value is missing",
		"bench --short --short=maybe": "tcnat bench: --short maybe: takes true or false",
	} {
		r := tcnat(t, strings.Fields(line)...)
		if r.code != exitUsage || r.stdout != "" || !strings.HasPrefix(r.stderr, want) {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q, want %q", line, r.code, r.stdout, r.stderr, want)
		}
	}
}

// benchReport has a case with a ratio, one without, and what failed.
func benchReport() *bench.Report {
	return &bench.Report{
		Version: "v1", Started: time.Unix(0, 0).UTC(), Machine: bench.Machine{CPUs: 2, Model: "Example", Kernel: "6.18"},
		Settings: bench.Settings{Pairs: 5, StreamPairs: 9, Seed: 7, RunTime: 2 * time.Second},
		Measurements: []bench.Measurement{
			{Name: "out", Title: "packets", Cases: []bench.Case{{
				Name: "1 flow", Unit: "packets/s", Baseline: "plain",
				Rows: []bench.Row{
					{Contender: "plain", Values: []float64{1e6}, Median: 1e6, PathNs: 500},
					{Contender: "nft", Values: []float64{7e5}, Median: 7e5, Pairs: []float64{0.68, 0.7, 0.75}, Ratio: 0.7, RatioMin: 0.68, RatioMax: 0.75, PathNs: 929},
					{Contender: "docker-proxy", Note: "skipped: not installed"},
				},
			}}},
			{Name: "attach", Title: "attaching", Failure: "no\nluck"},
		},
		Goals: []bench.GoalResult{
			{Goal: "out", Want: 1.3, Beyond: 1.42, Measured: true, Value: 1.35, Met: true},
			{Goal: "memory", AtMost: true, Want: 480},
		},
	}
}

func TestBenchOutput(t *testing.T) {
	for name, tc := range map[string]struct {
		print func(*bytes.Buffer) error
		want  []string
	}{
		"table": {func(w *bytes.Buffer) error { return benchTable(w, benchReport()) }, []string{
			"nft           0.70   0.68-0.75  700k packets/s   929 ns",
			"docker-proxy  -      -          -                -       skipped: not installed",
			"FAILED: no | luck", "out     >= 1.30  >= 1.42  1.35          yes", "memory  <= 480   -        not measured  -",
		}},
		"markdown": {func(w *bytes.Buffer) error { return benchMarkdown(w, benchReport()) }, []string{
			"| nft | **0.70** [0.68-0.75] 700k packets/s, path 929 ns |", "| docker-proxy | skipped: not installed |",
			"| out | >= 1.30 | >= 1.42 | 1.35 | yes |",
		}},
	} {
		var text bytes.Buffer
		if err := tc.print(&text); err != nil {
			t.Fatal(err)
		}
		for _, want := range tc.want {
			if !strings.Contains(text.String(), want) {
				t.Errorf("%s: %q is not in\n%s", name, want, text.String())
			}
		}
	}
}

// TestBenchRun measures one thing on the whole way from the command line to files.
func TestBenchRun(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("TCNAT_TEST_REQUIRE") != "" {
			t.Fatal("needs root, for network namespaces and BPF")
		}
		t.Skip("needs root, for network namespaces and BPF")
	}
	if testing.Short() {
		t.Skip("takes seconds")
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "result.json")
	r := tcnat(t, "bench", "--short", "--only", "rtt", "--seed", "3", "--json", file, "--plots", filepath.Join(dir, "plots"), "-o", "json")
	if r.code != exitDone {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	written, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var report bench.Report
	if err := json.Unmarshal(written, &report); err != nil || r.stdout != string(written) {
		t.Errorf("%v: stdout %q, file %q", err, r.stdout, written)
	}
	if _, err := os.Stat(filepath.Join(dir, "plots", "rtt.svg")); err != nil {
		t.Error(err)
	}
	if !strings.Contains(r.stderr, "rtt") {
		t.Errorf("no progress on stderr: %q", r.stderr)
	}
}
