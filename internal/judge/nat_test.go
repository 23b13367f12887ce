package judge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// netfilterSysctls make conntrack comparable, and are the first of the differences that are allowed.
func netfilterSysctls() map[string]string {
	return map[string]string{
		// Class: TCP window checks. tcnat has none.
		"nf_conntrack_tcp_be_liberal":         "1",
		"nf_conntrack_tcp_ignore_invalid_rst": "1",
		// A packet with a wrong checksum would be no flow's for conntrack. For tcnat it is, and
		// arrives as wrong as it was: RFC 4787 says nothing of it, and this way it is compared.
		"nf_conntrack_checksum": "0",
		// Class: timer lengths. No conversation lasts longer, unless the machine stands still.
		"nf_conntrack_udp_timeout":                    "300",
		"nf_conntrack_icmp_timeout":                   "300",
		"nf_conntrack_icmpv6_timeout":                 "300",
		"nf_conntrack_tcp_timeout_close":              "300",
		"nf_conntrack_tcp_timeout_close_wait":         "300",
		"nf_conntrack_tcp_timeout_last_ack":           "300",
		"nf_conntrack_tcp_timeout_syn_sent":           "300",
		"nf_conntrack_tcp_timeout_syn_recv":           "300",
		"nf_conntrack_tcp_timeout_fin_wait":           "300",
		"nf_conntrack_tcp_timeout_time_wait":          "300",
		"nf_conntrack_tcp_timeout_unacknowledged":     "300",
		"nf_conntrack_sctp_timeout_closed":            "300",
		"nf_conntrack_sctp_timeout_cookie_wait":       "300",
		"nf_conntrack_sctp_timeout_cookie_echoed":     "300",
		"nf_conntrack_sctp_timeout_shutdown_sent":     "300",
		"nf_conntrack_sctp_timeout_shutdown_recd":     "300",
		"nf_conntrack_sctp_timeout_shutdown_ack_sent": "300",
	}
}

// netfilterRules are what Docker's rules come to: masquerade, published ports, and a FORWARD
// policy of drop with what belongs to connections and what containers begin let through. What
// conntrack calls invalid is dropped, or it would leave with the container's own address.
func netfilterRules(w *world) string {
	var b strings.Builder
	for _, f := range lab.Families() {
		table, kind := "ip", "ipv4_addr"
		if f == lab.IPv6 {
			table, kind = "ip6", "ipv6_addr"
		}
		elements := map[string][]string{}
		for _, p := range published() {
			for i := range p.ports {
				elements[protocolName(p.protocol)] = append(elements[protocolName(p.protocol)],
					fmt.Sprintf("%d : %s . %d", p.port+i, w.Containers[p.container].Addr(f), p.to+i))
			}
		}
		fmt.Fprintf(&b, "table %s nat {\n", table)
		for _, name := range []string{"tcp", "udp", "sctp"} {
			fmt.Fprintf(&b, "  map %s_ports { type inet_service : %s . inet_service; elements = { %s }; }\n",
				name, kind, strings.Join(elements[name], ", "))
		}
		fmt.Fprintf(&b, "  chain prerouting { type nat hook prerouting priority dstnat;\n")
		for _, name := range []string{"tcp", "udp", "sctp"} {
			fmt.Fprintf(&b, "    iifname != %q fib daddr type local dnat to %s dport map @%s_ports\n", lab.Bridge, name, name)
		}
		fmt.Fprintf(&b, "  }\n  chain postrouting { type nat hook postrouting priority srcnat;\n")
		fmt.Fprintf(&b, "    %s saddr %s oifname != %q snat to %s\n", table, w.Containers[containers-1].Addr(f), lab.Bridge, fixedSource[f])
		fmt.Fprintf(&b, "    %s saddr %s oifname != %q masquerade\n  }\n}\n", table, lab.BridgeSubnet(f), lab.Bridge)
	}
	fmt.Fprintf(&b, `table inet filter {
  chain forward { type filter hook forward priority filter; policy drop;
    ct state invalid drop
    ct state established,related accept
    iifname %q oifname != %q accept
    oifname %q ct status dnat accept
  }
}
`, lab.Bridge, lab.Bridge, lab.Bridge)
	return b.String()
}

