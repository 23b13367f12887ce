package maps

import (
	"errors"
	"strings"
	"testing"
)

// dnat is a rule that publishes one port or range; edit changes what a test is about.
func dnat(edit ...func(*DNATRule)) DNATRule {
	r := DNATRule{
		Protocol: TCP,
		Ports:    SinglePort(3005),
		To:       addr("172.17.0.2"),
		ToPorts:  SinglePort(3005),
	}
	for _, e := range edit {
		e(&r)
	}
	return r
}

func snat(edit ...func(*SNATRule)) SNATRule {
	r := SNATRule{Source: prefix("172.17.0.0/16"), Masquerade: true}
	for _, e := range edit {
		e(&r)
	}
	return r
}

// toSource makes an SNAT rule one to fixed addresses; last may be "".
func toSource(first, last string) func(*SNATRule) {
	return func(r *SNATRule) {
		r.Masquerade, r.ToFirst = false, addr(first)
		if last != "" {
			r.ToLast = addr(last)
		}
	}
}

func TestRuleWords(t *testing.T) {
	for want, rule := range map[string]interface{ String() string }{
		"-p tcp --dport 3005 --to-destination 172.17.0.2:3005": dnat(),
		"-p udp --dport 8000-8999 --to-destination 172.17.0.2": dnat(func(r *DNATRule) {
			r.Protocol, r.Ports, r.ToPorts = UDP, PortRange{8000, 8999}, PortRange{}
		}),
		"-p tcp -d 203.0.113.2 -i ifindex:7 --dport 3005 --to-destination 172.17.0.2:80-89 -s 10.0.0.0/8 -s 192.0.2.1/32": dnat(func(r *DNATRule) {
			r.Destination, r.Ingress, r.ToPorts = addr("203.0.113.2"), 7, PortRange{80, 89}
			r.Allow = prefixes("10.0.0.0/8", "192.0.2.1/32")
		}),
		"-p tcp --dport 3005 --to-destination [fd00::2]:80": dnat(func(r *DNATRule) {
			r.To, r.ToPorts = addr("fd00::2"), SinglePort(80)
		}),
		"-s 172.17.0.0/16 --masquerade": snat(),
		"-s 172.17.0.0/16 -o ifindex:2 --to-source 203.0.113.2-203.0.113.9:20000-29999 --except 10.0.0.0/8": snat(
			toSource("203.0.113.2", "203.0.113.9"), func(r *SNATRule) {
				r.Uplink, r.Ports, r.Except = 2, PortRange{20000, 29999}, prefixes("10.0.0.0/8")
			}),
		"-s fd00::/64 --to-source [2001:db8::1-2001:db8::9]:20000-29999": snat(
			toSource("2001:db8::1", "2001:db8::9"), func(r *SNATRule) {
				r.Source, r.Ports = prefix("fd00::/64"), PortRange{20000, 29999}
			}),
		"-s 172.17.0.0/16 --to-source 203.0.113.2": snat(toSource("203.0.113.2", "203.0.113.2")),
	} {
		if got := rule.String(); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
	named := dnat(func(r *DNATRule) { r.Ingress = 7 }).Words(func(uint32) string { return "eth0" })
	if want := "-p tcp -i eth0 --dport 3005 --to-destination 172.17.0.2:3005"; named != want {
		t.Errorf("got  %s\nwant %s", named, want)
	}
}

func TestDNATRefusals(t *testing.T) {
	for name, test := range map[string]struct {
		edit func(*DNATRule)
		kind error
		text string // in the error
	}{
		"port 0":            {func(r *DNATRule) { r.Ports = PortRange{} }, ErrInvalidRule, "no port 0"},
		"from port 0":       {func(r *DNATRule) { r.Ports = PortRange{0, 9} }, ErrInvalidRule, "no port 0"},
		"reversed":          {func(r *DNATRule) { r.Ports = PortRange{9, 8} }, ErrInvalidRule, "write 8-9"},
		"target port 0":     {func(r *DNATRule) { r.ToPorts = PortRange{0, 9} }, ErrInvalidRule, "target port"},
		"target reversed":   {func(r *DNATRule) { r.ToPorts = PortRange{9, 8} }, ErrInvalidRule, "reversed"},
		"lengths":           {func(r *DNATRule) { r.Ports, r.ToPorts = PortRange{10, 19}, PortRange{10, 18} }, ErrInvalidRule, "9 for the 10"},
		"no target":         {func(r *DNATRule) { r.To = DNATRule{}.To }, ErrInvalidRule, "no address"},
		"unspecified":       {func(r *DNATRule) { r.To = addr("0.0.0.0") }, ErrInvalidRule, "unspecified"},
		"unspecified IPv6":  {func(r *DNATRule) { r.To = addr("::") }, ErrInvalidRule, "unspecified"},
		"multicast":         {func(r *DNATRule) { r.To = addr("224.0.0.1") }, ErrInvalidRule, "multicast"},
		"broadcast":         {func(r *DNATRule) { r.To = addr("255.255.255.255") }, ErrInvalidRule, "broadcast"},
		"loopback":          {func(r *DNATRule) { r.To = addr("127.0.0.1") }, ErrInvalidRule, "loopback"},
		"loopback IPv6":     {func(r *DNATRule) { r.To = addr("::1") }, ErrInvalidRule, "loopback"},
		"link-local IPv6":   {func(r *DNATRule) { r.To = addr("fe80::1") }, ErrInvalidRule, "link-local"},
		"zone":              {func(r *DNATRule) { r.To = addr("fe80::1%eth0") }, ErrInvalidRule, "zone"},
		"v4-mapped":         {func(r *DNATRule) { r.To = addr("::ffff:172.17.0.2") }, ErrInvalidRule, "write 172.17.0.2"},
		"destination":       {func(r *DNATRule) { r.Destination = addr("0.0.0.0") }, ErrInvalidRule, "destination"},
		"families":          {func(r *DNATRule) { r.Destination = addr("2001:db8::1") }, ErrInvalidRule, "mixed families"},
		"loopback, device":  {func(r *DNATRule) { r.Destination, r.Ingress = addr("127.0.0.1"), 7 }, ErrInvalidRule, "leave the device out"},
		"loopback, sources": {func(r *DNATRule) { r.Destination, r.Allow = addr("127.9.9.9"), prefixes("10.0.0.0/8") }, ErrInvalidRule, "leave the sources out"},
		"source family":     {func(r *DNATRule) { r.Allow = prefixes("2001:db8::/32") }, ErrInvalidRule, "not IPv4"},
		"source bits":       {func(r *DNATRule) { r.Allow = prefixes("10.0.0.1/8") }, ErrInvalidRule, "write 10.0.0.0/8"},
		"source mapped":     {func(r *DNATRule) { r.Allow = prefixes("::ffff:10.0.0.0/104") }, ErrInvalidRule, "write 10.0.0.0/8"},
		"source everything": {func(r *DNATRule) { r.To = addr("fd00::2"); r.Allow = prefixes("::/0") }, ErrInvalidRule, "2000::/3"},
		"loopback, sctp":    {func(r *DNATRule) { r.Destination, r.Protocol = addr("127.0.0.1"), SCTP }, ErrInvalidRule, "SCTP sockets cannot be led"},
		"icmp":              {func(r *DNATRule) { r.Protocol = ICMP }, ErrInvalidRule, "use tcp, udp or sctp"},
		"no protocol":       {func(r *DNATRule) { r.Protocol = 0 }, ErrInvalidRule, "use tcp, udp or sctp"},
	} {
		t.Run(name, func(t *testing.T) {
			var rules Rules
			changed, err := rules.AddDNAT(dnat(test.edit))
			checkRefusal(t, changed, err, test.kind, test.text)
			if len(rules.DNAT) != 0 {
				t.Errorf("left a rule: %v", rules.DNAT)
			}
		})
	}
}

func TestSNATRefusals(t *testing.T) {
	for name, test := range map[string]struct {
		edit func(*SNATRule)
		text string
	}{
		"no source":         {func(r *SNATRule) { *r = SNATRule{Masquerade: true} }, "no prefix"},
		"host bits":         {func(r *SNATRule) { r.Source = prefix("172.17.0.1/16") }, "write 172.17.0.0/16"},
		"mapped":            {func(r *SNATRule) { r.Source = prefix("::ffff:172.17.0.0/112") }, "write 172.17.0.0/16"},
		"all of IPv6":       {func(r *SNATRule) { r.Source = prefix("::/0") }, "2000::/3"},
		"masquerade and to": {func(r *SNATRule) { r.ToFirst = addr("203.0.113.2") }, "use --to-source"},
		"masquerade ports":  {func(r *SNATRule) { r.Ports = PortRange{1, 2} }, "use --to-source"},
		"no target":         {func(r *SNATRule) { r.Masquerade = false }, "no address"},
		"unspecified":       {toSource("0.0.0.0", ""), "unspecified"},
		"multicast":         {toSource("203.0.113.2", "224.0.0.1"), "multicast"},
		"loopback":          {toSource("127.0.0.1", ""), "loopback"},
		"around loopback":   {toSource("126.0.0.1", "128.0.0.1"), "loopback"},
		"reversed":          {toSource("203.0.113.9", "203.0.113.2"), "write 203.0.113.2-203.0.113.9"},
		"families":          {toSource("2001:db8::1", ""), "mixed families"},
		"range families":    {toSource("203.0.113.2", "2001:db8::1"), "mixed families"},
		"range too large":   {func(r *SNATRule) { r.Source = prefix("fd00::/64"); toSource("2001:db8::", "2001:db8::1:0:0")(r) }, "last 32 bits"},
		"range of 2^32":     {func(r *SNATRule) { r.Source = prefix("fd00::/64"); toSource("2001:db8::", "2001:db8::ffff:ffff")(r) }, "4294967295"},
		"port 0":            {func(r *SNATRule) { toSource("203.0.113.2", "")(r); r.Ports = PortRange{0, 9} }, "no port 0"},
		"except family":     {func(r *SNATRule) { r.Except = prefixes("fd00::/8") }, "not IPv4"},
		"except bits":       {func(r *SNATRule) { r.Except = prefixes("10.0.0.1/8") }, "write 10.0.0.0/8"},
	} {
		t.Run(name, func(t *testing.T) {
			var rules Rules
			changed, err := rules.AddSNAT(snat(test.edit))
			checkRefusal(t, changed, err, ErrInvalidRule, test.text)
			if len(rules.SNAT) != 0 {
				t.Errorf("left a rule: %v", rules.SNAT)
			}
		})
	}
}

// checkRefusal insists on an error of a kind, on one line, with a text in it.
func checkRefusal(t *testing.T, changed bool, err, kind error, text string) {
	t.Helper()

	if changed || !errors.Is(err, kind) {
		t.Fatalf("got changed %v, error %v; want %v", changed, err, kind)
	}
	if !strings.Contains(err.Error(), text) || strings.Contains(err.Error(), "\n") {
		t.Errorf("error is %q, want one line with %q", err, text)
	}
}

func TestDNATAccepted(t *testing.T) {
	for name, edit := range map[string]func(*DNATRule){
		"host alone":       func(r *DNATRule) { r.Destination = addr("127.0.0.1") },
		"last port":        func(r *DNATRule) { r.Ports = SinglePort(65535) },
		"all to one":       func(r *DNATRule) { r.Ports = PortRange{1, 65535} },
		"shifted":          func(r *DNATRule) { r.Ports, r.ToPorts = PortRange{8000, 8999}, PortRange{1, 1000} },
		"from everybody":   func(r *DNATRule) { r.Allow = prefixes("0.0.0.0/0") },
		"from IPv6 global": func(r *DNATRule) { r.To, r.Allow = addr("fd00::2"), prefixes("2000::/3") },
	} {
		var rules Rules
		if changed, err := rules.AddDNAT(dnat(edit)); err != nil || !changed {
			t.Errorf("%s: changed %v, error %v", name, changed, err)
		}
	}
}

func TestDNATOverlap(t *testing.T) {
	base := dnat(func(r *DNATRule) {
		r.Destination, r.Ingress, r.Ports, r.ToPorts = addr("203.0.113.2"), 7, PortRange{8000, 8999}, PortRange{}
	})
	for name, test := range map[string]struct {
		edit    func(*DNATRule)
		changed bool
		kind    error
	}{
		"same":               {func(r *DNATRule) {}, false, nil},
		"same, port written": {func(r *DNATRule) { r.ToPorts = r.Ports }, false, nil},
		"other target":       {func(r *DNATRule) { r.To = addr("172.17.0.3") }, false, ErrRuleOverlap},
		"other list":         {func(r *DNATRule) { r.Allow = prefixes("10.0.0.0/8") }, false, ErrRuleOverlap},
		"one port in it":     {func(r *DNATRule) { r.Ports = SinglePort(8500) }, false, ErrRuleOverlap},
		"last port":          {func(r *DNATRule) { r.Ports = PortRange{8999, 9000} }, false, ErrRuleOverlap},
		"around it":          {func(r *DNATRule) { r.Ports = PortRange{1, 65535} }, false, ErrRuleOverlap},
		"beside it":          {func(r *DNATRule) { r.Ports = PortRange{9000, 9001} }, true, nil},
		"udp":                {func(r *DNATRule) { r.Protocol = UDP }, true, nil},
		"any destination":    {func(r *DNATRule) { r.Destination = DNATRule{}.Destination }, true, nil},
		"other destination":  {func(r *DNATRule) { r.Destination = addr("203.0.113.3") }, true, nil},
		"other device":       {func(r *DNATRule) { r.Ingress = 8 }, true, nil},
		"any device":         {func(r *DNATRule) { r.Ingress = 0 }, true, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var rules Rules
			if _, err := rules.AddDNAT(base); err != nil {
				t.Fatal(err)
			}
			r := base
			test.edit(&r)
			changed, err := rules.AddDNAT(r)
			if changed != test.changed || !errors.Is(err, test.kind) {
				t.Fatalf("got changed %v, error %v; want %v, %v", changed, err, test.changed, test.kind)
			}
			if err != nil && !strings.Contains(err.Error(), base.String()) {
				t.Errorf("%q does not name the other rule, %s", err, base)
			}
		})
	}
}

