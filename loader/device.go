package loader

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
	"tcnat/maps"
)

// device is a network device that has our programs, or is to have them.
type device struct {
	maps.Device
	name string
}

func (d device) index() int { return int(d.Ifindex) }

// String is how errors speak of the device.
func (d device) String() string { return d.Class.String() + " " + d.name }

// hook is one place on a device where one of our programs runs.
type hook struct {
	ingress bool
	program string
}

func (h hook) String() string {
	if h.ingress {
		return "ingress"
	}
	return "egress"
}

// hooks are the device's, in the order of attachment: nothing that comes in may be translated
// before what leaves is.
//
// Ours is the last program on ingress and the first on egress, since netfilter's NAT lies
// inside both: other programs see packets as they are on the wire.
func (d device) hooks() []hook {
	switch {
	case d.Class == maps.Bridge:
		return []hook{{false, bpf.NATProgToBridge}, {true, bpf.NATProgFromBridge}}
	case d.Class == maps.Port:
		return []hook{{true, bpf.NATProgFromPort}}
	case d.L3:
		return []hook{{false, bpf.NATProgToUplinkL3}, {true, bpf.NATProgFromUplinkL3}}
	default:
		return []hook{{false, bpf.NATProgToUplink}, {true, bpf.NATProgFromUplink}}
	}
}

func newNetlink() (*netlink.Handle, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", known(err))
	}
	return handle, nil
}

// retryDump repeats a netlink dump that a change interrupted.
func retryDump[T any](dump func() ([]T, error)) ([]T, error) {
	const tries = 10
	var list []T
	var err error
	for range tries {
		if list, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return list, err
}

func listLinks(nl *netlink.Handle) ([]netlink.Link, error) {
	links, err := retryDump(nl.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", known(err))
	}
	return links, nil
}

// resolveDevices checks the names of the devices to attach to. Errors wrap ErrNoDevice or
// ErrBadDevice.
func resolveDevices(links []netlink.Link, bridges, uplinks []string) ([]device, error) {
	var devices []device
	used := make(map[string]maps.DeviceClass)
	add := func(name string, class maps.DeviceClass) error {
		d := device{name: name, Device: maps.Device{Class: class}}
		if other, twice := used[name]; twice {
			if other == class {
				return fmt.Errorf("%s: %w: it is named twice", d, ErrBadDevice)
			}
			return fmt.Errorf("%s: %w: it is named as %s too", d, ErrBadDevice, other)
		}
		used[name] = class
		found, err := findLink(links, name)
		if err != nil {
			return fmt.Errorf("%s %w", class, err)
		}
		d.Ifindex = uint32(found.Attrs().Index)
		d.L3 = found.Attrs().EncapType != "ether"
		if err := suits(links, d, found); err != nil {
			return err
		}
		devices = append(devices, d)
		return nil
	}
	for _, name := range uplinks {
		if err := add(name, maps.Uplink); err != nil {
			return nil, err
		}
	}
	for _, name := range bridges {
		if err := add(name, maps.Bridge); err != nil {
			return nil, err
		}
	}
	return devices, nil
}

func findLink(links []netlink.Link, name string) (netlink.Link, error) {
	have := make([]string, 0, len(links))
	for _, l := range links {
		if l.Attrs().Name == name {
			return l, nil
		}
		if l.Attrs().RawFlags&unix.IFF_LOOPBACK == 0 {
			have = append(have, l.Attrs().Name)
		}
	}
	if len(have) == 0 {
		have = []string{"none"}
	}
	return nil, fmt.Errorf("%s: %w (have: %s)", name, ErrNoDevice, strings.Join(have, ", "))
}

func suits(links []netlink.Link, d device, found netlink.Link) error {
	if d.Class == maps.Bridge {
		if found.Type() != "bridge" {
			return fmt.Errorf("%s: %w: it is no bridge but %s: name the bridge that the containers are on",
				d, ErrBadDevice, kind(found))
		}
		return nil
	}
	if found.Attrs().RawFlags&unix.IFF_LOOPBACK != 0 {
		return fmt.Errorf("%s: %w: it is the loopback: name the device that leads to the world", d, ErrBadDevice)
	}
	for _, master := range links {
		if master.Attrs().Index == found.Attrs().MasterIndex && master.Type() == "bridge" {
			return fmt.Errorf("%s: %w: it is a port of bridge %s: name that one", d, ErrBadDevice, master.Attrs().Name)
		}
	}
	return nil
}

func kind(l netlink.Link) string {
	if t := l.Type(); t != "" && t != "device" {
		return "a " + t
	}
	return "a plain device"
}

// Ifindex is the index of the device of that name. The error wraps ErrNoDevice.
func Ifindex(name string) (uint32, error) {
	links, err := currentLinks()
	if err != nil {
		return 0, err
	}
	found, err := findLink(links, name)
	if err != nil {
		return 0, err
	}
	return uint32(found.Attrs().Index), nil
}

// Ifnames are the names of all devices, by index.
func Ifnames() (map[uint32]string, error) {
	links, err := currentLinks()
	if err != nil {
		return nil, err
	}
	return ifnames(links), nil
}

func currentLinks() ([]netlink.Link, error) {
	nl, err := newNetlink()
	if err != nil {
		return nil, err
	}
	defer nl.Close()
	return listLinks(nl)
}

func ifnames(links []netlink.Link) map[uint32]string {
	names := make(map[uint32]string, len(links))
	for _, l := range links {
		names[uint32(l.Attrs().Index)] = l.Attrs().Name
	}
	return names
}

// ifname is the device's name, or its index where it is gone.
func ifname(names map[uint32]string, index uint32) string {
	if name, ok := names[index]; ok {
		return name
	}
	return "#" + strconv.FormatUint(uint64(index), 10)
}
