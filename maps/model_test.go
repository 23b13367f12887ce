package maps

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
)

// The model says in the plainest way which rule speaks of a packet; the tests compare it with
// the lookups that the datapath (rule.h) does on the maps.

// modelDNAT is the rule that publishes dst:port on a device.
func modelDNAT(rules Rules, protocol Protocol, dst netip.Addr, ifindex uint32, port uint16) (DNATRule, bool) {
	find := func(any bool, ingress uint32) (DNATRule, bool) {
		for _, r := range rules.DNAT {
			hit := r.Destination == dst
			if any {
				hit = !r.Destination.IsValid() && r.To.Is4() == dst.Is4()
			}
			if hit && r.Protocol == protocol && r.Ingress == ingress && r.Ports.First <= port && port <= r.Ports.Last {
				return r, true
			}
		}
		return DNATRule{}, false
	}
	for _, any := range []bool{false, true} {
		for _, ingress := range []uint32{ifindex, 0} {
			if r, ok := find(any, ingress); ok {
				return r, true
			}
		}
	}
	return DNATRule{}, false
}

// modelPort is the port that a rule leads a published one to.
func modelPort(r DNATRule, port uint16) uint16 {
	switch {
	case r.ToPorts == PortRange{}:
		return port
	case r.ToPorts.First == r.ToPorts.Last:
		return r.ToPorts.First
	}
	return r.ToPorts.First + (port - r.Ports.First)
}

// modelSNAT is the rule for a source that leaves by an uplink.
func modelSNAT(rules Rules, source netip.Addr, uplink uint32) (best SNATRule, ok bool) {
	for _, o := range []uint32{uplink, 0} {
		for _, r := range rules.SNAT {
			if r.Uplink == o && r.Source.Contains(source) && (!ok || r.Source.Bits() > best.Source.Bits()) {
				best, ok = r, true
			}
		}
		if ok {
			return best, true
		}
	}
	return SNATRule{}, false
}

