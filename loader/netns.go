package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const netnsDir = "/run/netns"

// InNetns runs fn in the network namespace of that name (as ip netns knows it) or path, on a
// thread of its own, without changing the mount namespace. fn must not leave work to other
// goroutines. The error wraps ErrNoNetns where there is none.
func InNetns(nameOrPath string, fn func() error) (err error) {
	path := nameOrPath
	if !strings.Contains(path, "/") {
		path = filepath.Join(netnsDir, path)
	}
	target, err := netns.GetFromPath(path)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("netns %s: %w (have: %s)", nameOrPath, ErrNoNetns, strings.Join(netnsNames(), ", "))
	}
	if err != nil {
		return fmt.Errorf("netns %s: %w", nameOrPath, known(err))
	}
	defer target.Close()

	runtime.LockOSThread()
	origin, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("netns: %w", err)
	}
	defer origin.Close()
	if err := netns.Set(target); err != nil {
		runtime.UnlockOSThread()
		if errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("netns %s: %w: it is a file of another kind", nameOrPath, ErrNoNetns)
		}
		return fmt.Errorf("netns %s: %w", nameOrPath, known(err))
	}
	defer func() {
		if back := netns.Set(origin); back != nil {
			// The thread stays locked, so it ends with this goroutine and runs nothing else.
			err = errors.Join(err, fmt.Errorf("netns: go back: %w", back))
			return
		}
		runtime.UnlockOSThread()
	}()
	return fn()
}

func netnsNames() []string {
	entries, _ := os.ReadDir(netnsDir)
	names := make([]string, 0, len(entries))
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	if len(names) == 0 {
		return []string{"none"}
	}
	return names
}

// netnsCookie is the kernel's number of the current network namespace, never used twice.
func netnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("netns cookie: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("netns cookie: %w", err)
	}
	return cookie, nil
}

// netnsExists looks for the namespace with that cookie: among the named ones and those that a
// process is in. Namespaces that only a file descriptor or another mount keeps are not found.
func netnsExists(cookie uint64) bool {
	named, _ := filepath.Glob(netnsDir + "/*")
	used, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	seen := make(map[uint64]bool)
	for _, path := range append(named, used...) {
		var stat unix.Stat_t
		if unix.Stat(path, &stat) != nil || seen[stat.Ino] {
			continue
		}
		seen[stat.Ino] = true
		found := false
		_ = InNetns(path, func() error {
			have, err := netnsCookie()
			found = err == nil && have == cookie
			return nil
		})
		if found {
			return true
		}
	}
	return false
}
