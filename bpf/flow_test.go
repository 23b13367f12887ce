package bpf_test

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
)

// tuple is one direction of a conversation, comparable and readable.
type tuple struct {
	proto    uint8
	src, dst netip.AddrPort
}

func (t tuple) inverse() tuple { return tuple{t.proto, t.dst, t.src} }

func (t tuple) String() string { return fmt.Sprintf("%d %s -> %s", t.proto, t.src, t.dst) }

// of answers the tuple of a packet's own headers.
func (p packet) tuple() tuple { return tuple{p.proto, p.src, p.dst} }

func (t tuple) nat() bpf.NATTuple {
	n := bpf.NATTuple{
		Src: natAddr(t.src.Addr()), Dst: natAddr(t.dst.Addr()), Sport: be16(t.src.Port()), Dport: be16(t.dst.Port()),
		Family: bpf.NATFamilyFAMILY_IPV4, Proto: t.proto,
	}
	if t.src.Addr().Is6() {
		n.Family = bpf.NATFamilyFAMILY_IPV6
	}
	return n
}

func goTuple(n bpf.NATTuple) tuple {
	return tuple{n.Proto, at(goAddr(n.Src, n.Family), be16(n.Sport)), at(goAddr(n.Dst, n.Family), be16(n.Dport))}
}

// half looks one direction of a flow up.
func (d *datapath) half(t tuple) (bpf.NATHalf, bool) {
	d.Helper()
	var h bpf.NATHalf
	err := d.Flows.Lookup(t.nat(), &h)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return h, false
	}
	d.check(err)
	return h, true
}

// mustHalf looks one direction of a flow up that must be there.
func (d *datapath) mustHalf(t tuple) bpf.NATHalf {
	d.Helper()
	h, ok := d.half(t)
	if !ok {
		d.Fatalf("no half %s; there are:\n%s", t, d.allFlows())
	}
	return h
}

func (d *datapath) allFlows() (s string) {
	d.Helper()
	for k, v := range elements[bpf.NATTuple, bpf.NATHalf](d, d.Flows) {
		s += fmt.Sprintf("%s: other %s, id %d, role %d, packets %d\n", goTuple(k), goTuple(v.Other), v.Standing.Id, v.Role, v.Packets)
	}
	return s
}

// allHalves answers every half, as the map holds them.
func (d *datapath) allHalves() map[bpf.NATTuple]bpf.NATHalf {
	d.Helper()
	return elements[bpf.NATTuple, bpf.NATHalf](d, d.Flows)
}

func equalHalves(a, b map[bpf.NATTuple]bpf.NATHalf) bool { return maps.Equal(a, b) }

// halves answers how many halves there are.
func (d *datapath) halves() int {
	d.Helper()
	return len(d.allHalves())
}

// endFlow ends the flow whose reply tuple is claim, as flush does, and answers whether
// it was there.
func (d *datapath) endFlow(claim tuple, id uint32) bool {
	d.Helper()
	p := d.programs["end_flow"]
	if p == nil {
		d.Fatal("no program end_flow")
	}
	ret, err := p.Run(&ebpf.RunOptions{Context: bpf.NATExpiryEntry{Claim: claim.nat(), Id: id}})
	d.check(err)
	return ret == 0
}

// wantFlow is what the two halves of a flow must say.
type wantFlow struct {
	original, reply  tuple
	translation      bpf.NATTranslation
	rule             uint32
	out, in          uint64 // packets of the original and of the reply direction
	outTCP, inTCP    bpf.NATTcpSeen
	originalIf, back uint32 // ifindex that may present either; 0: any of the class
	inbound          bool   // presented by an uplink
}

// checkFlow compares a flow's halves with what they must be.
func (d *datapath) checkFlow(want wantFlow) {
	d.Helper()
	o, r := d.mustHalf(want.original), d.mustHalf(want.reply)
	if o.Standing.Id != r.Standing.Id {
		d.Errorf("ids of the halves differ: %d, %d", o.Standing.Id, r.Standing.Id)
	}
	asks, answers := bpf.NATDeviceClassCLASS_BRIDGE, bpf.NATDeviceClassCLASS_UPLINK
	if want.inbound {
		asks, answers = answers, asks
	}
	type facts struct {
		Other       tuple
		Role        bpf.NATRole
		Class       bpf.NATDeviceClass
		Ifindex     uint32
		Translation bpf.NATTranslation
		Rule        uint32
		Packets     uint64
		TCP         bpf.NATTcpSeen
		Life        bpf.NATLife
	}
	see := func(h bpf.NATHalf) facts {
		return facts{goTuple(h.Other), h.Role, h.Class, h.Ifindex, h.Translation, h.Rule, h.Packets, h.Tcp, h.Standing.Life}
	}
	wantO := facts{want.reply, bpf.NATRoleROLE_ORIGINAL, asks, want.originalIf, want.translation, want.rule, want.out, want.outTCP, bpf.NATLifeLIFE_ORIGINAL}
	wantR := facts{want.original, bpf.NATRoleROLE_REPLY, answers, want.back, want.translation, want.rule, want.in, want.inTCP, bpf.NATLifeLIFE_LIVE}
	if got := see(o); got != wantO {
		d.Errorf("original half %s:\n got %+v\nwant %+v", want.original, got, wantO)
	}
	if got := see(r); got != wantR {
		d.Errorf("reply half %s:\n got %+v\nwant %+v", want.reply, got, wantR)
	}
}