// useNetfilter makes the host of a world translate by nftables.
func useNetfilter(t *testing.T, w *world) {
	t.Helper()
	nft, err := exec.LookPath("nft")
	if err != nil {
		nft, err = exec.LookPath("/usr/sbin/nft")
	}
	if err != nil {
		if os.Getenv("TCNAT_TEST_REQUIRE") != "" {
			t.Fatal(err)
		}
		t.Skip("nft is not installed")
	}
	file := filepath.Join(t.TempDir(), "rules.nft")
	if err := os.WriteFile(file, []byte(netfilterRules(w)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Host.Command(t.Context(), nft, "-f", file); err != nil {
		t.Fatalf("%v\n%s", err, netfilterRules(w))
	}
	for key, value := range netfilterSysctls() {
		if err := w.Host.SetSysctl("net/netfilter/"+key, value); err != nil {
			t.Fatal(err)
		}
	}
	w.forget = func() error {
		return w.Host.Do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) })
	}
}

// useTcnat makes the host of a world translate by tcnat, by the same rules with a change (nil: none), and
// returns how to read the counters that are not zero.
func useTcnat(t *testing.T, w *world, o loader.AttachOptions, change func(*maps.Rules)) (counters func() string) {
	t.Helper()
	inst := loader.Instance{Name: "judge-" + w.Name, RunDir: t.TempDir()}
	t.Cleanup(func() {
		err := w.Host.Do(func() error {
			_, err := loader.Detach(context.WithoutCancel(t.Context()), inst)
			return err
		})
		if err != nil {
			t.Errorf("detach: %v", err)
		}
	})
	o.Bridges, o.Uplinks = []string{lab.Bridge}, []string{lab.Uplink}
	err := w.Host.Do(func() error {
		_, err := loader.Attach(t.Context(), inst, o, slog.New(slog.DiscardHandler))
		return err
	})
	if err != nil {
		t.Fatalf("attach: %+v", err)
	}
	with := func(open func(loader.Instance) (*loader.Datapath, error), fn func(*loader.Datapath) error) error {
		return w.Host.Do(func() error {
			d, err := open(inst)
			if err != nil {
				return err
			}
			return errors.Join(fn(d), d.Close())
		})
	}
	err = with(loader.OpenForWrite, func(d *loader.Datapath) error {
		rules, err := d.State().Rules()
		if err != nil {
			return err
		}
		if err := addRules(&rules, w); err != nil {
			return err
		}
		if change != nil {
			change(&rules)
		}
		return d.State().SetRules(rules)
	})
	if err != nil {
		t.Fatal(err)
	}
	w.forget = func() error {
		return with(loader.OpenForWrite, func(d *loader.Datapath) error {
			_, err := d.FlushFlows(maps.FlowFilter{})
			return err
		})
	}
	return func() string {
		var text []string
		err := with(loader.Open, func(d *loader.Datapath) error {
			counts, err := d.State().Counters()
			for _, count := range counts {
				if count.Packets > 0 {
					text = append(text, fmt.Sprintf("%s %d", count.Name, count.Packets))
				}
			}
			return err
		})
		if err != nil {
			return err.Error()
		}
		return strings.Join(text, ", ")
	}
}

// addRules says what netfilterRules says; attach has made the rules for masquerade.
func addRules(rules *maps.Rules, w *world) error {
	for _, f := range lab.Families() {
		inside := w.Containers[containers-1].Addr(f)
		_, err := rules.AddSNAT(maps.SNATRule{Source: netip.PrefixFrom(inside, inside.BitLen()), ToFirst: fixedSource[f]})
		if err != nil {
			return err
		}
		for _, p := range published() {
			rule := maps.DNATRule{
				Protocol: maps.Protocol(p.protocol), Ports: maps.PortRange{First: p.port, Last: p.port + p.ports - 1},
				To: w.Containers[p.container].Addr(f), ToPorts: maps.PortRange{First: p.to, Last: p.to + p.ports - 1},
			}
			if _, err := rules.AddDNAT(rule); err != nil {
				return err
			}
		}
	}
	return nil
}
