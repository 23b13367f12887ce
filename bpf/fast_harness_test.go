package bpf_test

import (
	"fmt"
	"runtime"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
)

// testMark is the bit of the mark that the tests give to redirected packets; hostMark are bits of others.
const (
	testMark = 1 << 20
	hostMark = 0x30
)

// leaseStamps is how long a lease is in force, in stamps: LEASE_STAMPS of lease.h.
const leaseStamps = 1_500_000_000 >> 20

// adjacencyStamps is how long an adjacency that no lease renews is kept: ADJACENCY_STAMPS.
const adjacencyStamps = 10_000_000_000 >> 20

// firstAdjacency is the index of the first one; less in a lease is a reason why there is none.
const firstAdjacency = uint16(bpf.NATUnleasedADJACENCY_FIRST)

// ways are how packets get in and out of a bridge on the fast path.
var ways = []struct {
	name  string
	ports bool // its ports have programs
}{{"ports", true}, {"bridge", false}}

func fromPort() hook {
	return hook{program: bpf.NATProgFromPort, skb: skb{Ifindex: portIf, IngressIfindex: portIf}}
}

// marked answers the hook for packets with this mark.
func (h hook) marked(mark uint32) hook { h.skb.Mark = mark; return h }

// running answers the hook with another program.
func (h hook) running(program string) hook { h.program = program; return h }

// gso answers the hook for packets that will be cut into segments of this much payload.
func (h hook) gso(size, segments uint32) hook {
	h.skb.GSOSize, h.skb.GSOSegs = size, segments
	return h
}

// setFast switches the fast path on, with or without programs on the bridge's ports.
func (d *datapath) setFast(mode bpf.NATFastPath, ports bool) {
	d.Helper()
	d.filled[bpf.NATMapAdjacencies] = true
	d.set(func(c *bpf.NATConfig) { c.FastPath, c.Mark = mode, testMark })
	d.setDevice(bridgeIf, func(dev *bpf.NATDevice) { copy(dev.Mac[:], bridgeMAC.mac) })
	for key := range d.allHalves() { // which are not to wait for a second to go by
		d.changeHalf(goTuple(key), func(h *bpf.NATHalf) { h.Lease = bpf.NATHalf{}.Lease })
	}
	if !ports {
		return
	}
	d.addPort(portIf, containerMAC)
	d.addPort(otherPortIf, otherMAC)
}

// addPort tells the datapath of a port of docker0 with programs and whose it is.
func (d *datapath) addPort(ifindex uint32, owner macs) {
	d.Helper()
	d.secondPasses()
	dev := bpf.NATDevice{
		Class: bpf.NATDeviceClassCLASS_PORT, Attach: bpf.NATAttachKindATTACH_TCX, Flags: bpf.NATDeviceFlagDEVICE_PEER, Bridge: bridgeIf,
	}
	copy(dev.Mac[:], owner.mac)
	d.check(d.Devices.Put(ifindex, dev))
	d.check(d.Ports.Put(portKey(bridgeIf, owner), ifindex))
}

func portKey(bridge uint32, owner macs) bpf.NATPortKey {
	key := bpf.NATPortKey{Bridge: bridge}
	copy(key.Mac[:], owner.mac)
	return key
}

// secondPasses makes the programs ask the host's tables anew: recent.h keeps answers for a second.
func (d *datapath) secondPasses() {
	d.Helper()
	zero(d, d.Senders, make([]bpf.NATSender, ebpf.MustPossibleCPU()))
	zero(d, d.Sources, make([]bpf.NATSource, ebpf.MustPossibleCPU()))
	zero(d, d.Outputs, make([]bpf.NATOutput, ebpf.MustPossibleCPU()))
	zero(d, d.Owns, make([]bpf.NATOwn, ebpf.MustPossibleCPU()))
}

func zero[T any](d *datapath, m *ebpf.Map, empty []T) {
	d.Helper()
	for i := range m.MaxEntries() {
		d.check(m.Put(i, empty))
	}
}

// set changes the settings in force.
func (d *datapath) set(change func(*bpf.NATConfig)) {
	d.Helper()
	c := d.config()
	change(&c)
	d.check(d.Config.Put(uint32(0), c))
}

// setDevice changes what the datapath knows of a device.
func (d *datapath) setDevice(ifindex uint32, change func(*bpf.NATDevice)) {
	d.Helper()
	d.secondPasses()
	var dev bpf.NATDevice
	d.check(d.Devices.Lookup(ifindex, &dev))
	change(&dev)
	d.check(d.Devices.Put(ifindex, dev))
}

// forgetFast takes ports and adjacencies away.
func (d *datapath) forgetFast() {
	d.Helper()
	if !d.filled[bpf.NATMapAdjacencies] {
		return
	}
	d.filled[bpf.NATMapAdjacencies] = false
	clearMap[uint32, bpf.NATDevice](d, d.Devices)
	clearMap[bpf.NATPortKey, uint32](d, d.Ports)
	d.putAdjacencies(make([]bpf.NATAdjacency, d.Adjacencies.MaxEntries()))
}

func (d *datapath) putAdjacencies(all []bpf.NATAdjacency) {
	d.Helper()
	d.secondPasses()
	keys := make([]uint32, len(all))
	for i := range keys {
		keys[i] = uint32(i)
	}
	_, err := d.Adjacencies.BatchUpdate(keys, all, nil)
	d.check(err)
}

