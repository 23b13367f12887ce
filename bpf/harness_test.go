package bpf_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"

	"tcnat/bpf"
)

// Verdicts of a TC program as prog.Run answers them.
const (
	unspec   uint32 = 0xffffffff
	shot     uint32 = 2
	redirect uint32 = 7 // which prog.Run does not carry out
)

// testChecksumComplete is BPF_F_TEST_SKB_CHECKSUM_COMPLETE: the kernel fails the run with
// EBADMSG when the program left skb->csum wrong.
const testChecksumComplete = 1 << 2

// datapath is the loaded datapath on the test host.
type datapath struct {
	testing.TB
	bpf.NATMaps
	programs map[string]*ebpf.Program
	complete bool // run with CHECKSUM_COMPLETE
	rules    ruleSet
	filled   map[string]bool // rule maps, and adjacencies, that are not empty
}

// skb is what a test says of a packet's metadata; the layout is that of struct __sk_buff.
type skb struct {
	_              [2]uint32
	Mark           uint32
	_              [5]uint32
	Priority       uint32
	IngressIfindex uint32
	Ifindex        uint32
	_              uint32
	Cb             [5]uint32
	_              [3]uint32 // hash to data
	DataEnd        uint32    // of the packet's first piece; 0: it is in one
	_              [15]uint32
	_              uint64
	_              uint64 // tstamp
	_              uint32 // wire_len
	GSOSegs        uint32
	_              uint64
	GSOSize        uint32
	_              uint32
	_              uint64
}

// hook is a place where a program sees packets.
type hook struct {
	program string
	skb     skb
	instead *ebpf.Program // runs the program after something else
}

// on and by answer the hook at another device, and for a packet that came in by another.
func (h hook) on(ifindex uint32) hook { h.skb.Ifindex = ifindex; return h }
func (h hook) by(ifindex uint32) hook { h.skb.IngressIfindex = ifindex; return h }

func fromBridge() hook {
	return hook{program: bpf.NATProgFromBridge, skb: skb{Ifindex: bridgeIf, IngressIfindex: bridgeIf}}
}
func toUplink() hook {
	return hook{program: bpf.NATProgToUplink, skb: skb{Ifindex: uplinkIf, IngressIfindex: bridgeIf}}
}
func fromUplink() hook {
	return hook{program: bpf.NATProgFromUplink, skb: skb{Ifindex: uplinkIf, IngressIfindex: uplinkIf}}
}
func toBridge() hook {
	return hook{program: bpf.NATProgToBridge, skb: skb{Ifindex: bridgeIf, IngressIfindex: uplinkIf}}
}

// natSpec answers the object, read once; copy it before a change.
var natSpec = sync.OnceValue(func() *ebpf.CollectionSpec {
	spec, err := bpf.LoadNAT()
	must(err)
	return spec
})

// places are as many as one outside address has ports.
const places = 1 << 16

// load loads the programs with room for maxFlows flows, live, with two bridges and one uplink.
func load(t testing.TB, maxFlows uint32) *datapath {
	t.Helper()
	return loadPlaces(t, maxFlows, places)
}

// loadPlaces is load with a table of so many places for mappings.
func loadPlaces(t testing.TB, maxFlows, places uint32) *datapath {
	t.Helper()
	spec := natSpec().Copy()
	spec.Maps[bpf.NATMapFlows].MaxEntries = 2 * maxFlows
	spec.Maps[bpf.NATMapMappings].MaxEntries = places
	spec.Maps[bpf.NATMapMovedPorts].MaxEntries = maxFlows
	spec.Maps[bpf.NATMapExpiryQueue].MaxEntries = max(1024, maxFlows+maxFlows/4)
	c, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	d := &datapath{TB: t, programs: c.Programs, filled: make(map[string]bool)}
	t.Cleanup(func() {
		_ = d.Close()
		c.Close()
	})
	if err := c.Assign(&d.NATMaps); err != nil {
		t.Fatal(err)
	}
	d.reset()
	return d
}

// each runs a test with and without CHECKSUM_COMPLETE, each time on empty tables.
func (d *datapath) each(name string, test func(d *datapath)) {
	d.TB.Helper()
	for _, complete := range []bool{false, true} {
		sub := *d
		sub.complete = complete
		label := name + "/plain"
		if complete {
			label = name + "/complete"
		}
		d.TB.(*testing.T).Run(label, func(t *testing.T) {
			sub.TB = t
			sub.reset()
			test(&sub)
		})
	}
}

