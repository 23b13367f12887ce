package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spf13/pflag"

	"net/netip"

	"tcnat/maps"
)

func TestParsePrefix(t *testing.T) {
	for text, want := range map[string]string{
		"172.17.0.0/16":   "172.17.0.0/16",
		"172.17.0.2":      "172.17.0.2/32",
		"0.0.0.0/0":       "0.0.0.0/0",
		"2001:db8::/32":   "2001:db8::/32",
		"2001:db8::1":     "2001:db8::1/128",
		"172.17.0.0/33":   "!172.17.0.0/33: prefix length 33 is over 32",
		"2001:db8::/129":  "!2001:db8::/129: prefix length 129 is over 128",
		"172.17.0.0/x":    "!172.17.0.0/x: prefix length x is not a number",
		"172.17.0.0/+8":   "!172.17.0.0/+8: prefix length +8 is not a number",
		"172.17.0.0/":     `!172.17.0.0/: prefix length "" is not a number`,
		"172.17.0.5/16":   "!172.17.0.5/16: has bits set behind the prefix (the network is 172.17.0.0/16)",
		"172.17.0/16":     "!172.17.0: not an IPv4 or IPv6 address",
		"":                `!"": not an IPv4 or IPv6 address`,
		"::ffff:1.2.3.4":  "!::ffff:1.2.3.4: write it as 1.2.3.4",
		"fe80::1%eth0/64": "!fe80::1%eth0: an address with a zone cannot be translated",
	} {
		got, err := parsePrefix(text)
		checkParsed(t, text, want, got.String(), err)
	}
}

func TestParsePorts(t *testing.T) {
	for text, want := range map[string]string{
		"1":         "1",
		"65535":     "65535",
		"8000-8999": "8000-8999",
		"8000:8999": "8000-8999",
		"80-80":     "80",
		"0":         "!port 0 does not exist (ports are 1 to 65535)",
		"0-80":      "!port 0 does not exist (ports are 1 to 65535)",
		"65536":     "!port 65536 is over 65535",
		"8999-8000": "!the port range is reversed (did you mean 8000-8999?)",
		"80-":       `!"" is not a port number`,
		"-1":        `!"" is not a port number`,
		"http":      "!http is not a port number",
		"1-2-3":     "!2-3 is not a port number",
	} {
		got, err := parsePorts(text)
		checkParsed(t, text, want, got.String(), err)
	}
}

func TestParseEndpoint(t *testing.T) {
	for text, want := range map[string]string{
		"172.17.0.2":                            "172.17.0.2",
		"172.17.0.2:80":                         "172.17.0.2:80",
		"172.17.0.2:80-90":                      "172.17.0.2:80-90",
		"203.0.113.2-203.0.113.9":               "203.0.113.2-203.0.113.9",
		"203.0.113.2-203.0.113.9:20000-29999":   "203.0.113.2-203.0.113.9:20000-29999",
		"203.0.113.2-203.0.113.2:20000-29999":   "203.0.113.2:20000-29999",
		"2001:db8::1":                           "2001:db8::1",
		"[2001:db8::1]":                         "2001:db8::1",
		"[2001:db8::1]:80":                      "[2001:db8::1]:80",
		"2001:db8::1-2001:db8::9":               "2001:db8::1-2001:db8::9",
		"[2001:db8::1-2001:db8::9]:1024-2047":   "[2001:db8::1-2001:db8::9]:1024-2047",
		"[2001:db8::1]-[2001:db8::9]:1024-2047": "[2001:db8::1-2001:db8::9]:1024-2047",
		"172.17.0.2:0":                          "!172.17.0.2:0: port 0 does not exist (ports are 1 to 65535)",
		"172.17.0.2:":                           `!172.17.0.2:: "" is not a port number`,
		"172.17.0.2:90-80":                      "!172.17.0.2:90-80: the port range is reversed (did you mean 80-90?)",
		"203.0.113.9-203.0.113.2":               "!203.0.113.9-203.0.113.2: the range is reversed (did you mean 203.0.113.2-203.0.113.9?)",
		"203.0.113.2-2001:db8::1":               "!203.0.113.2-2001:db8::1: mixes IPv4 and IPv6",
		"[2001:db8::1":                          "![2001:db8::1: brackets are not in pairs",
		"[172.17.0.2]:80":                       "172.17.0.2:80",
		":80":                                   `!:80: "": not an IPv4 or IPv6 address`,
		"web:80":                                "!web:80: web: not an IPv4 or IPv6 address",
	} {
		got, err := parseSource(text)
		checkParsed(t, text, want, got.String(), err)
	}
	if _, err := parseTarget("172.17.0.2-172.17.0.9:80"); err == nil || !strings.Contains(err.Error(), "takes one address, not a range") {
		t.Errorf("parseTarget of a range: %v", err)
	}
}

