package bench

// portSet is the ports first, first+step, ... of which there are n.
type portSet struct {
	first, step uint16
	n           int
}

// onePort is the set of one port.
func onePort(port uint16) portSet { return portSet{first: port, step: 1, n: 1} }

func (p portSet) at(i int) uint16 { return p.first + uint16(i)*p.step }

func (p portSet) last() uint16 { return p.at(p.n - 1) }

// portPairs goes through the products of two sets: every source port with the first
// destination port, then with the second, and from the start again.
type portPairs struct {
	src, dst portSet
	s, d     int
}

// size is how many pairs there are.
func (p *portPairs) size() int { return p.src.n * p.dst.n }

func (p *portPairs) next() (sport, dport uint16) {
	sport, dport = p.src.at(p.s), p.dst.at(p.d)
	if p.s++; p.s == p.src.n {
		p.s = 0
		if p.d++; p.d == p.dst.n {
			p.d = 0
		}
	}
	return sport, dport
}

// swapped is the other direction.
func (p portPairs) swapped() portPairs { return portPairs{src: p.dst, dst: p.src} }
