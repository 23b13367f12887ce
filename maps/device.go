package maps

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
)

// DeviceClass is what a device is to the datapath.
type DeviceClass uint8

// The classes of devices.
const (
	Bridge DeviceClass = DeviceClass(bpf.NATDeviceClassCLASS_BRIDGE)
	Uplink DeviceClass = DeviceClass(bpf.NATDeviceClassCLASS_UPLINK)
	Port   DeviceClass = DeviceClass(bpf.NATDeviceClassCLASS_PORT) // of a bridge
)

// String returns "bridge", "uplink" or "port".
func (c DeviceClass) String() string {
	switch c {
	case Bridge:
		return "bridge"
	case Uplink:
		return "uplink"
	case Port:
		return "port"
	}
	return fmt.Sprintf("class %d", uint8(c))
}

// AttachKind is how a device's programs are attached.
type AttachKind uint8

// The kinds of attachment. AttachManual are the tc commands of `tcnat load`.
const (
	AttachTCX    AttachKind = AttachKind(bpf.NATAttachKindATTACH_TCX)
	AttachClsact AttachKind = AttachKind(bpf.NATAttachKindATTACH_CLSACT)
	AttachManual AttachKind = AttachKind(bpf.NATAttachKindATTACH_MANUAL)
)

// String returns "tcx", "clsact" or "manual".
func (k AttachKind) String() string {
	switch k {
	case AttachTCX:
		return "tcx"
	case AttachClsact:
		return "clsact"
	case AttachManual:
		return "manual"
	}
	return fmt.Sprintf("attach kind %d", uint8(k))
}

// Device is a device that has programs.
type Device struct {
	Ifindex  uint32
	Class    DeviceClass
	Attach   AttachKind
	OwnQdisc bool // attach made its clsact qdisc, detach removes it
	L3       bool // it has no Ethernet header
	Slow     bool // it has no fast path

	// Of a port: its bridge, its container's Ethernet address where it is known (of a bridge: its own), and whether
	// packets may go straight to the other end of its veth.
	Bridge uint32
	MAC    MAC
	Peer   bool
}

// Devices lists the devices that have programs, by ifindex.
func (s *State) Devices() ([]Device, error) {
	var devices []Device

	err := readAll(s.m.Devices, func(ifindex uint32, d bpf.NATDevice) {
		devices = append(devices, Device{
			Ifindex:  ifindex,
			Class:    DeviceClass(d.Class),
			Attach:   AttachKind(d.Attach),
			OwnQdisc: d.Flags&bpf.NATDeviceFlagDEVICE_OWN_QDISC != 0,
			L3:       d.Flags&bpf.NATDeviceFlagDEVICE_L3 != 0,
			Slow:     d.Flags&bpf.NATDeviceFlagDEVICE_SLOW != 0,
			Bridge:   d.Bridge,
			MAC:      d.Mac,
			Peer:     d.Flags&bpf.NATDeviceFlagDEVICE_PEER != 0,
		})
	})
	if err != nil {
		return nil, fmt.Errorf("read devices: %w", err)
	}
	slices.SortFunc(devices, func(a, b Device) int { return cmp.Compare(a.Ifindex, b.Ifindex) })
	return devices, nil
}

// SetDevice adds or changes the device with d's ifindex.
func (s *State) SetDevice(d Device) error {
	value := bpf.NATDevice{
		Class:  bpf.NATDeviceClass(d.Class),
		Attach: bpf.NATAttachKind(d.Attach),
		Bridge: d.Bridge,
		Mac:    d.MAC,
	}
	for flag, on := range map[bpf.NATDeviceFlag]bool{
		bpf.NATDeviceFlagDEVICE_OWN_QDISC: d.OwnQdisc,
		bpf.NATDeviceFlagDEVICE_L3:        d.L3,
		bpf.NATDeviceFlagDEVICE_SLOW:      d.Slow,
		bpf.NATDeviceFlagDEVICE_PEER:      d.Peer,
	} {
		if on {
			value.Flags |= flag
		}
	}
	if err := s.m.Devices.Put(d.Ifindex, value); err != nil {
		return fmt.Errorf("write device %d: %w", d.Ifindex, err)
	}
	return nil
}

// DeleteDevice removes a device. One that is not there is no error.
func (s *State) DeleteDevice(ifindex uint32) error {
	if err := s.m.Devices.Delete(ifindex); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete device %d: %w", ifindex, err)
	}
	return nil
}
