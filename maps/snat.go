package maps

import (
	"cmp"
	"net/netip"
	"slices"

	"tcnat/bpf"
)

// SNATRule says which source address packets of containers leave with.
type SNATRule struct {
	// ID is given by SetRules and read back by Rules; it says nothing in what goes in.
	ID uint32

	// Source are the containers that it is for; of two rules the longer prefix wins.
	Source netip.Prefix

	// Uplink is the ifindex of the device they leave by; 0 for every uplink.
	Uplink uint32

	// Masquerade takes the uplink's own address. Else the addresses from ToFirst to ToLast
	// are taken; a zero ToLast stands for ToFirst.
	Masquerade      bool
	ToFirst, ToLast netip.Addr

	// Ports are the outside ports to use; the zero value stands for any. Not with Masquerade.
	Ports PortRange

	// Except are destinations that see the container's own address.
	Except []netip.Prefix

	// Attach marks a rule that attach made for a bridge's subnet.
	Attach bool
}

// String returns the words of the command line that add the rule. The uplink is written
// ifindex:7; Words can name it.
func (r SNATRule) String() string { return r.Words(nil) }

// Words is String with devices named by name.
func (r SNATRule) Words(name func(ifindex uint32) string) string {
	var w words

	w.add("-s", r.Source.String())
	if r.Uplink != 0 {
		w.add("-o", deviceName(r.Uplink, name))
	}
	if r.Masquerade {
		w = append(w, "--masquerade")
	} else {
		to := r.ToFirst.String()
		if r.ToLast.IsValid() && r.ToLast != r.ToFirst {
			to += "-" + r.ToLast.String()
		}
		w.add("--to-source", endpoint(to, r.ToFirst.Is6(), r.Ports))
	}
	w.addPrefixes("--except", r.Except)
	return w.String()
}

// normalize validates the rule and returns its one form, without id.
func (r SNATRule) normalize() (SNATRule, error) {
	if err := checkPrefix(r.Source); err != nil {
		return r, invalid("source %s", err)
	}
	if err := r.checkTarget(); err != nil {
		return r, err
	}
	if !r.Masquerade && !r.ToLast.IsValid() {
		r.ToLast = r.ToFirst
	}
	except, err := normalizePrefixes(r.Except, r.Source.Addr(), "except")
	if err != nil {
		return r, err
	}
	r.Except = except
	r.ID = 0
	return r, nil
}

func (r SNATRule) checkTarget() error {
	if r.Masquerade {
		if r.ToFirst.IsValid() || r.ToLast.IsValid() || !r.Ports.isZero() {
			return invalid("source %s: masquerade takes no address or port: use --to-source instead", r.Source)
		}
		return nil
	}
	if err := checkTarget(r.ToFirst, "to-source"); err != nil {
		return err
	}
	if !sameFamily(r.ToFirst, r.Source.Addr()) {
		return invalid("source %s and to-source %s: mixed families: use one family a rule", r.Source, r.ToFirst)
	}
	if r.ToLast.IsValid() {
		if err := r.checkLast(); err != nil {
			return err
		}
	}
	if r.Ports.isZero() {
		return nil
	}
	return r.Ports.check("to-source port")
}

// checkLast validates the end of an address range: the datapath counts in its last 32 bits.
func (r SNATRule) checkLast() error {
	if err := checkTarget(r.ToLast, "to-source"); err != nil {
		return err
	}
	loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	switch {
	case !sameFamily(r.ToFirst, r.ToLast):
		return invalid("to-source %s-%s: mixed families: use one family a rule", r.ToFirst, r.ToLast)
	case r.ToLast.Less(r.ToFirst):
		return invalid("to-source %s-%s: range is reversed: write %s-%s", r.ToFirst, r.ToLast, r.ToLast, r.ToFirst)
	case !sameUpperBits(r.ToFirst, r.ToLast):
		return invalid("to-source %s-%s: differs before the last 32 bits: name a smaller range", r.ToFirst, r.ToLast)
	case r.ToFirst.Less(loopback) && loopback.Less(r.ToLast):
		return invalid("to-source %s-%s: contains the loopback addresses: name a smaller range", r.ToFirst, r.ToLast)
	case lastBits(r.ToLast)-lastBits(r.ToFirst)+1 == 0:
		return invalid("to-source %s-%s: over 4294967295 addresses: name a smaller range", r.ToFirst, r.ToLast)
	}
	return nil
}

// snatKey tells SNAT rules apart.
type snatKey struct {
	source netip.Prefix
	uplink uint32
}

func (r SNATRule) key() snatKey { return snatKey{r.Source, r.Uplink} }

// same tells whether two rules in their one form do the same, whoever made them.
func (r SNATRule) same(o SNATRule) bool {
	return r.key() == o.key() && r.Masquerade == o.Masquerade &&
		r.ToFirst == o.ToFirst && r.ToLast == o.ToLast && r.Ports == o.Ports &&
		slices.Equal(r.Except, o.Except)
}

