package lab

import (
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// segmentInfo returns the segment size that a connection uses, in bytes, and how many
// segments it sent again.
func segmentInfo(conn *net.TCPConn) (size, retransmitted int, err error) {
	raw, err := conn.SyscallConn()
	if err == nil {
		err = controlEach(raw, func(fd int) error {
			info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
			if err == nil {
				size, retransmitted = int(info.Snd_mss), int(info.Total_retrans)
			}
			return err
		})
	}
	if err != nil {
		return 0, 0, fmt.Errorf("tcp info: %w", err)
	}
	return size, retransmitted, nil
}
