package loader

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
)

// firewall is what netfilter has that matters for NAT beside it.
type firewall struct {
	drops []chain       // base chains on the forward hook whose policy is drop
	nats  []translation // rules that translate sources
}

type chain struct {
	text   string // its name for people, such as "ip filter FORWARD"
	v4, v6 bool
}

type translation struct {
	text    string
	v4, v6  bool
	sources []netip.Prefix // empty: every source
}

// readFirewall asks the tools that are installed: nft tells of the rules of iptables-nft too,
// legacy iptables is another world. A tool that fails tells nothing.
func readFirewall() firewall {
	var f firewall
	saves := []string{"iptables-legacy-save", "ip6tables-legacy-save"}
	if text, ok := output("nft", "-j", "list", "ruleset"); ok {
		f.addNFT(text)
	} else {
		saves = []string{"iptables-save", "ip6tables-save"}
	}
	for _, save := range saves {
		if text, ok := output(save); ok {
			f.addSave(text, strings.HasPrefix(save, "ip6"))
		}
	}
	return f
}

func output(name string, args ...string) ([]byte, bool) {
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, false
	}
	text, err := exec.Command(path, args...).Output()
	return text, err == nil
}

// nftObject is one of the list that nft -j prints; exactly one field is set.
type nftObject struct {
	Chain *struct {
		Family, Table, Name, Hook, Policy string
	}
	Rule *struct {
		Family, Table, Chain string
		Expr                 []map[string]json.RawMessage
	}
}

func (f *firewall) addNFT(text []byte) {
	var list struct{ Nftables []nftObject }
	if json.Unmarshal(text, &list) != nil {
		return
	}
	for _, object := range list.Nftables {
		if c := object.Chain; c != nil && c.Hook == "forward" && c.Policy == "drop" {
			v4, v6 := nftFamilies(c.Family)
			f.drops = append(f.drops, chain{strings.Join([]string{c.Family, c.Table, c.Name}, " "), v4, v6})
		}
		if r := object.Rule; r != nil {
			t := translation{text: strings.Join([]string{r.Family, r.Table, r.Chain}, " ")}
			t.v4, t.v6 = nftFamilies(r.Family)
			translates := false
			for _, expression := range r.Expr {
				translates = translates || nftTranslates(expression)
				if sources, ok := nftSources(expression["match"]); ok {
					t.sources = sources
				}
			}
			if translates {
				f.nats = append(f.nats, t)
			}
		}
	}
}

// nftFamilies: an inet table is for both.
func nftFamilies(family string) (v4, v6 bool) {
	return family == "ip" || family == "inet", family == "ip6" || family == "inet"
}

func nftTranslates(expression map[string]json.RawMessage) bool {
	if _, ok := expression["masquerade"]; ok {
		return true
	}
	if _, ok := expression["snat"]; ok {
		return true
	}
	var target struct{ Type, Name string }
	if json.Unmarshal(expression["xt"], &target) != nil {
		return false
	}
	return target.Type == "target" && (target.Name == "MASQUERADE" || target.Name == "SNAT")
}

// nftSources reads "ip saddr 172.17.0.0/16" and "ip saddr { 10.0.0.0/8, 192.0.2.1 }". What it
// cannot read, such as a named set, matches everything: better one hint too many.
func nftSources(match json.RawMessage) ([]netip.Prefix, bool) {
	var m struct {
		Op   string
		Left struct {
			Payload struct{ Field string }
		}
		Right json.RawMessage
	}
	if json.Unmarshal(match, &m) != nil || m.Op != "==" || m.Left.Payload.Field != "saddr" {
		return nil, false
	}
	var set struct{ Set []json.RawMessage }
	if json.Unmarshal(m.Right, &set) != nil || set.Set == nil {
		set.Set = []json.RawMessage{m.Right}
	}
	var sources []netip.Prefix
	for _, element := range set.Set {
		var p struct {
			Prefix struct {
				Addr netip.Addr
				Len  int
			}
		}
		var address netip.Addr
		switch {
		case json.Unmarshal(element, &address) == nil:
			sources = append(sources, netip.PrefixFrom(address, address.BitLen()))
		case json.Unmarshal(element, &p) == nil && p.Prefix.Addr.IsValid():
			sources = append(sources, netip.PrefixFrom(p.Prefix.Addr, p.Prefix.Len))
		default:
			return nil, false
		}
	}
	return sources, true
}

// addSave reads the text of iptables-save or, for v6, ip6tables-save.
func (f *firewall) addSave(text []byte, v6 bool) {
	table, tool := "", "iptables"
	if v6 {
		tool = "ip6tables"
	}
	for raw := range bytes.Lines(text) {
		line := strings.TrimSpace(string(raw))
		switch {
		case strings.HasPrefix(line, "*"):
			table = line[1:]
		case table == "filter" && strings.HasPrefix(line, ":FORWARD DROP"):
			f.drops = append(f.drops, chain{tool + " filter FORWARD", !v6, v6})
		case table == "nat" && (strings.Contains(line, "-j MASQUERADE") || strings.Contains(line, "-j SNAT")):
			f.nats = append(f.nats, translation{
				text: fmt.Sprintf("%s -t nat %s", tool, line), v4: !v6, v6: v6, sources: saveSources(line),
			})
		}
	}
}

func saveSources(line string) []netip.Prefix {
	words := strings.Fields(line)
	for i, word := range words[:len(words)-1] {
		if word != "-s" || i > 0 && words[i-1] == "!" {
			continue
		}
		if prefix, err := netip.ParsePrefix(words[i+1]); err == nil {
			return []netip.Prefix{prefix}
		}
	}
	return nil
}

// checkFirewall finds what drops forwarded packets, and what translates the managed subnets.
func checkFirewall(f firewall, subnets []netip.Prefix) []Finding {
	v4, v6 := families(subnets)
	var findings []Finding
	for _, c := range f.drops {
		if c.v4 && v4 || c.v6 && v6 {
			findings = append(findings, Finding{
				"policy of " + c.text, "drop",
				"the firewall drops what it has no rule for, containers' packets too",
				"accept the bridge's forwarded packets there, in and out",
			})
		}
	}
	for _, t := range f.nats {
		for _, subnet := range subnets {
			if t.covers(subnet) {
				findings = append(findings, Finding{
					t.text, "translates " + subnet.String(),
					"netfilter translates before tcnat does, so tcnat's rules for this subnet see other addresses",
					"delete that rule: tcnat does its work",
				})
				break
			}
		}
	}
	return findings
}

func (t translation) covers(subnet netip.Prefix) bool {
	if subnet.Addr().Is4() && !t.v4 || subnet.Addr().Is6() && !t.v6 {
		return false
	}
	for _, source := range t.sources {
		if source.Overlaps(subnet) {
			return true
		}
	}
	return len(t.sources) == 0
}
