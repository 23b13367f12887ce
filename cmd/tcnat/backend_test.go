package main

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tcnat/internal/lab"
)

// documented are the command lines of a section of the documentation, without the program's name.
func documented(t *testing.T, file, section string) (commands [][]string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, after, found := strings.Cut(string(text), "\n## "+section+"\n")
	if !found {
		t.Fatalf("%s has no section %s", file, section)
	}
	after, _, _ = strings.Cut(after, "\n## ")
	for line := range strings.Lines(after) {
		if words, ok := strings.CutPrefix(line, "    tcnat "); ok {
			commands = append(commands, strings.Fields(words))
		}
	}
	return commands
}

// The documentation's commands publish a port of several containers, take one out and bring another; the lists
// say so, and an id stays with its container.
func TestBackends(t *testing.T) {
	h := newHost(t, lab.Options{})
	h.must("attach", "--bridge", lab.Bridge, "--uplink", lab.Uplink)
	commands := documented(t, "../../docs/datapath.md", "Several backends")
	if len(commands) != 3 {
		t.Fatalf("commands %q", commands)
	}
	one := []dnatEntry{{Protocol: "tcp", Dport: "8080", ToDestination: "172.17.0.2:80"}}
	entry := func(weights ...int) []dnatEntry {
		rule := dnatEntry{Protocol: "tcp", Dport: "8080", Balance: "random"}
		for i, to := range []string{"172.17.0.2:80", "172.17.0.3:80", "172.17.0.4:80"} {
			if weights[i] > 0 {
				rule.Backends = append(rule.Backends, backendEntry{ToDestination: to, Weight: weights[i]})
			}
		}
		return []dnatEntry{rule}
	}
	ids := make(map[string]uint32)
	for i, want := range [][]dnatEntry{entry(3, 1, 0), one, entry(1, 0, 1)} {
		for _, changed := range []bool{true, false} { // a second time is done
			r := h.tcnat(commands[i]...)
			if r.code != exitDone || strings.Contains(r.stderr, "nothing changed") == changed {
				t.Errorf("%v: exit code %d, stderr %s", commands[i], r.code, r.stderr)
			}
		}
		got := list[[]dnatEntry](h, "dnat", "list")
		for j := range got {
			if to := got[j].ToDestination; to != "" {
				got[j].Backends = append(got[j].Backends, backendEntry{got[j].ID, to, 1})
			}
			for k := range got[j].Backends {
				b := &got[j].Backends[k]
				if was := ids[b.ToDestination]; was != 0 && was != b.ID {
					t.Errorf("%v: %s had id %d, has %d", commands[i], b.ToDestination, was, b.ID)
				}
				ids[b.ToDestination], b.ID = b.ID, 0
			}
			if got[j].ToDestination != "" {
				got[j].Backends = nil
			}
			got[j].ID = 0
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%v (-want +got)\n%s", commands[i], diff)
		}
	}

	h.must("dnat", "add", "-p", "tcp", "--dport", "8080", "--to-destination", "172.17.0.2:80", "--weight", "2",
		"--to-destination", "172.17.0.4:80", "--weight", "1", "--balance", "source", "--affinity", "90s")
	out := h.must("dnat", "list")
	if !strings.Contains(out, "172.17.0.2:80 (weight 2), 172.17.0.4:80; source, affinity 1m30s") {
		t.Errorf("dnat list printed\n%s", out)
	}
	before := list[[]dnatEntry](h, "dnat", "list")
	for _, refused := range []struct{ words, message string }{
		{"--dport 81 --to-destination 172.17.0.2 --to-destination 10.9.0.2", "10.9.0.2: on no managed bridge"},
		{"--dport 8080 --to-destination 172.17.0.8 --to-destination 172.17.0.9", "overlaps with"},
		{"--dport 8080 --to-destination 172.17.0.2:80", "overlaps with"},
		{"--dport 8080 --to-destination 172.17.0.2:80 --to-destination 172.17.0.3 -s 10.0.0.0/8", "overlaps with"},
	} {
		r := h.tcnat(slices.Concat([]string{"dnat", "add", "-p", "tcp"}, strings.Fields(refused.words))...)
		if r.code != exitFailed || !strings.Contains(r.stderr, refused.message) || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%s: exit code %d, stderr %s", refused.words, r.code, r.stderr)
		}
	}
	if diff := cmp.Diff(before, list[[]dnatEntry](h, "dnat", "list")); diff != "" {
		t.Errorf("after what was refused (-want +got)\n%s", diff)
	}
	h.must("dnat", "del", "-p", "tcp", "--dport", "8080")
	h.expect("deleted by what it matches", h.dnat())
}
