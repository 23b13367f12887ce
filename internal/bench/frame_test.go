package bench

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func exampleFrame() frameOptions {
	return frameOptions{
		srcMAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, dstMAC: net.HardwareAddr{2, 0, 0, 0, 0, 2},
		src: netip.MustParseAddr("172.17.0.2"), dst: netip.MustParseAddr("203.0.113.1"),
	}
}

// TestFramesHaveTheirChecksums sums whole frames up, as a receiver does.
func TestFramesHaveTheirChecksums(t *testing.T) {
	for _, tc := range []struct {
		name  string
		flags byte
	}{{"udp", 0}, {"tcp", tcpSYN}, {"tcp ack", tcpACK}} {
		t.Run(tc.name, func(t *testing.T) {
			o := exampleFrame()
			o.tcpFlags = tc.flags
			template := newTemplate(o)
			for _, ports := range [][2]uint16{{1, 1}, {32768, 9000}, {65535, 65535}, {42767, 53}} {
				frame := template.bytes[vnetSize:]
				template.fill(frame, ports[0], ports[1])
				if sum := fold(sumWords(0, frame[ethernetSize:atPorts])); sum != 0xffff {
					t.Errorf("IP header sums up to %#x", sum)
				}
				segment := frame[atPorts:]
				sum := fold(sumWords(pseudoSum(o.src, o.dst, frame[ethernetSize+9], len(segment)), segment))
				if sum != 0xffff {
					t.Errorf("ports %v: segment sums up to %#x", ports, sum)
				}
				if got := [2]uint16{binary.BigEndian.Uint16(segment), binary.BigEndian.Uint16(segment[2:])}; got != ports {
					t.Errorf("ports are %v, want %v", got, ports)
				}
			}
		})
	}
}

func TestPartialFramesLeaveTheSumToTheDevice(t *testing.T) {
	o := exampleFrame()
	o.partial = true
	template := newTemplate(o)
	frame := template.bytes[vnetSize:]
	template.fill(frame, 40000, 9000)
	if template.bytes[0] != vnetNeedsChecksum {
		t.Errorf("flags are %#x", template.bytes[0])
	}
	start, offset := binary.NativeEndian.Uint16(template.bytes[6:]), binary.NativeEndian.Uint16(template.bytes[8:])
	if start != atPorts || start+offset != atUDPSum {
		t.Errorf("checksum from %d to be put at %d", start, start+offset)
	}
	want := fold(pseudoSum(o.src, o.dst, 17, len(frame)-atPorts))
	if got := binary.BigEndian.Uint16(frame[atUDPSum:]); got != want {
		t.Errorf("field holds %#x, want the pseudo header's %#x", got, want)
	}
}

func TestEveryPairOfPortsComesOnce(t *testing.T) {
	pairs := portPairs{src: portSet{first: 100, step: 3, n: 4}, dst: portSet{first: 7, step: 1, n: 3}}
	seen := map[[2]uint16]int{}
	for range pairs.size() {
		sport, dport := pairs.next()
		seen[[2]uint16{sport, dport}]++
	}
	if len(seen) != 12 {
		t.Errorf("%d pairs of 12", len(seen))
	}
	if sport, dport := pairs.next(); sport != 100 || dport != 7 {
		t.Errorf("begins anew with %d, %d", sport, dport)
	}
}

func TestSpreadGivesEachPortToOneContainer(t *testing.T) {
	for _, tc := range []struct{ ports, containers, sets int }{{1, 16, 1}, {10_000, 16, 16}, {10, 3, 3}} {
		sets := spread(firstSource, tc.ports, tc.containers)
		if len(sets) != tc.sets {
			t.Errorf("%+v: %d sets", tc, len(sets))
		}
		seen := map[uint16]bool{}
		for _, set := range sets {
			for i := range set.n {
				seen[set.at(i)] = true
			}
		}
		if len(seen) != tc.ports || !seen[firstSource] || !seen[firstSource+uint16(tc.ports)-1] {
			t.Errorf("%+v: %d ports", tc, len(seen))
		}
	}
}

func TestPublishingEndsWithTheMatch(t *testing.T) {
	rules := publishing{rules: 100_000, match: matchPort}.list()
	seen := map[published]bool{}
	for _, rule := range rules {
		seen[rule] = true
	}
	if len(rules) != 100_000 || len(seen) != len(rules) {
		t.Errorf("%d rules, %d of them different", len(rules), len(seen))
	}
	want := published{protocol: wordUDP, first: matchPort, last: matchPort}
	if diff := cmp.Diff(want, rules[len(rules)-1], cmp.AllowUnexported(published{}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}
