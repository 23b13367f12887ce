package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
	"tcnat/loader"
)

// refused is a command line that fails: what it says, and with which exit code.
type refused struct {
	line string
	code int
	want string // after "tcnat "
}

// check runs the lines; each prints one line, and leaves everything as it was.
func (h *host) check(lines []refused) {
	h.t.Helper()
	for _, bad := range lines {
		before := h.snapshot()
		r := h.tcnat(strings.Fields(bad.line)...)
		if r.code != bad.code || r.stdout != "" || r.stderr != "tcnat "+bad.want+"\n" {
			h.t.Errorf("%s: exit code %d, stdout %q, stderr\n%s want exit code %d and stderr\ntcnat %s",
				bad.line, r.code, r.stdout, r.stderr, bad.code, bad.want)
		}
		if diff := cmp.Diff(before, h.snapshot()); diff != "" {
			h.t.Errorf("%s: was refused, and changed something (-before +after)\n%s", bad.line, diff)
		}
	}
}

func TestBadInputAttached(t *testing.T) {
	h := newHost(t, lab.Options{})
	h.must("attach", "--bridge", lab.Bridge, "--uplink", lab.Uplink)
	h.must("dnat", "add", "-p", "tcp", "--dport", "3005", "--to-destination", "172.17.0.2:3005")
	h.must("snat", "add", "-s", "172.17.0.0/24", "--to-source", "203.0.113.2")
	const have = "(have: docker0, vethc1, eth0)"
	h.check([]refused{
		{"attach --bridge docker0 --uplink eth9", 1, "attach: uplink eth9: no such device " + have},
		{"attach --bridge br9 --uplink eth0", 1, "attach: bridge br9: no such device " + have},
		{"attach --bridge eth0 --uplink docker0", 1, "attach: bridge eth0: unsuitable device: it is no bridge but a veth: name the bridge that the containers are on"},
		{"attach --bridge docker0 --uplink vethc1", 1, "attach: uplink vethc1: unsuitable device: it is a port of bridge docker0: name that one"},
		{"attach --bridge docker0 --uplink eth0 --fast-path often", 2, "attach: --fast-path often: takes auto, established, always, off"},
		{"snat add -s 172.17.0.0/33 --masquerade", 2, "snat add: 172.17.0.0/33: prefix length 33 is over 32"},
		{"snat add -s 172.17.0.0/16 -o eth9 --masquerade", 1, "snat add: -o eth9: no such device " + have},
		{"snat add -s 172.17.0.0/16 -o ifindex:99 --masquerade", 1, "snat add: -o ifindex:99: no such device (have: docker0, eth0, vethc1)"},
		{"snat add -s 172.17.0.0/24 --to-source 203.0.113.3", 1, "snat add: -s 172.17.0.0/24 --to-source 203.0.113.3: overlaps with -s 172.17.0.0/24 --to-source 203.0.113.2: delete that rule first"},
		{"dnat add -p tcp --dport 0 --to-destination 172.17.0.2:80", 2, "dnat add: --dport 0: port 0 does not exist (ports are 1 to 65535)"},
		{"dnat add -p tcp --dport 80-79 --to-destination 172.17.0.2:80", 2, "dnat add: --dport 80-79: the port range is reversed (did you mean 79-80?)"},
		{"dnat add -p tcp -d 203.0.113.2 --dport 80 --to-destination [fd00:17::2]:80", 2, "dnat add: destination 203.0.113.2 and target fd00:17::2: mixed families: use one family a rule"},
		{"dnat add -p tcp -i eth9 --dport 80 --to-destination 172.17.0.2:80", 1, "dnat add: -i eth9: no such device " + have},
		{"dnat add -p tcp --dport 3000-3010 --to-destination 172.17.0.2", 1, "dnat add: -p tcp --dport 3000-3010 --to-destination 172.17.0.2: overlaps with -p tcp --dport 3005 --to-destination 172.17.0.2:3005: delete that rule first"},
		{"dnat add -p tcp --dport 3005 --to-destination 172.17.0.3:3005", 1, "dnat add: -p tcp --dport 3005 --to-destination 172.17.0.3:3005: overlaps with -p tcp --dport 3005 --to-destination 172.17.0.2:3005: delete that rule first"},
		{"dnat add -p tcp --dport 80 --to-destination 192.0.2.1:80", 1, "dnat add: 192.0.2.1: on no managed bridge (managed: docker0 172.17.0.0/16, docker0 fd00:17::/64)"},
	})

	before := h.snapshot()
	r := h.tcnat("dnat", "add", "-p", "tcp", "--dport", "3005", "--to-destination", "172.17.0.2:3005")
	if r.code != exitDone || r.stderr != "already there: nothing changed\n" {
		t.Errorf("the same rule twice: exit code %d, stderr %q", r.code, r.stderr)
	}
	r = h.tcnat("dnat", "del", "-p", "tcp", "--dport", "3006", "--to-destination", "172.17.0.2:3005")
	if r.code != exitDone || r.stderr != "not there: nothing changed\n" {
		t.Errorf("delete of no rule: exit code %d, stderr %q", r.code, r.stderr)
	}
	if diff := cmp.Diff(before, h.snapshot()); diff != "" {
		t.Errorf("idempotent verbs changed something (-before +after)\n%s", diff)
	}

	r = tcnat(t, "--netns", "no-such-lab", "status")
	if r.code != exitFailed || !strings.HasPrefix(r.stderr, "tcnat status: netns no-such-lab: no such network namespace (have: ") || strings.Count(r.stderr, "\n") != 1 {
		t.Errorf("unknown namespace: exit code %d, stderr %q", r.code, r.stderr)
	}
	r = tcnat(t, "--netns", h.World.Netns, "--instance", h.instance.Name, "dnat", "list")
	if r.code != exitFailed || !strings.Contains(r.stderr, "belongs to another network namespace") || strings.Count(r.stderr, "\n") != 1 {
		t.Errorf("instance of another namespace: exit code %d, stderr %q", r.code, r.stderr)
	}
}