func TestAnyDestinationHasAFamily(t *testing.T) {
	var rules Rules
	for _, to := range []string{"172.17.0.2", "fd00::2"} {
		changed, err := rules.AddDNAT(dnat(func(r *DNATRule) { r.To = addr(to) }))
		if err != nil || !changed {
			t.Fatalf("%s: changed %v, error %v", to, changed, err)
		}
	}
}

func TestDeleteDNAT(t *testing.T) {
	rule := dnat(func(r *DNATRule) { r.Allow = prefixes("10.0.0.0/8") })
	for name, test := range map[string]struct {
		edit    func(*DNATRule)
		deleted bool
	}{
		"same":          {func(r *DNATRule) {}, true},
		"without list":  {func(r *DNATRule) { r.Allow = nil }, true},
		"by match":      {func(r *DNATRule) { *r = DNATRule{Protocol: r.Protocol, Ports: r.Ports} }, true},
		"port kept":     {func(r *DNATRule) { r.ToPorts = PortRange{} }, true},
		"other list":    {func(r *DNATRule) { r.Allow = prefixes("10.0.0.0/9") }, false},
		"other target":  {func(r *DNATRule) { r.To = addr("172.17.0.3") }, false},
		"other port":    {func(r *DNATRule) { r.Ports = SinglePort(3006) }, false},
		"other device":  {func(r *DNATRule) { r.Ingress = 7 }, false},
		"other address": {func(r *DNATRule) { r.Destination = addr("203.0.113.2") }, false},
	} {
		t.Run(name, func(t *testing.T) {
			other := dnat(func(r *DNATRule) { r.Ports = SinglePort(9999) })
			var rules Rules
			for _, r := range []DNATRule{rule, other} {
				if _, err := rules.AddDNAT(r); err != nil {
					t.Fatal(err)
				}
			}
			r := rule
			test.edit(&r)
			for i, want := range []bool{test.deleted, false} {
				if changed, err := rules.DeleteDNAT(r); err != nil || changed != want {
					t.Fatalf("delete number %d: changed %v, error %v; want %v", i+1, changed, err, want)
				}
			}
			left := []DNATRule{rule, other}
			if test.deleted {
				left = left[1:]
			}
			if d := diff(left, rules.DNAT); d != "" {
				t.Error(d)
			}
		})
	}
	var rules Rules
	if _, err := rules.DeleteDNAT(DNATRule{Protocol: TCP}); !errors.Is(err, ErrInvalidRule) {
		t.Errorf("deleting port 0: %v", err)
	}
}

