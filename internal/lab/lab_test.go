package lab

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// newLab builds a lab that is gone when the test ends.
func newLab(t *testing.T, o Options) *Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	l, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		mustBeGone(t, l.Name)
	})
	return l
}

// mustBeGone checks that no namespace of the lab is there any more.
func mustBeGone(t *testing.T, name string) {
	t.Helper()
	entries, err := os.ReadDir(netnsDir)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), netnsPrefix+name+"-") {
			t.Errorf("namespace %s is still there", entry.Name())
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), netnsPrefix+name+"-") {
		t.Errorf("a mount of lab %s is still there", name)
	}
}

func TestNeighboursReachEachOther(t *testing.T) {
	l := newLab(t, Options{Containers: 2, SecondUplink: true, TunUplink: true})
	for _, f := range Families() {
		for _, pair := range []struct {
			from *Node
			to   netip.Addr
		}{
			{l.Containers[0], BridgeAddr(f)},
			{l.Containers[0], l.Containers[1].Addr(f)},
			{l.Host, l.Containers[1].Addr(f)},
			{l.Host, l.Router.Addr(f)},
			{l.Host, l.ISP.Addr(f)},
			{l.Host, l.World.Addr(f)},
			{l.World, l.Host.Addr(f)},
			{l.Host, l.World.Loopback(f)},
			{l.Other, Uplink2Addr(f)},
			{l.Host, l.Other.Loopback(f)},
			{l.Far, TunAddr(f)},
			{l.Host, l.Far.Loopback(f)},
		} {
			if _, err := Ping(t.Context(), pair.from, pair.to, PingOptions{}); err != nil {
				t.Error(err)
			}
		}
	}
}

// Without NAT requests leave with the container's address, and nobody answers them.
func TestOutsideDoesNotKnowContainers(t *testing.T) {
	l := newLab(t, Options{})
	for _, f := range Families() {
		t.Run(f.String(), func(t *testing.T) {
			c := l.Containers[0]
			capture, err := StartCapture(l.World, "eth0", func(p Packet) bool { return p.Src == c.Addr(f) })
			if err != nil {
				t.Fatal(err)
			}
			_, err = Ping(t.Context(), c, l.World.Loopback(f), PingOptions{Timeout: 300 * time.Millisecond})
			if !errors.Is(err, ErrNoReply) {
				t.Errorf("ping without NAT: got %v, want %v", err, ErrNoReply)
			}
			if err := capture.Close(); err != nil {
				t.Error(err)
			}
			if n := len(capture.Packets()); n != 1 {
				t.Errorf("world saw %d packets from %s, want the one request", n, c.Addr(f))
			}
		})
	}
}

func TestHopLearnsPathMTU(t *testing.T) {
	l := newLab(t, Options{HopMTU: 1400})
	for _, f := range Families() {
		t.Run(f.String(), func(t *testing.T) {
			to := l.World.Addr(f)
			if mtu, err := l.Host.PathMTU(to); err != nil || mtu != 0 {
				t.Fatalf("path mtu before: %d, %v, want 0", mtu, err)
			}
			o := PingOptions{Size: 1440, DontFragment: true}
			_, err := Ping(t.Context(), l.Host, to, o)
			var icmp *ICMPError
			if !errors.As(err, &icmp) || !icmp.TooBig() || icmp.MTU != 1400 || icmp.From != l.Router.Addr(f) {
				t.Fatalf("ping of 1440 bytes: %v, want too big, mtu 1400, from %s", err, l.Router.Addr(f))
			}
			if icmp.QuotedSrc != l.Host.Addr(f) || icmp.QuotedDst != to {
				t.Errorf("quoted %s > %s", icmp.QuotedSrc, icmp.QuotedDst)
			}
			if mtu, err := l.Host.PathMTU(to); err != nil || mtu != 1400 {
				t.Errorf("path mtu after: %d, %v, want 1400", mtu, err)
			}
			o.DontFragment = false
			if f == IPv6 { // isp cannot fragment world's answer, of which world learns
				first := o
				first.Timeout = 200 * time.Millisecond
				_, _ = Ping(t.Context(), l.Host, to, first)
			}
			reply, err := Ping(t.Context(), l.Host, to, o)
			if err != nil || reply.Size != 1440 {
				t.Errorf("ping that may be fragmented: %+v, %v", reply, err)
			}
		})
	}
}

