package loader

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
	state "tcnat/maps"
)

// The tests run in network and mount namespaces of their own, with a bpffs and a /run of
// their own: whatever happens to them, nothing stays on the machine.
const innerEnv = "TCNAT_LOADER_TEST_INNER"

func TestMain(m *testing.M) {
	if os.Getenv(innerEnv) == "" {
		os.Exit(outer())
	}
	if os.Getenv(killedEnv) != "" { // a child of a test: it shares the mounts
		os.Exit(m.Run())
	}
	if err := privateMounts(); err != nil {
		fmt.Fprintln(os.Stderr, "loader tests:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func outer() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), innerEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET,
		Pdeathsig:  syscall.SIGKILL,
	}
	runtime.LockOSThread() // the child dies with this thread
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "loader tests need root:", err)
		return 1
	}
	return 0
}

func privateMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// Whatever a test forgets, the machine's root cgroup is out of reach.
	for dir := mountedCgroup(); dir != ""; dir = mountedCgroup() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
	}
	for _, m := range []struct{ target, kind string }{{defaultBPFFS, "bpf"}, {"/run", "tmpfs"}} {
		if err := unix.Mount(m.kind, m.target, m.kind, 0, "mode=0700"); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return os.Mkdir(netnsDir, 0o755)
}

// host is a network namespace with a bridge docker0 (172.17.0.1/16, fd17::1/64) and two veths
// as uplinks, eth0 (203.0.113.2/24) and eth1, and an instance of its own.
type host struct {
	t     *testing.T
	inst  Instance
	netns string
	nl    *netlink.Handle
}

