package lab

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A tool that does nothing must not pass: the demo says at which step, detaches, and
// leaves no lab behind.
func TestDemoFailsWithoutNAT(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	var (
		out      strings.Builder
		commands []string
	)
	tool := DemoTool{
		Run: func(_ context.Context, _ io.Writer, args ...string) error {
			commands = append(commands, strings.Join(args, " "))
			return nil
		},
		PinDir: func(instance string) string { return filepath.Join(t.TempDir(), instance) },
	}
	err := Demo(t.Context(), &out, tool)
	if !errors.Is(err, ErrFailed) || !errors.Is(err, ErrNoReply) {
		t.Errorf("got %v, want %v: %v", err, ErrFailed, ErrNoReply)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if last := lines[len(lines)-1]; !strings.HasPrefix(last, "FAILED  container pings 1.1.1.1") {
		t.Errorf("last line: %s", last)
	}
	if n := strings.Count(out.String(), "\nok      container pings"); n != 2 {
		t.Errorf("%d pings without reply shown, want one a family:\n%s", n, out.String())
	}
	lab := regexp.MustCompile(`--netns tcnat-([0-9a-f]+)-host`).FindStringSubmatch(strings.Join(commands, "\n"))
	if lab == nil || len(commands) != 2 || !strings.HasSuffix(commands[1], " detach") {
		t.Fatalf("commands: %s", strings.Join(commands, "\n"))
	}
	mustBeGone(t, lab[1])
}

func TestDemoFailsWithTool(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	refused := errors.New("refused")
	var out strings.Builder
	err := Demo(t.Context(), &out, DemoTool{
		Run: func(_ context.Context, _ io.Writer, args ...string) error {
			if slices.Contains(args, "attach") {
				return refused
			}
			return nil
		},
		PinDir: func(string) string { return "" },
	})
	if !errors.Is(err, ErrFailed) || !errors.Is(err, refused) || !strings.Contains(out.String(), "FAILED  tcnat attach") {
		t.Errorf("got %v, output:\n%s", err, out.String())
	}
}
