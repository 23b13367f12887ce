package e2e

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
)

// rawSender sends IP packets as they are.
type rawSender struct{ fd int }

func newRawSender(t *testing.T, n *lab.Node, f lab.Family) *rawSender {
	t.Helper()
	s := &rawSender{fd: -1}
	domain := unix.AF_INET
	if f == lab.IPv6 {
		domain = unix.AF_INET6
	}
	err := n.Do(func() (err error) {
		s.fd, err = unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(s.fd) })
	return s
}

func (s *rawSender) send(t *testing.T, packets ...[]byte) {
	t.Helper()
	for _, ip := range packets {
		var to unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte(ip[16:20])}
		if ip[0]>>4 == 6 {
			to = &unix.SockaddrInet6{Addr: [16]byte(ip[24:40])}
		}
		if err := unix.Sendto(s.fd, ip, 0, to); err != nil {
			t.Fatalf("send %d bytes: %v", len(ip), err)
		}
	}
}

// datagram is a UDP datagram in the hands of somebody who cuts it.
type datagram struct {
	src, dst netip.AddrPort
	id       uint32
	payload  []byte
}

// udp is the datagram with its header and checksum.
func (d datagram) udp() []byte {
	b := make([]byte, 8, 8+len(d.payload))
	binary.BigEndian.PutUint16(b, d.src.Port())
	binary.BigEndian.PutUint16(b[2:], d.dst.Port())
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(d.payload)))
	b = append(b, d.payload...)
	pseudo := append(d.src.Addr().AsSlice(), d.dst.Addr().AsSlice()...)
	pseudo = binary.BigEndian.AppendUint32(append(pseudo, 0, unix.IPPROTO_UDP), uint32(len(b))<<16)[:len(pseudo)+4]
	sum := foldBytes(append(pseudo, b...))
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(b[6:], sum)
	return b
}

// part is the fragment that has the bytes from at to end, and tells whether more follow.
func (d datagram) part(at, end int, more bool) []byte {
	body := d.udp()[at:end]
	word := uint16(at)
	if d.src.Addr().Is6() {
		if more {
			word |= 1
		}
		ip := make([]byte, 48, 48+len(body))
		ip[0], ip[6], ip[7] = 6<<4, unix.IPPROTO_FRAGMENT, 64
		binary.BigEndian.PutUint16(ip[4:], uint16(8+len(body)))
		copy(ip[8:], d.src.Addr().AsSlice())
		copy(ip[24:], d.dst.Addr().AsSlice())
		ip[40] = unix.IPPROTO_UDP
		binary.BigEndian.PutUint16(ip[42:], word)
		binary.BigEndian.PutUint32(ip[44:], d.id)
		return append(ip, body...)
	}
	word /= 8
	if more {
		word |= 0x2000
	}
	ip := make([]byte, 20, 20+len(body))
	ip[0], ip[8], ip[9] = 4<<4|5, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], uint16(20+len(body)))
	binary.BigEndian.PutUint16(ip[4:], uint16(d.id))
	binary.BigEndian.PutUint16(ip[6:], word)
	copy(ip[12:], d.src.Addr().AsSlice())
	copy(ip[16:], d.dst.Addr().AsSlice())
	binary.BigEndian.PutUint16(ip[10:], foldBytes(ip))
	return append(ip, body...)
}

// cut makes fragments of so many bytes, a multiple of 8.
func (d datagram) cut(size int) (parts [][]byte) {
	whole := 8 + len(d.payload)
	for at := 0; at < whole; at += size {
		end := min(at+size, whole)
		parts = append(parts, d.part(at, end, end < whole))
	}
	return parts
}

// foldBytes is the Internet checksum.
func foldBytes(b []byte) uint16 {
	var sum uint32
	for i := range b {
		sum += uint32(b[i]) << (8 * (1 - i%2))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

func randomBytes(n int, random *rand.Rand) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(random.Uint32())
	}
	return b
}

// caller is a UDP socket, whose datagrams are sent by hand.
type caller struct {
	*net.UDPConn
	raw *rawSender
	src netip.AddrPort
}

func newCaller(t *testing.T, n *lab.Node, src netip.AddrPort) caller {
	t.Helper()
	conn, err := n.ListenUDP(src)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return caller{conn, newRawSender(t, n, lab.FamilyOf(src.Addr())), src}
}

// hears waits for the payload, or for so long.
func (c caller) hears(payload []byte, patience time.Duration) bool {
	_ = c.SetReadDeadline(time.Now().Add(patience))
	buffer := make([]byte, 65536)
	for {
		n, err := c.Read(buffer)
		if err != nil {
			return false
		}
		if bytes.Equal(buffer[:n], payload) {
			return true
		}
	}
}
