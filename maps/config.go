package maps

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"math/bits"
	"time"

	"tcnat/bpf"
)

// stampShift is STAMP_SHIFT of abi.h: a stamp is a count of nanoseconds >> stampShift.
const stampShift = 20

// maxTimeout is the longest timeout: differences of stamps wrap at twice that.
const maxTimeout = time.Duration(1<<31-1) << stampShift

// Config is what the programs read once a packet.
type Config struct {
	// Live makes the programs act; else they pass every packet on.
	Live bool

	// NetnsCookie is the cookie of the network namespace that the instance belongs to.
	NetnsCookie uint64

	// MaxFlows bounds the number of flows.
	MaxFlows uint32

	// AllowDirect lets the outside reach containers by their own addresses.
	AllowDirect bool

	// NoIsolation lets managed bridges reach each other.
	NoIsolation bool

	// PassUnmanaged lets container traffic leave by devices without programs.
	PassUnmanaged bool

	// Routed means that containers without an SNAT rule leave untranslated.
	Routed bool

	// AnySender opens the outside port of a container's UDP endpoint to all, not only to whom it has sent to
	// (endpoint-independent filtering, RFC 4787 REQ-8).
	AnySender bool

	// FastPath says who may pass by the host's stack.
	FastPath FastPath

	// Mark is the bit of the packet mark, as a mask, that tells a redirected packet. With a
	// fast path it must be one bit.
	Mark uint32

	Timeouts Timeouts
}

// Timeouts says how long a flow may be idle, by protocol and state. They are kept in units
// of 1.05 ms, rounded up.
type Timeouts struct {
	TCPEstablished time.Duration // answered
	TCPTransitory  time.Duration // not yet answered, half closed or reset
	TCPClosed      time.Duration // FIN seen both ways
	UDP            time.Duration // answered
	UDPNew         time.Duration // not yet answered
	UDPWellKnown   time.Duration // outbound, to port 53 or 123
	ICMP           time.Duration // and every protocol without its own
}

// DefaultTimeouts satisfies RFC 4787, 5382 (but for closed connections), 5508 and 7857.
func DefaultTimeouts() Timeouts {
	return Timeouts{
		TCPEstablished: 2*time.Hour + 4*time.Minute,
		TCPTransitory:  4 * time.Minute,
		TCPClosed:      30 * time.Second,
		UDP:            5 * time.Minute,
		UDPNew:         2 * time.Minute,
		UDPWellKnown:   30 * time.Second,
		ICMP:           60 * time.Second,
	}
}

// timeoutField is one timeout: its name on the command line and where it is kept.
type timeoutField struct {
	name  string
	index bpf.NATTimeout
	value *time.Duration
}

func (t *Timeouts) fields() []timeoutField {
	return []timeoutField{
		{"tcp-established", bpf.NATTimeoutTIMEOUT_TCP_ESTABLISHED, &t.TCPEstablished},
		{"tcp-transitory", bpf.NATTimeoutTIMEOUT_TCP_TRANSITORY, &t.TCPTransitory},
		{"tcp-closed", bpf.NATTimeoutTIMEOUT_TCP_CLOSED, &t.TCPClosed},
		{"udp", bpf.NATTimeoutTIMEOUT_UDP, &t.UDP},
		{"udp-new", bpf.NATTimeoutTIMEOUT_UDP_NEW, &t.UDPNew},
		{"udp-well-known", bpf.NATTimeoutTIMEOUT_UDP_WELL_KNOWN, &t.UDPWellKnown},
		{"icmp", bpf.NATTimeoutTIMEOUT_ICMP, &t.ICMP},
	}
}

// Config reads the configuration. Before the first SetConfig everything in it is zero.
func (s *State) Config() (Config, error) {
	raw, err := s.rawConfig()
	if err != nil {
		return Config{}, err
	}
	flag := func(f bpf.NATConfigFlag) bool { return raw.Flags&f != 0 }
	c := Config{
		Live:          raw.Live != 0,
		NetnsCookie:   raw.NetnsCookie,
		MaxFlows:      raw.MaxFlows,
		AllowDirect:   flag(bpf.NATConfigFlagCONFIG_ALLOW_DIRECT),
		NoIsolation:   flag(bpf.NATConfigFlagCONFIG_NO_ISOLATION),
		PassUnmanaged: flag(bpf.NATConfigFlagCONFIG_PASS_UNMANAGED),
		Routed:        flag(bpf.NATConfigFlagCONFIG_ROUTED),
		AnySender:     flag(bpf.NATConfigFlagCONFIG_ANY_SENDER),
		FastPath:      FastPath(raw.FastPath),
		Mark:          raw.Mark,
	}
	for _, f := range c.Timeouts.fields() {
		// A stamp is 1.05 ms and rounded up: what was said in centiseconds comes back exact.
		*f.value = stampTime(raw.Timeout[f.index]).Round(10 * time.Millisecond)
	}
	return c, nil
}

