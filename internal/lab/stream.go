package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	streamTick   = time.Millisecond
	streamBuffer = 32 << 20 // bytes of socket buffer at the receiver
	streamHeader = 8        // bytes: sequence number
)

// Sink counts the datagrams of streams.
type Sink struct {
	Addr netip.AddrPort // where it receives

	conn  *net.UDPConn
	done  chan struct{}
	mu    sync.Mutex
	seen  map[netip.AddrPort]uint64
	seqs  []uint64 // one bit a sequence number
	count SinkCount
}

// SinkCount is what a sink got.
type SinkCount struct {
	Packets    uint64 // all of them
	Distinct   uint64 // different sequence numbers
	Duplicates uint64
	Reordered  uint64 // came behind one with a higher number
	Peers      map[netip.AddrPort]uint64
	highest    uint64
}

// StartSink receives datagrams at an address of the node; port 0: the kernel's choice.
func StartSink(n *Node, at netip.AddrPort) (*Sink, error) {
	conn, err := n.ListenUDP(at)
	if err != nil {
		return nil, fmt.Errorf("udp sink: %w", err)
	}
	raw, err := conn.SyscallConn()
	if err == nil {
		err = controlEach(raw, func(fd int) error {
			return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, streamBuffer)
		})
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("udp sink: buffer: %w", permission(err))
	}
	s := &Sink{
		Addr: addrPort(conn.LocalAddr()), conn: conn, done: make(chan struct{}),
		seen: make(map[netip.AddrPort]uint64),
	}
	go s.receive()
	return s, nil
}

// Count returns what has come so far.
func (s *Sink) Count() SinkCount {
	s.mu.Lock()
	defer s.mu.Unlock()
	count := s.count
	count.Peers = make(map[netip.AddrPort]uint64, len(s.seen))
	for peer, n := range s.seen {
		count.Peers[peer] = n
	}
	return count
}

// Close ends the sink.
func (s *Sink) Close() {
	_ = s.conn.Close()
	<-s.done
}

func (s *Sink) receive() {
	defer close(s.done)
	packet := make([]byte, 65536)
	for {
		n, peer, err := s.conn.ReadFromUDPAddrPort(packet)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || n < streamHeader {
			continue
		}
		s.mu.Lock()
		s.seen[netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port())]++
		s.account(binary.BigEndian.Uint64(packet))
		s.mu.Unlock()
	}
}

func (s *Sink) account(seq uint64) {
	s.count.Packets++
	if seq < s.count.highest {
		s.count.Reordered++
	}
	s.count.highest = max(s.count.highest, seq)
	const maxSeq = 1 << 32 // a number beyond is not from a stream
	if seq >= maxSeq {
		return
	}
	for uint64(len(s.seqs))*64 <= seq {
		s.seqs = append(s.seqs, make([]uint64, 1024)...)
	}
	bit := uint64(1) << (seq % 64)
	if s.seqs[seq/64]&bit != 0 {
		s.count.Duplicates++
		return
	}
	s.seqs[seq/64] |= bit
	s.count.Distinct++
}

// StreamOptions describe a UDP stream of numbered datagrams.
type StreamOptions struct {
	From netip.AddrPort // zero: the kernel's choice
	Rate int            // datagrams a second
	Size int            // data bytes of each, at least 8; 0: 64
}

// RunStream sends numbered datagrams at a fixed rate until the context ends, and returns
// how many were sent. A sender that was late catches up.
func RunStream(ctx context.Context, n *Node, to netip.AddrPort, o StreamOptions) (uint64, error) {
	if o.Size == 0 {
		o.Size = 64
	}
	if o.Rate <= 0 || o.Size < streamHeader {
		return 0, fmt.Errorf("stream to %s: %w: rate %d, size %d", to, ErrBadOptions, o.Rate, o.Size)
	}
	conn, err := n.DialUDP(o.From, to)
	if err != nil {
		return 0, fmt.Errorf("stream to %s: %w", to, err)
	}
	defer conn.Close()
	var (
		packet = make([]byte, o.Size)
		sent   uint64
		start  = time.Now()
		ticker = time.NewTicker(streamTick)
	)
	defer ticker.Stop()
	for {
		due := uint64(time.Since(start).Seconds() * float64(o.Rate))
		for ; sent < due; sent++ {
			binary.BigEndian.PutUint64(packet, sent)
			if _, err := conn.Write(packet); err != nil {
				return sent, fmt.Errorf("stream to %s: datagram %d: %w", to, sent, err)
			}
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return sent, nil
		}
	}
}
