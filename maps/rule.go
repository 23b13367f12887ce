package maps

import (
	"net/netip"
	"slices"
	"strings"
)

// Rules is a set of rules. Its methods are pure: State.SetRules puts it in force.
type Rules struct {
	SNAT []SNATRule
	DNAT []DNATRule
}

// clone copies the set so that changes of one do not show in the other. The rules' prefix
// lists are shared: no method changes one in place.
func (rs Rules) clone() Rules {
	return Rules{SNAT: slices.Clone(rs.SNAT), DNAT: slices.Clone(rs.DNAT)}
}

// normalize validates every rule and its neighbours and returns the set sorted, each rule in
// its one form. The error is an ErrInvalidRule or ErrRuleOverlap.
func (rs Rules) normalize() (Rules, error) {
	out := rs.clone()
	for i, r := range out.SNAT {
		n, err := r.normalize()
		if err != nil {
			return Rules{}, err
		}
		out.SNAT[i] = n
	}
	for i, r := range out.DNAT {
		n, err := r.normalize()
		if err != nil {
			return Rules{}, err
		}
		out.DNAT[i] = n
	}
	out.sort()
	out.SNAT = slices.CompactFunc(out.SNAT, SNATRule.same)
	out.DNAT = slices.CompactFunc(out.DNAT, DNATRule.same)

	// Sorted, rules that could overlap stand side by side.
	for i := 1; i < len(out.SNAT); i++ {
		if err := out.SNAT[i].clash(out.SNAT[i-1]); err != nil {
			return Rules{}, err
		}
	}
	for i := 1; i < len(out.DNAT); i++ {
		if err := out.DNAT[i].clash(out.DNAT[i-1]); err != nil {
			return Rules{}, err
		}
	}
	return out, nil
}

func (rs Rules) sort() {
	slices.SortFunc(rs.SNAT, func(a, b SNATRule) int { return compareSNAT(&a, &b) })
	slices.SortFunc(rs.DNAT, func(a, b DNATRule) int { return compareDNAT(&a, &b) })
}

// normalizePrefixes validates prefixes of a rule and returns them sorted, each once. family
// is an address of the family they must be of.
func normalizePrefixes(list []netip.Prefix, family netip.Addr, what string) ([]netip.Prefix, error) {
	for _, p := range list {
		if err := checkPrefix(p); err != nil {
			return nil, invalid("%s %s", what, err)
		}
		if !sameFamily(p.Addr(), family) {
			return nil, invalid("%s %s: is not %s like the rule: use one family a rule", what, p, familyName(family))
		}
	}
	if len(list) == 0 {
		return nil, nil
	}
	sorted := slices.Clone(list)
	slices.SortFunc(sorted, comparePrefix)
	return slices.Compact(sorted), nil
}

// checkTarget refuses an address that packets cannot be sent to or come from.
func checkTarget(a netip.Addr, what string) error {
	if err := checkAddress(a, what); err != nil {
		return err
	}
	switch {
	case a.IsLoopback():
		return invalid("%s %s: is a loopback address: name one that is reachable from outside the host", what, a)
	case a.Is6() && a.IsLinkLocalUnicast():
		return invalid("%s %s: is a link-local address, which is never translated: name a global one", what, a)
	}
	return nil
}

// checkAddress refuses what is not the address of one host.
func checkAddress(a netip.Addr, what string) error {
	switch {
	case !a.IsValid():
		return invalid("%s: no address: name one", what)
	case a.Is4In6():
		return invalid("%s %s: IPv4-mapped: write %s", what, a, a.Unmap())
	case a.Zone() != "":
		return invalid("%s %s: has a zone: name a global address", what, a)
	case a.IsUnspecified():
		return invalid("%s %s: is the unspecified address: name one host's", what, a)
	case a.IsMulticast():
		return invalid("%s %s: is a multicast address: name one host's", what, a)
	case a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return invalid("%s %s: is the broadcast address: name one host's", what, a)
	}
	return nil
}

// words collects the words of a command line.
type words []string

func (w *words) add(option, value string) { *w = append(*w, option, value) }

func (w *words) addPrefixes(option string, list []netip.Prefix) {
	for _, p := range list {
		w.add(option, p.String())
	}
}

func (w words) String() string { return strings.Join(w, " ") }
