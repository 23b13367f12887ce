package loader

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	lockWait = 10 * time.Second
	lockPoll = 20 * time.Millisecond
)

// lock is the instance's flock: exclusive for who changes it, shared for who reads it.
type lock struct {
	file      *os.File
	inst      Instance
	exclusive bool
}

// acquire waits until ctx ends, at most lockWait. The error wraps ErrLocked and names the holder.
func (i Instance) acquire(ctx context.Context, exclusive bool) (*lock, error) {
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	for {
		file, err := openLock(i.lockPath())
		if err != nil {
			return nil, fmt.Errorf("%s: lock: %w", i, known(err))
		}
		if err := flock(ctx, file, exclusive); err != nil {
			who := holder(file)
			file.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("%s: %w by %s: try again when it is done", i, ErrLocked, who)
			}
			return nil, fmt.Errorf("%s: lock: %w", i, known(err))
		}
		// Who releases the lock of an instance that is gone removes the file: a lock on a
		// file without a name locks nobody.
		if !sameFile(file) {
			file.Close()
			continue
		}
		if exclusive {
			// For people; a lock without it is as good.
			_ = file.Truncate(0)
			_, _ = file.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
		}
		return &lock{file, i, exclusive}, nil
	}
}

// release ends the lock. When the instance is gone, the lock's file and the directories that
// instances share go too, unless another one needs them.
func (l *lock) release() {
	if l.exclusive {
		_ = l.file.Truncate(0)
		if _, err := os.Lstat(l.inst.Dir()); errors.Is(err, os.ErrNotExist) {
			_ = os.Remove(filepath.Dir(l.inst.Dir())) // fails while it holds other instances
			_ = os.Remove(l.inst.lockPath())
			_ = os.Remove(filepath.Dir(l.inst.lockPath())) // fails while it holds other locks
		}
	}
	l.file.Close()
}

func openLock(path string) (*os.File, error) {
	for {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if errors.Is(err, os.ErrNotExist) {
			continue // release removed the directory just now
		}
		return file, err
	}
}

// flock returns EWOULDBLOCK when ctx ends first.
func flock(ctx context.Context, file *os.File, exclusive bool) error {
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for {
		err := unix.Flock(int(file.Fd()), how|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

func sameFile(file *os.File) bool {
	open, err := file.Stat()
	if err != nil {
		return false
	}
	named, err := os.Stat(file.Name())
	return err == nil && os.SameFile(open, named)
}

// holder names the process that holds the lock: by the kernel's list, else by what it wrote.
func holder(file *os.File) string {
	var stat unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &stat); err == nil {
		inode := ":" + strconv.FormatUint(stat.Ino, 10)
		list, _ := os.ReadFile("/proc/locks")
		for line := range strings.Lines(string(list)) {
			// 1: FLOCK  ADVISORY  WRITE 4711 00:19:815 0 EOF
			f := strings.Fields(line)
			if len(f) >= 6 && f[1] == "FLOCK" && strings.HasSuffix(f[5], inode) {
				return process(f[4])
			}
		}
	}
	text := make([]byte, 16)
	n, _ := file.ReadAt(text, 0)
	return process(strings.TrimSpace(string(text[:n])))
}

func process(pid string) string {
	if pid == "" || pid == "0" || strings.HasPrefix(pid, "-") {
		return "another process"
	}
	name, err := os.ReadFile("/proc/" + pid + "/comm")
	if err != nil {
		return "process " + pid
	}
	return fmt.Sprintf("process %s (%s)", pid, strings.TrimSpace(string(name)))
}
