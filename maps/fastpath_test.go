package maps

import (
	"errors"
	"testing"
	"time"

	"tcnat/bpf"
)

func TestFastPathConfig(t *testing.T) {
	s := newState(t)
	c := Config{Timeouts: DefaultTimeouts(), FastPath: FastPathAlways, Mark: 1 << 31}
	if err := s.SetConfig(c); err != nil {
		t.Fatal(err)
	}
	if d := diff(c, must[Config](t)(s.Config())); d != "" {
		t.Error(d)
	}
	for _, mark := range []uint32{0, 3} {
		c.Mark = mark
		if err := s.SetConfig(c); !errors.Is(err, ErrInvalidConfig) {
			t.Errorf("fast path with mark %#x: %v", mark, err)
		}
	}
	c.FastPath, c.Mark = FastPathOff, 0
	if err := s.SetConfig(c); err != nil {
		t.Error(err)
	}
}

func TestPorts(t *testing.T) {
	s := newState(t)
	one, two := MAC{2, 0, 0, 0, 0, 1}, MAC{2, 0, 0, 0, 0, 2}
	for _, want := range []map[PortKey]uint32{
		{{3, one}: 7, {3, two}: 8},
		{{3, one}: 9, {4, two}: 8}, // one has moved to another port, two to another bridge
		{},
	} {
		if err := s.SetPorts(want); err != nil {
			t.Fatal(err)
		}
		if d := diff(want, must[map[PortKey]uint32](t)(s.Ports())); d != "" {
			t.Error(d)
		}
	}
	port := Device{Ifindex: 7, Class: Port, Attach: AttachTCX, Bridge: 3, MAC: one, Peer: true}
	slow := Device{Ifindex: 8, Class: Port, Attach: AttachClsact, Bridge: 3, Slow: true, OwnQdisc: true}
	for _, d := range []Device{port, slow} {
		if err := s.SetDevice(d); err != nil {
			t.Fatal(err)
		}
	}
	if d := diff([]Device{port, slow}, must[[]Device](t)(s.Devices())); d != "" {
		t.Error(d)
	}
	var none MAC
	if got := one.String() + none.String(); got != "02:00:00:00:00:01" {
		t.Errorf("addresses are written %q", got)
	}
}

func TestLease(t *testing.T) {
	now := uint32(5) // stamps wrap
	const (
		first  = uint16(bpf.NATUnleasedADJACENCY_FIRST)
		device = uint16(bpf.NATUnleasedUNLEASED_DEVICE)
		noRoom = uint16(bpf.NATUnleasedUNLEASED_NO_ROOM)
		ack    = bpf.NATTcpSeenTCP_SEEN_ACK
	)
	half := func(protocol Protocol, tcp bpf.NATTcpSeen, out, in uint16, stamp, seen uint32) bpf.NATHalf {
		h := bpf.NATHalf{Packets: 1, Tcp: tcp, Seen: seen}
		h.Other.Proto = uint8(protocol)
		h.Lease.Out, h.Lease.In, h.Lease.Stamp = out, in, stamp
		return h
	}
	silent := half(UDP, 0, 0, 0, 0, 0)
	silent.Packets = 0
	old := now - leaseStamps
	for name, c := range map[string]struct {
		half  bpf.NATHalf
		state FlowState
		want  Lease
	}{
		"fresh":             {half(TCP, ack, first, first, now-1, now), FlowAnswered, LeaseFast},
		"just not over":     {half(UDP, 0, first, first, old+1, now), FlowNew, LeaseFast},
		"over, packets":     {half(UDP, 0, first, first, old, now), FlowAnswered, LeaseSlow},
		"over, none":        {half(UDP, 0, first, first, old, old), FlowAnswered, LeaseIdle},
		"noted only":        {half(UDP, 0, 0, first, now, now), FlowAnswered, LeaseSlow},
		"never":             {half(UDP, 0, 0, 0, 0, now), FlowAnswered, LeaseSlow},
		"no packet ever":    {silent, FlowNew, LeaseSlow},
		"output device":     {half(UDP, 0, device, first, now, now), FlowAnswered, LeaseDevice},
		"input device":      {half(UDP, 0, 0, device, now, now), FlowAnswered, LeaseDevice},
		"no room":           {half(UDP, 0, noRoom, noRoom, now, now), FlowAnswered, LeaseNoRoom},
		"icmp":              {half(ICMP, 0, 0, 0, 0, now), FlowAnswered, LeaseProtocol},
		"handshake":         {half(TCP, bpf.NATTcpSeenTCP_SEEN_SYN, 0, 0, 0, now), FlowNew, LeaseHandshake},
		"half closed, fast": {half(TCP, ack|bpf.NATTcpSeenTCP_SEEN_FIN, first, first, now, now), FlowClosing, LeaseFast},
		"closing":           {half(TCP, ack, 0, 0, 0, now), FlowClosing, LeaseClosing},
		"reset":             {half(TCP, ack|bpf.NATTcpSeenTCP_SEEN_RST, first, first, now, now), FlowClosed, LeaseClosing},
		"ended":             {half(UDP, 0, first, first, now, now), FlowEnding, LeaseClosing},
	} {
		j := judge{now: now, fastPath: FastPathEstablished}
		if got := j.lease(c.half, c.state); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
		j.fastPath = FastPathOff
		if got := j.lease(c.half, c.state); got != LeaseOff {
			t.Errorf("%s: %s without fast path, want off", name, got)
		}
	}
	if leaseStamps != uint32((1500*time.Millisecond).Nanoseconds()>>stampShift) {
		t.Errorf("a lease is %d stamps", leaseStamps)
	}
	for l := LeaseOff; l <= LeaseClosing; l++ {
		if l.String() == "" || l.String()[0] < 'a' {
			t.Errorf("lease %d is %q", l, l)
		}
	}
}

func TestUsage(t *testing.T) {
	s := newState(t)
	if err := s.SetConfig(Config{Timeouts: DefaultTimeouts(), FastPath: FastPathEstablished, Mark: 1}); err != nil {
		t.Fatal(err)
	}
	now := stampOf(must[time.Duration](t)(monotonic()))
	for i, role := range []bpf.NATRole{bpf.NATRoleROLE_ORIGINAL, bpf.NATRoleROLE_REPLY, bpf.NATRoleROLE_REPLY, bpf.NATRoleROLE_ORIGINAL} {
		h := bpf.NATHalf{Role: role}
		h.Lease.Out, h.Lease.Stamp = uint16(bpf.NATUnleasedADJACENCY_FIRST), now
		if i == 3 {
			h.Lease.Stamp = now - 2*leaseStamps
		}
		if err := s.m.Flows.Put(bpf.NATTuple{Sport: uint16(i)}, h); err != nil {
			t.Fatal(err)
		}
	}
	if d := diff(Usage{Flows: 2, FastOut: 1, FastIn: 2}, must[Usage](t)(s.Usage())); d != "" {
		t.Error(d)
	}
}
