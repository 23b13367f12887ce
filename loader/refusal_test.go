package loader

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestBadDevices(t *testing.T) {
	h := newHost(t)
	must(t, h.nl.LinkSetMaster(h.link("eth1"), h.link("docker0")))
	cases := []struct {
		bridges, uplinks []string
		want             error
		text             string
	}{
		{[]string{"docker0"}, []string{"eth9"}, ErrNoDevice,
			"uplink eth9: no such device (have: docker0, eth0p, eth0, eth1p, eth1)"},
		{[]string{"br9"}, []string{"eth0"}, ErrNoDevice, "bridge br9: no such device"},
		{[]string{"eth0"}, nil, ErrBadDevice, "bridge eth0: unsuitable device: it is no bridge but a veth"},
		{[]string{"docker0", "docker0"}, nil, ErrBadDevice, "bridge docker0: unsuitable device: it is named twice"},
		{[]string{"docker0"}, []string{"docker0"}, ErrBadDevice, "bridge docker0: unsuitable device: it is named as uplink too"},
		{[]string{"docker0"}, []string{"lo"}, ErrBadDevice, "uplink lo: unsuitable device: it is the loopback"},
		{[]string{"docker0"}, []string{"eth1"}, ErrBadDevice, "uplink eth1: unsuitable device: it is a port of bridge docker0"},
		{nil, []string{"eth0"}, ErrNotAttached, "name at least one bridge"},
	}
	for _, c := range cases {
		_, err := Attach(context.Background(), h.inst, AttachOptions{Bridges: c.bridges, Uplinks: c.uplinks}, nil)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) || strings.Contains(err.Error(), "\n") {
			t.Errorf("attach %v %v: %v, want %q", c.bridges, c.uplinks, err, c.text)
		}
		h.wantNothing()
	}
}

func TestBadInstance(t *testing.T) {
	for _, name := range []string{"a.b", "a/b", "A", "a+new", strings.Repeat("a", 33)} {
		inst := Instance{Name: name}
		if _, err := Attach(context.Background(), inst, AttachOptions{}, nil); !errors.Is(err, ErrBadInstance) {
			t.Errorf("attach %q: %v", name, err)
		}
		if _, err := Open(inst); !errors.Is(err, ErrBadInstance) {
			t.Errorf("open %q: %v", name, err)
		}
		if _, err := Detach(context.Background(), inst); !errors.Is(err, ErrBadInstance) {
			t.Errorf("detach %q: %v", name, err)
		}
	}
}

func TestLock(t *testing.T) {
	h := newHost(t)
	h.attach(h.options(Auto))
	reader, err := Open(h.inst)
	must(t, err)
	second, err := Open(h.inst)
	if err != nil {
		t.Fatalf("two readers: %v", err)
	}
	must(t, second.Close())
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_, err = Attach(ctx, h.inst, h.options(Auto), nil)
	who := "process " + strconv.Itoa(os.Getpid())
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), who) {
		t.Errorf("attach beside a reader: %v, want ErrLocked by %s", err, who)
	}
	go func() { // soon enough
		time.Sleep(50 * time.Millisecond)
		reader.Close()
	}()
	h.attach(h.options(Auto))

	writer, err := OpenForWrite(h.inst)
	must(t, err)
	ctx, cancel = context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if _, err := h.inst.acquire(ctx, false); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), who) {
		t.Errorf("a reader beside a writer: %v, want ErrLocked by %s", err, who)
	}
	other := Instance{Name: h.inst.Name[1:] + "2"}
	if held, err := other.acquire(ctx, true); err != nil {
		t.Errorf("another instance: %v", err)
	} else {
		held.release()
	}
	must(t, writer.Close())
	h.detach()
}

// TestLockOfRemovedFile: who waits for the lock while a detach removes its file must get the
// one that the path names then.
func TestLockOfRemovedFile(t *testing.T) {
	h := newHost(t)
	held, err := h.inst.acquire(context.Background(), true)
	must(t, err)
	got := make(chan *lock)
	go func() {
		next, err := h.inst.acquire(context.Background(), true)
		if err != nil {
			t.Error(err)
		}
		got <- next
	}()
	time.Sleep(2 * lockPoll) // so that it waits for this file
	held.release()
	next := <-got
	if next == nil {
		return
	}
	if !sameFile(next.file) {
		t.Error("the lock's file has no name")
	}
	next.release()
}

func TestOtherNetns(t *testing.T) {
	h := newHost(t)
	h.attach(h.options(Auto))
	other := newNetns(t, h.netns+"2")
	err := InNetns(other, func() error {
		nl, err := newNetlink()
		must(t, err)
		defer nl.Close()
		must(t, nl.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "docker0"}}))
		opts := AttachOptions{Bridges: []string{"docker0"}}
		if _, err := Attach(context.Background(), h.inst, opts, nil); !errors.Is(err, ErrOtherNetns) {
			t.Errorf("attach: %v, want ErrOtherNetns", err)
		}
		if _, err := Open(h.inst); !errors.Is(err, ErrOtherNetns) {
			t.Errorf("open: %v, want ErrOtherNetns", err)
		}
		if _, err := Detach(context.Background(), h.inst); !errors.Is(err, ErrOtherNetns) {
			t.Errorf("detach: %v, want ErrOtherNetns", err)
		}
		return nil
	})
	must(t, err)
	if status, err := h.status(); err != nil || !status.Live || len(status.Problems) > 0 {
		t.Errorf("afterwards: %+v, error %v", status, err)
	}
	h.detach()
}

