package e2e

import (
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// All uplinks have a fast path at once, with a link header and without, and containers are reached with a
// qdisc on their port, whose packets then go by it, and without, straight into them.
func TestFastWays(t *testing.T) {
	options := lab.Options{Containers: 2, SecondUplink: true, TunUplink: true}
	forEachFast(t, fastVariants(), options, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		tool(t, r.Host, "tc", "qdisc", "add", "dev", "vethc2", "root", "pfifo", "limit", "1000")
		attach.Uplinks = []string{lab.Uplink, lab.Uplink2, lab.TunUplink}
		r.attach(t, attach)
		leaked := []*lab.Capture{
			watch(t, r.Router, "eth0", leaks), watch(t, r.Other, "eth0", leaks), watch(t, r.Far, lab.TunUplink, leaks),
		}
		var talks []*talk
		for _, f := range lab.Families() {
			for i, c := range r.Containers {
				port := talkPort + uint16(i)
				ways := r.ways(t, c, f, port)
				for _, outside := range []struct {
					node *lab.Node
					host uint16
				}{{r.Other, 100}, {r.Far, 200}} {
					server := at(outside.node.Loopback(f), port)
					ways = append(ways, way{"snat " + outside.node.Role, c, outside.node, server, server})
					host := lab.Uplink2Addr(f)
					if outside.node == r.Far {
						host = lab.TunAddr(f)
					}
					port := port + outside.host
					r.publish(t, maps.SinglePort(published(port)), c.Addr(f), maps.SinglePort(port))
					ways = append(ways, way{"dnat " + outside.node.Role, outside.node, c, at(c.Addr(f), port), at(host, published(port))})
				}
				for _, w := range ways {
					for _, protocol := range protocols() {
						talks = append(talks, w.start(t, protocol))
					}
				}
			}
		}
		goOn(talks, false)
		r.mustBeFast(t, talks)

		// What goes straight into a container does not pass its port; with a qdisc it does.
		type counts struct{ into, by [2]uint64 }
		read := func() (n counts) {
			for i, c := range r.Containers {
				into, err := c.DeviceCounters("eth0")
				if err != nil {
					t.Fatal(err)
				}
				by, err := r.Host.DeviceCounters("veth" + c.Role)
				if err != nil {
					t.Fatal(err)
				}
				n.into[i], n.by[i] = into.RxPackets, by.TxPackets
			}
			return n
		}
		before := read()
		time.Sleep(500 * time.Millisecond)
		after := read()
		for i, straight := range []bool{!attach.NoPorts, false} {
			into, by := after.into[i]-before.into[i], after.by[i]-before.by[i]
			t.Logf("c%d: %d packets, %d by its port", i+1, into, by)
			// of 12 flows, some come from the tun device, and never go straight
			if into < 100 || !straight && by < into*9/10 || straight && by > into/2 {
				t.Errorf("c%d: %d packets, %d of them by its port; straight: %t", i+1, into, by, straight)
			}
		}
		for i, p := range r.status(t).Ports {
			if p.Peer != (i == 0 && !attach.NoPorts) {
				t.Errorf("port %s: peer %t, %s", p.Name, p.Peer, p.NoPeer)
			}
		}
		for _, capture := range leaked {
			mustSeeNothing(t, capture, "left with a container's address")
		}
		r.mustNotDrop(t)
	})
}

