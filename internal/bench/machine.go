package bench

import (
	"bufio"
	"compress/gzip"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Machine is what the figures depend on.
type Machine struct {
	Kernel      string            `json:"kernel"`
	CPUs        int               `json:"cpus"`
	Model       string            `json:"model"`
	HZ          string            `json:"hz,omitempty"` // timer frequency, where the kernel tells
	Mitigations map[string]string `json:"mitigations"`
}

const (
	sysctlConntrackMax     = "/proc/sys/net/netfilter/nf_conntrack_max"
	sysctlConntrackBuckets = "/proc/sys/net/netfilter/nf_conntrack_buckets"
	conntrackMax           = "4000000"
	conntrackBuckets       = "1048576"
)

// tuneConntrack makes room in nf_conntrack for the flows of a full run. Both sysctls are the
// machine's, not a namespace's; restore puts them back.
func (b *bench) tuneConntrack(chosen []measurement) (restore func() error, err error) {
	var undo []func() error
	restore = func() error {
		var errs []error
		for _, put := range slices.Backward(undo) {
			errs = append(errs, put())
		}
		undo = nil
		return errors.Join(errs...)
	}
	many := slices.ContainsFunc(chosen, func(m measurement) bool {
		return slices.Contains([]string{"flows", "new", "memory"}, m.name)
	})
	if b.Short || !many {
		return restore, nil
	}
	for _, sysctl := range []struct{ path, value string }{
		{sysctlConntrackMax, conntrackMax}, {sysctlConntrackBuckets, conntrackBuckets},
	} {
		before, err := os.ReadFile(sysctl.path)
		if err == nil {
			b.say("setting %s to %s for this run (was %s)", sysctl.path, sysctl.value, strings.TrimSpace(string(before)))
			err = os.WriteFile(sysctl.path, []byte(sysctl.value), 0)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("make room for flows (only the initial network namespace may; or choose other measurements): %w", err), restore())
		}
		undo = append(undo, func() error {
			if err := os.WriteFile(sysctl.path, before, 0); err != nil {
				return fmt.Errorf("put %s back to %s: %w", sysctl.path, strings.TrimSpace(string(before)), err)
			}
			return nil
		})
	}
	return restore, nil
}

// describe fills in all of the report but results.
func (b *bench) describe() {
	r := b.report
	r.Started = b.started
	if info, ok := debug.ReadBuildInfo(); ok {
		r.Version, r.Commit = info.Main.Version, commit(info)
	}
	r.Machine = machine()
	r.Settings = Settings{
		Short: b.Short, Pairs: b.Pairs, StreamPairs: b.streams(), Seed: b.Seed, RunTime: b.runTime,
		BridgeNF: int(toByte(!b.NoBridgeNF)), FrameBytes: frameSize, Containers: b.containers, MaxFlows: b.maxFlows(),
		ConntrackMax: readText(sysctlConntrackMax), ConntrackBuckets: readText(sysctlConntrackBuckets),
	}
	for _, i := range implementations() {
		r.Contenders = append(r.Contenders, Contender{Name: i.name, About: i.about})
	}
}

func commit(info *debug.BuildInfo) string {
	var revision, modified string
	for _, setting := range info.Settings {
		switch setting.Key {
		case "vcs.revision":
			revision = setting.Value
		case "vcs.modified":
			if setting.Value == "true" {
				modified = "+changes"
			}
		}
	}
	return revision + modified
}

func machine() Machine {
	m := Machine{CPUs: runtime.NumCPU(), Mitigations: map[string]string{}, HZ: kernelHZ()}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		m.Kernel = unix.ByteSliceToString(name.Release[:]) + " " + unix.ByteSliceToString(name.Machine[:])
	}
	for line := range strings.Lines(readText("/proc/cpuinfo")) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			m.Model = strings.TrimSpace(value)
			break
		}
	}
	paths, _ := filepath.Glob("/sys/devices/system/cpu/vulnerabilities/*")
	for _, path := range paths {
		if text := readText(path); text != "Not affected" {
			m.Mitigations[filepath.Base(path)] = text
		}
	}
	return m
}

// kernelHZ reads the kernel's configuration, where it has it with it.
func kernelHZ() string {
	file, err := os.Open("/proc/config.gz")
	if err != nil {
		return ""
	}
	defer file.Close()
	config, err := gzip.NewReader(file)
	if err != nil {
		return ""
	}
	for lines := bufio.NewScanner(config); lines.Scan(); {
		if hz, ok := strings.CutPrefix(lines.Text(), "CONFIG_HZ="); ok {
			return hz
		}
	}
	return ""
}

// readText is what a file holds, or nothing where it cannot be read.
func readText(path string) string {
	text, _ := os.ReadFile(path)
	return strings.TrimSpace(string(text))
}
