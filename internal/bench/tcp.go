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

const (
	messageSize = 64        // bytes of a request, and of its answer
	streamBlock = 256 << 10 // bytes written at once
	// lateConnections is the share of connections that may fail.
	lateConnections = 0.001
)

// public is where the world reaches the first container's published port.
func (c *contender) public() netip.AddrPort {
	if c.nat {
		return netip.AddrPortFrom(c.rig.hostAddr(), publishedPort)
	}
	return netip.AddrPortFrom(c.rig.containerAddr(0), publishedPort)
}

// serverCPU is where servers run: apart from the client, where there are two CPUs.
func serverCPU(cpus int) int { return min(1, cpus-1) }

// serve runs a server on a pinned thread beside a client on CPU 0, until the client is done.
// at is the socket that the server waits at.
func serve(ctx context.Context, cpus int, at socket, server, client func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	served := make(chan error, 1)
	go func() { served <- onCPU(serverCPU(cpus), func() error { return server(ctx) }) }()
	err := onCPU(0, func() error { return client(ctx) })
	cancel()
	at.wake()
	if failed := <-served; failed != nil && !errors.Is(failed, context.Canceled) {
		err = errors.Join(err, fmt.Errorf("server: %w", failed))
	}
	return err
}

// connections returns how many connections a second a serial client of the published port
// opens, with a request and an answer on each.
func (c *contender) connections(ctx context.Context, cpus int, d time.Duration) (rate float64, err error) {
	r := c.rig
	listener, err := listen(r.Containers[0], unix.SOCK_STREAM, netip.AddrPortFrom(r.containerAddr(0), publishedPort))
	if err != nil {
		return 0, err
	}
	defer listener.close()
	err = serve(ctx, cpus, listener, func(ctx context.Context) error {
		message := make([]byte, messageSize)
		for {
			s, err := listener.accept(ctx)
			if err != nil {
				return err
			}
			if n, err := s.read(message); err == nil && n > 0 {
				_ = s.write(message) // the client sees what went wrong
			}
			s.close() // first: so the waiting ends are the server's
		}
	}, func(ctx context.Context) error {
		return r.World.Do(func() error {
			if err := pin(0); err != nil {
				return err
			}
			done, failed := 0, 0
			start := time.Now()
			for time.Since(start) < d && ctx.Err() == nil {
				if err := request(c.public()); err != nil {
					if failed++; float64(failed) > 1+lateConnections*float64(done) {
						return fmt.Errorf("%d of %d connections failed: %w", failed, done+failed, err)
					}
					continue
				}
				done++
			}
			rate = float64(done) / time.Since(start).Seconds()
			return ctx.Err()
		})
	})
	return rate, err
}

// request opens a connection from the namespace of the thread, sends a message, and reads the
// answer to its end.
func request(to netip.AddrPort) error {
	s, err := newSocket(unix.SOCK_STREAM)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.connect(to); err != nil {
		return err
	}
	var message [messageSize]byte
	if err := s.write(message[:]); err != nil {
		return err
	}
	for got := 0; ; {
		n, err := s.read(message[:])
		if err != nil {
			return err
		}
		if got += n; n == 0 {
			if got != messageSize {
				return fmt.Errorf("%d bytes of an answer of %d", got, messageSize)
			}
			return nil
		}
	}
}

// throughput returns the gigabits a second of one TCP connection that the world opens to the
// published port: inward the client sends, outward the server.
func (c *contender) throughput(ctx context.Context, cpus int, inward bool, d time.Duration) (float64, error) {
	r := c.rig
	return streamBetween(ctx, cpus, inward, d, r.World, r.Containers[0], netip.AddrPortFrom(r.containerAddr(0), publishedPort), c.public())
}

// streamBetween measures a TCP connection to a server that listens at an address and is
// reached by another.
func streamBetween(ctx context.Context, cpus int, clientSends bool, d time.Duration, client, server *lab.Node, at, to netip.AddrPort) (rate float64, err error) {
	listener, err := listen(server, unix.SOCK_STREAM, at)
	if err != nil {
		return 0, err
	}
	defer listener.close()
	receive := func(ctx context.Context, s socket) (err error) {
		rate, err = drain(ctx, s)
		return err
	}
	send := func(ctx context.Context, s socket) error { return flood(ctx, s, d) }
	first, second := send, receive
	if !clientSends {
		first, second = receive, send
	}
	finished := make(chan error, 1)
	err = serve(ctx, cpus, listener, func(ctx context.Context) error {
		s, err := listener.accept(ctx)
		if err != nil {
			finished <- err
			return err
		}
		defer s.close()
		err = second(context.WithoutCancel(ctx), s) // ends with the client's side, or by itself
		finished <- err
		return err
	}, func(ctx context.Context) error {
		s, err := openSocket(client, unix.SOCK_STREAM)
		if err != nil {
			return err
		}
		defer s.close()
		if err := s.connect(to); err != nil {
			return err
		}
		if err := first(ctx, s); err != nil {
			return err
		}
		_ = unix.Shutdown(int(s), unix.SHUT_WR)
		return <-finished
	})
	return rate, err
}

// flood sends for a while.
func flood(ctx context.Context, s socket, d time.Duration) error {
	block := make([]byte, streamBlock)
	for start := time.Now(); time.Since(start) < d && ctx.Err() == nil; {
		if err := s.write(block); err != nil {
			return err
		}
	}
	_ = unix.Shutdown(int(s), unix.SHUT_WR)
	return ctx.Err()
}

// drain reads to the end, and returns gigabits a second from the first byte on.
func drain(ctx context.Context, s socket) (float64, error) {
	var (
		block = make([]byte, streamBlock)
		total int64
		start time.Time
	)
	for ctx.Err() == nil {
		n, err := s.read(block)
		if err != nil {
			return 0, err
		}
		if n == 0 {
			break
		}
		if start.IsZero() {
			start = time.Now()
		}
		total += int64(n)
	}
	if total == 0 {
		return 0, fmt.Errorf("no byte came: %w", errTimedOut)
	}
	return float64(total) * 8 / 1e9 / time.Since(start).Seconds(), ctx.Err()
}

// pin binds the calling thread to a CPU.
func pin(cpu int) error {
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pin to CPU %d: %w", cpu, err)
	}
	return nil
}
