package maps

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
)

// FlowState is where a flow is in its life.
type FlowState uint8

// The states of flows.
const (
	FlowNew      FlowState = iota // packets of one direction only
	FlowAnswered                  // packets of both, and of TCP and SCTP the end of the handshake
	FlowClosing                   // FIN of one direction, or SHUTDOWN of SCTP
	FlowClosed                    // FIN of both, or RST; of SCTP SHUTDOWN and its answer, or ABORT
	FlowEnding                    // flushed, expired, or its rule is gone
)

// String returns "new", "answered", "closing", "closed" or "ending".
func (s FlowState) String() string {
	switch s {
	case FlowNew:
		return "new"
	case FlowAnswered:
		return "answered"
	case FlowClosing:
		return "closing"
	case FlowClosed:
		return "closed"
	case FlowEnding:
		return "ending"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// wellKnown tells whether a destination port of UDP has the short timeout: DNS and NTP.
func wellKnown(port uint16) bool { return port == 53 || port == 123 }

// judge tells states and timeouts of flows at one moment, as flow_state.h does for the expiry.
type judge struct {
	now         uint32            // stamp
	timeouts    [8]uint32         // stamps, by NATTimeout
	generations map[uint32]uint32 // by rule id; an unknown rule has none
	fastPath    FastPath
}

// learn reads the generation of a rule, once.
func (j *judge) learn(s *State, rule uint32) error {
	if _, ok := j.generations[rule]; ok {
		return nil
	}
	generation, err := s.generation(rule)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	j.generations[rule] = generation
	return nil
}

// flow is the flow that two halves make, key being the original's.
func (j *judge) flow(key bpf.NATTuple, original, reply bpf.NATHalf) Flow {
	f := Flow{
		ID:          original.Standing.Id,
		Translation: Translation(original.Translation),
		Original:    fromTuple(key),
		Reply:       fromTuple(original.Other),
		State:       j.state(original, reply),
		Ifindex:     original.Ifindex,
		Rule:        original.Rule,
		Out:         Traffic{original.Packets, original.Bytes},
		In:          Traffic{reply.Packets, reply.Bytes},
		Idle:        stampTime(idle(j.now, original.Seen, reply.Seen)),
	}
	f.FastOut, f.FastIn = j.lease(original, f.State), j.lease(reply, f.State)
	if f.State != FlowEnding {
		timeout := stampTime(j.timeouts[timeoutOf(f, original.Tcp, reply.Tcp)])
		f.Timeout = max(0, timeout-f.Idle)
	}
	return f
}

// state judges by both halves.
func (j *judge) state(original, reply bpf.NATHalf) FlowState {
	generation, known := j.generations[original.Rule]
	either := original.Tcp | reply.Tcp
	both := original.Tcp & reply.Tcp

	switch {
	case original.Standing.Life != bpf.NATLifeLIFE_ORIGINAL,
		reply.Standing.Life != bpf.NATLifeLIFE_LIVE,
		!known, generation != original.Generation, generation != reply.Generation:
		return FlowEnding
	case both&bpf.NATTcpSeenTCP_SEEN_FIN != 0, either&bpf.NATTcpSeenTCP_SEEN_RST != 0:
		return FlowClosed
	case either&bpf.NATTcpSeenTCP_SEEN_FIN != 0:
		return FlowClosing
	case original.Packets == 0 || reply.Packets == 0:
		return FlowNew
	case Protocol(original.Other.Proto).hasStates() && original.Tcp&bpf.NATTcpSeenTCP_SEEN_ACK == 0:
		return FlowNew
	}
	return FlowAnswered
}

// timeoutOf is the timeout that holds for a flow that is not ending: flow_timeout of
// flow_state.h.
func timeoutOf(f Flow, original, reply bpf.NATTcpSeen) bpf.NATTimeout {
	switch f.Original.Protocol {
	case TCP, SCTP:
		switch {
		case (original|reply)&bpf.NATTcpSeenTCP_SEEN_RST != 0:
			return bpf.NATTimeoutTIMEOUT_TCP_TRANSITORY
		case f.State == FlowClosed:
			return bpf.NATTimeoutTIMEOUT_TCP_CLOSED
		case f.State == FlowAnswered:
			return bpf.NATTimeoutTIMEOUT_TCP_ESTABLISHED
		}
		return bpf.NATTimeoutTIMEOUT_TCP_TRANSITORY
	case UDP, UDPLite:
		switch {
		case wellKnown(f.Original.Dst.Port()) && f.Translation != DNAT && f.Translation != Hairpin:
			return bpf.NATTimeoutTIMEOUT_UDP_WELL_KNOWN
		case f.State == FlowAnswered:
			return bpf.NATTimeoutTIMEOUT_UDP
		}
		return bpf.NATTimeoutTIMEOUT_UDP_NEW
	}
	return bpf.NATTimeoutTIMEOUT_ICMP
}

// idle is the number of stamps since the later of two, which wrap. A packet that came after
// now was read counts as now.
func idle(now, a, b uint32) uint32 {
	last := a
	if int32(b-a) > 0 {
		last = b
	}
	return uint32(max(0, int32(now-last)))
}

// stampOf is the stamp of a time since boot.
func stampOf(sinceBoot time.Duration) uint32 {
	return uint32(sinceBoot >> stampShift)
}

// monotonic is the clock that the datapath reads.
func monotonic() (time.Duration, error) {
	var t unix.Timespec

	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		return 0, fmt.Errorf("read the monotonic clock: %w", err)
	}
	return time.Duration(t.Nano()), nil
}
