package judge

// connection follows a TCP connection, so far as to tell what is in order from what conntrack
// may call invalid.
type connection struct {
	progress progress
	fins     [2]bool // of the initiator, of the other
	spoken   [2]bool // the same
	reversed bool    // the other has sent the first segment
}

type progress uint8

const (
	fresh    progress = iota
	begun             // SYN
	answered          // SYN and ACK
	open              // ACK
	closed            // FIN both ways, or RST
	refused           // RST before both have said something
	// astray: the host dropped a segment that changes the state, or the other has sent a SYN where it
	// may not. conntrack has seen it before routing, tcnat looks at what it translates.
	astray
)

// see notes a segment. Who begun the flow sends it, or the other; it arrived or did not.
func (c *connection) see(initiator bool, flags uint8, arrived bool) {
	opening := flags&(syn|ack|fin|rst) == syn
	both := c.spoken == [2]bool{true, true}
	if c.spoken == [2]bool{} {
		c.reversed = !initiator
	}
	c.spoken[by(initiator)] = true
	switch {
	case flags&rst != 0 && (!both || c.reversed): // then there may be two flows, one each way
		c.progress = refused
	case opening && !initiator && c.progress != fresh, !arrived && flags&(syn|fin|rst) != 0:
		c.progress = astray
	case !arrived || c.progress == astray && !(opening && initiator):
	case flags&rst != 0:
		if c.progress != fresh && c.progress != refused {
			c.progress = closed
		}
	case opening && initiator:
		if c.progress != answered && c.progress != open {
			*c = connection{progress: begun, spoken: [2]bool{true}}
		}
	case flags&(syn|ack|fin) == syn|ack && !initiator && c.progress == begun:
		c.progress = answered
	case flags&(syn|ack) == ack && initiator && c.progress == answered:
		c.progress = open
		fallthrough
	case c.progress == open && flags&(syn|fin) == fin:
		c.finish(initiator, flags)
	}
}

// by is 0 for who has begun the flow, 1 for the other.
func by(initiator bool) int {
	if initiator {
		return 0
	}
	return 1
}

// drop notes that the first packet of a flow did not arrive.
func (c *connection) drop() {
	if c.spoken == [2]bool{} {
		c.progress = astray
	}
}

func (c *connection) finish(initiator bool, flags uint8) {
	if flags&fin == 0 {
		return
	}
	c.fins[by(initiator)] = true
	if c.fins[0] && c.fins[1] {
		c.progress = closed
	}
}

// inOrder tells whether a segment is one that every NAT must let through at this point.
func (c *connection) inOrder(initiator bool, flags uint8) bool {
	flags &^= psh
	if flags&ack != 0 && flags&(rst|syn) == 0 { // conntrack takes SYN, ACK and URG together for invalid
		flags &^= urg
	}
	switch flags {
	case syn:
		return initiator
	case syn | ack:
		return !initiator && (c.progress == begun || c.progress == answered)
	case ack:
		return c.progress == open || c.progress == closed || c.progress == answered && initiator
	case fin | ack:
		return c.progress == open
	case rst, rst | ack:
		return c.progress == open || c.progress == answered || c.progress == begun && !initiator
	}
	return false
}
