package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
)

// socketPatience is how long a socket waits before its owner looks at its context again.
const socketPatience = 2 * time.Second

// errTimedOut indicates that a socket waited in vain.
var errTimedOut = errors.New("timed out")

// socket is a blocking IPv4 socket, to be used from a pinned thread: the Go runtime's own
// would be served by whatever thread is free.
type socket int

// openSocket opens a socket in a node's namespace; kind is SOCK_STREAM or SOCK_DGRAM.
func openSocket(n *lab.Node, kind int) (s socket, err error) {
	err = n.Do(func() (err error) {
		s, err = newSocket(kind)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("%s: socket: %w", n.Role, err)
	}
	return s, nil
}

// newSocket opens a socket in the namespace of the calling thread.
func newSocket(kind int) (socket, error) {
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	patience := unix.NsecToTimeval(socketPatience.Nanoseconds())
	for _, option := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &patience); err != nil {
			_ = unix.Close(fd)
			return -1, err
		}
	}
	return socket(fd), nil
}

// listen opens a socket that is bound to an address, and of TCP listens.
func listen(n *lab.Node, kind int, at netip.AddrPort) (socket, error) {
	s, err := openSocket(n, kind)
	if err != nil {
		return s, err
	}
	err = unix.SetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil {
		err = unix.Bind(int(s), sockaddr(at))
	}
	if err == nil && kind == unix.SOCK_STREAM {
		err = unix.Listen(int(s), 128)
	}
	if err != nil {
		s.close()
		return -1, fmt.Errorf("%s: listen at %s: %w", n.Role, at, err)
	}
	return s, nil
}

func (s socket) close() { _ = unix.Close(int(s)) }

// wake ends the waiting of a thread that accepts or receives: the kernel does it also for a
// socket without a peer, of which it then says that it is not connected.
func (s socket) wake() { _ = unix.Shutdown(int(s), unix.SHUT_RDWR) }

// accept waits for a connection until the context ends.
func (s socket) accept(ctx context.Context) (socket, error) {
	for {
		fd, _, err := unix.Accept4(int(s), unix.SOCK_CLOEXEC)
		switch {
		case err == nil:
			return socket(fd), nil
		case ctx.Err() != nil:
			return -1, ctx.Err()
		case !retry(err):
			return -1, fmt.Errorf("accept: %w", err)
		}
	}
}

// connect gives up after socketPatience.
func (s socket) connect(to netip.AddrPort) error {
	err := unix.Connect(int(s), sockaddr(to))
	for errors.Is(err, unix.EINTR) {
		err = unix.Connect(int(s), sockaddr(to))
	}
	if err != nil && !errors.Is(err, unix.EISCONN) {
		return fmt.Errorf("connect to %s: %w", to, err)
	}
	return nil
}

// read returns 0 at the end of the stream. It waits socketPatience at most.
func (s socket) read(p []byte) (int, error) {
	for {
		n, err := unix.Read(int(s), p)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case retry(err):
			return 0, fmt.Errorf("read: %w", errTimedOut)
		case err != nil:
			return 0, fmt.Errorf("read: %w", err)
		}
		return n, nil
	}
}

// write writes all of it, and waits socketPatience at most for each part.
func (s socket) write(p []byte) error {
	for len(p) > 0 {
		n, err := unix.Write(int(s), p)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case retry(err):
			return fmt.Errorf("write: %w", errTimedOut)
		case err != nil:
			return fmt.Errorf("write: %w", err)
		}
		p = p[n:]
	}
	return nil
}

// retry tells errors after which the same call may do: a timeout, or a signal.
func retry(err error) bool {
	return errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR)
}

func sockaddr(a netip.AddrPort) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}
