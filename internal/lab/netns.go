package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// netnsDir is where iproute2 looks for named namespaces.
const netnsDir = "/run/netns"

// onOwnThread runs fn on an OS thread that is thrown away afterwards, so that fn may
// change the thread's namespaces. A panic or runtime.Goexit in fn goes on in the caller.
func onOwnThread(fn func() error) error {
	var (
		err      error
		panicked any
		returned bool
		done     = make(chan struct{})
	)
	go func() {
		defer close(done)
		defer func() { panicked = recover() }()
		runtime.LockOSThread() // never unlocked: the runtime ends the thread
		err = fn()
		returned = true
	}()
	<-done
	switch {
	case panicked != nil:
		panic(panicked)
	case !returned:
		runtime.Goexit()
	}
	return err
}

// createNetns makes a namespace that stands under netnsDir by name.
func createNetns(name string) error {
	path := filepath.Join(netnsDir, name)
	unlock, err := lockNetnsDir()
	if err != nil {
		return err
	}
	defer unlock()

	file, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("namespace %s: %w: remove it with `tcnat lab down`", name, ErrExists)
	}
	if err != nil {
		return fmt.Errorf("namespace %s: %w", name, permission(err))
	}
	_ = file.Close()

	err = onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", permission(err))
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind mount: %w", permission(err))
		}
		return nil
	})
	if err != nil {
		_ = removeNetnsFile(path)
		return fmt.Errorf("namespace %s: %w", name, err)
	}
	return nil
}

// deleteNetns removes the name of a namespace; one that is not there is no error.
func deleteNetns(name string) error {
	if err := removeNetnsFile(filepath.Join(netnsDir, name)); err != nil {
		return fmt.Errorf("remove namespace %s: %w", name, permission(err))
	}
	return nil
}

func removeNetnsFile(path string) error {
	// EINVAL: not a mount point, the rest of a creation that was killed.
	err := unix.Unmount(path, unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// lockNetnsDir makes netnsDir a shared mount as `ip netns add` does, under the lock that
// it takes. Without the mount, the first `ip netns add` on the machine would lay its own
// over the directory, and namespaces made before could never be unmounted.
func lockNetnsDir() (unlock func(), err error) {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return nil, fmt.Errorf("%s: %w", netnsDir, permission(err))
	}
	fd, err := unix.Open(netnsDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", netnsDir, permission(err))
	}
	unlock = func() { _ = unix.Close(fd) }
	if err := unix.Flock(fd, unix.LOCK_EX); err != nil {
		unlock()
		return nil, fmt.Errorf("lock %s: %w", netnsDir, err)
	}
	err = unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
	if errors.Is(err, unix.EINVAL) { // not a mount point yet
		err = unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, "")
		if err == nil {
			err = unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
		}
	}
	if err != nil {
		unlock()
		return nil, fmt.Errorf("share %s: %w", netnsDir, permission(err))
	}
	return unlock, nil
}

// permission adds the remedy to errors that say only that something is not permitted.
func permission(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w: %w", ErrNotPermitted, err)
	}
	return err
}
