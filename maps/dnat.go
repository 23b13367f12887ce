package maps

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"tcnat/bpf"
)

// DNATRule publishes ports: packets to them go to another address.
type DNATRule struct {
	// ID is given by SetRules and read back by Rules; it says nothing in what goes in.
	ID uint32

	Protocol Protocol // TCP, UDP or SCTP

	// Destination is the address that packets come to. The zero Addr stands for every
	// address of the host, of To's family; the host's own sockets reach it by 127.0.0.1 and ::1,
	// too, and by IPv6 where To is IPv4. A loopback address is for them alone.
	Destination netip.Addr

	// Ingress is the ifindex of the device that they come in by; 0 for any.
	Ingress uint32

	// Ports are the published ports.
	Ports PortRange

	// To is the address that they are sent to.
	To netip.Addr

	// ToPorts are the ports there: one for all, or as many as Ports, in the same order. The
	// zero value keeps the port.
	ToPorts PortRange

	// Backends are the targets of a rule that has several, To and ToPorts being the first of
	// them; empty for a rule with one.
	Backends []Backend

	// Balance chooses the backend of a new flow.
	Balance Balance

	// Affinity is for how long since its last new flow a client gets the same backend, in whole
	// seconds; 0 for not at all. The host itself is one client.
	Affinity time.Duration

	// Allow are the sources that may come in; empty for all. The host itself always may.
	Allow []netip.Prefix
}

// String returns the words of the command line that add the rule. The ingress device is
// written ifindex:7; Words can name it.
func (r DNATRule) String() string { return r.Words(nil) }

// Words is String with devices named by name.
func (r DNATRule) Words(name func(ifindex uint32) string) string {
	var w words

	w.add("-p", r.Protocol.String())
	if r.Destination.IsValid() {
		w.add("-d", r.Destination.String())
	}
	if r.Ingress != 0 {
		w.add("-i", deviceName(r.Ingress, name))
	}
	w.add("--dport", r.Ports.String())
	w.addTargets(r)
	w.addPrefixes("-s", r.Allow)
	return w.String()
}

func deviceName(ifindex uint32, name func(uint32) string) string {
	if name == nil {
		return "ifindex:" + strconv.FormatUint(uint64(ifindex), 10)
	}
	return name(ifindex)
}

// endpoint joins addresses and ports as iptables does: brackets around IPv6 before ports.
func endpoint(addresses string, v6 bool, ports PortRange) string {
	switch {
	case ports.isZero():
		return addresses
	case v6:
		return "[" + addresses + "]:" + ports.String()
	default:
		return addresses + ":" + ports.String()
	}
}

// checkKey validates what tells rules apart: all but the target and the allow list.
func (r DNATRule) checkKey() error {
	if !r.Protocol.isPublished() {
		return invalid("protocol %s: ports of it are not published: use tcp, udp or sctp", r.Protocol)
	}
	if r.Destination.IsValid() {
		if err := checkAddress(r.Destination, "destination"); err != nil {
			return err
		}
	}
	if r.Destination.IsLoopback() && r.Ingress != 0 {
		return invalid("destination %s: is reached from the host alone, so by no device: leave the device out", r.Destination)
	}
	return r.Ports.check("port")
}

// normalize validates the rule and returns its one form, without id.
func (r DNATRule) normalize() (DNATRule, error) {
	if err := r.checkKey(); err != nil {
		return r, err
	}
	if r.Destination.IsLoopback() && r.Protocol == SCTP {
		return r, invalid("destination %s: the host's own SCTP sockets cannot be led, so nobody would reach it: use tcp or udp", r.Destination)
	}
	r, err := r.normalizeTargets()
	if err != nil {
		return r, err
	}
	if r.Destination.IsValid() && !sameFamily(r.Destination, r.To) {
		return r, invalid("destination %s and target %s: mixed families: use one family a rule", r.Destination, r.To)
	}
	allow, err := normalizePrefixes(r.Allow, r.To, "source")
	if err != nil {
		return r, err
	}
	if r.Destination.IsLoopback() && len(allow) > 0 {
		return r, invalid("destination %s: is reached from the host alone, which is always allowed: leave the sources out", r.Destination)
	}
	r.Allow = allow
	r.ID = 0
	return r, nil
}