func modelLists(list []netip.Prefix, a netip.Addr) bool {
	for _, p := range list {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// datapath looks up in the set in force, as the programs do.
type datapath struct {
	t   *testing.T
	set *ruleSet
}

func (d datapath) lookup(m *ebpf.Map, key, value any) bool {
	d.t.Helper()

	err := m.Lookup(key, value)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		d.t.Fatal(err)
	}
	return err == nil
}

func (d datapath) dnat(protocol Protocol, dst netip.Addr, ifindex uint32, port uint16) (v bpf.NATDnatRule, ok bool) {
	any := anyIPv6
	if dst.Is4() {
		any = anyIPv4
	}
	for _, address := range []netip.Addr{dst, any} {
		for _, ingress := range []uint32{ifindex, 0} {
			one := bpf.NATDnatKey{Dst: toAddr(address), Ifindex: ingress, Port: swapPort(port), Proto: uint8(protocol)}
			if d.lookup(d.set.ports, one, &v) {
				return v, true
			}
			ranged := bpf.NATDnatRangeKey{Prefixlen: 24 * 8, Dst: toAddr(address), Ifindex: ingress, Port: swapPort(port), Proto: uint8(protocol)}
			if d.lookup(d.set.ranges, ranged, &v) {
				return v, true
			}
		}
	}
	return v, false
}

// port is dnat_port of rule.h.
func (d datapath) port(v bpf.NATDnatRule, port uint16) uint16 {
	switch {
	case v.Flags&bpf.NATDnatFlagDNAT_KEEP_PORT != 0:
		return port
	case v.ToFirst == v.ToLast:
		return v.ToFirst
	}
	return v.ToFirst + (port - v.PortFirst)
}

func (d datapath) snat(source netip.Addr, uplink uint32) (v bpf.NATSnatRule, ok bool) {
	for _, o := range []uint32{uplink, 0} {
		if d.lookup(d.set.sources, bpf.NATSnatKey{Prefixlen: 20 * 8, Ifindex: o, Source: toAddr(source)}, &v) {
			return v, true
		}
	}
	return v, false
}

func (d datapath) lists(rule uint32, a netip.Addr) bool {
	var one uint8
	return d.lookup(d.set.prefixes, bpf.NATRulePrefixKey{Prefixlen: 20 * 8, Rule: rule, Addr: toAddr(a)}, &one)
}

// world is what random rules and packets are made of: little, so that they often meet.
type world struct {
	*rand.Rand
}

func pick[T any](w world, list []T) T { return list[w.IntN(len(list))] }

func (w world) addresses() []netip.Addr {
	if w.IntN(2) == 0 {
		return []netip.Addr{addr("10.0.0.1"), addr("10.0.0.2"), addr("10.1.0.1"), addr("203.0.113.2")}
	}
	return []netip.Addr{addr("fd00::1"), addr("fd00::2"), addr("fd00:1::1"), addr("2001:db8::2")}
}

func (w world) protocol() Protocol { return pick(w, []Protocol{TCP, UDP}) }
func (w world) device() uint32     { return uint32(w.IntN(3)) }

func (w world) port() uint16 {
	if w.IntN(4) == 0 {
		return pick(w, []uint16{1, 255, 256, 1023, 1024, 32767, 32768, 65534, 65535})
	}
	return uint16(1 + w.IntN(64))
}

func (w world) ports() PortRange {
	a, b := w.port(), w.port()
	switch w.IntN(3) {
	case 0:
		return SinglePort(a)
	case 1:
		return PortRange{a, uint16(min(65535, int(a)+w.IntN(9)))}
	}
	return PortRange{min(a, b), max(a, b)}
}

// prefixes are of a's family, and often hold it.
func (w world) prefixes(a netip.Addr) []netip.Prefix {
	var list []netip.Prefix
	for range w.IntN(4) {
		list = append(list, w.prefix(a))
	}
	return list
}

func (w world) prefix(a netip.Addr) netip.Prefix {
	bits := []int{3, 7, 16, 32, 127, 128}
	if a.Is4() {
		bits = []int{0, 7, 8, 16, 31, 32}
	}
	return netip.PrefixFrom(a, pick(w, bits)).Masked()
}

func (w world) dnat() DNATRule {
	list := w.addresses()
	r := DNATRule{
		Protocol: w.protocol(),
		Ingress:  w.device(),
		Ports:    w.ports(),
		To:       pick(w, list),
		Allow:    w.prefixes(pick(w, list)),
	}
	if w.IntN(2) == 0 {
		r.Destination = pick(w, list)
	}
	switch length := r.Ports.length(); w.IntN(3) {
	case 0:
		r.ToPorts = SinglePort(w.port())
	case 1:
		first := uint16(1 + w.IntN(65536-length))
		r.ToPorts = PortRange{first, first + uint16(length-1)}
	}
	if w.IntN(4) == 0 {
		for to := range 2 + w.IntN(3) {
			r.Backends = append(r.Backends, Backend{To: r.To, ToPorts: r.ToPorts, Weight: 1 + w.IntN(3)})
			if r.To = r.To.Next(); to > 0 && w.IntN(2) == 0 {
				r.Backends[to].ToPorts = PortRange{}
			}
		}
		r.To = r.Backends[0].To
		r.Balance, r.Affinity = Balance(w.IntN(2)), time.Duration(w.IntN(2))*time.Minute
	}
	return r
}

func (w world) snat() SNATRule {
	list := w.addresses()
	r := SNATRule{Source: w.prefix(pick(w, list)), Uplink: w.device(), Except: w.prefixes(pick(w, list)), Attach: w.IntN(4) == 0}
	if r.Masquerade = w.IntN(2) == 0; !r.Masquerade {
		r.ToFirst = pick(w, list)
		r.ToLast = withLastBits(r.ToFirst, lastBits(r.ToFirst)+uint32(w.IntN(300)))
		if w.IntN(2) == 0 {
			r.Ports = w.ports()
		}
	}
	return r
}

// grow adds random rules; what clashes by the model must be refused, and nothing else.
func (w world) grow(t *testing.T, rules *Rules) {
	t.Helper()

	for range 1 + w.IntN(40) {
		r := w.dnat()
		clash := false
		for _, o := range rules.DNAT {
			sameFamily := r.To.Is4() == o.To.Is4()
			if sameFamily && r.Destination == o.Destination && r.Protocol == o.Protocol && r.Ingress == o.Ingress &&
				r.Ports.First <= o.Ports.Last && o.Ports.First <= r.Ports.Last {
				clash = true
			}
		}
		changed, err := rules.AddDNAT(r)
		if (err != nil && !errors.Is(err, ErrRuleOverlap)) || changed == clash {
			t.Fatalf("adding %s: changed %v, clash %v, error %v", r, changed, clash, err)
		}
		if _, err := rules.AddSNAT(w.snat()); err != nil && !errors.Is(err, ErrRuleOverlap) {
			t.Fatal(err)
		}
	}
}

// shrink deletes random rules.
func (w world) shrink(t *testing.T, rules *Rules) {
	t.Helper()

	for range w.IntN(len(rules.DNAT) + 1) {
		if changed, err := rules.DeleteDNAT(pick(w, rules.DNAT)); err != nil || !changed {
			t.Fatal(changed, err)
		}
	}
	for range w.IntN(len(rules.SNAT) + 1) {
		if changed, err := rules.DeleteSNAT(pick(w, rules.SNAT)); err != nil || !changed {
			t.Fatal(changed, err)
		}
	}
}

func TestLookupsAgreeWithModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	w := world{rand.New(rand.NewPCG(seed, 0))}

	s := newState(t)
	var rules Rules
	hits := map[string]int{}
	for range 20 {
		w.grow(t, &rules)
		w.shrink(t, &rules)
		before := must[Rules](t)(s.Rules())
		raised := generations(t, s)

		inForce := set(t, s, rules)
		want, err := rules.normalize()
		if err != nil {
			t.Fatal(err)
		}
		if d := diff(want, withoutIDs(inForce)); d != "" {
			t.Fatalf("rules in force: %s", d)
		}
		checkGenerations(t, before, inForce, raised, generations(t, s))
		checkLookups(t, w, s, inForce, hits)
	}
	t.Logf("hits: %v", hits)
	for _, kind := range []string{"dnat", "no dnat", "allowed", "not allowed", "snat", "no snat", "excepted"} {
		if hits[kind] == 0 {
			t.Errorf("no lookup was of the kind %q", kind)
		}
	}
}

