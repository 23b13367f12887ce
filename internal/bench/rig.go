package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf/link"

	"tcnat/internal/lab"
)

const (
	publishedPort = 3005  // UDP and TCP, of the first container
	firstSource   = 32768 // source port of flow 0
	manySources   = 43000 // the same of flows from many containers,
	twoSources    = 54000 // and of those from two: a port is one container's, or NAT changes it
	firstTarget   = 9000  // destination port of flow 0
	maxSources    = 10000 // source ports; more flows take more destination ports
	worldDevice   = "eth0"
	insideDevice  = "eth0" // of a container
)

// rig is the namespaces of one contender, with the sockets that frames are sent by.
type rig struct {
	*lab.Lab
	inside                []net.HardwareAddr // of the containers' devices
	bridge, uplink, world net.HardwareAddr
	ports                 map[portKey]port
	links                 []link.Link // of the contender's own programs, if it has such
}

// portKey names a socket: of a container by its number, of the world by -1.
type portKey struct {
	container int
	partial   bool
}

// rigOptions choose what a rig has.
type rigOptions struct {
	containers int
	bridgeNF   bool
}

// newRig builds a lab whose world is directly at the uplink.
func newRig(ctx context.Context, o rigOptions) (*rig, error) {
	l, err := lab.New(ctx, lab.Options{
		Containers: o.containers, NearWorld: true, BridgeNetfilter: o.bridgeNF,
		// As Debian has it: the check would slow plain forwarding down.
		HostSysctls: map[string]string{"net/ipv4/conf/all/rp_filter": "0"},
	})
	if err != nil {
		return nil, err
	}
	r := &rig{Lab: l, ports: map[portKey]port{}}
	if err := r.learn(); err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

// learn reads the devices' addresses.
func (r *rig) learn() (err error) {
	for _, device := range []struct {
		node *lab.Node
		name string
		at   *net.HardwareAddr
	}{
		{r.Host, lab.Bridge, &r.bridge},
		{r.Host, lab.Uplink, &r.uplink},
		{r.World, worldDevice, &r.world},
	} {
		if *device.at, err = hardwareAddr(device.node, device.name); err != nil {
			return err
		}
	}
	for _, c := range r.Containers {
		addr, err := hardwareAddr(c, insideDevice)
		if err != nil {
			return err
		}
		r.inside = append(r.inside, addr)
	}
	return nil
}

func hardwareAddr(n *lab.Node, device string) (addr net.HardwareAddr, err error) {
	err = n.Do(func() error {
		link, err := net.InterfaceByName(device)
		if err == nil {
			addr = link.HardwareAddr
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %s: %w", n.Role, device, err)
	}
	return addr, nil
}

func (r *rig) close() error {
	var errs []error
	for _, p := range r.ports {
		p.close()
	}
	for _, l := range r.links {
		errs = append(errs, l.Close())
	}
	return errors.Join(append(errs, r.Lab.Close())...)
}

// port returns the socket of a container, or of the world where that is -1.
func (r *rig) port(container int, partial bool) (port, error) {
	key := portKey{container, partial}
	if p, ok := r.ports[key]; ok {
		return p, nil
	}
	node, device := r.World, worldDevice
	if container >= 0 {
		node, device = r.Containers[container], insideDevice
	}
	p, err := openPort(node, device, partial)
	if err == nil {
		r.ports[key] = p
	}
	return p, err
}

// bridgePort is the host's device behind which a container is.
func (r *rig) bridgePort(container int) place {
	return place{r.Host, "veth" + r.Containers[container].Role}
}

func (r *rig) containerAddr(container int) netip.Addr {
	return r.Containers[container].Addr(lab.IPv4)
}

func (r *rig) hostAddr() netip.Addr  { return r.Host.Addr(lab.IPv4) }
func (r *rig) worldAddr() netip.Addr { return r.World.Addr(lab.IPv4) }

// atWorld is where the world receives, atContainers where the containers do.
func (r *rig) atWorld() []place { return []place{{r.World, worldDevice}} }

func (r *rig) atContainers() []place {
	var at []place
	for _, c := range r.Containers {
		at = append(at, place{c, insideDevice})
	}
	return at
}

// routeBack tells the world where the containers are: for contenders without NAT.
func (r *rig) routeBack() error {
	return r.World.AddRoute(lab.BridgeSubnet(lab.IPv4), r.hostAddr(), worldDevice)
}

// hold keeps a link until the rig is closed.
func (r *rig) hold(l link.Link, err error) error {
	if err == nil {
		r.links = append(r.links, l)
	}
	return err
}

// single is the prefix of one address.
func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// spread divides n source ports among containers, so that none is used by two: an outside
// port can then be the same as the inside one for each of them.
func spread(first uint16, n, containers int) []portSet {
	containers = min(n, containers)
	sets := make([]portSet, containers)
	for i := range sets {
		count := (n - i + containers - 1) / containers
		sets[i] = portSet{first: first + uint16(i), step: uint16(containers), n: count}
	}
	return slices.Clip(sets)
}
