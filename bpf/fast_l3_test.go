package bpf_test

import (
	"testing"

	"tcnat/bpf"
)

// Uplinks without a link header. See l3_test.go for how prog.Run is made to see one.

// l3Path answers a path in UDP or TCP over an uplink without a link header, its flow open.
func l3Path(d *datapath, f family, p protocol) path {
	d.Helper()
	d.check(d.Subnets.Put(subnetKey(f.subnet), bridgeIf))
	d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, first: f.second, last: f.second}}})
	d.setFast(bpf.NATFastPathFAST_PATH_ESTABLISHED, true)
	d.setDevice(uplinkIf, func(dev *bpf.NATDevice) { dev.Flags |= bpf.NATDeviceFlagDEVICE_L3 })
	return d.path(f, p).as(f.second, 0)
}

const l3Payload = "a payload that is long enough for prog.Run"

func (c path) l3Out() hook { return c.addressed(toUplink().running(bpf.NATProgToUplinkL3)) }
func (c path) l3In() hook  { return c.addressed(fromUplink().running(bpf.NATProgFromUplinkL3)) }

func TestFastWithoutEthernet(t *testing.T) {
	d := load(t, 64)
	for _, f := range l3Families {
		for _, p := range []protocol{tcp, udp, udpZero} {
			for _, way := range ways {
				t.Run(f.name+"/"+p.name+"/"+way.name, func(t *testing.T) {
					sub := *d
					d := &sub
					d.TB = t
					d.reset()
					c := l3Path(d, f, p)
					if !way.ports {
						d.check(d.Ports.Delete(portKey(bridgeIf, containerMAC)))
					}
					egress, ingress := c.l3Out(), c.l3In()
					sent, wire := c.out("A", l3Payload)
					for range 2 { // one makes the flow, one is granted a lease
						d.untouched(fromBridge(), sent)
						d.passesBytes(egress, sent.forwarded().ip(), wire.forwarded().ip())
					}
					if a := d.adjacency(c.mustHalf(c.outTuple()).Lease.Out); a.Ifindex != uplinkIf ||
						a.Flags != bpf.NATAdjacencyFlagADJACENCY_L3|bpf.NATAdjacencyFlagADJACENCY_MARK || a.Mtu != 1500 {
						t.Errorf("goes out by %+v", a)
					}
					// redirected, the frame loses its header to the kernel: it is left as it was
					before := c.mustHalf(c.outTuple())
					d.onOneCPU(func() {
						d.redirects(sender(way.ports), sent, wire.forwarded(), leaveMark(0))
						verdict, out, meta := d.runMeta(egress.marked(testMark), wire.forwarded().ip())
						if verdict != unspec || meta.Mark != 0 {
							t.Errorf("redirected: verdict %d, mark %#x", int32(verdict), meta.Mark)
						}
						d.sameBytes(wire.forwarded().ip(), out)
					})
					c.counted(before, c.mustHalf(c.outTuple()), len(wire.ip())) // as to_uplink does

					arrived, seen := c.in("A", l3Payload)
					d.passesBytes(ingress, arrived.ip(), seen.ip())
					d.untouched(toBridge(), seen.forwarded().between(bridgeMAC, containerMAC))
					// not past the bridge, since it came without a header
					if a := d.adjacency(c.mustHalf(c.inTuple()).Lease.Out); a.Ifindex != bridgeIf || a.Flags != bpf.NATAdjacencyFlagADJACENCY_MARK {
						t.Errorf("goes in by %+v", a)
					}
					before = c.mustHalf(c.inTuple())
					verdict, out, meta := d.runMeta(ingress, arrived.ip())
					if verdict != redirect || meta.Mark != testMark {
						t.Fatalf("verdict %d, mark %#x; counted %s", int32(verdict), meta.Mark, d.counts())
					}
					d.sameFrame(seen.forwarded().between(bridgeMAC, containerMAC).frame(), out)
					c.counted(before, c.mustHalf(c.inTuple()), len(arrived.ip()))
				})
			}
		}
	}
}
