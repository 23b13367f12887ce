package maps

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"tcnat/bpf"
)

// memory is what lies in memory where a is.
func memory(a bpf.NATAddr) []byte {
	var b []byte
	for _, word := range a.Word {
		b = binary.NativeEndian.AppendUint32(b, word)
	}
	return b
}

func TestAddrInMemory(t *testing.T) {
	for text, want := range map[string][]byte{
		"172.17.0.2":  {10: 0xff, 11: 0xff, 12: 172, 13: 17, 14: 0, 15: 2},
		"0.0.0.0":     {10: 0xff, 11: 0xff, 15: 0},
		"2001:db8::1": {0x20, 0x01, 0x0d, 0xb8, 15: 1},
		"::":          {15: 0},
	} {
		if got := memory(toAddr(addr(text))); !bytes.Equal(got, want) {
			t.Errorf("%s lies in memory as %x, want %x", text, got, want)
		}
	}
}

func TestPortInMemory(t *testing.T) {
	got := binary.NativeEndian.AppendUint16(nil, swapPort(0x0bbd))
	if !bytes.Equal(got, []byte{0x0b, 0xbd}) {
		t.Errorf("port 3005 lies in memory as %x", got)
	}
}

func TestPrefixRoundTrip(t *testing.T) {
	for text, bits := range map[string]uint32{
		"172.17.0.0/16": 112,
		"0.0.0.0/0":     96,
		"10.0.0.1/32":   128,
		"2001:db8::/32": 32,
		"2000::/3":      3,
		"fd00::1/128":   128,
	} {
		n, a := toPrefix(prefix(text))
		if n != bits {
			t.Errorf("%s has %d bits in a key, want %d", text, n, bits)
		}
		if got, err := fromPrefix(n, a); err != nil || got != prefix(text) {
			t.Errorf("%s came back as %s (%v)", text, got, err)
		}
	}
	if p, err := fromPrefix(90, toAddr(addr("10.0.0.0"))); err == nil {
		t.Errorf("90 bits of an IPv4 address are the prefix %s", p)
	}
	if p, err := fromPrefix(129, toAddr(addr("fd00::"))); err == nil {
		t.Errorf("129 bits are the prefix %s", p)
	}
}

func FuzzAddrRoundTrip(f *testing.F) {
	for _, text := range []string{"10.0.0.1", "0.0.0.0", "255.255.255.255", "::", "::1", "2001:db8::1", "fe80::1"} {
		f.Add(addr(text).AsSlice(), uint16(3005))
	}
	f.Fuzz(func(t *testing.T, b []byte, port uint16) {
		a, ok := netip.AddrFromSlice(b)
		if !ok {
			return
		}
		a = a.Unmap()
		if got := fromAddr(toAddr(a)); got != a {
			t.Errorf("%s came back as %s", a, got)
		}
		want := a.As16()
		if got := memory(toAddr(a)); !bytes.Equal(got, want[:]) {
			t.Errorf("%s lies in memory as %x, want %x", a, got, want)
		}
		if got := swapPort(swapPort(port)); got != port {
			t.Errorf("port %d came back as %d", port, got)
		}
		tuple := Tuple{Protocol: UDP, Src: netip.AddrPortFrom(a, port), Dst: netip.AddrPortFrom(a, ^port)}
		if got := fromTuple(toTuple(tuple)); got != tuple {
			t.Errorf("%s came back as %s", tuple, got)
		}
		p := netip.PrefixFrom(a, int(port)%(a.BitLen()+1)).Masked()
		if checkPrefix(p) != nil {
			return
		}
		if got, err := fromPrefix(toPrefix(p)); err != nil || got != p {
			t.Errorf("%s came back as %s (%v)", p, got, err)
		}
	})
}
