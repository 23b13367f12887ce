package e2e

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// udpFrame is an Ethernet frame with a datagram.
func udpFrame(t *testing.T, from, to string, src, dst netip.AddrPort, payload []byte) []byte {
	t.Helper()
	source, err := net.ParseMAC(from)
	if err != nil {
		t.Fatal(err)
	}
	destination, err := net.ParseMAC(to)
	if err != nil {
		t.Fatal(err)
	}
	udp := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(udp, src.Port())
	binary.BigEndian.PutUint16(udp[2:], dst.Port())
	binary.BigEndian.PutUint16(udp[4:], uint16(8+len(payload)))
	udp = append(udp, payload...)

	pseudo := append(src.Addr().AsSlice(), dst.Addr().AsSlice()...)
	pseudo = append(pseudo, 0, unix.IPPROTO_UDP, udp[4], udp[5])
	binary.BigEndian.PutUint16(udp[6:], checksum(append(pseudo, udp...)))

	frame := append(destination, source...)
	if src.Addr().Is4() {
		header := make([]byte, 20)
		header[0], header[8], header[9] = 0x45, 64, unix.IPPROTO_UDP
		binary.BigEndian.PutUint16(header[2:], uint16(20+len(udp)))
		copy(header[12:], src.Addr().AsSlice())
		copy(header[16:], dst.Addr().AsSlice())
		binary.BigEndian.PutUint16(header[10:], checksum(header))
		frame = append(append(frame, 0x08, 0x00), header...)
	} else {
		header := make([]byte, 8)
		header[0], header[6], header[7] = 0x60, unix.IPPROTO_UDP, 64
		binary.BigEndian.PutUint16(header[4:], uint16(len(udp)))
		frame = append(append(frame, 0x86, 0xdd), header...)
		frame = append(append(frame, src.Addr().AsSlice()...), dst.Addr().AsSlice()...)
	}
	return append(frame, udp...)
}

// checksum is that of RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		word := uint32(b[i]) << 8
		if i+1 < len(b) {
			word |= uint32(b[i+1])
		}
		sum += word
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// A neighbour that forges a container's address, with its Ethernet address or with its own, gets none
// of the container's packets, sends none in its name, and does not disturb it.
func TestFastForgedNeighbour(t *testing.T) {
	variants := []loader.AttachOptions{fastVariants()[0], fastVariants()[2]}
	forEachFast(t, variants, lab.Options{Containers: 2}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		r.attach(t, attach)
		victim, forger := r.Containers[0], r.Containers[1]
		talks := r.talkAll(t, victim, talkPort)
		goOn(talks, false)
		r.mustBeFast(t, talks)

		mark := []byte("forged datagram.") // no less than a message
		stolen := watch(t, forger, "eth0", func(p lab.Packet) bool {
			return !p.Outgoing && (p.Dst == victim.Addr(lab.IPv4) || p.Dst == victim.Addr(lab.IPv6))
		})
		sent := watch(t, r.World, "eth0", func(p lab.Packet) bool { return bytes.Contains(p.Payload, mark) })

		bridge := r.hardwareAddr(t, r.Host, lab.Bridge)
		theirs, own := r.hardwareAddr(t, victim, "eth0"), r.hardwareAddr(t, forger, "eth0")
		var frames [][]byte
		for _, k := range talks {
			inside, _ := k.sides()
			src, dst := inside.local, k.callee
			if inside == k.server {
				dst = k.client.local
			}
			for _, from := range []string{theirs, own} {
				for _, to := range []string{bridge, "ff:ff:ff:ff:ff:ff"} {
					frames = append(frames, udpFrame(t, from, to, src, dst, mark))
				}
			}
		}
		sender, err := lab.OpenFrameSender(forger, "eth0")
		if err != nil {
			t.Fatal(err)
		}
		defer sender.Close()
		// Through three leases, so that some are sent while one is asked for.
		for end, i := time.Now().Add(3500*time.Millisecond), 0; time.Now().Before(end); i++ {
			if err := sender.Send(frames[i%len(frames)]); err != nil {
				t.Fatal(err)
			}
			if i%10 == 0 {
				time.Sleep(time.Millisecond)
			}
		}
		r.mustBeFast(t, talks)
		pause(talks)
		for _, k := range talks {
			poll(t, k.name+": every question is answered", func() bool { return k.client.answers.Load() == k.client.asked.Load() })
		}
		mustSeeNothing(t, stolen, "the forger got the victim's packets")
		mustSeeNothing(t, sent, "the world got forged packets")
		if drops := r.drops(t); drops["spoofed-mac"] < 1000 {
			t.Errorf("dropped: %v, want what was forged as spoofed-mac", drops)
		}
	})
}

