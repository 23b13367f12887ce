package main

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"tcnat/internal/lab"
)

// newCgroup makes a cgroup of version 2 that has this process in it until the test ends.
func newCgroup(t *testing.T, name string) string {
	t.Helper()
	root := t.TempDir()
	if err := unix.Mount("none", root, "cgroup2", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	before := root
	was, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(was)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			before = filepath.Join(root, path)
		}
	}
	enter := func(dir string) error {
		return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
	}
	dir := filepath.Join(root, "tcnat-"+name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(enter(before), os.Remove(dir)); err != nil {
			t.Error(err)
		}
	})
	if err := enter(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// The host's own access as its user meets it: attached and told of, a port for the host alone, a
// connection that ends with its rule.
func TestHostAccess(t *testing.T) {
	h := newHost(t, lab.Options{})
	add := []string{"dnat", "add", "-p", "tcp", "-d", "127.0.0.1", "--dport", "3005", "--to-destination", "172.17.0.2:7"}
	del := []string{"dnat", "del", "-p", "tcp", "-d", "127.0.0.1", "--dport", "3005"}
	h.must("attach", "--bridge", lab.Bridge, "--uplink", lab.Uplink)
	if status := h.must("status"); !strings.Contains(status, "localhost  not attached\n") {
		t.Errorf("status:\n%s", status)
	}
	if r := h.tcnat(add...); r.code != exitDone || !strings.Contains(r.stderr, "so nothing reaches the port by it") {
		t.Errorf("add without access: %+v", r)
	}

	cgroup := newCgroup(t, h.instance.Name)
	if out := h.must("attach", "--cgroup", cgroup); !strings.Contains(out, "\nlocalhost: attached, to cgroup "+cgroup+"\n") {
		t.Errorf("attach says\n%s", out)
	}
	if status := h.must("status"); !strings.Contains(status, "localhost  attached, to cgroup "+cgroup+"\n") {
		t.Errorf("status:\n%s", status)
	}
	if r := h.tcnat(add...); r.code != exitDone || r.stderr != "already there: nothing changed\n" {
		t.Errorf("add again: %+v", r)
	}
	c := h.Containers[0]
	echo, err := lab.StartTCPEcho(t.Context(), c, netip.AddrPortFrom(c.Addr(lab.IPv4), 7))
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	published := netip.MustParseAddrPort("127.0.0.1:3005")
	conn, err := h.Host.DialTCP(t.Context(), netip.AddrPort{}, published)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if conn.RemoteAddr().String() != published.String() {
		t.Errorf("connected to %s", conn.RemoteAddr())
	}
	h.must(del...)
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNABORTED) {
		t.Errorf("when the rule has gone: %v", err)
	}
	if _, err := h.Host.DialTCP(t.Context(), netip.AddrPort{}, published); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("without the rule: %v", err)
	}

	r := h.tcnat("attach", "--cgroup", "/sys/fs/bpf")
	if r.code != exitFailed || r.stderr != "tcnat attach: cgroup /sys/fs/bpf: unsuitable cgroup: name a directory of cgroup v2\n" {
		t.Errorf("another directory: %+v", r)
	}
	h.must("detach")
}
