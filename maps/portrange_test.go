package maps

import (
	"errors"
	"math/rand/v2"
	"testing"
)

func TestParsePortRange(t *testing.T) {
	for text, want := range map[string]PortRange{
		"3005":      {3005, 3005},
		"8000-8999": {8000, 8999},
		"1-65535":   {1, 65535},
	} {
		got, err := ParsePortRange(text)
		if err != nil || got != want || got.String() != text {
			t.Errorf("%q: got %v (%v), written %q", text, got, err, got.String())
		}
	}
	for _, text := range []string{"", "0", "0-5", "65536", "9-8", "8-", "-8", "1-2-3", "http", "+1", " 1"} {
		if got, err := ParsePortRange(text); !errors.Is(err, ErrInvalidRule) {
			t.Errorf("%q: got %v, %v; want ErrInvalidRule", text, got, err)
		}
	}
}

// checkCover insists that the prefixes of r cover its ports, each once, and nothing else.
func checkCover(t *testing.T, r PortRange) {
	t.Helper()

	next := int(r.First)
	cover := r.prefixes()
	for _, p := range cover {
		size := 1 << (16 - p.bits)
		if int(p.port) != next || int(p.port)%size != 0 {
			t.Fatalf("%s: prefix %d/%d where port %d comes next", r, p.port, p.bits, next)
		}
		next += size
	}
	if next != int(r.Last)+1 || len(cover) > 30 {
		t.Fatalf("%s: %d prefixes end at %d", r, len(cover), next-1)
	}
}

func TestPortPrefixes(t *testing.T) {
	for _, r := range []PortRange{{1, 1}, {1, 65535}, {1, 65534}, {65535, 65535}, {32768, 65535}, {1024, 2047}, {8000, 8999}} {
		checkCover(t, r)
	}
	if n := len(PortRange{1024, 2047}.prefixes()); n != 1 {
		t.Errorf("1024-2047 takes %d prefixes, want 1", n)
	}

	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for range 2000 {
		a, b := uint16(1+random.IntN(65535)), uint16(1+random.IntN(65535))
		checkCover(t, PortRange{min(a, b), max(a, b)})
	}
}
