package bench

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
)

// expectation says what packets look like that were treated as they should be.
type expectation struct {
	src, dst       netip.Prefix // IPv4
	sports, dports [2]uint16    // first and last
	protocol       uint8        // 0: UDP
	checkSums      bool         // also look at the checksum of every packet
	partial        bool         // where the device is left to complete them, that is right too
}

// place is a device of a node.
type place struct {
	node   *lab.Node
	device string
}

// counter counts and ends packets at the ingress of devices.
type counter struct {
	objects rigObjects
	links   []link.Link
}

// startCounter attaches a counter that all the places share.
func startCounter(want expectation, at ...place) (_ *counter, err error) {
	spec, err := loadRig()
	if err != nil {
		return nil, fmt.Errorf("counter: %w", err)
	}
	if want.protocol == 0 {
		want.protocol = unix.IPPROTO_UDP
	}
	src, srcMask := toNetwork(want.src)
	dst, dstMask := toNetwork(want.dst)
	for name, value := range map[string]any{
		"want": rigPattern{
			Src: src, SrcMask: srcMask, Dst: dst, DstMask: dstMask,
			SportFirst: want.sports[0], SportLast: want.sports[1],
			DportFirst: want.dports[0], DportLast: want.dports[1],
		},
		"protocol":     want.protocol,
		"check_sums":   toByte(want.checkSums),
		"partial_sums": toByte(want.partial),
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("counter: %s: %w", name, err)
		}
	}
	c := &counter{}
	if err := spec.LoadAndAssign(&c.objects, nil); err != nil {
		return nil, fmt.Errorf("counter: load: %w", err)
	}
	for _, p := range at {
		l, err := attachIngress(p, c.objects.Count)
		if err != nil {
			return nil, errors.Join(err, c.close())
		}
		c.links = append(c.links, l)
	}
	return c, nil
}

// attachIngress puts a program first at a device's TC ingress, until the link is closed.
func attachIngress(p place, program *ebpf.Program) (l link.Link, err error) {
	index, err := p.node.Ifindex(p.device)
	if err != nil {
		return nil, err
	}
	err = p.node.Do(func() (err error) {
		l, err = link.AttachTCX(link.TCXOptions{
			Interface: index, Program: program, Attach: ebpf.AttachTCXIngress, Anchor: link.Head(),
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: attach to %s: %w", p.node.Role, p.device, err)
	}
	return l, nil
}

// read returns what was counted so far.
func (c *counter) read() (rigTally, error) {
	var each []rigTally
	if err := c.objects.Tallies.Lookup(uint32(0), &each); err != nil {
		return rigTally{}, fmt.Errorf("read counter: %w", err)
	}
	var sum rigTally
	for _, t := range each {
		sum.Expected += t.Expected
		sum.Other += t.Other
		sum.BadSum += t.BadSum
	}
	return sum, nil
}

// Times of settle: nothing more is to be expected after quiet, however busy the machine is.
const (
	counterPoll  = time.Millisecond
	counterQuiet = 100 * time.Millisecond
)

// settle returns what was counted once that many packets were, or once no more come: what was sent may
// still be queued.
func (c *counter) settle(packets uint64) (rigTally, error) {
	var last rigTally
	for since := time.Now(); ; time.Sleep(counterPoll) {
		now, err := c.read()
		if err != nil || now.Expected+now.Other >= packets {
			return now, err
		}
		if now != last {
			last, since = now, time.Now()
		} else if time.Since(since) > counterQuiet {
			return now, nil
		}
	}
}

func (c *counter) close() error {
	var errs []error
	for _, l := range c.links {
		errs = append(errs, l.Close())
	}
	c.links = nil
	return errors.Join(append(errs, c.objects.Close())...)
}

// toNetwork is an IPv4 prefix as the programs compare it; the zero Prefix matches all.
func toNetwork(p netip.Prefix) (addr, mask uint32) {
	if !p.IsValid() {
		return 0, 0
	}
	bytes := p.Masked().Addr().As4()
	var ones [4]byte
	for bit := range p.Bits() {
		ones[bit/8] |= 0x80 >> (bit % 8)
	}
	return nativeWord(bytes), nativeWord(ones)
}

func toByte(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}
