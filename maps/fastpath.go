package maps

import (
	"fmt"
	"time"

	"tcnat/bpf"
)

// FastPath says whose packets may pass by the host's stack.
type FastPath uint8

// The kinds of fast path.
const (
	FastPathOff         = FastPath(bpf.NATFastPathFAST_PATH_OFF)
	FastPathEstablished = FastPath(bpf.NATFastPathFAST_PATH_ESTABLISHED) // what the host lets through, seen now and then
	FastPathAlways      = FastPath(bpf.NATFastPathFAST_PATH_ALWAYS)      // whatever the routing table has a way for
)

// String returns "off", "established" or "always".
func (f FastPath) String() string {
	switch f {
	case FastPathOff:
		return "off"
	case FastPathEstablished:
		return "established"
	case FastPathAlways:
		return "always"
	}
	return fmt.Sprintf("fast path %d", uint8(f))
}

// Lease says whether one direction of a flow is on the fast path, or why it is not.
type Lease uint8

// The states of leases.
const (
	LeaseOff       Lease = iota // the instance has no fast path
	LeaseFast                   // on the fast path
	LeaseSlow                   // none so far: the host has not let a packet through that may have one
	LeaseIdle                   // it ran out, and no packet has come since
	LeaseDevice                 // a device on the way may have no fast path: see status
	LeaseNoRoom                 // too many neighbours at once
	LeaseProtocol               // neither TCP nor UDP, never
	LeaseHandshake              // TCP, not yet answered
	LeaseClosing                // the flow is over, or will soon be
)

// String returns one word.
func (l Lease) String() string {
	switch l {
	case LeaseOff:
		return "off"
	case LeaseFast:
		return "fast"
	case LeaseSlow:
		return "slow"
	case LeaseIdle:
		return "idle"
	case LeaseDevice:
		return "device"
	case LeaseNoRoom:
		return "no-room"
	case LeaseProtocol:
		return "protocol"
	case LeaseHandshake:
		return "handshake"
	case LeaseClosing:
		return "closing"
	}
	return fmt.Sprintf("lease %d", uint8(l))
}

// leaseStamps is LEASE_STAMPS of lease.h.
const leaseStamps = uint32(1500 * time.Millisecond >> stampShift)

// lease judges one half of a flow in that state, as fast.h does for a packet.
func (j *judge) lease(h bpf.NATHalf, state FlowState) Lease {
	protocol := Protocol(h.Other.Proto)
	switch {
	case j.fastPath == FastPathOff:
		return LeaseOff
	case protocol != TCP && protocol != UDP:
		return LeaseProtocol
	case state == FlowEnding, protocol == TCP && h.Tcp&bpf.NATTcpSeenTCP_SEEN_RST != 0:
		return LeaseClosing
	case protocol == TCP && h.Tcp&bpf.NATTcpSeenTCP_SEEN_ACK == 0:
		return LeaseHandshake
	case j.holds(h):
		return LeaseFast
	case state == FlowClosing, state == FlowClosed:
		return LeaseClosing
	}
	// Until the packet has left, the reason stands where it came from.
	reason := h.Lease.Out
	if reason == uint16(bpf.NATUnleasedUNLEASED_CHECKED) {
		reason = uint16(bpf.NATUnleasedUNLEASED)
	}
	if reason == uint16(bpf.NATUnleasedUNLEASED) && h.Lease.In < uint16(bpf.NATUnleasedADJACENCY_FIRST) {
		reason = h.Lease.In
	}
	switch {
	case reason == uint16(bpf.NATUnleasedUNLEASED_DEVICE):
		return LeaseDevice
	case reason == uint16(bpf.NATUnleasedUNLEASED_NO_ROOM):
		return LeaseNoRoom
	case h.Packets > 0 && idle(j.now, h.Seen, h.Seen) >= leaseStamps:
		return LeaseIdle
	}
	return LeaseSlow
}

func (j *judge) holds(h bpf.NATHalf) bool {
	l := h.Lease
	return l.Out >= uint16(bpf.NATUnleasedADJACENCY_FIRST) && idle(j.now, l.Stamp, l.Stamp) < leaseStamps
}

// Usage is how full the tables are that packets fill.
type Usage struct {
	Flows, Mappings int
	FastOut, FastIn int // original and reply directions on the fast path
}

// Usage counts flows and mappings, without reading more of them than it needs.
func (s *State) Usage() (Usage, error) {
	raw, err := s.rawConfig()
	if err != nil {
		return Usage{}, err
	}
	now, err := monotonic()
	if err != nil {
		return Usage{}, err
	}
	j := judge{now: stampOf(now), fastPath: FastPath(raw.FastPath)}
	var u Usage
	halves := 0
	err = readAll(s.m.Flows, func(_ bpf.NATTuple, h bpf.NATHalf) {
		if h.Role == bpf.NATRoleROLE_TRANSIT {
			return
		}
		halves++
		if j.fastPath == FastPathOff || !j.holds(h) {
			return
		}
		if h.Role == bpf.NATRoleROLE_ORIGINAL {
			u.FastOut++
		} else {
			u.FastIn++
		}
	})
	if err != nil {
		return Usage{}, fmt.Errorf("count flows: %w", err)
	}
	u.Flows = halves / 2
	u.Mappings, err = s.countMappings()
	return u, err
}
