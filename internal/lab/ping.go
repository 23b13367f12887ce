package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Types of ICMP messages, from RFC 792 and RFC 4443.
const (
	icmpEchoReply      = 0
	icmpUnreachable    = 3
	icmpSourceQuench   = 4
	icmpRedirect       = 5
	icmpEcho           = 8
	icmpTimeExceeded   = 11
	icmpParameter      = 12
	icmp6Unreachable   = 1
	icmp6PacketTooBig  = 2
	icmp6TimeExceeded  = 3
	icmp6Parameter     = 4
	icmp6EchoRequest   = 128
	icmp6EchoReply     = 129
	icmpFragNeededCode = 4

	icmpHeaderLen = 8
)

// DefaultTimeout is how long the traffic helpers wait where no other time is given.
const DefaultTimeout = 2 * time.Second

// PingOptions say what the echo request looks like.
type PingOptions struct {
	// ID and Seq are those of the echo request; ID 0: a random one.
	ID, Seq uint16
	// Size is the number of data bytes behind the 8 bytes of ICMP header; 0: 56.
	Size int
	// DontFragment sets DF (IPv4), and keeps the kernel from fragmenting (both).
	DontFragment bool
	// TTL is the TTL or hop limit; 0: the kernel's.
	TTL int
	// Source is the address to send from; zero: the kernel's choice.
	Source netip.Addr
	// Timeout is how long to wait for the reply; 0: DefaultTimeout.
	Timeout time.Duration
}

// PingReply is an answered echo request.
type PingReply struct {
	From netip.Addr    // who answered
	RTT  time.Duration // from sending to receiving
	Size int           // data bytes that came back, equal to those sent
}

// ICMPError is an ICMP error that came instead of a reply and quotes the request.
type ICMPError struct {
	From       netip.Addr // who sent it
	Type, Code uint8      // of the From's family
	MTU        int        // of a "fragmentation needed" or "packet too big", else 0
	QuotedSrc  netip.Addr // source of the packet that is quoted
	QuotedDst  netip.Addr // destination of the packet that is quoted
}

// Error says what the type and code mean.
func (e *ICMPError) Error() string {
	switch {
	case e.TooBig():
		return fmt.Sprintf("icmp from %s: packet too big, mtu %d", e.From, e.MTU)
	case e.TimeExceeded():
		return fmt.Sprintf("icmp from %s: time exceeded", e.From)
	}
	return fmt.Sprintf("icmp from %s: type %d, code %d", e.From, e.Type, e.Code)
}

// TooBig tells whether the packet was too big for a hop on its way.
func (e *ICMPError) TooBig() bool {
	if e.From.Is4() {
		return e.Type == icmpUnreachable && e.Code == icmpFragNeededCode
	}
	return e.Type == icmp6PacketTooBig
}

// TimeExceeded tells whether the TTL ran out on the way.
func (e *ICMPError) TimeExceeded() bool {
	if e.From.Is4() {
		return e.Type == icmpTimeExceeded
	}
	return e.Type == icmp6TimeExceeded
}

// Ping sends one echo request and waits for what answers it. The error is an *ICMPError
// when an ICMP error came, and wraps ErrNoReply when nothing did.
func Ping(ctx context.Context, from *Node, to netip.Addr, o PingOptions) (PingReply, error) {
	if o.Size == 0 {
		o.Size = 56
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.ID == 0 {
		var b [2]byte
		_, _ = rand.Read(b[:]) // never fails
		o.ID = binary.NativeEndian.Uint16(b[:])
	}
	reply, err := ping(ctx, from, to, o)
	if err != nil {
		return reply, fmt.Errorf("ping %s from %s: %w", to, from.Role, err)
	}
	return reply, nil
}

func ping(ctx context.Context, from *Node, to netip.Addr, o PingOptions) (PingReply, error) {
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	conn, err := openICMP(from, to, o)
	if err != nil {
		return PingReply{}, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Now()) })
	defer stop()

	request := echoRequest(FamilyOf(to), o)
	start := time.Now()
	if _, err := conn.WriteToIP(request, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		return PingReply{}, err
	}
	buffer := make([]byte, 65536)
	for {
		n, peer, err := conn.ReadFromIP(buffer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return PingReply{}, fmt.Errorf("%w in %s", ErrNoReply, time.Since(start).Round(time.Millisecond))
		}
		if err != nil {
			return PingReply{}, err
		}
		source, _ := netip.AddrFromSlice(peer.IP)
		source = source.Unmap()
		message := buffer[:n]
		if isReply(message, request, source) {
			if !bytes.Equal(message[icmpHeaderLen:], request[icmpHeaderLen:]) {
				return PingReply{}, ErrNotIntact
			}
			return PingReply{From: source, RTT: time.Since(start), Size: n - icmpHeaderLen}, nil
		}
		if e := parseICMPError(message, request, source); e != nil {
			return PingReply{}, e
		}
	}
}