// With a bridge, an uplink and ports in promiscuous mode, as tcpdump has them, each packet arrives once,
// and two containers of one bridge still talk past the host.
func TestFastPromiscuous(t *testing.T) {
	forEachFast(t, fastVariants(), lab.Options{Containers: 2}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		const rate = 2000
		r.attach(t, attach)
		c, neighbour, f := r.Containers[0], r.Containers[1], lab.IPv4
		var wires []*lab.Capture
		for _, device := range []string{lab.Bridge, lab.Uplink, "vethc1", "vethc2"} {
			ip(t, r.Host, "link set "+device+" promisc on")
			wires = append(wires, watch(t, r.Host, device, func(lab.Packet) bool { return false }))
		}
		r.publish(t, maps.SinglePort(8080), c.Addr(lab.IPv6), maps.SinglePort(80))
		before := r.redirected(t)
		// On the wire, not at the socket.
		var atWorld, atContainer atomic.Uint64
		counts := []*lab.Capture{
			watch(t, r.World, "eth0", countPort(&atWorld, 6001)), watch(t, c, "eth0", countPort(&atContainer, 80)),
		}
		out := r.startStream(t, c, r.World, at(r.World.Loopback(f), 6001), at(r.World.Loopback(f), 6001), rate)
		in := r.startStream(t, r.World, c, at(c.Addr(lab.IPv6), 80), at(r.Host.Addr(lab.IPv6), 8080), rate)
		time.Sleep(1500 * time.Millisecond)
		out.mustArrive(t, r.Host.Addr(f))
		in.mustArrive(t, r.World.Addr(lab.IPv6))
		for _, capture := range counts { // what has arrived need not have been counted yet
			if err := capture.Close(); err != nil {
				t.Error(err)
			}
		}
		for what, got := range map[string][2]uint64{"world": {atWorld.Load(), out.sent}, "the container": {atContainer.Load(), in.sent}} {
			if got[0] != got[1] {
				t.Errorf("%s received %d packets of %d", what, got[0], got[1])
			}
		}
		redirected := r.redirected(t) - before
		if redirected < (out.sent+in.sent)*9/10 {
			t.Errorf("%d of %d packets redirected", redirected, out.sent+in.sent)
		}

		// A frame for a neighbour, whatever its packet is for: the host gets a copy, and must not send it on.
		mark := []byte("for a neighbour.")
		copied := watch(t, r.World, "eth0", func(p lab.Packet) bool { return bytes.Contains(p.Payload, mark) })
		sender, err := lab.OpenFrameSender(c, "eth0")
		if err != nil {
			t.Fatal(err)
		}
		defer sender.Close()
		own, theirs := r.hardwareAddr(t, c, "eth0"), r.hardwareAddr(t, neighbour, "eth0")
		for i := range 40 {
			f := lab.Families()[i%2]
			frame := udpFrame(t, own, theirs, at(c.Addr(f), 5555), at(r.World.Loopback(f), 6002), mark)
			if err := sender.Send(frame); err != nil {
				t.Fatal(err)
			}
		}

		// Neighbours, both ways: none of it is the host's.
		before = r.redirected(t)
		var talks []*talk
		for i, pair := range [][2]*lab.Node{{c, neighbour}, {neighbour, c}} {
			for _, f := range lab.Families() {
				for _, protocol := range protocols() {
					server := at(pair[1].Addr(f), talkPort+uint16(i))
					talks = append(talks, way{"neighbours", pair[0], pair[1], server, server}.start(t, protocol))
				}
			}
		}
		goOn(talks, true)
		mustGoOn(t, talks, changeTime)
		time.Sleep(1700 * time.Millisecond) // longer than a lease
		mustGoOn(t, talks, changeTime)
		pause(talks)
		for _, k := range talks {
			for _, e := range []*end{k.client, k.server} {
				poll(t, k.name+": every question is answered", func() bool { return e.answers.Load() == e.asked.Load() })
			}
		}
		if after := r.redirected(t); after != before {
			t.Errorf("%d packets between neighbours redirected", after-before)
		}
		mustSeeNothing(t, copied, "the world got a neighbour's frames")
		r.mustNotDrop(t)
		for _, wire := range wires {
			_ = wire.Close()
		}
	})
}

func countPort(n *atomic.Uint64, port uint16) func(lab.Packet) bool {
	return func(p lab.Packet) bool {
		if !p.Outgoing && p.DstPort == port {
			n.Add(1)
		}
		return false
	}
}
