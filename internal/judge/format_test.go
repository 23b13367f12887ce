package judge

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
)

// describe tells a packet in a line: enough to see what differs, with the bytes behind.
func describe(ip []byte) string {
	h, ok := parse(ip)
	if !ok {
		return "not IP " + hex.EncodeToString(ip)
	}
	return headline(ip, h) + "\n" + indent(strings.TrimSpace(hex.Dump(ip)), "        ")
}

func headline(ip []byte, h header) string {
	var b strings.Builder
	if h.v6 {
		fmt.Fprintf(&b, "ip6 class %#x hops %d", binary.BigEndian.Uint16(ip)>>4&0xff, ip[7])
	} else {
		fmt.Fprintf(&b, "ip4 tos %#x id %d ttl %d", ip[1], binary.BigEndian.Uint16(ip[4:]), ip[8])
		if headerWrong(ip, h) {
			b.WriteString(" WRONG HEADER SUM")
		}
	}
	fmt.Fprintf(&b, " %s > %s %s", h.src, h.dst, protocolName(h.protocol))
	body := ip[h.l4:]
	switch {
	case h.fragment:
		b.WriteString(" fragment")
	case isICMP(h.protocol) && len(body) >= icmpSize:
		fmt.Fprintf(&b, " %d/%d rest %#x", body[0], body[1], binary.BigEndian.Uint32(body[4:]))
		if q, ok := parse(body[icmpSize:]); ok && isError(h.protocol, body[0]) {
			fmt.Fprintf(&b, " about [%s]", headline(body[icmpSize:], q))
		}
	case h.protocol == 6 && len(body) >= tcpSize:
		fmt.Fprintf(&b, " %d > %d %s seq %d ack %d", binary.BigEndian.Uint16(body), binary.BigEndian.Uint16(body[2:]),
			flagNames(body[13]), binary.BigEndian.Uint32(body[4:]), binary.BigEndian.Uint32(body[8:]))
	case len(body) >= 4:
		fmt.Fprintf(&b, " %d > %d", binary.BigEndian.Uint16(body), binary.BigEndian.Uint16(body[2:]))
	}
	fmt.Fprintf(&b, " len %d", len(ip))
	if transportWrong(ip, h) {
		b.WriteString(" WRONG SUM")
	}
	return b.String()
}

func indent(text, by string) string {
	return by + strings.ReplaceAll(text, "\n", "\n"+by)
}
