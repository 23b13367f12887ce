package maps

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
)

// PortRange is the ports from First to Last, both included. The zero value stands for "any"
// or "as it is", as the field that holds it says.
type PortRange struct {
	First, Last uint16
}

// SinglePort is the range of one port.
func SinglePort(port uint16) PortRange { return PortRange{port, port} }

// String returns "3005" or "8000-8999".
func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// ParsePortRange reads what String writes. A port of 0 or over 65535 and a reversed range
// are an ErrInvalidRule.
func ParsePortRange(text string) (PortRange, error) {
	first, last, isRange := strings.Cut(text, "-")
	if !isRange {
		last = first
	}
	var r PortRange
	for _, part := range []struct {
		text string
		port *uint16
	}{{first, &r.First}, {last, &r.Last}} {
		n, err := strconv.ParseUint(part.text, 10, 16)
		if err != nil {
			return PortRange{}, invalid("port %q: not a port: use 1 to 65535, or a range like 8000-8999", text)
		}
		*part.port = uint16(n)
	}
	return r, r.check("port")
}

// isZero tells whether r is the zero value.
func (r PortRange) isZero() bool { return r == PortRange{} }

// length is the number of ports, at least 1 in a valid range.
func (r PortRange) length() int { return int(r.Last) - int(r.First) + 1 }

func (r PortRange) overlaps(o PortRange) bool { return r.First <= o.Last && o.First <= r.Last }

// check refuses what is not a range of ports; what names it in the error.
func (r PortRange) check(what string) error {
	switch {
	case r.First > r.Last:
		return invalid("%s %s: range is reversed: write %d-%d", what, r, r.Last, r.First)
	case r.First == 0:
		return invalid("%s %s: there is no port 0: use 1 to 65535", what, r)
	}
	return nil
}

// portPrefix is the ports that share the first Bits bits of Port.
type portPrefix struct {
	port uint16
	bits int
}

// prefixes covers r with the fewest port prefixes (30 at most), in ascending order.
func (r PortRange) prefixes() []portPrefix {
	var cover []portPrefix

	for next, last := uint32(r.First), uint32(r.Last); next <= last; {
		// The largest block that begins at next: as its trailing zeros and the rest allow.
		size := min(bits.TrailingZeros32(next|1<<16), bits.Len32(last-next+1)-1)
		cover = append(cover, portPrefix{port: uint16(next), bits: 16 - size})
		next += 1 << size
	}
	return cover
}
