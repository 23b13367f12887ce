package loader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"tcnat/maps"
)

// nlAttr is an attribute of a netlink message.
type nlAttr = syscall.NetlinkRouteAttr

// rtLink is what the fast path asks of a device, as far as the kernel tells: the library leaves
// most of it out.
type rtLink struct {
	index, master int
	name, kind    string
	mac           maps.MAC
	qdisc         string // on its egress
	xdp           bool

	// The other end of a veth: its index, and the namespace's number here, -1 for this one.
	peer, peerNetns int

	// Of a bridge.
	vlanFiltering bool

	// Of a port.
	noLearning, isolated, locked bool
}

// listRTLinks reads all devices.
func listRTLinks() ([]rtLink, error) {
	messages, err := retryDump(func() ([][]byte, error) {
		request := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
		request.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		return request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	})
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", known(err))
	}
	links := make([]rtLink, 0, len(messages))
	for _, message := range messages {
		link, err := parseRTLink(message)
		if err != nil {
			return nil, fmt.Errorf("list devices: %w", err)
		}
		links = append(links, link)
	}
	return links, nil
}

// peerLink asks for the other end of a veth, in its own namespace.
func peerLink(l rtLink) (rtLink, error) {
	request := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	message := nl.NewIfInfomsg(unix.AF_UNSPEC)
	message.Index = int32(l.peer)
	request.AddData(message)
	request.AddData(nl.NewRtAttr(unix.IFLA_TARGET_NETNSID, nl.Uint32Attr(uint32(l.peerNetns))))
	messages, err := request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return rtLink{}, err
	}
	if len(messages) != 1 {
		return rtLink{}, fmt.Errorf("%d answers", len(messages))
	}
	return parseRTLink(messages[0])
}

var errShort = errors.New("the kernel's answer is cut short")

func parseRTLink(message []byte) (rtLink, error) {
	if len(message) < unix.SizeofIfInfomsg {
		return rtLink{}, errShort
	}
	header := nl.DeserializeIfInfomsg(message)
	attrs, err := nl.ParseRouteAttr(message[unix.SizeofIfInfomsg:])
	if err != nil {
		return rtLink{}, err
	}
	l := rtLink{index: int(header.Index), peerNetns: -1}
	for _, attr := range attrs {
		switch typeOf(attr) {
		case unix.IFLA_MASTER:
			l.master = int(number(attr))
		case unix.IFLA_IFNAME:
			l.name = word(attr)
		case unix.IFLA_ADDRESS:
			if len(attr.Value) == len(l.mac) {
				l.mac = maps.MAC(attr.Value)
			}
		case unix.IFLA_QDISC:
			l.qdisc = word(attr)
		case unix.IFLA_LINK:
			l.peer = int(number(attr))
		case unix.IFLA_LINK_NETNSID:
			l.peerNetns = int(int32(number(attr)))
		case unix.IFLA_XDP:
			l.xdp = hasXDP(attr)
		case unix.IFLA_LINKINFO:
			if err := l.parseInfo(attr); err != nil {
				return l, err
			}
		}
	}
	return l, nil
}

func hasXDP(attr nlAttr) bool {
	nested, err := nl.ParseRouteAttr(attr.Value)
	if err != nil {
		return true
	}
	for _, inner := range nested {
		if typeOf(inner) == unix.IFLA_XDP_ATTACHED && number(inner) != 0 {
			return true
		}
	}
	return false
}

func (l *rtLink) parseInfo(attr nlAttr) error {
	infos, err := nl.ParseRouteAttr(attr.Value)
	if err != nil {
		return err
	}
	var data, slave []byte
	slaveKind := ""
	for _, info := range infos {
		switch typeOf(info) {
		case unix.IFLA_INFO_KIND:
			l.kind = word(info)
		case unix.IFLA_INFO_DATA:
			data = info.Value
		case unix.IFLA_INFO_SLAVE_KIND:
			slaveKind = word(info)
		case unix.IFLA_INFO_SLAVE_DATA:
			slave = info.Value
		}
	}
	if l.kind == "bridge" {
		attrs, err := nl.ParseRouteAttr(data)
		if err != nil {
			return err
		}
		for _, attr := range attrs {
			if typeOf(attr) == unix.IFLA_BR_VLAN_FILTERING {
				l.vlanFiltering = number(attr) != 0
			}
		}
	}
	if slaveKind != "bridge" {
		return nil
	}
	attrs, err := nl.ParseRouteAttr(slave)
	if err != nil {
		return err
	}
	for _, attr := range attrs {
		switch typeOf(attr) {
		case unix.IFLA_BRPORT_LEARNING:
			l.noLearning = number(attr) == 0
		case unix.IFLA_BRPORT_ISOLATED:
			l.isolated = number(attr) != 0
		case unix.IFLA_BRPORT_LOCKED:
			l.locked = number(attr) != 0
		}
	}
	return nil
}

// number is the value of an attribute of one, two or four bytes.
func number(attr nlAttr) uint32 {
	switch len(attr.Value) {
	case 1:
		return uint32(attr.Value[0])
	case 2:
		return uint32(binary.NativeEndian.Uint16(attr.Value))
	case 4:
		return binary.NativeEndian.Uint32(attr.Value)
	}
	return 0
}

func word(attr nlAttr) string {
	text, _, _ := bytes.Cut(attr.Value, []byte{0})
	return string(text)
}

// learned is the one address that the bridge's own table has behind each port; a port with
// none, or with several, is not there. The host's own are not learned.
func learned(nlh *netlink.Handle) (map[int]maps.MAC, error) {
	entries, err := retryDump(func() ([]netlink.Neigh, error) { return nlh.NeighList(0, unix.AF_BRIDGE) })
	if err != nil {
		return nil, fmt.Errorf("list bridges' tables: %w", known(err))
	}
	addresses := make(map[int]map[maps.MAC]bool)
	for _, entry := range entries {
		if entry.MasterIndex == 0 || entry.Vlan != 0 || len(entry.HardwareAddr) != 6 ||
			entry.State&(unix.NUD_PERMANENT|unix.NUD_NOARP) != 0 {
			continue
		}
		if addresses[entry.LinkIndex] == nil {
			addresses[entry.LinkIndex] = make(map[maps.MAC]bool)
		}
		addresses[entry.LinkIndex][maps.MAC(entry.HardwareAddr)] = true
	}
	one := make(map[int]maps.MAC)
	for index, list := range addresses {
		for address := range list {
			if len(list) == 1 {
				one[index] = address
			}
		}
	}
	return one, nil
}

func typeOf(attr nlAttr) uint16 {
	return attr.Attr.Type &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
}
