package main

import (
	"strings"
	"testing"
)

// Words that never get as far as the datapath: one line on stderr, exit code 2, and nothing
// on stdout. None of these needs any right.
func TestWrongUsage(t *testing.T) {
	for line, want := range map[string]string{
		// Words of the manual that are not built yet.
		"attach --bridge b --uplink u --internal":                  "tcnat attach: --internal: not built yet",
		"attach --bridge b --uplink u --protocols 47":              "tcnat attach: --protocols: not built yet",
		"attach --bridge b --uplink u --max-new 3":                 "tcnat attach: --max-new: not built yet",
		"attach --bridge b --uplink u --max-flows-per-source 3":    "tcnat attach: --max-flows-per-source: not built yet",
		"apply -f nat.yaml --dry-run":                              "tcnat apply: not built yet",
		"export":                                                   "tcnat export: not built yet",
		"import -f rules.v4":                                       "tcnat import: not built yet",
		"explain -i docker0 -p tcp -s 172.17.0.2:4 -d 1.1.1.1:443": "tcnat explain: not built yet",
		"trace --pcap":                                             "tcnat trace: not built yet",
		"agent --docker":                                           "tcnat agent: not built yet",
		"flows watch":                                              "tcnat flows watch: not built yet",
		"dnat add -p tcp --dport 1 --to-destination 172.17.0.2 --to-destination 172.17.0.2":                               "tcnat dnat add: target 172.17.0.2: named twice: give it a weight instead",
		"dnat add -p tcp --dport 1 --to-destination 172.17.0.2 --to-destination 172.17.0.3:1 --to-destination 172.17.0.3": "tcnat dnat add: target 172.17.0.3: named twice: give it a weight instead",
		"dnat add -p tcp --dport 1 --to-destination 172.17.0.2 --to-destination fd00:17::2":                               "tcnat dnat add: targets 172.17.0.2 and fd00:17::2: mixed families: use one family a rule",
		"dnat add -p tcp --dport 1 --to-destination 172.17.0.2 --to-destination 172.17.0.3 --weight 2":                    "tcnat dnat add: --weight: 1 for 2 of --to-destination: give one for each",
		"dnat add -p tcp --dport 1 --to-destination 172.17.0.2 --to-destination 172.17.0.3 --weight 0,1":                  "tcnat dnat add: --weight 0: takes 1 to 256",
		"dnat add -p tcp --dport 1 --to-destination 172.17.0.2 --to-destination 172.17.0.3 --weight 257":                  "tcnat dnat add: --weight 257: takes 1 to 256",
		"dnat add -p tcp --dport 1 --to-destination 172.17.0.2 --to-destination 172.17.0.3 --balance robin":               "tcnat dnat add: --balance robin: takes random, source",
		"dnat add -p tcp --dport 1 --to-destination 172.17.0.2 --to-destination 172.17.0.3 --affinity 1500ms":             "tcnat dnat add: --affinity 1500ms: takes whole seconds, like 90s or 10m, up to 168h0m0s",
		"dnat add -p tcp --dport 1 --to-destination 172.17.0.2 --to-destination 172.17.0.3 --affinity -1s":                "tcnat dnat add: --affinity -1s: takes whole seconds, like 90s or 10m, up to 168h0m0s",
		"dnat add -p tcp --dport 1 --to-destination 172.17.0.2 --to-destination 172.17.0.3 --affinity 169h":               "tcnat dnat add: --affinity 169h: takes whole seconds, like 90s or 10m, up to 168h0m0s",
		"dnat add -p tcp --dport 1 --to-destination 172.17.0.2 --weight 5":                                                "tcnat dnat add: --weight: is for several of --to-destination: leave it out",
		"dnat add -p tcp --dport 1 --to-destination 172.17.0.2 --balance source":                                          "tcnat dnat add: --balance: is for several of --to-destination: leave it out",
		"dnat add -p tcp --dport 1 --to-destination 172.17.0.2 --affinity 1m":                                             "tcnat dnat add: --affinity: is for several of --to-destination: leave it out",
		"dnat add -p tcp --dport 1 --to-destination 172.17.0.2 --to-destination 172.17.0.3:1-2":                           "tcnat dnat add: target ports 1-2: 2 for the 1 of 1: name one, as many, or none",

		// Bad input.
		"snat add -s 172.17.0.0/33 --masquerade":                                  "tcnat snat add: 172.17.0.0/33: prefix length 33 is over 32",
		"snat add -s 172.17.0.9/16 --masquerade":                                  "tcnat snat add: 172.17.0.9/16: has bits set behind the prefix (the network is 172.17.0.0/16)",
		"snat add -s 172.17.0.0/16 --to-source 203.0.113.9-203.0.113.2":           "tcnat snat add: 203.0.113.9-203.0.113.2: the range is reversed (did you mean 203.0.113.2-203.0.113.9?)",
		"snat add -s 172.17.0.0/16 --to-source 203.0.113.9:9-2":                   "tcnat snat add: 203.0.113.9:9-2: the port range is reversed (did you mean 2-9?)",
		"snat add -s 172.17.0.0/16 --to-source 203.0.113.9 --masquerade":          "tcnat snat add: --masquerade and --to-source: only one of them",
		"snat add -s 172.17.0.0/16":                                               "tcnat snat add: --masquerade or --to-source is missing",
		"snat add --masquerade":                                                   "tcnat snat add: -s is missing: the containers' addresses",
		"snat add -s 172.17.0.0/16 -s 172.18.0.0/16 --masquerade":                 "tcnat snat add: --source: given twice",
		"dnat add -p tcp --dport 0 --to-destination 172.17.0.2":                   "tcnat dnat add: --dport 0: port 0 does not exist (ports are 1 to 65535)",
		"dnat add -p tcp --dport 65536 --to-destination 172.17.0.2":               "tcnat dnat add: --dport 65536: port 65536 is over 65535",
		"dnat add -p tcp --dport 3010-3000 --to-destination 172.17.0.2":           "tcnat dnat add: --dport 3010-3000: the port range is reversed (did you mean 3000-3010?)",
		"dnat add -p tcp --dport 1 --to-destination 172.17.0.2:0":                 "tcnat dnat add: 172.17.0.2:0: port 0 does not exist (ports are 1 to 65535)",
		"dnat add -p icmp --dport 1 --to-destination 172.17.0.2":                  "tcnat dnat add: -p icmp: a published port is tcp, udp or sctp",
		"dnat add --dport 1 --to-destination 172.17.0.2":                          "tcnat dnat add: -p is missing: tcp, udp or sctp",
		"dnat add -p tcp --to-destination 172.17.0.2":                             "tcnat dnat add: --dport is missing: the port to publish",
		"dnat add -p tcp --dport 1":                                               "tcnat dnat add: --to-destination is missing: the container's address and port",
		"dnat add -p tcp --dport 1 -d 203.0.113.0/24 --to-destination 172.17.0.2": "tcnat dnat add: -d 203.0.113.0/24: takes one address, not a prefix",
		"dnat add -p tcp --dport 1 -i a/b --to-destination 172.17.0.2":            "tcnat dnat add: a/b: not a device name",
		"dnat add -p tcp --dport 1 extra --to-destination 172.17.0.2":             "tcnat dnat add: extra: unexpected word (see --help)",
		"attach --bridge docker0 --uplink docker0":                                "tcnat attach: docker0: cannot be both bridge and uplink",
		"attach --bridge docker0 --uplink eth0 --attach xdp":                      "tcnat attach: --attach xdp: takes auto, tcx, clsact",
		"attach --bridge docker0 --uplink eth0 --max-flows 0":                     "tcnat attach: --max-flows 0: no flow at all would fit",
		"attach --bridge docker0 --uplink eth0 --max-flows many":                  "tcnat attach: --max-flows many: not a number of flows",
		"attach --bridge docker0 --uplink eth0 --unmanaged-devices allow":         "tcnat attach: --unmanaged-devices allow: takes drop, pass",
		"attach --bridge docker0 --uplink eth0 --filtering none":                  "tcnat attach: --filtering none: takes endpoint-dependent, endpoint-independent",
		"attach --bridge docker0 --uplink eth0 --isolate=maybe":                   "tcnat attach: --isolate maybe: takes true or false",
		"attach --bridge docker0 --uplink eth0 --fast-path often":                 "tcnat attach: --fast-path often: takes auto, established, always, off",
		"attach --bridge docker0 --uplink eth0 --cgroup here":                     "tcnat attach: --cgroup here: takes a path from / on, auto, or none",
		"attach --bridge docker0 --uplink eth0 --cgroup=":                         "tcnat attach: --cgroup \"\": takes a path from / on, auto, or none",
		"dnat add -p tcp -d ::1 -i eth0 --dport 1 --to-destination fd00::2":       "tcnat dnat add: -d ::1: is reached from the host alone, so by no device: leave -i out",
		"dnat add -p tcp -d ::1 -s fd00::/64 --dport 1 --to-destination fd00::2":  "tcnat dnat add: destination ::1: is reached from the host alone, which is always allowed: leave the sources out",
		"attach --bridge docker0 --uplink eth0 --mark 32":                         "tcnat attach: --mark 32: takes a bit's number, 0 to 31",
		"attach --bridge docker0 --uplink eth0 --mark 0x10":                       "tcnat attach: --mark 0x10: takes a bit's number, 0 to 31",
		"load":                                  "tcnat load: --bridge and --uplink are needed: the containers' bridge and the device that leads to the world",
		"flows list --dport 99999":              "tcnat flows list: --dport 99999: port 99999 is over 65535",
		"flows list -p gre":                     "tcnat flows list: -p gre: not a protocol that has flows (tcp, udp, udplite, sctp, icmp, icmpv6)",
		"flows flush --container 172.17.0.0/16": "tcnat flows flush: 172.17.0.0/16: takes one address, not a prefix",
		"snat list -o yaml":                     "tcnat snat list: --output yaml: takes table, json",
		"status --output":                       "tcnat status: --output: its value is missing",
		"status -x":                             "tcnat status: -x: no such flag (see --help)",
		"status --frobnicate":                   "tcnat status: --frobnicate: no such flag (see --help)",
		"frobnicate":                            "tcnat: frobnicate: no such command (have: attach, bench, detach, dnat, features, flows, lab, load, snat, status)",
		"dnat frobnicate":                       "tcnat dnat: frobnicate: no such command (have: add, del, list)",
		"dnat":                                  "tcnat dnat: a verb is missing (have: add, del, list)",
		"--instance UPPER status":               "tcnat status: --instance UPPER: only a-z, 0-9, _ and - are allowed",
		"--instance ../x status":                "tcnat status: --instance ../x: only a-z, 0-9, _ and - are allowed",
		"--instance aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa status":                      "tcnat status: --instance \"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\": a name has 1 to 32 characters",
		"dnat add -p tcp --dport 1 -d 203.0.113.1 --to-destination [fd00:17::2]:1": "tcnat dnat add: destination 203.0.113.1 and target fd00:17::2: mixed families: use one family a rule",
		"dnat add -p tcp --dport 1 -s 2001:db8::/32 --to-destination 172.17.0.2":   "tcnat dnat add: source 2001:db8::/32: is not IPv4 like the rule: use one family a rule",
		"dnat add -p tcp --dport 1-9 --to-destination 172.17.0.2:1-3":              "tcnat dnat add: target ports 1-3: 3 for the 9 of 1-9: name one, as many, or none",
		"snat add -s fd00:17::/64 --to-source 203.0.113.2":                         "tcnat snat add: source fd00:17::/64 and to-source 203.0.113.2: mixed families: use one family a rule",
		"snat add -s 172.17.0.0/16 --to-source 203.0.113.2-2001:db8::1":            "tcnat snat add: 203.0.113.2-2001:db8::1: mixes IPv4 and IPv6",
		"snat add -s 172.17.0.0/16 --masquerade --except 2001:db8::/32":            "tcnat snat add: except 2001:db8::/32: is not IPv4 like the rule: use one family a rule",
		"dnat add -p tcp --dport 1 --to-destination 127.0.0.1":                     "tcnat dnat add: target 127.0.0.1: is a loopback address: name one that is reachable from outside the host",
	} {
		t.Run(line, func(t *testing.T) {
			r := tcnat(t, strings.Fields(line)...)
			if r.code != exitUsage || r.stdout != "" || r.stderr != want+"\n" {
				t.Errorf("exit code %d, stdout %q, stderr\n%s want exit code %d and stderr\n%s", r.code, r.stdout, r.stderr, exitUsage, want)
			}
		})
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if r := tcnat(t, "completion", shell); r.code != exitDone || len(r.stdout) < 1000 {
			t.Errorf("completion %s: exit code %d, %d bytes", shell, r.code, len(r.stdout))
		}
	}
	for line, want := range map[string]string{
		"":                                   "attach bench detach dnat features flows lab load snat status",
		"dnat ":                              "add del list",
		"attach --attach ":                   "auto tcx clsact",
		"attach --unmanaged-devices ":        "drop pass",
		"dnat add -p ":                       "tcp udp sctp",
		"flows list --protocol ":             "tcp udp udplite sctp icmp icmpv6",
		"status -o ":                         "table json",
		"dnat add -p tcp --dport 1 --to-d":   "--to-destination",
		"attach --fast-":                     "--fast-path",
		"attach --fast-path ":                "auto established always off",
		"attach --bridge ":                   "lo",
		"attach --bridge lo --uplink ":       "lo",
		"dnat add -i ":                       "lo",
		"snat add -s 172.17.0.0/16 -o ":      "lo",
		"dnat add ":                          "",
		"attach --bridge docker0 --masq":     "",
		"attach --bridge docker0 --no-masq":  "--no-masquerade",
		"snat add -s 172.17.0.0/16 --masq":   "--masquerade",
		"snat add -s 172.17.0.0/16 --to-s":   "--to-source",
		"snat add -s 172.17.0.0/16 --exce":   "--except",
		"attach --bridge docker0 --max-flow": "--max-flows",
	} {
		words := strings.Split(line, " ")
		r := tcnat(t, append([]string{"__complete"}, words...)...)
		var got []string
		for line := range strings.Lines(r.stdout) {
			word, _, _ := strings.Cut(strings.TrimSpace(line), "\t")
			if !strings.HasPrefix(word, ":") && word != "completion" && word != "help" {
				got = append(got, word)
			}
		}
		if line == "attach --bridge " || strings.HasSuffix(line, "--uplink ") || strings.HasSuffix(line, "-i ") || strings.HasSuffix(line, " -o ") && want == "lo" {
			// Some machine's devices: every network namespace has this one.
			got = keep(got, "lo")
		}
		if text := strings.Join(got, " "); text != want {
			t.Errorf("%q completes to %q, want %q", line, text, want)
		}
	}
}

func keep(words []string, wanted string) []string {
	for _, word := range words {
		if word == wanted {
			return []string{word}
		}
	}
	return nil
}
