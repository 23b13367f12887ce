package lab

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Commands of the ethtool ioctl, from linux/ethtool.h; unix has no names for these.
const (
	ethtoolSetTxChecksum = 0x17
	ethtoolSetTSO        = 0x1f
	ethtoolSetGSO        = 0x24
	ethtoolSetGRO        = 0x2c
)

// SetSegmentation switches TSO, GSO and GRO on or off on every veth and bridge: off,
// every packet on the wire is one that fits the MTU.
func (l *Lab) SetSegmentation(on bool) error {
	return l.ethtool(on, ethtoolSetTSO, ethtoolSetGSO, ethtoolSetGRO)
}

// SetChecksumOffload switches checksum offload on or off: off, every packet carries its
// full checksum from the start, of SCTP too. Off takes segmentation offload with it.
func (l *Lab) SetChecksumOffload(on bool) error {
	return l.ethtool(on, ethtoolSetTxChecksum)
}

// SetChecksumOffload does the same for one device of the node.
func (n *Node) SetChecksumOffload(device string, on bool) error {
	return n.ethtool(device, ethtoolSetTxChecksum, on)
}

func (l *Lab) ethtool(on bool, commands ...uint32) error {
	for _, n := range l.nodes {
		links, err := n.link.LinkList()
		if err != nil {
			return fmt.Errorf("%s: links: %w", n.Role, err)
		}
		for _, link := range links {
			if kind := link.Type(); kind != "veth" && kind != "bridge" {
				continue
			}
			for _, command := range commands {
				if err := n.ethtool(link.Attrs().Name, command, on); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// ethtool does one ETHTOOL_S* ioctl whose argument is on or off.
func (n *Node) ethtool(device string, command uint32, on bool) error {
	value := struct{ command, data uint32 }{command: command}
	if on {
		value.data = 1
	}
	request := struct { // struct ifreq with ifr_data
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&value)}
	copy(request.name[:unix.IFNAMSIZ-1], device)

	return n.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("%s: socket: %w", n.Role, err)
		}
		defer unix.Close(fd)
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
		runtime.KeepAlive(&value)
		if errno != 0 {
			return fmt.Errorf("%s: ethtool %#x on %s: %w", n.Role, command, device, permission(errno))
		}
		return nil
	})
}
