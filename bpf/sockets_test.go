package bpf_test

import (
	"net"
	"net/netip"
)

// connection is a TCP connection of the test host with itself.
type connection struct{ client, server netip.AddrPort }

// connectTCP opens one, from the host's second address to its first one.
func connectTCP(d *datapath, f family) connection {
	d.Helper()
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at(f.uplink, 0)))
	d.check(err)
	d.Cleanup(func() { l.Close() })
	c, err := net.DialTCP("tcp", net.TCPAddrFromAddrPort(at(f.second, 0)), l.Addr().(*net.TCPAddr))
	d.check(err)
	d.Cleanup(func() { c.Close() })
	s, err := l.Accept()
	d.check(err)
	d.Cleanup(func() { s.Close() })
	return connection{endpoint(c.LocalAddr()), endpoint(c.RemoteAddr())}
}

// bindUDP opens a UDP socket of the host's and answers its endpoint.
func bindUDP(d *datapath, local netip.AddrPort) netip.AddrPort {
	d.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(local))
	d.check(err)
	d.Cleanup(func() { c.Close() })
	return endpoint(c.LocalAddr())
}

// listenTCP opens a listener of the host's and answers its endpoint.
func listenTCP(d *datapath, local netip.AddrPort) netip.AddrPort {
	d.Helper()
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(local))
	d.check(err)
	d.Cleanup(func() { l.Close() })
	return endpoint(l.Addr())
}

func endpoint(a net.Addr) netip.AddrPort {
	p := netip.MustParseAddrPort(a.String())
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}