// checkParsed compares with what a value prints, or with "!" and the error.
func checkParsed(t *testing.T, text, want, got string, err error) {
	t.Helper()
	if err != nil {
		got = "!" + err.Error()
	}
	if got != want {
		t.Errorf("%q: got %s, want %s", text, got, want)
	}
}

func TestDNATWords(t *testing.T) {
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	for words, want := range map[string]maps.DNATRule{
		"-p tcp --dport 3005 --to-destination 172.17.0.2:3005": {
			Protocol: maps.TCP, Ports: maps.PortRange{First: 3005, Last: 3005},
			To: addr("172.17.0.2"), ToPorts: maps.PortRange{First: 3005, Last: 3005},
		},
		"-p udp -d 203.0.113.2 -i ifindex:7 --dport 8000-8999 --to-destination 172.17.0.2": {
			Protocol: maps.UDP, Destination: addr("203.0.113.2"), Ingress: 7,
			Ports: maps.PortRange{First: 8000, Last: 8999}, To: addr("172.17.0.2"),
		},
		"-p tcp --dport 80 --to-destination [fd00:17::2]:8080 -s 2001:db8::/32 -s 2001:db9::1/128": {
			Protocol: maps.TCP, Ports: maps.PortRange{First: 80, Last: 80},
			To: addr("fd00:17::2"), ToPorts: maps.PortRange{First: 8080, Last: 8080},
			Allow: []netip.Prefix{prefix("2001:db8::/32"), prefix("2001:db9::1/128")},
		},
	} {
		got, err := parseDNAT(strings.Fields(words), true)
		if err != nil {
			t.Errorf("%s: %v", words, err)
			continue
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", words, diff)
		}
		if text := got.Words(indexName); text != words {
			t.Errorf("printed %s, read from %s", text, words)
		}
	}
}

func TestSNATWords(t *testing.T) {
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	for words, want := range map[string]maps.SNATRule{
		"-s 172.17.0.0/16 --masquerade": {Source: prefix("172.17.0.0/16"), Masquerade: true},
		"-s 172.17.0.0/16 -o ifindex:3 --to-source 203.0.113.2-203.0.113.9:20000-29999 --except 10.0.0.0/8": {
			Source: prefix("172.17.0.0/16"), Uplink: 3, ToFirst: addr("203.0.113.2"), ToLast: addr("203.0.113.9"),
			Ports: maps.PortRange{First: 20000, Last: 29999}, Except: []netip.Prefix{prefix("10.0.0.0/8")},
		},
		"-s fd00:17::/64 --to-source [2001:db8::1-2001:db8::9]:1024-2047": {
			Source: prefix("fd00:17::/64"), ToFirst: addr("2001:db8::1"), ToLast: addr("2001:db8::9"),
			Ports: maps.PortRange{First: 1024, Last: 2047},
		},
	} {
		got, err := parseSNAT(strings.Fields(words), true)
		if err != nil {
			t.Errorf("%s: %v", words, err)
			continue
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", words, diff)
		}
		if text := got.Words(indexName); text != words {
			t.Errorf("printed %s, read from %s", text, words)
		}
	}
}