// openICMP opens a raw socket with the options of the request.
func openICMP(n *Node, to netip.Addr, o PingOptions) (*net.IPConn, error) {
	network := "ip6:ipv6-icmp"
	if to.Is4() {
		network = "ip4:icmp"
	}
	var local *net.IPAddr
	if o.Source.IsValid() {
		local = &net.IPAddr{IP: o.Source.AsSlice()}
	}
	var conn *net.IPConn
	err := n.Do(func() (err error) {
		conn, err = net.ListenIP(network, local)
		return permission(err)
	})
	if err != nil {
		return nil, err
	}
	options := []struct{ level, name, value int }{}
	if to.Is4() {
		if o.TTL != 0 {
			options = append(options, struct{ level, name, value int }{unix.IPPROTO_IP, unix.IP_TTL, o.TTL})
		}
		discover := unix.IP_PMTUDISC_DONT
		if o.DontFragment {
			discover = unix.IP_PMTUDISC_DO
		}
		options = append(options, struct{ level, name, value int }{unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, discover})
	} else {
		if o.TTL != 0 {
			options = append(options, struct{ level, name, value int }{unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, o.TTL})
		}
		if o.DontFragment {
			options = append(options,
				struct{ level, name, value int }{unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO},
				struct{ level, name, value int }{unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1})
		}
	}
	raw, err := conn.SyscallConn()
	if err == nil {
		err = controlEach(raw, func(fd int) error {
			for _, option := range options {
				if err := unix.SetsockoptInt(fd, option.level, option.name, option.value); err != nil {
					return fmt.Errorf("socket option %d: %w", option.name, err)
				}
			}
			return nil
		})
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

// echoRequest builds the ICMP message. The kernel fills in the checksum of ICMPv6.
func echoRequest(f Family, o PingOptions) []byte {
	message := make([]byte, icmpHeaderLen+o.Size)
	message[0] = icmp6EchoRequest
	if f == IPv4 {
		message[0] = icmpEcho
	}
	binary.BigEndian.PutUint16(message[4:], o.ID)
	binary.BigEndian.PutUint16(message[6:], o.Seq)
	for i := range o.Size {
		message[icmpHeaderLen+i] = byte(i)
	}
	if f == IPv4 {
		binary.BigEndian.PutUint16(message[2:], internetChecksum(message))
	}
	return message
}

func isReply(message, request []byte, from netip.Addr) bool {
	want := byte(icmp6EchoReply)
	if from.Is4() {
		want = icmpEchoReply
	}
	return len(message) == len(request) && message[0] == want && bytes.Equal(message[4:8], request[4:8])
}

// parseICMPError returns the error that a message is, nil if it is none or quotes
// something else than the request.
func parseICMPError(message, request []byte, from netip.Addr) *ICMPError {
	if len(message) < icmpHeaderLen {
		return nil
	}
	e := &ICMPError{From: from, Type: message[0], Code: message[1]}
	if from.Is4() {
		switch e.Type {
		case icmpUnreachable, icmpSourceQuench, icmpRedirect, icmpTimeExceeded, icmpParameter:
		default:
			return nil
		}
		if e.TooBig() {
			e.MTU = int(binary.BigEndian.Uint16(message[6:]))
		}
	} else {
		switch e.Type {
		case icmp6Unreachable, icmp6PacketTooBig, icmp6TimeExceeded, icmp6Parameter:
		default:
			return nil
		}
		if e.TooBig() {
			e.MTU = int(binary.BigEndian.Uint32(message[4:]))
		}
	}
	quoted := parseIP(message[icmpHeaderLen:])
	e.QuotedSrc, e.QuotedDst = quoted.Src, quoted.Dst
	if len(quoted.Payload) < icmpHeaderLen || quoted.Payload[0] != request[0] || !bytes.Equal(quoted.Payload[4:8], request[4:8]) {
		return nil
	}
	return e
}

// internetChecksum is that of RFC 1071, over a message whose checksum field is zero.
func internetChecksum(b []byte) uint16 {
	var sum uint32
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
