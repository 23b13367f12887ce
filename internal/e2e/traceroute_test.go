package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
	"tcnat/loader"
)

// A traceroute from the container shows the hops, by ICMP as by UDP.
func TestTraceroute(t *testing.T) {
	forEachMode(t, lab.Options{}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		r.attach(t, loader.AttachOptions{Mode: mode})
		c := r.Containers[0]
		for _, f := range lab.Families() {
			to := r.World.Addr(f)
			want := []netip.Addr{lab.BridgeAddr(f), r.Router.Addr(f), r.ISP.Addr(f), to}
			for protocol, probe := range map[string]func(context.Context, *lab.Node, netip.Addr, int) (netip.Addr, error){
				"icmp": probeICMP,
				"udp":  probeUDP,
			} {
				t.Run(name(f, protocol), func(t *testing.T) {
					var hops []netip.Addr
					for ttl := 1; ttl <= len(want); ttl++ {
						hop, err := probe(t.Context(), c, to, ttl)
						if err != nil {
							t.Errorf("ttl %d: %v", ttl, err)
						}
						hops = append(hops, hop)
					}
					if !slices.Equal(hops, want) {
						t.Errorf("hops %v, want %v", hops, want)
					}
				})
			}
		}
	})
}

// probeICMP returns who answered an echo request with that TTL.
func probeICMP(ctx context.Context, from *lab.Node, to netip.Addr, ttl int) (netip.Addr, error) {
	reply, err := lab.Ping(ctx, from, to, lab.PingOptions{TTL: ttl})
	var icmp *lab.ICMPError
	if errors.As(err, &icmp) {
		if icmp.QuotedSrc != from.Addr(lab.FamilyOf(to)) {
			return icmp.From, fmt.Errorf("the error quotes a packet from %s", icmp.QuotedSrc)
		}
		return icmp.From, nil
	}
	return reply.From, err
}

// probeUDP returns who complained about a datagram with that TTL to a closed port, as the
// kernel tells the socket that sent it: it does so only if the quoted packet is the socket's.
func probeUDP(ctx context.Context, from *lab.Node, to netip.Addr, ttl int) (netip.Addr, error) {
	const firstPort = 33434 // traceroute's
	conn, err := from.DialUDP(netip.AddrPort{}, at(to, uint16(firstPort+ttl)))
	if err != nil {
		return netip.Addr{}, err
	}
	defer conn.Close()
	raw, err := conn.SyscallConn()
	if err != nil {
		return netip.Addr{}, err
	}
	level, ttlOption, errorOption := unix.IPPROTO_IP, unix.IP_TTL, unix.IP_RECVERR
	if to.Is6() {
		level, ttlOption, errorOption = unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, unix.IPV6_RECVERR
	}
	var optionErr error
	if err := raw.Control(func(fd uintptr) {
		optionErr = errors.Join(
			unix.SetsockoptInt(int(fd), level, ttlOption, ttl),
			unix.SetsockoptInt(int(fd), level, errorOption, 1))
	}); err != nil || optionErr != nil {
		return netip.Addr{}, errors.Join(err, optionErr)
	}
	if _, err := conn.Write([]byte("probe")); err != nil {
		return netip.Addr{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, lab.DefaultTimeout)
	defer cancel()
	for {
		var (
			offender netip.Addr
			recvErr  error
		)
		if err := raw.Control(func(fd uintptr) { offender, recvErr = nextOffender(int(fd)) }); err != nil {
			return netip.Addr{}, err
		}
		if !errors.Is(recvErr, unix.EAGAIN) {
			return offender, recvErr
		}
		select {
		case <-ctx.Done():
			return netip.Addr{}, lab.ErrNoReply
		case <-time.After(time.Millisecond):
		}
	}
}

// nextOffender takes one ICMP error from a socket's error queue and returns who sent it.
func nextOffender(fd int) (netip.Addr, error) {
	control := make([]byte, 512)
	_, n, _, _, err := unix.Recvmsg(fd, make([]byte, 64), control, unix.MSG_ERRQUEUE)
	if err != nil {
		return netip.Addr{}, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil {
		return netip.Addr{}, err
	}
	const extendedError = 16 // sizeof(struct sock_extended_err), the offender's sockaddr follows
	for _, message := range messages {
		if len(message.Data) < extendedError+8 {
			continue
		}
		sockaddr := message.Data[extendedError:]
		switch binary.NativeEndian.Uint16(sockaddr) {
		case unix.AF_INET:
			return netip.AddrFrom4([4]byte(sockaddr[4:8])), nil
		case unix.AF_INET6:
			if len(sockaddr) >= 24 {
				return netip.AddrFrom16([16]byte(sockaddr[8:24])), nil
			}
		}
	}
	return netip.Addr{}, errors.New("an error without an offender")
}