func TestBadInputNotAttached(t *testing.T) {
	h := newHost(t, lab.Options{})
	var lines []refused
	for _, line := range []string{
		"dnat add -p tcp --dport 80 --to-destination 172.17.0.2:80",
		"dnat del -p tcp --dport 80",
		"dnat list",
		"snat add -s 172.17.0.0/16 --masquerade",
		"snat del -s 172.17.0.0/16",
		"snat list",
		"flows list",
		"flows flush",
		"status",
	} {
		verb, _, _ := strings.Cut(line, " -")
		lines = append(lines, refused{line, 1, verb + ": instance INSTANCE: not attached: run tcnat attach first"})
	}
	h.check(lines)
	h.check([]refused{
		{"attach --bridge docker0 --uplink eth9", 1, "attach: uplink eth9: no such device (have: docker0, vethc1, eth0)"},
		{"attach --bridge docker0 --uplink eth0 --max-flows 1000000000", 2, "attach: --max-flows 1000000000: over 67108864"},
		{"attach", 1, "attach: instance INSTANCE: name at least one bridge: not attached yet"},
	})
	r := h.tcnat("detach")
	if r.code != exitDone || r.stderr != "instance INSTANCE: not attached: nothing changed\n" {
		t.Errorf("detach of nothing: exit code %d, stderr %q", r.code, r.stderr)
	}
}