func TestSNATOverlap(t *testing.T) {
	fixed := toSource("203.0.113.2", "")
	attach := func(r *SNATRule) { r.Attach = true }
	for name, test := range map[string]struct {
		have, add SNATRule
		changed   bool
		kind      error
		inForce   SNATRule
	}{
		"same":                  {snat(), snat(), false, nil, snat()},
		"other target":          {snat(), snat(fixed), false, ErrRuleOverlap, snat()},
		"user's over attach's":  {snat(attach), snat(fixed), true, nil, snat(fixed, toSource("203.0.113.2", "203.0.113.2"))},
		"user's same as it":     {snat(attach), snat(), true, nil, snat()},
		"attach's over user's":  {snat(), snat(attach), false, nil, snat()},
		"attach's again":        {snat(attach), snat(attach), false, nil, snat(attach)},
		"attach's with another": {snat(attach), snat(attach, fixed), false, ErrRuleOverlap, snat(attach)},
	} {
		t.Run(name, func(t *testing.T) {
			var rules Rules
			if _, err := rules.AddSNAT(test.have); err != nil {
				t.Fatal(err)
			}
			changed, err := rules.AddSNAT(test.add)
			if changed != test.changed || !errors.Is(err, test.kind) {
				t.Fatalf("got changed %v, error %v; want %v, %v", changed, err, test.changed, test.kind)
			}
			if d := diff([]SNATRule{test.inForce}, rules.SNAT); d != "" {
				t.Error(d)
			}
		})
	}
	rules := Rules{SNAT: []SNATRule{snat()}}
	for _, edit := range []func(*SNATRule){
		func(r *SNATRule) { r.Uplink = 2 },
		func(r *SNATRule) { r.Source = prefix("172.17.1.0/24") },
		func(r *SNATRule) { r.Source = prefix("fd00::/64") },
	} {
		if changed, err := rules.AddSNAT(snat(edit)); err != nil || !changed {
			t.Errorf("%s: changed %v, error %v", snat(edit), changed, err)
		}
	}
}