// dnatKey tells DNAT rules apart.
type dnatKey struct {
	protocol    Protocol
	destination netip.Addr // 0.0.0.0 or :: for any
	ingress     uint32
	ports       PortRange
}

func (r DNATRule) key() dnatKey {
	return dnatKey{r.Protocol, r.matchAddress(), r.Ingress, r.Ports}
}

// matchAddress is the destination, or the unspecified address of the rule's family.
func (r *DNATRule) matchAddress() netip.Addr {
	switch {
	case r.Destination.IsValid():
		return r.Destination
	case r.To.Is4():
		return anyIPv4
	default:
		return anyIPv6
	}
}

// effectivePorts are the target ports with "kept" written out.
func (r DNATRule) effectivePorts() PortRange {
	if r.ToPorts.isZero() {
		return r.Ports
	}
	return r.ToPorts
}

// same tells whether two rules in their one form do the same.
func (r DNATRule) same(o DNATRule) bool {
	return r.key() == o.key() && r.sameTargets(o) && slices.Equal(r.Allow, o.Allow)
}

// clash tells by an ErrRuleOverlap whether both rules would decide over one packet.
func (r DNATRule) clash(o DNATRule) error {
	a, b := r.key(), o.key()
	if a.protocol != b.protocol || a.destination != b.destination || a.ingress != b.ingress || !a.ports.overlaps(b.ports) {
		return nil
	}
	return faultf(ErrRuleOverlap, "%s: overlaps with %s: delete that rule first", r, o)
}

func compareDNAT(a, b *DNATRule) int {
	if c := cmp.Compare(a.Protocol, b.Protocol); c != 0 {
		return c
	}
	if c := a.matchAddress().Compare(b.matchAddress()); c != 0 {
		return c
	}
	if c := cmp.Compare(a.Ingress, b.Ingress); c != 0 {
		return c
	}
	if c := cmp.Compare(a.Ports.First, b.Ports.First); c != 0 {
		return c
	}
	return cmp.Compare(a.Ports.Last, b.Ports.Last)
}

// AddDNAT adds a rule. One that is there already changes nothing. One with several targets takes the
// place of a rule that differs in them alone, and has one of them: flows to those that stay go on. The error is an
// ErrInvalidRule or, when another rule with the same destination, ingress and
// protocol has one of the ports, an ErrRuleOverlap.
func (rs *Rules) AddDNAT(r DNATRule) (changed bool, err error) {
	r, err = r.normalize()
	if err != nil {
		return false, err
	}
	for i, o := range rs.DNAT {
		if r.same(o) {
			return false, nil
		}
		if r.hasBackends() && r.key() == o.key() && slices.Equal(r.Allow, o.Allow) && r.sharesTarget(o) {
			rs.DNAT = slices.Clone(rs.DNAT)
			rs.DNAT[i] = r
			return true, nil
		}
		if err := r.clash(o); err != nil {
			return false, err
		}
	}
	rs.DNAT = append(rs.DNAT, r)
	return true, nil
}

// DeleteDNAT deletes a rule. One that is not there changes nothing. Without To, the rule
// (or, with no Destination, the one of each family) is found by what it matches alone;
// without Allow, whatever list it has. Balance and Affinity say nothing. To or Backends are taken out of a
// rule with several targets, as far as they are there, and flows to the others go on; a rule
// without targets left is deleted.
func (rs *Rules) DeleteDNAT(r DNATRule) (changed bool, err error) {
	if r, err = r.normalizeToDelete(); err != nil {
		return false, err
	}
	kept := slices.DeleteFunc(slices.Clone(rs.DNAT), r.means)
	changed = len(kept) != len(rs.DNAT)
	if !changed && r.To.IsValid() {
		for i := range kept {
			if r.key() != kept[i].key() || len(r.Allow) > 0 && !slices.Equal(r.Allow, kept[i].Allow) {
				continue
			}
			rest, gone := kept[i].without(r.Targets())
			changed = gone > 0
			if gone == len(kept[i].Targets()) {
				kept = slices.Delete(kept, i, i+1)
			} else {
				kept[i] = rest
			}
			break
		}
	}
	rs.DNAT = kept
	return changed, nil
}

