package loader

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"tcnat/maps"
)

// port is a port of a managed bridge, with what the host says of it.
type port struct {
	device
	bridge string

	// trusted: the container's own device told its address, not the frames that it sends.
	trusted bool

	// Why it has no fast path, and why packets cannot go straight into the container.
	slow, noPeer string
}

// listPorts finds the ports of these bridges, by index. What their hooks say comes later.
func listPorts(nl *netlink.Handle, bridges map[uint32]string) ([]port, error) {
	if len(bridges) == 0 {
		return nil, nil
	}
	links, err := listRTLinks()
	if err != nil {
		return nil, err
	}
	filtering := make(map[int]bool)
	for _, link := range links {
		filtering[link.index] = link.vlanFiltering
	}
	var ports []port
	for _, link := range links {
		name, managed := bridges[uint32(link.master)]
		if !managed {
			continue
		}
		p := port{bridge: name, device: device{name: link.name, Device: maps.Device{
			Ifindex: uint32(link.index), Class: maps.Port, Bridge: uint32(link.master),
		}}}
		p.describe(link, filtering[link.master])
		ports = append(ports, p)
	}
	if err := assignLearned(nl, ports); err != nil {
		return nil, err
	}
	slices.SortFunc(ports, func(a, b port) int { return cmp.Compare(a.Ifindex, b.Ifindex) })
	return ports, nil
}

// describe asks who is behind the port. Reasons are for people, the first one found is given.
func (p *port) describe(link rtLink, vlanFiltering bool) {
	switch {
	case vlanFiltering:
		p.slow = "its bridge filters by VLAN"
	case link.isolated:
		p.slow = "it is an isolated port"
	case link.locked:
		p.slow = "it is a locked port"
	case link.noLearning:
		p.slow = "its bridge does not learn from it"
	}
	switch {
	case link.kind != "veth":
		p.noPeer = "it is no veth"
		return
	case link.peerNetns < 0:
		p.noPeer = "its other end is in this network namespace"
		return
	}
	peer, err := peerLink(link)
	switch {
	case err != nil:
		p.noPeer = fmt.Sprintf("its other end cannot be asked: %v", err)
		return
	case peer.xdp:
		p.noPeer = "an XDP program runs on its other end"
	case link.qdisc != "noqueue":
		p.noPeer = "its egress has the qdisc " + link.qdisc
	}
	p.MAC, p.trusted = peer.mac, true
}

// assignLearned falls back on the bridges' own tables.
func assignLearned(nl *netlink.Handle, ports []port) error {
	if !slices.ContainsFunc(ports, func(p port) bool { return !p.trusted }) {
		return nil
	}
	addresses, err := learned(nl)
	if err != nil {
		return err
	}
	for i := range ports {
		if p := &ports[i]; !p.trusted {
			p.MAC = addresses[p.index()]
		}
	}
	return nil
}

// owners says which port owns which address. One that two ports have is whose it was before,
// as long as that still has it, and else nobody's: who comes second may be forging it.
func owners(ports []port, before map[maps.PortKey]uint32, hostMACs map[uint32]maps.MAC) map[maps.PortKey]uint32 {
	claims := make(map[maps.PortKey][]*port)
	for i := range ports {
		p := &ports[i]
		if p.MAC == (maps.MAC{}) || p.MAC[0]&1 != 0 || p.MAC == hostMACs[p.Bridge] {
			continue
		}
		key := maps.PortKey{Bridge: p.Bridge, MAC: p.MAC}
		claims[key] = append(claims[key], p)
	}
	owned := make(map[maps.PortKey]uint32)
	for key, list := range claims {
		if trusted := only(list, func(p *port) bool { return p.trusted }); len(trusted) > 0 {
			list = trusted
		}
		if first := only(list, func(p *port) bool { return p.Ifindex == before[key] }); len(first) == 1 {
			list = first
		}
		if len(list) == 1 {
			owned[key] = list[0].Ifindex
		}
	}
	return owned
}

func only(list []*port, want func(*port) bool) []*port {
	return slices.DeleteFunc(slices.Clone(list), func(p *port) bool { return !want(p) })
}

