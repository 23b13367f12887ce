package loader

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// tracking is what makes netfilter track connections in this network namespace.
type tracking struct {
	by string // "" when nothing does
}

func (t tracking) active() bool { return t.by != "" }

// findTracking asks the kernel for its hooks and, where it cannot tell, for the rules that bring
// conntrack's hooks along. In doubt connections are tracked.
func findTracking() tracking {
	if _, err := readSysctl("net/netfilter/nf_conntrack_count"); errors.Is(err, os.ErrNotExist) {
		return tracking{} // the kernel has none, or it is not loaded
	}
	hooked, err := trackingHooks()
	if err == nil {
		return tracking{hooked}
	}
	return tracking{cmp.Or(trackingNFT(), trackingLegacy(), trackedAlready())}
}

const (
	nfnlSubsysHook     = 12
	nfnlHookGet        = 0
	nfnlaHookHooknum   = 1
	nfnlaHookFunction  = 4
	nfInetPreRouting   = 0
	nfnlHeader         = 4 // of struct nfgenmsg
	nfnlSubsysNFTables = 10
	nftMsgGetRule      = 7
)

// trackingHooks names conntrack's function on a netfilter hook, "" when there is none. The error
// is that of a kernel which does not tell (CONFIG_NETFILTER_NETLINK_HOOK).
func trackingHooks() (string, error) {
	for _, family := range []uint8{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6, unix.NFPROTO_BRIDGE} {
		request := nl.NewNetlinkRequest(nfnlSubsysHook<<8|nfnlHookGet, unix.NLM_F_DUMP)
		request.AddData(&nl.Nfgenmsg{NfgenFamily: family})
		request.AddData(nl.NewRtAttr(nfnlaHookHooknum, nl.BEUint32Attr(nfInetPreRouting)))
		messages, err := request.Execute(unix.NETLINK_NETFILTER, 0)
		if errors.Is(err, unix.EOPNOTSUPP) && family == unix.NFPROTO_BRIDGE {
			continue
		}
		if err != nil {
			return "", err
		}
		function, err := trackingHook(messages)
		if function != "" || err != nil {
			return function, err
		}
	}
	return "", nil
}

// trackingHook looks for conntrack among the hooks of one answer.
func trackingHook(messages [][]byte) (string, error) {
	for _, message := range messages {
		if len(message) < nfnlHeader {
			return "", errShort
		}
		attrs, err := nl.ParseRouteAttr(message[nfnlHeader:])
		if err != nil {
			return "", err
		}
		i := slices.IndexFunc(attrs, func(a nlAttr) bool { return typeOf(a) == nfnlaHookFunction })
		if i < 0 { // a kernel without symbols
			return "", errors.New("a hook without name")
		}
		// putting fragments together alone is no tracking
		if function := word(attrs[i]); !strings.Contains(function, "defrag") &&
			(strings.Contains(function, "conntrack") || strings.HasPrefix(function, "nf_ct_")) {
			return "netfilter's hook " + function, nil
		}
	}
	return "", nil
}

// trackers are the expressions of nft, and the matches and targets of iptables behind nft, that
// make conntrack look at every packet.
func trackers() []string {
	return []string{
		"ct", "ct_fallback", "connlimit", "nat", "masq", "redir", "flow_offload", "synproxy",
		"conntrack", "state", "connmark", "connbytes", "connlabel", "cluster", "helper", "CONNMARK", "CONNSECMARK", "CT",
		"MASQUERADE", "SNAT", "DNAT", "REDIRECT", "NETMAP", "SYNPROXY",
	}
}

// trackingNFT names the first rule of nftables that tracks.
func trackingNFT() string {
	request := nl.NewNetlinkRequest(nfnlSubsysNFTables<<8|nftMsgGetRule, unix.NLM_F_DUMP)
	request.AddData(&nl.Nfgenmsg{NfgenFamily: unix.NFPROTO_UNSPEC})
	messages, err := retryDump(func() ([][]byte, error) { return request.Execute(unix.NETLINK_NETFILTER, 0) })
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EPROTONOSUPPORT):
		return "" // a kernel without nftables
	case err != nil:
		return fmt.Sprintf("the rules of nftables cannot be read (%v)", err)
	}
	for _, message := range messages {
		if by := trackingRule(message); by != "" {
			return by
		}
	}
	return ""
}