// normalizeToDelete validates the words of a rule to be deleted.
func (r DNATRule) normalizeToDelete() (DNATRule, error) {
	if r.To.IsValid() || r.hasBackends() {
		return r.normalize()
	}
	r.Allow = nil
	return r, r.checkKey()
}

// means tells whether r, as given to DeleteDNAT, is meant to be o.
func (r DNATRule) means(o DNATRule) bool {
	if !r.To.IsValid() {
		return r.Protocol == o.Protocol && r.Destination == o.Destination &&
			r.Ingress == o.Ingress && r.Ports == o.Ports
	}
	if len(r.Allow) == 0 {
		o.Allow = nil
	}
	if !r.hasBackends() {
		return !o.hasBackends() && r.same(o)
	}
	return r.key() == o.key() &&
		slices.EqualFunc(r.Targets(), o.Targets(), func(a, b Backend) bool { return r.compareTargets(a, b) == 0 }) &&
		slices.Equal(r.Allow, o.Allow)
}

// The bits of a range key before the port: address, ifindex, protocol and pad.
const rangeKeyBits = 128 + 32 + 8 + 8

// rangeKeys are the keys of the trie that cover a rule's ports.
func (r DNATRule) rangeKeys() []bpf.NATDnatRangeKey {
	var keys []bpf.NATDnatRangeKey

	for _, p := range r.Ports.prefixes() {
		keys = append(keys, bpf.NATDnatRangeKey{
			Prefixlen: uint32(rangeKeyBits + p.bits),
			Dst:       toAddr(r.matchAddress()),
			Ifindex:   r.Ingress,
			Proto:     uint8(r.Protocol),
			Port:      swapPort(p.port),
		})
	}
	return keys
}

// portKey is the key of a rule for a single port.
func (r DNATRule) portKey() bpf.NATDnatKey {
	return bpf.NATDnatKey{
		Dst:     toAddr(r.matchAddress()),
		Ifindex: r.Ingress,
		Port:    swapPort(r.Ports.First),
		Proto:   uint8(r.Protocol),
	}
}

// value is what the maps hold for a rule, by whichever key.
func (r DNATRule) value(generation uint32) bpf.NATDnatRule {
	to := r.effectivePorts()
	v := bpf.NATDnatRule{
		To:         toAddr(r.To),
		PortFirst:  r.Ports.First,
		PortLast:   r.Ports.Last,
		ToFirst:    to.First,
		ToLast:     to.Last,
		Id:         r.ID,
		Generation: generation,
	}
	if r.ToPorts.isZero() {
		v.Flags |= bpf.NATDnatFlagDNAT_KEEP_PORT
	}
	if r.hasBackends() {
		v.Flags |= bpf.NATDnatFlagDNAT_BACKENDS
		for _, q := range r.quotas() {
			v.Slots += uint16(q)
		}
		v.Affinity = uint32((r.Affinity + 1<<stampShift - 1) >> stampShift)
		if r.Balance == BalanceSource {
			v.Flags |= bpf.NATDnatFlagDNAT_SOURCE
		}
	}
	if len(r.Allow) > 0 {
		v.Flags |= bpf.NATDnatFlagDNAT_ALLOW_LIST
	}
	return v
}

// dnatFromValue is the rule that a map's element holds, without its allow list and its backends.
func dnatFromValue(dst bpf.NATAddr, ifindex uint32, proto uint8, v bpf.NATDnatRule) DNATRule {
	r := DNATRule{
		ID:       v.Id,
		Protocol: Protocol(proto),
		Ingress:  ifindex,
		Ports:    PortRange{v.PortFirst, v.PortLast},
		To:       fromAddr(v.To),
		Affinity: stampTime(v.Affinity).Round(time.Second),
	}
	if v.Flags&bpf.NATDnatFlagDNAT_SOURCE != 0 {
		r.Balance = BalanceSource
	}
	if a := fromAddr(dst); !a.IsUnspecified() {
		r.Destination = a
	}
	if v.Flags&bpf.NATDnatFlagDNAT_KEEP_PORT == 0 {
		r.ToPorts = PortRange{v.ToFirst, v.ToLast}
	}
	return r
}