// settle sets the flags and addresses that the datapath is told, once it is known who owns what.
func settle(ports []port, owned map[maps.PortKey]uint32) {
	for i := range ports {
		p := &ports[i]
		if owner, ok := owned[maps.PortKey{Bridge: p.Bridge, MAC: p.MAC}]; !ok || owner != p.Ifindex {
			reason := "its container's address is not known"
			if p.MAC != (maps.MAC{}) {
				reason = fmt.Sprintf("its container's address %s is another's too", p.MAC)
			}
			p.noPeer = cmp.Or(p.noPeer, reason)
			p.MAC = maps.MAC{}
		}
		p.Slow, p.Peer = p.slow != "", p.slow == "" && p.noPeer == ""
	}
}

// skipped are the programs and filters of others that a packet on the fast path does not meet, or
// meets with other addresses than in the slow path.
func skipped(d device, ingress, egress HookStatus) []string {
	switch d.Class {
	case maps.Bridge:
		// from a port, and into one, packets go past it
		return slices.Concat(ingress.Before, ingress.After, egress.Before, egress.After)
	case maps.Uplink:
		return slices.Concat(ingress.After, egress.Before)
	default:
		return ingress.After
	}
}

// skippedText says in words why the device has no fast path, "" if it has.
func skippedText(d device, ingress, egress HookStatus) string {
	others := skipped(d, ingress, egress)
	if len(others) == 0 {
		return ""
	}
	return "packets would go past " + strings.Join(others, ", ")
}

// judge finds what others have on the hooks of a device.
func (c *clsact) judge(d device, ids map[string]uint32) (ingress, egress HookStatus, err error) {
	for _, h := range d.hooks() {
		status, err := c.hookStatus(d, h, ids[h.program])
		if err != nil {
			return ingress, egress, err
		}
		if h.ingress {
			ingress = status
		} else {
			egress = status
		}
	}
	return ingress, egress, nil
}

// look adds to ports what their hooks say; the answer is the status of each one's ingress.
func (c *clsact) look(ports []port, ids map[string]uint32) (map[uint32]HookStatus, error) {
	hooks := make(map[uint32]HookStatus, len(ports))
	for i := range ports {
		p := &ports[i]
		ingress, _, err := c.judge(p.device, ids)
		if err != nil {
			return nil, err
		}
		hooks[p.Ifindex] = ingress
		p.slow = cmp.Or(p.slow, skippedText(p.device, ingress, HookStatus{}))
		if p.noPeer != "" {
			continue
		}
		egress, err := c.hookStatus(p.device, hook{ingress: false}, 0)
		if err != nil {
			return nil, err
		}
		if others := slices.Concat(egress.Before, egress.After); len(others) > 0 {
			p.noPeer = "its egress has " + strings.Join(others, ", ")
		}
	}
	return hooks, nil
}

// bridgeMACs are the host's own addresses on these bridges.
func bridgeMACs(links []netlink.Link) map[uint32]maps.MAC {
	addresses := make(map[uint32]maps.MAC)
	for _, link := range links {
		if address := link.Attrs().HardwareAddr; link.Type() == "bridge" && len(address) == 6 {
			addresses[uint32(link.Attrs().Index)] = maps.MAC(address)
		}
	}
	return addresses
}

// reconcilePorts brings the ports of the bridges up to date: each gets the program and what the
// datapath must know, those that are gone are forgotten. A port that goes while this runs is no
// error: its container has just ended.
func (c *connector) reconcilePorts(bridges []device, undos *[]func() error) error {
	if err := c.pins.forgetQdiscs(ifnames(c.links)); err != nil {
		return err
	}
	names := make(map[uint32]string)
	for _, d := range bridges {
		if d.Class == maps.Bridge && !c.opts.NoPorts {
			names[d.Ifindex] = d.name
		}
	}
	ports, err := listPorts(c.nl, names)
	if err != nil {
		return err
	}
	before, err := c.state.Ports()
	if err != nil {
		return err
	}
	have, err := c.knownPorts(ports, before)
	if err != nil {
		return err
	}
	*undos = append(*undos, func() error { return c.state.SetPorts(c.alive(before)) })
	attach := c.portMode(len(ports) - len(have))
	var connected []port
	for _, p := range ports {
		entry, attached := have[p.Ifindex]
		p.device, err = attach.connectPort(p.device, entry, attached, undos)
		if err != nil && c.vanished(p.device) {
			c.log.Debug("port has gone meanwhile", "device", p.name)
			_ = c.disconnect(p.device)
			continue
		}
		if err != nil {
			return err
		}
		connected = append(connected, p)
	}
	if _, err := c.clsact.look(connected, nil); err != nil {
		return err
	}
	owned := owners(connected, before, bridgeMACs(c.links))
	settle(connected, owned)
	for _, p := range connected {
		if entry, ok := have[p.Ifindex]; ok && entry == p.Device {
			continue
		}
		if err := c.state.SetDevice(p.Device); err != nil {
			return err
		}
	}
	return c.state.SetPorts(owned)
}

