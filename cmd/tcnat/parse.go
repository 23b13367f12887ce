package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"tcnat/maps"
)

// The parsers here are pure: text to value, or an error. What they return, String of the value prints,
// and they read that again.

// endpoint is where a rule translates to: addresses First to Last (the same for one) and
// ports (zero: none were given).
type endpoint struct {
	First, Last netip.Addr
	Ports       maps.PortRange
}

func parseAddr(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	switch {
	case err != nil:
		return netip.Addr{}, fmt.Errorf("%s: not an IPv4 or IPv6 address", quoteEmpty(text))
	case addr.Zone() != "":
		return netip.Addr{}, fmt.Errorf("%s: an address with a zone cannot be translated", text)
	case addr.Is4In6():
		return netip.Addr{}, fmt.Errorf("%s: write it as %s", text, addr.Unmap())
	}
	return addr, nil
}

// parseHost reads an address, also with the prefix length of a single one (as iptables-save prints it).
func parseHost(text string) (netip.Addr, error) {
	before, bits, found := strings.Cut(text, "/")
	addr, err := parseAddr(before)
	if err != nil {
		return netip.Addr{}, err
	}
	if found && bits != strconv.Itoa(addr.BitLen()) {
		return netip.Addr{}, fmt.Errorf("%s: takes one address, not a prefix", text)
	}
	return addr, nil
}

// parsePrefix reads CIDR, or an address for the prefix that holds it alone.
func parsePrefix(text string) (netip.Prefix, error) {
	before, length, found := strings.Cut(text, "/")
	addr, err := parseAddr(before)
	if err != nil {
		return netip.Prefix{}, err
	}
	if !found {
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	bits, err := strconv.ParseUint(length, 10, 16)
	if err != nil || length[0] == '+' {
		return netip.Prefix{}, fmt.Errorf("%s: prefix length %s is not a number", text, quoteEmpty(length))
	}
	if int(bits) > addr.BitLen() {
		return netip.Prefix{}, fmt.Errorf("%s: prefix length %d is over %d", text, bits, addr.BitLen())
	}
	prefix := netip.PrefixFrom(addr, int(bits))
	if prefix != prefix.Masked() {
		return netip.Prefix{}, fmt.Errorf("%s: has bits set behind the prefix (the network is %s)", text, prefix.Masked())
	}
	return prefix, nil
}

// parsePort's errors, and those of parsePorts, leave it to the caller to say what the text is.
func parsePort(text string) (uint16, error) {
	port, err := strconv.ParseUint(text, 10, 32)
	switch {
	case err != nil:
		return 0, fmt.Errorf("%s is not a port number", quoteEmpty(text))
	case port == 0:
		return 0, errors.New("port 0 does not exist (ports are 1 to 65535)")
	case port > 65535:
		return 0, fmt.Errorf("port %d is over 65535", port)
	}
	return uint16(port), nil
}

// parsePorts reads N, N-M, or N:M as iptables writes it.
func parsePorts(text string) (maps.PortRange, error) {
	low, high, isRange := strings.Cut(text, "-")
	if !isRange {
		low, high, isRange = strings.Cut(text, ":")
	}
	first, err := parsePort(low)
	if err != nil {
		return maps.PortRange{}, err
	}
	if !isRange {
		return maps.PortRange{First: first, Last: first}, nil
	}
	last, err := parsePort(high)
	if err != nil {
		return maps.PortRange{}, err
	}
	if last < first {
		return maps.PortRange{}, fmt.Errorf("the port range is reversed (did you mean %d-%d?)", last, first)
	}
	return maps.PortRange{First: first, Last: last}, nil
}

// parseTarget reads the ADDR[:PORT[-PORT]] of DNAT, IPv6 as [ADDR]:PORT.
func parseTarget(text string) (endpoint, error) {
	to, err := parseEndpoint(text)
	if err != nil {
		return endpoint{}, err
	}
	if to.First != to.Last {
		return endpoint{}, fmt.Errorf("%s: takes one address, not a range", text)
	}
	return to, nil
}

// parseSource reads the ADDR[-ADDR][:PORT[-PORT]] of SNAT. IPv6 addresses with ports are in
// brackets, both together ([A-B]:PORTS, as ip6tables has it) or each one ([A]-[B]:PORTS).
func parseSource(text string) (endpoint, error) {
	return parseEndpoint(text)
}

func parseEndpoint(text string) (endpoint, error) {
	addresses, ports, hasPorts := splitPorts(text)
	addresses, ok := unbracket(addresses)
	if !ok {
		return endpoint{}, fmt.Errorf("%s: brackets are not in pairs", text)
	}
	low, high, isRange := strings.Cut(addresses, "-")
	var to endpoint
	var err error
	if to.First, err = parseAddr(low); err != nil {
		return endpoint{}, of(text, err)
	}
	to.Last = to.First
	if isRange {
		if to.Last, err = parseAddr(high); err != nil {
			return endpoint{}, of(text, err)
		}
	}
	switch {
	case to.First.Is4() != to.Last.Is4():
		return endpoint{}, fmt.Errorf("%s: mixes IPv4 and IPv6", text)
	case to.Last.Less(to.First):
		return endpoint{}, fmt.Errorf("%s: the range is reversed (did you mean %s-%s?)", text, to.Last, to.First)
	case hasPorts:
		if to.Ports, err = parsePorts(ports); err != nil {
			return endpoint{}, of(text, err)
		}
	}
	return to, nil
}

// splitPorts cuts the ports off an endpoint: what follows the colon behind the last
// bracket, or the only colon of text without brackets.
func splitPorts(text string) (addresses, ports string, found bool) {
	if end := strings.LastIndexByte(text, ']'); end >= 0 {
		if ports, found = strings.CutPrefix(text[end+1:], ":"); found {
			return text[:end+1], ports, true
		}
		return text, "", false
	}
	if strings.Count(text, ":") == 1 {
		return strings.Cut(text, ":")
	}
	return text, "", false
}

// unbracket takes the brackets from [A], [A-B] and [A]-[B].
func unbracket(text string) (string, bool) {
	inner, opened := strings.CutPrefix(text, "[")
	if !opened {
		return text, !strings.Contains(text, "]")
	}
	inner, closed := strings.CutSuffix(inner, "]")
	if low, high, two := strings.Cut(inner, "]-["); two {
		inner = low + "-" + high
	}
	return inner, closed && !strings.ContainsAny(inner, "[]")
}

// of says which text a part that did not parse belongs to.
func of(text string, err error) error {
	if strings.HasPrefix(err.Error(), text+":") {
		return err
	}
	return fmt.Errorf("%s: %w", text, err)
}

// named puts flag and text before an error, where the error does not name them.
func named[T any](flag string, parse func(string) (T, error)) func(string) (T, error) {
	return func(text string) (T, error) {
		value, err := parse(text)
		if err != nil {
			return value, fmt.Errorf("%s %s: %w", flag, quoteEmpty(text), err)
		}
		return value, nil
	}
}

func quoteEmpty(text string) string {
	if text == "" {
		return `""`
	}
	return text
}

// String prints what parseEndpoint reads.
func (e endpoint) String() string {
	addresses := e.First.String()
	if e.Last != e.First {
		addresses += "-" + e.Last.String()
	}
	switch {
	case e.Ports == (maps.PortRange{}):
		return addresses
	case e.First.Is6():
		return "[" + addresses + "]:" + e.Ports.String()
	}
	return addresses + ":" + e.Ports.String()
}