// reset empties every table and puts the test host's settings back.
func (d *datapath) reset() {
	d.Helper()
	d.configure(nil)
	d.setRules(ruleSet{})
	d.forget()
	d.forgetFast()
	d.forgetFragments()
	clearMap[uint32, uint64](d, d.Unmanaged)
	for i := range uint32(bpf.NATCounterCOUNTER_COUNT) {
		d.check(d.Counters.Put(i, make([]uint64, ebpf.MustPossibleCPU())))
	}
	for _, dev := range []struct {
		ifindex uint32
		class   bpf.NATDeviceClass
	}{
		{bridgeIf, bpf.NATDeviceClassCLASS_BRIDGE}, {bridge2If, bpf.NATDeviceClassCLASS_BRIDGE},
		{uplinkIf, bpf.NATDeviceClassCLASS_UPLINK},
	} {
		d.check(d.Devices.Put(dev.ifindex, bpf.NATDevice{Class: dev.class, Attach: bpf.NATAttachKindATTACH_TCX}))
	}
	for _, f := range families {
		d.check(d.Subnets.Put(subnetKey(f.subnet), bridgeIf))
		d.check(d.Subnets.Put(subnetKey(f.subnet2), bridge2If))
		for _, own := range []netip.Addr{f.bridge, f.bridge2, f.uplink, f.second} {
			d.check(d.HostAddresses.Put(natAddr(own), uint32(0)))
		}
	}
}

// forget takes every flow away.
func (d *datapath) forget() {
	d.Helper()
	clearMap[bpf.NATTuple, bpf.NATHalf](d, d.Flows)
	for place := range d.mappings() {
		d.check(d.Mappings.Put(place, bpf.NATMapping{}))
	}
	clearMap[bpf.NATEndpoint, bpf.NATMovedPort](d, d.MovedPorts)
	d.secondPasses()
	var e bpf.NATExpiryEntry
	for d.ExpiryQueue.LookupAndDelete(nil, &e) == nil {
	}
}

// clearMap deletes every element of a map.
func clearMap[K comparable, V any](d *datapath, m *ebpf.Map) {
	d.Helper()
	for k := range elements[K, V](d, m) {
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			d.Fatal(err)
		}
	}
}

func elements[K comparable, V any](d *datapath, m *ebpf.Map) map[K]V {
	d.Helper()
	for {
		all := make(map[K]V)
		var k K
		var v V
		it := m.Iterate()
		for it.Next(&k, &v) {
			all[k] = v
		}
		if errors.Is(it.Err(), ebpf.ErrIterationAborted) {
			continue // the expiry deletes as we read
		}
		d.check(it.Err())
		return all
	}
}

// configure sets the settings that most tests have, changed by change.
func (d *datapath) configure(change func(*bpf.NATConfig)) {
	d.Helper()
	c := bpf.NATConfig{Live: 1, Secret: [2]uint64{0x0123456789abcdef, 0xfedcba9876543210}, MaxFlows: d.Flows.MaxEntries() / 2}
	for i, seconds := range []uint32{7440, 240, 30, 300, 120, 30, 60} {
		c.Timeout[i] = uint32(uint64(seconds) * 1e9 >> 20)
	}
	c.Rules = d.config().Rules
	if change != nil {
		change(&c)
	}
	d.check(d.Config.Put(uint32(0), c))
}

// config answers the settings in force.
func (d *datapath) config() (c bpf.NATConfig) {
	d.Helper()
	d.check(d.Config.Lookup(uint32(0), &c))
	return c
}

func (d *datapath) check(err error) {
	d.Helper()
	if err != nil {
		d.Fatal(err)
	}
}

// run runs a hook's program once on a frame and answers its verdict and what it made of it.
func (d *datapath) run(h hook, frame []byte) (uint32, []byte) {
	d.Helper()
	verdict, out, _ := d.runMeta(h, frame)
	return verdict, out
}

// runMeta is run that answers the packet's metadata as well.
func (d *datapath) runMeta(h hook, frame []byte) (uint32, []byte, skb) {
	d.Helper()
	var after skb
	opts := &ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256), Context: h.skb, ContextOut: &after}
	if d.complete {
		opts.Flags = testChecksumComplete
	}
	program := d.programs[h.program]
	if h.instead != nil {
		program = h.instead
	}
	verdict, err := program.Run(opts)
	if err != nil {
		d.Fatalf("%s: %v\n%s", h.program, err, describe(frame))
	}
	return verdict, opts.DataOut, after
}

// passes expects the program to pass the packet on as want.
func (d *datapath) passes(h hook, in, want packet) {
	d.Helper()
	d.passesFrame(h, in.frame(), want.frame())
}

// untouched expects the program to pass the packet on as it is.
func (d *datapath) untouched(h hook, in packet) {
	d.Helper()
	d.passes(h, in, in)
}