// manyPorts is the number of new ports from which on clsact is used for them: attaching by TCX
// waits for a grace period of RCU each time, with the lock of all network devices held.
const manyPorts = 9

// portMode is the connector for so many new ports.
func (c *connector) portMode(added int) *connector {
	if c.opts.Mode != Auto || added < manyPorts {
		return c
	}
	attachment := *c.attachment
	attachment.opts.Mode = Clsact
	other := *c
	other.attachment = &attachment
	return &other
}

// knownPorts are those of the ports that are attached already. The others that are attached are
// ports no more: they are forgotten, after who owns what.
func (c *connector) knownPorts(ports []port, owned map[maps.PortKey]uint32) (map[uint32]maps.Device, error) {
	entries, err := c.state.Devices()
	if err != nil {
		return nil, err
	}
	have := make(map[uint32]maps.Device)
	var lost []device
	for _, entry := range entries {
		if entry.Class != maps.Port {
			continue
		}
		i := slices.IndexFunc(ports, func(p port) bool { return p.Ifindex == entry.Ifindex })
		if i >= 0 {
			have[entry.Ifindex] = entry
		} else {
			lost = append(lost, device{Device: entry})
		}
	}
	if len(lost) == 0 {
		return have, nil
	}
	stay := make(map[maps.PortKey]uint32)
	for key, ifindex := range owned {
		if !slices.ContainsFunc(lost, func(d device) bool { return d.Ifindex == ifindex }) {
			stay[key] = ifindex
		}
	}
	if err := c.state.SetPorts(stay); err != nil {
		return nil, err
	}
	for _, d := range lost {
		if err := c.withdraw(d); err != nil {
			return nil, err
		}
	}
	return have, nil
}

// connectPort gives a port the current program; entry is what is known of it if it has one.
func (c *connector) connectPort(d device, entry maps.Device, attached bool, undos *[]func() error) (device, error) {
	if attached && entry.Attach == maps.AttachManual && !c.manual {
		byHand, err := c.attachedByHand(d)
		if err != nil {
			return d, err
		}
		attached = byHand
	}
	if !attached {
		// Slow until all is known of it.
		d.Slow = true
		connected, err := c.connect(d)
		if err == nil {
			*undos = append(*undos, func() error { return c.disconnect(connected) })
		}
		return connected, err
	}
	d.Attach, d.OwnQdisc = entry.Attach, entry.OwnQdisc
	*undos = append(*undos, func() error { return c.restore(entry) })
	for _, h := range d.hooks() {
		undo, err := c.ensure(d, h)
		if undo != nil {
			*undos = append(*undos, func() error { return c.unlessGone(d, undo) })
		}
		if err != nil {
			return d, err
		}
	}
	return d, nil
}

// alive are the owners that still are devices.
func (c *connector) alive(owned map[maps.PortKey]uint32) map[maps.PortKey]uint32 {
	entries, _ := c.state.Devices()
	alive := make(map[maps.PortKey]uint32)
	for key, ifindex := range owned {
		if slices.ContainsFunc(entries, func(d maps.Device) bool { return d.Ifindex == ifindex }) {
			alive[key] = ifindex
		}
	}
	return alive
}

// restore takes back a change of a device's entry, unless it has gone meanwhile.
func (c *connector) restore(entry maps.Device) error {
	if c.vanished(device{Device: entry}) {
		return nil
	}
	return c.state.SetDevice(entry)
}

func (c *connector) unlessGone(d device, undo func() error) error {
	if err := undo(); err != nil && !c.vanished(d) {
		return err
	}
	return nil
}

// vanished says whether the port is none any more.
func (c *connector) vanished(d device) bool {
	link, err := c.nl.LinkByIndex(d.index())
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing) || err == nil && link.Attrs().MasterIndex != int(d.Bridge)
}
