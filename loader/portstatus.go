package loader

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"

	"tcnat/maps"
)

// PortStatus is one port of a managed bridge. Ports come and go with their containers: one
// without program is slower and no problem.
type PortStatus struct {
	Name    string
	Ifindex uint32
	Bridge  string
	Attach  maps.AttachKind // 0: it has no program
	MAC     maps.MAC        // of its container, as the datapath knows it
	Slow    string          // why it has no fast path, "" if it has
	Peer    bool            // packets go straight into the container
	NoPeer  string          // why not
	Ingress HookStatus
}

// portStatus tells of the ports that are there now. Those that are gone are not mentioned.
func (d *Datapath) portStatus(s *Status, c *clsact, ids map[string]uint32, links []netlink.Link) error {
	bridges := make(map[uint32]string)
	for _, dev := range s.Devices {
		if dev.Class == maps.Bridge {
			bridges[dev.Ifindex] = dev.Name
		}
	}
	ports, err := listPorts(c.nl, bridges)
	if err != nil {
		return err
	}
	entries, err := d.state.Devices()
	if err != nil {
		return err
	}
	owned, err := d.state.Ports()
	if err != nil {
		return err
	}
	told := make(map[uint32]maps.Device)
	for _, entry := range entries {
		told[entry.Ifindex] = entry
	}
	for i := range ports {
		entry := told[ports[i].Ifindex]
		ports[i].Attach = entry.Attach
	}
	hooks, err := c.look(ports, ids)
	if err != nil {
		return err
	}
	settle(ports, owners(ports, owned, bridgeMACs(links)))
	for _, p := range ports {
		entry, ok := told[p.Ifindex]
		status := PortStatus{
			Name: p.name, Ifindex: p.Ifindex, Bridge: p.bridge, Slow: p.slow, NoPeer: p.noPeer,
		}
		if !ok || entry.Class != maps.Port {
			status.Slow, status.NoPeer = "it has no program: run tcnat attach again", ""
			s.Ports = append(s.Ports, status)
			continue
		}
		status.Attach, status.MAC, status.Ingress, status.Peer = entry.Attach, entry.MAC, hooks[p.Ifindex], entry.Peer
		status.compare(s, p, entry)
		s.Ports = append(s.Ports, status)
	}
	slices.SortFunc(s.Ports, func(a, b PortStatus) int {
		return cmp.Or(cmp.Compare(a.Bridge, b.Bridge), cmp.Compare(a.Name, b.Name))
	})
	return nil
}

// compare sets what the datapath knows of a port against what the host says now.
func (status *PortStatus) compare(s *Status, p port, entry maps.Device) {
	const again = ": run tcnat attach again"
	switch {
	case status.Ingress.ID == 0 && entry.Attach == maps.AttachManual:
		status.Slow = "it has no program: run the commands that tcnat load prints"
	case status.Ingress.ID == 0:
		status.Slow = "it has no program" + again
	case status.Ingress.ID != status.Ingress.Pinned:
		s.Problems = append(s.Problems, status.Ingress.problem(p.device, p.hooks()[0]))
	case entry.Bridge != p.Bridge:
		status.Slow = "it was on another bridge when attach ran" + again
	case entry.Slow && p.slow == "":
		status.Slow = "it had none when attach ran, and may have now" + again
	}
	if status.Slow != "" {
		status.NoPeer = "" // one reason is enough
	}
	switch {
	case entry.Peer && p.noPeer != "":
		s.Problems = append(s.Problems, fmt.Sprintf("%s: since attach ran: %s, which packets go past%s", p.device, p.noPeer, again))
	case !entry.Slow && p.slow != "" && s.Config.FastPath != maps.FastPathOff:
		s.Problems = append(s.Problems, fmt.Sprintf("%s: since attach ran: %s%s", p.device, p.slow, again))
	case !entry.Peer && p.Peer && status.Slow == "":
		status.NoPeer = "it could not when attach ran, and could now" + again
	}
}

func (d *Datapath) fastPathStatus(s *Status) error {
	tracked := findTracking()
	s.FastPath.Asked = pinsIn(d.inst.Dir()).readAsked()
	s.FastPath.Mode = s.Config.FastPath
	s.FastPath.Reason = s.FastPath.reason(tracked)
	if problem := s.FastPath.problem(tracked); problem != "" {
		s.Problems = append(s.Problems, problem)
	}
	counters, err := d.state.Counters()
	if err != nil {
		return err
	}
	for _, counter := range counters {
		switch counter.Name {
		case maps.LeasesGranted:
			s.FastPath.Granted = counter.Packets
		case maps.PacketsRedirected:
			s.FastPath.Redirected = counter.Packets
		}
	}
	return nil
}