func TestDeleteSNAT(t *testing.T) {
	rule := snat(toSource("203.0.113.2", "203.0.113.2"), func(r *SNATRule) { r.Except = prefixes("10.0.0.0/8") })
	for name, test := range map[string]struct {
		edit    func(*SNATRule)
		deleted bool
	}{
		"same":         {func(r *SNATRule) {}, true},
		"without list": {func(r *SNATRule) { r.Except = nil }, true},
		"by match":     {func(r *SNATRule) { *r = SNATRule{Source: r.Source} }, true},
		"short range":  {func(r *SNATRule) { r.ToLast = SNATRule{}.ToLast }, true},
		"masquerade":   {func(r *SNATRule) { *r = snat() }, false},
		"other uplink": {func(r *SNATRule) { r.Uplink = 2 }, false},
		"other source": {func(r *SNATRule) { r.Source = prefix("172.17.0.0/17") }, false},
		"other list":   {func(r *SNATRule) { r.Except = prefixes("10.0.0.0/9") }, false},
	} {
		rules := Rules{SNAT: []SNATRule{rule}}
		r := rule
		test.edit(&r)
		changed, err := rules.DeleteSNAT(r)
		if err != nil || changed != test.deleted || (len(rules.SNAT) == 0) != test.deleted {
			t.Errorf("%s: changed %v, error %v, left %v", name, changed, err, rules.SNAT)
		}
	}
}

func TestParseProtocol(t *testing.T) {
	for text, want := range map[string]Protocol{"tcp": TCP, "UDP": UDP, "icmp": ICMP, "icmpv6": ICMPv6, "sctp": SCTP, "47": 47, "6": TCP} {
		if got, err := ParseProtocol(text); err != nil || got != want {
			t.Errorf("%q: got %s, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "0", "256", "-1", "tcpp", "6x"} {
		if got, err := ParseProtocol(text); !errors.Is(err, ErrUnknownProtocol) {
			t.Errorf("%q: got %s, %v", text, got, err)
		}
	}
	for p := range 256 {
		if got, err := ParseProtocol(Protocol(p).String()); p != 0 && (err != nil || got != Protocol(p)) {
			t.Errorf("%s came back as %s (%v)", Protocol(p), got, err)
		}
	}
}
