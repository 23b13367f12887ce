package lab

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	captureBuffer = 64 << 20 // bytes of socket buffer
	captureLength = 512      // bytes kept of a packet
)

// Capture collects the IP packets that pass a device. It sees what comes in before TC
// ingress programs do, and what goes out after TC egress programs.
type Capture struct {
	file    *os.File
	filter  func(Packet) bool
	done    chan struct{}
	mu      sync.Mutex
	packets []Packet
}

// StartCapture collects the packets of a device that filter wants (nil: all), until
// Close. The filter must be quick and must not keep the packet's bytes.
func StartCapture(n *Node, device string, filter func(Packet) bool) (*Capture, error) {
	index, err := n.Ifindex(device)
	if err != nil {
		return nil, err
	}
	fd := -1
	err = n.Do(func() (err error) {
		// SOCK_DGRAM: without the link header, whether the device has one or not.
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, captureBuffer); err != nil {
			return err
		}
		// Receives from here on.
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: index})
	})
	if err != nil {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return nil, fmt.Errorf("%s: capture on %s: %w", n.Role, device, permission(err))
	}
	c := &Capture{file: os.NewFile(uintptr(fd), device), filter: filter, done: make(chan struct{})}
	go c.collect()
	return c, nil
}

// Packets returns what was collected so far.
func (c *Capture) Packets() []Packet {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.packets)
}

// Close ends the capture, with what has passed so far. An error says that packets were
// lost for want of buffer, so that the absence of a packet proves nothing.
func (c *Capture) Close() error {
	defer c.file.Close()
	if err := c.file.SetReadDeadline(time.Unix(1, 0)); err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	<-c.done
	raw, err := c.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	var stats *unix.TpacketStats
	err = controlEach(raw, func(fd int) (err error) {
		buffer := make([]byte, captureLength)
		for c.receive(fd, buffer) == nil { // what the collector had no time for
		}
		stats, err = unix.GetsockoptTpacketStats(fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
		return err
	})
	switch {
	case err != nil:
		return fmt.Errorf("capture: statistics: %w", err)
	case stats.Drops != 0:
		return fmt.Errorf("capture: %d of %d packets lost: %w", stats.Drops, stats.Packets, unix.ENOBUFS)
	}
	return nil
}

func (c *Capture) collect() {
	defer close(c.done)
	raw, err := c.file.SyscallConn()
	if err != nil {
		return
	}
	buffer := make([]byte, captureLength)
	for {
		var received error
		err := raw.Read(func(fd uintptr) bool {
			received = c.receive(int(fd), buffer)
			return !errors.Is(received, unix.EAGAIN)
		})
		if err != nil || received != nil {
			return
		}
	}
}

// receive takes one packet from the socket.
func (c *Capture) receive(fd int, buffer []byte) error {
	// MSG_TRUNC: n is the packet's length, also when it is more than the buffer's.
	n, from, err := unix.Recvfrom(fd, buffer, unix.MSG_TRUNC)
	if err != nil {
		return err
	}
	link, ok := from.(*unix.SockaddrLinklayer)
	if !ok || n <= 0 {
		return nil
	}
	packet := parseIP(buffer[:min(n, len(buffer))])
	packet.Length = n
	packet.Outgoing = link.Pkttype == unix.PACKET_OUTGOING
	if !packet.Src.IsValid() || c.filter != nil && !c.filter(packet) {
		return nil
	}
	packet.IP = slices.Clone(packet.IP)
	packet.Payload = packet.IP[len(packet.IP)-len(packet.Payload):]
	c.mu.Lock()
	defer c.mu.Unlock()
	c.packets = append(c.packets, packet)
	return nil
}

// controlEach runs fn on the descriptor of a connection.
func controlEach(raw syscall.RawConn, fn func(fd int) error) error {
	var err error
	if e := raw.Control(func(fd uintptr) { err = fn(int(fd)) }); e != nil {
		return e
	}
	return err
}

func networkOrder(v uint16) uint16 { return v<<8 | v>>8 }