// SetConfig writes the configuration as a whole. Which rules are in force stays as it is,
// and so does the secret that picks ports, which is made when there is none yet.
// A timeout that is not positive or over 26 days is an ErrInvalidConfig, and so is a fast path
// without one bit for its mark.
func (s *State) SetConfig(c Config) error {
	if c.FastPath != FastPathOff && bits.OnesCount32(c.Mark) != 1 {
		return faultf(ErrInvalidConfig, "mark %#x: fast path %s needs one bit", c.Mark, c.FastPath)
	}
	raw, err := s.rawConfig()
	if err != nil {
		return err
	}
	raw.Live = 0
	if c.Live {
		raw.Live = 1
	}
	raw.NetnsCookie = c.NetnsCookie
	raw.MaxFlows = c.MaxFlows
	raw.FastPath = bpf.NATFastPath(c.FastPath)
	raw.Mark = c.Mark
	before := raw.Flags
	raw.Flags = 0
	for flag, on := range map[bpf.NATConfigFlag]bool{
		bpf.NATConfigFlagCONFIG_ALLOW_DIRECT:   c.AllowDirect,
		bpf.NATConfigFlagCONFIG_NO_ISOLATION:   c.NoIsolation,
		bpf.NATConfigFlagCONFIG_PASS_UNMANAGED: c.PassUnmanaged,
		bpf.NATConfigFlagCONFIG_ROUTED:         c.Routed,
		bpf.NATConfigFlagCONFIG_ANY_SENDER:     c.AnySender,
	} {
		if on {
			raw.Flags |= flag
		}
	}
	for _, f := range c.Timeouts.fields() {
		if *f.value <= 0 || *f.value > maxTimeout {
			return faultf(ErrInvalidConfig, "timeout %s: %s: must be over 0 and at most %s", f.name, *f.value, maxTimeout.Truncate(time.Hour))
		}
		raw.Timeout[f.index] = uint32((*f.value + 1<<stampShift - 1) >> stampShift)
	}
	for raw.Secret == [2]uint64{} {
		var b [16]byte
		if _, err := rand.Read(b[:]); err != nil {
			return fmt.Errorf("make the port secret: %w", err)
		}
		raw.Secret[0] = binary.NativeEndian.Uint64(b[:8])
		raw.Secret[1] = binary.NativeEndian.Uint64(b[8:])
	}
	if err := s.putConfig(raw); err != nil {
		return err
	}
	// Flows without a rule were let in by these flags, and go with them.
	if gone := before &^ raw.Flags; gone&(bpf.NATConfigFlagCONFIG_ALLOW_DIRECT|bpf.NATConfigFlagCONFIG_ROUTED) != 0 {
		return s.raise([]uint32{0})
	}
	return nil
}

// SetLive makes the programs act, or pass every packet on. All else stays as it is.
func (s *State) SetLive(live bool) error {
	raw, err := s.rawConfig()
	if err != nil {
		return err
	}
	raw.Live = 0
	if live {
		raw.Live = 1
	}
	return s.putConfig(raw)
}

func (s *State) rawConfig() (bpf.NATConfig, error) {
	var raw bpf.NATConfig

	if err := s.m.Config.Lookup(uint32(0), &raw); err != nil {
		return raw, fmt.Errorf("read configuration: %w", err)
	}
	return raw, nil
}

func (s *State) putConfig(raw bpf.NATConfig) error {
	if err := s.m.Config.Put(uint32(0), raw); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	return nil
}

// stampTime is the time that a difference of stamps stands for.
func stampTime(stamps uint32) time.Duration {
	return time.Duration(stamps) << stampShift
}
