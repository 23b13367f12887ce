package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"
)

// Echo is a server that sends back what it gets, and notes from whom.
type Echo struct {
	Addr netip.AddrPort // where it listens

	closer io.Closer
	done   sync.WaitGroup
	mu     sync.Mutex
	peers  []netip.AddrPort
	conns  map[net.Conn]struct{} // nil once closed
}

// StartTCPEcho serves at an address of the node; port 0: the kernel's choice.
func StartTCPEcho(ctx context.Context, n *Node, at netip.AddrPort) (*Echo, error) {
	listener, err := n.ListenTCP(ctx, at)
	if err != nil {
		return nil, fmt.Errorf("tcp echo: %w", err)
	}
	e := &Echo{Addr: addrPort(listener.Addr()), closer: listener, conns: make(map[net.Conn]struct{})}
	e.done.Add(1)
	go func() {
		defer e.done.Done()
		for {
			conn, err := listener.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil || !e.hold(conn) {
				continue
			}
			e.note(addrPort(conn.RemoteAddr()))
			e.done.Add(1)
			go func() {
				defer e.done.Done()
				defer e.drop(conn)
				_, _ = io.Copy(conn, conn) // the client sees what went wrong
			}()
		}
	}()
	return e, nil
}

// StartUDPEcho serves at an address of the node; port 0: the kernel's choice.
func StartUDPEcho(n *Node, at netip.AddrPort) (*Echo, error) {
	conn, err := n.ListenUDP(at)
	if err != nil {
		return nil, fmt.Errorf("udp echo: %w", err)
	}
	e := &Echo{Addr: addrPort(conn.LocalAddr()), closer: conn}
	e.done.Add(1)
	go func() {
		defer e.done.Done()
		packet := make([]byte, 65536)
		for {
			n, peer, err := conn.ReadFromUDPAddrPort(packet)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil { // an ICMP error about an earlier answer
				continue
			}
			e.note(netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port()))
			_, _ = conn.WriteToUDPAddrPort(packet[:n], peer)
		}
	}()
	return e, nil
}

// Peers returns who was seen so far: one entry a connection or a datagram.
func (e *Echo) Peers() []netip.AddrPort {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.peers)
}

// Close ends the server and its connections.
func (e *Echo) Close() {
	_ = e.closer.Close()
	e.mu.Lock()
	for conn := range e.conns {
		_ = conn.Close()
	}
	e.conns = nil
	e.mu.Unlock()
	e.done.Wait()
}

func (e *Echo) note(peer netip.AddrPort) {
	e.mu.Lock()
	e.peers = append(e.peers, peer)
	e.mu.Unlock()
}

func (e *Echo) hold(conn net.Conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.conns == nil {
		_ = conn.Close()
		return false
	}
	e.conns[conn] = struct{}{}
	return true
}

func (e *Echo) drop(conn net.Conn) {
	_ = conn.Close()
	e.mu.Lock()
	delete(e.conns, conn)
	e.mu.Unlock()
}

// ExchangeTCP connects, sends the payload, and waits until it has come back. It returns
// the client's own address, to compare with what the server saw.
func ExchangeTCP(ctx context.Context, n *Node, to netip.AddrPort, payload []byte) (netip.AddrPort, error) {
	ctx, cancel := withDefaultTimeout(ctx)
	defer cancel()
	conn, err := n.DialTCP(ctx, netip.AddrPort{}, to)
	if err != nil {
		return netip.AddrPort{}, noReply(err)
	}
	defer conn.Close()
	return exchange(ctx, conn, payload)
}

// ExchangeUDP sends the payload as one datagram, once, and waits until it has come back.
// A zero from lets the kernel choose. It returns the client's own address.
func ExchangeUDP(ctx context.Context, n *Node, from, to netip.AddrPort, payload []byte) (netip.AddrPort, error) {
	ctx, cancel := withDefaultTimeout(ctx)
	defer cancel()
	conn, err := n.DialUDP(from, to)
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer conn.Close()
	return exchange(ctx, conn, payload)
}

func exchange(ctx context.Context, conn net.Conn, payload []byte) (netip.AddrPort, error) {
	local := addrPort(conn.LocalAddr())
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer stop()
	if _, err := conn.Write(payload); err != nil {
		return local, noReply(err)
	}
	got := make([]byte, len(payload))
	if _, err := io.ReadFull(conn, got); err != nil {
		return local, noReply(err)
	}
	if !bytes.Equal(got, payload) {
		return local, fmt.Errorf("echo from %s: %w", conn.RemoteAddr(), ErrNotIntact)
	}
	return local, nil
}

// noReply tells a time-out from other errors.
func noReply(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: %w", ErrNoReply, err)
	}
	return err
}

// withDefaultTimeout bounds a context that has no deadline.
func withDefaultTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, DefaultTimeout)
}

// addrPort converts a socket's address; IPv4 stays IPv4.
func addrPort(addr net.Addr) netip.AddrPort {
	var ap netip.AddrPort
	switch addr := addr.(type) {
	case *net.TCPAddr:
		ap = addr.AddrPort()
	case *net.UDPAddr:
		ap = addr.AddrPort()
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
