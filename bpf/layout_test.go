package bpf_test

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"

	"tcnat/bpf"
)

var update = flag.Bool("update", false, "write the golden files of testdata")

// golden compares text with a file of testdata, or writes the file.
func golden(t *testing.T, name, text, remedy string) {
	t.Helper()
	path := filepath.Join("..", "testdata", name)
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), text); diff != "" {
		t.Errorf("%s (-want +got):\n%s\n%s", path, diff, remedy)
	}
}

// Programs of one ABI work side by side on the same pinned maps, and Go reads what they
// write: the layout of every map is what testdata says, or ABI_VERSION must rise.
func TestLayout(t *testing.T) {
	var b strings.Builder
	fmt.Fprintf(&b, "abi %d\n", abiVersion(t))
	spec := natSpec()
	types := make(map[string]btf.Type)
	for _, name := range slices.Sorted(maps.Keys(spec.Maps)) {
		m := spec.Maps[name]
		if strings.HasPrefix(name, ".") || strings.HasPrefix(name, "no_") || m.Type == ebpf.PerCPUArray && name != bpf.NATMapCounters && name != bpf.NATMapPortTries { // of one load alone
			continue
		}
		fmt.Fprintf(&b, "map %s: %s, key %d %s, value %d %s, flags %#x\n",
			name, m.Type, m.KeySize, typeName(m.Key), m.ValueSize, typeName(m.Value), m.Flags)
		collect(types, m.Key)
		collect(types, m.Value)
		if m.InnerMap != nil {
			collect(types, m.InnerMap.Key)
			collect(types, m.InnerMap.Value)
		}
	}
	for _, name := range []string{"counter", "timeout"} { // indexes of arrays
		var enum *btf.Enum
		if err := spec.Types.TypeByName(name, &enum); err != nil {
			t.Fatal(err)
		}
		collect(types, enum)
	}
	for _, name := range slices.Sorted(maps.Keys(types)) {
		switch v := types[name].(type) {
		case *btf.Struct:
			fmt.Fprintf(&b, "%s: %d bytes\n", name, v.Size)
			for _, m := range v.Members {
				fmt.Fprintf(&b, "\t%d %s %s\n", m.Offset/8, m.Name, typeName(m.Type))
			}
		case *btf.Enum:
			fmt.Fprintf(&b, "%s: %d bytes\n", name, v.Size)
			for _, e := range v.Values {
				fmt.Fprintf(&b, "\t%d %s\n", e.Value, e.Name)
			}
		}
	}
	golden(t, "abi.golden", b.String(), "The layout of a map has changed: raise ABI_VERSION in abi.h, then go test ./bpf -run TestLayout -update")
}

// abiVersion runs the program that knows it.
func abiVersion(t *testing.T) uint32 {
	t.Helper()
	p, err := ebpf.NewProgram(natSpec().Programs[bpf.NATProgAbi])
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	version, err := p.Run(&ebpf.RunOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return version
}

// collect gathers the structs and enums that a type is made of.
func collect(types map[string]btf.Type, t btf.Type) {
	if t == nil {
		return
	}
	switch v := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		types["struct "+v.Name] = v
		for _, m := range v.Members {
			collect(types, m.Type)
		}
	case *btf.Enum:
		types["enum "+v.Name] = v
	case *btf.Array:
		collect(types, v.Type)
	}
}

func typeName(t btf.Type) string {
	switch v := t.(type) {
	case nil:
		return "-"
	case *btf.Struct:
		return "struct " + v.Name
	case *btf.Enum:
		return "enum " + v.Name
	case *btf.Array:
		return fmt.Sprintf("%s[%d]", typeName(v.Type), v.Nelems)
	default:
		return t.TypeName()
	}
}