// turns expects the program to send the packet into the same device once more as want, and to pass it on then.
func (d *datapath) turns(h hook, in, want packet) {
	d.Helper()
	d.leavesFrame(h, in.frame(), want.frame(), redirect)
	d.untouched(h, want)
}

func (d *datapath) passesFrame(h hook, in, want []byte) {
	d.Helper()
	d.leavesFrame(h, in, want, unspec)
}

func (d *datapath) leavesFrame(h hook, in, want []byte, wantVerdict uint32) {
	d.Helper()
	before := d.counts()
	verdict, out := d.run(h, in)
	if verdict != wantVerdict {
		d.Fatalf("%s: verdict %d (counted: %s), want %d\nin:\n%s", h.program, int32(verdict), d.counts().since(before), int32(wantVerdict), describe(in))
	}
	if !bytes.Equal(want, out) {
		d.Fatalf("%s: packet differs (-want +got; counted: %s):\n%s",
			h.program, d.counts().since(before), cmp.Diff(describe(want), describe(out)))
	}
}

// drops expects the program to drop the packet for this reason and to count that once.
func (d *datapath) drops(h hook, in packet, reason bpf.NATCounter) {
	d.Helper()
	d.dropsFrame(h, in.frame(), reason)
}

func (d *datapath) dropsFrame(h hook, in []byte, reason bpf.NATCounter) {
	d.Helper()
	before := d.counts()
	verdict, out := d.run(h, in)
	counted := d.counts().since(before)
	if verdict != shot {
		d.Fatalf("%s: verdict %d, want a drop %s (counted: %s)\nin:\n%s\nout:\n%s",
			h.program, int32(verdict), counterName()(reason), counted, describe(in), describe(out))
	}
	if got := counted.drops(); !maps.Equal(got, counts{reason: 1}) {
		d.Fatalf("%s: counted drops %s, want %s once\nin:\n%s", h.program, got, counterName()(reason), describe(in))
	}
}

// counts is what the counters say, without those that are 0.
type counts map[bpf.NATCounter]uint64

func (d *datapath) counts() counts {
	d.Helper()
	c := make(counts)
	for i := range bpf.NATCounterCOUNTER_COUNT {
		var perCPU []uint64
		d.check(d.Counters.Lookup(uint32(i), &perCPU))
		for _, n := range perCPU {
			if n > 0 {
				c[i] += n
			}
		}
	}
	return c
}

func (c counts) since(before counts) counts {
	diff := make(counts)
	for k, n := range c {
		if n != before[k] {
			diff[k] = n - before[k]
		}
	}
	return diff
}

func (c counts) drops() counts {
	drops := maps.Clone(c)
	maps.DeleteFunc(drops, func(k bpf.NATCounter, _ uint64) bool { return k >= bpf.NATCounterDROP_END })
	return drops
}

func (c counts) String() string {
	if len(c) == 0 {
		return "nothing"
	}
	var s string
	for _, k := range slices.Sorted(maps.Keys(c)) {
		s += fmt.Sprintf("%s %d ", counterName()(k), c[k])
	}
	return s[:len(s)-1]
}

// counterName answers a counter's name in abi.h.
var counterName = sync.OnceValue(func() func(bpf.NATCounter) string {
	names := make(map[bpf.NATCounter]string)
	var enum *btf.Enum
	must(natSpec().Types.TypeByName("counter", &enum))
	for _, v := range enum.Values {
		names[bpf.NATCounter(v.Value)] = v.Name
	}
	return func(c bpf.NATCounter) string { return names[c] }
})

// Conversions to what the maps hold: addresses in network order, read as native words.
func natAddr(a netip.Addr) (n bpf.NATAddr) {
	b := a.As16()
	for i := range n.Word {
		n.Word[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return n
}

func goAddr(n bpf.NATAddr, f bpf.NATFamily) netip.Addr {
	var b [16]byte
	for i, word := range n.Word {
		binary.NativeEndian.PutUint32(b[4*i:], word)
	}
	if f == bpf.NATFamilyFAMILY_IPV4 {
		return netip.AddrFrom16(b).Unmap()
	}
	return netip.AddrFrom16(b)
}

// be16 swaps between a port and its big-endian form.
func be16(port uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, port))
}

// prefixBits answers a prefix's length over 128 bits.
func prefixBits(p netip.Prefix) uint32 {
	if p.Addr().Is4() {
		return uint32(p.Bits()) + 96
	}
	return uint32(p.Bits())
}

func subnetKey(p netip.Prefix) bpf.NATSubnetKey {
	return bpf.NATSubnetKey{Prefixlen: prefixBits(p), Addr: natAddr(p.Addr())}
}
