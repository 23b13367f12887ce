// Package arch keeps the repository's shape: who may import what, and what no file may hold.
package arch

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const (
	module  = "tcnat/"
	ebpf    = "github.com/cilium/ebpf/..."
	netlink = "github.com/vishvananda/netlink/..."
	netns   = "github.com/vishvananda/netns"
	unix    = "golang.org/x/sys/unix"
	cobra   = "github.com/spf13/cobra"
	pflag   = "github.com/spf13/pflag"
	gonum   = "gonum.org/v1/plot/..."
)

// layers says, lowest first, what each package may import besides the standard library;
// "..." at the end stands for the package and all below it. A package is judged by its
// longest match, and one without a match fails: decide where it belongs.
var layers = []struct {
	pkg     string
	imports []string
}{
	{"tcnat/bpf", []string{ebpf}},
	{"tcnat/maps", []string{"tcnat/bpf", ebpf, unix}},
	{"tcnat/loader", []string{"tcnat/bpf", "tcnat/maps", ebpf, netlink, netns, unix}},
	{"tcnat/internal/...", []string{"tcnat/bpf", "tcnat/maps", "tcnat/loader", "tcnat/internal/...", ebpf, netlink, netns, unix}},
	{"tcnat/internal/bench", []string{"tcnat/maps", "tcnat/loader", "tcnat/internal/lab", ebpf, netlink, unix, gonum}},
	// The command line knows no kernel: neither BPF nor netlink nor system calls.
	{"tcnat/cmd/...", []string{"tcnat/maps", "tcnat/loader", "tcnat/internal/...", cobra, pflag}},
}

func TestImports(t *testing.T) {
	for _, pkg := range listPackages(t) {
		allowed, ok := allowedFor(pkg.ImportPath)
		if !ok {
			t.Errorf("%s has no place in the table of layers", pkg.ImportPath)
			continue
		}
		for _, imported := range pkg.Imports {
			if isStandard(imported) {
				continue
			}
			if !slices.ContainsFunc(allowed, func(pattern string) bool { return matches(pattern, imported) }) {
				t.Errorf("%s imports %s; it may import %s", pkg.ImportPath, imported, strings.Join(allowed, ", "))
			}
		}
	}
}

// TestOnlyCommandsDecideTheEnd checks that packages return errors and never exit or log by
// themselves.
func TestOnlyCommandsDecideTheEnd(t *testing.T) {
	for _, pkg := range listPackages(t) {
		if pkg.Name != "main" && slices.Contains(pkg.Imports, "log") {
			t.Errorf("%s imports log: take a *slog.Logger", pkg.ImportPath)
		}
		if pkg.Name == "main" && !strings.HasPrefix(pkg.ImportPath, module+"cmd/") && !strings.HasPrefix(pkg.ImportPath, module+"internal/dockertest/") {
			t.Errorf("%s: a command outside of cmd", pkg.ImportPath)
		}
	}
}

func TestMatches(t *testing.T) {
	for _, tc := range []struct {
		pattern, path string
		want          bool
	}{
		{"a/b", "a/b", true},
		{"a/b", "a/b/c", false},
		{"a/b/...", "a/b", true},
		{"a/b/...", "a/b/c", true},
		{"a/b/...", "a/bc", false},
	} {
		if got := matches(tc.pattern, tc.path); got != tc.want {
			t.Errorf("matches(%q, %q) = %v", tc.pattern, tc.path, got)
		}
	}
}

type goPackage struct {
	ImportPath, Name string
	Imports          []string // of the package itself, not of its tests
}

// listPackages returns the packages of this module.
func listPackages(t *testing.T) []goPackage {
	t.Helper()
	var stderr strings.Builder
	cmd := exec.Command("go", "list", "-json=ImportPath,Name,Imports", module+"...")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var pkgs []goPackage
	for decoder := json.NewDecoder(strings.NewReader(string(out))); ; {
		var pkg goPackage
		if err := decoder.Decode(&pkg); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, pkg)
	}
	if len(pkgs) < len(layers) {
		t.Fatalf("go list names %d packages only", len(pkgs))
	}
	return pkgs
}

func allowedFor(pkg string) (imports []string, ok bool) {
	longest := ""
	for _, layer := range layers {
		if matches(layer.pkg, pkg) && len(layer.pkg) > len(longest) {
			longest, imports, ok = layer.pkg, layer.imports, true
		}
	}
	return imports, ok
}

func matches(pattern, path string) bool {
	prefix, below := strings.CutSuffix(pattern, "/...")
	return path == prefix || below && strings.HasPrefix(path, prefix+"/")
}

// isStandard tells the standard library by its first element, which is no domain.
func isStandard(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".") && first != "tcnat"
}