// A rule of the host's that sets our bit of the mark opens nothing: neither out with a container's address, nor
// in to a container that has published nothing.
func TestFastMarkOfOthers(t *testing.T) {
	forEachFast(t, fastVariants(), lab.Options{}, func(t *testing.T, r *rig, attach loader.AttachOptions) {
		r.attach(t, attach)
		c := r.Containers[0]
		nft(t, r.Host, `
table inet marker {
	chain before { type filter hook prerouting priority mangle; meta mark set meta mark or 0x1000; }
	chain forward { type filter hook forward priority mangle; meta mark set meta mark or 0x1000; }
	chain after { type filter hook postrouting priority mangle; meta mark set meta mark or 0x1000; }
}`)
		leaked := watch(t, r.Router, "eth0", leaks)
		talks := r.talkAll(t, c, talkPort)
		goOn(talks, false)
		r.mustBeFast(t, talks)
		for _, f := range lab.Families() {
			// New flows meanwhile, and what has none: a ping, and a protocol that is not translated.
			mustPing(t, c, r.World.Loopback(f), lab.PingOptions{})
			frame := udpFrame(t, r.hardwareAddr(t, c, "eth0"), r.hardwareAddr(t, r.Host, lab.Bridge),
				at(c.Addr(f), 1), at(r.World.Loopback(f), 9), []byte("none of ours"))
			if f == lab.IPv4 {
				frame[14+9] = 47
				frame[14+10], frame[14+11] = 0, 0
				sum := checksum(frame[14:34])
				frame[14+10], frame[14+11] = byte(sum>>8), byte(sum)
			} else {
				frame[14+6] = 47
			}
			sender, err := lab.OpenFrameSender(c, "eth0")
			if err != nil {
				t.Fatal(err)
			}
			for range 20 { // between the packets of the talks
				if err := sender.Send(frame); err != nil {
					t.Error(err)
				}
				time.Sleep(2 * time.Millisecond)
			}
			sender.Close()

			// In by the container's own address.
			ip(t, r.Router, "route add "+c.Addr(f).String()+" via "+r.Host.Addr(f).String())
			inward := watch(t, c, "eth0", func(p lab.Packet) bool { return p.Dst == c.Addr(f) && p.DstPort == 9999 && !p.Outgoing })
			conn, err := r.Router.DialUDP(at(r.Router.Addr(f), 9999), at(c.Addr(f), 9999))
			if err != nil {
				t.Fatal(err)
			}
			for range 20 {
				_, _ = conn.Write([]byte("direct"))
				time.Sleep(2 * time.Millisecond)
			}
			_ = conn.Close()
			mustSeeNothing(t, inward, "direct access to the container")
		}
		r.mustBeFast(t, talks)
		mustSeeNothing(t, leaked, "left with a container's address")
		if drops := r.drops(t); drops["protocol"] < 40 || drops["no-flow"] < 40 {
			t.Errorf("dropped: %v, want what had no flow", drops)
		}
	})
}

// Bits of the mark that others set stay on redirected packets, and ours does not.
func TestFastMarkSurvives(t *testing.T) {
	const theirs = 0x5
	needTCX(t)
	t.Parallel()
	for _, test := range []struct {
		name, from, to string
	}{{"out", "vethc1", lab.Uplink}, {"in", lab.Uplink, lab.Bridge}} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, lab.Options{})
			// A qdisc: what comes in goes by the bridge, where it is seen.
			tool(t, r.Host, "tc", "qdisc", "add", "dev", "vethc1", "root", "pfifo", "limit", "1000")
			r.attach(t, loader.AttachOptions{Mode: loader.TCX, FastPath: loader.FastPathEstablished})
			// Behind the attach: others on the bridge's egress would take the fast path away.
			marks, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 2})
			if err != nil {
				t.Fatal(err)
			}
			defer marks.Close()
			setter := asm.Instructions{
				asm.StoreImm(asm.R1, skbMark, theirs, asm.Word),
				asm.Mov.Imm(asm.R0, -1), asm.Return(),
			}
			r.foreign(t, test.from, ebpf.AttachTCXIngress, link.Head(), setter)
			r.foreign(t, test.to, ebpf.AttachTCXEgress, link.Tail(), markReader(marks, theirs))

			talks := r.talkAll(t, r.Containers[0], talkPort)
			goOn(talks, false)
			r.mustBeFast(t, talks)
			var seen [2]uint64
			poll(t, "500 packets have passed with their mark", func() bool {
				for i := range seen {
					if err := marks.Lookup(uint32(i), &seen[i]); err != nil {
						t.Fatal(err)
					}
				}
				return seen[0] >= 500
			})
			pause(talks)
			t.Logf("%d packets with their mark, %d with another", seen[0], seen[1])
			if seen[0] < 500 || seen[1] > seen[0]/10 { // ARP and the host's own have none
				t.Errorf("%d packets with their mark, %d with another", seen[0], seen[1])
			}
		})
	}
}

// skbMark is the offset of mark in struct __sk_buff.
const skbMark = 8

// markReader counts packets with exactly that mark, and others.
func markReader(marks *ebpf.Map, want int32) asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, skbMark, asm.Word),
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.JEq.Imm(asm.R2, want, "look"),
		asm.StoreImm(asm.RFP, -4, 1, asm.Word),
		asm.Mov.Reg(asm.R2, asm.RFP).WithSymbol("look"),
		asm.Add.Imm(asm.R2, -4),
		asm.LoadMapPtr(asm.R1, marks.FD()),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Imm(asm.R1, 1),
		asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, 0),
		asm.Mov.Imm(asm.R0, -1).WithSymbol("out"),
		asm.Return(),
	}
}

// foreign puts somebody's program on a hook of the host until the test ends.
func (r *rig) foreign(t *testing.T, device string, hook ebpf.AttachType, anchor link.Anchor, code asm.Instructions) {
	t.Helper()
	index, err := r.Host.Ifindex(device)
	if err != nil {
		t.Fatal(err)
	}
	err = r.Host.Do(func() error {
		program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "Dual BSD/GPL", Instructions: code})
		if err != nil {
			return err
		}
		defer program.Close()
		l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: program, Attach: hook, Anchor: anchor})
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = l.Close() })
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