func newHost(t *testing.T) *host {
	t.Helper()
	name := strings.ToLower(strings.NewReplacer("/", "-", " ", "-", "#", "-").Replace(t.Name()))
	name = name[max(0, len(name)-32):]
	h := &host{t: t, inst: Instance{Name: name}, netns: newNetns(t, name)}
	inNetns(t, h.netns)
	nl, err := newNetlink()
	must(t, err)
	t.Cleanup(nl.Close)
	h.nl = nl
	must(t, nl.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "docker0"}}))
	for _, uplink := range []string{"eth0", "eth1"} {
		must(t, nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: uplink}, PeerName: uplink + "p"}))
	}
	h.address("docker0", "172.17.0.1/16", "fd17::1/64")
	h.address("eth0", "203.0.113.2/24")
	t.Cleanup(func() {
		_, err := Detach(context.Background(), h.inst)
		if err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return h
}

// newNetns makes a named network namespace without going there.
func newNetns(t *testing.T, name string) string {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	origin, err := netns.Get()
	must(t, err)
	defer origin.Close()
	made, err := netns.NewNamed(name)
	must(t, err)
	made.Close()
	must(t, netns.Set(origin))
	t.Cleanup(func() { must(t, netns.DeleteNamed(name)) })
	return name
}

// inNetns moves the rest of the test into a network namespace.
func inNetns(t *testing.T, name string) {
	t.Helper()
	runtime.LockOSThread()
	origin, err := netns.Get()
	must(t, err)
	target, err := netns.GetFromName(name)
	must(t, err)
	must(t, netns.Set(target))
	target.Close()
	t.Cleanup(func() {
		must(t, netns.Set(origin))
		origin.Close()
		runtime.UnlockOSThread()
	})
}

func (h *host) link(name string) netlink.Link {
	h.t.Helper()
	l, err := h.nl.LinkByName(name)
	must(h.t, err)
	return l
}

func (h *host) index(name string) int { return h.link(name).Attrs().Index }

func (h *host) address(device string, addresses ...string) {
	h.t.Helper()
	must(h.t, h.nl.LinkSetUp(h.link(device)))
	for _, address := range addresses {
		ip, network, err := net.ParseCIDR(address)
		must(h.t, err)
		network.IP = ip
		must(h.t, h.nl.AddrReplace(h.link(device), &netlink.Addr{IPNet: network}))
	}
}

// options attach docker0 and eth0. With TCX the test is skipped on a kernel that has none.
func (h *host) options(mode AttachMode) AttachOptions {
	h.t.Helper()
	if mode == TCX {
		needTCX(h.t)
	}
	return AttachOptions{Bridges: []string{"docker0"}, Uplinks: []string{"eth0"}, Mode: mode, MaxFlows: 4096, Spec: small(0)}
}

var kernelHasTCX = sync.OnceValues(haveTCX)

// automatic is what Auto comes to on this kernel where nothing is in the way.
func automatic(t *testing.T) state.AttachKind {
	t.Helper()
	tcx, err := kernelHasTCX()
	must(t, err)
	if tcx {
		return state.AttachTCX
	}
	return state.AttachClsact
}

func needTCX(t *testing.T) {
	t.Helper()
	if automatic(t) != state.AttachTCX {
		t.Skip("this kernel has no TCX")
	}
}

func (h *host) attach(opts AttachOptions) *Status {
	h.t.Helper()
	status, err := Attach(context.Background(), h.inst, opts, nil)
	if err != nil {
		h.t.Fatalf("attach: %v\n%s", err, VerifierLog(err, 20))
	}
	if len(status.Problems) > 0 {
		h.t.Fatalf("problems after attach: %q", status.Problems)
	}
	return status
}

func (h *host) detach() {
	h.t.Helper()
	found, err := Detach(context.Background(), h.inst)
	must(h.t, err)
	if !found {
		h.t.Fatal("detach found nothing")
	}
	h.wantNothing()
}

// wantNothing fails when anything of the instance is left: programs on hooks, qdiscs, pins,
// locks. The kernel ends links whose pins were lost a moment later.
func (h *host) wantNothing() {
	h.t.Helper()
	left := h.left()
	for end := time.Now().Add(patience); len(left) > 0 && time.Now().Before(end); left = h.left() {
		time.Sleep(5 * time.Millisecond)
	}
	if len(left) > 0 {
		h.t.Fatalf("left behind: %q", left)
	}
}

// patience is how long the kernel may take for what it does later: where a link or a cgroup goes, it waits for
// RCU and then for a worker, on a machine that may be busy.
const patience = 20 * time.Second

func (h *host) left() []string {
	h.t.Helper()
	var left []string
	links, err := h.nl.LinkList()
	must(h.t, err)
	for _, l := range links {
		device := l.Attrs().Name
		for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			if automatic(h.t) != state.AttachTCX {
				break
			}
			result, err := link.QueryPrograms(link.QueryOptions{Target: h.index(device), Attach: at})
			must(h.t, err)
			for _, p := range result.Programs {
				left = append(left, fmt.Sprintf("%s %s: %s", device, at, programName(p.ID)))
			}
		}
		qdiscs, err := h.nl.QdiscList(h.link(device))
		must(h.t, err)
		for _, q := range qdiscs {
			if q.Type() == "clsact" {
				left = append(left, device+" clsact")
			}
		}
	}
	for _, path := range []string{h.inst.changesPath(), h.inst.Dir(), h.inst.staged(), h.inst.retired(), h.inst.lockPath(), filepath.Dir(h.inst.Dir())} {
		if _, err := os.Lstat(path); err == nil {
			left = append(left, path)
		}
	}
	return left
}

// rebuilt is the real datapath with other code of the same meaning, as a new version is.
func rebuilt(version int32) func() (*ebpf.CollectionSpec, error) {
	return func() (*ebpf.CollectionSpec, error) {
		spec, err := bpf.LoadNAT()
		if err != nil {
			return nil, err
		}
		for _, program := range spec.Programs {
			if program.Type != ebpf.SchedCLS {
				continue
			}
			first := asm.Mov.Imm(asm.R0, version)
			first.Metadata = program.Instructions[0].Metadata
			program.Instructions[0].Metadata = asm.Metadata{}
			program.Instructions = slices.Insert(program.Instructions, 0, first)
		}
		return spec, nil
	}
}

// small is a datapath that passes every packet on, on the real maps and with the real expiry:
// it loads in no time.
func small(version int32) func() (*ebpf.CollectionSpec, error) {
	return func() (*ebpf.CollectionSpec, error) {
		spec, err := bpf.LoadNAT()
		if err != nil {
			return nil, err
		}
		for _, name := range hookPrograms() {
			spec.Programs[name] = &ebpf.ProgramSpec{
				Name: name, Type: ebpf.SchedCLS, License: "Dual BSD/GPL",
				Instructions: asm.Instructions{
					asm.LoadMapPtr(asm.R1, 0).WithReference(bpf.NATMapConfig),
					asm.Mov.Imm(asm.R0, version),
					asm.Mov.Imm(asm.R0, -1),
					asm.Return(),
				},
			}
		}
		return spec, nil
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