// adjacencies answers the whole table, by index.
func (d *datapath) adjacencies() []bpf.NATAdjacency {
	d.Helper()
	all, keys := make([]bpf.NATAdjacency, d.Adjacencies.MaxEntries()), make([]uint32, d.Adjacencies.MaxEntries())
	var at ebpf.MapBatchCursor
	n, err := d.Adjacencies.BatchLookup(&at, keys, all, nil)
	if n != len(all) {
		d.Fatalf("%d adjacencies: %v", n, err)
	}
	return all
}

func (d *datapath) adjacency(index uint16) (a bpf.NATAdjacency) {
	d.Helper()
	d.check(d.Adjacencies.Lookup(uint32(index), &a))
	return a
}

// changeHalf writes a half anew.
func (d *datapath) changeHalf(t tuple, change func(*bpf.NATHalf)) {
	d.Helper()
	h := d.mustHalf(t)
	change(&h)
	d.check(d.Flows.Update(t.nat(), h, ebpf.UpdateExist))
}

// age makes a half's lease this many stamps older.
func (d *datapath) age(t tuple, stamps uint32) {
	d.Helper()
	d.secondPasses()
	d.changeHalf(t, func(h *bpf.NATHalf) { h.Lease.Stamp -= stamps })
}

// now answers the time as the programs read it.
func (d *datapath) now() uint32 {
	d.Helper()
	var ts unix.Timespec
	d.check(unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &ts))
	return uint32(ts.Nano() >> 20)
}

// renew makes both leases of a path begin now: tests may be kept waiting for longer than one lasts.
func (c path) renew() {
	c.Helper()
	for _, key := range []tuple{c.outTuple(), c.inTuple()} {
		c.changeHalf(key, func(h *bpf.NATHalf) {
			if h.Lease.Out < firstAdjacency {
				c.Fatalf("%s has no lease: %d", key, h.Lease.Out)
			}
			h.Lease.Stamp = c.now()
		})
	}
}

// onOneCPU runs a test's part on one CPU: a redirected packet meets the next hook on the CPU it came by.
func (d *datapath) onOneCPU(part func()) {
	d.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, one unix.CPUSet
	d.check(unix.SchedGetaffinity(0, &all))
	for i := range 1024 {
		if all.IsSet(i) {
			one.Set(i)
			break
		}
	}
	d.check(unix.SchedSetaffinity(0, &one))
	defer unix.SchedSetaffinity(0, &all)
	part()
}

// outTuple and inTuple are the keys of the halves that packets of the container and of the world present.
func (c path) outTuple() tuple { return tuple{c.proto, c.inside, c.peer} }
func (c path) inTuple() tuple  { return tuple{c.proto, c.world, c.outside} }

// redirects expects the program to send the packet elsewhere as want, with this mark, counted once.
func (d *datapath) redirects(h hook, in, want packet, mark uint32) {
	d.Helper()
	d.redirectsFrame(h, in.frame(), want.frame(), mark)
}

func (d *datapath) redirectsFrame(h hook, in, want []byte, mark uint32) {
	d.Helper()
	before := d.counts()
	verdict, out, meta := d.runMeta(h, in)
	counted := d.counts().since(before)
	if verdict != redirect {
		d.Fatalf("%s: verdict %d (counted: %s), want it redirected\nin:\n%s", h.program, int32(verdict), counted, describe(in))
	}
	if counted[bpf.NATCounterPACKETS_REDIRECTED] != 1 || len(counted.drops()) != 0 {
		d.Errorf("%s: counted %s, want one redirected", h.program, counted)
	}
	d.sameFrame(want, out)
	if meta.Mark != mark {
		d.Errorf("%s: mark %#x, want %#x", h.program, meta.Mark, mark)
	}
}

// begin opens the flow of a path, with the handshake of TCP done, as the slow path does it.
func (c path) established() path {
	c.Helper()
	c.sends("A", "")
	c.receives("A", "")
	return c
}

// sender is the hook that sees a container's packet first.
func sender(ports bool) hook {
	if ports {
		return fromPort()
	}
	return fromBridge()
}

// leaveMark and enterMark are the marks of packets that are redirected to the uplink, and to a container.
func leaveMark(mark uint32) uint32 { return mark | testMark }
func enterMark(mark uint32, ports bool) uint32 {
	if ports { // it goes straight into the container, which sees no mark of the host's
		return 0
	}
	return mark | testMark
}

// slowly carries a packet of the container the long way, and one of the world: both grant leases.
func (c path) slowly(ports bool) {
	c.Helper()
	sent, _ := c.out("A", "the long way out")
	if ports {
		c.untouched(fromPort(), sent)
	}
	c.carryOut(c.out("A", "the long way out"))
	c.carryIn(c.in("A", "the long way in"))
}

// fastOut and fastIn answer a packet before and after the fast path.
func (c path) fastOut(flags, payload string) (sent, wire packet) {
	sent, wire = c.out(flags, payload)
	return sent, wire.forwarded().between(uplinkMAC, gatewayMAC)
}

func (c path) fastIn(flags, payload string) (wire, seen packet) {
	wire, seen = c.in(flags, payload)
	return wire, seen.forwarded().between(bridgeMAC, containerMAC)
}

// eachPath runs a test on every kind of translation, in TCP and UDP, with leases for both directions.
func eachPath(t *testing.T, test func(c path, ports bool)) {
	d := load(t, 64)
	for _, f := range families {
		for _, p := range []protocol{tcp, udp} {
			for _, tr := range translated {
				for _, way := range ways {
					d.each(fmt.Sprintf("%s/%s/%s/%s", f.name, p.name, tr.name, way.name), func(d *datapath) {
						c := tr.open(d, f, p).established()
						d.setFast(bpf.NATFastPathFAST_PATH_ESTABLISHED, way.ports)
						c.slowly(way.ports)
						test(c, way.ports)
					})
				}
			}
		}
	}
}
