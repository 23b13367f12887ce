package loader

import (
	"maps"
	"slices"
	"testing"

	"tcnat/bpf"
)

// What openRules expects of the maps, and the names that it looks for, are those of the object file.
func TestRulesMaps(t *testing.T) {
	spec, err := bpf.LoadNAT()
	must(t, err)
	for _, have := range rulesMaps {
		want := spec.Maps[have.Name]
		if want == nil || have.Type != want.Type || have.KeySize != want.KeySize || have.ValueSize != want.ValueSize {
			t.Errorf("%v, the object file has %v", have, want)
		}
	}
	for what, lists := range map[string][2][]string{
		"maps":     {names(bpf.NATMaps{}), slices.Collect(maps.Keys(spec.Maps))},
		"programs": {names(bpf.NATPrograms{}), slices.Collect(maps.Keys(spec.Programs))},
	} {
		have, want := slices.Sorted(slices.Values(lists[0])), slices.Sorted(slices.Values(lists[1]))
		if !slices.Equal(have, want) {
			t.Errorf("%s are %v, the object file has %v", what, have, want)
		}
	}
}
