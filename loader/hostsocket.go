package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// EndHostSockets ends the host's own sockets that are connected to a container by a rule that has gone:
// they would talk to its old address for ever. Call it after rules were deleted or changed; ended
// says how many. What has sent datagrams unconnected is led anew by its next one.
//
// The error wraps ErrNotSupported where the kernel cannot end sockets: those then stay until
// whoever has them closes them.
func (d *Datapath) EndHostSockets() (ended int, err error) {
	gone, err := d.state.EndedHostPeers()
	if err != nil || len(gone) == 0 {
		return 0, err
	}
	peers := make(map[hostSocket]bool)
	for _, peer := range gone {
		if peer.Connected {
			peers[hostSocket{peer.Cookie, peer.To}] = true
		}
	}
	if len(peers) > 0 {
		if ended, err = endSockets(peers); err != nil {
			return ended, fmt.Errorf("end the host's sockets to containers: %w", err)
		}
	}
	return ended, d.state.ForgetHostPeers(gone)
}

// hostSocket is a socket, and whom it must be connected to still.
type hostSocket struct {
	cookie uint64
	to     netip.AddrPort
}

// endSockets looks for them among the sockets of this network namespace.
func endSockets(wanted map[hostSocket]bool) (ended int, err error) {
	for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			request := inetDiagRequest{family: family, protocol: protocol, states: ^uint32(0)}
			messages, err := retryDump(func() ([][]byte, error) {
				dump := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
				dump.AddData(request)
				return dump.Execute(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY)
			})
			if err != nil {
				return ended, knownDiag(err)
			}
			for _, message := range messages {
				id, socket, err := parseInetDiag(message)
				if err != nil {
					return ended, err
				}
				if !wanted[socket] {
					continue
				}
				request.id = id
				switch err := request.destroy(); {
				case err == nil:
					ended++
				case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESTALE): // closed meanwhile
				default:
					return ended, knownDiag(err)
				}
			}
		}
	}
	return ended, nil
}

func knownDiag(err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%w: needs CONFIG_INET_DIAG_DESTROY, and inet_diag, tcp_diag and udp_diag", ErrNotSupported)
	}
	return known(err)
}

// inetDiagRequest is struct inet_diag_req_v2.
type inetDiagRequest struct {
	family, protocol uint8
	states           uint32
	id               [inetDiagIDSize]byte
}

const (
	inetDiagIDSize   = 48 // struct inet_diag_sockid: ports, addresses, interface, cookie
	inetDiagIDOffset = 4  // in struct inet_diag_msg, behind family, state, timer and retransmissions
)

func (r inetDiagRequest) Len() int { return 8 + inetDiagIDSize }

func (r inetDiagRequest) Serialize() []byte {
	b := []byte{r.family, r.protocol, 0, 0}
	b = binary.NativeEndian.AppendUint32(b, r.states)
	return append(b, r.id[:]...)
}

// destroy ends the one socket that the request names.
func (r inetDiagRequest) destroy() error {
	request := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
	request.AddData(r)
	_, err := request.Execute(unix.NETLINK_INET_DIAG, 0)
	return err
}

// haveSocketDestroy asks for the end of a socket that cannot exist: a kernel that could end it says that
// it is not there.
func haveSocketDestroy() (bool, error) {
	err := inetDiagRequest{family: unix.AF_INET, protocol: unix.IPPROTO_TCP, states: ^uint32(0)}.destroy()
	switch {
	case errors.Is(err, unix.ENOENT):
		return true, nil
	case errors.Is(err, unix.EOPNOTSUPP):
		return false, nil
	}
	return err == nil, err
}

// parseInetDiag reads struct inet_diag_msg.
func parseInetDiag(message []byte) (id [inetDiagIDSize]byte, socket hostSocket, err error) {
	if len(message) < inetDiagIDOffset+inetDiagIDSize {
		return id, socket, errShort
	}
	copy(id[:], message[inetDiagIDOffset:])
	port := binary.BigEndian.Uint16(id[2:])
	to := netip.AddrFrom4([4]byte(id[20:24]))
	if message[0] == unix.AF_INET6 {
		to = netip.AddrFrom16([16]byte(id[20:36])).Unmap()
	}
	low, high := binary.NativeEndian.Uint32(id[40:]), binary.NativeEndian.Uint32(id[44:])
	return id, hostSocket{uint64(high)<<32 | uint64(low), netip.AddrPortFrom(to, port)}, nil
}

// endGoneHostSockets is EndHostSockets for what a run was killed before it could.
func (a *attachment) endGoneHostSockets(d *Datapath) {
	if _, err := d.EndHostSockets(); err != nil {
		a.log.Warn("sockets of the host stay", "why", err)
	}
}
