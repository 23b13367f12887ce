package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// probe sends datagrams from the socket of a talk, so that they belong to its flow.
type probe struct {
	*talk
	from   *end
	family lab.Family
	fd     func(func(fd int) error) error
}

func newProbe(t *testing.T, k *talk, from *end) probe {
	t.Helper()
	conn := from.conn.(*net.UDPConn)
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	p := probe{k, from, lab.FamilyOf(from.local.Addr()), func(fn func(int) error) (err error) {
		if e := raw.Control(func(fd uintptr) { err = fn(int(fd)) }); e != nil {
			return e
		}
		return err
	}}
	// Errors are told, and DF is set whatever has been learnt of the path.
	if p.family == lab.IPv4 {
		p.set(t, unix.IP_RECVERR, 1)
		p.set(t, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
	} else {
		p.set(t, unix.IPV6_RECVERR, 1)
		p.set(t, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE)
		p.set(t, unix.IPV6_DONTFRAG, 1)
	}
	return p
}

func (p probe) set(t *testing.T, option, value int) {
	t.Helper()
	level := unix.IPPROTO_IP
	if p.family == lab.IPv6 {
		level = unix.IPPROTO_IPV6
	}
	if err := p.fd(func(fd int) error { return unix.SetsockoptInt(fd, level, option, value) }); err != nil {
		t.Fatal(err)
	}
}

// setTTL sets it for the datagrams from here on; -1: the kernel's.
func (p probe) setTTL(t *testing.T, ttl int) {
	option := unix.IP_TTL
	if p.family == lab.IPv6 {
		option = unix.IPV6_UNICAST_HOPS
	}
	p.set(t, option, ttl)
}

// lengthAt is where a probe's message says how long its packet is.
const lengthAt = 4

// complaint is what an ICMP error said of a datagram.
type complaint struct {
	from   netip.Addr
	mtu    int
	length int // bytes of the packet that it quotes, as it was sent
}

// drain forgets errors that have come.
func (p probe) drain() {
	for {
		if _, err := p.complaint(0); err != nil {
			return
		}
	}
}

// complaint waits for an ICMP error.
func (p probe) complaint(patience time.Duration) (complaint, error) {
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		var c complaint
		err := p.fd(func(fd int) (err error) { c, err = nextComplaint(fd); return err })
		if !errors.Is(err, unix.EAGAIN) {
			return c, err
		}
		if time.Now().After(deadline) {
			return c, lab.ErrNoReply
		}
	}
}

