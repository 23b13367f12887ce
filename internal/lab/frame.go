package lab

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// FrameSender puts frames on a device as they are, whatever addresses they bear.
type FrameSender struct{ fd int }

// OpenFrameSender sends by a device of the node, until Close.
func OpenFrameSender(n *Node, device string) (*FrameSender, error) {
	index, err := n.Ifindex(device)
	if err != nil {
		return nil, err
	}
	s := &FrameSender{fd: -1}
	err = n.Do(func() (err error) {
		// Protocol 0: it receives nothing.
		if s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Bind(s.fd, &unix.SockaddrLinklayer{Ifindex: index})
	})
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("%s: send frames on %s: %w", n.Role, device, permission(err))
	}
	return s, nil
}

// Send sends one frame, which begins with its Ethernet header.
func (s *FrameSender) Send(frame []byte) error {
	if _, err := unix.Write(s.fd, frame); err != nil {
		return fmt.Errorf("send frame: %w", err)
	}
	return nil
}

// Close ends the sender.
func (s *FrameSender) Close() {
	if s.fd >= 0 {
		_ = unix.Close(s.fd)
	}
	s.fd = -1
}