// checkGenerations insists that rules which stay keep id and generation, and that the ids of
// those that are gone were raised.
func checkGenerations(t *testing.T, before, after Rules, was, is map[uint32]uint32) {
	t.Helper()

	old, now := targetIDs(t, before), targetIDs(t, after)
	for words, id := range old {
		switch kept, ok := now[words]; {
		case ok && kept != id:
			t.Fatalf("%s had id %d, has %d", words, id, kept)
		case ok && is[id] != was[id]:
			t.Fatalf("%s stayed, but its generation went from %d to %d", words, was[id], is[id])
		}
	}
	kept := map[uint32]bool{}
	for words, id := range now {
		if _, ok := old[words]; ok {
			kept[id] = true
		}
	}
	for words, id := range old {
		if !kept[id] && is[id] == was[id] {
			t.Fatalf("%s is gone, but its generation is still %d", words, was[id])
		}
	}
}

// targetIDs are ids with one entry for each target, as if each had a rule of its own, and one for each rule
// that has several. A port that is kept is as good as one that is named.
func targetIDs(t *testing.T, rules Rules) map[string]uint32 {
	t.Helper()

	out := ids(t, Rules{SNAT: rules.SNAT})
	seen := map[uint32]string{}
	add := func(id uint32, words string) {
		if other, ok := seen[id]; ok || id == 0 {
			t.Errorf("id %d stands for %s and %s", id, words, other)
		}
		seen[id], out[words] = words, id
	}
	for _, r := range rules.DNAT {
		one := r
		for _, target := range r.Targets() {
			one.setTargets([]Backend{target})
			one.ToPorts = target.effective(r.Ports)
			add(target.ID, one.String())
		}
		if r.hasBackends() {
			one.To, one.ToPorts = r.matchAddress(), PortRange{}
			add(r.ID, one.String())
		}
	}
	return out
}