// clash tells by an ErrRuleOverlap whether both rules would decide over one packet.
func (r SNATRule) clash(o SNATRule) error {
	if r.key() != o.key() {
		return nil
	}
	return faultf(ErrRuleOverlap, "%s: overlaps with %s: delete that rule first", r, o)
}

func compareSNAT(a, b *SNATRule) int {
	return cmp.Or(comparePrefix(a.Source, b.Source), cmp.Compare(a.Uplink, b.Uplink))
}

// AddSNAT adds a rule. One that is there already changes nothing. A rule of the user's takes
// the place of attach's own for the same source and uplink, and attach's changes nothing
// where there is one of the user's. The error is an ErrInvalidRule or, when another of the
// user's rules has the same source and uplink, an ErrRuleOverlap.
func (rs *Rules) AddSNAT(r SNATRule) (changed bool, err error) {
	r, err = r.normalize()
	if err != nil {
		return false, err
	}
	at := slices.IndexFunc(rs.SNAT, func(o SNATRule) bool { return r.key() == o.key() })
	if at < 0 {
		rs.SNAT = append(rs.SNAT, r)
		return true, nil
	}
	switch o := rs.SNAT[at]; {
	case r.Attach && !o.Attach, r.Attach == o.Attach && r.same(o):
		return false, nil
	case r.Attach == o.Attach:
		return false, r.clash(o)
	}
	rs.SNAT = slices.Clone(rs.SNAT)
	rs.SNAT[at] = r
	return true, nil
}

// DeleteSNAT deletes a rule, whoever made it. One that is not there changes nothing. With
// neither Masquerade nor ToFirst, the rule is found by source and uplink alone; without
// Except, whatever list it has.
func (rs *Rules) DeleteSNAT(r SNATRule) (changed bool, err error) {
	if r, err = r.normalizeToDelete(); err != nil {
		return false, err
	}
	kept := slices.DeleteFunc(slices.Clone(rs.SNAT), r.means)
	changed = len(kept) != len(rs.SNAT)
	rs.SNAT = kept
	return changed, nil
}

// normalizeToDelete validates the words of a rule to be deleted.
func (r SNATRule) normalizeToDelete() (SNATRule, error) {
	if r.named() {
		if err := checkPrefix(r.Source); err != nil {
			return r, invalid("source %s", err)
		}
		r.Except = nil
		return r, nil
	}
	return r.normalize()
}

// named tells whether r, as given to DeleteSNAT, is found by source and uplink alone.
func (r SNATRule) named() bool { return !r.Masquerade && !r.ToFirst.IsValid() }

// means tells whether r, as given to DeleteSNAT, is meant to be o.
func (r SNATRule) means(o SNATRule) bool {
	if len(r.Except) == 0 {
		o.Except = nil
	}
	return r.key() == o.key() && (r.named() || r.same(o))
}

// mapKey is the rule's key in the trie.
func (r SNATRule) mapKey() bpf.NATSnatKey {
	bits, addr := toPrefix(r.Source)
	return bpf.NATSnatKey{Prefixlen: 32 + bits, Ifindex: r.Uplink, Source: addr}
}

// value is what the trie holds for a rule.
func (r SNATRule) value(generation uint32) bpf.NATSnatRule {
	v := bpf.NATSnatRule{
		PortFirst:  r.Ports.First,
		PortLast:   r.Ports.Last,
		Id:         r.ID,
		Generation: generation,
	}
	if r.Masquerade {
		v.Flags |= bpf.NATSnatFlagSNAT_MASQUERADE
	} else {
		v.To = toAddr(r.ToFirst)
		v.ToCount = lastBits(r.ToLast) - lastBits(r.ToFirst) + 1
	}
	if len(r.Except) > 0 {
		v.Flags |= bpf.NATSnatFlagSNAT_EXCEPT
	}
	if r.Attach {
		v.Flags |= bpf.NATSnatFlagSNAT_ATTACH
	}
	return v
}

// snatFromValue is the rule that the trie's element holds, without its except list.
func snatFromValue(k bpf.NATSnatKey, v bpf.NATSnatRule) (SNATRule, error) {
	source, err := fromPrefix(k.Prefixlen-32, k.Source)
	if err != nil {
		return SNATRule{}, err
	}
	r := SNATRule{
		ID:         v.Id,
		Source:     source,
		Uplink:     k.Ifindex,
		Masquerade: v.Flags&bpf.NATSnatFlagSNAT_MASQUERADE != 0,
		Ports:      PortRange{v.PortFirst, v.PortLast},
		Attach:     v.Flags&bpf.NATSnatFlagSNAT_ATTACH != 0,
	}
	if !r.Masquerade {
		r.ToFirst = fromAddr(v.To)
		r.ToLast = withLastBits(r.ToFirst, lastBits(r.ToFirst)+v.ToCount-1)
	}
	return r, nil
}
