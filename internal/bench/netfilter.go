package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"tcnat/internal/lab"
)

// errMissing indicates that a program which a contender needs is not installed.
var errMissing = errors.New("not installed")

// installIptables makes the rules that Docker makes for a bridge and two published ports.
func installIptables(ctx context.Context, r *rig, _ installOptions) (installed, error) {
	i := installed{
		flush: r.flushConntrack,
		rules: func(ctx context.Context, p publishing) (time.Duration, error) {
			return runTimed(ctx, r.Host, iptablesRules(r, p), "iptables-nft-restore")
		},
		add: func(ctx context.Context, port uint16) error {
			_, err := runTimed(ctx, r.Host, "", "iptables-nft", "-t", "nat", "-A", "DOCKER", "!", "-i", lab.Bridge, "-p", "udp",
				"--dport", fmt.Sprint(port), "-j", "DNAT", "--to-destination", fmt.Sprintf("%s:%d", r.containerAddr(0), port))
			return err
		},
	}
	_, err := i.rules(ctx, publishing{tcpToo: true, match: publishedPort, rules: 1})
	return i, err
}

// iptablesRules is the nat table as iptables-restore reads it.
func iptablesRules(r *rig, p publishing) string {
	var b strings.Builder
	subnet := lab.BridgeSubnet(lab.IPv4)
	fmt.Fprintf(&b, "*nat\n:PREROUTING ACCEPT\n:INPUT ACCEPT\n:OUTPUT ACCEPT\n:POSTROUTING ACCEPT\n:DOCKER -\n")
	fmt.Fprintf(&b, "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n")
	fmt.Fprintf(&b, "-A POSTROUTING -s %s ! -o %s -j MASQUERADE\n", subnet, lab.Bridge)
	for _, rule := range p.list() {
		match, to := "", rule.target(r)
		if rule.destination.IsValid() {
			match = fmt.Sprintf("-d %s ", rule.destination)
		}
		ports := fmt.Sprint(rule.first)
		if rule.last != rule.first {
			ports = fmt.Sprintf("%d:%d", rule.first, rule.last)
		}
		fmt.Fprintf(&b, "-A DOCKER %s! -i %s -p %s --dport %s -j DNAT --to-destination %s\n", match, lab.Bridge, rule.protocol, ports, to)
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

// installNftables masquerades, and looks published ports up in maps.
func installNftables(ctx context.Context, r *rig, _ installOptions) (installed, error) {
	i := installed{
		flush: r.flushConntrack,
		rules: func(ctx context.Context, p publishing) (time.Duration, error) {
			if _, err := runTimed(ctx, r.Host, "flush ruleset\n", "nft", "-f", "-"); err != nil {
				return 0, err
			}
			return runTimed(ctx, r.Host, nftRules(r, p), "nft", "-f", "-")
		},
		add: func(ctx context.Context, port uint16) error {
			_, err := runTimed(ctx, r.Host, "", "nft", "add", "element", "ip", "nat", "udp_ports",
				fmt.Sprintf("{ %d : %s . %d }", port, r.containerAddr(0), port))
			return err
		},
	}
	_, err := i.rules(ctx, publishing{tcpToo: true, match: publishedPort, rules: 1})
	return i, err
}

// nftRules is the table as nft -f reads it.
func nftRules(r *rig, p publishing) string {
	elements := map[string][]string{}
	ranges := ""
	for _, rule := range p.list() {
		element := fmt.Sprintf("%d : %s . %d", rule.first, r.containerAddr(0), rule.first)
		switch {
		case rule.first != rule.last:
			ranges += fmt.Sprintf("    iifname != %q fib daddr type local %s dport %d-%d dnat to %s\n",
				lab.Bridge, rule.protocol, rule.first, rule.last, r.containerAddr(0))
		case rule.destination.IsValid():
			elements["udp_addr_ports"] = append(elements["udp_addr_ports"], fmt.Sprintf("%s . %s", rule.destination, element))
		default:
			elements[rule.protocol+"_ports"] = append(elements[rule.protocol+"_ports"], element)
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "table ip nat {\n")
	for _, m := range []struct{ name, key string }{
		{"tcp_ports", "inet_service"}, {"udp_ports", "inet_service"}, {"udp_addr_ports", "ipv4_addr . inet_service"},
	} {
		fmt.Fprintf(&b, "  map %s {\n    type %s : ipv4_addr . inet_service\n", m.name, m.key)
		if list := elements[m.name]; len(list) > 0 {
			fmt.Fprintf(&b, "    elements = { %s }\n", strings.Join(list, ", "))
		}
		fmt.Fprintf(&b, "  }\n")
	}
	fmt.Fprintf(&b, "  chain prerouting {\n    type nat hook prerouting priority dstnat\n")
	for _, rule := range []string{"tcp dport map @tcp_ports", "udp dport map @udp_ports", "ip daddr . udp dport map @udp_addr_ports"} {
		fmt.Fprintf(&b, "    iifname != %q fib daddr type local dnat to %s\n", lab.Bridge, rule)
	}
	fmt.Fprintf(&b, "%s  }\n", ranges)
	fmt.Fprintf(&b, "  chain postrouting {\n    type nat hook postrouting priority srcnat\n    ip saddr %s oifname != %q masquerade\n  }\n}\n",
		lab.BridgeSubnet(lab.IPv4), lab.Bridge)
	return b.String()
}

// firewall makes the host forward what belongs to a conversation, what containers begin, and
// what comes to the published port.
func firewall(ctx context.Context, r *rig) error {
	_, err := runTimed(ctx, r.Host, fmt.Sprintf(`table ip firewall {
  chain forward {
    type filter hook forward priority filter; policy drop
    ct state established,related accept
    iifname %q ct state new accept
    ip daddr %s udp dport %d ct state new accept
  }
}
`, lab.Bridge, lab.BridgeSubnet(lab.IPv4), publishedPort), "nft", "-f", "-")
	return err
}

// flushConntrack forgets all connections of the host.
func (r *rig) flushConntrack(context.Context) error {
	return r.Host.Do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) })
}

// runTimed runs a program inside a node's namespace with a text on its stdin, and returns how
// long that took.
func runTimed(ctx context.Context, n *lab.Node, stdin, name string, args ...string) (took time.Duration, err error) {
	path, err := lookPath(name)
	if err != nil {
		return 0, err
	}
	var out bytes.Buffer
	err = n.Do(func() error {
		cmd := exec.CommandContext(ctx, path, args...)
		cmd.Stdin = strings.NewReader(stdin)
		cmd.Stdout, cmd.Stderr = &out, &out
		start := time.Now()
		err := cmd.Run()
		took = time.Since(start)
		return err
	})
	if err != nil {
		return took, fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(out.String()))
	}
	return took, nil
}

// lookPath finds a program, also in the directories that only root has in its path.
func lookPath(name string) (string, error) {
	for _, dir := range []string{"", "/usr/sbin/", "/sbin/", "/usr/libexec/docker/"} {
		if path, err := exec.LookPath(dir + name); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: %w", name, errMissing)
}
