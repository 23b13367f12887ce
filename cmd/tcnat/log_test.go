package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"tcnat/loader"
)

func TestLogLines(t *testing.T) {
	for _, test := range []struct {
		verbose bool
		want    string
	}{
		{false, "warning: bridge has no address | twice (instance=x bridge=docker0)\n"},
		{true, "warning: bridge has no address | twice (instance=x bridge=docker0)\nattached (instance=x)\n"},
	} {
		var stderr bytes.Buffer
		e := newEnv(nil, &stderr)
		e.verbose = test.verbose
		log := e.logger().With("instance", "x")
		log.Warn("bridge has no address\ntwice", "bridge", "docker0")
		log.Info("attached")
		if stderr.String() != test.want {
			t.Errorf("verbose %t: %q, want %q", test.verbose, stderr.String(), test.want)
		}
	}
}

// A program that the kernel refuses: one line that says so, then the end of the verifier's
// log, with -v all of it.
func TestVerifierLog(t *testing.T) {
	var log []string
	for i := range 100 {
		log = append(log, fmt.Sprintf("step %d", i))
	}
	for _, verbose := range []bool{false, true} {
		var stdout, stderr bytes.Buffer
		e := newEnv(&stdout, &stderr)
		e.attach = func(context.Context, loader.Instance, loader.AttachOptions, *slog.Logger) (*loader.Status, error) {
			return nil, fmt.Errorf("load: program from_bridge: %w", &ebpf.VerifierError{Cause: errors.New("permission denied"), Log: log})
		}
		args := []string{"attach", "--bridge", "docker0", "--uplink", "eth0"}
		if verbose {
			args = append(args, "-v")
		}
		code := run(t.Context(), e, args)
		first, rest, _ := strings.Cut(stderr.String(), "\n")
		if code != exitFailed || stdout.Len() > 0 || !strings.HasPrefix(first, "tcnat attach: load: program from_bridge: ") {
			t.Errorf("exit code %d, first line %q", code, first)
		}
		if !strings.Contains(rest, "step 99\n") || strings.Contains(rest, "step 10\n") != verbose {
			t.Errorf("verbose %t: the log reads\n%s", verbose, rest)
		}
	}
}
