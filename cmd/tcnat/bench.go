package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tcnat/internal/bench"
)

const formatMarkdown format = "markdown"

// errNotMeasured is the end of a bench in which something failed that is in its result.
var errNotMeasured = errors.New("not everything could be measured")

func newBench(e *env) *cobra.Command {
	var (
		options  bench.Options
		pairs    once[int]
		runTime  once[time.Duration]
		only     many[string]
		bridgeNF once[bool]
		seed     once[uint64]
		output   once[format]
		jsonFile string
		plotDir  string
	)
	cmd := &cobra.Command{
		Use:   "bench [flags]",
		Short: "this NAT beside iptables, nftables and none, in throw-away namespaces",
		Long: `Measures how fast containers reach the world, and the world a published port: with plain
forwarding, iptables, nftables, docker-proxy, bare redirects (the ceiling), and tcnat in each
mode of its fast path. All of it happens in network namespaces of its own, which are gone
afterwards. Values are compared in pairs with plain forwarding, and a packet counts only when
it arrives translated as it should be.

A full run takes hours, and two CPUs that do nothing else; it raises nf_conntrack_max and
nf_conntrack_buckets of the machine while it lasts. It ends with 1 when a measurement failed,
whatever the goals say.

Measurements: ` + strings.Join(bench.Names(), ", ") + ".",
		Example: `  tcnat bench --short
  tcnat bench --only out,in --pairs 9
  tcnat bench --json result.json --plots plots -o markdown >result.md`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			options.Pairs, options.Only, options.Seed = pairs.value, only.values, seed.value
			options.RunTime = runTime.value
			options.NoBridgeNF = bridgeNF.isSet && !bridgeNF.value
			options.Progress = func(line string) { e.notef("%s", line) }
			return e.bench(cmd.Context(), options, benchOutput{format: output.value, jsonFile: jsonFile, plotDir: plotDir})
		},
	}
	fs := cmd.Flags()
	fs.BoolVar(&options.Short, "short", false, "everything a little, in less than 3 minutes")
	bindOnce(fs, &pairs, "pairs", "", "N", "compare N pairs of runs (default 5, with --short 1; TCP streams at least 9)", parsePairs)
	bindOnce(fs, &runTime, "run-time", "", "TIME", "let each run take TIME (default 2s, with --short 200ms)", parseRunTime)
	bindMany(fs, &only, "only", "", "NAME", "only the measurement NAME; repeats", parseMeasurement)
	bindOnce(fs, &bridgeNF, "bridge-nf", "", "0|1", "set bridge-nf-call-iptables to 0|1 (default 1, as Docker hosts have it)",
		word("bridge-nf", map[string]bool{"0": false, "1": true}, "0", "1"))
	bindOnce(fs, &seed, "seed", "", "N", "shuffle as the run with seed N did", parseSeed)
	fs.StringVar(&jsonFile, "json", "", "write the result with all raw values to `FILE`")
	fs.StringVar(&plotDir, "plots", "", "draw the result as SVG into the directory `DIR`")
	bindOnce(fs, &output, "output", "o", "FORMAT", "FORMAT of the result: table (default), json or markdown",
		word("output", map[string]format{"table": formatTable, "json": formatJSON, "markdown": formatMarkdown}, "table", "json", "markdown"))
	completeWords(cmd, "output", "table", "json", "markdown")
	completeWords(cmd, "bridge-nf", "0", "1")
	completeWords(cmd, "only", bench.Names()...)
	return cmd
}

// benchOutput is where the result goes.
type benchOutput struct {
	format            format
	jsonFile, plotDir string
}

func (e *env) bench(ctx context.Context, options bench.Options, out benchOutput) error {
	report, err := bench.Run(ctx, options)
	if err != nil {
		return err
	}
	if out.jsonFile != "" {
		if err := writeJSONFile(out.jsonFile, report); err != nil {
			return err
		}
	}
	if out.plotDir != "" {
		files, err := report.Plot(out.plotDir)
		if err != nil {
			return err
		}
		e.notef("drew %s into %s", count(len(files), "plot"), out.plotDir)
	}
	switch out.format {
	case formatJSON:
		err = writeJSON(e.stdout, report)
	case formatMarkdown:
		err = benchMarkdown(e.stdout, report)
	default:
		err = benchTable(e.stdout, report)
	}
	if err == nil && report.Failed() {
		err = errNotMeasured
	}
	return err
}

func writeJSONFile(path string, value any) (err error) {
	file, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("--json: %w", err)
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	return writeJSON(file, value)
}

func parsePairs(text string) (int, error) {
	pairs, err := strconv.Atoi(text)
	if err != nil || pairs < 1 || pairs > 1000 {
		return 0, fmt.Errorf("--pairs %s: takes a number from 1 to 1000", quoteEmpty(text))
	}
	return pairs, nil
}

func parseRunTime(text string) (time.Duration, error) {
	took, err := time.ParseDuration(text)
	if err != nil || took < 50*time.Millisecond || took > time.Minute {
		return 0, fmt.Errorf("--run-time %s: takes a time from 50ms to 1m", quoteEmpty(text))
	}
	return took, nil
}

func parseSeed(text string) (uint64, error) {
	seed, err := strconv.ParseUint(text, 10, 64)
	if err != nil || seed == 0 {
		return 0, fmt.Errorf("--seed %s: takes a number from 1 on", quoteEmpty(text))
	}
	return seed, nil
}

func parseMeasurement(text string) (string, error) {
	if !slices.Contains(bench.Names(), text) {
		return "", fmt.Errorf("--only %s: no such measurement (have: %s)", quoteEmpty(text), strings.Join(bench.Names(), ", "))
	}
	return text, nil
}
