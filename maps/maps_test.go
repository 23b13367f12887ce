package maps

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"tcnat/bpf"
)

// testFlows is the number of elements in the tables of flows and mappings.
const testFlows = 8192

// newState loads the maps alone: no program, no pin.
func newState(t testing.TB) *State {
	t.Helper()

	m := &bpf.NATMaps{}
	load(t, m)
	t.Cleanup(func() { m.Close() })
	return New(m)
}

// load loads what the fields of out name.
func load(t testing.TB, out any) {
	t.Helper()

	spec, err := bpf.LoadNAT()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{bpf.NATMapFlows, bpf.NATMapMappings, bpf.NATMapMovedPorts, bpf.NATMapExpiryQueue} {
		spec.Maps[name].MaxEntries = testFlows
	}
	if err := spec.LoadAndAssign(out, nil); err != nil {
		t.Fatalf("load maps: %+v", err)
	}
}

func addr(text string) netip.Addr     { return netip.MustParseAddr(text) }
func prefix(text string) netip.Prefix { return netip.MustParsePrefix(text) }

func prefixes(texts ...string) []netip.Prefix {
	var list []netip.Prefix
	for _, text := range texts {
		list = append(list, prefix(text))
	}
	return list
}

// diff compares values with addresses in them; equal ones give "".
func diff(want, got any) string {
	return cmp.Diff(want, got,
		cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}, netip.AddrPort{}),
		cmpopts.EquateEmpty())
}

func must[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}