// TestNetnsGone: the pins outlive their network namespace; detach removes them from anywhere.
func TestNetnsGone(t *testing.T) {
	inst := Instance{Name: "netnsgone"}
	gone := "netnsgone"
	t.Run("inside", func(t *testing.T) {
		newNetns(t, gone)
		must(t, InNetns(gone, func() error {
			nl, err := newNetlink()
			must(t, err)
			defer nl.Close()
			must(t, nl.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "docker0"}}))
			_, err = Attach(context.Background(), inst, AttachOptions{Bridges: []string{"docker0"}, Spec: small(0), MaxFlows: 64}, nil)
			return err
		}))
	})
	if _, err := Open(inst); !errors.Is(err, ErrOtherNetns) || !strings.Contains(err.Error(), "detach") {
		t.Errorf("open: %v, want ErrOtherNetns and what to do", err)
	}
	found, err := Detach(context.Background(), inst)
	if !found || err != nil {
		t.Errorf("detach: found %v, error %v", found, err)
	}
	if _, err := os.Lstat(inst.Dir()); err == nil {
		t.Error("pins are left")
	}
}

func TestInNetns(t *testing.T) {
	name := newNetns(t, "innetns")
	outside, err := netnsCookie()
	must(t, err)
	for _, target := range []string{name, netnsDir + "/" + name} {
		var inside uint64
		failure := errors.New("failure")
		err := InNetns(target, func() error {
			inside, _ = netnsCookie()
			return failure
		})
		if !errors.Is(err, failure) || inside == 0 || inside == outside {
			t.Errorf("%s: cookie %d inside, %d outside, error %v", target, inside, outside, err)
		}
		if back, _ := netnsCookie(); back != outside {
			t.Errorf("%s: came back to %d, not %d", target, back, outside)
		}
	}
	if err := InNetns("nowhere", nil); !errors.Is(err, ErrNoNetns) || !strings.Contains(err.Error(), "have: innetns") {
		t.Errorf("unknown name: %v", err)
	}
	if err := InNetns("/etc/hostname", nil); !errors.Is(err, ErrNoNetns) {
		t.Errorf("a plain file: %v", err)
	}
}

func TestNoRights(t *testing.T) {
	h := newHost(t) // on a thread of the test's own
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var full, less [2]unix.CapUserData
	must(t, unix.Capget(&header, &full[0]))
	t.Cleanup(func() { must(t, unix.Capset(&header, &full[0])) })
	drop := func(capabilities ...int) {
		less = full
		for _, c := range capabilities {
			less[c/32].Effective &^= 1 << (c % 32)
		}
		must(t, unix.Capset(&header, &less[0]))
	}
	for name, capabilities := range map[string][]int{
		"CAP_NET_ADMIN":        {unix.CAP_NET_ADMIN},
		"CAP_BPF, CAP_PERFMON": {unix.CAP_SYS_ADMIN, unix.CAP_BPF, unix.CAP_PERFMON},
	} {
		drop(capabilities...)
		_, attach := Attach(context.Background(), h.inst, h.options(Auto), nil)
		_, open := Open(h.inst)
		_, detach := Detach(context.Background(), h.inst)
		_, features := Features()
		must(t, unix.Capset(&header, &full[0]))
		for verb, err := range map[string]error{"attach": attach, "open": open, "detach": detach, "features": features} {
			if !errors.Is(err, ErrNotPermitted) || !strings.Contains(err.Error(), "needs "+name+" (try sudo)") {
				t.Errorf("%s without %s: %v", verb, name, err)
			}
		}
	}
	h.wantNothing()
}

func TestNoBTF(t *testing.T) {
	h := newHost(t)
	must(t, unix.Mount("tmpfs", "/sys/kernel/btf", "tmpfs", 0, ""))
	_, err := Attach(context.Background(), h.inst, h.options(Auto), nil)
	must(t, unix.Unmount("/sys/kernel/btf", 0))
	if !errors.Is(err, ErrNoBTF) {
		t.Errorf("attach: %v, want ErrNoBTF", err)
	}
	h.wantNothing()
}

func TestBPFFS(t *testing.T) {
	h := newHost(t)
	h.inst.BPFFS = t.TempDir()
	if _, err := Attach(context.Background(), h.inst, h.options(Auto), nil); !errors.Is(err, ErrNoBPFFS) {
		t.Errorf("attach on a plain directory: %v, want ErrNoBPFFS", err)
	}
	if _, err := Open(h.inst); !errors.Is(err, ErrNotAttached) {
		t.Errorf("open on a plain directory: %v, want ErrNotAttached", err)
	}
	h.wantNothing()

	h.inst.BPFFS = ""
	// The test's own, and one of the machine's that may lie below.
	for unix.Unmount(defaultBPFFS, 0) == nil {
	}
	h.attach(h.options(Auto))
	info, err := os.Stat(defaultBPFFS)
	must(t, err)
	if info.Mode().Perm() != 0o700 {
		t.Errorf("the bpffs that attach mounts has mode %o, want 700", info.Mode().Perm())
	}
	h.detach()
}
