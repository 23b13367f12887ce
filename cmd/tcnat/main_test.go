package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
	"tcnat/loader"
)

var update = flag.Bool("update", false, "write testdata/cli anew from what the commands print")

// As root, the tests run in a mount and a network namespace of their own, with a bpffs and
// a /run of their own: whatever happens to them, nothing stays on the machine.
const innerEnv = "TCNAT_CLI_TEST_INNER"

func TestMain(m *testing.M) {
	switch {
	case os.Getuid() != 0 || os.Getenv(innerEnv) == "mounted":
		os.Exit(m.Run())
	case os.Getenv(innerEnv) == "":
		os.Exit(runInner())
	}
	if err := privateMounts(); err != nil {
		fmt.Fprintln(os.Stderr, "command line tests:", err)
		os.Exit(1)
	}
	if err := os.Setenv(innerEnv, "mounted"); err != nil { // for the workers of a fuzz test
		fmt.Fprintln(os.Stderr, "command line tests:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func runInner() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), innerEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET,
		Pdeathsig:  syscall.SIGKILL,
	}
	runtime.LockOSThread() // the child dies with this thread
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "command line tests:", err)
		return 1
	}
	return 0
}

func privateMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// Whatever a test forgets, the machine's root cgroup is out of reach.
	for _, cgroups := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if err := unix.Unmount(cgroups, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unmount %s: %w", cgroups, err)
		}
	}
	for target, kind := range map[string]string{"/sys/fs/bpf": "bpf", "/run": "tmpfs"} {
		if err := unix.Mount(kind, target, kind, 0, "mode=0700"); err != nil {
			return fmt.Errorf("mount %s: %w", target, err)
		}
	}
	return nil
}

// result is what one command line came to.
type result struct {
	code           int
	stdout, stderr string
}

// tcnat runs one command line in this process. attach goes to no cgroup unless it names one: the
// default is the machine's root.
func tcnat(t *testing.T, args ...string) result {
	t.Helper()
	if slices.Contains(args, "attach") && args[0] != "__complete" && !slices.Contains(args, "--cgroup") {
		args = append(slices.Clone(args), "--cgroup", "none")
	}
	var stdout, stderr bytes.Buffer
	code := run(t.Context(), newEnv(&stdout, &stderr), args)
	return result{code, stdout.String(), stderr.String()}
}

// host is a lab and an instance in its host's namespace.
type host struct {
	*lab.Lab
	t        *testing.T
	instance loader.Instance
}

func newHost(t *testing.T, options lab.Options) *host {
	t.Helper()
	if os.Getuid() != 0 {
		if os.Getenv("TCNAT_TEST_REQUIRE") != "" {
			t.Fatal("needs root, for network namespaces and BPF")
		}
		t.Skip("needs root, for network namespaces and BPF")
	}
	l, err := lab.New(t.Context(), options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	h := &host{Lab: l, t: t, instance: loader.Instance{Name: "cli-" + l.Name}}
	t.Cleanup(func() {
		var stderr bytes.Buffer
		// The test's own context has ended.
		code := run(context.Background(), newEnv(io.Discard, &stderr), h.global("detach"))
		if code != exitDone && !t.Failed() {
			t.Errorf("detach at the end: exit code %d: %s", code, stderr.String())
		}
	})
	return h
}

func (h *host) global(args ...string) []string {
	return append([]string{"--netns", h.Host.Netns, "--instance", h.instance.Name}, args...)
}

// tcnat runs one command line on the host's instance.
func (h *host) tcnat(args ...string) result {
	h.t.Helper()
	r := tcnat(h.t, h.global(args...)...)
	r.stderr = strings.ReplaceAll(r.stderr, h.instance.Name, "INSTANCE")
	return r
}

// must runs a command line that has to be done, and returns what it printed.
func (h *host) must(args ...string) string {
	h.t.Helper()
	r := h.tcnat(args...)
	if r.code != exitDone {
		h.t.Fatalf("tcnat %s: exit code %d: %s", strings.Join(args, " "), r.code, r.stderr)
	}
	return r.stdout
}

// snapshot is all that a command which fails has to leave as it was: rules, devices with
// their programs, options, pins, and what the kernel has on the hooks.
func (h *host) snapshot() string {
	h.t.Helper()
	var all []string
	for _, args := range [][]string{{"snat", "list", "-o", "json"}, {"dnat", "list", "-o", "json"}} {
		r := h.tcnat(args...)
		all = append(all, r.stdout, r.stderr)
	}
	status := h.tcnat("status")
	for line := range strings.Lines(status.stdout) {
		if !strings.HasPrefix(line, "expiry") {
			all = append(all, line)
		}
	}
	for _, device := range []string{lab.Bridge, lab.Uplink} {
		attached, err := h.Host.Attached(device)
		if err != nil {
			h.t.Fatal(err)
		}
		all = append(all, attached...)
	}
	err := filepath.WalkDir("/sys/fs/bpf", func(path string, _ os.DirEntry, err error) error {
		all = append(all, path)
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return strings.Join(all, "\n")
}

// golden compares with a file of testdata/cli, or writes it with -update.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("..", "..", "testdata", "cli", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v (write it with go test ./cmd/tcnat -update)", err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s is not what is printed (-want +got); if that is right, run go test ./cmd/tcnat -update\n%s", path, diff)
	}
}
