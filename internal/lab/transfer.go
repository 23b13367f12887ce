package lab

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

const transferBlock = 256 << 10 // bytes written at once

// Sum is a SHA-256 digest.
type Sum [sha256.Size]byte

// Transferred is one direction of a transfer.
type Transferred struct {
	Bytes          int64
	Sent, Received Sum
}

// Transfer is a bulk TCP transfer that has ended, in which both sides sent at once.
type Transfer struct {
	Up, Down      Transferred // from the client, and to it
	Client        netip.AddrPort
	ClientAsSeen  netip.AddrPort // by the server
	Duration      time.Duration
	MaxSegment    int // TCP's segment size at the end, bytes
	Retransmitted int // segments that the client sent again
}

// Server is a TCP server of transfers; it serves one client after the other.
type Server struct {
	Addr netip.AddrPort // where it listens

	listener *net.TCPListener
	cancel   context.CancelFunc
	done     chan struct{}
}

// serverReport is what the server tells the client at the end.
type serverReport struct {
	received, sent Sum
	client         netip.AddrPort
}

// StartServer serves transfers at an address of the node; port 0: the kernel's choice.
func StartServer(ctx context.Context, n *Node, at netip.AddrPort) (*Server, error) {
	listener, err := n.ListenTCP(ctx, at)
	if err != nil {
		return nil, fmt.Errorf("transfer server: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	s := &Server{Addr: addrPort(listener.Addr()), listener: listener, cancel: cancel, done: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { _ = listener.Close() })
	go func() {
		defer close(s.done)
		defer stop()
		for {
			conn, err := listener.AcceptTCP()
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				serve(ctx, conn)
			}
		}
	}()
	return s, nil
}

// Close ends the server and a transfer that is under way.
func (s *Server) Close() {
	s.cancel()
	_ = s.listener.Close()
	<-s.done
}

// RunTransfer connects to a server, sends up bytes and gets down bytes at the same time,
// and compares the digests of both sides. rate bounds the sending in bytes a second; 0:
// as fast as it goes. The error wraps ErrNotIntact when other bytes arrived than were sent.
func RunTransfer(ctx context.Context, n *Node, to netip.AddrPort, up, down, rate int64) (Transfer, error) {
	t, err := runTransfer(ctx, n, to, up, down, rate)
	if err != nil {
		return t, fmt.Errorf("transfer from %s to %s: %w", n.Role, to, err)
	}
	return t, nil
}

func runTransfer(ctx context.Context, n *Node, to netip.AddrPort, up, down, rate int64) (Transfer, error) {
	conn, err := n.DialTCP(ctx, netip.AddrPort{}, to)
	if err != nil {
		return Transfer{}, noReply(err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer stop()

	start := time.Now()
	t := Transfer{Up: Transferred{Bytes: up}, Down: Transferred{Bytes: down}, Client: addrPort(conn.LocalAddr())}
	if err := binary.Write(conn, binary.BigEndian, []int64{up, down, rate}); err != nil {
		return t, err
	}
	if t.Up.Sent, t.Down.Received, err = bothWays(ctx, conn, up, down, rate); err != nil {
		return t, err
	}
	report, err := readReport(conn)
	if err != nil {
		return t, err
	}
	t.Duration = time.Since(start)
	t.Up.Received, t.Down.Sent, t.ClientAsSeen = report.received, report.sent, report.client
	if t.MaxSegment, t.Retransmitted, err = segmentInfo(conn); err != nil {
		return t, err
	}
	if t.Up.Sent != t.Up.Received || t.Down.Sent != t.Down.Received {
		return t, ErrNotIntact
	}
	return t, nil
}

// serve does the server's side. Errors end the connection, where the client sees them.
func serve(ctx context.Context, conn *net.TCPConn) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer stop()
	var request [3]int64 // up, down, rate
	if err := binary.Read(conn, binary.BigEndian, &request); err != nil {
		return
	}
	sent, received, err := bothWays(ctx, conn, request[1], request[0], request[2])
	if err != nil {
		return
	}
	_ = writeReport(conn, serverReport{received: received, sent: sent, client: addrPort(conn.RemoteAddr())})
}

// bothWays sends and receives at the same time.
func bothWays(ctx context.Context, conn net.Conn, send, receive, rate int64) (sent, received Sum, err error) {
	var (
		sender  sync.WaitGroup
		sendErr error
	)
	sender.Go(func() {
		if sent, sendErr = sendRandom(ctx, conn, send, rate); sendErr != nil {
			_ = conn.SetDeadline(time.Now()) // or the receiver would wait for ever
		}
	})
	received, receiveErr := receiveAll(conn, receive)
	if receiveErr != nil {
		_ = conn.SetDeadline(time.Now())
	}
	sender.Wait()
	if receiveErr != nil {
		return sent, received, noReply(receiveErr)
	}
	return sent, received, noReply(sendErr)
}

// sendRandom sends bytes of which no two blocks are the same.
func sendRandom(ctx context.Context, conn io.Writer, size, rate int64) (Sum, error) {
	block := make([]byte, transferBlock)
	_, _ = rand.Read(block) // never fails
	digest := sha256.New()
	start := time.Now()
	for done := int64(0); done < size; {
		binary.BigEndian.PutUint64(block, uint64(done))
		part := block[:min(size-done, int64(len(block)))]
		digest.Write(part)
		if _, err := conn.Write(part); err != nil {
			return Sum{}, err
		}
		done += int64(len(part))
		if rate > 0 {
			due := start.Add(time.Duration(float64(done) / float64(rate) * float64(time.Second)))
			if err := sleepUntil(ctx, due); err != nil {
				return Sum{}, err
			}
		}
	}
	return Sum(digest.Sum(nil)), nil
}

func receiveAll(conn io.Reader, size int64) (Sum, error) {
	digest := sha256.New()
	// Not io.CopyN: its 32 kB a read would be most of the work.
	block := make([]byte, transferBlock)
	for size > 0 {
		n, err := conn.Read(block[:min(size, int64(len(block)))])
		digest.Write(block[:n])
		size -= int64(n)
		if err != nil && size > 0 {
			return Sum{}, fmt.Errorf("%d bytes missing: %w", size, err)
		}
	}
	return Sum(digest.Sum(nil)), nil
}

func writeReport(w io.Writer, r serverReport) error {
	client, err := r.client.MarshalBinary()
	if err != nil {
		return err
	}
	message := append(r.received[:], r.sent[:]...)
	message = append(message, byte(len(client)))
	_, err = w.Write(append(message, client...))
	return err
}

func readReport(r io.Reader) (serverReport, error) {
	var (
		report serverReport
		head   [2*sha256.Size + 1]byte
	)
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return report, fmt.Errorf("server's report: %w", noReply(err))
	}
	copy(report.received[:], head[:])
	copy(report.sent[:], head[sha256.Size:])
	client := make([]byte, head[2*sha256.Size])
	if _, err := io.ReadFull(r, client); err != nil {
		return report, fmt.Errorf("server's report: %w", noReply(err))
	}
	return report, report.client.UnmarshalBinary(client)
}

// sleepUntil waits until the time or the end of the context.
func sleepUntil(ctx context.Context, due time.Time) error {
	wait := time.Until(due)
	if wait <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
