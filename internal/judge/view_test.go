package judge

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
)

// heard is a packet that arrived at an end.
type heard struct {
	ip   []byte
	flow int
	// bounced: it answers a packet of the same end, so the host itself has made it.
	bounced bool
	// speech: it is of the flow, neither an error nor anything else.
	speech bool
}

// view is one conversation as one world holds it.
type view struct {
	*script
	world *world
	heard [endCount][]heard
	sent  map[speaker]said // the last packet
	ports ports
}

// speaker is a side of a flow.
type speaker struct {
	flow int
	side side
}

// said is a packet, and the step that it was.
type said struct {
	ip   []byte
	step step
}

func newView(s *script, w *world) *view {
	return &view{script: s, world: w, sent: map[speaker]said{}, ports: newPorts()}
}

// host is the address that the outside knows a container by.
func (v *view) host(container int) netip.Addr {
	if container == containers-1 {
		return fixedSource[v.family]
	}
	return v.world.Host.Addr(v.family)
}

// own is the address and port that a side of a flow speaks with.
func (v *view) own(f flow, s side) netip.AddrPort {
	if s == without {
		return netip.AddrPortFrom(v.addr(f.outside), f.outsidePort)
	}
	return netip.AddrPortFrom(v.world.Containers[f.container].Addr(v.family), f.inside)
}

// peer is whom a side of a flow speaks to: the initiator knows, the other has heard it. Who has
// heard nothing and is blind guesses.
func (v *view) peer(number int, s side, blind bool) (to netip.AddrPort, ok bool) {
	f := v.flows[number]
	host := v.host(f.container)
	if s == f.initiator() {
		if f.inward {
			return netip.AddrPortFrom(v.world.Host.Addr(v.family), f.published), true
		}
		return v.own(f, without), true
	}
	if last := v.last(number, s, 0, true); last != nil {
		src, _, ok := endpoints(last)
		return src, ok
	}
	if !blind || v.shared(f) {
		return to, false
	}
	if f.inward {
		return v.own(f, without), true
	}
	return netip.AddrPortFrom(host, f.inside), true
}

// shared tells whether another flow has the same port of another container: then the port by which
// the outside would reach it may be the other's.
func (v *view) shared(f flow) bool {
	return slices.ContainsFunc(v.flows, func(o flow) bool {
		return o.protocol == f.protocol && o.inside == f.inside && o.container != f.container
	})
}

// last is the packet of a flow that a side received last, or back packets before that; nil if
// there are none. Speech: only packets of the flow itself.
func (v *view) last(number int, s side, back int, speech bool) []byte {
	var mine []heard
	for _, h := range v.heard[v.flows[number].endOf(s)] {
		if h.flow == number && (!speech || h.speech && !h.bounced) {
			mine = append(mine, h)
		}
	}
	if len(mine) == 0 {
		return nil
	}
	return mine[max(0, len(mine)-1-back)].ip
}

// knows tells whether a packet like this could have been received by the one who has sent or received of the flows
// so far: whether a flow has its addresses and ports.
func (v *view) knows(ip []byte) bool {
	src, dst, ok := endpoints(ip)
	h, _ := parse(ip)
	same := func(other []byte, reversed bool) bool {
		from, to, ok := endpoints(other)
		if reversed {
			from, to = to, from
		}
		o, _ := parse(other)
		return ok && o.protocol == h.protocol && from == src && to == dst
	}
	if !ok {
		return false
	}
	for _, said := range v.sent {
		if same(said.ip, true) {
			return true
		}
	}
	return slices.ContainsFunc(slices.Concat(v.heard[:]...), func(p heard) bool { return same(p.ip, false) })
}

// hear notes a packet that has arrived at an end, in answer to a step's.
func (v *view) hear(end int, ip []byte, s step) {
	h := heard{ip: ip, flow: s.flow, bounced: end == v.flows[s.flow].endOf(s.from)}
	if p, ok := parse(ip); ok && p.protocol == v.flows[s.flow].protocol {
		_, _, h.speech = endpoints(ip)
	}
	v.heard[end] = append(v.heard[end], h)
}

// endpoints are source and destination of a packet; of an echo the id is both ports. It is not ok
// where there are no ports.
func endpoints(ip []byte) (src, dst netip.AddrPort, ok bool) {
	h, ok := parse(ip)
	if !ok || h.l4+4 > len(ip) {
		return src, dst, false
	}
	sport, dport := binary.BigEndian.Uint16(ip[h.l4:]), binary.BigEndian.Uint16(ip[h.l4+2:])
	switch {
	case h.protocol == unix.IPPROTO_TCP || h.protocol == unix.IPPROTO_UDP || h.protocol == unix.IPPROTO_SCTP:
	case isICMP(h.protocol):
		request, reply := isEcho(h.protocol, ip[h.l4])
		if !request && !reply || h.l4+6 > len(ip) {
			return src, dst, false
		}
		sport = binary.BigEndian.Uint16(ip[h.l4+4:])
		dport = sport
	default:
		return src, dst, false
	}
	return netip.AddrPortFrom(h.src, sport), netip.AddrPortFrom(h.dst, dport), true
}

// inside tells whether an address is a container's, or the bridge's.
func inside(a netip.Addr) bool {
	return a.IsValid() && lab.BridgeSubnet(lab.FamilyOf(a)).Contains(a)
}
