package bench

import (
	"cmp"
	"fmt"
	"net/netip"

	"tcnat/internal/lab"
)

// leg is one direction of traffic: what is sent, and how it has to arrive where.
type leg struct {
	streams []stream
	want    expectation
	at      []place
}

// traffic is flows of a contender, in the direction that opens them and in that of the answers.
type traffic struct {
	forward, reply leg
}

// trafficOptions describe flows.
type trafficOptions struct {
	inbound    bool
	flows      int
	containers int     // that take part in outbound flows; 0: 1
	first      uint16  // source port of outbound flow 0; 0: firstSource
	sources    portSet // zero: as many as there are flows, from firstSource, maxSources at most
	targets    portSet // inbound: the published ports; zero: publishedPort
	partial    bool
	tcp        [2]byte // flags of TCP packets, forward and reply; zero: UDP
}

// newTraffic lays out flows between the containers and the world.
func (c *contender) newTraffic(o trafficOptions) (traffic, error) {
	if o.inbound {
		return c.inbound(o)
	}
	return c.outbound(o)
}

func (c *contender) outbound(o trafficOptions) (traffic, error) {
	sources := min(o.flows, maxSources)
	sets := spread(cmp.Or(o.first, firstSource), sources, max(o.containers, 1))
	if o.sources.n != 0 {
		sources, sets = o.sources.n, []portSet{o.sources}
	}
	targets := portSet{first: firstTarget, step: 1, n: o.flows / sources}
	if targets.n*sources != o.flows {
		return traffic{}, fmt.Errorf("%d flows do not divide into %d source ports", o.flows, sources)
	}
	all := portSet{first: sets[0].first, step: 1, n: sources}
	var t traffic
	for i, set := range sets {
		out, back, err := c.outboundOf(i, portPairs{src: set, dst: targets}, o)
		if err != nil {
			return traffic{}, err
		}
		t.forward.streams = append(t.forward.streams, out)
		t.reply.streams = append(t.reply.streams, back)
	}
	src := lab.BridgeSubnet(lab.IPv4)
	if c.nat {
		src = single(c.rig.hostAddr())
		// One stream answers all: the world knows of one address.
		t.reply.streams = t.reply.streams[:1]
		t.reply.streams[0].pairs = portPairs{src: all, dst: targets}.swapped()
	}
	t.forward.want = expect(src, single(c.rig.worldAddr()), portPairs{src: all, dst: targets}, o)
	t.forward.at = c.rig.atWorld()
	t.reply.want = expect(single(c.rig.worldAddr()), lab.BridgeSubnet(lab.IPv4), portPairs{src: targets, dst: all}, o)
	t.reply.at = c.rig.atContainers()
	if c.floor {
		t.forward.at, t.forward.want.src = nil, lab.BridgeSubnet(lab.IPv4)
		for i := range sets {
			t.forward.at = append(t.forward.at, c.rig.bridgePort(i))
		}
	}
	return t, nil
}

func (c *contender) outboundOf(container int, pairs portPairs, o trafficOptions) (out, back stream, err error) {
	r := c.rig
	inside, outside := r.containerAddr(container), r.containerAddr(container)
	if c.nat {
		outside = r.hostAddr()
	}
	out = stream{pairs: pairs, frame: frameOptions{
		srcMAC: r.inside[container], dstMAC: r.bridge, src: inside, dst: r.worldAddr(), partial: o.partial, tcpFlags: o.tcp[0],
	}}
	if out.port, err = r.port(container, o.partial); err != nil {
		return out, back, err
	}
	back = stream{pairs: pairs.swapped(), frame: c.fromWorld(outside, o, o.tcp[1])}
	back.port, err = r.port(-1, o.partial)
	return out, back, err
}

func (c *contender) inbound(o trafficOptions) (traffic, error) {
	r := c.rig
	sources, targets := o.sources, o.targets
	if sources.n == 0 {
		sources = portSet{first: firstSource, step: 1, n: o.flows}
	}
	if targets.n == 0 {
		targets = onePort(publishedPort)
	}
	pairs := portPairs{src: sources, dst: targets}
	fromWorld, err := r.port(-1, o.partial)
	if err != nil {
		return traffic{}, err
	}
	fromContainer, err := r.port(0, o.partial)
	if err != nil {
		return traffic{}, err
	}
	public, inside := r.containerAddr(0), r.containerAddr(0)
	if c.nat {
		public = r.hostAddr()
	}
	t := traffic{
		forward: leg{
			streams: []stream{{port: fromWorld, pairs: pairs, frame: c.fromWorld(public, o, o.tcp[0])}},
			want:    expect(single(r.worldAddr()), single(inside), pairs, o),
			at:      r.atContainers()[:1],
		},
		reply: leg{
			streams: []stream{{port: fromContainer, pairs: pairs.swapped(), frame: frameOptions{
				srcMAC: r.inside[0], dstMAC: r.bridge, src: inside, dst: r.worldAddr(), partial: o.partial, tcpFlags: o.tcp[1],
			}}},
			want: expect(single(public), single(r.worldAddr()), pairs.swapped(), o),
			at:   r.atWorld(),
		},
	}
	if c.floor {
		t.forward.at = []place{{r.Host, lab.Uplink}}
	}
	return t, nil
}

// fromWorld describes frames that the world sends.
func (c *contender) fromWorld(dst netip.Addr, o trafficOptions, tcpFlags byte) frameOptions {
	return frameOptions{
		srcMAC: c.rig.world, dstMAC: c.rig.uplink, src: c.rig.worldAddr(), dst: dst, partial: o.partial, tcpFlags: tcpFlags,
	}
}

func expect(src, dst netip.Prefix, pairs portPairs, o trafficOptions) expectation {
	want := expectation{
		src: src, dst: dst, partial: o.partial,
		sports: [2]uint16{pairs.src.first, pairs.src.last()}, dports: [2]uint16{pairs.dst.first, pairs.dst.last()},
	}
	if o.tcp[0] != 0 {
		want.protocol = protocolTCP
	}
	return want
}