// What a rule prints, the command line reads as the same rule.
func FuzzDNATWords(f *testing.F) {
	f.Add("-p tcp --dport 3005 --to-destination 172.17.0.2:3005")
	f.Add("-p udp -d 203.0.113.2 -i ifindex:7 --dport 8000-8999 --to-destination 172.17.0.2:1-1000 -s 198.51.100.0/24,10.0.0.0/8")
	f.Add("-p tcp --dport 80 --to-destination [fd00:17::2]:8080 -s 2001:db8::/32")
	f.Add("-p tcp --dport 0 --to-destination 172.17.0.2:0")
	f.Fuzz(func(t *testing.T, text string) {
		rule, err := parseDNAT(strings.Fields(text), true)
		if err != nil {
			return
		}
		printed := rule.Words(indexName)
		again, err := parseDNAT(strings.Fields(printed), true)
		if err != nil {
			t.Fatalf("%q prints %q: %v", text, printed, err)
		}
		if diff := cmp.Diff(rule, again, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}), cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("%q prints %q: %s", text, printed, diff)
		}
	})
}

// What a rule prints, the command line reads as the same rule.
func FuzzSNATWords(f *testing.F) {
	f.Add("-s 172.17.0.0/16 --masquerade")
	f.Add("-s 172.17.0.0/16 -o ifindex:3 --to-source 203.0.113.2-203.0.113.9:20000-29999 --except 10.0.0.0/8")
	f.Add("-s fd00:17::/64 --to-source [2001:db8::1-2001:db8::9]:1024-2047 --except 2001:db8::/32")
	f.Add("-s fd00:17::/64 --to-source [2001:db8::1]-[2001:db8::9]")
	f.Fuzz(func(t *testing.T, text string) {
		rule, err := parseSNAT(strings.Fields(text), true)
		if err != nil {
			return
		}
		printed := rule.Words(indexName)
		again, err := parseSNAT(strings.Fields(printed), true)
		if err != nil {
			t.Fatalf("%q prints %q: %v", text, printed, err)
		}
		if diff := cmp.Diff(rule, again, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}), cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("%q prints %q: %s", text, printed, diff)
		}
	})
}

// What the parsers of values accept, they print so that they accept it again.
func FuzzValues(f *testing.F) {
	for _, text := range []string{
		"172.17.0.2", "172.17.0.2:80-90", "[fd00::1-fd00::9]:1-2", "[fd00::1]-[fd00::9]:1", "1.2.3.4-1.2.3.9:7",
		"172.17.0.0/16", "::/0", "1-65535", "8:9", "]", "[", "-", ":", "1.2.3.4:", "[]:1", "[1.2.3.4]]:5",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if value, err := parseSource(text); err == nil {
			again, err := parseSource(value.String())
			if err != nil || again != value {
				t.Errorf("endpoint %q prints %q, read as %v, %v", text, value, again, err)
			}
		}
		if value, err := parsePrefix(text); err == nil {
			again, err := parsePrefix(value.String())
			if err != nil || again != value {
				t.Errorf("prefix %q prints %q, read as %v, %v", text, value, again, err)
			}
		}
		if value, err := parsePorts(text); err == nil {
			again, err := parsePorts(value.String())
			if err != nil || again != value || value.First == 0 || value.First > value.Last {
				t.Errorf("ports %q print %q, read as %v, %v", text, value, again, err)
			}
		}
	})
}

func parseDNAT(args []string, whole bool) (maps.DNATRule, error) {
	var words dnatWords
	fs := pflag.NewFlagSet("dnat", pflag.ContinueOnError)
	words.bind(fs)
	if err := fs.Parse(args); err != nil {
		return maps.DNATRule{}, err
	}
	return words.rule(whole, lookupIndex)
}

func parseSNAT(args []string, whole bool) (maps.SNATRule, error) {
	var words snatWords
	fs := pflag.NewFlagSet("snat", pflag.ContinueOnError)
	words.bind(fs)
	if err := fs.Parse(args); err != nil {
		return maps.SNATRule{}, err
	}
	return words.rule(whole, lookupIndex)
}

// lookupIndex knows no device but those that are given by index.
func lookupIndex(name string) (uint32, error) {
	if !strings.HasPrefix(name, ifindexPrefix) {
		return 0, usagef("%s: no such device", name)
	}
	return lookupDevice(name)
}

func indexName(ifindex uint32) string { return devices(nil).name(ifindex) }
