package judge

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
)

const (
	ethernetSize = 14
	// socketBuffer holds what a step of a batch brings to one end, in bytes.
	socketBuffer = 64 << 20
)

// end is a device at the edge of a world, by which packets are sent and received past the
// stack of its namespace.
type end struct {
	fd     int
	name   string
	header []byte // Ethernet, without the type: to the gateway, from this end
	mac    net.HardwareAddr
	buffer []byte
}

// openEnd opens the device eth0 of a node, whose address is mac.
func openEnd(n *lab.Node, mac, gateway net.HardwareAddr) (*end, error) {
	index, err := n.Ifindex(endDevice)
	if err != nil {
		return nil, err
	}
	e := &end{fd: -1, name: n.Role, mac: mac, buffer: make([]byte, 4096)}
	e.header = append(bytes.Clone(gateway), mac...)
	err = n.Do(func() (err error) {
		e.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(e.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBuffer); err != nil {
			return err
		}
		if err := unix.SetsockoptInt(e.fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
			return err
		}
		all := uint16(unix.ETH_P_ALL)
		return unix.Bind(e.fd, &unix.SockaddrLinklayer{Protocol: all<<8 | all>>8, Ifindex: index})
	})
	if err != nil {
		e.close()
		return nil, fmt.Errorf("%s: packet socket: %w", n.Role, err)
	}
	return e, nil
}

func (e *end) close() {
	if e.fd >= 0 {
		_ = unix.Close(e.fd)
	}
	e.fd = -1
}

// send puts an IP packet on the wire, and behind it as many bytes of padding.
func (e *end) send(ip []byte, padding int) error {
	frame := make([]byte, 0, ethernetSize+len(ip)+padding)
	frame = append(frame, e.header...)
	kind := uint16(unix.ETH_P_IP)
	if ip[0]>>4 == 6 {
		kind = unix.ETH_P_IPV6
	}
	frame = binary.BigEndian.AppendUint16(frame, kind)
	frame = append(frame, ip...)
	frame = append(frame, make([]byte, padding)...)
	for {
		_, err := unix.Write(e.fd, frame)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENOBUFS) {
			if err := wait(e.fd, unix.POLLOUT, time.Second); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: send: %w", e.name, err)
		}
		return nil
	}
}

// receive returns the next IP packet for this end that has arrived, or nil.
func (e *end) receive() ([]byte, error) {
	for {
		n, _, err := unix.Recvfrom(e.fd, e.buffer, unix.MSG_TRUNC)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil, nil
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, fmt.Errorf("%s: receive: %w", e.name, err)
		case n > len(e.buffer):
			return nil, fmt.Errorf("%s: a frame of %d bytes", e.name, n)
		}
		frame := e.buffer[:n]
		if n < ethernetSize || !bytes.Equal(frame[:6], e.mac) {
			continue // neighbour discovery, or flooded by the bridge
		}
		ip := frame[ethernetSize:]
		switch binary.BigEndian.Uint16(frame[12:]) {
		case unix.ETH_P_IP:
			if len(ip) >= ipv4Size {
				ip = ip[:min(len(ip), int(binary.BigEndian.Uint16(ip[2:])))]
			}
		case unix.ETH_P_IPV6:
			if len(ip) >= ipv6Size {
				ip = ip[:min(len(ip), ipv6Size+int(binary.BigEndian.Uint16(ip[4:])))]
			}
		default:
			continue
		}
		return bytes.Clone(ip), nil
	}
}

// lost tells how many packets found no room in the socket since it was asked last.
func (e *end) lost() (uint32, error) {
	stats, err := unix.GetsockoptTpacketStats(e.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return 0, fmt.Errorf("%s: statistics: %w", e.name, err)
	}
	return stats.Drops, nil
}

// wait waits for an event of a socket; that it did not come is no error.
func wait(fd int, events int16, patience time.Duration) error {
	_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: events}}, int(patience.Milliseconds()))
	if err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("poll: %w", err)
	}
	return nil
}
