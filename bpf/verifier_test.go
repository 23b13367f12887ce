package bpf_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
)

// Every program loads, each alone: the verifier's word on the whole object. What it cost is
// recorded in testdata/verifier.golden by -update, for people; kernels differ, so it is
// not compared.
func TestVerifier(t *testing.T) {
	spec := natSpec()
	var b strings.Builder
	fmt.Fprintln(&b, "program         verified instructions   bytes of machine code")
	for _, name := range slices.Sorted(maps.Keys(spec.Programs)) {
		one := spec.Copy()
		maps.DeleteFunc(one.Programs, func(n string, _ *ebpf.ProgramSpec) bool { return n != name })
		c, err := ebpf.NewCollection(one)
		if err != nil {
			var v *ebpf.VerifierError
			if errors.As(err, &v) {
				t.Errorf("%s: %-30v", name, v)
			} else {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		info, err := c.Programs[name].Info()
		if err != nil {
			t.Fatal(err)
		}
		verified, _ := info.VerifiedInstructions()
		size, _ := info.JitedSize()
		fmt.Fprintf(&b, "%-15s %21d %23d\n", name, verified, size)
		c.Close()
	}
	t.Log("\n" + b.String())
	if *update && !t.Failed() {
		if err := os.MkdirAll(filepath.Join("..", "testdata"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join("..", "testdata", "verifier.golden"), []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