func TestTTLShowsHops(t *testing.T) {
	l := newLab(t, Options{})
	for _, f := range Families() {
		for ttl, hop := range []netip.Addr{l.Router.Addr(f), l.ISP.Addr(f)} {
			_, err := Ping(t.Context(), l.Host, l.World.Addr(f), PingOptions{TTL: ttl + 1})
			var icmp *ICMPError
			if !errors.As(err, &icmp) || !icmp.TimeExceeded() || icmp.From != hop {
				t.Errorf("%s, ttl %d: %v, want time exceeded from %s", f, ttl+1, err, hop)
			}
		}
	}
}

func TestNewLeavesNothingAfterError(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	t.Run("last step fails", func(t *testing.T) {
		name := uniqueName()
		o := Options{Name: name, TunUplink: true, HostSysctls: map[string]string{"net/no/such/key": "1"}}
		if _, err := New(t.Context(), o); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v", err)
		}
		mustBeGone(t, name)
	})
	t.Run("canceled", func(t *testing.T) {
		name := uniqueName()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := New(ctx, Options{Name: name}); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		mustBeGone(t, name)
	})
	t.Run("panic while it stands", func(t *testing.T) {
		name := uniqueName()
		func() {
			defer func() {
				if recover() == nil {
					t.Error("the panic inside of Do did not come through")
				}
			}()
			l, err := New(t.Context(), Options{Name: name})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			_ = l.Host.Do(func() error { panic("on purpose") })
		}()
		mustBeGone(t, name)
	})
}

func TestUpDown(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	name := uniqueName()
	l, err := New(t.Context(), Options{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(l.Host.Path()); err != nil {
		t.Error(err)
	}
	if _, err := New(t.Context(), Options{Name: name}); !errors.Is(err, ErrExists) {
		t.Errorf("the same name twice: got %v, want %v", err, ErrExists)
	}
	if _, err := os.Stat(l.World.Path()); err != nil {
		t.Errorf("the second attempt harmed the first lab: %v", err)
	}
	if err := Down(name); err != nil {
		t.Error(err)
	}
	mustBeGone(t, name)
	if err := Down(name); !errors.Is(err, ErrNotFound) {
		t.Errorf("down twice: got %v, want %v", err, ErrNotFound)
	}
}

func TestReleaseRefusesTun(t *testing.T) {
	l := newLab(t, Options{TunUplink: true})
	if err := l.Release(); !errors.Is(err, ErrNeedsProcess) {
		t.Errorf("got %v, want %v", err, ErrNeedsProcess)
	}
}

func TestBadOptions(t *testing.T) {
	for name, o := range map[string]Options{
		"dot":        {Name: "a.b"},
		"slash":      {Name: "../x"},
		"upper":      {Name: "Lab"},
		"long":       {Name: strings.Repeat("x", 25)},
		"dash":       {Name: "-x"},
		"containers": {Containers: 201},
		"negative":   {Containers: -1},
		"small hop":  {HopMTU: 1279},
		"big hop":    {HopMTU: 1501},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := New(t.Context(), o); !errors.Is(err, ErrBadOptions) {
				t.Errorf("got %v, want %v", err, ErrBadOptions)
			}
		})
	}
}

// Do must neither change the caller's namespace nor swallow a test's Goexit.
func TestDoLeavesCallerAlone(t *testing.T) {
	l := newLab(t, Options{})
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	inside := ""
	err = l.Host.Do(func() (err error) {
		inside, err = os.Readlink("/proc/thread-self/ns/net")
		return err
	})
	after, _ := os.Readlink("/proc/thread-self/ns/net")
	if err != nil || inside == before || after != before {
		t.Errorf("before %s, inside %s, after %s, error %v", before, inside, after, err)
	}

	exited := make(chan bool)
	go func() {
		defer close(exited)
		_ = l.Host.Do(func() error { runtime.Goexit(); return nil })
		exited <- true
	}()
	if <-exited {
		t.Error("Goexit inside of Do did not end the caller")
	}
}
