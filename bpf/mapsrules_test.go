package bpf_test

import (
	"net/netip"
	"testing"

	"tcnat/bpf"
	"tcnat/maps"
)

// The programs read what package maps writes: the tables of outgoing and incoming lives
// again, with the settings, devices, subnets and rules put in force by it. Elsewhere the
// tests fill maps by hand, so that a fault is found on the right side.
func TestPackageMaps(t *testing.T) {
	d := load(t, 1024)
	s := maps.New(&d.NATMaps)
	for _, f := range families {
		for _, o := range outgoings {
			t.Run("out/"+f.name+"/"+o.name, func(t *testing.T) {
				d := d.fresh(t, s, o.configure)
				id := d.put(s, ruleSet{snat: o.rule(f)})[0]
				c := d.path(f, udp).choose(o.addresses(f), o.ports)
				if !o.ruled {
					id = 0
				}
				c.live(false, c.flow(false, o.translation, id))
				d.listed(s, c, false)
			})
		}
		for _, in := range incomings {
			t.Run("in/"+f.name+"/"+in.name, func(t *testing.T) {
				d := d.fresh(t, s, in.configure)
				rules := in.rule(f, protoUDP)
				id, translation, address := uint32(0), bpf.NATTranslationTRANSLATION_IDENTITY, f.container
				if ids := d.put(s, ruleSet{dnat: rules}); !in.direct {
					id, translation, address = ids[in.matching], bpf.NATTranslationTRANSLATION_DNAT, f.uplink
				}
				c := d.path(f, udp)
				c.inside, c.outside = at(f.container, in.port), at(address, in.published)
				c.live(true, c.flow(true, translation, id))
				d.listed(s, c, true)
			})
		}
	}
}

// fresh answers the datapath for a sub-test, without flows, its settings put by package maps.
func (d *datapath) fresh(t *testing.T, s *maps.State, configure func(*bpf.NATConfig)) *datapath {
	t.Helper()
	sub := *d
	sub.TB = t
	sub.forget()
	var raw bpf.NATConfig
	if configure != nil {
		configure(&raw)
	}
	sub.check(s.SetConfig(maps.Config{
		Live: true, MaxFlows: 1024, Timeouts: maps.DefaultTimeouts(),
		Routed:      raw.Flags&bpf.NATConfigFlagCONFIG_ROUTED != 0,
		AllowDirect: raw.Flags&bpf.NATConfigFlagCONFIG_ALLOW_DIRECT != 0,
	}))
	subnets := make(map[netip.Prefix]uint32)
	for _, f := range families {
		subnets[f.subnet], subnets[f.subnet2] = bridgeIf, bridge2If
	}
	sub.check(s.SetSubnets(nil))
	sub.check(s.SetSubnets(subnets))
	sub.check(s.SetDevice(maps.Device{Ifindex: bridgeIf, Class: maps.Bridge, Attach: maps.AttachTCX}))
	sub.check(s.SetDevice(maps.Device{Ifindex: uplinkIf, Class: maps.Uplink, Attach: maps.AttachTCX}))
	return &sub
}

// put puts rules in force by package maps and answers their ids, in order.
func (d *datapath) put(s *maps.State, rules ruleSet) (ids []uint32) {
	d.Helper()
	var want maps.Rules
	for _, r := range rules.snat {
		want.SNAT = append(want.SNAT, maps.SNATRule{
			Source: r.source, Uplink: r.uplink, Masquerade: r.masquerade, ToFirst: r.first, ToLast: r.last,
			Ports: maps.PortRange{First: r.ports.first, Last: r.ports.last}, Except: r.except,
		})
	}
	for _, r := range rules.dnat {
		want.DNAT = append(want.DNAT, maps.DNATRule{
			Protocol: maps.Protocol(r.proto), Destination: r.destination, Ingress: r.ingress,
			Ports: maps.PortRange{First: r.ports.first, Last: r.ports.last}, To: r.to,
			ToPorts: maps.PortRange{First: r.toPorts.first, Last: r.toPorts.last}, Allow: r.allow,
		})
	}
	d.check(s.SetRules(want))
	got, err := s.Rules()
	d.check(err)
	for _, w := range want.SNAT {
		for _, g := range got.SNAT {
			if g.Source == w.Source && g.Uplink == w.Uplink {
				ids = append(ids, g.ID)
			}
		}
	}
	for _, w := range want.DNAT {
		for _, g := range got.DNAT {
			if g.Destination == w.Destination && g.Ingress == w.Ingress && g.Ports == w.Ports && g.Protocol == w.Protocol {
				ids = append(ids, g.ID)
			}
		}
	}
	if len(ids) != len(want.SNAT)+len(want.DNAT) {
		d.Fatalf("put %+v, read %+v", want, got)
	}
	return append(ids, 0)
}

// listed expects package maps to list the path's flow as the only one.
func (d *datapath) listed(s *maps.State, c path, inbound bool) {
	d.Helper()
	flows, unpaired, err := s.Flows()
	d.check(err)
	if len(flows) != 1 || unpaired != 0 {
		d.Fatalf("%d flows and %d unpaired halves, want one flow", len(flows), unpaired)
	}
	original, reply := c.tuples(inbound)
	is := func(m maps.Tuple, t tuple) bool {
		return uint8(m.Protocol) == t.proto && m.Src == t.src && m.Dst == t.dst
	}
	if f := flows[0]; !is(f.Original, original) || !is(f.Reply, reply) || f.Out.Packets != 2 || f.In.Packets != 2 {
		d.Errorf("listed as %+v, want %s and %s with 2 packets each", f, original, reply)
	}
}
