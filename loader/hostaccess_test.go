package loader

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
)

// newCgroup makes an empty cgroup of version 2, in a mount of the test's own.
func newCgroup(t *testing.T, name string) string {
	t.Helper()
	root := t.TempDir()
	must(t, unix.Mount("none", root, "cgroup2", 0, ""))
	t.Cleanup(func() { must(t, unix.Unmount(root, unix.MNT_DETACH)) })
	// The hierarchy is the machine's, whoever mounts it: another run's names are in it too.
	dir, err := os.MkdirTemp(root, "tcnat-loader-"+name+"-")
	must(t, err)
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	})
	return dir
}

// hostProgramsOn are the ids of the programs on the hooks of a cgroup, of all those that are ours.
func hostProgramsOn(t *testing.T, cgroup string) []ebpf.ProgramID {
	t.Helper()
	dir, err := os.Open(cgroup)
	must(t, err)
	defer dir.Close()
	var ids []ebpf.ProgramID
	for _, h := range hostHooks() {
		result, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: h.at})
		must(t, err)
		for _, p := range result.Programs {
			ids = append(ids, p.ID)
		}
	}
	return ids
}

// TestHostAccess: attached once to each hook, swapped in place, moved to another cgroup, taken
// away, and gone after detach.
func TestHostAccess(t *testing.T) {
	h := newHost(t)
	first, second := newCgroup(t, h.inst.Name+"-1"), newCgroup(t, h.inst.Name+"-2")
	opts := h.options(Auto)
	opts.Cgroup = first
	if got, want := h.attach(opts).HostAccess, (HostAccess{true, first}); got.Attached != want.Attached || filepath.Base(got.Cgroup) != filepath.Base(want.Cgroup) {
		t.Errorf("status says %+v, want %+v", got, want)
	}
	before := hostProgramsOn(t, first)
	h.attach(opts)
	if again := hostProgramsOn(t, first); len(before) != len(hostHooks()) || !slices.Equal(again, before) {
		t.Errorf("attached twice: %v, were %v", again, before)
	}
	opts.Spec = small(1)
	h.attach(opts)
	swapped := hostProgramsOn(t, first)
	if len(swapped) != len(before) || slices.ContainsFunc(swapped, func(id ebpf.ProgramID) bool { return slices.Contains(before, id) }) {
		t.Errorf("upgraded: %v, were %v", swapped, before)
	}
	opts.Cgroup = second
	h.attach(opts)
	if left := hostProgramsOn(t, first); len(left) > 0 || len(hostProgramsOn(t, second)) != len(hostHooks()) {
		t.Errorf("moved: %v are left", left)
	}
	opts.Cgroup = ""
	if status := h.attach(opts); status.HostAccess.Attached || len(hostProgramsOn(t, second)) > 0 || h.inst.HasHostAccess() {
		t.Errorf("taken away: %+v", status.HostAccess)
	}
	opts.Cgroup = first
	h.attach(opts)
	h.detach()
	if left := hostProgramsOn(t, first); len(left) > 0 {
		t.Errorf("left after detach: %v", left)
	}
}

// TestHostAccessMended: what is missing is named by status, and attached anew.
func TestHostAccessMended(t *testing.T) {
	h := newHost(t)
	cgroup := newCgroup(t, h.inst.Name)
	opts := h.options(Auto)
	opts.Cgroup = cgroup
	h.attach(opts)
	problems := func() string {
		d, err := Open(h.inst)
		must(t, err)
		defer d.Close()
		status, err := d.Status()
		must(t, err)
		return strings.Join(status.Problems, "\n")
	}
	for _, pin := range pinsIn(h.inst.Dir()).hostPins() {
		if strings.HasSuffix(pin, bpf.NATProgLocalConnect6) {
			must(t, removeLink(pin))
		}
	}
	if got := problems(); got != "cgroup: local_connect6 is not attached: run tcnat attach again" {
		t.Errorf("a link is lost: %s", got)
	}
	h.attach(opts)

	h.address("eth0", "203.0.113.77/24")
	if got := problems(); got != "203.0.113.77: the host has it since attach ran, and does not reach published ports by it: run tcnat attach again" {
		t.Errorf("a new address: %s", got)
	}
	h.attach(opts)

	must(t, os.Remove(cgroup)) // the links with it, a moment later
	gone := "cgroup: it is gone, and the host's own access with it: run tcnat attach again"
	for end := time.Now().Add(patience); problems() != gone; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the cgroup is gone: %s", problems())
		}
	}
	must(t, os.Mkdir(cgroup, 0o755))
	h.attach(opts)
	if ids := hostProgramsOn(t, cgroup); len(ids) != len(hostHooks()) {
		t.Errorf("on the cgroup that was made anew: %v", ids)
	}
	h.detach()
}