func nextComplaint(fd int) (complaint, error) {
	control := make([]byte, 512)
	quoted := make([]byte, messageSize)
	_, n, _, _, err := unix.Recvmsg(fd, quoted, control, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
	if err != nil {
		return complaint{}, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil {
		return complaint{}, err
	}
	for _, message := range messages {
		data := message.Data // struct sock_extended_err, and the offender's sockaddr
		if len(data) < 24 {
			continue
		}
		c := complaint{mtu: int(binary.NativeEndian.Uint32(data[8:])), length: int(binary.BigEndian.Uint32(quoted[lengthAt:]))}
		switch binary.NativeEndian.Uint16(data[16:]) {
		case unix.AF_INET:
			c.from = netip.AddrFrom4([4]byte(data[20:24]))
		case unix.AF_INET6:
			c.from = netip.AddrFrom16([16]byte(data[24:40]))
		}
		return c, nil
	}
	return complaint{}, errors.New("an error without an offender")
}

// send sends a question in an IP packet of that many bytes.
func (p probe) send(t *testing.T, length int) {
	t.Helper()
	header := 28
	if p.family == lab.IPv6 {
		header = 48
	}
	message := make([]byte, max(length-header, messageSize))
	message[0] = question
	binary.BigEndian.PutUint32(message[lengthAt:], uint32(length))
	for range 100 { // an error about an earlier one is told once
		if err := p.from.write(message); err == nil {
			return
		}
	}
	t.Fatalf("%s: cannot send %d bytes", p.name, length)
}

// mustExpire wants a packet of that TTL to be complained of by a hop, without an end to the talk.
func (p probe) mustExpire(t *testing.T, ttl int, hop netip.Addr) {
	t.Helper()
	length := 100 + ttl // tells it from the talk's own questions, and from what was sent for another hop
	p.setTTL(t, ttl)
	p.send(t, length)
	got, err := p.complaint(lab.DefaultTimeout)
	for err == nil && got.length != length {
		got, err = p.complaint(lab.DefaultTimeout)
	}
	if err != nil || got.from != hop {
		t.Errorf("%s: ttl %d: %v, error %v, want %s", p.name, ttl, got.from, err, hop)
	}
	p.setTTL(t, -1)
}

// mustFit wants packets of exactly the MTU to pass, on the fast path, and one that is longer by a byte
// to be complained of.
func (r *rig) mustFit(t *testing.T, p probe, mtu int, by netip.Addr) {
	t.Helper()
	const packets = 20
	other := p.server
	if p.from == p.server {
		other = p.client
	}
	// What has just changed may take a lease's time.
	changed := time.Now()
	for err := error(lab.ErrNoReply); err != nil && time.Since(changed) < changeTime; {
		p.drain()
		p.send(t, mtu+1)
		_, err = p.complaint(100 * time.Millisecond)
	}
	p.drain()
	before, redirected := other.questions.Load(), r.redirected(t)
	poll(t, fmt.Sprintf("%s: %d bytes pass, by the fast path", p.name, mtu), func() bool {
		before, redirected = other.questions.Load(), r.redirected(t)
		for range packets {
			p.send(t, mtu)
		}
		for end := time.Now().Add(time.Second); other.questions.Load() < before+packets && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		// answers are redirected too, and one packet each way may take the long way
		return other.questions.Load() == before+packets && r.redirected(t) >= redirected+2*packets-2
	})
	for c, err := p.complaint(0); err == nil; c, err = p.complaint(0) {
		if c.length <= mtu { // else it is about an earlier one, and late
			t.Errorf("%s: %d bytes: %s complained", p.name, mtu, c.from)
		}
	}
	before = other.questions.Load()
	p.send(t, mtu+1)
	got, err := p.complaint(lab.DefaultTimeout)
	if err != nil || got.from != by || got.mtu != mtu {
		t.Errorf("%s: %d bytes: %+v, error %v, want mtu %d from %s", p.name, mtu+1, got, err, mtu, by)
	}
	if other.questions.Load() != before {
		t.Errorf("%s: %d bytes passed", p.name, mtu+1)
	}
}

// Traceroute works on a flow that is on the fast path, both ways: the host is a hop, as without it.
func TestFastTraceroute(t *testing.T) {
	forEachFast(t, fastVariants(), lab.Options{}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		r.attach(t, attach)
		c := r.Containers[0]
		for _, f := range lab.Families() {
			ways := r.ways(t, c, f, talkPort)
			out, in := ways[0].start(t, "udp"), ways[1].start(t, "udp")
			goOn([]*talk{out, in}, false)
			r.mustBeFast(t, []*talk{out, in})
			for ttl, hop := range []netip.Addr{lab.BridgeAddr(f), r.Router.Addr(f), r.ISP.Addr(f)} {
				newProbe(t, out, out.client).mustExpire(t, ttl+1, hop)
				newProbe(t, in, in.server).mustExpire(t, ttl+1, hop)
			}
			newProbe(t, in, in.client).mustExpire(t, 3, r.Host.Addr(f))
			newProbe(t, out, out.server).mustExpire(t, 3, r.Host.Addr(f))
			r.mustBeFast(t, []*talk{out, in})
			pause([]*talk{out, in})
		}
		r.mustNotDrop(t)
	})
}

// The MTU of the device and of the route hold on the fast path, to the byte, for what leaves by a tun
// device and by a veth, and for what comes in by either.
func TestFastMTU(t *testing.T) {
	const small, smaller, inside = 1400, 1390, 1380
	forEachFast(t, fastVariants(), lab.Options{TunUplink: true}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		attach.Uplinks = []string{lab.Uplink, lab.TunUplink}
		r.attach(t, attach)
		c := r.Containers[0]
		ip(t, r.Host, "link set tun0 mtu 1400")
		for _, f := range lab.Families() {
			ways := r.ways(t, c, f, talkPort)
			outside := at(r.Far.Loopback(f), talkPort)
			tun := way{"snat", c, r.Far, outside, outside}
			back := way{"dnat", r.Far, c, at(c.Addr(f), talkPort), at(lab.TunAddr(f), published(talkPort))}
			talks := make(map[string]*talk)
			for name, w := range map[string]way{"veth out": ways[0], "veth in": ways[1], "tun out": tun, "tun in": back} {
				w.name = name
				if name == "tun in" { // the container has one server on that port
					w.listen = at(c.Addr(f), talkPort+1)
					w.call = at(lab.TunAddr(f), published(talkPort+1))
					r.publish(t, maps.SinglePort(published(talkPort+1)), c.Addr(f), maps.SinglePort(talkPort+1))
				}
				talks[name] = w.start(t, "udp")
			}
			out := func(name string) probe { return newProbe(t, talks[name], talks[name].client) }
			r.mustFit(t, out("tun out"), small, lab.BridgeAddr(f))
			r.mustFit(t, newProbe(t, talks["tun in"], talks["tun in"].server), small, lab.BridgeAddr(f))

			// A route's MTU, less than its device's.
			to := r.World.Loopback(f)
			ip(t, r.Host, fmt.Sprintf("route add %s via %s dev eth0 mtu lock %d", to, r.Router.Addr(f), smaller))
			r.mustFit(t, out("veth out"), smaller, lab.BridgeAddr(f))
			ip(t, r.Host, fmt.Sprintf("route replace %s dev tun0 mtu lock %d", r.Far.Loopback(f), smaller))
			r.mustFit(t, out("tun out"), smaller, lab.BridgeAddr(f))

			ip(t, r.Host, fmt.Sprintf("link set docker0 mtu %d", inside))
			r.mustFit(t, out("veth in"), inside, r.Host.Addr(f))
			r.mustFit(t, out("tun in"), inside, lab.TunAddr(f))
			ip(t, r.Host, "link set docker0 mtu 1500")
		}
		ip(t, r.Host, "link set tun0 mtu 1500")
		r.mustNotDrop(t)
	})
}

// A route's MTU need not be locked: the host honours it for what it forwards. In always it has to be, and
// in the test above it is.
func TestFastRouteMTU(t *testing.T) {
	const smaller = 1390
	forEachFast(t, fastVariants()[:2], lab.Options{}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		r.attach(t, attach)
		for _, f := range lab.Families() {
			ip(t, r.Host, fmt.Sprintf("route add %s via %s dev eth0 mtu %d", r.World.Loopback(f), r.Router.Addr(f), smaller))
			k := r.ways(t, r.Containers[0], f, talkPort)[0].start(t, "udp")
			r.mustFit(t, newProbe(t, k, k.client), smaller, lab.BridgeAddr(f))
		}
	})
}