func trackingRule(message []byte) string {
	if len(message) < nfnlHeader {
		return ""
	}
	attrs, err := nl.ParseRouteAttr(message[nfnlHeader:])
	if err != nil {
		return "a rule of nftables that cannot be read"
	}
	table, chain, tracker := "", "", ""
	for _, attr := range attrs {
		switch typeOf(attr) {
		case unix.NFTA_RULE_TABLE:
			table = word(attr)
		case unix.NFTA_RULE_CHAIN:
			chain = word(attr)
		case unix.NFTA_RULE_EXPRESSIONS:
			tracker = trackingExpression(attr.Value)
		}
	}
	if tracker == "" {
		return ""
	}
	return fmt.Sprintf("nft table %s %s, chain %s, has a rule with %s", nftFamily(message[0]), table, chain, tracker)
}

// trackingExpression answers with the word that a list of expressions, nested as the kernel
// gives them, tracks by.
func trackingExpression(list []byte) string {
	elements, err := nl.ParseRouteAttr(list)
	if err != nil {
		return "something that cannot be read"
	}
	for _, element := range elements {
		attrs, err := nl.ParseRouteAttr(element.Value)
		if err != nil {
			return "something that cannot be read"
		}
		name := ""
		for _, attr := range attrs {
			switch typeOf(attr) {
			case unix.NFTA_EXPR_NAME:
				name = word(attr)
				if slices.Contains(trackers(), name) {
					return name
				}
			case unix.NFTA_EXPR_DATA:
				switch name {
				case "match", "target":
					if xt := xtName(attr); slices.Contains(trackers(), xt) {
						return xt
					}
				case "objref":
					if mayTrack(attr) {
						return "a stateful object"
					}
				}
			}
		}
	}
	return ""
}

// xtName is the name of a match or target of iptables: both have it as their first attribute.
func xtName(attr nlAttr) string {
	attrs, err := nl.ParseRouteAttr(attr.Value)
	if err != nil {
		return ""
	}
	for _, inner := range attrs {
		if typeOf(inner) == unix.NFTA_MATCH_NAME {
			return word(inner)
		}
	}
	return ""
}

// mayTrack says whether a reference to a named object may be to one of conntrack's.
func mayTrack(attr nlAttr) bool {
	const objrefType = 1
	attrs, err := nl.ParseRouteAttr(attr.Value)
	if err != nil {
		return true
	}
	for _, inner := range attrs {
		if typeOf(inner) == objrefType && len(inner.Value) == 4 {
			switch binary.BigEndian.Uint32(inner.Value) {
			case unix.NFT_OBJECT_COUNTER, unix.NFT_OBJECT_QUOTA, unix.NFT_OBJECT_LIMIT, unix.NFT_OBJECT_TUNNEL, unix.NFT_OBJECT_SECMARK:
				return false
			}
		}
	}
	return true // by a map: of any kind
}

func nftFamily(family byte) string {
	switch family {
	case unix.NFPROTO_IPV4:
		return "ip"
	case unix.NFPROTO_IPV6:
		return "ip6"
	case unix.NFPROTO_INET:
		return "inet"
	case unix.NFPROTO_BRIDGE:
		return "bridge"
	}
	return fmt.Sprintf("family %d", family)
}

// trackingLegacy names the first rule of legacy iptables that tracks. The kernel lists the tables
// that are in use; their rules take a tool to read.
func trackingLegacy() string {
	for _, f := range []struct{ names, tool string }{
		{"/proc/thread-self/net/ip_tables_names", "iptables"}, {"/proc/thread-self/net/ip6_tables_names", "ip6tables"},
	} {
		names, err := os.ReadFile(f.names)
		if err != nil || len(names) == 0 {
			continue
		}
		text, ok := output(f.tool + "-legacy-save")
		if !ok {
			text, ok = output(f.tool + "-save")
		}
		if !ok {
			return fmt.Sprintf("%s has tables in use, and no %s-save to read them with", f.tool, f.tool)
		}
		for line := range strings.Lines(string(text)) {
			words := strings.Fields(line)
			for i, word := range words {
				if (word == "-m" || word == "-j") && i+1 < len(words) && slices.Contains(trackers(), words[i+1]) {
					return fmt.Sprintf("%s has the rule %s", f.tool, strings.TrimSpace(line))
				}
			}
		}
	}
	return ""
}

// trackedAlready: somebody tracks whom no rule tells of, such as IPVS or Open vSwitch, or has
// done so until lately.
func trackedAlready() string {
	count, err := readSysctl("net/netfilter/nf_conntrack_count")
	if err != nil || count == "0" {
		return ""
	}
	return "conntrack has " + count + " connections (if they are left from rules that are gone: conntrack -F)"
}