// Without rights every command says so, and none leaves anything half done.
func TestNoRights(t *testing.T) {
	h := newHost(t, lab.Options{})
	for _, attached := range []bool{false, true} {
		if attached {
			h.must("attach", "--bridge", lab.Bridge, "--uplink", lab.Uplink)
		}
		for _, line := range []string{
			"attach --bridge docker0 --uplink eth0",
			"load --bridge docker0 --uplink eth0",
			"detach",
			"status",
			"features",
			"flows flush",
			"dnat add -p tcp --dport 80 --to-destination 172.17.0.2:80",
		} {
			before := h.snapshot()
			var r result
			err := h.Host.Do(func() error { // its thread ends with it
				if err := dropCapabilities(); err != nil {
					return err
				}
				r = tcnat(t, append([]string{"--instance", h.instance.Name}, strings.Fields(line)...)...)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			verb, _, _ := strings.Cut(line, " -")
			if r.code != exitFailed || r.stderr != "tcnat "+verb+": not permitted: needs CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON (try sudo)\n" {
				t.Errorf("%s: exit code %d, stderr %q", line, r.code, r.stderr)
			}
			if diff := cmp.Diff(before, h.snapshot()); diff != "" {
				t.Errorf("%s: changed something (-before +after)\n%s", line, diff)
			}
		}
	}
}

// dropCapabilities takes all rights but root's files from this thread.
func dropCapabilities() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return nil
}

// A kernel without BTF, which a mount over its file makes of this one for one thread.
func TestNoBTF(t *testing.T) {
	h := newHost(t, lab.Options{})
	before := h.snapshot()
	var r result
	err := h.Host.Do(func() error { // its thread ends with it
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
		if err := unix.Mount("tmpfs", "/sys/kernel/btf", "tmpfs", 0, ""); err != nil {
			return fmt.Errorf("hide BTF: %w", err)
		}
		r = tcnat(t, "--instance", h.instance.Name, "attach", "--bridge", lab.Bridge, "--uplink", lab.Uplink)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	const want = "tcnat attach: no BTF: /sys/kernel/btf/vmlinux is missing: needs a kernel built with CONFIG_DEBUG_INFO_BTF\n"
	if r.code != exitFailed || r.stderr != want {
		t.Errorf("exit code %d, stderr %q, want %q", r.code, r.stderr, want)
	}
	if diff := cmp.Diff(before, h.snapshot()); diff != "" {
		t.Errorf("changed something (-before +after)\n%s", diff)
	}
}

// A damaged pin directory: everything says what to do, and detach cleans up.
func TestCorruptPins(t *testing.T) {
	version := fmt.Sprintf("v%d", loader.ABIVersion)
	for name, damage := range map[string]func(dir string) error{
		"no flows":   func(dir string) error { return os.Remove(filepath.Join(dir, version, "maps", "flows")) },
		"no maps":    func(dir string) error { return os.RemoveAll(filepath.Join(dir, version, "maps")) },
		"no version": func(dir string) error { return os.RemoveAll(filepath.Join(dir, version)) },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, lab.Options{})
			h.must("attach", "--bridge", lab.Bridge, "--uplink", lab.Uplink)
			if err := damage(h.instance.Dir()); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(filepath.Join(h.instance.Dir(), version, "links")); err != nil {
				h.waitUntilDetached()
			}
			for _, line := range []string{
				"status", "dnat list", "flows flush",
				"dnat add -p tcp --dport 80 --to-destination 172.17.0.2:80",
				"attach --bridge docker0 --uplink eth0",
			} {
				before := h.snapshot()
				r := h.tcnat(strings.Fields(line)...)
				if r.code != exitFailed || r.stdout != "" || strings.Count(r.stderr, "\n") != 1 ||
					!strings.Contains(r.stderr, "damaged pins") || !strings.Contains(r.stderr, "run tcnat detach") {
					t.Errorf("%s: exit code %d, stdout %q, stderr %q", line, r.code, r.stdout, r.stderr)
				}
				if diff := cmp.Diff(before, h.snapshot()); diff != "" {
					t.Errorf("%s: changed something (-before +after)\n%s", line, diff)
				}
			}
			h.must("detach")
			for _, device := range []string{lab.Bridge, lab.Uplink} {
				attached, err := h.Host.Attached(device)
				if err != nil || len(attached) > 0 {
					t.Errorf("after detach: %v, %v", attached, err)
				}
			}
			if _, err := os.Stat(h.instance.Dir()); !os.IsNotExist(err) {
				t.Errorf("after detach: %s: %v", h.instance.Dir(), err)
			}
			h.must("attach", "--bridge", lab.Bridge, "--uplink", lab.Uplink)
		})
	}
}

// waitUntilDetached polls until links whose pins are gone are gone too: the kernel takes its time.
func (h *host) waitUntilDetached() {
	h.t.Helper()
	var left []string
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		left = nil
		for _, device := range []string{lab.Bridge, lab.Uplink} {
			attached, err := h.Host.Attached(device)
			if err != nil {
				h.t.Fatal(err)
			}
			left = append(left, attached...)
		}
		if len(left) == 0 {
			return
		}
	}
	h.t.Fatalf("still attached without pins: %v", left)
}