func checkLookups(t *testing.T, w world, s *State, rules Rules, hits map[string]int) {
	t.Helper()

	set, err := s.openSet(must[uint32](t)(s.slotInForce()))
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	d := datapath{t, set}
	for range 500 {
		list := w.addresses()
		src, dst, device := pick(w, list), pick(w, list), w.device()+1
		checkDNAT(t, d, rules, w.protocol(), src, dst, device, w.port(), hits)
		checkSNAT(t, d, rules, src, dst, device, hits)
	}
}

func checkDNAT(t *testing.T, d datapath, rules Rules, protocol Protocol, src, dst netip.Addr, ifindex uint32, port uint16, hits map[string]int) {
	t.Helper()

	rule, want := modelDNAT(rules, protocol, dst, ifindex, port)
	v, got := d.dnat(protocol, dst, ifindex, port)
	if got != want || got && v.Id != rule.ID {
		t.Fatalf("%s %s:%d by %d: rule %d (%v), want %d (%v) %s", protocol, dst, port, ifindex, v.Id, got, rule.ID, want, rule)
	}
	if !want {
		hits["no dnat"]++
		return
	}
	hits["dnat"]++
	if fromAddr(v.To) != rule.To || d.port(v, port) != modelPort(rule, port) {
		t.Fatalf("%s leads port %d to %s:%d, want %s:%d", rule, port, fromAddr(v.To), d.port(v, port), rule.To, modelPort(rule, port))
	}
	allowed := v.Flags&bpf.NATDnatFlagDNAT_ALLOW_LIST == 0 || d.lists(v.Id, src)
	if want := len(rule.Allow) == 0 || modelLists(rule.Allow, src); allowed != want {
		t.Fatalf("%s: %s allowed is %v", rule, src, allowed)
	}
	if allowed {
		hits["allowed"]++
	} else {
		hits["not allowed"]++
	}
}

func checkSNAT(t *testing.T, d datapath, rules Rules, src, dst netip.Addr, uplink uint32, hits map[string]int) {
	t.Helper()

	rule, want := modelSNAT(rules, src, uplink)
	v, got := d.snat(src, uplink)
	if got != want || got && v.Id != rule.ID {
		t.Fatalf("%s by %d: rule %d (%v), want %d (%v) %s", src, uplink, v.Id, got, rule.ID, want, rule)
	}
	if !want {
		hits["no snat"]++
		return
	}
	hits["snat"]++
	if masquerade := v.Flags&bpf.NATSnatFlagSNAT_MASQUERADE != 0; masquerade != rule.Masquerade {
		t.Fatalf("%s: masquerade is %v", rule, masquerade)
	}
	if !rule.Masquerade && (fromAddr(v.To) != rule.ToFirst || v.ToCount != lastBits(rule.ToLast)-lastBits(rule.ToFirst)+1) {
		t.Fatalf("%s: %d addresses from %s", rule, v.ToCount, fromAddr(v.To))
	}
	if (PortRange{v.PortFirst, v.PortLast}) != rule.Ports {
		t.Fatalf("%s: ports are %d-%d", rule, v.PortFirst, v.PortLast)
	}
	excepted := v.Flags&bpf.NATSnatFlagSNAT_EXCEPT != 0 && d.lists(v.Id, dst)
	if excepted != modelLists(rule.Except, dst) {
		t.Fatalf("%s: %s excepted is %v", rule, dst, excepted)
	}
	if excepted {
		hits["excepted"]++
	}
}
