package judge

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

const fragmentHeader = 8 // of IPv6

// split cuts a packet into fragments of so many bytes, as the shape says. A packet that is nil has
// none.
func (s shape) split(ip []byte) [][]byte {
	h, ok := parse(ip)
	switch {
	case ip == nil:
		return nil
	case s.fragment == 0 || !ok || h.fragment || len(ip)-h.l4 <= s.fragment:
		return [][]byte{ip}
	}
	var parts [][]byte
	body := ip[h.l4:]
	for at := 0; at < len(body); at += s.fragment {
		end := min(at+s.fragment, len(body))
		parts = append(parts, s.part(ip, h, at, end, end < len(body)))
	}
	late := min(s.late, len(parts)-1)
	return slices.Concat(parts[1:1+late], parts[:1], parts[1+late:])
}

// part is one fragment: the bytes from at to end of what is behind the headers.
func (s shape) part(ip []byte, h header, at, end int, more bool) []byte {
	word := uint16(at)
	part := bytes.Clone(ip[:h.l4])
	if !h.v6 {
		word /= 8
		if more {
			word |= 0x2000
		}
		part = append(part, ip[h.l4+at:h.l4+end]...)
		binary.BigEndian.PutUint16(part[2:], uint16(len(part)))
		binary.BigEndian.PutUint16(part[6:], word)
		setHeaderChecksum(part[:h.l4])
		return part
	}
	if more {
		word |= 1
	}
	header := make([]byte, fragmentHeader)
	header[0] = h.protocol
	binary.BigEndian.PutUint16(header[2:], word)
	binary.BigEndian.PutUint16(header[6:], s.id)
	part[h.last] = unix.IPPROTO_FRAGMENT
	part = append(append(part, header...), ip[h.l4+at:h.l4+end]...)
	binary.BigEndian.PutUint16(part[4:], uint16(len(part)-ipv6Size))
	return part
}

func setHeaderChecksum(header []byte) {
	header[10], header[11] = 0, 0
	binary.BigEndian.PutUint16(header[10:], ^fold(sumBytes(0, header)))
}

// join puts fragments together that belong to one packet and are all there, in whatever order. Other
// packets stay as they are. The options of IPv4 are the first fragment's: who cuts a packet leaves most
// of them out of the others.
func join(packets [][]byte) [][]byte {
	type part struct {
		at      int
		more    bool
		options []byte
		body    []byte
	}
	var whole, joined [][]byte
	parts := map[string][]part{} // by all of the headers that fragments share
	var order []string
	for _, ip := range packets {
		h, ok := parse(ip)
		if !ok || !h.fragment {
			whole = append(whole, ip)
			continue
		}
		head, p := bytes.Clone(ip[:h.l4]), part{body: ip[h.l4:]}
		if h.v6 {
			word := binary.BigEndian.Uint16(ip[h.l4+2:])
			p.at, p.more, p.body = int(word&0xfff8), word&1 != 0, ip[h.l4+fragmentHeader:]
			head[h.last] = ip[h.l4]
			clear(head[4:6])
		} else {
			word := binary.BigEndian.Uint16(ip[6:])
			p.at, p.more = int(word&0x1fff)*8, word&0x2000 != 0
			clear(head[2:4])
			clear(head[6:8])
			clear(head[10:12])
			p.options, head = head[ipv4Size:], head[:ipv4Size]
		}
		key := string(head)
		if parts[key] == nil {
			order = append(order, key)
		}
		parts[key] = append(parts[key], p)
	}
	for _, key := range order {
		list := parts[key]
		slices.SortFunc(list, func(a, b part) int { return a.at - b.at })
		ip := append([]byte(key), list[0].options...)
		for _, p := range list {
			ip = append(ip, p.body...)
		}
		if ip[0]>>4 == 6 {
			binary.BigEndian.PutUint16(ip[4:], uint16(len(ip)-ipv6Size))
		} else {
			binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
			setHeaderChecksum(ip[:int(ip[0]&15)*4])
		}
		joined = append(joined, ip)
	}
	return append(whole, joined...)
}

func TestSplitJoin(t *testing.T) {
	for _, tc := range []struct {
		src, dst   string
		extensions []extension
	}{
		{src: "192.0.2.1", dst: "198.51.100.1"},
		{src: "2001:db8::1", dst: "2001:db8::2"},
		{src: "2001:db8::1", dst: "2001:db8::2", extensions: []extension{{unix.IPPROTO_HOPOPTS, []byte{1, 4, 0, 0, 0, 0}}}},
	} {
		s := shape{ttl: 64, id: 7, fragment: 64, extensions: tc.extensions}
		whole := s.build(netip.MustParseAddr(tc.src), netip.MustParseAddr(tc.dst), unix.IPPROTO_UDP, udpDatagram(1, 2, make([]byte, 300)))
		parts := s.split(whole)
		if len(parts) != 5 {
			t.Errorf("%s: %d fragments, not 5", tc.src, len(parts))
		}
		rand.Shuffle(len(parts), func(i, j int) { parts[i], parts[j] = parts[j], parts[i] })
		if got := join(parts); len(got) != 1 || !bytes.Equal(got[0], whole) {
			t.Errorf("%s: joined\n%x\nwas\n%x", tc.src, got, whole)
		}
	}
}
