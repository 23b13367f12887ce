package lab

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// tunQueue is how many packets wait in a tun device for the process that carries them.
const tunQueue = 10_000

// tunnel carries packets between two tun devices, as a VPN's process does: what the
// kernel of one side sends is what the kernel of the other side gets.
type tunnel struct {
	ends [2]*os.File
	done sync.WaitGroup
}

// newTunnel makes a tun device of that name in both nodes.
func newTunnel(a, b *Node, device string) (*tunnel, error) {
	t := &tunnel{}
	for i, n := range []*Node{a, b} {
		file, err := openTun(n, device)
		if err != nil {
			t.close()
			return nil, err
		}
		t.ends[i] = file
		// This process may have to wait for a CPU: the kernel's 500 packets are soon there.
		link, err := n.link.LinkByName(device)
		if err == nil {
			err = n.link.LinkSetTxQLen(link, tunQueue)
		}
		if err != nil {
			t.close()
			return nil, fmt.Errorf("%s: tun %s: queue: %w", n.Role, device, err)
		}
	}
	t.done.Add(2)
	go t.carry(t.ends[0], t.ends[1])
	go t.carry(t.ends[1], t.ends[0])
	return t, nil
}

// close ends the tunnel; its devices go with it.
func (t *tunnel) close() {
	for _, end := range t.ends {
		if end != nil {
			_ = end.Close()
		}
	}
	t.done.Wait()
}

func (t *tunnel) carry(from, to *os.File) {
	defer t.done.Done()
	packet := make([]byte, 65536)
	for {
		n, err := from.Read(packet)
		if err != nil { // closed, or the device is gone
			return
		}
		// A device that is down refuses packets, as a wire loses them.
		if _, err := to.Write(packet[:n]); errors.Is(err, os.ErrClosed) {
			return
		}
	}
}

func openTun(n *Node, device string) (*os.File, error) {
	request, err := unix.NewIfreq(device)
	if err != nil {
		return nil, fmt.Errorf("%s: tun %s: %w", n.Role, device, err)
	}
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	fd := -1
	err = n.Do(func() (err error) {
		fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	})
	if err != nil {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return nil, fmt.Errorf("%s: tun %s: %w", n.Role, device, permission(err))
	}
	// Only now: the poller cannot watch the file before it has its device.
	return os.NewFile(uintptr(fd), device), nil
}