func TestHostAccessRefused(t *testing.T) {
	h := newHost(t)
	opts := h.options(Auto)
	for path, text := range map[string]string{
		"/nowhere":  "cgroup /nowhere: unsuitable cgroup: no such file or directory",
		t.TempDir(): "name a directory of cgroup v2",
	} {
		opts.Cgroup = path
		if _, err := Attach(context.Background(), h.inst, opts, nil); !errors.Is(err, ErrBadCgroup) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v", path, err)
		}
		h.wantNothing()
	}

	// A program of somebody else that shares with nobody.
	cgroup := newCgroup(t, h.inst.Name)
	foreign, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	must(t, err)
	defer foreign.Close()
	dir, err := os.Open(cgroup)
	must(t, err)
	defer dir.Close()
	exclusive := link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: foreign, Attach: ebpf.AttachCGroupInet4Connect}
	must(t, link.RawAttachProgram(exclusive))
	opts.Cgroup = cgroup
	if _, err := Attach(context.Background(), h.inst, opts, nil); !errors.Is(err, ErrConflict) {
		t.Errorf("beside an exclusive program: %v", err)
	}
	h.wantNothing()

	// Where nobody asked for this cgroup, attach does without.
	id, err := cgroupID(cgroup)
	must(t, err)
	p := pinsIn(h.inst.Dir())
	must(t, p.make())
	defer func() { must(t, removeTree(h.inst.Dir())) }()
	var log strings.Builder
	opts.Cgroup = CgroupAuto
	c := &connector{
		attachment: &attachment{inst: h.inst, opts: opts, log: slog.New(slog.NewTextHandler(&log, nil)), cgroup: cgroup, cgroupID: id},
		pins:       p, host: make(map[string]*ebpf.Program),
	}
	for _, hook := range hostHooks() {
		kind := ebpf.CGroupSockAddr
		if hook.at == ebpf.AttachCgroupInetSockRelease {
			kind = ebpf.CGroupSock
		}
		program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: kind, AttachType: hook.at, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
		})
		must(t, err)
		defer program.Close()
		c.host[hook.program] = program
	}
	var undos []func() error
	must(t, c.attachHost(&undos))
	must(t, c.dropHost())
	if ids := hostProgramsOn(t, cgroup); len(ids) != 1 || !strings.Contains(log.String(), "docker-proxy at most") {
		t.Errorf("on the cgroup: %v, want the foreign one; log:\n%s", ids, log.String())
	}
	must(t, link.RawDetachProgram(link.RawDetachProgramOptions{Target: int(dir.Fd()), Program: foreign, Attach: ebpf.AttachCGroupInet4Connect}))
}

// TestHostAccessWithoutCgroups: where no hierarchy is mounted, attach does without, and says so.
func TestHostAccessWithoutCgroups(t *testing.T) {
	if dir := mountedCgroup(); dir != "" {
		t.Fatalf("cgroups are mounted at %s: attaching there would not be the test's own business", dir)
	}
	h := newHost(t)
	opts := h.options(Auto)
	opts.Cgroup = CgroupAuto
	var log strings.Builder
	status, err := Attach(context.Background(), h.inst, opts, slog.New(slog.NewTextHandler(&log, nil)))
	must(t, err)
	if status.HostAccess.Attached || len(status.Problems) > 0 || !strings.Contains(log.String(), "no cgroup v2 hierarchy is mounted") {
		t.Errorf("status %+v, problems %q, log:\n%s", status.HostAccess, status.Problems, log.String())
	}
	h.detach()
}

func TestCgroupRoots(t *testing.T) {
	for name, test := range map[string]struct {
		mounts string
		want   []string
	}{
		"v2":        {"30 20 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n", []string{"/sys/fs/cgroup"}},
		"hybrid":    {"31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n", []string{"/sys/fs/cgroup/unified"}},
		"v1":        {"32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n", nil},
		"container": {"30 20 0:26 /docker/1234 /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n", nil},
	} {
		if diff := cmp.Diff(test.want, cgroupRoots(test.mounts)); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}
